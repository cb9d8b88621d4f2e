package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"runtime/debug"
	runtimemetrics "runtime/metrics"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/gaissmai/bart"

	"github.com/tulle-net/tulle/bench/traffic"
	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/membership/gossip"
	"github.com/tulle-net/tulle/membership/keyring"
	"github.com/tulle-net/tulle/membership/seed"
)

// GossipOptions configure one run of [Gossip].
type GossipOptions struct {
	Nodes    int // members in this process, at least 2
	Prefixes int // entries in the table; 0 means one for each node
	Rounds   int // new entries to time; 0 means 20
	// Rest is how long idle traffic is counted. 0 means one push/pull period, in
	// which every node starts exactly one push/pull. memberlist makes the period
	// longer in larger clusters.
	Rest time.Duration
	Port int // 0 means 17947; the addresses are 127.128.0.0 and up

	Progress func(string) // receives progress messages; may be nil
}

// GossipResult is the result of one run of [Gossip].
type GossipResult struct {
	Nodes     int    `json:"nodes"`
	Prefixes  int    `json:"prefixes"`
	Transport string `json:"transport"`
	CPUs      int    `json:"cpus"`

	Form     time.Duration   `json:"form_ns"`     // from the first start until all nodes knew all others; nodes start in batches
	Spread   []time.Duration `json:"spread_ns"`   // by round: until the last node had the new entry
	OneNode  Quantiles       `json:"one_node"`    // seconds until a node had it, over all nodes and rounds
	LastNode Quantiles       `json:"last_node"`   // seconds until the last node had it, over all rounds
	Rest     time.Duration   `json:"rest_ns"`     // how long idle traffic was counted
	PushPull time.Duration   `json:"pushpull_ns"` // the period in which each node starts one push/pull

	SentPerNode     float64 `json:"sent_bytes_per_node_second"` // idle, mean; UDP and TCP payload
	ReceivedPerNode float64 `json:"received_bytes_per_node_second"`
	PacketsPerNode  float64 `json:"packets_per_node_second"`  // UDP datagrams sent
	LargestPacket   uint64  `json:"largest_packet_bytes"`     // of UDP payload
	CPUPerNode      float64 `json:"cpu_fraction_of_one_core"` // idle, mean; without garbage collection
	HeapPerNode     float64 `json:"heap_bytes_per_node"`      // live heap after a collection: members, table, its encoding, and memberlist
	StackPerNode    float64 `json:"stack_bytes_per_node"`     // of goroutines
	Goroutines      float64 `json:"goroutines_per_node"`
	TableBytes      int     `json:"table_bytes"`  // size of the encoded table in a push/pull
	Lookup          float64 `json:"lookup_ns"`    // in the forwarding trie, with this table
	LookupSmall     float64 `json:"lookup_10_ns"` // the same with ten entries, for comparison
	Unsettled       int     `json:"unsettled"`    // members that some node considers dead at the end
	Dropped         uint64  `json:"dropped"`      // messages dropped because a handler was too slow
	Malformed       uint64  `json:"malformed"`    //
}

// member is one node of the run: the gossip layer as an agent uses it, with its
// own table.
type member struct {
	*gossip.Gossip
	id  membership.NodeID
	run *gossipRun

	mu    sync.Mutex
	table *membership.Table
	wire  []byte // the encoded table; nil after a change
}

// gossipRun is shared by all members of a run. It holds the round that is being timed.
type gossipRun struct {
	round atomic.Pointer[round]
}

type round struct {
	prefix netip.Prefix
	start  time.Time
	left   atomic.Int64
	done   chan struct{}
	at     []atomic.Int64 // by arrival: ns since start
}

var _ gossip.Handler = (*member)(nil)

func (m *member) LocalState(bool) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.wire == nil {
		m.wire = membership.AppendEntries(nil, m.table.Entries())
	}
	return m.wire
}

func (m *member) MergeState(b []byte, _ bool) { m.merge(b) }
func (m *member) Broadcast(b []byte)          { m.merge(b) }

func (*member) Message(membership.NodeID, []byte) {}
func (*member) Members()                          {}

func (m *member) merge(b []byte) {
	entries, _, err := membership.DecodeEntries(b)
	if err != nil {
		return // the run then does not converge, which reports it
	}
	m.mu.Lock()
	changed, _ := m.table.Merge(entries)
	if len(changed) > 0 {
		m.wire = nil
	}
	m.mu.Unlock()
	r := m.run.round.Load()
	if r == nil || !slices.ContainsFunc(changed, func(e membership.Entry) bool { return e.Prefix == r.prefix }) {
		return
	}
	left := r.left.Add(-1)
	r.at[left].Store(int64(time.Since(r.start)))
	if left == 0 {
		close(r.done)
	}
}

// Gossip runs real members in this process. It measures how fast new entries
// spread among them, and what the members cost. They use memberlist's LAN
// profile with a gossip key, as agents do.
func Gossip(ctx context.Context, o GossipOptions) (GossipResult, error) {
	if o.Nodes < 2 || o.Nodes > 1<<15 {
		return GossipResult{}, fmt.Errorf("gossip: %d nodes, from 2 to %d can be run", o.Nodes, 1<<15)
	}
	if o.Prefixes == 0 {
		o.Prefixes = o.Nodes
	}
	if o.Prefixes < 0 || o.Prefixes > membership.MaxEntries-maxRounds {
		return GossipResult{}, fmt.Errorf("gossip: %d prefixes, up to %d fit a table", o.Prefixes, membership.MaxEntries-maxRounds)
	}
	if o.Rounds == 0 {
		o.Rounds = 20
	}
	if o.Rounds < 1 || o.Rounds > maxRounds {
		return GossipResult{}, fmt.Errorf("gossip: %d rounds, from 1 to %d can be run", o.Rounds, maxRounds)
	}
	if o.Port == 0 {
		o.Port = 17947
	}
	period := pushPullPeriod(o.Nodes)
	if o.Rest == 0 {
		o.Rest = period
	}
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	if err := allowFiles(4*o.Nodes + 256); err != nil {
		return GossipResult{}, err
	}
	res := GossipResult{
		Nodes: o.Nodes, Prefixes: o.Prefixes, CPUs: runtime.NumCPU(), Rest: o.Rest, PushPull: period,
		Transport: "UDP and TCP sockets on 127.128.0.0/9, all nodes in one process",
	}
	// So many nodes in one process need gigabytes of heap. During a collection,
	// answers are late enough that nodes are declared dead. So this function decides
	// when to collect, until memory runs short.
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	var info syscall.Sysinfo_t
	if err := syscall.Sysinfo(&info); err != nil {
		return GossipResult{}, fmt.Errorf("gossip: how much memory there is: %w", err)
	}
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(int64(info.Totalram) * int64(info.Unit) / 2))
	before := memory()

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	start := time.Now()
	nodes, wait, err := startMembers(ctx, o)
	defer wait()
	defer cancel()
	if err != nil {
		return res, err
	}
	res.Form = time.Since(start)
	if err := timeEntries(ctx, o, nodes, &res); err != nil {
		return res, err
	}
	if err := rest(ctx, o, nodes, &res); err != nil {
		return res, err
	}
	after := memory()
	n := float64(o.Nodes)
	res.HeapPerNode = float64(after.HeapAlloc-before.HeapAlloc) / n
	res.StackPerNode = float64(after.StackInuse-before.StackInuse) / n
	res.Goroutines = float64(runtime.NumGoroutine()) / n
	res.TableBytes = len(nodes[0].LocalState(false))
	res.Lookup = lookupCost(nodes[0].table.Entries())
	res.LookupSmall = lookupCost(nodes[0].table.Entries()[:min(10, nodes[0].table.Len())])
	for _, m := range nodes {
		s := m.Stats()
		res.Unsettled += o.Nodes - 1 - s.Alive
		res.Dropped += s.Dropped
		res.Malformed += s.Malformed
		res.LargestPacket = max(res.LargestPacket, s.LargestPacket)
	}
	return res, nil
}

const maxRounds = 1000

// pushPullPeriod is memberlist's: 30 s, stretched above 32 nodes (its
// pushPullScale).
func pushPullPeriod(nodes int) time.Duration {
	const interval, threshold = 30 * time.Second, 32
	if nodes <= threshold {
		return interval
	}
	return interval * time.Duration(math.Ceil(math.Log2(float64(nodes))-math.Log2(threshold))+1)
}

// allowFiles raises the limit of open files: two sockets a node, and streams.
func allowFiles(n int) error {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return fmt.Errorf("gossip: limit of open files: %w", err)
	}
	if l.Cur >= uint64(n) {
		return nil
	}
	l.Cur, l.Max = uint64(n), max(l.Max, uint64(n))
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return fmt.Errorf("gossip: %d open files are needed, raise the limit (ulimit -n): %w", n, err)
	}
	return nil
}

// memory collects garbage and returns what is left.
func memory() runtime.MemStats {
	var s runtime.MemStats
	runtime.GC()
	debug.FreeOSMemory() // collects again, after the finalizers of the first collection
	runtime.ReadMemStats(&s)
	return s
}

// bulkPrefix returns the i-th /24 of 10.0.0.0/8, newPrefix that of 11.0.0.0/8.
func bulkPrefix(i int) netip.Prefix { return nth(10, i) }
func newPrefix(i int) netip.Prefix  { return nth(11, i) }

func nth(first byte, i int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{first, byte(i >> 8), byte(i), 0}), 24)
}

// startMembers starts all nodes, each with one to three earlier ones as seeds.
// wait returns when they have ended.
func startMembers(ctx context.Context, o GossipOptions) (nodes []*member, wait func(), err error) {
	var wg sync.WaitGroup
	wait = wg.Wait
	key, err := keyring.Parse(keyring.Generate())
	if err != nil {
		return nil, wait, err
	}
	shared := new(gossipRun)
	addr := func(i int) netip.Addr {
		a := [4]byte{127, 128, 0, 0}
		binary.BigEndian.PutUint16(a[2:], uint16(i+1))
		return netip.AddrFrom4(a)
	}
	ids := make([]membership.NodeID, o.Nodes)
	for i := range ids {
		ids[i] = membership.NewNodeID()
	}
	entries := make([]membership.Entry, o.Prefixes)
	for i := range entries {
		entries[i] = membership.Entry{Prefix: bulkPrefix(i), Owner: ids[i%len(ids)], Version: 1}
	}
	cluster := membership.NewClusterID()
	failed := make(chan error, o.Nodes)
	batch := 0
	for i := range o.Nodes {
		m := &member{id: ids[i], run: shared, table: membership.NewTable(slices.Clone(entries))}
		ring, err := keyring.New(key)
		if err != nil {
			return nodes, wait, err
		}
		c := gossip.Config{
			ID: ids[i], Name: fmt.Sprintf("node-%04d", i), Bind: addr(i), Port: o.Port, Keyring: ring, Handler: m,
			Logger: slog.New(slog.DiscardHandler),
			Meta: membership.Meta{
				Cluster: cluster, Underlay: []netip.Addr{addr(i)}, UDPPort: 6080, VXLANPort: 4789,
				TunAddrs: []netip.Addr{bulkPrefix(i).Addr().Next()},
			},
		}
		var seeds []string
		for range min(i, 3) {
			seeds = append(seeds, addr(rand.IntN(i)).String())
		}
		if c.Seeds, err = seed.New(seeds, uint16(o.Port), nil, nil); err != nil {
			return nodes, wait, err
		}
		if m.Gossip, err = gossip.New(c); err != nil {
			return nodes, wait, err
		}
		wg.Go(func() {
			if err := m.Run(ctx); err != nil {
				failed <- err
			}
		})
		select {
		case <-m.Ready():
		case err := <-failed:
			return nodes, wait, err
		case <-ctx.Done():
			return nodes, wait, ctx.Err()
		}
		nodes = append(nodes, m)
		// A thousand hosts that start within a second on two CPUs would only measure
		// the CPUs: each join makes work for all members, and each new member passes
		// on everything that it has learned. If the CPUs cannot keep up, probes time
		// out, and the gossip about that is even more work. So wait until a batch has
		// settled before starting the next, and make batches smaller in larger
		// clusters.
		if batch++; batch >= min(50, max(1, 1200/len(nodes))) || len(nodes) == o.Nodes {
			batch = 0
			// A node that missed a packet learns of a new member at its next push/pull, minutes later among a thousand.
			// Tolerate a few such nodes until the end.
			missed := len(nodes) / 50
			if len(nodes) == o.Nodes {
				missed = 0
			}
			if err := formed(ctx, o, nodes, missed); err != nil {
				return nodes, wait, err
			}
			if err := unhurried(ctx); err != nil {
				return nodes, wait, err
			}
			collect()
		}
		if len(nodes)%100 == 0 {
			o.Progress(fmt.Sprintf("%d of %d nodes have started", len(nodes), o.Nodes))
		}
	}
	return nodes, wait, nil
}

// garbage is the number of bytes that may be allocated before a collection.
const garbage = 3 << 30

// collect frees memory if more than garbage was allocated since the last time.
func collect() {
	s := []runtimemetrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/heap/objects:bytes"}}
	runtimemetrics.Read(s)
	if s[1].Value.Uint64() > s[0].Value.Uint64()+garbage {
		runtime.GC()
	}
}

// unhurried waits until this process uses less than half of the CPUs.
func unhurried(ctx context.Context) error {
	const period = 200 * time.Millisecond
	for {
		cpu, start := cpuTime(), time.Now()
		if err := traffic.Sleep(ctx, period); err != nil {
			return fmt.Errorf("gossip: nodes are joining: %w", err)
		}
		if (cpuTime()-cpu)*2 < time.Since(start)*time.Duration(runtime.NumCPU()) {
			return nil
		}
	}
}

// formed waits until every node considers all others alive. It tolerates a total of missed missing members.
func formed(ctx context.Context, o GossipOptions, nodes []*member, missed int) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for ticks := 1; ; ticks++ {
		missing, pairs := 0, 0
		for _, m := range nodes {
			if n := m.Alive(); n != len(nodes)-1 {
				missing++
				pairs += len(nodes) - 1 - n
			}
		}
		if pairs <= missed {
			return nil
		}
		if ticks%200 == 0 {
			o.Progress(fmt.Sprintf("%d of %d nodes do not know all others yet, %d members are missing in total", missing, len(nodes), pairs))
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("gossip: %d of %d nodes do not know all others yet: %w", missing, len(nodes), ctx.Err())
		}
	}
}

// settled waits until the gossip about the joins has ended: an idle node sends one probe and one answer per second.
func settled(ctx context.Context, o GossipOptions, nodes []*member) error {
	packets := func() (n uint64) {
		for _, m := range nodes {
			n += m.Stats().PacketsSent
		}
		return n
	}
	const atRest = 3 // packets per second and node
	for ticks := 1; ; ticks++ {
		before := packets()
		if err := traffic.Sleep(ctx, time.Second); err != nil {
			return fmt.Errorf("gossip: joins are still spreading: %w", err)
		}
		rate := float64(packets()-before) / float64(len(nodes))
		if rate < atRest {
			return quiet(ctx, o, nodes)
		}
		collect()
		if ticks%10 == 0 {
			o.Progress(fmt.Sprintf("joins are still spreading: %.1f packets per second and node", rate))
		}
	}
}

// timeEntries times new entries, one after the other, from random nodes.
func timeEntries(ctx context.Context, o GossipOptions, nodes []*member, res *GossipResult) error {
	if err := settled(ctx, o, nodes); err != nil {
		return err
	}
	runtime.GC()
	o.Progress(fmt.Sprintf("timing %d new entries", o.Rounds))
	var one, last []float64
	for i := range o.Rounds {
		m := nodes[rand.IntN(len(nodes))]
		r := &round{prefix: newPrefix(i), done: make(chan struct{}), at: make([]atomic.Int64, len(nodes)-1)}
		r.left.Store(int64(len(nodes) - 1))
		// Neighbouring entries of one owner and version would be joined into one.
		e := membership.Entry{Prefix: r.prefix, Owner: m.id, Version: uint64(i + 1)}
		m.mu.Lock()
		m.table.Merge([]membership.Entry{e})
		m.wire = nil
		m.mu.Unlock()
		r.start = time.Now()
		m.run.round.Store(r)
		if err := m.Queue(membership.AppendEntries(nil, []membership.Entry{e})); err != nil {
			return err
		}
		select {
		case <-r.done:
		case <-ctx.Done():
			return fmt.Errorf("gossip: round %d: %d nodes do not have the new entry: %w", i, r.left.Load(), ctx.Err())
		}
		var times []float64
		for j := range r.at {
			times = append(times, time.Duration(r.at[j].Load()).Seconds())
		}
		slowest := slices.Max(times)
		one, last = append(one, times...), append(last, slowest)
		res.Spread = append(res.Spread, time.Duration(slowest*float64(time.Second)))
		if err := quiet(ctx, o, nodes); err != nil {
			return err
		}
	}
	res.OneNode, res.LastNode = quantiles(one), quantiles(last)
	return nil
}

// quiet waits until no node has a broadcast left to send.
func quiet(ctx context.Context, o GossipOptions, nodes []*member) error {
	for ticks := 1; ; ticks++ {
		busy, queued, missing := 0, 0, 0
		for _, m := range nodes {
			if n := m.Queued(); n > 0 {
				busy++
				queued += n
			}
			missing += len(nodes) - 1 - m.Alive()
		}
		if busy == 0 {
			return nil
		}
		if ticks%200 == 0 {
			o.Progress(fmt.Sprintf("%d nodes still have %d broadcasts to send, %d members are considered dead", busy, queued, missing))
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return errors.Join(errors.New("gossip: broadcasts are still queued"), ctx.Err())
		}
	}
}

// rest measures traffic and CPU time while nothing happens.
func rest(ctx context.Context, o GossipOptions, nodes []*member, res *GossipResult) error {
	runtime.GC()
	o.Progress(fmt.Sprintf("counting idle traffic for %v", o.Rest))
	total := func() (s gossip.Stats) {
		for _, m := range nodes {
			t := m.Stats()
			s.BytesSent += t.BytesSent
			s.BytesReceived += t.BytesReceived
			s.PacketsSent += t.PacketsSent
		}
		return s
	}
	before, cpu, start := total(), cpuTime(), time.Now()
	select {
	case <-time.After(o.Rest):
	case <-ctx.Done():
		return fmt.Errorf("gossip: at rest: %w", ctx.Err())
	}
	used, seconds := cpuTime()-cpu, time.Since(start).Seconds()
	after := total()
	per := seconds * float64(len(nodes))
	res.SentPerNode = float64(after.BytesSent-before.BytesSent) / per
	res.ReceivedPerNode = float64(after.BytesReceived-before.BytesReceived) / per
	res.PacketsPerNode = float64(after.PacketsSent-before.PacketsSent) / per
	res.CPUPerNode = used.Seconds() / per
	return nil
}

func cpuTime() time.Duration {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		return 0 // cannot fail with these arguments
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// lookupCost returns the mean time of a longest-prefix lookup, in nanoseconds,
// in a forwarding trie built from the entries.
func lookupCost(entries []membership.Entry) float64 {
	var trie bart.Fast[membership.NodeID] // the same type as in tunnel/route
	for _, e := range entries {
		trie.Insert(e.Prefix, e.Owner)
	}
	const addrs = 4096
	random := rand.New(rand.NewPCG(1, 2))
	targets := make([]netip.Addr, addrs)
	for i := range targets {
		a := entries[random.IntN(len(entries))].Prefix.Addr().As4()
		a[3] = byte(random.Uint32())
		targets[i] = netip.AddrFrom4(a)
	}
	const passes = 256
	best := math.Inf(1) // the best of several runs: disturbances only add time
	found := 0
	for range 5 {
		start := time.Now()
		for range passes {
			for _, a := range targets {
				if _, ok := trie.Lookup(a); ok {
					found++
				}
			}
		}
		best = min(best, float64(time.Since(start).Nanoseconds())/(passes*addrs))
	}
	if found != 5*passes*addrs {
		return math.NaN() // the trie is wrong: do not report a cost
	}
	return best
}
