package cni

import (
	"context"
	"fmt"
	"os"
	"slices"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/attach"
	"github.com/tulle-net/tulle/internal/testing/controlsocket"
)

// asked is what ADD asks for.
func asked(args *skel.CmdArgs) (attach.Request, error) {
	c, err := parse(args)
	if err != nil {
		return attach.Request{}, err
	}
	return c.request(args)
}

// The MAC address is asked for in the ways of addresses.
func TestParseMAC(t *testing.T) {
	for what, args := range map[string]*skel.CmdArgs{
		"runtimeConfig": {StdinData: []byte(`{"runtimeConfig": {"mac": "02:00:00:00:00:01"}, "args": {"cni": {"mac": "02:00:00:00:00:02"}}}`), Args: "MAC=02:00:00:00:00:03"},
		"args.cni":      {StdinData: []byte(`{"args": {"cni": {"mac": "02:00:00:00:00:01"}}}`), Args: "MAC=02:00:00:00:00:03"},
		"CNI_ARGS":      {StdinData: []byte(`{}`), Args: "IgnoreUnknown=1;MAC=02:00:00:00:00:01"},
	} {
		if r, err := asked(args); err != nil || r.MAC.String() != "02:00:00:00:00:01" {
			t.Errorf("%s: %v, %v", what, r, err)
		}
	}
	if r, err := asked(&skel.CmdArgs{StdinData: []byte(`{}`)}); err != nil || r.MAC != nil {
		t.Errorf("nothing asked for: %v, %v", r, err)
	}
}

func TestParse(t *testing.T) {
	for _, c := range []struct {
		what, conf, args string
		name             string
		requested        []string
		code             uint
	}{
		{"nothing", `{}`, "", "0123456789ab", nil, 0},
		{"kubelet", `{"ipam": {}, "x": [1]}`, "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_UID=1", "default/web", nil, 0},
		{"nomad", `{}`, "NOMAD_JOB_ID=job;NOMAD_GROUP_NAME=g;NOMAD_REGION=x", "job/g", nil, 0},
		{"two families in CNI_ARGS", `{}`, "IP=10.244.0.9, fd00::9/64", "0123456789ab", []string{"10.244.0.9", "fd00::9"}, 0},
		{"runtimeConfig wins", `{"runtimeConfig": {"ips": ["10.244.0.8/24"]}, "args": {"cni": {"ips": ["10.244.0.7"]}}}`, "IP=10.244.0.9", "0123456789ab", []string{"10.244.0.8"}, 0},
		{"args.cni", `{"args": {"cni": {"ips": ["10.244.0.7"]}}}`, "IP=10.244.0.9", "0123456789ab", []string{"10.244.0.7"}, 0},
		{"no MAC address", `{"runtimeConfig": {"mac": "02:00:00"}}`, "", "", nil, types.ErrInvalidNetworkConfig},
		{"a group's MAC address", `{}`, "MAC=01:00:00:00:00:01", "", nil, types.ErrInvalidNetworkConfig},
		{"no address", `{}`, "IP=10.244.0", "", nil, types.ErrInvalidNetworkConfig},
		{"no object", `[]`, "", "", nil, types.ErrDecodingFailure},
		{"odd arguments", `{}`, ";;=;a;=b;c==d", "0123456789ab", nil, 0},
	} {
		got, err := asked(&skel.CmdArgs{ContainerID: "0123456789abcdef", IfName: "eth0", Args: c.args, StdinData: []byte(c.conf)})
		if c.code != 0 {
			if err == nil || coded(err).Code != c.code {
				t.Errorf("%s: %v, want code %d", c.what, err, c.code)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.what, err)
			continue
		}
		var requested []string
		for _, a := range got.Requested {
			requested = append(requested, a.String())
		}
		if got.Name != c.name || !slices.Equal(requested, c.requested) {
			t.Errorf("%s: name %q, requested %v", c.what, got.Name, requested)
		}
	}
}

// DEL finds what ADD has refused: of the configuration it needs the names, and what else is wrong there is no error.
func TestDelOfRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: DEL looks for the container's link and source checks")
	}
	for _, wrong := range []string{`"args": {"cni": {"ips": "10.244.0.7"}}`, `"args": "x"`, `"runtimeConfig": {"mac": 7}`, `"bridge": 5`, `"dns": {"nameservers": "10.0.0.1"}`} {
		f := &freed{}
		args := &skel.CmdArgs{ContainerID: "c0ffee", IfName: "eth0", Netns: "/proc/self/ns/net",
			StdinData: fmt.Appendf(nil, `{"cniVersion": "1.1.0", "name": "tulle", "socket": %q, %s}`, controlsocket.Serve(t, f), wrong)}
		if err := add(args); err == nil || coded(err).Code != types.ErrDecodingFailure {
			t.Errorf("ADD with %s: %v, want code %d", wrong, err, types.ErrDecodingFailure)
		}
		if err := del(args); err != nil || !slices.Equal(f.ids, []string{"cni/tulle/c0ffee/eth0"}) {
			t.Errorf("DEL with %s: %v, freed %q", wrong, err, f.ids)
		}
	}
}

// freed is an agent that notes what it is to free.
type freed struct {
	api.Backend
	ids []string
}

func (f *freed) Free(_ context.Context, r api.FreeRequest) (api.FreeResult, error) {
	f.ids = append(f.ids, r.ID)
	return api.FreeResult{}, nil
}

// What a runtime hands over never panics, and its ID reads back as it was.
func FuzzParse(f *testing.F) {
	f.Add(`{"name": "tulle", "cniVersion": "1.1.0", "runtimeConfig": {"ips": ["10.0.0.1/8"]}}`, "IP=fd00::1;K8S_POD_NAME=a", "c0ffee")
	f.Add(`{"prevResult": {"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.1/32", "interface": 7}]}, "cniVersion": "1.0.0"}`, "", "x")
	f.Fuzz(func(t *testing.T, conf, cniArgs, container string) {
		args := &skel.CmdArgs{ContainerID: container, IfName: "eth0", Args: cniArgs, StdinData: []byte(conf)}
		c, err := parse(args)
		if err != nil {
			return
		}
		if r, err := c.request(args); err == nil && len(r.Name) > api.MaxNameLen {
			t.Errorf("name of %d bytes", len(r.Name))
		}
		_, _ = c.previous(args)
	})
}
