package gossip

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/membership/keyring"
	"github.com/tulle-net/tulle/membership/seed"
	"go.uber.org/goleak"
)

// quick is memberlist at ten times its LAN pace, but patient enough for a busy
// machine under the race detector. The limits of what ends by itself (streams, answers about keys,
// leaves) are long: no test waits for their end.
var quick = pace{
	probeInterval: 200 * time.Millisecond, probeTimeout: 100 * time.Millisecond,
	gossipInterval: 20 * time.Millisecond, pushPull: time.Second,
	gossipToTheDead: 500 * time.Millisecond, presence: 500 * time.Millisecond,
	stream: 10 * time.Second, suspicionMult: 3,
	rejoinMin: 50 * time.Millisecond, rejoinMax: 300 * time.Millisecond,
	heal: 200 * time.Millisecond, healSlow: 200 * time.Millisecond, seeds: 200 * time.Millisecond,
	returning: 100 * time.Millisecond, conflict: 200 * time.Millisecond,
	keySettle: time.Second, keyTimeout: 20 * time.Second, leaves: 10 * time.Second, announced: time.Second,
	suspects: 200 * time.Millisecond, settle: 400 * time.Millisecond, repair: 500 * time.Millisecond,
}

// patient is for tests in which nobody dies: they find a member lost that is out of reach, but not one that has no CPU for a moment.
func patient(c *Config) { c.pace.suspicionMult = 10 }

const testPort = 17946

var lastAddr atomic.Uint32

// testAddr returns a loopback address that no other test uses, in this or
// another process.
func testAddr() netip.Addr {
	n := lastAddr.Add(1)
	return netip.AddrFrom4([4]byte{127, byte(1 + os.Getpid()%250), byte(n >> 8), byte(n)})
}

// recorder is a handler that keeps what it gets.
type recorder struct {
	mu         sync.Mutex
	state      string
	merged     map[string]int
	broadcasts map[string]int
	messages   map[string]int
	members    int
	delay      atomic.Int64 // ns
}

func newRecorder(state string) *recorder {
	return &recorder{state: state, merged: map[string]int{}, broadcasts: map[string]int{}, messages: map[string]int{}}
}

func (r *recorder) LocalState(bool) []byte { return []byte(r.state) }
func (r *recorder) MergeState(b []byte, _ bool) {
	r.note(r.merged, string(b))
}
func (r *recorder) Broadcast(b []byte) { r.note(r.broadcasts, string(b)) }
func (r *recorder) Message(from membership.NodeID, b []byte) {
	r.note(r.messages, from.Short()+" "+string(b))
}
func (r *recorder) Members() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.members++
}

func (r *recorder) note(m map[string]int, s string) {
	time.Sleep(time.Duration(r.delay.Load()))
	r.mu.Lock()
	defer r.mu.Unlock()
	m[s]++
}

func (r *recorder) times(m map[string]int, s string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return m[s]
}

// node is a running member under test.
type node struct {
	*Gossip
	*recorder
	name string
	addr netip.Addr
	stop func() error // ends it and returns what Run returned; may be repeated
	done chan struct{}
}

type option func(*Config)

func seeds(addrs ...netip.Addr) option {
	var texts []string
	for _, a := range addrs {
		texts = append(texts, a.String())
	}
	return named(texts...)
}

func named(texts ...string) option {
	return func(c *Config) {
		var err error
		if c.Seeds, err = seed.New(texts, testPort, nil, nil); err != nil {
			panic(err)
		}
	}
}
func cluster(id membership.ClusterID) option { return func(c *Config) { c.Meta.Cluster = id } }
func identity(id membership.NodeID) option   { return func(c *Config) { c.ID = id } }
func at(a netip.Addr) option                 { return func(c *Config) { c.Bind = a } }
func ring(k *keyring.Ring) option            { return func(c *Config) { c.Keyring = k } }
func links(f func(a, b netip.Addr) bool) option {
	return func(c *Config) {
		self := c.Bind
		c.allow = func(o netip.AddrPort) bool { return f(self, o.Addr()) }
	}
}

// launch starts a node, which ends with the test.
func launch(t *testing.T, name string, opts ...option) *node {
	t.Helper()
	return launchAltered(t, name, nil, opts...)
}

// launchAltered is launch of a node that alter changes before it runs.
func launchAltered(t *testing.T, name string, alter func(*Gossip), opts ...option) *node {
	t.Helper()
	n := &node{recorder: newRecorder("state of " + name), name: name, done: make(chan struct{})}
	c := Config{
		ID: membership.NewNodeID(), Name: name, Bind: testAddr(), Port: testPort, Handler: n.recorder, pace: quick,
		Logger: slog.New(slog.NewTextHandler(logOf(t), &slog.HandlerOptions{Level: slog.LevelInfo})).With("node", name),
	}
	for _, o := range opts {
		o(&c)
	}
	n.addr = c.Bind
	c.Meta.Underlay = []netip.Addr{c.Bind}
	g, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	n.Gossip = g
	if alter != nil {
		alter(g)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var result error
	go func() {
		defer close(n.done)
		var wg sync.WaitGroup
		wg.Go(func() { _ = c.Seeds.Run(ctx) })
		result = g.Run(ctx)
		cancel()
		wg.Wait()
	}()
	n.stop = func() error {
		cancel()
		<-n.done
		return result
	}
	t.Cleanup(func() { n.stop() })
	select {
	case <-g.Ready():
	case <-n.done:
		t.Fatalf("%s: %v", name, result)
	}
	return n
}

// nodeLog is the log of one node.
type nodeLog struct {
	t    *testing.T
	mu   sync.Mutex
	text bytes.Buffer
}

// logOf has a log printed when the test ends and has failed, or at once with -v.
func logOf(t *testing.T) *nodeLog {
	l := &nodeLog{t: t}
	t.Cleanup(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if t.Failed() && !testing.Verbose() {
			t.Logf("the log of a node:\n%s", &l.text)
		}
	})
	return l
}

func (l *nodeLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if testing.Verbose() {
		fmt.Fprintf(os.Stderr, "%s: %s", l.t.Name(), b)
		return len(b), nil
	}
	return l.text.Write(b)
}

// leakCheck is to be called first, so that it looks after all nodes ended. A probe that memberlist had under way ends by
// itself, within seconds (Gossip.Run says so): on a busy machine longer than goleak waits.
func leakCheck(t *testing.T) {
	t.Helper()
	old := goleak.IgnoreCurrent()
	t.Cleanup(func() {
		var err error
		for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
			if err = goleak.Find(old); err == nil {
				return
			}
		}
		t.Error(err)
	})
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 s: %s", what)
		}
		time.Sleep(10 * time.Millisecond) // polling
	}
}

// sees reports whether n has exactly these live members.
func (n *node) sees(others ...*node) bool {
	var live, want []string
	for _, m := range n.Gossip.Members() {
		if m.State <= StateSuspect {
			live = append(live, m.Name)
		}
	}
	for _, o := range others {
		if o != n {
			want = append(want, o.name)
		}
	}
	slices.Sort(live)
	slices.Sort(want)
	return slices.Equal(live, want)
}

func converge(t *testing.T, nodes ...*node) {
	t.Helper()
	for _, n := range nodes {
		eventually(t, n.name+" sees all the others", func() bool { return n.sees(nodes...) })
	}
}

func (n *node) hasProblem(words ...string) bool {
	for _, p := range n.Problems() {
		if p.Remedy == "" {
			return false
		}
		all := true
		for _, w := range words {
			all = all && strings.Contains(p.String(), w)
		}
		if all {
			return true
		}
	}
	return false
}

func TestJoinInAnyOrder(t *testing.T) {
	leakCheck(t)
	id := membership.NewClusterID()
	var addrs []netip.Addr
	for range 6 {
		addrs = append(addrs, testAddr())
	}
	// Everybody has everybody's address, its own included; the one with the
	// cluster comes in the middle.
	var nodes []*node
	for i, a := range addrs {
		opts := []option{patient, at(a), seeds(addrs...)}
		if i == 3 {
			opts = append(opts, cluster(id))
		}
		nodes = append(nodes, launch(t, fmt.Sprint("node", i), opts...))
	}
	converge(t, nodes...)
	for _, n := range nodes {
		eventually(t, n.name+" is adopted", func() bool { return n.Cluster() == id })
		if n.Isolated() {
			t.Errorf("%s says that it is isolated", n.name)
		}
	}
	for _, n := range nodes {
		eventually(t, n.name+" knows the others' cluster", func() bool {
			return !slices.ContainsFunc(n.Gossip.Members(), func(m Member) bool { return m.Meta.Cluster != id })
		})
		for _, m := range n.Gossip.Members() {
			if m.Addr.Addr() != m.Meta.Underlay[0] || m.Meta.ID != m.ID || m.Since.IsZero() {
				t.Errorf("%s has a wrong picture: %+v", n.name, m)
			}
		}
		for i, s := range n.Seeds() {
			if self := addrs[i] == n.addr; s.Self() != self {
				t.Errorf("%s holds seed %s for itself: %v", n.name, s.Name, s.Self())
			}
		}
	}
}

func TestSeedsNotThereYet(t *testing.T) {
	leakCheck(t)
	late := testAddr()
	n := launch(t, "early", named(late.String(), "no-such-host.invalid"))
	eventually(t, "the silent seed is explained", func() bool { return n.hasProblem("seed "+late.String(), "nothing listens there") })
	eventually(t, "the unknown name is explained", func() bool { return n.hasProblem("no-such-host.invalid", "does not resolve", "--join") })
	if !n.Isolated() {
		t.Error("not isolated")
	}
	if since := n.AloneSince(); since.IsZero() || time.Since(since) > time.Hour || !n.Stats().LastSync.IsZero() {
		t.Errorf("alone since %v, synced at %v", since, n.Stats().LastSync)
	}
	other := launch(t, "late", at(late))
	converge(t, n, other)
	if n.Isolated() || other.Isolated() {
		t.Error("isolated although joined")
	}
	eventually(t, "tables have been exchanged", func() bool { return time.Since(n.Stats().LastSync) < time.Hour })
	before := time.Now()
	other.stop()
	eventually(t, "it is alone again", func() bool { return n.Alive() == 0 && !n.AloneSince().Before(before) })
	other = launch(t, "late", at(late))
	converge(t, n, other)
	eventually(t, "no problem remains", func() bool { return len(n.Problems()) == 0 })
}

func TestNotIsolatedAlone(t *testing.T) {
	leakCheck(t)
	n := launch(t, "first", cluster(membership.NewClusterID()))
	if n.Isolated() {
		t.Error("a node that knows of nobody is not isolated")
	}
	if p := n.Problems(); len(p) != 0 {
		t.Errorf("problems: %v", p)
	}
}

func TestClustersNeverMerge(t *testing.T) {
	leakCheck(t)
	a1 := launch(t, "a1", patient, cluster(membership.NewClusterID()))
	a2 := launch(t, "a2", patient, cluster(a1.Cluster()), seeds(a1.addr))
	b1 := launch(t, "b1", cluster(membership.NewClusterID()))
	b2 := launch(t, "b2", cluster(b1.Cluster()), seeds(b1.addr))
	converge(t, a1, a2)
	converge(t, b1, b2)
	bridge := launch(t, "bridge", cluster(b1.Cluster()), seeds(a1.addr, b1.addr))
	converge(t, b1, b2, bridge)
	eventually(t, "the joined side says so", func() bool { return a1.hasProblem("bridge", b1.Cluster().String(), a1.Cluster().String()) })
	eventually(t, "the joining side says so", func() bool { return bridge.hasProblem(a1.Cluster().String()) })
	if !a1.sees(a2) || !a2.sees(a1) {
		t.Error("the other cluster's nodes have been let in")
	}
	if a1.Stats().Refused == 0 {
		t.Error("not counted")
	}
	if n := a1.times(a1.merged, bridge.state) + bridge.times(bridge.merged, a1.state); n != 0 {
		t.Error("state of another cluster has been merged")
	}
}

func TestAdoptionIsFinal(t *testing.T) {
	leakCheck(t)
	a := launch(t, "a", cluster(membership.NewClusterID()))
	b := launch(t, "b", cluster(membership.NewClusterID()))
	fresh := launch(t, "fresh", seeds(a.addr))
	converge(t, a, fresh)
	eventually(t, "adoption", func() bool { return fresh.Cluster() == a.Cluster() })
	if err := fresh.SetMeta(membership.Meta{Cluster: b.Cluster()}); err == nil {
		t.Error("changed from one cluster to another")
	}
	if err := fresh.SetMeta(membership.Meta{UDPPort: 6080}); err != nil {
		t.Error(err)
	}
	eventually(t, "the new metadata arrives", func() bool {
		m, ok := a.Member(fresh.cfg.ID)
		return ok && m.Meta.UDPPort == 6080 && m.Meta.Cluster == a.Cluster() && m.Name == "fresh"
	})
	if err := fresh.pushPull(netip.AddrPortFrom(b.addr, testPort)); err == nil || !strings.Contains(err.Error(), "belongs to cluster") {
		t.Errorf("join of another cluster: %v", err)
	}
}

// Two nodes of no cluster have met; then each is given a cluster of its own.
func TestNodesThatPartWays(t *testing.T) {
	leakCheck(t)
	a := launch(t, "a")
	b := launch(t, "b", seeds(a.addr))
	converge(t, a, b)
	a.Gossip.mu.Lock()
	b.Gossip.mu.Lock()
	errs := []error{a.adoptLocked(membership.NewClusterID()), b.adoptLocked(membership.NewClusterID())}
	b.Gossip.mu.Unlock()
	a.Gossip.mu.Unlock()
	if errs[0] != nil || errs[1] != nil {
		t.Fatal(errs)
	}
	for _, n := range []*node{a, b} {
		eventually(t, n.name+" drops the other one", func() bool { return len(n.Gossip.Members()) == 0 })
		eventually(t, n.name+" says why", func() bool { return n.hasProblem("belongs to cluster") })
	}
	if err := a.Send(t.Context(), b.cfg.ID, []byte("x")); err == nil {
		t.Error("sent to a foreign node")
	}
}

func TestSendAndQueue(t *testing.T) {
	leakCheck(t)
	key, _ := keyring.Parse(keyring.Generate())
	newRing := func() *keyring.Ring { k, _ := keyring.New(key); return k }
	first := launch(t, "n0", patient, ring(newRing()), cluster(membership.NewClusterID()))
	nodes := []*node{first}
	for i := 1; i < 12; i++ {
		nodes = append(nodes, launch(t, fmt.Sprint("n", i), patient, ring(newRing()), seeds(first.addr)))
	}
	converge(t, nodes...)
	big := strings.Repeat("m", MaxMessage)
	if err := first.Send(t.Context(), nodes[5].cfg.ID, []byte(big)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the largest message arrives", func() bool {
		return nodes[5].times(nodes[5].messages, first.cfg.ID.Short()+" "+big) == 1
	})
	if err := first.Send(t.Context(), nodes[5].cfg.ID, []byte(big+"m")); err == nil {
		t.Error("a message above the limit has been sent")
	}
	if err := first.Send(t.Context(), membership.NewNodeID(), nil); err == nil {
		t.Error("sent to nobody")
	}
	full := strings.Repeat("b", first.MaxBroadcast())
	if err := first.Queue([]byte(full + "b")); err == nil {
		t.Error("a broadcast above the limit has been queued")
	}
	want := []string{full}
	for i := range 200 {
		want = append(want, fmt.Sprintf("entry %d of a table that is longer than a packet", i))
	}
	// In portions: a starved machine loses datagrams of a burst, and nothing
	// but push/pull, which brings no broadcasts, makes up for these. A member
	// misses one of 160,000 broadcasts by chance, see retransmitMult.
	missed := 0
	for first, portion := range slices.Collect(slices.Chunk(want, 20)) {
		sender := func(i int) *node { return nodes[(20*first+i)%len(nodes)] }
		for i, w := range portion {
			if err := sender(i).Queue([]byte(w)); err != nil {
				t.Fatal(err)
			}
		}
		lacking := func() (missing int) {
			for _, n := range nodes {
				for i, w := range portion {
					if c := n.times(n.broadcasts, w); c == 0 && sender(i) != n {
						missing++
					} else if c > 1 {
						t.Errorf("%s got a broadcast %d times", n.name, c)
					}
				}
			}
			return missing
		}
		missing := lacking()
		for end := time.Now().Add(30 * time.Second); missing > 0 && time.Now().Before(end); missing = lacking() {
			time.Sleep(10 * time.Millisecond) // polling
		}
		if missed += missing; missed > 2 {
			t.Fatalf("%d broadcasts were missed, %d of them from the %dth on", missed, missing, 20*first)
		}
	}
	for _, n := range nodes {
		if s := n.Stats(); s.LargestPacket == 0 || s.LargestPacket > 1500-28 || s.BytesSent == 0 || s.BytesReceived == 0 || s.Undecryptable != 0 || s.Malformed != 0 || s.Dropped != 0 {
			t.Errorf("%s: %+v", n.name, s)
		}
	}
	n, err := first.SyncAll(t.Context())
	if n != len(nodes)-1 || err != nil {
		t.Errorf("SyncAll: %d, %v", n, err)
	}
	for _, o := range nodes[1:] {
		eventually(t, "SyncAll has brought the state to "+o.name, func() bool { return o.times(o.merged, first.state) > 0 })
	}
}

func TestPacketsFitTheLink(t *testing.T) {
	leakCheck(t)
	const mtu = 1280
	small := func(c *Config) { c.MTU = mtu }
	key, _ := keyring.Parse(keyring.Generate())
	k, _ := keyring.New(key)
	long := func(c *Config) {
		c.Name = strings.Repeat("x", membership.MaxName)
		for i := range membership.MaxMetaAddrs {
			c.Meta.TunAddrs = append(c.Meta.TunAddrs, netip.AddrFrom16([16]byte{0xfd, 15: byte(i)}))
		}
	}
	a := launch(t, "a", small, ring(k), cluster(membership.NewClusterID()))
	for i := range 5 {
		launch(t, fmt.Sprint(i), small, ring(k), long, seeds(a.addr))
	}
	eventually(t, "all have joined", func() bool { return a.Stats().Alive == 5 })
	for i := range 300 {
		a.Queue(fmt.Appendf(nil, "%d %s", i, strings.Repeat("b", i)))
	}
	eventually(t, "the queue is empty", func() bool { return a.Stats().Queue == 0 })
	if n := a.Stats().LargestPacket; n > mtu-28 || n < 1000 {
		t.Errorf("largest packet has %d bytes, the link takes %d", n, mtu-28)
	}
	many := slices.Repeat([]netip.Addr{netip.MustParseAddr("2001:db8::1")}, membership.MaxMetaAddrs)
	if _, err := New(Config{ID: membership.NewNodeID(), Name: strings.Repeat("x", membership.MaxName), Bind: a.addr, Port: 1, Handler: a.recorder, MTU: minMTU,
		Meta: membership.Meta{Underlay: many, TunAddrs: many}}); err == nil || !strings.Contains(err.Error(), "MTU") {
		t.Errorf("metadata that does not fit a packet of a small link: %v", err)
	}
}

// A handler that is slow must not slow memberlist down, nor pile up memory.
func TestSlowHandler(t *testing.T) {
	leakCheck(t)
	a := launch(t, "a", patient, cluster(membership.NewClusterID()))
	b := launch(t, "b", patient, seeds(a.addr))
	converge(t, a, b)
	b.recorder.delay.Store(int64(2 * time.Millisecond))
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 1500 {
				a.Queue(fmt.Appendf(nil, "%d %d", i, j))
				b.Gossip.Members()
				b.Problems()
			}
		})
	}
	wg.Wait()
	more := 0
	work := func() { // for the time until the next look, if little is left
		b.inbox.mu.Lock()
		left := len(b.inbox.items)
		b.inbox.mu.Unlock()
		if left > 100 {
			return
		}
		for range 50 {
			a.Queue(fmt.Appendf(nil, "more %d", more))
			more++
		}
	}
	for healthy, end := 0, time.Now().Add(30*time.Second); healthy < 20; { // looks in a row: several probes long
		work()
		if !a.sees(b) || !b.sees(a) {
			t.Fatal("a slow handler has cost the membership")
		}
		healthy++
		if h := b.Stats().Health; h > 2 { // it is without a slow handler, too, on a machine that stands still
			healthy = 0
			if time.Now().After(end) {
				t.Fatalf("health score %d", h)
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
	b.inbox.mu.Lock()
	defer b.inbox.mu.Unlock()
	if len(b.inbox.items) > maxInboxItems {
		t.Errorf("%d messages wait", len(b.inbox.items))
	}
}

func TestRefusedConfigs(t *testing.T) {
	good := Config{ID: membership.NewNodeID(), Bind: testAddr(), Port: testPort, Handler: newRecorder("")}
	for name, tc := range map[string]struct {
		spoil func(*Config)
		says  string
	}{
		"no ID":       {func(c *Config) { c.ID = membership.NodeID{} }, "ID"},
		"any address": {func(c *Config) { c.Bind = netip.IPv4Unspecified() }, "--underlay"},
		"port":        {func(c *Config) { c.Port = 65536 }, "--gossip-port"},
		"no handler":  {func(c *Config) { c.Handler = nil }, "handler"},
		"tiny MTU":    {func(c *Config) { c.MTU = 500 }, "576"},
		"long name":   {func(c *Config) { c.Name = strings.Repeat("x", membership.MaxName+1) }, "--node-name"},
	} {
		t.Run(name, func(t *testing.T) {
			c := good
			tc.spoil(&c)
			if _, err := New(c); err == nil || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("got %v, wants a word on %s", err, tc.says)
			}
		})
	}
	n := launch(t, "here")
	taken := good
	taken.Bind = n.addr
	g, err := New(taken)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "--gossip-port") {
		t.Errorf("busy port: %v", err)
	}
	taken.Bind = netip.MustParseAddr("192.0.2.1")
	g, _ = New(taken)
	if err := g.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "--underlay") {
		t.Errorf("foreign address: %v", err)
	}
}

// Who waited for a cluster and went has had nothing: it is not listed for a day.
func TestNewNodesThatGoAreNotListedForLong(t *testing.T) {
	a, err := New(Config{ID: membership.NodeID{1}, Name: "a", Bind: netip.MustParseAddr("127.0.0.1"), Port: testPort, Handler: newRecorder("")})
	if err != nil {
		t.Fatal(err)
	}
	gone := func(id byte, c membership.ClusterID, ago time.Duration) {
		m := Member{ID: membership.NodeID{id}, State: StateDead, Since: time.Now().Add(-ago), Meta: membership.Meta{Cluster: c}}
		a.peers[m.ID] = &peer{Member: m}
	}
	gone(2, membership.ClusterID{}, time.Second)
	gone(3, membership.ClusterID{}, 2*keepNew)
	gone(4, membership.ClusterID{1}, 2*keepNew)
	var listed []byte
	for _, m := range a.Members() {
		listed = append(listed, m.ID[0])
	}
	if string(listed) != "\x02\x04" {
		t.Errorf("lists %v", listed)
	}
	a.pruneLocked(time.Now())
	if len(a.peers) != 2 {
		t.Errorf("keeps %d", len(a.peers))
	}
}
