package netavark

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/attach"
	"github.com/tulle-net/tulle/internal/podnet"
)

// What podman and netavark send and read, as far as this plugin looks at it.
type (
	network struct {
		Name             string            `json:"name"`
		Internal         bool              `json:"internal"`
		NetworkInterface string            `json:"network_interface"`
		Options          map[string]string `json:"options"`
		IPAMOptions      map[string]string `json:"ipam_options"`
		Subnets          []subnet          `json:"subnets"`
		Routes           []any             `json:"routes"`
	}
	subnet struct {
		Subnet string `json:"subnet"`
	}
	// call is the input of setup and teardown.
	call struct {
		ContainerID    string  `json:"container_id"`
		ContainerName  string  `json:"container_name"`
		PortMappings   []any   `json:"port_mappings"`
		Network        network `json:"network"`
		NetworkOptions struct {
			InterfaceName string            `json:"interface_name"`
			StaticIPs     []netip.Addr      `json:"static_ips"`
			StaticMAC     string            `json:"static_mac"`
			Options       map[string]string `json:"options"`
		} `json:"network_options"`
	}
	// status is the answer to setup.
	status struct {
		DNSSearchDomains []string                `json:"dns_search_domains"`
		DNSServerIPs     []string                `json:"dns_server_ips"`
		Interfaces       map[string]netInterface `json:"interfaces"` // by the name in the container
	}
	netInterface struct {
		MAC     string       `json:"mac_address"`
		Subnets []netAddress `json:"subnets"`
	}
	netAddress struct {
		Gateway netip.Addr   `json:"gateway"`
		IPNet   netip.Prefix `json:"ipnet"`
	}
	info struct {
		Version    string `json:"version"`
		APIVersion string `json:"api_version"`
	}
	failure struct {
		Error string `json:"error"`
	}
)

// The options of a network (`podman network create --opt`).
const (
	socketOption = "socket" // the path of the agent's control socket
	bridgeOption = "bridge" // the bridge of the host that containers are behind
)

// refuse names what this driver has no use for.
func (n *network) refuse() error {
	if n.Internal {
		return errors.New("--internal: this driver cannot keep a network from the outside; leave the option out, or set masquerade to false on the host")
	}
	if len(n.Subnets) > 0 {
		return fmt.Errorf("--subnet %s: the agent gives containers addresses of the cluster (cluster_cidr); leave --subnet, --gateway and --ip-range out", n.Subnets[0].Subnet)
	}
	if d := n.IPAMOptions["driver"]; d != "" && d != "none" {
		return fmt.Errorf("--ipam-driver %s: the agent gives containers their addresses; leave the option out", d)
	}
	if n.NetworkInterface != "" {
		return fmt.Errorf("--interface-name %s: every container has a link of its own; leave the option out, or choose the bridge of the host that containers are behind with --opt %s=NAME", n.NetworkInterface, bridgeOption)
	}
	if len(n.Routes) > 0 {
		return errors.New("--route: all routes of a container lead to its host; leave the option out")
	}
	return n.refuseOptions()
}

// refuseOptions names the first option, in the order of their names, that this driver does not have, or whose value is none.
func (n *network) refuseOptions() error {
	for _, key := range slices.Sorted(maps.Keys(n.Options)) {
		value := n.Options[key]
		var err error
		switch key {
		case socketOption:
			if !filepath.IsAbs(value) {
				err = errors.New("want an absolute path")
			}
		case bridgeOption:
			err = podnet.CheckInterface(value)
		default:
			err = fmt.Errorf("this driver has the options %s (the path of the agent's socket) and %s (the bridge of the host that containers are behind)", socketOption, bridgeOption)
		}
		if err != nil {
			return fmt.Errorf("--opt %s=%s: %w", key, value, err)
		}
	}
	return nil
}

// socket is the agent's; empty means api.DefaultSocket.
func (c *call) socket() string { return c.Network.Options[socketOption] }

// id is the attachment's name on this host, with the container's ID as short as `podman ps` has it.
func (c *call) id() (api.PodID, error) {
	const length = 12
	id := api.PodID{Engine: api.EnginePodman, Network: c.Network.Name, Container: c.ContainerID, Interface: c.NetworkOptions.InterfaceName}
	for what, part := range map[string]string{"network": id.Network, "container ID": id.Container, "interface name": id.Interface} {
		if part == "" || strings.ContainsAny(part, "/ ") {
			return id, fmt.Errorf("%s %q: want a name without \"/\" and spaces", what, part)
		}
	}
	id.Container = id.Container[:min(len(id.Container), length)]
	return id, nil
}

// request is what setup asks for, without the namespace.
func (c *call) request() (attach.Request, error) {
	id, err := c.id()
	if err != nil {
		return attach.Request{}, err
	}
	if err := c.Network.refuseOptions(); err != nil {
		return attach.Request{}, err // in a file that somebody has edited
	}
	r := attach.Request{
		Socket: c.socket(), ID: id, Name: c.ContainerName, Requested: slices.Clone(c.NetworkOptions.StaticIPs), Bridge: c.Network.Options[bridgeOption],
	}
	r.Name = r.Name[:min(len(r.Name), api.MaxNameLen)]
	for i, a := range r.Requested {
		r.Requested[i] = a.Unmap()
	}
	if r.MAC, err = attach.ParseMAC(c.NetworkOptions.StaticMAC); err != nil {
		return r, fmt.Errorf("--mac-address: %w", err)
	}
	for key, value := range c.NetworkOptions.Options {
		return r, fmt.Errorf("--network %s:%s=%s: this driver has no options for a container", c.Network.Name, key, value)
	}
	return r, nil
}

func hostPrefix(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
