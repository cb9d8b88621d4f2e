package docker

import (
	"context"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/podnet"
	"github.com/tulle-net/tulle/internal/testing/controlsocket"
	"github.com/tulle-net/tulle/internal/testing/namespace"
)

// ledger is an agent's list of pods.
type ledger struct {
	api.Backend
	mu    sync.Mutex
	pods  []api.Pod
	tired []string // freed as if they had not rested
}

func (l *ledger) Pods(context.Context) ([]api.Pod, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.pods), nil
}

func (l *ledger) Free(_ context.Context, r api.FreeRequest) (api.FreeResult, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !r.Rested {
		l.tired = append(l.tired, r.ID)
	}
	l.pods = slices.DeleteFunc(l.pods, func(p api.Pod) bool { return p.ID == r.ID })
	return api.FreeResult{}, nil
}

func (l *ledger) add(engine, container, state string) (id api.PodID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	id = api.PodID{Engine: engine, Network: "n", Container: container, Interface: podInterface}
	l.pods = append(l.pods, api.Pod{ID: id.String(), PodID: id, State: state})
	return id
}

func (l *ledger) left() (names []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range l.pods {
		names = append(names, p.Container)
	}
	return names
}

// A container's end that the engine has put back into the host's namespace is freed at the second look, with its link. One that
// this process waits to join, and one that is in its container, stay.
func TestSweepOfStopped(t *testing.T) {
	l := &ledger{}
	host, box := namespace.New(t), namespace.New(t)
	d := New(controlsocket.Serve(t, l), slog.New(slog.DiscardHandler))
	host.Do(func() error {
		h, err := podnet.Open("")
		if err != nil {
			return err
		}
		defer h.Close()
		for i, name := range []string{"stopped", "starting", "up"} {
			id := l.add(api.EngineDocker, name, api.PodUp)
			c := podnet.Config{ID: id.String(), Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 244, 0, byte(3 + i)})}, MTU: 1400}
			switch name {
			case "starting":
				d.endpoints[name] = &endpoint{pod: id}
			case "up":
				c.Netns, c.Interface = box.Path(), "eth0"
			}
			if _, err := h.Add(t.Context(), c); err != nil {
				return err
			}
		}
		old := d.freeGone(t.Context(), nil)
		if got := l.left(); len(got) != 3 {
			t.Errorf("left after one look are %v", got)
		}
		d.freeGone(t.Context(), old)
		links, err := h.List()
		if got := l.left(); !slices.Equal(got, []string{"starting", "up"}) || len(links) != 2 {
			t.Errorf("left are %v, with %d links", got, len(links))
		}
		return err
	})
}

// The sweep frees what has had no link for a minute, of Docker's only. Such addresses need no more rest: a container may come back for
// one of them.
func TestSweep(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: looks for links of pods")
	}
	l := &ledger{}
	l.add(api.EngineDocker, "gone", api.PodUnwired)
	l.add(api.EngineDocker, "up", api.PodUp)
	l.add(api.EngineCNI, "other", api.PodUnwired)
	socket := controlsocket.Serve(t, l)
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
		if len(l.tired) > 0 {
			t.Errorf("these have to rest for another minute: %v", l.tired)
		}
	})
}
