package netavark

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/testing/controlsocket"
)

// starting is an agent that has found its cluster when it is asked for the third time, and then has no address.
type starting struct {
	api.Backend
	asked atomic.Int32
	pods  []api.Pod
}

func (s *starting) PodsOf(context.Context, string) ([]api.Pod, error) { return s.pods, nil }

func (s *starting) Allocate(context.Context, api.AllocateRequest) (api.Allocation, error) {
	if s.asked.Add(1) < 3 {
		return api.Allocation{}, api.Errorf(api.CodeUnhealthy, "this node is in no cluster yet")
	}
	return api.Allocation{}, api.Errorf(api.CodeRefused, "there is no address")
}

// An agent that is starting is waited for; what it says then is the answer.
func TestWaitsForStart(t *testing.T) {
	s := &starting{}
	code, answer, raw := run(t, setupInput(controlsocket.Serve(t, s), "", ""), "setup", "/proc/self/ns/net")
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
		_, answer, raw := run(t, setupInput(controlsocket.Serve(t, s), `"eth0"`, `"eth1"`), "setup", "/proc/self/ns/net")
		if text, _ := answer["error"].(string); !strings.Contains(text, c.want) {
			t.Errorf("%s %s: %s, want an error with %q", c.container, c.state, raw, c.want)
		}
	}
}
