package tunnel

import (
	"bytes"
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
	"github.com/tulle-net/tulle/tunnel/offload"
	"github.com/tulle-net/tulle/tunnel/trace"
	"github.com/tulle-net/tulle/tunnel/underlay"
)

// carrier is what a receiving socket carries: how its payload becomes an inner packet.
type carrier uint8

const (
	overUDP   carrier = iota // a datagram of the udp encapsulation
	overVXLAN                // a datagram of the vxlan encapsulation
	overRaw4                 // an IPv4 packet with its header: IPv4 raw sockets hand that out
	overRaw6                 // the payload of an IPv6 packet: IPv6 raw sockets keep the header
)

// raw reports a raw socket's packets.
func (c carrier) raw() bool { return c == overRaw4 || c == overRaw6 }

const (
	// udpSlots is few: each takes a train that UDP_GRO joined, and together they should stay in a cache.
	udpSlots = 4
	// rawSlots is many: a raw socket hands out one packet a slot, of which a batch makes one super-packet. A slot still
	// has room for what the kernel's GRO may have joined; the pages behind a small packet are never touched.
	rawSlots = 64
)

// inSocket is the source of an rxWorker: a socket of the underlay, or memory in tests.
type inSocket interface {
	Recv(*underlay.RecvBatch) (int, error)
	Wait() (time.Duration, error)
	WaitRecv(b *underlay.RecvBatch, most int) (int, time.Duration, error)
	Pause(time.Duration)
	Wake()
	errorQueue
	Overflows() uint64
	Arrived() (time.Time, error)
}

var _ inSocket = (*underlay.Socket)(nil)

// rxWorker moves packets from one socket to the TUN. One goroutine owns it and its memory.
type rxWorker struct {
	e       *Engine
	sock    inSocket
	carrier carrier
	proto   uint8          // 4 or 41, of a raw socket
	at      netip.AddrPort // of the socket
	mode    encap.Mode
	batch   *underlay.RecvBatch
	slots   int // of batch
	tun     *tunWriter
	join    *offload.Joiner
	replies *sender // to neighbour discovery, of a vxlan socket
	reply   []byte  // the last one

	fwd *forwarding
	// What the last packets looked up, and in which tables.
	lastOuter netip.Addr
	from      *target
	lastSrc   netip.Addr // an inner source that from may use
	owner     *target    // of the inner source that Ours was asked about
	lastDst   netip.Addr // an inner destination that is ours
	lastFrame lastFrame  // VXLAN and Ethernet headers that passed
	uncut     int        // segment size of the UDP super-packet at hand (isUncut); else 0

	delay socketDelay

	in     header.Inner
	counts batchStats
	span   trace.Span
	sign
}

// run receives until Wake is called on the socket.
func (w *rxWorker) run() error {
	var m moderation
	for {
		n, waited, err := w.wait(m.alone())
		switch {
		case errors.Is(err, sys.ErrWoken):
			if w.e.stopping.Load() {
				return nil
			}
			w.live(w.e)
			continue
		case errors.Is(err, sys.ErrErrQueue):
			w.e.drainErrors(w.sock)
		case err != nil:
			return err
		}
		m.woken(waited)
		n, err = w.drain(n)
		for err == nil && m.pause(n) && !w.e.stopping.Load() {
			w.sock.Pause(pauseTime)
			n, err = w.drain(0)
		}
		if err != nil {
			return err
		}
	}
}

// wait waits for messages. If n of them have been received by the same call, the batch has them. With alone, it does not look for a second one.
func (w *rxWorker) wait(alone bool) (n int, waited time.Duration, err error) {
	if w.e.tracer.On() { // which is to see how long receiving takes
		waited, err = w.sock.Wait()
		return 0, waited, err
	}
	most := w.slots
	if alone {
		most = 1
	}
	n, waited, err = w.sock.WaitRecv(w.batch, most)
	if n > 1 {
		waited = 0 // several were there at once; what it took is receiving them
	}
	return n, waited, err
}

// refresh gives a sign of life, and loads new tables, if there are any.
func (w *rxWorker) refresh() {
	w.live(w.e)
	if f := w.e.fwd.Load(); f != w.fwd {
		w.fwd, w.from = f, nil
		w.lastOuter, w.lastSrc, w.lastDst = netip.Addr{}, netip.Addr{}, netip.Addr{}
		w.lastFrame = lastFrame{}
	}
}

// drain handles the n messages that the batch has already, and receives until the socket is empty. Under full load the socket may never
// be empty: therefore it loads new tables and checks whether to end after each batch. It returns the number of messages.
func (w *rxWorker) drain(n int) (got int, err error) {
	for ; n > 0 || !w.e.stopping.Load(); n = 0 {
		w.refresh()
		w.span.Begin(&w.e.tracer)
		if n == 0 {
			w.span.To(trace.Receive)
			n, err = w.sock.Recv(w.batch)
		}
		w.span.To(trace.Decapsulate)
		if err != nil {
			w.span.End()
			if errors.Is(err, sys.ErrAgain) {
				w.delay.empty()
				return got, nil
			}
			return got, err
		}
		got += n
		if w.span.On() {
			w.span.Received(w.datagrams(n))
		}
		for i := range n {
			w.datagram(w.batch.At(i))
		}
		w.flush()
		w.span.End()
		w.counts.flush(w.e)
		if n < w.slots {
			w.delay.empty()
			return got, nil
		}
		w.delay.busy(w.sock)
	}
	return got, nil
}

// datagrams is how many packets are in the first n slots.
func (w *rxWorker) datagrams(n int) (sum int) {
	for i := range n {
		r := w.batch.At(i)
		sum += int(segments(len(r.Data), r.SegmentSize))
	}
	return sum
}

// datagram handles one receive slot: one packet, or a train that UDP_GRO has joined.
func (w *rxWorker) datagram(r underlay.Received) {
	w.counts.counted = false
	if src := r.From.Addr(); src != w.lastOuter || w.from == nil {
		t, ok := w.fwd.sources[src]
		if !ok {
			// Nothing is ever answered to a non-member, and each of its packets counts.
			w.e.dropN(encap.DropNotMember, segments(len(r.Data), r.SegmentSize))
			if w.e.tap.On() {
				w.from, w.lastOuter = nil, netip.Addr{}
				w.tapReceived(r.From, r.TOS, r.Data, nil, encap.DropNotMember)
			}
			w.stranger(r)
			return
		}
		w.lastOuter, w.from = src, t
		w.lastSrc, w.lastFrame = netip.Addr{}, lastFrame{}
	}
	if r.Truncated {
		w.e.drop(encap.DropMalformed)
		if w.e.tap.On() {
			w.tapReceived(r.From, r.TOS, r.Data, nil, encap.DropMalformed)
		}
		return
	}
	w.uncut = 0
	if r.SegmentSize <= 0 || w.isUncut(r) {
		w.uncut = r.SegmentSize
		w.packet(r.Data, r.From, r.TOS)
		return
	}
	for data := r.Data; len(data) > 0; {
		n := min(r.SegmentSize, len(data))
		w.packet(data[:n:n], r.From, r.TOS)
		data = data[n:]
	}
}

// isUncut reports whether a slot holds a UDP super-packet inside a kernel's tunnel, which no wire has cut, and no train: its first inner packet
// fills it. The segment size is then that of the inner datagrams.
func (w *rxWorker) isUncut(r underlay.Received) bool {
	if !w.from.kernel || len(r.Data) <= r.SegmentSize {
		return false
	}
	inner, d := r.Data, encap.DropNone
	if w.carrier == overVXLAN {
		inner = inner[min(header.VXLANFrameLen, len(inner)):]
	} else {
		inner, d = encap.UnwrapUDP(inner)
	}
	return d == encap.DropNone && header.ParseInner(inner, &w.in) == nil && w.in.Length == len(inner) && w.in.Proto == header.ProtoUDP && !w.in.Fragment
}

// segments is how many packets of size make n bytes.
func segments(n, size int) uint64 {
	if size <= 0 {
		return 1
	}
	return uint64((n + size - 1) / size)
}

// packet decapsulates and checks one outer payload, in the order of docs/wire.md, and delivers its inner packet.
func (w *rxWorker) packet(payload []byte, from netip.AddrPort, tos byte) {
	inner, d, arrived, outerTOS := payload, encap.DropNone, []byte(nil), tos
	if w.e.tap.On() {
		arrived = bytes.Clone(payload) // decapsulation writes to it
	}
	switch w.carrier {
	case overUDP:
		inner, d = encap.UnwrapUDP(payload)
	case overVXLAN:
		if w.lastFrame.again(payload) {
			inner = payload[header.VXLANFrameLen:]
		} else if inner, d = w.frame(payload); inner == nil && d == encap.DropNone {
			return
		}
	case overRaw4:
		inner, tos, d = encap.UnwrapRaw4(payload)
	case overRaw6:
		inner, d = encap.UnwrapRaw6(payload, w.proto)
	}
	if d == encap.DropNone {
		packet := inner
		if inner, d = encap.Validate(inner, &w.in, tos, w); d != encap.DropNone && arrived != nil {
			inner = packet // for the capture
		}
	}
	in := &w.in
	probe := d == encap.DropNone && in.DstPort == ProbePort && in.Proto == header.ProtoUDP && !in.Fragment && w.fwd.isTun(in.Dst)
	var prober netip.Addr // the only one that may send it: a pod does not speak for its node's agent
	if probe {
		if prober = w.from.tunAddrs[family(in.Src)]; prober.IsValid() && prober != in.Src {
			d = encap.DropSourceNotSenders
		}
	}
	if d == encap.DropNone && !probe && w.delay.slow(&w.e.stats, inner, in) {
		first, rest := w.cutFirst(inner)
		if rest == nil {
			d = encap.DropQueueDelay
		} else {
			w.e.drop(encap.DropQueueDelay)
			if arrived != nil {
				outer := arrived[:len(arrived)-len(inner)]
				w.tapReceived(from, outerTOS, slices.Concat(outer, first), first, encap.DropQueueDelay)
				arrived = slices.Concat(outer, rest)
			}
			inner = rest
		}
	}
	if arrived != nil {
		w.tapReceived(from, outerTOS, arrived, inner, d)
	}
	if d != encap.DropNone {
		w.e.drop(d)
		return
	}
	if probe {
		if prober.IsValid() { // else gossip has not told it yet, and nothing can be answered
			w.e.probed(w.from, w.mode, inner, in)
			w.from.state.heard[family(from.Addr().Unmap())].Add(1)
		}
		return
	}
	w.counts.rx(&w.e.stats, w.from, len(inner))
	if arrived != nil {
		w.tapDelivered(inner)
	}
	w.deliver(inner)
}

var _ encap.Validator = (*rxWorker)(nil)

// OwnPort and the methods below implement encap.Validator with the tables, and cache the last addresses that passed.
func (w *rxWorker) OwnPort(port uint16) bool {
	return port == w.e.cfg.UDPPort || port == w.e.cfg.VXLANPort
}

// Underlay reports a member's underlay address, this node's included.
func (w *rxWorker) Underlay(dst netip.Addr) bool {
	_, ok := w.fwd.underlay[dst]
	return ok
}

// Ours reports a source in this node's own space, or this host's underlay address: the TUN device accepts packets from
// the host's own addresses, for the sake of the engine's ICMP errors.
func (w *rxWorker) Ours(src netip.Addr) bool {
	if src == w.lastSrc {
		return false
	}
	w.owner, _ = w.fwd.table.Lookup(src)
	return w.owner != nil && w.owner.local || slices.Contains(w.fwd.own, src)
}

// MaySend reports whether src is in the sending peer's space, or is the peer's host itself: what a host answers to a pod
// that knows it by its underlay address comes from there. Ours was asked just before.
func (w *rxWorker) MaySend(src netip.Addr) bool {
	if src == w.lastSrc {
		return true
	}
	if !w.from.same(w.owner) && !slices.Contains(w.from.underlay, src) {
		return false
	}
	w.lastSrc = src
	return true
}

// Accepts reports whether dst is in this node's own space, or is this host's underlay address and a pod of the sending
// peer asks for it.
func (w *rxWorker) Accepts(dst netip.Addr) bool {
	if dst == w.lastDst {
		return true
	}
	if slices.Contains(w.fwd.probes, dst) {
		return false
	}
	if !w.fwd.isOwn(dst) {
		return slices.Contains(w.fwd.own, dst) && !slices.Contains(w.from.underlay, w.in.Src)
	}
	w.lastDst = dst
	return true
}

// cutFirst cuts the first segment off a packet that the kernel has joined; of another one, there is no rest.
func (w *rxWorker) cutFirst(inner []byte) (first, rest []byte) {
	if h, joined := w.joined(inner); joined {
		return offload.CutFirst(inner, h)
	}
	return inner, nil
}

// joined reports whether a packet has come as a super-packet, or without its checksum.
func (w *rxWorker) joined(inner []byte) (offload.VnetHdr, bool) {
	if !w.carrier.raw() && !w.from.kernel {
		return offload.VnetHdr{}, false
	}
	// The kernel's own GRO may have joined packets of protocol 4 or 41 before the socket saw them. And between virtual
	// machines or containers of one host, what a kernel's tunnel sends arrives uncut, without the inner checksum: a
	// network card would have cut it and written that.
	segment := w.uncut
	if w.carrier.raw() {
		segment = offload.NotTold
	}
	return offload.RawVnetHdr(inner, w.from.mtu, segment)
}

// deliver joins the packet to the previous ones, or writes those and starts a new run.
func (w *rxWorker) deliver(inner []byte) {
	if h, joined := w.joined(inner); joined {
		w.flush()
		w.write(h, inner)
		return
	}
	if w.join.Add(inner) {
		return
	}
	w.flush()
	if !w.join.Add(inner) {
		w.write(offload.VnetHdr{}, inner)
	}
}

// write writes one packet, or one that the kernel has joined.
func (w *rxWorker) write(h offload.VnetHdr, inner []byte) {
	w.counts.writes++
	was := w.span.To(trace.Write)
	w.tun.write(w.e, h, inner)
	w.span.To(was)
}

// flush writes the joined packets.
func (w *rxWorker) flush() {
	if h, parts, ok := w.join.Flush(); ok {
		w.counts.writes++
		was := w.span.To(trace.Write)
		w.tun.writev(w.e, h, parts)
		w.span.To(was)
	}
}
