package gossip

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/membership/keyring"
)

// neverDies leaves memberlist no time to find a member dead within a test: whoever is let in at another address is so because
// the old one was asked.
func neverDies(c *Config) { c.pace.suspicionMult = 10000 }

// at an address, all of them.
func (n *node) has(id membership.NodeID, addr netip.Addr) bool {
	m, ok := n.Member(id)
	return ok && m.Addr.Addr() == addr && m.State <= StateSuspect && m.Meta.Underlay[0] == addr
}

func TestReturnsElsewhereBeforeItsDeath(t *testing.T) {
	for name, keyed := range map[string]bool{"open": false, "encrypted": true} {
		t.Run(name, func(t *testing.T) {
			leakCheck(t)
			opts := []option{neverDies}
			if keyed {
				key, err := keyring.Parse(keyring.Generate())
				if err != nil {
					t.Fatal(err)
				}
				opts = append(opts, func(c *Config) {
					if c.Keyring, err = keyring.New(key); err != nil {
						t.Fatal(err)
					}
				})
			}
			with := func(more ...option) []option { return append(slices.Clone(opts), more...) }
			a := launch(t, "a", with(cluster(membership.NewClusterID()))...)
			b := launch(t, "b", with(seeds(a.addr))...)
			c := launch(t, "c", with(seeds(a.addr))...)
			converge(t, a, b, c)
			c.stop()
			c2 := launch(t, "c", with(identity(c.cfg.ID), cluster(a.Cluster()), seeds(a.addr))...)
			converge(t, a, b, c2)
			for _, n := range []*node{a, b} {
				eventually(t, n.name+" has the new address", func() bool { return n.has(c.cfg.ID, c2.addr) })
			}
			eventually(t, "nothing is wrong", func() bool {
				return !c2.isReturning() && len(c2.Problems())+len(a.Problems())+len(b.Problems()) == 0
			})
		})
	}
}

// Another address of the host is configured, and it keeps the old one, at which the node listens as at a virtual one. It is no clone of itself.
func TestMovesAndKeepsTheAddress(t *testing.T) {
	leakCheck(t)
	a := launch(t, "a", neverDies, cluster(membership.NewClusterID()))
	b := launch(t, "b", neverDies, seeds(a.addr))
	c := launch(t, "c", neverDies, seeds(a.addr))
	converge(t, a, b, c)
	c.stop()
	silent := make(chan struct{}) // nothing is asked before the node listens at the old address, too
	c2 := launch(t, "c", neverDies, identity(c.cfg.ID), cluster(a.Cluster()), seeds(a.addr), links(func(_, _ netip.Addr) bool {
		select {
		case <-silent:
			return true
		default:
			return false
		}
	}))
	if err := c2.Listen([]netip.Addr{c.addr}); err != nil {
		t.Fatal(err)
	}
	close(silent)
	converge(t, a, b, c2)
	for _, n := range []*node{a, b} {
		eventually(t, n.name+" has the new address", func() bool { return n.has(c.cfg.ID, c2.addr) })
	}
	for _, n := range []*node{a, b} { // word of the old address still goes round
		n.sawConflict(sighting{name: c.cfg.ID.String(), addr: netip.AddrPortFrom(c2.addr, testPort)}, sighting{name: c.cfg.ID.String(), addr: netip.AddrPortFrom(c.addr, testPort)})
		eventually(t, n.name+" has asked both addresses", func() bool { return len(n.conflicts.list()) == 0 })
	}
	eventually(t, "nothing is wrong", func() bool {
		return !c2.isReturning() && len(c2.Problems())+len(a.Problems())+len(b.Problems()) == 0
	})
	// Later it answers there again, where a seed may lead, as soon as it can.
	other, err := bind(netip.AddrPortFrom(c.addr, testPort))
	if err != nil {
		t.Fatal(err)
	}
	c2.beside.mu.Lock()
	c2.beside.left[c.addr] = time.Now().Add(-2 * leftFor)
	c2.beside.mu.Unlock()
	c2.wake()
	eventually(t, "it tries to listen at the old address", func() bool {
		c2.beside.mu.Lock()
		defer c2.beside.mu.Unlock()
		return c2.beside.again
	})
	other.close()
	c2.wake()
	eventually(t, "it listens at the old address", func() bool {
		again, err := bind(netip.AddrPortFrom(c.addr, testPort))
		if err == nil {
			again.close()
			c2.wake()
		}
		return err != nil
	})
}

func TestAddressesSwapped(t *testing.T) {
	leakCheck(t)
	a := launch(t, "a", neverDies, cluster(membership.NewClusterID()))
	b := launch(t, "b", neverDies, seeds(a.addr))
	c := launch(t, "c", neverDies, seeds(a.addr))
	converge(t, a, b, c)
	b.stop()
	c.stop()
	again := func(n *node, addr netip.Addr) *node {
		return launch(t, n.name, neverDies, at(addr), identity(n.cfg.ID), cluster(a.Cluster()), seeds(a.addr), func(cfg *Config) { cfg.LastPeers = n.KnownPeers() })
	}
	b2, c2 := again(b, c.addr), again(c, b.addr)
	converge(t, a, b2, c2)
	for _, n := range []*node{a, b2, c2} {
		eventually(t, n.name+" has the new addresses", func() bool {
			return (n == b2 || n.has(b.cfg.ID, c.addr)) && (n == c2 || n.has(c.cfg.ID, b.addr))
		})
	}
}

// Between a clone and the original there may be no way. A member that reaches both speaks for the original.
func TestCloneBehindAFirewall(t *testing.T) {
	leakCheck(t)
	addrs := []netip.Addr{testAddr(), testAddr(), testAddr()}
	link := links(func(x, y netip.Addr) bool { return x == y || x == addrs[2] || y == addrs[2] })
	a := launch(t, "original", patient, at(addrs[0]), link, cluster(membership.NewClusterID()), seeds(addrs[2]))
	b := launch(t, "witness", patient, at(addrs[2]), link, cluster(a.Cluster()))
	converge(t, a, b)
	clone := launch(t, "copy", at(addrs[1]), link, identity(a.cfg.ID), cluster(a.Cluster()), seeds(addrs[2]))
	select {
	case <-clone.done:
	case <-time.After(30 * time.Second):
		t.Fatal("the clone runs")
	}
	var ce *CloneError
	if err := clone.stop(); !errors.As(err, &ce) || !strings.Contains(err.Error(), a.addr.String()) || !strings.Contains(err.Error(), clone.addr.String()) {
		t.Fatalf("Run returned %v", err)
	}
	eventually(t, "the witness reports both", func() bool { return b.hasProblem("original", a.addr.String(), "copy", clone.addr.String()) })
	if !b.has(a.cfg.ID, a.addr) || !a.sees(b) {
		t.Error("the original has suffered")
	}
}

// Nobody is put out by a withdrawal who is there to contradict: not by somebody that takes an identity without asking, and not
// by chance.
func TestWithdrawalOfALiveNode(t *testing.T) {
	leakCheck(t)
	a := launch(t, "a", cluster(membership.NewClusterID()))
	b := launch(t, "b", seeds(a.addr))
	c := launch(t, "c", seeds(a.addr))
	converge(t, a, b, c)
	alone := links(func(netip.Addr, netip.Addr) bool { return true })
	impostor := launch(t, "impostor", alone, identity(c.cfg.ID), cluster(a.Cluster()))
	if err := impostor.withdraw(t.Context(), netip.AddrPortFrom(c.addr, testPort), []netip.AddrPort{netip.AddrPortFrom(a.addr, testPort)}); err != nil {
		t.Fatal(err)
	}
	impostor.stop()
	for _, n := range []*node{a, b} {
		eventually(t, n.name+" has the one that lives", func() bool { return n.has(c.cfg.ID, c.addr) })
	}
	converge(t, a, b, c)
}

// Who asks after a node is not told of, nor has packets sent to, an address that is not that node's.
func TestPresenceIsAskedOfKnownAddressesOnly(t *testing.T) {
	leakCheck(t)
	a := launch(t, "a", cluster(membership.NewClusterID()))
	b := launch(t, "b", seeds(a.addr))
	converge(t, a, b)
	there, nowhere := netip.AddrPortFrom(b.addr, testPort), netip.AddrPortFrom(testAddr(), testPort)
	here := netip.AddrPortFrom(a.addr, testPort)
	for _, tc := range []struct {
		id   membership.NodeID
		at   netip.AddrPort
		want presence
	}{
		{b.cfg.ID, there, presenceLives},
		{b.cfg.ID, nowhere, presenceUnknown},
		{membership.NewNodeID(), there, presenceUnknown},
		{membership.NewNodeID(), nowhere, presenceUnknown},
		{a.cfg.ID, nowhere, presenceUnknown},
		{b.cfg.ID, here, presenceNone}, // a itself is there
		{a.cfg.ID, here, presenceLives},
	} {
		for _, askRun := range []bool{false, true} {
			ask := presenceAsk{node: tc.id, at: tc.at, from: nowhere, who: "x", run: askRun}
			got, told := a.presenceOf(t.Context(), ask)
			for end := time.Now().Add(30 * time.Second); tc.want == presenceLives && (got == presenceNone || askRun && told == nil) && time.Now().Before(end); {
				got, told = a.presenceOf(t.Context(), ask) // an answer came too late
			}
			if got != tc.want || (told != nil) != (askRun && tc.want == presenceLives) {
				t.Errorf("%v at %v, asked for its run %v: %v, %+v, want %v", tc.id.Short(), tc.at, askRun, got, told, tc.want)
			}
		}
	}
	b.stop()
	if got, _ := a.presenceOf(t.Context(), presenceAsk{node: b.cfg.ID, at: there, from: nowhere}); got != presenceNone {
		t.Errorf("after its end: %v", got)
	}
}

// A member that was cut off while another one moved, and has missed that it left its old address, takes the new one: only this member knows that it is
// behind, since whoever is suspected there is not told of it.
func TestMissedMove(t *testing.T) {
	leakCheck(t)
	var cut atomic.Bool
	a := launch(t, "a", neverDies, cluster(membership.NewClusterID()))
	b := launch(t, "b", neverDies, seeds(a.addr), links(func(_, _ netip.Addr) bool { return !cut.Load() }))
	c := launch(t, "c", neverDies, seeds(a.addr))
	converge(t, a, b, c)
	cut.Store(true)
	c.stop()
	c2 := launch(t, "c", neverDies, identity(c.cfg.ID), cluster(a.Cluster()), seeds(a.addr))
	eventually(t, "a has the new address", func() bool { return a.has(c.cfg.ID, c2.addr) })
	eventually(t, "the move is over", func() bool { return !c2.isReturning() })
	eventually(t, "b suspects c", func() bool {
		m, ok := b.Member(c.cfg.ID)
		return ok && m.State == StateSuspect
	})
	cut.Store(false)
	eventually(t, "b has the new address", func() bool { return b.has(c.cfg.ID, c2.addr) })
	converge(t, a, b, c2)
}
