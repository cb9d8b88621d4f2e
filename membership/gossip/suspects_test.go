package gossip

import (
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tulle-net/tulle/membership"
)

// memberlist does not say when a suspect has refuted that it is gone, and probes it again when all the others have had their turn: here
// never.
func TestSuspectThatAnswers(t *testing.T) {
	leakCheck(t)
	var cut atomic.Bool
	link := links(func(netip.Addr, netip.Addr) bool { return !cut.Load() })
	unprobed := func(c *Config) { c.pace.probeInterval = time.Hour }
	a := launch(t, "a", link, unprobed, cluster(membership.NewClusterID()))
	b := launch(t, "b", link, unprobed, seeds(a.addr))
	converge(t, a, b)
	state := func() MemberState {
		m, _ := a.Member(b.cfg.ID)
		return m.State
	}
	eventually(t, "a knows that b has joined its cluster", func() bool { // no news of b comes after that
		m, _ := a.Member(b.cfg.ID)
		return m.Meta.Cluster == a.Cluster()
	})
	cut.Store(true)
	a.suspected(b.cfg.ID.String())
	time.Sleep(10 * a.cfg.pace.suspects)
	if s := state(); s != StateSuspect {
		t.Errorf("a suspect that does not answer is %v", s)
	}
	cut.Store(false)
	eventually(t, "a suspect that answers is alive", func() bool { return state() == StateAlive })
}
