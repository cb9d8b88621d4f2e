package gossip

import (
	"context"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/tulle-net/tulle/membership"
)

// pulled is a handler that does something while another node joins: after the list of members for it was copied, before it is sent.
type pulled struct {
	*recorder
	once   sync.Once
	during func()
}

func (p *pulled) LocalState(join bool) []byte {
	p.once.Do(p.during)
	return p.recorder.LocalState(join)
}

// The metadata changes while the first other node joins. That node gets the old ones with the list of members, and the news must not be
// lost: memberlist's queue may replace them by word of the other node (queue.go gives a number twice if the only entry is replaced by
// another one of the same node; then two messages of the same length take the same place).
func TestMetaChangesDuringTheFirstJoin(t *testing.T) {
	leakCheck(t)
	h := &pulled{recorder: newRecorder("a")}
	rare := func(c *Config) { c.pace.pushPull, c.pace.heal, c.pace.healSlow = time.Hour, time.Hour, time.Hour }
	var a *node
	started := make(chan struct{})
	h.during = func() {
		<-started
		for port := uint16(6001); port <= 6002; port++ {
			if err := a.SetMeta(membership.Meta{UDPPort: port, Underlay: []netip.Addr{a.addr}}); err != nil {
				t.Error(err)
			}
			time.Sleep(100 * time.Millisecond) // until they are in memberlist's queue, at which nobody may look
		}
	}
	a = launch(t, "a", rare, cluster(membership.NewClusterID()), func(c *Config) { c.Handler, c.Meta.UDPPort = h, 6000 })
	close(started)
	b := launch(t, "b", rare, seeds(a.addr), func(c *Config) { c.Meta.UDPPort = 6000 })
	eventually(t, "b knows the new metadata of a", func() bool {
		m, ok := b.Member(a.cfg.ID)
		return ok && m.Meta.UDPPort == 6002
	})
}

// real is the pace of an agent.
func real(c *Config) { c.pace = pace{} }

// A broadcast takes its time to go out: over a second between two nodes, and the longer the more is queued. Until then it is not taken for
// lost: it would be sent anew, and again.
func TestMetaIsAnnouncedOnce(t *testing.T) {
	leakCheck(t)
	slow := func(c *Config) { c.pace.gossipInterval = 400 * time.Millisecond } // 2.0 to 2.4 s
	a := launch(t, "a", real, slow, cluster(membership.NewClusterID()))
	b := launch(t, "b", real, slow, seeds(a.addr))
	converge(t, a, b)
	n, err := a.current()
	if err != nil {
		t.Fatal(err)
	}
	for attempt := 1; ; attempt++ { // a busy machine has five
		ctx, cancel := context.WithTimeout(t.Context(), a.cfg.pace.announced) // then comes the first repetition
		a.update(ctx, n)
		late := ctx.Err() != nil
		cancel()
		if !late {
			return
		}
		if attempt == 5 {
			t.Fatal("the metadata had not gone out when they were announced for the first time")
		}
	}
}

// The wait before a repetition follows the size of the cluster: a small one loses no seconds, a large one repeats nothing in vain.
func TestOutWithin(t *testing.T) {
	g := &Gossip{}
	g.cfg.pace = pace{}.withDefaults()
	for alive, want := range map[int64]time.Duration{1: 2900 * time.Millisecond, 3: 1300 * time.Millisecond, 99: 2900 * time.Millisecond, 999: 3700 * time.Millisecond, 99999: 4 * time.Second} {
		g.alive.Store(alive)
		if got := g.outWithin(); got != want {
			t.Errorf("%d others: %v, want %v", alive, got, want)
		}
	}
}
