package docker

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/internal/api"
)

// ledger is an agent's list of pods.
type ledger struct {
	api.Backend
	mu   sync.Mutex
	pods []api.Pod
}

func (l *ledger) Pods(context.Context) ([]api.Pod, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.pods), nil
}

func (l *ledger) Free(_ context.Context, r api.FreeRequest) (api.FreeResult, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pods = slices.DeleteFunc(l.pods, func(p api.Pod) bool { return p.ID == r.ID })
	return api.FreeResult{}, nil
}

func (l *ledger) add(engine, container, state string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	id := api.PodID{Engine: engine, Network: "n", Container: container, Interface: podInterface}
	l.pods = append(l.pods, api.Pod{ID: id.String(), PodID: id, State: state})
}

func (l *ledger) left() (names []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range l.pods {
		names = append(names, p.Container)
	}
	return names
}

// The sweep frees what has had no link for a minute, of Docker's only.
func TestSweep(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: looks for links of pods")
	}
	l := &ledger{}
	l.add(api.EngineDocker, "gone", api.PodUnwired)
	l.add(api.EngineDocker, "up", api.PodUp)
	l.add(api.EngineCNI, "other", api.PodUnwired)
	socket := filepath.Join(t.TempDir(), "s")
	listener, err := api.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _ = api.NewServer(l, slog.New(slog.DiscardHandler)).Serve(ctx, listener) })
	defer wg.Wait()
	defer stop()
	// Inside, a minute passes at once; the agent is outside.
	synctest.Test(t, func(t *testing.T) {
		d := New(socket, slog.New(slog.DiscardHandler))
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		go d.sweep(ctx)
		look := func(want ...string) {
			t.Helper()
			time.Sleep(sweepEvery)
			synctest.Wait()
			if got := l.left(); !slices.Equal(got, want) {
				t.Errorf("left are %v, want %v", got, want)
			}
		}
		time.Sleep(time.Second) // after the sweep's own look
		look("gone", "up", "other")
		l.add(api.EngineDocker, "young", api.PodUnwired)
		look("up", "other", "young")
		look("up", "other")
	})
}
