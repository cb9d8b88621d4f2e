package netavark

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/tulle-net/tulle/internal/api"
)

// starting is an agent that has found its cluster when it is asked for the third time, and then has no address.
type starting struct {
	api.Backend
	asked atomic.Int32
	pods  []api.Pod
}

func (s *starting) Pods(context.Context) ([]api.Pod, error) { return s.pods, nil }

func (s *starting) Allocate(context.Context, api.AllocateRequest) (api.Allocation, error) {
	if s.asked.Add(1) < 3 {
		return api.Allocation{}, api.Errorf(api.CodeUnhealthy, "this node is in no cluster yet")
	}
	return api.Allocation{}, api.Errorf(api.CodeRefused, "there is no address")
}

func (s *starting) serve(t *testing.T) (socket string) {
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
	wg.Go(func() { _ = api.NewServer(s, slog.New(slog.DiscardHandler)).Serve(ctx, l) })
	t.Cleanup(func() {
		stop()
		wg.Wait()
	})
	return socket
}

// An agent that is starting is waited for; what it says then is the answer.
func TestWaitsForStart(t *testing.T) {
	s := &starting{}
	code, answer, raw := run(t, setupInput(s.serve(t), "", ""), "setup", "/proc/self/ns/net")
	if text, _ := answer["error"].(string); code != 1 || !strings.Contains(text, "there is no address") || s.asked.Load() != 3 {
		t.Errorf("%d %s after %d requests", code, raw, s.asked.Load())
	}
}

// A second interface of the same container is refused, that of another container is not.
func TestOneNetwork(t *testing.T) {
	other := api.PodID{Engine: api.EnginePodman, Network: "first", Container: "752947ff91f9", Interface: "eth0"}
	for _, c := range []struct {
		container, state, want string
	}{
		{"752947ff91f9", api.PodUp, "network first"},
		{"aaaaaaaaaaaa", api.PodUp, "no address"},
		{"752947ff91f9", api.PodUnwired, "no address"},
	} {
		other.Container = c.container
		s := &starting{pods: []api.Pod{{ID: other.String(), PodID: other, State: c.state}}}
		_, answer, raw := run(t, setupInput(s.serve(t), `"eth0"`, `"eth1"`), "setup", "/proc/self/ns/net")
		if text, _ := answer["error"].(string); !strings.Contains(text, c.want) {
			t.Errorf("%s %s: %s, want an error with %q", c.container, c.state, raw, c.want)
		}
	}
}
