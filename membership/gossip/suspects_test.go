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

// A refutation may be lost, and memberlist suspects the member further, whatever it answers, because it refutes an older suspicion only once: it is
// asked for all that it has, which ends that.
func TestLostRefutation(t *testing.T) {
	leakCheck(t)
	var cut, deaf atomic.Bool // between a and b; b hears c no more
	addrs := []netip.Addr{testAddr(), testAddr(), testAddr()}
	link := links(func(x, y netip.Addr) bool {
		between := x != addrs[2] && y != addrs[2]
		return !(cut.Load() && between || deaf.Load() && x == addrs[2] && y == addrs[1])
	})
	a, _ := keeper(t, "a", false, at(addrs[0]), link, neverDies, cluster(membership.NewClusterID()))
	b, atB := keeper(t, "b", false, at(addrs[1]), link, neverDies, seeds(addrs[0]))
	c, _ := keeper(t, "c", false, at(addrs[2]), link, neverDies, seeds(addrs[0]))
	settled(t, a, b, c)
	cut.Store(true)
	deaf.Store(true)
	suspects := func() bool { m, _ := b.Member(a.cfg.ID); return m.State == StateSuspect }
	eventually(t, "b suspects a", suspects)
	eventually(t, "a hears of it", func() bool { return a.doubts(b.cfg.ID.String()) })
	time.Sleep(quick.settle) // the refutation goes out
	before := atB.states.Load()
	deaf.Store(false)
	cut.Store(false)
	eventually(t, "b suspects a no more", func() bool { return !suspects() })
	eventually(t, "b asks a for all that it has", func() bool { return atB.states.Load() > before })
}
