package gossip

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/membership/seed"
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
	list := []netip.Addr{self}
	var others []netip.AddrPort
	for range 5 {
		a := testAddr()
		others = append(others, netip.AddrPortFrom(a, testPort))
		list = append(list, a)
	}
	seeds(list...)(&c)
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
		if !s.Tried || s.Reason != "" || s.Answered != s.Others || s.Self() != (s.Name == self.String()) {
			t.Errorf("%+v", s)
		}
	}
}

// names is a seed list whose names are in a table of ours.
func names(t *testing.T, table map[string][]netip.Addr, texts ...string) option {
	t.Helper()
	lookup := func(_ context.Context, network, host string) ([]netip.Addr, error) {
		var out []netip.Addr
		for _, a := range table[host] {
			if a.Is4() == (network == "ip4") {
				out = append(out, a)
			}
		}
		if len(out) == 0 {
			return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
		}
		return out, nil
	}
	list, err := seed.New(texts, testPort, lookup, nil)
	if err != nil {
		t.Fatal(err)
	}
	return func(c *Config) { c.Seeds = list }
}

// A name with several addresses, of which one is the node's own, one is another cluster's and one is nobody's, is a list of seeds.
func TestSeedNameWithAllKindsOfAddresses(t *testing.T) {
	leakCheck(t)
	self, dead, loopback := testAddr(), testAddr(), testAddr()
	ours, theirs := membership.NewClusterID(), membership.NewClusterID()
	member := launch(t, "member", cluster(ours))
	foreign := launch(t, "foreign", cluster(theirs))
	n := launch(t, "n", at(self), cluster(ours), func(c *Config) { c.Own = func(a netip.Addr) bool { return a == loopback } },
		names(t, map[string][]netip.Addr{"all": {loopback, self, dead, foreign.addr, member.addr}}, "all"))
	converge(t, n, member)
	var s Seed
	eventually(t, "every address is judged", func() bool { s = n.Seeds()[0]; return s.Tried && s.Answered > 0 })
	if s.Self() || s.Others != 3 || s.Answered != 1 {
		t.Errorf("%d of %d others have answered, want 1 of 3: %+v", s.Answered, s.Others, s)
	}
	for _, a := range s.Addrs {
		switch ip := a.Addr.Addr(); {
		case a.Self != (ip == self || ip == loopback), a.Answered != (ip == member.addr):
			t.Errorf("%+v", a)
		case ip == dead && a.Reason != "nothing listens there", ip == foreign.addr && !strings.Contains(a.Reason, theirs.String()):
			t.Errorf("%v: %s", ip, a.Reason)
		}
	}
}

// An address that leads back to the node, as by a translation of addresses on the way, is no other node.
func TestSeedThatLeadsBack(t *testing.T) {
	leakCheck(t)
	outside, self := testAddr(), testAddr()
	relay(t, outside, self)
	n := launch(t, "n", at(self), seeds(outside))
	eventually(t, "it finds itself", func() bool { s := n.Seeds()[0]; return s.Tried && s.Self() })
	if n.Isolated() {
		t.Error("a node whose only seed is itself is not isolated")
	}
}

// relay passes what comes for one address on to another: UDP one way, TCP both ways.
func relay(t *testing.T, from, to netip.Addr) {
	t.Helper()
	dst := netip.AddrPortFrom(to, testPort)
	s, err := bind(netip.AddrPortFrom(from, testPort))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() { s.close(); wg.Wait() })
	wg.Go(func() {
		buf := make([]byte, maxPacket)
		for {
			n, err := s.udp.Read(buf)
			if err != nil {
				return
			}
			_, _ = s.udp.WriteToUDPAddrPort(buf[:n], dst)
		}
	})
	wg.Go(func() {
		for {
			in, err := s.tcp.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", dst.String())
			if err != nil {
				in.Close()
				continue
			}
			wg.Go(func() { _, _ = io.Copy(out, in); out.Close(); in.Close() })
			wg.Go(func() { _, _ = io.Copy(in, out); out.Close(); in.Close() })
		}
	})
}

// A node answers at further addresses of its host, as a virtual one, as long as the host has them.
func TestListenBeside(t *testing.T) {
	leakCheck(t)
	virtual := testAddr()
	a := launch(t, "a", cluster(membership.NewClusterID()))
	if err := a.Listen([]netip.Addr{virtual}); err != nil {
		t.Fatal(err)
	}
	b := launch(t, "b", seeds(virtual))
	converge(t, a, b)
	eventually(t, "the seed has answered", func() bool { s := b.Seeds()[0]; return s.Others == 1 && s.Answered == 1 })
	if err := a.Listen(nil); err != nil {
		t.Fatal(err)
	}
	again, err := bind(netip.AddrPortFrom(virtual, testPort))
	if err != nil {
		t.Fatalf("it still listens there: %v", err)
	}
	again.close()
}

func TestTally(t *testing.T) {
	for _, c := range []struct {
		addrs            string // a word each: 4 or 6, then s itself, a answered, n not reachable
		others, answered int
	}{
		{"", 0, 0},
		{"4s", 0, 0}, {"4s 6s", 0, 0}, {"4", 1, 0}, {"4a", 1, 1},
		{"4s 4 4a", 2, 1},                             // a name of all hosts
		{"4 6", 1, 0}, {"4a 6", 1, 1}, {"4 6a", 1, 1}, // one host with two families, reached by one of them
		{"4a 4 6a 6", 2, 1},   // two hosts with two families: one answers by both
		{"4a 4a 6 6", 2, 2},   // two hosts, both by IPv4
		{"4a 6a 6", 2, 1},     // two hosts, one without IPv4
		{"4s 6", 1, 0},        // an IPv6 address that is not this host's
		{"4s 6n", 0, 0},       // this host's own name, seen from a host without IPv6
		{"6n", 1, 0},          // nothing that this host can reach: unknown, not absent
		{"4 6n 6n", 1, 0},     // what cannot be reached does not count beside what can
		{"4s 4s 6s", 0, 0},    // several own addresses
		{"4s 4a 6s 6a", 1, 1}, // a name of two hosts
	} {
		var list []SeedAddr
		for w := range strings.FieldsSeq(c.addrs) {
			a := netip.MustParseAddrPort("192.0.2.1:7946")
			if w[0] == '6' {
				a = netip.MustParseAddrPort("[2001:db8::1]:7946")
			}
			list = append(list, SeedAddr{Addr: a, Self: strings.Contains(w, "s"), Answered: strings.Contains(w, "a"), reachable: !strings.Contains(w, "n")})
		}
		if others, answered := countHosts(list); others != c.others || answered != c.answered {
			t.Errorf("%q: %d of %d have answered, want %d of %d", c.addrs, answered, others, c.answered, c.others)
		}
	}
}

// A member is reached by the address that it announces, or by one of the family that both have.
func TestReach(t *testing.T) {
	four, six := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	for _, c := range []struct {
		name     string
		own      []netip.Addr
		announce netip.Addr // by the member
		underlay []netip.Addr
		want     []netip.Addr
	}{
		{"the same family", []netip.Addr{four}, four, []netip.Addr{four}, []netip.Addr{four}},
		{"both have both", []netip.Addr{four, six}, six, []netip.Addr{six, four}, []netip.Addr{six, four}},
		{"it announces the one that is not here", []netip.Addr{four}, six, []netip.Addr{six, four}, []netip.Addr{four}},
		{"likewise", []netip.Addr{six}, four, []netip.Addr{four, six}, []netip.Addr{six}},
		{"none in common", []netip.Addr{four}, six, []netip.Addr{six}, []netip.Addr{six}},
	} {
		tr := &transport{}
		for _, a := range c.own {
			tr.socks = append(tr.socks, &sock{addr: netip.AddrPortFrom(a, testPort)})
		}
		id := membership.NewNodeID()
		to := netip.AddrPortFrom(c.announce, testPort)
		p := &peer{Member: Member{ID: id, Addr: to, Meta: membership.Meta{Underlay: c.underlay}}}
		g := &Gossip{cfg: Config{Bind: c.own[0], Also: c.own[1:]}, peers: map[membership.NodeID]*peer{id: p}}
		for _, name := range []string{id.String(), ""} {
			var got []netip.Addr
			for _, a := range g.reach(tr)(name, to) {
				got = append(got, a.Addr())
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("%s, by name %q: %v, want %v", c.name, name, got, c.want)
			}
		}
		if got := g.near(p).Addr(); got != c.want[0] {
			t.Errorf("%s: listed at %v, want %v", c.name, got, c.want[0])
		}
	}
}

// A seed that has answered and is gone has not answered: a node that starts a cluster waits for it.
func TestSeedThatGoesHasNotAnswered(t *testing.T) {
	leakCheck(t)
	a := launch(t, "a")
	b := launch(t, "b", seeds(a.addr))
	converge(t, a, b)
	eventually(t, "the seed has answered", func() bool { return b.Seeds()[0].Answered == 1 })
	at := netip.AddrPortFrom(a.addr, testPort)
	a.stop()
	b.stop() // nothing is tried any more
	b.tries[at] = &attempt{ended: true}
	b.memberEvent(sighting{name: a.cfg.ID.String(), addr: at, meta: a.metaWire}, StateDead)
	if s := b.Seeds()[0]; s.Answered != 0 {
		t.Errorf("%+v", s)
	}
}

// A member calls the seeds that are silent every few seconds, so that a seed that comes back without its disk, as another node that
// knows nobody, hears of the cluster before it could start one.
func TestMembersCallSilentSeeds(t *testing.T) {
	leakCheck(t)
	rarely := func(c *Config) {
		c.pace.rejoinMax, c.pace.heal, c.pace.healSlow, c.pace.gossipToTheDead = time.Hour, time.Hour, time.Hour, time.Nanosecond
	}
	ours, at1, at2 := membership.NewClusterID(), testAddr(), testAddr()
	alone := launch(t, "alone", cluster(ours), seeds(at1, at2), rarely)
	eventually(t, "it is alone", func() bool {
		s := alone.Seeds()
		return s[0].Reason == reasonNobody && s[1].Reason == reasonNobody
	})
	time.Sleep(4 * quick.rejoinMax) // its own rounds are hours apart by now
	for _, a := range []netip.Addr{at1, at2} {
		fresh := launch(t, "fresh", at(a), rarely)
		eventually(t, "the seed hears of the cluster", func() bool { return fresh.Cluster() == ours })
	}
}

// Who answers and refuses is not called every few seconds: it is no silent seed.
func TestRefusalIsNoSilence(t *testing.T) {
	leakCheck(t)
	other := launch(t, "other", cluster(membership.NewClusterID()))
	n := launch(t, "n", cluster(membership.NewClusterID()), seeds(other.addr))
	eventually(t, "it is refused", func() bool { return strings.Contains(n.Seeds()[0].Reason, "belongs to cluster") })
	if list := n.silentSeeds(); len(list) != 0 {
		t.Errorf("called as silent: %v", list)
	}
}

// A host that is off is unanswered by turns because it is silent and because nobody knows where it is: that is one silence, told once.
func TestOneSilence(t *testing.T) {
	g, _, logged := quietGossip(t)
	list, err := seed.New([]string{"192.0.2.9"}, 7946, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	g.cfg.Seeds = list
	at := netip.MustParseAddrPort("192.0.2.9:7946")
	silent, unknown := errors.New("dial tcp 192.0.2.9:7946: i/o timeout"), errors.New("dial tcp 192.0.2.9:7946: connect: no route to host")
	g.ended(at, false, silent)
	since := g.tries[at].since
	for range 10 {
		g.ended(at, false, unknown)
		g.ended(at, false, silent)
	}
	if n := strings.Count(logged.String(), "does not let this node in"); n != 1 || !g.tries[at].since.Equal(since) {
		t.Errorf("told %d times, since %v, want %v:\n%s", n, g.tries[at].since, since, logged)
	}
	g.ended(at, false, errors.New("dial tcp 192.0.2.9:7946: connect: connection refused"))
	g.ended(at, false, silent)
	g.ended(at, false, nil)
	if n := strings.Count(logged.String(), "does not let this node in"); n != 3 || !strings.Contains(logged.String(), "seed answers") {
		t.Errorf("told %d times:\n%s", n, logged)
	}
}
