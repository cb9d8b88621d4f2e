package cni

import (
	"cmp"
	"net/netip"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/attach"
)

// config is the plugin's configuration with what the call adds to it. Keys that are not here are no error: runtimes and
// other plugins have their own.
type config struct {
	types.PluginConf
	Socket        string `json:"socket"` // the agent's; empty means api.DefaultSocket
	Bridge        string `json:"bridge"` // of the host, which containers are behind; empty: each has a link of its own
	RuntimeConfig struct {
		IPs []string `json:"ips"` // capability "ips"
		MAC string   `json:"mac"` // capability "mac"
	} `json:"runtimeConfig"`
	Args struct {
		CNI struct {
			IPs []string `json:"ips"`
			MAC string   `json:"mac"`
		} `json:"cni"`
	} `json:"args"`
}

// parse reads the configuration.
func parse(args *skel.CmdArgs) (*config, error) {
	c := new(config)
	return c, decode(args.StdinData, c)
}

// parseID reads of the configuration what DEL needs, and nothing else: DEL succeeds where ADD was refused for the rest.
func parseID(args *skel.CmdArgs) (*config, error) {
	var id struct {
		Name   string `json:"name"`
		Socket string `json:"socket"`
	}
	err := decode(args.StdinData, &id)
	c := &config{Socket: id.Socket}
	c.Name = id.Name
	return c, err
}

// request is what ADD asks for. Addresses, and the MAC address, may be asked for in three ways (CONVENTIONS.md); the first one that is
// used wins. The other verbs do not look at them: DEL succeeds where ADD was refused.
func (c *config) request(args *skel.CmdArgs) (attach.Request, error) {
	env := cniArgs(args.Args)
	r := attach.Request{Socket: c.Socket, ID: c.id(args), Name: podName(env, args.ContainerID), Netns: args.Netns, Bridge: c.Bridge}
	ips := c.RuntimeConfig.IPs
	if len(ips) == 0 {
		ips = c.Args.CNI.IPs
	}
	if ip := env["IP"]; len(ips) == 0 && ip != "" {
		ips = strings.Split(ip, ",")
	}
	for _, s := range ips {
		a, err := parseAddr(strings.TrimSpace(s))
		if err != nil {
			return r, types.NewError(types.ErrInvalidNetworkConfig, "requested address "+s, err.Error())
		}
		r.Requested = append(r.Requested, a)
	}
	mac, err := attach.ParseMAC(cmp.Or(c.RuntimeConfig.MAC, c.Args.CNI.MAC, env["MAC"]))
	if err != nil {
		return r, types.NewError(types.ErrInvalidNetworkConfig, "requested MAC address", err.Error())
	}
	r.MAC = mac
	return r, nil
}

// parseAddr reads an address with or without the length of a prefix, which does not matter: pods have a /32 or a /128.
func parseAddr(s string) (netip.Addr, error) {
	s, _, _ = strings.Cut(s, "/")
	return netip.ParseAddr(s)
}

// cniArgs reads KEY=VALUE pairs between semicolons. Unknown ones are no error: Nomad sends many.
func cniArgs(s string) map[string]string {
	out := map[string]string{}
	for pair := range strings.SplitSeq(s, ";") {
		if k, v, ok := strings.Cut(pair, "="); ok {
			out[k] = v
		}
	}
	return out
}

// maxName bounds the name that is stored for people, bytes (api.MaxNameLen).
const maxName = api.MaxNameLen

// podName is what the engine calls the container, as far as it says.
func podName(env map[string]string, container string) string {
	name := ""
	switch {
	case env["K8S_POD_NAME"] != "":
		name = env["K8S_POD_NAMESPACE"] + "/" + env["K8S_POD_NAME"]
	case env["NOMAD_JOB_ID"] != "":
		name = env["NOMAD_JOB_ID"] + "/" + env["NOMAD_GROUP_NAME"]
	}
	name = cmp.Or(strings.Trim(name, "/"), container[:min(len(container), 12)])
	return name[:min(len(name), maxName)]
}

// id is the attachment's name on this host: container ID and interface are all that DEL has.
func (c *config) id(args *skel.CmdArgs) api.PodID {
	return api.PodID{Engine: api.EngineCNI, Network: c.Name, Container: args.ContainerID, Interface: args.IfName}
}
