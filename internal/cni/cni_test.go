package cni

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/tulle-net/tulle/internal/api"
)

// full is an agent with these pods, and without an address for another one.
type full struct {
	api.Backend
	pods []api.Pod
}

func (f *full) Pods(context.Context) ([]api.Pod, error) { return f.pods, nil }

func (f *full) Allocate(context.Context, api.AllocateRequest) (api.Allocation, error) {
	return api.Allocation{}, api.Errorf(api.CodeRefused, "there is no address")
}

// serve is the socket of an agent that answers as b does.
func serve(t *testing.T, b api.Backend) (socket string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "tulle") // t.TempDir may be too long for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket = filepath.Join(dir, "s")
	l, err := api.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = api.NewServer(b, slog.New(slog.DiscardHandler)).Serve(ctx, l) })
	t.Cleanup(func() {
		stop()
		wg.Wait()
	})
	return socket
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
			StdinData: fmt.Appendf(nil, `{"cniVersion": "1.1.0", "name": "other", "socket": %q}`, serve(t, f)),
		})
		if err == nil || coded(err).Code != c.code {
			t.Errorf("another interface of %s is %s: %v, want code %d", c.container, c.state, err, c.code)
		} else if c.code == types.ErrInvalidNetworkConfig && !strings.Contains(err.Error(), "network tulle") {
			t.Errorf("the error does not name the first network: %v", err)
		}
	}
}
