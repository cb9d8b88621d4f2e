package gossip

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/membership/keyring"
)

// ErrNotRunning is returned by methods that need the network before [Gossip.Run] has
// opened it or after Run has ended.
var ErrNotRunning = errors.New("gossip: not running")

// Gossip is one node's membership in a cluster. All methods are safe for
// concurrent use, and may be called from a [Handler]'s methods other than
// LocalState.
//
// Locks: memberlist calls its delegates with its node lock held, and they take
// mu. So nothing here calls into memberlist while it holds mu.
type Gossip struct {
	cfg          Config
	log          *slog.Logger
	ready        chan struct{}
	fatal        chan error
	rejoinNow    chan struct{} // wakes the rejoin loop
	dirty        chan struct{} // signals that the metadata has changed and must be announced
	updating     sync.Mutex    // held while memberlist broadcasts the metadata
	keyReqs      chan envelope
	presenceReqs chan envelope
	missing      chan missing // for repair
	inbox        *inbox
	signs        signs // of life
	queue        *queue
	seen         seenSet
	traffic      traffic
	count        counters
	alive        atomic.Int64              // other live members
	alone        time.Time                 // since when there is none; guarded by mu
	synced       atomic.Pointer[time.Time] // when a member's whole table has last arrived

	attempts sync.WaitGroup // those of rejoin that are under way
	slots    chan struct{}

	started atomic.Bool
	born    time.Time  // of this run, with the monotonic clock
	life    sync.Mutex // held while memberlist is created, replaced or shut down

	mu        sync.RWMutex
	net       *network // nil unless running
	bind      netip.AddrPort
	gen       int // of net
	meta      membership.Meta
	metaWire  []byte
	table     digest // of this node's table; zero: none was set
	differing int    // members in a row that had another table at their last ping
	peers     map[membership.NodeID]*peer
	known     map[netip.AddrPort]time.Time // addresses of members, and when they were last alive
	guard     guardState
	problems  problemSet
	otherKeys map[netip.Addr]time.Time    // of hosts that this node called last, and that had another key: when that was
	tries     map[netip.AddrPort]*attempt // of seeds' addresses, and of others while one is under way
	lastDeath time.Time
	pruned    time.Time
	keys      keyWaiters
	beside    beside
	presence  presenceWaiters
	conflicts conflicts
}

// retransmitMult scales the number of retransmissions of a broadcast by each member:
// mult·⌈log10(n+1)⌉. If every member sends a broadcast to r random others, each member
// misses it with probability e^-r. The LAN profile's 4 gives r = 8 for up to 98
// members: then some member misses one broadcast in thirty, until a push/pull half a
// minute or more later, and could not reach a new node's pods meanwhile. With 6 it is
// one in 1,600.
const retransmitMult = 6

// network is one memberlist instance and its sockets.
type network struct {
	ml *memberlist.Memberlist
	tr *transport
	d  *delegate
}

type peer struct {
	Member
	gen      int       // of the network that last saw it alive
	metaHash digest    // of its metadata as they came
	doubted  time.Time // when a probe of it last failed
	unsure   bool      // this node has suspected it, and memberlist may do so still: its refutation may be lost
	otherKey time.Time // when a message of one of the two could last not be opened by the other one
	udpLost  int       // pings over UDP that it has missed since it answered a probe over TCP only, that one included; 0: none such
}

// New checks the configuration. It starts nothing.
func New(cfg Config) (*Gossip, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	cfg.pace = cfg.pace.withDefaults()
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	g := &Gossip{
		cfg: cfg, log: log,
		ready:        make(chan struct{}),
		fatal:        make(chan error, 1),
		born:         time.Now(),
		alone:        time.Now(),
		rejoinNow:    make(chan struct{}, 1),
		dirty:        make(chan struct{}, 1),
		keyReqs:      make(chan envelope, 64),
		presenceReqs: make(chan envelope, 64),
		inbox:        newInbox(),
		conflicts:    conflicts{of: map[membership.NodeID]conflict{}, wake: make(chan struct{}, 1)},
		bind:         netip.AddrPortFrom(cfg.Bind.Unmap(), uint16(cfg.Port)),
		peers:        map[membership.NodeID]*peer{},
		known:        map[netip.AddrPort]time.Time{},
		otherKeys:    map[netip.Addr]time.Time{},
		tries:        map[netip.AddrPort]*attempt{},
		slots:        make(chan struct{}, parallelAttempts),
		missing:      make(chan missing, 1),
	}
	g.queue = newQueue(func() int { return int(g.alive.Load()) + 1 }, broadcastHead+g.MaxBroadcast())
	for _, a := range cfg.LastPeers {
		if a = unmapPort(a); a != g.bind && a.IsValid() && len(g.known) < maxKnown {
			g.known[a] = time.Now()
		}
	}
	meta := cfg.Meta
	meta.ID, meta.Name, meta.Leaving = cfg.ID, cfg.Name, false
	meta.Started, meta.Capabilities = g.born.Unix(), meta.Capabilities|membership.CapTellsRun
	wire, err := g.encodeMeta(meta)
	if err != nil {
		return nil, err
	}
	g.meta, g.metaWire = meta, wire
	return g, nil
}

// encodeMeta also checks that an alive message with this metadata fits one gossip
// packet; otherwise memberlist would silently never send it.
func (g *Gossip) encodeMeta(m membership.Meta) ([]byte, error) {
	wire, err := m.Encode(nil)
	if err != nil {
		return nil, fmt.Errorf("gossip: %w", err)
	}
	const aliveOverhead = 160 // name, address, field names, versions, encryption
	if limit := g.cfg.packetSize() - aliveOverhead; len(wire) > limit {
		return nil, fmt.Errorf("gossip: metadata of %d bytes, an underlay MTU of %d leaves room for %d: name fewer addresses or shorten --node-name", len(wire), g.cfg.MTU, limit)
	}
	return wire, nil
}

// Ready is closed once the node listens.
func (g *Gossip) Ready() <-chan struct{} { return g.ready }

// Run runs gossip until ctx ends, and may be called once. It returns nil after ctx has
// ended, a [CloneError] if another live host has this node's ID, or an error if the
// sockets cannot be opened. A stop is not a leave: the others detect that this node is
// dead, and let it return.
//
// When Run returns, its goroutines have ended, except a probe or an announcement of
// memberlist that is in progress. It cannot be ended, but uses only closed sockets and
// ends by itself within a few seconds.
func (g *Gossip) Run(ctx context.Context) error {
	if !g.started.CompareAndSwap(false, true) {
		return errors.New("gossip: Run was called twice")
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := g.open(g.bind); err != nil {
		return err
	}
	close(g.ready)
	var wg sync.WaitGroup
	wg.Go(func() { g.dispatch(ctx) })
	wg.Go(func() { g.announce(ctx) })
	wg.Go(func() { g.rejoin(ctx) })
	wg.Go(func() { g.callSeeds(ctx) })
	wg.Go(func() { g.askSuspects(ctx) })
	wg.Go(func() { g.repair(ctx) })
	wg.Go(func() { g.answerKeys(ctx) })
	wg.Go(func() { g.answerPresence(ctx) })
	wg.Go(func() { g.investigateConflicts(ctx) })
	var err error
	select {
	case <-ctx.Done():
	case err = <-g.fatal:
	}
	cancel()
	g.close()
	wg.Wait()
	g.attempts.Wait()
	return err
}

func (g *Gossip) fail(err error) {
	select {
	case g.fatal <- err:
	default:
	}
}

// open opens the sockets and creates the memberlist instance on top of them.
func (g *Gossip) open(addr netip.AddrPort) error {
	tr, err := g.listen(addr)
	if err != nil {
		return err
	}
	return g.start(tr)
}

// listen binds the address that the others are told, and that of the other family as far as it can be had.
func (g *Gossip) listen(addr netip.AddrPort) (*transport, error) {
	tr, err := listen(addr, &g.traffic, g.cfg.allow)
	if err != nil {
		return nil, err
	}
	tr.reach, tr.doubt = g.reach(tr), g.doubts
	for _, a := range g.cfg.Also {
		if err := tr.add(a.Unmap()); err != nil {
			g.log.Warn("gossip: not reachable by the other family", "addr", a, "err", err)
		}
	}
	return tr, nil
}

func (g *Gossip) start(tr *transport) error {
	g.life.Lock()
	defer g.life.Unlock()
	return g.startLocked(tr)
}

// startLocked creates a memberlist instance on the transport. On an error it closes the transport.
func (g *Gossip) startLocked(tr *transport) error {
	g.mu.Lock()
	g.gen++
	g.bind = tr.addr
	g.mu.Unlock()
	d := &delegate{g: g, addr: tr.addr}
	conf, err := g.memberlistConfig(tr, d)
	if err != nil {
		tr.shutdown()
		return err
	}
	ml, err := memberlist.Create(conf)
	if err != nil {
		tr.shutdown()
		return fmt.Errorf("gossip: %w", err)
	}
	g.mu.Lock()
	g.net = &network{ml, tr, d}
	g.mu.Unlock()
	return nil
}

func (g *Gossip) close() {
	g.life.Lock()
	defer g.life.Unlock()
	g.mu.Lock()
	n := g.net
	g.net = nil
	g.mu.Unlock()
	if n != nil {
		n.d.closed.Store(true)
		_ = n.ml.Shutdown() // never fails: the transport's Shutdown does not
	}
}

func (g *Gossip) current() (*network, error) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	if g.net == nil {
		return nil, ErrNotRunning
	}
	return g.net, nil
}

// memberlistConfig is that of this node's instance.
func (g *Gossip) memberlistConfig(tr *transport, d *delegate) (*memberlist.Config, error) {
	p := g.cfg.pace
	c := g.commonConfig(tr.addr)
	c.Transport = &packetTransport{transport: tr, packets: make(chan *memberlist.Packet), streams: make(chan net.Conn), dropped: func() { g.count.malformed.Add(1) }}
	// Of an entry that is dead by memberlist's own measure the address is free at once: whether a newcomer
	// is a clone is found out by asking, not by waiting. The default of 0 locks out a node that returns
	// with a new address.
	c.DeadNodeReclaimTime = p.reclaim
	c.HandoffQueueDepth = 4096 // messages that wait for the handler; a burst of news must not be cut short
	c.Delegate, c.Events, c.Alive, c.Merge, c.Conflict, c.Ping = d, d, d, d, d, d
	c.Logger = log.New(&logWriter{g: g}, "", 0)
	if g.cfg.Keyring == nil {
		return c, nil
	}
	err := g.cfg.Keyring.Attach(func(keys [][]byte, primary []byte) (keyring.Live, error) {
		ring, err := memberlist.NewKeyring(keys, primary)
		c.Keyring = ring
		return ring, err
	})
	return c, err
}

// commonConfig is the LAN profile with Tulle's deviations, as far as they matter to whoever speaks for this node from
// that address. The keys are missing.
func (g *Gossip) commonConfig(addr netip.AddrPort) *memberlist.Config {
	p := g.cfg.pace
	c := memberlist.DefaultLANConfig()
	c.Name = g.cfg.ID.String() // node names are not unique
	c.BindAddr, c.BindPort = addr.Addr().String(), int(addr.Port())
	c.AdvertiseAddr, c.AdvertisePort = c.BindAddr, c.BindPort
	c.UDPBufferSize = g.cfg.packetSize()
	c.RetransmitMult = retransmitMult
	c.GossipVerifyIncoming, c.GossipVerifyOutgoing = true, true
	// LZW allocates tens of kilobytes a packet, and encrypted metadata, IDs
	// and prefixes hardly shrink.
	c.EnableCompression = false
	c.RequireNodeNames = false
	c.DelegateProtocolVersion, c.DelegateProtocolMin, c.DelegateProtocolMax = 1, 1, 1
	for _, o := range []struct {
		to *time.Duration
		v  time.Duration
	}{
		{&c.ProbeInterval, p.probeInterval}, {&c.ProbeTimeout, p.probeTimeout},
		{&c.GossipInterval, p.gossipInterval}, {&c.PushPullInterval, p.pushPull},
		{&c.GossipToTheDeadTime, p.gossipToTheDead}, {&c.TCPTimeout, p.stream},
	} {
		if o.v != 0 {
			*o.to = o.v
		}
	}
	if p.suspicionMult != 0 {
		c.SuspicionMult = p.suspicionMult
	}
	return c
}

// sendTo sends one enveloped message over a stream.
func (g *Gossip) sendTo(id membership.NodeID, addr netip.AddrPort, b []byte) error {
	n, err := g.current()
	if err != nil {
		return err
	}
	return n.ml.SendReliable(&memberlist.Node{Name: id.String(), Addr: addr.Addr().AsSlice(), Port: addr.Port()}, b)
}

// packetTransport adapts a transport to memberlist's interface.
type packetTransport struct {
	*transport
	packets chan *memberlist.Packet
	streams chan net.Conn
	dropped func() // a compressed message was
	once    sync.Once
}

var _ memberlist.NodeAwareTransport = (*packetTransport)(nil)

// FinalAdvertiseAddr is the first thing that memberlist calls, and starts the
// readers: they would otherwise run for an instance that is never made.
func (t *packetTransport) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	t.once.Do(func() {
		t.serve(func(b []byte, from net.Addr, at time.Time) {
			if hasCompressed(b) {
				t.dropped()
				return
			}
			select {
			case t.packets <- &memberlist.Packet{Buf: b, From: from, Timestamp: at}:
			case <-t.ctx.Done():
			}
		}, func(c net.Conn) {
			select {
			case t.streams <- t.plain(c):
			case <-t.ctx.Done():
				c.Close()
			}
		})
	})
	return t.addr.Addr().AsSlice(), int(t.addr.Port()), nil
}

func (t *packetTransport) WriteTo(b []byte, addr string) (time.Time, error) { return t.write(b, addr) }
func (t *packetTransport) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	return t.writeTo(b, a.Name, a.Addr)
}
func (t *packetTransport) DialTimeout(addr string, d time.Duration) (net.Conn, error) {
	return t.plainOf(t.dial(addr, d))
}
func (t *packetTransport) DialAddressTimeout(a memberlist.Address, d time.Duration) (net.Conn, error) {
	return t.plainOf(t.dialTo(a.Name, a.Addr, d))
}
func (t *packetTransport) plain(c net.Conn) net.Conn { return &plainConn{Conn: c, dropped: t.dropped} }
func (t *packetTransport) plainOf(c net.Conn, err error) (net.Conn, error) {
	if err != nil {
		return nil, err
	}
	return t.plain(c), nil
}
func (t *packetTransport) PacketCh() <-chan *memberlist.Packet { return t.packets }
func (t *packetTransport) StreamCh() <-chan net.Conn           { return t.streams }
func (t *packetTransport) Shutdown() error                     { t.shutdown(); return nil }

// delegate has the callbacks for memberlist. Its methods copy what they keep, take no
// lock except Gossip.mu, and never wait.
type delegate struct {
	g      *Gossip
	addr   netip.AddrPort
	closed atomic.Bool // the instance is being shut down; ignore its callbacks
}

var (
	_ memberlist.Delegate         = (*delegate)(nil)
	_ memberlist.EventDelegate    = (*delegate)(nil)
	_ memberlist.AliveDelegate    = (*delegate)(nil)
	_ memberlist.MergeDelegate    = (*delegate)(nil)
	_ memberlist.ConflictDelegate = (*delegate)(nil)
	_ memberlist.PingDelegate     = (*delegate)(nil)
)

func (d *delegate) NodeMeta(limit int) []byte {
	d.g.mu.RLock()
	defer d.g.mu.RUnlock()
	return d.g.metaWire // replaced, never changed
}

func (d *delegate) NotifyMsg(b []byte) {
	if !d.closed.Load() {
		d.g.received(b)
	}
}

func (d *delegate) GetBroadcasts(overhead, limit int) [][]byte {
	return d.g.queue.take(overhead, limit)
}

func (d *delegate) LocalState(join bool) []byte { return d.g.localState(d.addr, join) }

func (d *delegate) MergeRemoteState(b []byte, join bool) {
	if !d.closed.Load() {
		d.g.receivedState(b, join)
	}
}

func sighted(n *memberlist.Node) sighting {
	a, _ := netip.AddrFromSlice(n.Addr)
	return sighting{name: n.Name, addr: netip.AddrPortFrom(a.Unmap(), n.Port), meta: n.Meta,
		alive: n.State == memberlist.StateAlive || n.State == memberlist.StateSuspect}
}

func (d *delegate) NotifyJoin(n *memberlist.Node)   { d.event(n, StateAlive) }
func (d *delegate) NotifyUpdate(n *memberlist.Node) { d.event(n, StateAlive) }
func (d *delegate) NotifyLeave(n *memberlist.Node)  { d.event(n, StateDead) }

func (d *delegate) event(n *memberlist.Node, s MemberState) {
	if !d.closed.Load() {
		d.g.memberEvent(sighted(n), s)
	}
}

func (d *delegate) NotifyAlive(n *memberlist.Node) error {
	return d.g.checkAlive(sighted(n), d.addr)
}

func (d *delegate) NotifyMerge(nodes []*memberlist.Node) error {
	list := make([]sighting, len(nodes))
	for i, n := range nodes {
		list[i] = sighted(n)
	}
	return d.g.checkMerge(list, d.addr)
}

func (d *delegate) NotifyConflict(existing, other *memberlist.Node) {
	d.g.sawConflict(sighted(existing), sighted(other))
}

func (d *delegate) AckPayload() []byte { return d.g.digests().encode() }

func (d *delegate) NotifyPingComplete(n *memberlist.Node, rtt time.Duration, payload []byte) {
	if !d.closed.Load() {
		d.g.pinged(n.Name, rtt)
		d.g.compare(n.Name, payload)
	}
}

func (g *Gossip) health() int {
	n, err := g.current()
	if err != nil {
		return 0
	}
	return n.ml.GetHealthScore()
}
