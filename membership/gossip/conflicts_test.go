package gossip

import (
	"net/netip"
	"testing"

	"github.com/tulle-net/tulle/membership"
)

func (n *node) sighting() sighting {
	n.Gossip.mu.RLock()
	defer n.Gossip.mu.RUnlock()
	return sighting{name: n.cfg.ID.String(), addr: n.bind, meta: n.metaWire, alive: true}
}

// A host that moves is announced from two addresses, as often as it moves and as long as word of the old address goes round. Only
// two hosts that answer are a conflict, and only as long as both do.
func TestMovesAreNoConflict(t *testing.T) {
	leakCheck(t)
	a := launch(t, "a", cluster(membership.NewClusterID()))
	c := launch(t, "c", seeds(a.addr))
	converge(t, a, c)
	alone := links(func(netip.Addr, netip.Addr) bool { return true })
	clone := launch(t, "clone", alone, identity(c.cfg.ID), cluster(a.Cluster()))
	here, there := c.sighting(), clone.sighting()
	old := there
	old.addr = netip.AddrPortFrom(testAddr(), testPort) // where nobody is
	investigated := func(known, other sighting) {
		t.Helper()
		a.sawConflict(known, other)
		eventually(t, "the addresses were asked", func() bool { return len(a.conflicts.list()) == 0 })
		for _, p := range a.Problems() {
			if p.Topic != "udp" { // which a busy machine is
				t.Fatalf("a host that has moved: %v", p)
			}
		}
	}
	for range 3 {
		investigated(here, old) // word of the old address
		investigated(old, here) // word of the new one
	}
	eventually(t, "two live hosts are named", func() bool {
		a.sawConflict(here, there)
		return a.hasProblem("two live hosts", "c at "+here.addr.String(), "clone at "+there.addr.String())
	})
	a.sawConflict(here, old) // and stay, whatever else is said
	clone.stop()
	eventually(t, "it is over when one has ended", func() bool { return len(a.Problems()) == 0 })
}

// A host with two families had lost the one by which it is announced, and has it again. It answers at both addresses.
func TestTwoAddressesOfOneHost(t *testing.T) {
	leakCheck(t)
	a := launch(t, "a", cluster(membership.NewClusterID()))
	c := launch(t, "c", seeds(a.addr))
	converge(t, a, c)
	other := testAddr()
	if err := c.Listen([]netip.Addr{other}); err != nil {
		t.Fatal(err)
	}
	here := c.sighting()
	m, err := membership.DecodeMeta(here.meta)
	if err != nil {
		t.Fatal(err)
	}
	m.Underlay = append(m.Underlay, other)
	if here.meta, err = m.Encode(nil); err != nil {
		t.Fatal(err)
	}
	there := here
	there.addr = netip.AddrPortFrom(other, testPort)
	there.meta = c.sighting().meta
	a.sawConflict(there, here)
	eventually(t, "the addresses were asked", func() bool { return len(a.conflicts.list()) == 0 })
	if a.hasProblem("two live hosts") {
		t.Errorf("a host with two addresses is taken for two: %v", a.Problems())
	}
}
