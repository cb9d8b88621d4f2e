package tunnel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/tunnel/capture"
	"github.com/tulle-net/tulle/tunnel/device"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
	"github.com/tulle-net/tulle/tunnel/mtu"
	"github.com/tulle-net/tulle/tunnel/offload"
	"github.com/tulle-net/tulle/tunnel/trace"
	"github.com/tulle-net/tulle/tunnel/underlay"
)

// Config configures an Engine. The engine owns the device and closes it when Run returns.
type Config struct {
	Device    *device.Device
	Underlay  []netip.Addr // this node's underlay addresses, at most one of each family: sockets are bound to them
	UDPPort   uint16       // of the udp encapsulation, here
	VXLANPort uint16       // of the vxlan encapsulation, here
	VNI       uint32       // of the vxlan encapsulation, 24 bits
	CopyDSCP  bool         // copy the inner DSCP to the outer header; else 0
	Senders   int          // UDP source ports in use at once, of all queues; 0 means defaultSenders
	Kept      []int        // descriptors of receiving sockets that an earlier run has left (Engine.Sockets); New owns them

	// Probed is called for each probe packet from a peer, on a receiving goroutine: it must not block, and payload is
	// valid only during the call. six says that the inner packet is IPv6; size is its length, in bytes.
	Probed func(peer string, mode encap.Mode, six bool, payload []byte, size int)
	// PathMTU is called when a router on the way to a peer, or the kernel of this host, says that outer packets of more than link
	// bytes do not pass, of IPv6 if six. It may come from whoever can send ICMP, already held against the addresses of members; it must not block.
	PathMTU func(peer string, six bool, link mtu.Link)

	Logger *slog.Logger
}

// defaultSenders is how many UDP source ports spread flows over equal-cost paths and NIC queues; each queue of the TUN has
// its share, and minSenders at least.
const (
	defaultSenders = 16
	minSenders     = 4
)

// Engine moves packets. Create it with New, set its tables with Update, and start it with Run.
type Engine struct {
	cfg      Config
	copyDSCP bool
	log      *slog.Logger

	fwd    atomic.Pointer[forwarding]
	mu     sync.Mutex // of Update
	states map[string]*peerState

	drops    [encap.NumDrops]atomic.Uint64
	tap      capture.Tap
	tracer   trace.Tracer
	stats    stats
	updated  chan struct{} // closed by the first Update
	first    sync.Once     // of Update
	running  atomic.Bool   // Run has started the workers
	asked    atomic.Uint64 // questions of Stalled
	stopping atomic.Bool
	closing  sync.Once
	kept     *underlay.Kept // used by New only

	tx     []*txWorker
	rx     []*rxWorker
	socks  []*underlay.Socket // all of them, to close
	out    []*underlay.Socket // those that only send: their error queues are drained by a timer
	prober prober
	relays relays // of the error queues

	sending chan struct{} // has a value where something was sent since the error queues were looked into

	noVXLAN error // why there is no socket for vxlan
}

// New opens the sockets, or takes those that are kept. On an error it closes them; the caller then still owns the device.
func New(cfg Config) (*Engine, error) {
	e := &Engine{
		cfg: cfg, copyDSCP: cfg.CopyDSCP, log: cfg.Logger, states: make(map[string]*peerState), updated: make(chan struct{}), sending: make(chan struct{}, 1),
		kept: underlay.NewKept(cfg.Kept),
	}
	defer e.kept.Close()
	if cfg.Senders <= 0 {
		e.cfg.Senders = defaultSenders
	}
	e.fwd.Store(newForwarding(Local{Underlay: cfg.Underlay}, nil, nil))
	if err := e.open(); err != nil {
		e.closeSockets()
		return nil, err
	}
	return e, nil
}

// open makes the workers and their sockets.
func (e *Engine) open() error {
	queues := e.cfg.Device.Queues()
	if err := e.cfg.Device.Marks(); err != nil {
		e.log.Warn("under load, packets of pods may wait for tens of milliseconds: it cannot be measured, so TCP is not slowed down", "error", err,
			"remedy", "let the agent open packet sockets (RestrictAddressFamilies=AF_PACKET in its unit)")
	}
	for _, q := range queues {
		e.tx = append(e.tx, e.newTxWorker(q))
	}
	e.relays.icmp = &icmpWriter{e: e, tun: newTunWriter(queues[0])}
	for _, a := range e.cfg.Underlay {
		if err := e.openFamily(a); err != nil {
			return err
		}
	}
	return nil
}

// openFamily opens everything that is bound to one underlay address.
func (e *Engine) openFamily(a netip.Addr) error {
	f := family(a)
	if err := e.listen(netip.AddrPortFrom(a, e.cfg.UDPPort), overUDP, encap.UDP); err != nil {
		return err
	}
	if err := e.openVXLAN(a); err != nil {
		return err
	}
	// A second raw socket would get every packet again: they have one, whatever the number of queues.
	raw := [2]*underlay.Socket{}
	for i, proto := range [2]int{header.ProtoIPv4, header.ProtoIPv6} {
		s, err := underlay.ListenRaw(a, proto, underlay.Options{Kept: e.kept})
		if err != nil {
			return err
		}
		c := overRaw4
		if a.Is6() {
			c = overRaw6
		}
		e.receive(s, 0, c, encap.IPIP).proto = uint8(proto)
		raw[i] = s
		e.prober.out[f].raw[i] = &sender{sock: s, batch: underlay.NewSendBatch(1, 1)}
	}
	if a.Is4() {
		for range minSenders {
			s, err := e.openSender(a, true)
			if err != nil {
				return err
			}
			e.prober.bare = append(e.prober.bare, s)
		}
	}
	for _, w := range e.tx {
		o := &senderSet{}
		for range max(minSenders, e.cfg.Senders/len(e.tx)) {
			s, err := e.openSender(a, false)
			if err != nil {
				return err
			}
			o.udp = append(o.udp, o.newSender(w, s.sock, true))
			e.prober.out[f].udp = append(e.prober.out[f].udp, s)
		}
		for i := range raw {
			o.raw[i] = o.newSender(w, raw[i], false)
		}
		w.out[f] = o
	}
	return nil
}

// openVXLAN opens the sockets of vxlan on an underlay address. A port that is taken leaves the engine without: it may be
// that of a VXLAN device of this host's kernel.
func (e *Engine) openVXLAN(a netip.Addr) error {
	if e.cfg.VXLANPort == 0 {
		e.noVXLAN = errors.New("no port is configured for vxlan")
		return nil
	}
	err := e.listen(netip.AddrPortFrom(a, e.cfg.VXLANPort), overVXLAN, encap.VXLAN)
	if errors.Is(err, unix.EADDRINUSE) {
		e.noVXLAN = err
		return nil
	}
	e.prober.out[family(a)].vxlan = err == nil
	return err
}

// listen opens a UDP socket for each queue and gives each a worker.
func (e *Engine) listen(at netip.AddrPort, c carrier, m encap.Mode) error {
	socks, err := e.listenUDP(at, len(e.tx))
	for i, s := range socks {
		w := e.receive(s, i, c, m)
		if c == overVXLAN {
			w.replies = &sender{sock: s, batch: underlay.NewSendBatch(1, 1)}
		}
	}
	if errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("%w: choose another with --%s-port, or see who holds it with `ss -ulnp 'sport = :%d'`", err, m, at.Port())
	}
	return err
}

// listenUDP opens n sockets on one port. The kernel spreads peers' flows over them and keeps each flow on one.
func (e *Engine) listenUDP(at netip.AddrPort, n int) ([]*underlay.Socket, error) {
	if n > 1 && e.kept.Len() == 0 {
		// Sockets that share a port also share it with another process of ours: look whether the port is free first.
		s, err := underlay.ListenUDP(underlay.Options{Bind: at})
		if err != nil {
			return nil, err
		}
		if err := s.Close(); err != nil {
			return nil, err
		}
	}
	var out []*underlay.Socket
	for range n {
		s, err := underlay.ListenUDP(underlay.Options{Bind: at, ReusePort: n > 1, Kept: e.kept})
		if err != nil {
			return out, err
		}
		out = append(out, s)
	}
	return out, nil
}

// Unavailable says why this node can neither send nor receive in an encapsulation; nil if it can.
func (e *Engine) Unavailable(m encap.Mode) error {
	if m == encap.VXLAN {
		return e.noVXLAN
	}
	return nil
}

// openSender opens a socket with a free source port of the range that is a flow hash's, for single messages. A bare one sends without UDP checksums.
func (e *Engine) openSender(a netip.Addr, bare bool) (*sender, error) {
	for tries := 1; ; tries++ {
		port := encap.SourcePort(rand.Uint32())
		s, err := underlay.OpenSender(underlay.Options{Bind: netip.AddrPortFrom(a, port), Bare: bare})
		if errors.Is(err, unix.EADDRINUSE) && tries < 100 {
			continue
		}
		if err != nil {
			return nil, err
		}
		e.socks, e.out = append(e.socks, s), append(e.out, s)
		return &sender{sock: s, batch: underlay.NewSendBatch(1, 1)}, nil
	}
}

const (
	// txMessages and txIovecs are one sender's room: a few super-packets of 47 segments, or 64 single packets.
	txMessages = 64
	txIovecs   = 512
)

func (e *Engine) newTxWorker(q *device.Queue) *txWorker {
	w := &txWorker{
		e:     e,
		queue: q,
		icmp:  &icmpWriter{e: e, tun: newTunWriter(q)},
		split: offload.NewSplitter(headerArena),
		arena: make([]byte, arenaSize),
	}
	if err := e.cfg.Device.Marks(); err == nil {
		w.delay.mark = e.cfg.Device.Mark
	}
	return w
}

// receive adds a worker for a socket that receives, which writes to the TUN's queue of that number.
func (e *Engine) receive(s *underlay.Socket, queue int, c carrier, m encap.Mode) *rxWorker {
	off := e.cfg.Device.Offloads()
	e.socks = append(e.socks, s)
	slots := udpSlots
	if c.raw() {
		slots = rawSlots
	}
	w := &rxWorker{
		e:       e,
		sock:    s,
		carrier: c,
		at:      s.Local(),
		mode:    m,
		batch:   underlay.NewRecvBatch(slots, underlay.MaxMessage),
		slots:   slots,
		tun:     newTunWriter(e.cfg.Device.Queues()[queue]),
		join:    offload.NewJoiner(off.TSO, off.USO),
	}
	e.rx = append(e.rx, w)
	return w
}

// Sockets returns the descriptors of the sockets that receive: those that a later run may take over with Config.Kept. They are
// valid until Run returns.
func (e *Engine) Sockets() []int {
	var fds []int
	for _, s := range e.socks {
		if !slices.Contains(e.out, s) {
			fds = append(fds, s.FD())
		}
	}
	return fds
}

// Run moves packets until ctx is done, then closes the sockets and the device and returns. It may be called once. It begins with
// the first Update: packets that an earlier run has left in the device and in kept sockets wait for the tables.
func (e *Engine) Run(ctx context.Context) error {
	select {
	case <-ctx.Done():
	case <-e.updated:
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	run := func(f func() error) {
		wg.Go(func() {
			if err := f(); err != nil {
				cancel(fmt.Errorf("tunnel: %w", err))
			}
		})
	}
	for _, w := range e.tx {
		run(func() error { return onOneThread(w.run) })
	}
	for _, w := range e.rx {
		run(func() error { return onOneThread(w.run) })
	}
	run(func() error { e.watchErrors(ctx); return nil })
	e.running.Store(true)
	<-ctx.Done()
	e.stopping.Store(true)
	e.wake()
	wg.Wait()
	err := e.Close()
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		return errors.Join(cause, err)
	}
	return err
}

// onOneThread calls f, which never leaves its thread. Go's monitor thread preempts whoever has run for 10 ms, which a worker under load
// always has, and an idle processor then takes the goroutine over: without this, a worker changes its thread, and with it often its
// CPU, up to a hundred times a second.
func onOneThread(f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return f()
}

// Close closes sockets and device of an engine that is not running. Run does so itself. Closing twice is not an error.
func (e *Engine) Close() error {
	var err error
	e.closing.Do(func() {
		e.prober.close()
		err = errors.Join(e.closeSockets(), e.cfg.Device.Close())
	})
	return err
}

func (e *Engine) closeSockets() error {
	var errs []error
	for _, s := range e.socks {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}

// Update replaces all forwarding tables. Peers that remain keep their counters.
func (e *Engine) Update(local Local, peers []Peer) {
	e.mu.Lock()
	defer e.mu.Unlock()
	keep := make(map[string]*peerState, len(peers))
	e.fwd.Store(newForwarding(local, peers, func(id string) *peerState {
		c := e.states[id]
		if c == nil {
			c = new(peerState)
		}
		keep[id] = c
		return c
	}))
	e.states = keep
	e.first.Do(func() { close(e.updated) })
	// Workers load the tables when they wake and with each batch; those that sleep now have nothing looked up in the old ones.
}

// sent accounts for one batch. err is about the socket itself.
func (e *Engine) sent(s outSocket, r underlay.SendResult, err error) {
	e.stats.txSends.Add(uint64(r.Messages))
	e.sends()
	if r.GSOFallbacks > 0 {
		e.stats.gsoFallbacks.Add(uint64(r.GSOFallbacks))
	}
	if r.Dropped > 0 {
		e.stats.noteSendError(r.LastErr) // first: whoever sees the count finds its reason
		e.dropN(encap.DropSendError, uint64(r.Dropped))
	}
	if r.Retried > 0 || r.TooBig > 0 {
		e.drainErrors(s)
	}
	if err != nil {
		e.stats.noteSendError(err)
	}
}
