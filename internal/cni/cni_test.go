package cni

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/testing/controlsocket"
)

// full is an agent with these pods, and without an address for another one.
type full struct {
	api.Backend
	pods []api.Pod
}

func (f *full) PodsOf(context.Context, string) ([]api.Pod, error) { return f.pods, nil }

func (f *full) Allocate(context.Context, api.AllocateRequest) (api.Allocation, error) {
	return api.Allocation{}, api.Errorf(api.CodeRefused, "there is no address")
}

// A second interface of the same container is refused before anything of it is made: its default route would cut the first one off.
func TestSecondInterface(t *testing.T) {
	first := api.PodID{Engine: api.EngineCNI, Network: "tulle", Container: "c0ffee", Interface: "eth0"}
	for _, c := range []struct {
		container, state string
		code             uint
	}{
		{"c0ffee", api.PodUp, types.ErrInvalidNetworkConfig},
		{"decaf", api.PodUp, ErrAddress},
		{"c0ffee", api.PodUnwired, ErrAddress},
	} {
		first.Container = c.container
		f := &full{pods: []api.Pod{{ID: first.String(), PodID: first, State: c.state}}}
		err := add(&skel.CmdArgs{
			ContainerID: "c0ffee", IfName: "eth1", Netns: "/proc/self/ns/net",
			StdinData: fmt.Appendf(nil, `{"cniVersion": "1.1.0", "name": "other", "socket": %q}`, controlsocket.Serve(t, f)),
		})
		if err == nil || coded(err).Code != c.code {
			t.Errorf("another interface of %s is %s: %v, want code %d", c.container, c.state, err, c.code)
		} else if c.code == types.ErrInvalidNetworkConfig && !strings.Contains(err.Error(), "network tulle") {
			t.Errorf("the error does not name the first network: %v", err)
		}
	}
}
