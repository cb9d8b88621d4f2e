package tunnel

import (
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/tunnel/capture"
	"github.com/tulle-net/tulle/tunnel/device"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
	"github.com/tulle-net/tulle/tunnel/offload"
	"github.com/tulle-net/tulle/tunnel/trace"
	"github.com/tulle-net/tulle/tunnel/underlay"
)

const (
	// maxRead is the largest answer of one TUN read: a virtio-net header and a 64 KiB super-packet.
	maxRead = offload.VnetHdrLen + 65535
	// arenaSize holds what one worker has read and not yet sent: a few super-packets, or some thousand small packets.
	// Its size is near that of an L2 cache on purpose.
	arenaSize = 4 * (maxRead + 64)
	// headRoom is in front of every packet in the arena, for what an encapsulation puts there behind the kernel's headers.
	// The virtio-net header, which is done with by then, is a part of it.
	headRoom = header.VXLANFrameLen
	spare    = headRoom - offload.VnetHdrLen
	// headerArena holds the headers that the splitter wrote for the super-packets in the arena.
	headerArena = 128 << 10
	// maxReads limits the reads of a worker before it sends, in case most packets were refused.
	maxReads = 1024
	// smallRead is the largest answer of a read that is one packet of a common size, in bytes.
	smallRead = offload.VnetHdrLen + 1500
	// maxSegments is the most segments that one UDP_SEGMENT send may have (UDP_MAX_SEGMENTS of older kernels).
	maxSegments = 64
	// maxGSOBytes is the most bytes of UDP payload that one UDP_SEGMENT send may have: what an IPv4 datagram holds.
	maxGSOBytes = 65507
)

// tunQueue is the source of a txWorker: a queue of the TUN, or memory in tests.
type tunQueue interface {
	Read([]byte) (int, error)
	Wait() (time.Duration, error)
	Pause(time.Duration)
	Wake()
}

// outSocket is the output of a sender: a socket of the underlay, or memory in tests.
type outSocket interface {
	Send(*underlay.SendBatch) (underlay.SendResult, error)
	errorQueue
}

// errorQueue has the ICMP errors about packets that a socket sent.
type errorQueue interface {
	DrainErrors(func(underlay.Err)) (int, error)
}

var (
	_ tunQueue  = (*device.Queue)(nil)
	_ outSocket = (*underlay.Socket)(nil)
)

// txWorker moves packets from one queue of the TUN to the underlay. It reads until the queue is empty, then sends
// everything; there is no timer. One goroutine owns it and its memory.
type txWorker struct {
	e     *Engine
	queue tunQueue
	icmp  *icmpWriter
	split *offload.Splitter
	out   [2]*senderSet // by the outer family, IPv4 first; nil where this node has no underlay address of it

	arena []byte
	used  int // of arena, by packets not yet sent

	// What the last packet looked up, and in which tables.
	fwd     *forwarding
	lastDst netip.Addr
	last    *target
	toHost  bool // lastDst is an underlay address of last

	delay queueDelay

	vnet   offload.VnetHdr
	in     header.Inner
	prefix [header.VXLANFrameLen]byte // of the present packet
	counts batchStats
	span   trace.Span
	sign
}

// run reads and sends until Wake is called on the queue.
func (w *txWorker) run() error {
	var m moderation
	for {
		waited, err := w.queue.Wait()
		switch {
		case errors.Is(err, sys.ErrWoken):
			if w.e.stopping.Load() {
				return nil
			}
			w.live(w.e)
			continue
		case err != nil:
			return err
		}
		m.woken(waited)
		n, err := w.drain(m.alone())
		for err == nil && m.pause(n) && !w.e.stopping.Load() {
			w.queue.Pause(pauseTime)
			n, err = w.drain(false)
		}
		if err != nil {
			return err
		}
	}
}

// refresh gives a sign of life, and loads new tables, if there are any.
func (w *txWorker) refresh() {
	w.live(w.e)
	if f := w.e.fwd.Load(); f != w.fwd {
		w.fwd, w.last, w.lastDst = f, nil, netip.Addr{}
	}
}

// drain reads until the queue is empty and sends what it read. Under full load the queue may never be empty: therefore it
// also sends, loads new tables and checks whether to end whenever the arena is full, or after maxReads. It returns the
// number of reads that returned a packet. With alone, it does not look for a second packet if the first is a small one.
func (w *txWorker) drain(alone bool) (got int, err error) {
	w.refresh()
	w.span.Begin(&w.e.tracer)
	for reads := 1; ; reads++ {
		w.span.To(trace.Read)
		n, err := w.queue.Read(w.arena[w.used+spare : w.used+spare+maxRead])
		if err != nil {
			w.delay.empty()
			w.flush()
			w.span.End()
			if errors.Is(err, sys.ErrAgain) {
				return got, nil
			}
			return got, err
		}
		got++
		w.read(w.arena[w.used : w.used+spare+n])
		if alone && n <= smallRead {
			w.flush()
			w.span.End()
			return got, nil
		}
		alone = false
		if w.used+spare+maxRead > len(w.arena) || reads == maxReads {
			w.flush()
			w.span.End()
			if w.e.stopping.Load() {
				return got, nil
			}
			w.refresh()
			w.delay.busy()
			w.span.Begin(&w.e.tracer)
			reads = 0
		}
	}
}

// read takes what one read of the queue gave: buf is the arena's, just behind what is used, and begins with the spare
// part of the head room.
func (w *txWorker) read(buf []byte) {
	w.span.To(trace.Lookup)
	if w.vnet.Decode(buf[spare:]) != nil {
		w.drop(nil, nil, encap.DropTxMalformed)
		return
	}
	if w.packet(buf, w.vnet) {
		w.used += len(buf)
	}
}

// packet handles one packet or super-packet from the TUN, which is in buf after the head room. It reports whether buf stays
// referenced until the next flush.
func (w *txWorker) packet(buf []byte, h offload.VnetHdr) bool {
	pkt := buf[headRoom:]
	if isMark(pkt) {
		w.markRead(pkt)
		return false
	}
	if err := header.ParseInner(pkt, &w.in); err != nil {
		w.drop(pkt, nil, encap.DropTxMalformed)
		return false
	}
	in := &w.in
	pkt = pkt[:in.Length]
	t, d := w.lookup(in)
	if d != encap.DropNone {
		w.refuse(pkt, t, d)
		return false
	}
	size, segmented := len(pkt), h.GSOType != offload.GSONone
	if segmented {
		size = min(size, segmentLen(pkt, in, h))
	}
	if size > t.mtu {
		w.drop(pkt, t, encap.DropTooBig)
		w.icmp.answer(w.fwd, pkt, header.TooBig, t.mtu)
		return false
	}
	late := w.delay.slow(&w.e.stats, pkt, in)
	if late && !segmented {
		w.drop(pkt, t, encap.DropQueueDelay)
		return false
	}
	w.span.To(trace.Encapsulate)
	o := w.out[outer(t.six)]
	if o == nil {
		w.refuse(pkt, t, encap.DropNoEncapSocket)
		return false
	}
	tos := encap.OuterTOS(in.TOS, w.e.copyDSCP)
	s, dest := o.sender(t, in, pkt)
	if s == nil {
		w.refuse(pkt, t, encap.DropNoPath)
		return false
	}
	var prefix []byte // what the encapsulation puts between the kernel's headers and the packet
	if t.mode == encap.VXLAN {
		mac, ok := t.vtep()
		if !ok {
			w.resolve(t, in, s, pkt)
			return false
		}
		prefix = header.AppendVXLAN(w.prefix[:0], w.e.cfg.VNI, mac, w.fwd.mac, encap.EtherType(in.Version == 6))
	}
	tap := w.e.tap.On()
	if tap {
		w.e.tap.Offer(tapped(capture.FromPods, t, encap.DropNone, pkt))
	}
	if segmented {
		return w.segments(t, s, dest, prefix, pkt, h, tos, late)
	}
	if err := offload.CompleteChecksum(pkt, h); err != nil {
		w.drop(pkt, t, encap.DropTxMalformed)
		return false
	}
	w.counts.tx(&w.e.stats, t, 1, len(pkt))
	header.ClampMSS(pkt, in, t.mtu)
	if tap {
		w.tapSegments(t, s, dest, tos, prefix, pkt, nil)
	}
	front := headRoom - len(prefix)
	copy(buf[front:], prefix)
	s.packet(w, dest, buf[front:headRoom+len(pkt)], tos)
	return true
}

// segments sends the segments of a super-packet, each with prefix in front; without the first one if the packet is late.
func (w *txWorker) segments(t *target, s *sender, to *underlay.Dest, prefix, pkt []byte, h offload.VnetHdr, tos byte, late bool) bool {
	segs, err := w.split.SplitBehind(prefix, pkt, h)
	if errors.Is(err, offload.ErrArenaFull) {
		// The headers of earlier super-packets fill the arena: send those, keep this one.
		w.send()
		segs, err = w.split.SplitBehind(prefix, pkt, h)
	}
	if err != nil {
		w.drop(pkt, t, encap.DropTxMalformed)
		return false
	}
	headers := len(segs[0].Header) - len(prefix) // in each segment
	bytes := len(pkt) + (len(segs)-1)*headers
	if late {
		first := segs[0]
		w.drop(slices.Concat(first.Header[len(prefix):], first.Payload), t, encap.DropQueueDelay)
		if segs = segs[1:]; len(segs) == 0 {
			return false
		}
		bytes -= headers + len(first.Payload)
	}
	w.counts.tx(&w.e.stats, t, len(segs), bytes)
	if w.e.tap.On() {
		w.tapSegments(t, s, to, tos, prefix, pkt, segs)
	}
	s.segments(w, to, segs, tos)
	return true
}

// segmentLen returns the length of the segments of a super-packet, in bytes. It reads the transport header, because the kernel
// does not always set hdr_len in the virtio-net header.
func segmentLen(pkt []byte, in *header.Inner, h offload.VnetHdr) int {
	transport := header.UDPLen
	if in.Proto == header.ProtoTCP && len(pkt) > in.HeaderLen+12 {
		transport = int(pkt[in.HeaderLen+12]>>4) * 4
	}
	return in.HeaderLen + transport + int(h.GSOSize)
}

// lookup finds the peer that a packet is for, and the reason to drop it if there is one. Beside pods, our pods reach members' hosts by their
// underlay addresses (the host routes those packets here); nobody else does: the tunnel's own packets would go in circles.
func (w *txWorker) lookup(in *header.Inner) (*target, encap.Drop) {
	dst := in.Dst
	t := w.last
	if dst != w.lastDst || t == nil {
		// The kernel itself sends link-local and multicast packets (router solicitations, MLD): drop them without an ICMP error.
		if dst.IsMulticast() || dst.IsLinkLocalUnicast() || dst == broadcast4 {
			return nil, encap.DropLocalMulticast
		}
		var pod, host bool
		if t, pod = w.fwd.table.Lookup(dst); !pod {
			if t, host = w.fwd.sources[dst]; !host {
				return nil, encap.DropNoOwner
			}
		}
		w.last, w.lastDst, w.toHost = t, dst, host
	}
	switch {
	case in.TTL == 0:
		return nil, encap.DropTxTTLZero
	case t.local, t.endpoint == in.Src, t.endpoint == dst && !w.toHost, w.toHost && !w.fwd.isOwn(in.Src):
		return nil, encap.DropLoop
	case t.unreachable:
		return t, encap.DropPeerDown
	case !t.endpoint.IsValid():
		return t, encap.DropNoPath
	}
	return t, encap.DropNone
}

var broadcast4 = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// refuse counts a packet as dropped, as drop does, and sends an ICMP error to its source.
func (w *txWorker) refuse(pkt []byte, t *target, d encap.Drop) {
	w.drop(pkt, t, d)
	switch d {
	case encap.DropNoOwner:
		w.icmp.answer(w.fwd, pkt, header.NetUnreachable, 0)
	case encap.DropPeerDown, encap.DropNoPath, encap.DropNoEncapSocket:
		w.icmp.answer(w.fwd, pkt, header.HostUnreachable, 0)
	}
}

// flush sends everything and empties the arena.
func (w *txWorker) flush() {
	w.send()
	w.used = 0
}

// send sends everything; the arena's packets are no longer referenced.
func (w *txWorker) send() {
	w.span.To(trace.Encapsulate)
	for _, o := range w.out {
		if o == nil {
			continue
		}
		for _, s := range o.dirty {
			s.flush(w)
			s.dirty = false
		}
		o.dirty = o.dirty[:0]
	}
	w.split.Reset()
	w.counts.flush(w.e)
}

// outer is the index of the outer family.
func outer(six bool) int {
	if six {
		return 1
	}
	return 0
}
