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
)

func TestClonedIdentity(t *testing.T) {
	leakCheck(t)
	a := launch(t, "original", patient, cluster(membership.NewClusterID()))
	b := launch(t, "witness", patient, seeds(a.addr))
	c := launch(t, "second-witness", patient, seeds(a.addr))
	converge(t, a, b, c)
	clone := launch(t, "copy", identity(a.cfg.ID), cluster(a.Cluster()), seeds(b.addr))
	select {
	case <-clone.done:
	case <-time.After(30 * time.Second):
		t.Fatal("the clone runs")
	}
	err := clone.stop()
	var ce *CloneError
	if !errors.As(err, &ce) || ce.ID != a.cfg.ID {
		t.Fatalf("Run returned %v", err)
	}
	for _, word := range []string{"original", a.addr.String(), "copy", clone.addr.String(), "state directory"} {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("the error does not name %q: %v", word, err)
		}
	}
	if !a.sees(b, c) || !b.sees(a, c) {
		t.Error("the original has suffered")
	}
	if m, _ := b.Member(a.cfg.ID); m.Addr.Addr() != a.addr {
		t.Errorf("the witness has the original at %v", m.Addr)
	}
	for _, n := range []*node{a, b} {
		eventually(t, n.name+" names both", func() bool {
			return n.hasProblem("original", a.addr.String(), "copy", clone.addr.String())
		})
	}
	if b.times(b.merged, clone.state) != 0 {
		t.Error("state of the clone has been merged")
	}
}

// A clone that starts while the original is out of sight is let in; when they
// meet, the one that has run for a shorter time gives way, whatever its clock says.
func TestClonesMeetAfterAPartition(t *testing.T) {
	leakCheck(t)
	var cut atomic.Bool
	cut.Store(true)
	addrs := []netip.Addr{testAddr(), testAddr(), testAddr(), testAddr()}
	slices.Reverse(addrs) // the elder has the higher address, which decides only between two that started at once
	left := map[netip.Addr]bool{addrs[0]: true, addrs[1]: true}
	link := links(func(x, y netip.Addr) bool { return !cut.Load() || left[x] == left[y] })
	id := membership.NewClusterID()
	older := func(g *Gossip) { g.born = g.born.Add(-time.Minute) } // tests start within one second
	a := launchAltered(t, "a", older, at(addrs[0]), link, cluster(id), seeds(addrs...))
	b := launch(t, "b", at(addrs[1]), link, cluster(id), seeds(addrs...))
	twin := launchAltered(t, "twin", wrongClock(-8*time.Hour), at(addrs[2]), link, cluster(id), seeds(addrs...), identity(a.cfg.ID))
	d := launch(t, "d", at(addrs[3]), link, cluster(id), seeds(addrs...))
	converge(t, a, b)
	converge(t, twin, d)
	cut.Store(false)
	select {
	case <-twin.done:
	case <-a.done:
		t.Fatalf("the elder gave way: %v", a.stop())
	case <-time.After(30 * time.Second):
		t.Fatal("both run on")
	}
	var ce *CloneError
	if err := twin.stop(); !errors.As(err, &ce) {
		t.Fatalf("Run returned %v", err)
	}
	converge(t, a, b, d)
}

// wrongClock is a host whose clock is ahead of the right time, or behind it, when its agent starts.
func wrongClock(ahead time.Duration) func(*Gossip) {
	return func(g *Gossip) { g.alterMeta(func(m *membership.Meta) { m.Started += int64(ahead / time.Second) }) }
}

// alterMeta changes the metadata of a node that does not run yet.
func (g *Gossip) alterMeta(change func(*membership.Meta)) {
	m := g.meta
	change(&m)
	wire, err := g.encodeMeta(m)
	if err != nil {
		panic(err)
	}
	g.meta, g.metaWire = m, wire
}

// A cloned host boots with a clock that is behind the start of the original's agent, or ahead of it, and calls the original.
func TestCloneWithAWrongClockGivesWay(t *testing.T) {
	for name, ahead := range map[string]time.Duration{"behind": -8 * time.Hour, "ahead": 8 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			leakCheck(t)
			a := launch(t, "original", patient, cluster(membership.NewClusterID()))
			b := launch(t, "witness", patient, seeds(a.addr))
			c := launch(t, "second-witness", patient, seeds(a.addr))
			converge(t, a, b, c)
			clone := launchAltered(t, "copy", wrongClock(ahead), patient, identity(a.cfg.ID), cluster(a.Cluster()), seeds(a.addr, b.addr))
			select {
			case <-a.done:
				t.Fatalf("the original gave way: %v", a.stop())
			case <-clone.done:
			case <-time.After(30 * time.Second):
				t.Fatal("both run on")
			}
			if _, ok := errors.AsType[*CloneError](clone.stop()); !ok {
				t.Errorf("the clone's Run returned %v", clone.stop())
			}
			eventually(t, "the original names both", func() bool {
				return a.hasProblem("original", a.addr.String(), "copy", clone.addr.String())
			})
			if !a.sees(b, c) || !b.sees(a, c) {
				t.Error("the original has suffered")
			}
		})
	}
}

func TestTheNewerOfTwo(t *testing.T) {
	const low, high = "192.0.2.1:7946", "192.0.2.2:7946"
	told := func(established bool, age time.Duration) *run { return &run{established, age} }
	for _, tc := range []struct {
		what     string
		own      run
		at       string
		behind   int64 // by the clocks this node started so many seconds before the other one
		other    *run
		tells    bool
		givesWay bool
	}{
		{"only this one is established", run{true, time.Second}, low, -9, told(false, time.Hour), true, false},
		{"only the other one is", run{false, time.Hour}, low, 9, told(true, time.Second), true, true},
		{"this one has run for longer", run{true, time.Hour}, high, -9, told(true, time.Minute), true, false},
		{"the other one has", run{true, time.Minute}, low, 9, told(true, time.Hour), true, true},
		{"neither is established, and this one has run for longer", run{false, time.Hour}, high, -9, told(false, time.Minute), true, false},
		{"neither is, and the other one has", run{false, time.Minute}, low, 9, told(false, time.Hour), true, true},
		{"at once, the lower address", run{true, time.Second}, low, -9, told(true, time.Second+time.Millisecond), true, false},
		{"at once, the higher address", run{true, time.Second + time.Millisecond}, high, 9, told(true, time.Second), true, true},
		{"no way to ask, established", run{true, time.Second}, high, -9, nil, true, false},
		{"no way to ask, not established", run{false, time.Hour}, low, 9, nil, true, true},
		{"an older agent, which started later by its clock", run{true, time.Second}, low, 9, nil, false, false},
		{"an older agent, which started earlier by its clock", run{true, time.Hour}, low, -9, nil, false, true},
		{"an older agent, in the same second, the higher address", run{true, time.Hour}, high, 0, nil, false, true},
		{"an older agent, in the same second, the lower address", run{true, time.Hour}, low, 0, nil, false, false},
		{"an older agent, and this one is not established", run{false, time.Hour}, low, 9, nil, false, true},
	} {
		e := elsewhere{addr: netip.MustParseAddrPort(low), started: 1_000_000, tells: tc.tells}
		if tc.at == low {
			e.addr = netip.MustParseAddrPort(high)
		}
		if got := e.elder(tc.own, e.started-tc.behind, netip.MustParseAddrPort(tc.at), tc.other); got != tc.givesWay {
			t.Errorf("%s: gives way %v", tc.what, got)
		}
	}
}

// However long each takes to hear of the other: two that ask each other never both give way.
func TestNeverBothGiveWay(t *testing.T) {
	low, high := netip.MustParseAddrPort("192.0.2.1:7946"), netip.MustParseAddrPort("192.0.2.2:7946")
	for apart := -3 * time.Second; apart <= 3*time.Second; apart += 50 * time.Millisecond {
		for took1 := time.Duration(0); took1 <= 2*time.Second; took1 += 100 * time.Millisecond {
			for took2 := time.Duration(0); took2 <= 2*time.Second; took2 += 100 * time.Millisecond {
				a, b := time.Hour+apart, time.Hour
				first := (&elsewhere{addr: high, tells: true}).elder(run{true, a + took1}, 0, low, &run{true, b})
				second := (&elsewhere{addr: low, tells: true}).elder(run{true, b + took2}, 0, high, &run{true, a})
				if first && second {
					t.Fatalf("started %v apart, answers take %v and %v: both give way", apart, took1, took2)
				}
				if took1+took2 == 0 && !first && !second && apart.Abs() != sameStart {
					t.Fatalf("started %v apart, answers take no time: both stay", apart)
				}
			}
		}
	}
}

// An older agent refuses what it does not know at the end of a question or an answer: with it the messages are those of its version.
func TestPresenceMessagesOfOlderAgents(t *testing.T) {
	leakCheck(t)
	unable := func(g *Gossip) {
		g.alterMeta(func(m *membership.Meta) { m.Capabilities &^= membership.CapTellsRun })
	}
	a := launchAltered(t, "older original", unable, patient, cluster(membership.NewClusterID()))
	b := launch(t, "witness", patient, seeds(a.addr))
	converge(t, a, b)
	ask := presenceAsk{id: 7, node: a.cfg.ID, at: netip.AddrPortFrom(a.addr, testPort), from: netip.AddrPortFrom(b.addr, testPort), who: "copy"}
	if got := ask.encode(); len(got) != 8+16+(1+6)+(1+6)+(1+len(ask.who)) {
		t.Errorf("a plain question has %d bytes: %x", len(got), got)
	}
	var got presence
	var told *run
	eventually(t, "a plain question is answered in time", func() bool { got, told = b.presenceOf(t.Context(), ask); return got != presenceNone })
	if got != presenceLives || len(presenceAnswer{7, got, told}.encode()) != 8+1 {
		t.Errorf("a plain question is answered with %v, %+v", got, told)
	}
	if tellsRun(a.metaWire) || !tellsRun(b.metaWire) {
		t.Error("the metadata does not say who tells its run")
	}
	for _, tells := range []bool{false, true} { // the run is in the answer if the question asked for it
		ask.run = true
		got, told := b.askPresence(t.Context(), ask, []respondent{{ask.at, tells}})
		if got != presenceLives || (told != nil) != tells {
			t.Errorf("a node that tells its run (%v) was asked, and has answered %v, %+v", tells, got, told)
		}
	}
	clone := launch(t, "copy", patient, identity(a.cfg.ID), cluster(a.Cluster()), seeds(a.addr, b.addr))
	select {
	case <-clone.done:
	case <-a.done:
		t.Fatalf("the original gave way: %v", a.stop())
	case <-time.After(30 * time.Second):
		t.Fatal("the clone runs")
	}
}

func TestReturns(t *testing.T) {
	for name, moved := range map[string]bool{"same address": false, "new address": true} {
		t.Run(name, func(t *testing.T) {
			leakCheck(t)
			a := launch(t, "a", cluster(membership.NewClusterID()))
			b := launch(t, "b", seeds(a.addr))
			c := launch(t, "c", seeds(a.addr))
			converge(t, a, b, c)
			c.stop()
			addr := c.addr
			if moved {
				addr = testAddr()
			}
			// At once: the others hold the old one for alive still.
			c2 := launch(t, "c", at(addr), identity(c.cfg.ID), cluster(a.Cluster()), func(cfg *Config) { cfg.LastPeers = c.KnownPeers() })
			converge(t, a, b, c2)
			for _, n := range []*node{a, b} {
				eventually(t, n.name+" has the address", func() bool {
					m, _ := n.Member(c.cfg.ID)
					return m.Addr.Addr() == addr && m.State == StateAlive && m.Meta.Underlay[0] == addr
				})
			}
			eventually(t, "nothing is wrong", func() bool { return !c2.isReturning() && len(c2.Problems()) == 0 })
			if err := a.Send(t.Context(), c.cfg.ID, []byte("welcome")); err != nil {
				t.Error(err)
			}
			eventually(t, "a message arrives", func() bool { return c2.times(c2.messages, a.cfg.ID.Short()+" welcome") == 1 })
		})
	}
}

func TestAddressChangesWhileRunning(t *testing.T) {
	leakCheck(t)
	a := launch(t, "a", patient, cluster(membership.NewClusterID()))
	b := launch(t, "b", patient, seeds(a.addr))
	c := launch(t, "c", patient, seeds(a.addr))
	converge(t, a, b, c)
	for range 2 {
		next := testAddr()
		if err := c.Rebind(t.Context(), next); err != nil {
			t.Fatal(err)
		}
		if err := c.SetMeta(membership.Meta{Underlay: []netip.Addr{next}}); err != nil {
			t.Fatal(err)
		}
		for _, n := range []*node{a, b} {
			eventually(t, n.name+" has the new address", func() bool {
				m, _ := n.Member(c.cfg.ID)
				return m.Addr.Addr() == next && m.State == StateAlive && m.Meta.Underlay[0] == next
			})
		}
		converge(t, a, b, c)
		eventually(t, "all members know", func() bool { return !c.isReturning() })
		for _, to := range []*node{a, b} {
			if err := c.Send(t.Context(), to.cfg.ID, []byte(next.String())); err != nil {
				t.Error(err)
			}
		}
	}
	// An address that this host does not have changes nothing.
	before := c.Gossip.Members()
	if err := c.Rebind(t.Context(), netip.MustParseAddr("192.0.2.1")); err == nil || !strings.Contains(err.Error(), "--underlay") {
		t.Errorf("rebind to a foreign address: %v", err)
	}
	if now := c.Gossip.Members(); len(now) != len(before) || !c.sees(a, b) {
		t.Error("a refused change of address has cost members")
	}
}

func TestLeaveForGood(t *testing.T) {
	leakCheck(t)
	a := launch(t, "a", cluster(membership.NewClusterID()))
	b := launch(t, "b", seeds(a.addr))
	converge(t, a, b)
	if err := b.Leave(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.stop(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a knows that b left", func() bool {
		m, _ := a.Member(b.cfg.ID)
		return m.State == StateLeft
	})
	if a.Isolated() {
		t.Error("who is left behind by all is not isolated")
	}
	a.Forget(b.cfg.ID)
	if n := len(a.Gossip.Members()); n != 0 {
		t.Errorf("%d members after forget", n)
	}
	if err := b.Send(t.Context(), a.cfg.ID, nil); !errors.Is(err, ErrNotRunning) {
		t.Errorf("send after the end: %v", err)
	}
}

// A partition longer than memberlist remembers its dead heals without a
// restart, and both sides work meanwhile.
func TestPartitionHeals(t *testing.T) {
	leakCheck(t)
	var nodes []*node
	var addrs []netip.Addr
	var oneSide atomic.Pointer[[]netip.Addr] // nil: no cut
	link := links(func(x, y netip.Addr) bool {
		s := oneSide.Load()
		return s == nil || slices.Contains(*s, x) == slices.Contains(*s, y)
	})
	for range 6 {
		addrs = append(addrs, testAddr())
	}
	id := membership.NewClusterID()
	for i, a := range addrs {
		// Only one seed: what heals the rest is memory of the peers.
		nodes = append(nodes, launch(t, string(rune('a'+i)), patient, at(a), link, cluster(id), seeds(addrs[0])))
	}
	converge(t, nodes...)
	oneSide.Store(&[]netip.Addr{addrs[0], addrs[2], addrs[4]})
	left, right := []*node{nodes[0], nodes[2], nodes[4]}, []*node{nodes[1], nodes[3], nodes[5]}
	converge(t, left...)
	converge(t, right...)
	// Wait until memberlist has forgotten the dead: nothing of it heals now.
	for _, n := range nodes {
		eventually(t, n.name+": memberlist has forgotten", n.forgotten)
	}
	if left[0].Isolated() || right[0].Isolated() {
		t.Error("a side of three is not isolated")
	}
	left[0].Queue([]byte("left"))
	right[0].Queue([]byte("right"))
	eventually(t, "the left works", func() bool { return left[2].times(left[2].broadcasts, "left") == 1 })
	eventually(t, "the right works", func() bool { return right[2].times(right[2].broadcasts, "right") == 1 })
	merged := left[1].times(left[1].merged, right[1].state)
	oneSide.Store(nil)
	converge(t, nodes...)
	eventually(t, "states cross", func() bool { return left[1].times(left[1].merged, right[1].state) > merged })

	// One node alone, for as long.
	alone := nodes[5]
	oneSide.Store(&[]netip.Addr{alone.addr})
	eventually(t, "it says that it is isolated", func() bool {
		return alone.Isolated() && alone.hasProblem("seed "+addrs[0].String(), "no route")
	})
	eventually(t, "memberlist has forgotten", func() bool { return nodes[0].forgotten() && alone.forgotten() })
	oneSide.Store(nil)
	converge(t, nodes...)
}

// forgotten reports whether memberlist has dropped its dead: they have been so
// for longer than gossipToTheDead and two rounds of probes.
func (n *node) forgotten() bool { return n.lostFor() > 3*time.Second }
