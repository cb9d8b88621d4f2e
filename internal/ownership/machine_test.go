package ownership

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/ipam"
)

// quiet makes a world without trouble whose hosts share one cluster CIDR a family.
func quiet(t *testing.T, hosts int, cidrs ...string) *world {
	t.Helper()
	w := &world{rng: rand.New(rand.NewPCG(1, 2)), now: simStart}
	w.must.init(w)
	w.params = simParams{hosts: hosts, len4: 24, len6: 64, cooldown: time.Minute}
	for _, c := range cidrs {
		w.params.cidrs = append(w.params.cidrs, netip.MustParsePrefix(c))
	}
	for i := range hosts {
		h := &host{w: w, index: i, name: fmt.Sprintf("node-%d", i), pods: make(map[string][]netip.Addr)}
		h.id[0] = byte(i + 1)
		h.cfg = Config{Name: h.name, CIDRs: w.params.cidrs, BlockLen4: 24, BlockLen6: 64, Bootstrap: i == 0, Cooldown: time.Minute}
		w.hosts = append(w.hosts, h)
	}
	t.Cleanup(func() {
		if w.fault != "" {
			t.Error(w.report())
		}
	})
	return w
}

// up starts all hosts and waits until they have what they need.
func (w *world) up() *world {
	for _, h := range w.hosts {
		h.start(false)
	}
	w.runFor(15 * time.Second)
	return w
}

func wantProblem(t *testing.T, h *host, part string) {
	t.Helper()
	st := h.sp.Status(h.w.now)
	for _, p := range st.Problems {
		if strings.Contains(p.What, part) && p.Remedy != "" {
			return
		}
	}
	t.Errorf("%s: no problem says %q: %v", h.name, part, st.Problems)
}

func TestClusterForms(t *testing.T) {
	w := quiet(t, 3, "10.244.0.0/16", "fd00::/48").up()
	for _, h := range w.hosts {
		sp := h.sp
		if sp.Phase() != Ready || len(sp.Blocks()) != 2 || len(sp.TunAddrs()) != 2 || sp.Digest() != w.hosts[0].sp.Digest() {
			t.Errorf("%s: %+v", h.name, sp.Status(w.now))
		}
		list, err := sp.Allocate(w.now, PodRequest{Key: "pod"})
		if err != nil || len(list) != 2 || !list[0].Addr.Is4() || !list[1].Addr.Is6() {
			t.Fatalf("%s: %v, %v", h.name, list, err)
		}
		for i, a := range list {
			if e, _ := w.hosts[0].sp.Owner(a.Addr); e.Owner != h.id {
				t.Errorf("%v of %s is routed to %v", a.Addr, h.name, e)
			}
			if a.Addr != sp.TunAddrs()[i].Next() {
				t.Errorf("%v behind tun address %v", a.Addr, sp.TunAddrs()[i])
			}
		}
		again, err := sp.Allocate(w.now, PodRequest{Key: "pod"})
		if err != nil || !slices.Equal(again, list) {
			t.Errorf("the same pod asks again: %v, %v", again, err)
		}
	}
	if got := w.hosts[0].sp.Prefixes(); !ipam.Overlaps(got, netip.MustParsePrefix("10.244.0.0/24")) || len(w.hosts[1].sp.Prefixes()) == 0 {
		t.Errorf("node-0 has %v", got)
	}
	n := 0
	for range w.hosts[1].sp.Routes() {
		n++
	}
	if n != len(w.hosts[1].sp.Entries()) {
		t.Errorf("%d routes", n)
	}
}

func TestWaitingSaysWhy(t *testing.T) {
	for _, tc := range []struct {
		name             string
		bootstrap, force bool
		named            string // by the file that all hosts share
		others, answer   int
		starts           bool
		why              string
	}{
		{"nothing given", false, false, "", 0, 0, false, "--bootstrap on exactly one node"},
		{"silent seeds", false, false, "node-a", 2, 0, false, "none of 2 seeds answers"},
		{"new seeds", false, false, "", 2, 1, false, "in no cluster yet"},
		{"new seeds, one of them named", false, false, "new-1", 2, 1, false, "new-1, which is to start the cluster, waits itself: tulle status there"},
		{"nobody has the name", false, false, "node-a", 2, 1, false, "node-a starts it (bootstrap: node-a), and neither this node (node-b) nor any that answers (new-1) has that name"},
		{"nobody has the name, nobody else", false, false, "node-a", 0, 0, false, "neither this node (node-b) nor any that answers has that name"},
		{"bootstrap alone", true, false, "", 0, 0, true, ""},
		{"bootstrap, silent seeds", true, false, "", 2, 0, false, "2 of its 2 other seeds do not answer, and they may already be one: silent-1, silent-2. Start them; "},
		{"bootstrap, one seed silent", true, false, "", 2, 1, false, "1 of its 2 other seeds do not answer, and they may already be one: silent-1. Start them; " +
			"if this really is a new cluster, start this node once with --bootstrap=force"},
		{"bootstrap, all seeds new", true, false, "", 2, 2, true, ""},
		{"forced, silent seeds", true, true, "", 2, 0, true, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			env := &loneEnv{seeds: Seeds{Configured: tc.others, Others: tc.others, Answered: tc.answer, Tried: true}}
			for i := range tc.others - tc.answer {
				env.seeds.Silent = append(env.seeds.Silent, fmt.Sprintf("silent-%d", i+1))
			}
			for i := range tc.answer {
				env.members = append(env.members, Member{ID: NodeID{2, byte(i)}, Name: fmt.Sprintf("new-%d", i+1), Alive: true})
			}
			s, err := New(simStart, Config{ID: NodeID{1}, Name: "node-b", Bootstrap: tc.bootstrap, ForceBootstrap: tc.force, Bootstrapper: tc.named,
				CIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}}, nil, env)
			if err != nil {
				t.Fatal(err)
			}
			now := simStart
			for range 20 { // ten seconds
				now = s.Tick(now)
				env.agree(s, now)
			}
			st := s.Status(now)
			if started := !st.Cluster.IsZero(); started != tc.starts || !strings.Contains(st.Why, tc.why) {
				t.Errorf("phase %v, cluster %v, why %q", st.Phase, st.Cluster, st.Why)
			}
		})
	}
}

// A seed that is in a cluster is joined, whatever was forced; and it is waited for a moment.
func TestForceDoesNotMakeASecondCluster(t *testing.T) {
	env := &loneEnv{seeds: Seeds{Configured: 2, Others: 2}}
	s, err := New(simStart, Config{ID: NodeID{1}, Bootstrap: true, ForceBootstrap: true, CIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}}, nil, env)
	if err != nil {
		t.Fatal(err)
	}
	now := s.Tick(simStart)
	if st := s.Status(now); !st.Cluster.IsZero() || !strings.Contains(st.Why, "trying the seeds") {
		t.Errorf("before the seeds were tried: %+v", st)
	}
	env.seeds.Tried = true
	env.members = []Member{{ID: NodeID{2}, Cluster: ClusterID{7}, Alive: true}}
	for range 20 {
		now = s.Tick(now)
	}
	if st := s.Status(now); !st.Cluster.IsZero() {
		t.Errorf("beside a live cluster: %+v", st)
	}
}

// What a node's configuration says about the cluster that it joins is compared with what holds there.
func TestParametersThatDiffer(t *testing.T) {
	w := quiet(t, 3, "10.244.0.0/16", "fd00::/48")
	w.hosts[1].cfg.BlockLen4, w.hosts[1].cfg.BlockLen6 = 26, 0
	w.hosts[2].cfg.CIDRs = []netip.Prefix{netip.MustParsePrefix("10.245.0.0/16")}
	w.up()
	for range 2 { // joined, and restarted with state
		wantProblem(t, w.hosts[1], "the configuration says --node-prefix-len 26, the cluster's blocks in 10.244.0.0/16 are /24")
		wantProblem(t, w.hosts[2], "the configuration says --cluster-cidr [10.245.0.0/16], the cluster uses")
		if st := w.hosts[0].sp.Status(w.now); len(st.Problems) > 0 {
			t.Errorf("on the node whose configuration holds: %v", st.Problems)
		}
		for _, h := range w.hosts[1:] {
			h.stop()
			h.start(false)
		}
		w.runFor(5 * time.Second)
	}
}

// loneEnv is a world with nobody else in it.
type loneEnv struct {
	seeds   Seeds
	members []Member
	tunnel  bool
	fail    error
	disk    *ipam.State
	sent    []*message
	told    []Entry  // by broadcast
	onDisk  []uint64 // generation on disk at each send
}

func (e *loneEnv) Send(to NodeID, msg []byte) {
	m, err := decode(msg)
	if err != nil {
		panic(err)
	}
	e.sent = append(e.sent, m)
	if e.disk != nil {
		e.onDisk = append(e.onDisk, e.disk.Generation)
	}
}
func (e *loneEnv) Broadcast(b []byte) {
	m, err := decode(b)
	if err != nil {
		panic(err)
	}
	e.told = append(e.told, m.entries...)
}
func (e *loneEnv) Persist(st *ipam.State) error {
	if e.fail == nil {
		e.disk = st
	}
	return e.fail
}
func (e *loneEnv) Members() []Member         { return e.members }
func (e *loneEnv) Seeds() Seeds              { return e.seeds }
func (e *loneEnv) TunnelAnswers(NodeID) bool { return e.tunnel }

// lone returns a bootstrapped node.
func lone(t *testing.T, cidr string) (*Machine, *loneEnv) {
	t.Helper()
	env := new(loneEnv)
	s, err := New(simStart, Config{ID: NodeID{1}, Name: "one", Bootstrap: true, CIDRs: []netip.Prefix{netip.MustParsePrefix(cidr)}}, nil, env)
	if err != nil {
		t.Fatal(err)
	}
	s.Tick(simStart)
	if s.Phase() != Ready {
		t.Fatal(s.Status(simStart))
	}
	return s, env
}

func (s *Machine) from(id NodeID, m message) []byte {
	m.cluster, m.sender = s.cluster, id
	return m.encode()
}

// lateEnv is a world in which members appear at the moment that the seeds' answers are read.
type lateEnv struct {
	loneEnv
	late []Member
}

func (e *lateEnv) Seeds() Seeds {
	e.members = e.late
	return e.seeds
}

// A bootstrap node without its disk, whose seeds answer while it decides, sees that they are in a cluster and starts none.
func TestSeedAnswersDuringTheDecision(t *testing.T) {
	env := &lateEnv{late: []Member{{ID: NodeID{2}, Name: "two", Cluster: ClusterID{7}, Alive: true}}}
	env.seeds = Seeds{Configured: 1, Others: 1, Answered: 1, Tried: true}
	cidr := netip.MustParsePrefix("10.244.0.0/16")
	s, err := New(simStart, Config{ID: NodeID{1}, Name: "one", Bootstrap: true, CIDRs: []netip.Prefix{cidr}}, nil, env)
	if err != nil {
		t.Fatal(err)
	}
	s.Tick(simStart)
	if s.Tick(simStart.Add(time.Minute)); !s.Cluster().IsZero() || env.disk != nil {
		t.Errorf("started a second cluster: %+v", s.Status(simStart))
	}
}

// A member that joined just before the agent stops is on disk, so that the next run finds it without seeds.
func TestFlushSavesMembers(t *testing.T) {
	s, env := lone(t, "10.244.0.0/16")
	addr := netip.MustParseAddrPort("192.0.2.2:7946")
	env.members = []Member{{ID: NodeID{2}, Name: "two", Cluster: s.Cluster(), Alive: true, Addr: addr}}
	s.MembersChanged(simStart)
	env.fail = errors.New("disk full")
	if err := s.Flush(simStart); !errors.Is(err, env.fail) {
		t.Errorf("a full disk: %v", err)
	}
	env.fail = nil
	if err := s.Flush(simStart); err != nil {
		t.Fatal(err)
	}
	if len(env.disk.Peers) != 1 || env.disk.Peers[0].Addr != addr {
		t.Errorf("peers on disk: %v", env.disk.Peers)
	}
	saved := env.disk
	if err := s.Flush(simStart); err != nil || env.disk != saved {
		t.Errorf("nothing to save: %v, %p and %p", err, env.disk, saved)
	}
}

// TestPromisesEnd: a promise that nobody took back leaves memory and disk with
// the first change after its end.
func TestPromisesEnd(t *testing.T) {
	s, env := lone(t, "10.244.0.0/16")
	for i := range 100 {
		now := simStart.Add(time.Duration(i) * promiseLease)
		s.HandleMessage(now, NodeID{2}, s.from(NodeID{2}, message{kind: kindPromise, seq: 1, node: NodeID{3, byte(i)}}))
		if n := len(env.disk.Promises); n != 1 || env.disk.Promises[0].Victim != (ipam.ID{3, byte(i)}) {
			t.Fatalf("after promise %d, %d are on disk: %v", i, n, env.disk.Promises)
		}
	}
	if len(s.promises) != 1 {
		t.Errorf("%d promises are held", len(s.promises))
	}
}

// TestARetryDoesNotDrain: however often a request arrives, and whatever number it
// carries, the owner gives once for each time that the requester has taken it up.
func TestARetryDoesNotDrain(t *testing.T) {
	s, env := lone(t, "10.244.0.0/16")
	two := NodeID{2}
	ask := func(seq uint64, have []Entry) *message {
		t.Helper()
		if err := s.HandleMessage(simStart, two, s.from(two, message{kind: kindRequest, seq: seq, entries: have})); err != nil {
			t.Fatal(err)
		}
		return env.sent[len(env.sent)-1]
	}
	first := ask(10, nil)
	if first.kind != kindGrant || len(first.entries) != 1 || first.entries[0].Prefix.Bits() != 17 {
		t.Fatalf("%+v", first)
	}
	for _, seq := range []uint64{10, 11, 9, 12} { // repeated, retried with new numbers, old
		if m := ask(seq, nil); m.kind != kindGrant || m.flags&flagLacking == 0 || !m.entries[0].Equal(first.entries[0]) {
			t.Fatalf("request %d again: %+v", seq, m)
		}
	}
	if m := ask(10, first.entries); m.kind != kindRefuse || m.reason != refusedStale || m.count != 10 {
		t.Fatalf("an old request that knows the answer: %+v", m)
	}
	if m := ask(13, first.entries); m.kind != kindGrant || m.flags&flagLacking != 0 || m.entries[0].Prefix.Bits() != 18 {
		t.Fatalf("a real second request: %+v", m)
	}
}

// A node that only cannot save that its table is confirmed says that of its disk, and does not tell to forget the other nodes.
func TestConfirmedOnAFullDisk(t *testing.T) {
	s, env := lone(t, "10.244.0.0/16")
	s, err := New(simStart, s.cfg, env.disk, env)
	if err != nil {
		t.Fatal(err)
	}
	env.fail = errors.New("no space left on device")
	s.Tick(simStart)
	st := s.Status(simStart)
	if len(st.Problems) != 1 || !strings.Contains(st.Problems[0].What, "cannot be saved: no space left") || strings.Contains(st.Problems[0].Remedy, "forget") || st.Phase != Confirming {
		t.Errorf("%v: %+v", st.Phase, st.Problems)
	}
	env.fail = nil
	s.Tick(simStart.Add(time.Second))
	if st := s.Status(simStart); st.Phase != Ready || len(st.Problems) != 0 {
		t.Errorf("with a disk: %v, %+v", st.Phase, st.Problems)
	}
}

// TestNoAnswerBeforeTheDisk: a donation that cannot be saved is taken back, and
// refused.
func TestNoAnswerBeforeTheDisk(t *testing.T) {
	s, env := lone(t, "10.244.0.0/16")
	two := NodeID{2}
	before := s.Entries()
	env.fail = errors.New("no space left on device")
	s.HandleMessage(simStart, two, s.from(two, message{kind: kindRequest, seq: 1}))
	if m := env.sent[len(env.sent)-1]; m.kind != kindRefuse || !strings.Contains(m.text, "no space left") {
		t.Fatalf("%+v", m)
	}
	if !slices.EqualFunc(before, s.Entries(), Entry.Equal) {
		t.Fatalf("%v", s.Entries())
	}
	if _, err := s.Allocate(simStart, PodRequest{Key: "a"}); err == nil || len(s.Allocations()) != 0 {
		t.Fatal("an address that is not on disk was handed out")
	}
	if st := s.Status(simStart); !slices.ContainsFunc(st.Problems, func(p Problem) bool { return strings.Contains(p.What, "cannot be saved") }) {
		t.Errorf("%v", st.Problems)
	}
	env.fail = nil
	s.HandleMessage(simStart, two, s.from(two, message{kind: kindRequest, seq: 2}))
	if m := env.sent[len(env.sent)-1]; m.kind != kindGrant || env.onDisk[len(env.onDisk)-1] != s.generation {
		t.Fatalf("%+v", m)
	}
}

// TestAllocateFrom: addresses pass to another key, on the disk too; a request that fails leaves them where they were.
func TestAllocateFrom(t *testing.T) {
	s, env := lone(t, "10.244.0.0/16")
	first, err := s.Allocate(simStart, PodRequest{Key: "a"})
	if err != nil {
		t.Fatal(err)
	}
	holds := func(key string, addr netip.Addr) {
		t.Helper()
		if l := s.Allocations(); len(l) != 1 || l[0].Key != key || l[0].Addr != addr || len(s.Resting(simStart)) != 0 {
			t.Errorf("%+v, resting %v; want %v of %s alone", l, s.Resting(simStart), addr, key)
		}
	}
	reserved := netip.MustParseAddr("10.244.0.0")
	if l, err := s.Allocate(simStart, PodRequest{Key: "b", From: "a", Want: []netip.Addr{reserved}}); !errors.Is(err, ipam.ErrUnavailable) {
		t.Fatalf("%v, %v", l, err)
	}
	holds("a", first[0].Addr)
	env.fail = errors.New("no space left on device")
	if l, err := s.Allocate(simStart, PodRequest{Key: "b", From: "a"}); err == nil {
		t.Fatalf("passed on without the disk: %v", l)
	}
	holds("a", first[0].Addr)
	env.fail = nil
	if l, err := s.Allocate(simStart, PodRequest{Key: "b", From: "a", Pod: "web"}); err != nil || l[0].Pod != "web" {
		t.Fatal(l, err)
	}
	holds("b", first[0].Addr)
}

func TestFixedBlock(t *testing.T) {
	w := quiet(t, 4, "10.244.0.0/16")
	fix := func(i int, p string) { w.hosts[i].cfg.PodCIDRs = []netip.Prefix{netip.MustParsePrefix(p)} }
	fix(1, "10.244.77.0/24")
	fix(2, "10.244.0.0/24") // node-0's first block, with its tun address
	fix(3, "10.244.99.0/26")
	w.up()
	for i, want := range map[int]string{1: "10.244.77.0/24", 3: "10.244.99.0/26"} {
		if b := w.hosts[i].sp.Blocks(); len(b) != 1 || b[0].Prefix.String() != want {
			t.Errorf("node-%d: %v, %v", i, b, w.hosts[i].sp.Status(w.now))
		}
	}
	if w.hosts[2].sp.Phase() != Joining {
		t.Error("node-2 has node-0's block")
	}
	wantProblem(t, w.hosts[2], "its own tun address 10.244.0.0 is in it")

	// Full is full: the operator has said which addresses.
	for i := range 61 {
		if _, err := w.hosts[3].sp.Allocate(w.now, PodRequest{Key: fmt.Sprint(i)}); err != nil {
			t.Fatal(i, err)
		}
	}
	if _, err := w.hosts[3].sp.Allocate(w.now, PodRequest{Key: "one more"}); !errors.Is(err, ErrExhausted) && !errors.Is(err, ipam.ErrFull) {
		w.hosts[3].sp.Allocate(w.now, PodRequest{Key: "61"})
		if _, err := w.hosts[3].sp.Allocate(w.now, PodRequest{Key: "62"}); !errors.Is(err, ipam.ErrFull) {
			t.Errorf("%v", err)
		}
	}

	if _, err := New(w.now, Config{ID: NodeID{9}, CIDRs: w.params.cidrs, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/24")}}, nil, new(loneEnv)); err == nil ||
		!strings.Contains(err.Error(), "outside the cluster CIDR") {
		t.Errorf("%v", err)
	}
}

func TestFixedBlockWithPodsElsewhere(t *testing.T) {
	w := quiet(t, 2, "10.244.0.0/16")
	w.hosts[1].cfg.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.0.128/25")}
	w.hosts[0].cfg.ForceBootstrap = true // the other one is down
	w.hosts[0].start(false)
	w.runFor(8 * time.Second)
	if _, err := w.hosts[0].sp.Allocate(w.now, PodRequest{Key: "p", Want: []netip.Addr{netip.MustParseAddr("10.244.0.200")}}); err != nil {
		t.Fatal(err)
	}
	w.hosts[1].start(false)
	w.runFor(20 * time.Second)
	wantProblem(t, w.hosts[1], "1 pods have addresses in it")
}

func TestRestart(t *testing.T) {
	w := quiet(t, 2, "10.244.0.0/16").up()
	n0, n1 := w.hosts[0], w.hosts[1]
	n1.newPods(1)
	n0.stop()
	n1.stop()
	w.runFor(10 * time.Second)

	n1.start(false) // alone, not fresh: serves what it had, starts nothing
	w.runFor(5 * time.Second)
	if n1.sp.Phase() != Confirming || len(n1.sp.Blocks()) != 1 || len(n1.sp.TunAddrs()) != 1 {
		t.Errorf("%v", n1.sp.Status(w.now))
	}
	wantProblem(t, n1, "not confirmed")
	if got, err := n1.sp.Allocate(w.now, PodRequest{Key: "node-1-1"}); err != nil || len(got) != 1 {
		t.Errorf("the pod that it had: %v, %v", got, err)
	}
	if _, err := n1.sp.Allocate(w.now, PodRequest{Key: "new"}); !errors.Is(err, ErrNotReady) {
		t.Errorf("a new pod: %v", err)
	}
	n1.stop()
	n1.start(true) // proven to be the latest disk: its blocks serve new pods
	if _, err := n1.sp.Allocate(w.now, PodRequest{Key: "new"}); err != nil {
		t.Errorf("fresh: %v", err)
	}
	w.runFor(5 * time.Second)
	n0.start(false)
	w.runFor(10 * time.Second)
	if n0.sp.Phase() != Ready || n1.sp.Phase() != Ready {
		t.Errorf("%v %v", n0.sp.Phase(), n1.sp.Phase())
	}

	one, env := lone(t, "10.244.0.0/16")
	had, err := one.Allocate(simStart, PodRequest{Key: "box"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := one.Release(simStart, "box"); err != nil {
		t.Fatal(err)
	}
	back, err := New(simStart, Config{ID: one.Node()}, env.disk, env)
	if err != nil {
		t.Fatal(err)
	}
	if back.Tick(simStart); back.Phase() != Ready || back.Cluster() != one.Cluster() {
		t.Errorf("a lone node: %v", back.Status(simStart))
	}
	want := []netip.Addr{had[0].Addr}
	if _, err := back.Allocate(simStart, PodRequest{Key: "other", Want: want}); !errors.Is(err, ipam.ErrUnavailable) {
		t.Errorf("another pod gets an address that cools down: %v", err)
	}
	if got, err := back.Allocate(simStart, PodRequest{Key: "box", Want: want}); err != nil || got[0].Addr != want[0] {
		t.Errorf("a container that comes back with its host gets %v, %v", got, err)
	}
	if _, err := New(simStart, Config{ID: NodeID{7}}, env.disk, env); err == nil {
		t.Error("another node's state is taken")
	}
}

func TestOtherCluster(t *testing.T) {
	a, _ := lone(t, "10.244.0.0/16")
	b, _ := lone(t, "10.244.0.0/16")
	b.cfg.ID = NodeID{2}
	if err := a.MergeState(simStart, b.LocalState(simStart, true), true); !errors.Is(err, ErrOtherCluster) {
		t.Fatal(err)
	}
	found := false
	for _, p := range a.Status(simStart).Problems {
		found = found || strings.Contains(p.What, b.Cluster().String()) && strings.Contains(p.What, a.Cluster().String())
	}
	if !found {
		t.Error("it does not name both clusters")
	}
}

func TestExhaustedNamesOwners(t *testing.T) {
	w := quiet(t, 3, "10.244.0.0/23").up() // two blocks for three nodes
	var left *host
	for _, h := range w.hosts {
		if h.sp.Phase() == Joining {
			left = h
		}
	}
	if left == nil {
		t.Fatal("three nodes share two blocks")
	}
	w.hosts[0].stop()
	w.runFor(20 * time.Second)
	wantProblem(t, left, "no free block of /24 in 10.244.0.0/23")
	wantProblem(t, left, "node-0 (01000000) owns 1 (dead)")
	wantProblem(t, left, "owns 1 (has no free block)")
	if _, err := left.sp.Allocate(w.now, PodRequest{Key: "x"}); !errors.Is(err, ErrNotReady) {
		t.Errorf("%v", err)
	}
}

func TestCheckAndRelease(t *testing.T) {
	s, _ := lone(t, "10.244.0.0/16")
	for _, k := range []string{"alive", "leaked", "young"} {
		at := simStart
		if k == "young" {
			at = at.Add(59 * time.Second)
		}
		if _, err := s.Allocate(at, PodRequest{Key: k}); err != nil {
			t.Fatal(err)
		}
	}
	live := []ipam.Allocation{s.Allocations()[0], {Addr: netip.MustParseAddr("10.244.0.77"), Key: "?"}, {Addr: netip.MustParseAddr("192.0.2.1")}}
	now := simStart.Add(time.Minute)
	got := s.Check(now, live, 30*time.Second)
	if len(got) != 2 || got[0].Kind != Unknown || got[1].Kind != Leaked || got[1].Allocation.Key != "leaked" {
		t.Fatalf("%+v", got)
	}
	if out, err := s.ReleaseLeaked(now, live, 30*time.Second, "alive", "young"); err != nil || len(out) != 0 {
		t.Errorf("released %v, %v", out, err)
	}
	if out, err := s.ReleaseLeaked(now, live, 30*time.Second); err != nil || len(out) != 1 || out[0].Key != "leaked" {
		t.Errorf("released %v, %v", out, err)
	}
	if refused, err := s.Adopt(now, live[1:2]); err != nil || len(refused) != 0 {
		t.Errorf("%v %v", refused, err)
	}
	if got := s.Check(now, live, time.Hour); len(got) != 0 {
		t.Errorf("%+v", got)
	}

	// A container that comes back while its former namespace's allocation is there is being wired, and no leak.
	for i, netns := range []string{"/run/netns/one", "/run/netns/two"} {
		at := simStart.Add(time.Duration(i) * time.Hour)
		if got, err := s.Allocate(at, PodRequest{Key: "back", Netns: netns}); err != nil || got[0].Netns != netns || got[0].Since != at {
			t.Errorf("%+v, %v", got, err)
		}
	}
	if out, err := s.ReleaseLeaked(simStart.Add(time.Hour), live, time.Minute, "back"); err != nil || len(out) != 0 {
		t.Errorf("released %v, %v", out, err)
	}
}

// An address that has been out of use for the cool-down already is free at once.
func TestReleaseRested(t *testing.T) {
	s, env := lone(t, "10.244.0.0/16")
	had, err := s.Allocate(simStart, PodRequest{Key: "before"})
	if err != nil {
		t.Fatal(err)
	}
	env.fail = errors.New("no space left on device")
	if out, err := s.ReleaseRested(simStart, "before"); err == nil || len(s.Allocations()) != 1 {
		t.Errorf("released %v, %v", out, err)
	}
	env.fail = nil
	if out, err := s.ReleaseRested(simStart, "before"); err != nil || !slices.Equal(out, had) || len(s.Resting(simStart)) != 0 {
		t.Errorf("released %v, %v; resting are %v", out, err, s.Resting(simStart))
	}
	if got, err := s.Allocate(simStart, PodRequest{Key: "after", Want: []netip.Addr{had[0].Addr}}); err != nil || got[0].Addr != had[0].Addr {
		t.Errorf("%v, %v", got, err)
	}
	if out, err := s.ReleaseRested(simStart, "nobody"); err != nil || len(out) != 0 {
		t.Errorf("released %v, %v", out, err)
	}
}

// Pods that came while the host's clock was ahead are found leaked in time, and not only when the clock is there again.
func TestLeakAfterClockWasAhead(t *testing.T) {
	s, env := lone(t, "10.244.0.0/16")
	ahead := simStart.Add(1000 * time.Hour)
	if _, err := s.Allocate(ahead, PodRequest{Key: "gone", Netns: "/run/netns/gone"}); err != nil {
		t.Fatal(err)
	}
	s, err := New(simStart, s.cfg, env.disk, env)
	if err != nil {
		t.Fatal(err)
	}
	if out := s.Check(simStart.Add(30*time.Second), nil, time.Minute); len(out) != 0 {
		t.Errorf("half a minute after the start: %+v", out)
	}
	if out, err := s.ReleaseLeaked(simStart.Add(time.Minute), nil, time.Minute); err != nil || len(out) != 1 {
		t.Errorf("a minute after the start %v are released, %v", out, err)
	}
}

// Pods that are found on the host keep their addresses, whether that can be saved or not.
func TestAdoptOnFullDisk(t *testing.T) {
	s, env := lone(t, "10.244.0.0/16")
	found := ipam.Allocation{Addr: netip.MustParseAddr("10.244.0.7"), Key: "found"}
	env.fail = errors.New("no space left on device")
	if _, err := s.Adopt(simStart, []ipam.Allocation{found}); err == nil {
		t.Error("no error")
	}
	env.fail = nil
	if _, err := s.Allocate(simStart, PodRequest{Key: "other", Want: []netip.Addr{found.Addr}}); !errors.Is(err, ipam.ErrUnavailable) {
		t.Errorf("another pod gets its address: %v", err)
	}
	if s.Tick(simStart); len(env.disk.Allocations) != 1 {
		t.Errorf("the next Tick saves %v", env.disk.Allocations)
	}
}

func TestConfigIsChecked(t *testing.T) {
	p := netip.MustParsePrefix
	for want, c := range map[string]Config{
		"node ID is zero":         {},
		"at most one of each":     {ID: NodeID{1}, CIDRs: []netip.Prefix{p("10.0.0.0/8"), p("10.1.0.0/16")}},
		"did you mean":            {ID: NodeID{1}, CIDRs: []netip.Prefix{netip.PrefixFrom(netip.MustParseAddr("10.1.2.3"), 16)}},
		"bootstrap needs":         {ID: NodeID{1}, Bootstrap: true},
		"must be between 24 and":  {ID: NodeID{1}, Bootstrap: true, CIDRs: []netip.Prefix{p("10.0.0.0/24")}, BlockLen4: 20},
		"must be between 48 and ": {ID: NodeID{1}, Bootstrap: true, CIDRs: []netip.Prefix{p("fd00::/48")}, BlockLen6: 127},
	} {
		if _, err := New(simStart, c, nil, new(loneEnv)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", c, err, want)
		}
	}
}

// A newcomer that has got space is a peer before it has told that it is in the cluster: the network may fail in that moment.
func TestNewcomerWithSpaceIsAPeer(t *testing.T) {
	s, env := lone(t, "10.244.0.0/16")
	newcomer, at := NodeID{7}, netip.MustParseAddrPort("192.0.2.7:7946")
	env.members = []Member{{ID: newcomer, Name: "seven", Addr: at, Alive: true}}
	now := s.Tick(simStart)
	if p := s.Peers(); len(p) != 0 {
		t.Fatalf("a newcomer without space: %+v", p)
	}
	s.HandleMessage(now, newcomer, s.from(newcomer, message{kind: kindRequest, seq: 1}))
	if len(s.table.Owned(newcomer)) == 0 {
		t.Fatalf("no space was given: %+v", env.last(kindRefuse))
	}
	s.Tick(now.Add(time.Second))
	if p := s.Peers(); len(p) != 1 || NodeID(p[0].ID) != newcomer || p[0].Addr != at || p[0].Name != "seven" {
		t.Errorf("peers: %+v", p)
	}
	env.members[0].Cluster = ClusterID{99}
	env.members[0].Addr = netip.MustParseAddrPort("192.0.2.8:7946")
	s.Tick(now.Add(2 * time.Second))
	if p := s.Peers(); len(p) != 1 || p[0].Addr != at {
		t.Errorf("a member of another cluster changes the peers: %+v", p)
	}
}
