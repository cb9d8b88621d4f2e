package ownership

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// agree gives a founder the consents of all members.
func (e *loneEnv) agree(s *Machine, now time.Time) {
	i := slices.IndexFunc(e.sent, func(m *message) bool { return m.kind == kindFound })
	if i < 0 {
		return
	}
	for _, m := range e.members {
		e.answer(s, now, m.ID, message{kind: kindFoundAck, seq: e.sent[i].seq, flags: flagYes})
	}
	e.sent = nil
}

func (e *loneEnv) answer(s *Machine, now time.Time, from NodeID, m message) {
	m.sender = from
	if err := s.HandleMessage(now, from, m.encode()); err != nil {
		panic(err)
	}
}

// last returns the last message of a kind that was sent.
func (e *loneEnv) last(k kind) *message {
	for _, m := range slices.Backward(e.sent) {
		if m.kind == k {
			return m
		}
	}
	return nil
}

// founderAt is a node with ID n that may start the cluster and sees new nodes with the IDs given.
func founderAt(t *testing.T, n byte, others ...byte) (*Machine, *loneEnv) {
	t.Helper()
	env := &loneEnv{seeds: Seeds{Configured: len(others), Others: len(others), Answered: len(others), Tried: true}}
	for _, o := range others {
		env.members = append(env.members, Member{ID: NodeID{o}, Name: fmt.Sprintf("host-%d", o), Alive: true, Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, o}), 7946)})
	}
	s, err := New(simStart, Config{ID: NodeID{n}, Name: "first", Bootstrap: true, CIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}}, nil, env)
	if err != nil {
		t.Fatal(err)
	}
	s.Tick(simStart)
	return s, env
}

// A founder waits for members that call: from when the last seed answers, and longer where nobody but itself is a seed.
func TestFounderWaitsForCalls(t *testing.T) {
	at := func(seconds float64) time.Time { return simStart.Add(time.Duration(seconds * float64(time.Second))) }
	type step struct {
		at    float64 // seconds
		seeds Seeds
	}
	two, one, self := Seeds{Configured: 2, Others: 2, Answered: 2, Tried: true}, Seeds{Configured: 2, Others: 2, Answered: 1, Tried: true}, Seeds{Configured: 1, Names: 1, Tried: true}
	for name, c := range map[string]struct {
		steps  []step
		starts float64 // not before; it starts then
		why    string  // just before
	}{
		"all answer at once":            {[]step{{0, two}}, 5, "trying the seeds"},
		"the last one answers late":     {[]step{{0, one}, {20, two}}, 24.5, "if no member calls"},
		"one goes and comes":            {[]step{{0, two}, {4, one}, {4.5, two}}, 9, "if no member calls"},
		"a name has another host now":   {[]step{{0, Seeds{Configured: 2, Others: 1, Answered: 1, Tried: true}}, {4, two}}, 9, "if no member calls"},
		"the only seed is itself":       {[]step{{0, self}}, 15, "every seed leads to this node itself"},
		"at first it is the only seed":  {[]step{{0, self}, {14, two}}, 19, "if no member calls"},
		"its name is not looked up yet": {[]step{{0, Seeds{Configured: 1, Names: 1}}, {10, self}}, 24.5, "every seed leads to this node itself"},
		"the only seed is its address":  {[]step{{0, Seeds{Configured: 1, Tried: true}}}, 5, "trying the seeds"},
		"no seed is configured":         {[]step{{0, Seeds{Tried: true}}}, 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			env := &loneEnv{}
			s, err := New(simStart, Config{ID: NodeID{5}, Name: "first", Bootstrap: true, CIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}}, nil, env)
			if err != nil {
				t.Fatal(err)
			}
			why := ""
			for now := 0.0; now <= c.starts; now += 0.5 {
				for len(c.steps) > 0 && c.steps[0].at <= now {
					env.seeds, c.steps = c.steps[0].seeds, c.steps[1:]
				}
				s.Tick(at(now))
				if started := !s.Cluster().IsZero(); started != (now == c.starts) {
					t.Fatalf("at %v s: started %v, want it at %v s: %+v", now, started, c.starts, s.Status(at(now)))
				}
				if now < c.starts {
					why = s.Status(at(now)).Why
				}
			}
			if !strings.Contains(why, c.why) {
				t.Errorf("why %q, want %q", why, c.why)
			}
		})
	}
}

// A node that sees a member of a cluster consents to no founder, who may not see it.
func TestNoConsentBesideACluster(t *testing.T) {
	s, env := founderAt(t, 5, 7, 9)
	env.members[1].Cluster = ClusterID{1}
	env.answer(s, simStart, NodeID{7}, message{kind: kindFound, seq: 1})
	if a := env.last(kindFoundAck); a == nil || a.flags&flagYes != 0 {
		t.Errorf("answer %+v", a)
	}
}

func TestFounderNeedsEveryWord(t *testing.T) {
	s, env := founderAt(t, 5, 7, 9)
	now := simStart.Add(seedPatience)
	s.Tick(now)
	ask := env.last(kindFound)
	if ask == nil || !s.Cluster().IsZero() {
		t.Fatalf("asks nobody: %+v", s.Status(now))
	}
	yes := message{kind: kindFoundAck, seq: ask.seq, flags: flagYes}
	env.answer(s, now, NodeID{7}, yes)
	env.answer(s, now, NodeID{7}, yes)
	if why := s.Status(now).Why; !s.Cluster().IsZero() || !strings.Contains(why, "host-9 (09000000) at 192.0.2.9") || strings.Contains(why, "host-7") {
		t.Fatalf("with one of two consents: cluster %v, why %q", s.Cluster(), why)
	}
	// A consent expires before its giver forgets it.
	later := now.Add(foundLease/2 + time.Millisecond)
	env.answer(s, later, NodeID{9}, yes)
	if !s.Cluster().IsZero() {
		t.Fatal("begins with an expired consent")
	}
	s.Tick(later)
	yes.seq = env.last(kindFound).seq
	env.answer(s, later, NodeID{7}, yes)
	env.answer(s, later, NodeID{9}, yes)
	if s.Cluster().IsZero() {
		t.Fatalf("does not begin with all consents: %+v", s.Status(later))
	}
}

func TestFounderGivesWay(t *testing.T) {
	s, env := founderAt(t, 5, 7, 9)
	now := simStart.Add(seedPatience)
	s.Tick(now)
	seq := env.last(kindFound).seq
	env.answer(s, now, NodeID{7}, message{kind: kindFoundAck, seq: seq, flags: flagYes})
	env.sent = nil
	// 9 has heard of a lower founder that this node does not see.
	env.answer(s, now, NodeID{9}, message{kind: kindFoundAck, seq: seq, flags: flagYes, node: NodeID{2}})
	if !s.Cluster().IsZero() || env.last(kindUnfound) == nil {
		t.Fatalf("does not give its consents back: cluster %v", s.Cluster())
	}
	env.sent = nil
	for at := now; at.Before(now.Add(foundLease)); at = at.Add(500 * time.Millisecond) {
		s.Tick(at)
	}
	if env.last(kindFound) != nil {
		t.Error("asks again at once")
	}
	// The lower one is never heard of again.
	s.Tick(now.Add(foundLease))
	env.agree(s, now.Add(foundLease))
	if s.Cluster().IsZero() {
		t.Errorf("waits for ever: %+v", s.Status(now.Add(foundLease)))
	}
}

func TestWordIsGivenOnce(t *testing.T) {
	s, env := founderAt(t, 5, 7, 9, 3)
	found := func(now time.Time, from byte) *message {
		env.answer(s, now, NodeID{from}, message{kind: kindFound, seq: 1})
		return env.last(kindFoundAck)
	}
	now := simStart // it asks nobody itself yet
	if a := found(now, 7); a.flags&flagYes == 0 || a.flags&flagFounder == 0 {
		t.Fatalf("%+v", a)
	}
	if a := found(now, 3); a.flags&flagYes != 0 || a.node != (NodeID{7}) {
		t.Fatalf("a second consent, although to a lower one: %+v", a)
	}
	if a := found(now, 7); a.flags&flagYes == 0 || a.node != (NodeID{3}) {
		t.Fatalf("who has the consent is not told of the lower one: %+v", a)
	}
	env.sent = nil
	s.Tick(now.Add(seedPatience))
	if env.last(kindFound) != nil || !s.Cluster().IsZero() || !strings.Contains(s.Status(now).Why, "host-7 (07000000) at 192.0.2.7 is about to start the cluster") {
		t.Fatalf("starts although it has consented to another: %+v", s.Status(now))
	}
	env.answer(s, now, NodeID{7}, message{kind: kindUnfound})
	if a := found(now, 3); a.flags&flagYes == 0 {
		t.Fatalf("given back, and not given again: %+v", a)
	}
	// After the lease it goes for itself: not to a higher one, but to a lower one.
	now = now.Add(foundLease + time.Second)
	s.Tick(now.Add(foundLease))
	if a := found(now.Add(foundLease), 9); a.flags&flagYes != 0 || a.node != s.Node() {
		t.Fatalf("the higher one gets the consent: %+v", a)
	}
	if a := found(now.Add(foundLease), 3); a.flags&flagYes == 0 {
		t.Fatalf("the lower one does not get the consent: %+v", a)
	}
	problems := fmt.Sprint(s.Status(now).Problems)
	for _, want := range []string{"two nodes are told to start the cluster", "host-7 (07000000) at 192.0.2.7", "host-3 (03000000) at 192.0.2.3"} {
		if !strings.Contains(problems, want) {
			t.Errorf("the problems do not say %q: %s", want, problems)
		}
	}
}

// A forced bootstrap does not wait for ever for new nodes that do not understand the question.
func TestForcedFounder(t *testing.T) {
	env := &loneEnv{seeds: Seeds{Configured: 1, Others: 1, Answered: 1, Tried: true}, members: []Member{{ID: NodeID{9}, Name: "old", Alive: true}}}
	s, err := New(simStart, Config{ID: NodeID{5}, Name: "first", Bootstrap: true, ForceBootstrap: true, CIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}}, nil, env)
	if err != nil {
		t.Fatal(err)
	}
	now := simStart
	for ; now.Sub(simStart) < seedPatience+foundForce; now = now.Add(500 * time.Millisecond) {
		s.Tick(now)
	}
	if !s.Cluster().IsZero() {
		t.Error("starts without asking")
	}
	s.Tick(now.Add(time.Second))
	if s.Cluster().IsZero() {
		t.Errorf("does not start: %+v", s.Status(now))
	}
}

// Two and three hosts with the bootstrap node's name, started together, by turns, or with a restart in the middle, become one
// cluster and all say that they share a name.
func TestSharedBootstrapName(t *testing.T) {
	for name, at := range map[string][]time.Duration{
		"two at once":        {0, 0},
		"three at once":      {0, 0, 0},
		"the second later":   {0, 20 * time.Second},
		"the first later":    {20 * time.Second, 0},
		"three by turns":     {0, 4 * time.Second, 8 * time.Second},
		"within a moment":    {0, 100 * time.Millisecond, 200 * time.Millisecond},
		"one comes and goes": {0, 0, -1},
	} {
		t.Run(name, func(t *testing.T) {
			w := quiet(t, len(at), "10.244.0.0/16")
			w.starts = &starts{seeds: len(at), links: make(map[[2]int]time.Time)}
			for i, h := range w.hosts {
				h.addr, h.name = i+1, "raspberrypi"
				h.cfg.Name, h.cfg.Bootstrap = h.name, true
				w.starts.names = append(w.starts.names, []int{i})
				w.after(max(0, at[i]), func() { h.start(false) })
				if at[i] < 0 {
					w.after(2*time.Second, func() { h.stop() }) // nothing is on its disk
					w.after(15*time.Second, func() { h.id = w.newID(); h.start(false) })
				}
			}
			w.runFor(60 * time.Second)
			w.must.oneCluster()
			if n := w.must.seen["shared name reported"]; n != len(at) {
				t.Errorf("%d of %d hosts report the name", n, len(at))
			}
		})
	}
}
