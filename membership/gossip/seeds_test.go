package gossip

import (
	"net/netip"
	"testing"
	"time"

	"github.com/tulle-net/tulle/membership"
)

// A seed that starts late and comes in by another member has answered, without being tried again: a node that waits for
// all its seeds would wait for the next round otherwise.
func TestSeedThatCameByAnotherWay(t *testing.T) {
	leakCheck(t)
	a, b := testAddr(), testAddr()
	slow := func(c *Config) { c.pace.heal, c.pace.healSlow = time.Hour, time.Hour }
	first := launch(t, "first", seeds(a, b), slow)
	eventually(t, "both seeds are silent", func() bool {
		for _, s := range first.Seeds() {
			if s.Reason == "" {
				return false
			}
		}
		return true
	})
	launch(t, "a", at(a), seeds(first.addr))
	launch(t, "b", at(b), seeds(a))
	eventually(t, "both seeds count as answering", func() bool {
		for _, s := range first.Seeds() {
			if s.Reason != "" {
				return false
			}
		}
		return true
	})
}

// A node that members find before it has looked for its seeds tries all of them in its first round.
func TestSeedsAreAllTriedOnce(t *testing.T) {
	self := testAddr()
	c := Config{ID: membership.NewNodeID(), Name: "n", Bind: self, Port: testPort, Handler: newRecorder(""), pace: quick}
	c.Meta.Underlay = []netip.Addr{self}
	c.Seeds = []string{self.String()}
	var others []netip.AddrPort
	for range 5 {
		a := testAddr()
		others = append(others, netip.AddrPortFrom(a, testPort))
		c.Seeds = append(c.Seeds, a.String())
	}
	g, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range others {
		m := membership.Meta{ID: membership.NewNodeID(), Underlay: []netip.Addr{a.Addr()}}
		wire, err := g.encodeMeta(m)
		if err != nil {
			t.Fatal(err)
		}
		g.memberEvent(sighting{name: m.ID.String(), addr: a, meta: wire, alive: true}, StateAlive)
	}
	g.bind = netip.AddrPortFrom(self, testPort)
	g.healRound(t.Context())
	for _, s := range g.Seeds() {
		if s.Tried.IsZero() || s.Reason != "" || s.Self != (s.Address == self.String()) {
			t.Errorf("%+v", s)
		}
	}
}
