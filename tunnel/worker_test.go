package tunnel

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/tunnel/device"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
	"github.com/tulle-net/tulle/tunnel/offload"
	"github.com/tulle-net/tulle/tunnel/trace"
	"github.com/tulle-net/tulle/tunnel/underlay"
)

// The workers of an engine over memory instead of kernel: what they do per packet, without what the kernel does.

// memQueue is a TUN queue that holds packets, virtio-net headers included: once, or over and over without end.
type memQueue struct {
	packets [][]byte
	next    int
	endless bool
}

func (q *memQueue) Read(b []byte) (int, error) {
	if q.next == len(q.packets) {
		q.next = 0
		if !q.endless {
			return 0, sys.ErrAgain
		}
	}
	q.next++
	return copy(b, q.packets[q.next-1]), nil
}

func (q *memQueue) Wait() (time.Duration, error) { return 0, nil }
func (q *memQueue) Pause(time.Duration)          {}
func (q *memQueue) Wake()                        {}

// memSocket takes everything and keeps nothing; or receives empty datagrams of nobody, without end.
type memSocket struct{ messages atomic.Uint64 }

func (s *memSocket) Send(b *underlay.SendBatch) (underlay.SendResult, error) {
	r := underlay.SendResult{Messages: b.Len(), Sent: b.Len()}
	s.messages.Add(uint64(b.Len()))
	b.Reset()
	return r, nil
}
func (s *memSocket) DrainErrors(func(underlay.Err)) (int, error)                   { return 0, nil }
func (s *memSocket) Recv(*underlay.RecvBatch) (int, error)                         { return udpSlots, nil }
func (s *memSocket) Wait() (time.Duration, error)                                  { return 0, nil }
func (s *memSocket) WaitRecv(*underlay.RecvBatch, int) (int, time.Duration, error) { return 0, 0, nil }
func (s *memSocket) Pause(time.Duration)                                           {}
func (s *memSocket) Wake()                                                         {}
func (s *memSocket) Overflows() uint64                                             { return 0 }
func (s *memSocket) Arrived() (time.Time, error)                                   { return time.Now(), nil }

// memTun is the TUN's writing side.
type memTun struct {
	refuse bool     // GSO
	keep   bool     // what is written
	pkts   [][]byte // without their virtio-net headers
	bytes  int
}

func (m *memTun) Write(iov [][]byte) error {
	var h offload.VnetHdr
	h.Decode(iov[0])
	if m.refuse && h.GSOType != offload.GSONone {
		return device.ErrGSO
	}
	if m.keep {
		m.pkts = append(m.pkts, bytes.Join(iov[1:], nil))
	}
	for _, p := range iov[1:] {
		m.bytes += len(p)
	}
	return nil
}

// Under load a worker is preempted again and again. It goes on where it was.
func TestOneThread(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(runtime.NumCPU() + 4)) // as the agent has: some are idle
	threads := make(map[int]bool)
	err := onOneThread(func() error {
		for began := time.Now(); time.Since(began) < 500*time.Millisecond; {
			threads[unix.Gettid()] = true
		}
		return nil
	})
	if err != nil || len(threads) != 1 {
		t.Errorf("worked on %d threads, error %v; want one thread", len(threads), err)
	}
}

// memRig is an engine without sockets and device: one worker of each direction.
type memRig struct {
	e     *Engine
	tx    *txWorker
	rx    *rxWorker
	queue *memQueue
	sock  *memSocket
	tun   *memTun
	local Local
	peer  Peer
}

func newMemRig(mode encap.Mode) *memRig {
	r := &memRig{queue: &memQueue{}, sock: &memSocket{}, tun: &memTun{}}
	r.local = Local{
		TunAddrs: []netip.Addr{spaceOf(0, 0).Addr(), spaceOf(1, 0).Addr()}, Prefixes: []netip.Prefix{spaceOf(0, 0), spaceOf(1, 0)},
		Underlay: []netip.Addr{underlayOf(false, 0)}, VTEPMAC: macOf(0),
	}
	r.peer = Peer{
		ID: "peer", Endpoint: underlayOf(false, 1), Accept: []netip.Addr{underlayOf(false, 1)}, UDPPort: 6080,
		VXLANPort: testVXLANPort, VTEPMAC: macOf(1),
		Prefixes: []netip.Prefix{spaceOf(0, 1), spaceOf(1, 1)}, Mode: mode, MTU: 1452,
	}
	e := &Engine{cfg: Config{UDPPort: 6080, VXLANPort: testVXLANPort, VNI: testVNI}, copyDSCP: true, states: make(map[string]*peerState), updated: make(chan struct{})}
	r.e = e
	e.Update(r.local, []Peer{r.peer})
	writer := func() *tunWriter { return &tunWriter{w: r.tun, iov: make([][]byte, 0, 2*maxJoined)} }
	r.tx = &txWorker{
		e: e, queue: r.queue, icmp: &icmpWriter{e: e, tun: writer()}, split: offload.NewSplitter(headerArena), arena: make([]byte, arenaSize),
	}
	o := &senderSet{}
	for range defaultSenders {
		o.udp = append(o.udp, &sender{set: o, sock: r.sock, batch: underlay.NewSendBatch(txMessages, txIovecs), gso: true})
	}
	for i := range o.raw {
		o.raw[i] = &sender{set: o, sock: r.sock, batch: underlay.NewSendBatch(txMessages, txIovecs)}
	}
	r.tx.out[0] = o
	r.rx = &rxWorker{
		e: e, sock: r.sock, carrier: overUDP, mode: mode, slots: udpSlots, batch: underlay.NewRecvBatch(udpSlots, 2048), tun: writer(), join: offload.NewJoiner(true, true),
	}
	switch mode {
	case encap.IPIP:
		r.rx.carrier, r.rx.proto = overRaw4, header.ProtoIPv4
	case encap.VXLAN:
		r.rx.carrier, r.rx.replies = overVXLAN, &sender{sock: r.sock, batch: underlay.NewSendBatch(1, 1)}
	}
	return r
}

// transmit lets the sending worker read everything that the queue holds.
func (r *memRig) transmit(t testing.TB) {
	if _, err := r.tx.drain(false); err != nil {
		t.Fatal(err)
	}
}

// receive hands slots to the receiving worker, as one batch of its socket.
func (r *memRig) receive(slots ...underlay.Received) {
	if r.rx.fwd == nil {
		r.rx.fwd = r.e.fwd.Load()
	}
	r.rx.span.Begin(&r.e.tracer) // as drain does
	r.rx.span.To(trace.Receive)
	r.rx.span.To(trace.Decapsulate)
	for _, s := range slots {
		r.rx.span.Received(int(segments(len(s.Data), s.SegmentSize)))
		r.rx.datagram(s)
	}
	r.rx.flush()
	r.rx.span.End()
	r.rx.counts.flush(r.e)
}

// underlayReceived is a datagram from the peer.
func underlayReceived(payload []byte) underlay.Received {
	return underlay.Received{Data: payload, From: netip.AddrPortFrom(underlayOf(false, 1), 50000)}
}

// superPacket is a TCP or UDP super-packet of a flow between two spaces, as a TUN reads it: virtio-net header first.
func superPacket(f, from, to int, tcp bool, seq uint32, payload []byte, segment int) []byte {
	src, dst := podOf(f, spacesOf(from)), podOf(f, spacesOf(to))
	transport, proto := header.UDPLen, uint8(header.ProtoUDP)
	h := offload.VnetHdr{Flags: offload.NeedsCsum, GSOType: offload.GSOUDPL4, GSOSize: uint16(segment), CsumOffset: 6}
	if tcp {
		transport, proto = header.TCPMinLen, header.ProtoTCP
		h.GSOType, h.CsumOffset = []uint8{offload.GSOTCPv4, offload.GSOTCPv6}[f], 16
	}
	if len(payload) <= segment {
		h.GSOType, h.GSOSize = offload.GSONone, 0
	}
	n := transport + len(payload)
	var ip []byte
	if f == 0 {
		ip = header.AppendIPv4(nil, header.IPv4Fields{Src: src, Dst: dst, PayloadLen: n, ID: 7, FlagsFrag: header.IPv4FlagDF, TTL: 63, Proto: proto})
	} else {
		ip = header.AppendIPv6(nil, header.IPv6Fields{Src: src, Dst: dst, PayloadLen: n, HopLimit: 63, NextHeader: proto})
	}
	l4 := make([]byte, transport)
	binary.BigEndian.PutUint16(l4, 40000)
	binary.BigEndian.PutUint16(l4[2:], 9)
	if tcp {
		binary.BigEndian.PutUint32(l4[4:], seq)
		l4[12], l4[13] = 5<<4, 0x10
	} else {
		binary.BigEndian.PutUint16(l4[4:], uint16(n))
	}
	binary.BigEndian.PutUint16(l4[h.CsumOffset:], header.Fold(header.PseudoSum(proto, src.AsSlice(), dst.AsSlice(), uint32(n))))
	h.CsumStart, h.HdrLen = uint16(len(ip)), uint16(len(ip)+transport)
	b := make([]byte, offload.VnetHdrLen)
	h.Encode(b)
	return slices.Concat(b, ip, l4, payload)
}

// segmentsOf cuts a super-packet into its packets.
func segmentsOf(t testing.TB, super []byte) (pkts [][]byte) {
	t.Helper()
	var h offload.VnetHdr
	h.Decode(super)
	pkt := bytes.Clone(super[offload.VnetHdrLen:])
	if h.GSOType == offload.GSONone {
		must(t, offload.CompleteChecksum(pkt, h))
		return [][]byte{pkt}
	}
	segs, err := offload.NewSplitter(headerArena).Split(pkt, h)
	must(t, err)
	for _, s := range segs {
		pkts = append(pkts, slices.Concat(s.Header, s.Payload))
	}
	return pkts
}

// memLoad is a load for benchmarks and for the test of allocations.
type memLoad struct {
	name    string
	mode    encap.Mode
	family  int
	tcp     bool
	payload int // bytes of each super-packet or packet
	segment int
	count   int // packets that one wakeup finds
	flows   int // they belong to this many flows, in turn; 0 means one
}

func memLoads() (ls []memLoad) {
	for _, m := range []encap.Mode{encap.UDP, encap.VXLAN, encap.IPIP} {
		for f := range 2 {
			name := fmt.Sprintf("%s/inner %s/", m, familyName(f == 1))
			ls = append(ls,
				memLoad{name + "TCP 64 KiB", m, f, true, 44 * 1380, 1380, 1, 0},
				memLoad{name + "TCP 64 KiB in 4 flows", m, f, true, 44 * 1380, 1380, 4, 4},
				memLoad{name + "UDP 32×1300 joined", m, f, false, 32 * 1300, 1300, 1, 0},
				memLoad{name + "UDP 64 B", m, f, false, 64, 1300, 64, 0},
				memLoad{name + "UDP 64 B in 8 flows", m, f, false, 64, 1300, 64, 8},
				memLoad{name + "UDP 64 B alone", m, f, false, 64, 1300, 1, 0})
		}
	}
	return ls
}

// supers are the packets of a load between two spaces.
func (l memLoad) supers(from, to int) (ps [][]byte) {
	for i := range l.count {
		p := superPacket(l.family, from, to, l.tcp, uint32(i*l.payload), random(l.payload), l.segment)
		if l.flows > 1 {
			at := offload.VnetHdrLen + []int{20, 40}[l.family]
			binary.BigEndian.PutUint16(p[at:], uint16(40000+i%l.flows))
		}
		ps = append(ps, p)
	}
	return ps
}

// slots are the same packets as they arrive: for udp and vxlan, trains; for ipip, outer packets. refill restores what the worker
// has changed in them.
func (l memLoad) slots(t testing.TB, from, to int) (slots []underlay.Received, refill func()) {
	src := netip.AddrPortFrom(underlayOf(false, from), 50000)
	var fresh [][]byte
	for _, super := range l.supers(from, to) {
		var pkts [][]byte
		for _, p := range segmentsOf(t, super) {
			if l.mode == encap.VXLAN {
				p = framed(macOf(to), macOf(from), encap.EtherType(l.family == 1), p)
			}
			pkts = append(pkts, p)
			if l.mode == encap.IPIP {
				outer := encap.Outer{Src: src, Dst: netip.AddrPortFrom(underlayOf(false, to), 0)}
				o, err := encap.WrapIPIP(nil, &outer, p)
				must(t, err)
				fresh = append(fresh, o)
				slots = append(slots, underlay.Received{Data: make([]byte, len(o)), From: src})
			}
		}
		if l.mode != encap.IPIP {
			train := bytes.Join(pkts, nil)
			if k := len(slots) - 1; l.count > 1 && k >= 0 && len(train) == len(pkts[0]) && len(fresh[k])+len(train) < 60000 {
				// Small packets share a train.
				fresh[k] = append(fresh[k], train...)
				slots[k].Data, slots[k].SegmentSize = make([]byte, len(fresh[k])), len(train)
				continue
			}
			fresh = append(fresh, train)
			s := underlay.Received{Data: make([]byte, len(train)), From: src}
			if len(pkts) > 1 {
				s.SegmentSize = len(pkts[0])
			}
			slots = append(slots, s)
		}
	}
	return slots, func() {
		for i := range slots {
			copy(slots[i].Data, fresh[i])
		}
	}
}

// BenchmarkTx is the way from the TUN's read (a copy in memory here) to the sockets' send (nothing here).
func BenchmarkTx(b *testing.B) {
	for _, l := range memLoads() {
		b.Run(l.name, func(b *testing.B) {
			r := newMemRig(l.mode)
			r.queue.packets = l.supers(0, 1)
			r.transmit(b)
			b.SetBytes(int64(l.count * l.payload))
			b.ReportAllocs()
			for b.Loop() {
				r.transmit(b)
			}
		})
	}
}

// BenchmarkRx is the way from what a socket has received (copied anew each time) to the TUN's write (nothing here).
func BenchmarkRx(b *testing.B) {
	for _, l := range memLoads() {
		b.Run(l.name, func(b *testing.B) {
			r := newMemRig(l.mode)
			if l.mode == encap.IPIP && l.family == 1 {
				r.rx.proto = header.ProtoIPv6
			}
			slots, refill := l.slots(b, 1, 0)
			b.SetBytes(int64(l.count * l.payload))
			b.ReportAllocs()
			for b.Loop() {
				refill()
				r.receive(slots...)
			}
		})
	}
}

// Both directions do the work that the benchmarks claim to measure, and allocate nothing.
func TestWorkersDoNotAllocate(t *testing.T) {
	for _, l := range memLoads() {
		t.Run(l.name, func(t *testing.T) {
			r := newMemRig(l.mode)
			r.queue.packets = l.supers(0, 1)
			if n := testing.AllocsPerRun(20, func() { r.transmit(t) }); n != 0 {
				t.Errorf("sending allocates %v times", n)
			}
			s := r.e.Stats()
			if want := 21 * uint64(l.count) * segments(l.payload, l.segment); s.TxPackets != want {
				t.Errorf("%d packets sent, want %d; drops %v", s.TxPackets, want, s.Drops)
			}

			slots, refill := l.slots(t, 1, 0)
			if n := testing.AllocsPerRun(20, func() { refill(); r.receive(slots...) }); n != 0 {
				t.Errorf("receiving allocates %v times", n)
			}
			s = r.e.Stats()
			if want := uint64(21 * l.count * ((l.payload + l.segment - 1) / l.segment)); s.RxPackets != want {
				t.Errorf("%d packets received, want %d; drops %v", s.RxPackets, want, s.Drops)
			}
			for name, k := range s.Drops {
				if k != 0 {
					t.Errorf("%d dropped: %s", k, name)
				}
			}
		})
	}
}

// What one node counts as sent, the other one counts as received: packets as they travel. And a receive counts if a packet of a pod was in it.
func TestCountersAgree(t *testing.T) {
	for _, mode := range []encap.Mode{encap.UDP, encap.VXLAN, encap.IPIP} {
		for f := range 2 {
			out, in := newMemRig(mode), newMemRig(mode)
			if mode == encap.IPIP && f == 1 {
				in.rx.proto = header.ProtoIPv6
			}
			l := memLoad{mode: mode, family: f, tcp: true, payload: 7*1000 + 1, segment: 1000, count: 1}
			out.queue.packets = l.supers(0, 1)
			out.transmit(t)
			slots, refill := l.slots(t, 1, 0)
			refill()
			bad := underlay.Received{Data: random(10), From: netip.AddrPortFrom(underlayOf(false, 1), 1)}
			in.receive(append(slots, bad, bad)...)
			sent, got := out.e.Stats(), in.e.Stats()
			if sent.TxPackets != 8 || sent.TxPackets != got.RxPackets || sent.TxBytes != got.RxBytes {
				t.Errorf("%s, family %d: %d packets of %d bytes sent, %d of %d received", mode, f, sent.TxPackets, sent.TxBytes, got.RxPackets, got.RxBytes)
			}
			if got.RxReceives != uint64(len(slots)) {
				t.Errorf("%s, family %d: %d receives, want the %d that had pods' packets", mode, f, got.RxReceives, len(slots))
			}
		}
	}
}

// A flood of errors and refusals allocates nothing either.
func TestRefusalsDoNotAllocate(t *testing.T) {
	r := newMemRig(encap.UDP)
	nobody := superPacket(0, 0, 200, false, 0, random(500), 1300)
	long := superPacket(1, 0, 1, false, 0, random(1500), 9000)
	r.queue.packets = [][]byte{nobody, long, nobody[:20], {1, 2}}
	if n := testing.AllocsPerRun(200, func() { r.transmit(t) }); n != 0 {
		t.Errorf("refusing allocates %v times", n)
	}
	good := segmentsOf(t, superPacket(0, 1, 0, false, 0, random(500), 1300))[0]
	foreign := segmentsOf(t, superPacket(0, 2, 0, false, 0, random(500), 1300))[0]
	member, stranger := netip.AddrPortFrom(underlayOf(false, 1), 1), netip.AddrPortFrom(underlayOf(false, 9), 1)
	n := testing.AllocsPerRun(200, func() {
		r.receive(underlay.Received{Data: good, From: stranger}, underlay.Received{Data: foreign, From: member}, underlay.Received{From: member},
			underlay.Received{Data: good, From: member, Truncated: true})
	})
	if n != 0 {
		t.Errorf("dropping allocates %v times", n)
	}
	if s := r.e.Stats(); s.RxPackets != 0 || s.TxPackets != 0 || s.ICMPSent == 0 || s.Drops["too_big"] != 201 || s.Drops["not_member"] != 201 ||
		s.Drops["source_not_senders"] != 201 || s.Drops["malformed"] != 402 || s.Drops["tx_malformed"] != 402 || s.Drops["no_owner"] != 201 {
		t.Errorf("%+v", s)
	}
}

// A queue or a socket that is never empty keeps no worker from seeing new tables, from stopping, nor from sending what it
// holds.
func TestNeverEmpty(t *testing.T) {
	run := func(t *testing.T, r *memRig, drain func() (int, error)) {
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := drain(); err != nil {
				t.Error(err)
			}
		})
		t.Cleanup(func() {
			r.e.stopping.Store(true)
			wg.Wait()
		})
	}
	t.Run("sending", func(t *testing.T) {
		r := newMemRig(encap.UDP)
		r.queue.packets, r.queue.endless = [][]byte{superPacket(0, 0, 1, false, 0, random(64), 1300)}, true
		run(t, r, func() (int, error) { return r.tx.drain(false) })
		eventually(t, "packets are sent", func() bool { return r.e.PeerStats("peer").TxPackets > 0 })
		other := r.peer
		other.ID = "other"
		r.e.Update(r.local, []Peer{other})
		eventually(t, "packets go to the new peer", func() bool { return r.e.PeerStats("other").TxPackets > 0 })
	})
	t.Run("one good packet in a flood of bad ones", func(t *testing.T) {
		r := newMemRig(encap.UDP)
		r.queue.endless = true
		for range 10 {
			r.queue.packets = append(r.queue.packets, []byte("this is not a packet"))
		}
		r.queue.packets[3] = superPacket(0, 0, 1, false, 0, random(64), 1300)
		r.queue.packets = append(r.queue.packets, slices.Repeat(r.queue.packets[:1], 1<<20)...)
		run(t, r, func() (int, error) { return r.tx.drain(false) })
		eventually(t, "the good packet is sent", func() bool { return r.sock.messages.Load() > 0 })
	})
	t.Run("receiving", func(t *testing.T) {
		r := newMemRig(encap.UDP)
		run(t, r, func() (int, error) { return r.rx.drain(0) })
		drops := func(d encap.Drop) uint64 { return r.e.Stats().Drops[d.String()] }
		eventually(t, "datagrams of nobody are dropped", func() bool { return drops(encap.DropNotMember) > 0 })
		r.peer.Accept = append(r.peer.Accept, netip.Addr{}) // the memory's datagrams have no source
		r.e.Update(r.local, []Peer{r.peer})
		eventually(t, "datagrams of a member are dropped as malformed", func() bool { return drops(encap.DropMalformed) > 0 })
	})
}

// A super-packet that the TUN refuses is written as the packets that it was made of, byte for byte.
func TestRefusedSuperPacketIsCut(t *testing.T) {
	for f := range 2 {
		for _, tcp := range []bool{true, false} {
			t.Run(fmt.Sprintf("inner %s, TCP %v", familyName(f == 1), tcp), func(t *testing.T) {
				r := newMemRig(encap.UDP)
				r.tun.refuse, r.tun.keep = true, true
				l := memLoad{mode: encap.UDP, family: f, tcp: tcp, payload: 20*1300 + 77, segment: 1300, count: 1}
				slots, refill := l.slots(t, 1, 0)
				refill()
				want := segmentsOf(t, l.supers(1, 0)[0])
				r.receive(slots...)
				if len(want) != 21 || !slices.EqualFunc(r.tun.pkts, want, bytes.Equal) {
					t.Errorf("%d packets written, not the %d that arrived", len(r.tun.pkts), len(want))
				}
				if s := r.e.Stats(); s.TunFallbacks != 1 || s.Drops["tun_write"] != 0 {
					t.Errorf("%+v", s)
				}
			})
		}
	}
}

// The headers of small segments fill the arena before the packets do: what came before is sent, and the super-packet that found it full goes
// out with the rest, not with the next packets, whose bytes it would carry.
func TestHeaderArenaFull(t *testing.T) {
	const size, count = 40, 64
	r := newMemRig(encap.VXLAN)
	fit := headerArena / ((header.VXLANFrameLen + header.IPv4MinLen + header.UDPLen) * count)
	for i := range fit + 1 {
		p := superPacket(0, 0, 1, false, 0, random(count*size), size)
		binary.BigEndian.PutUint16(p[offload.VnetHdrLen+header.IPv4MinLen:], uint16(40000+i))
		r.queue.packets = append(r.queue.packets, p)
	}
	r.transmit(t)
	if got, want := r.sock.messages.Load(), uint64(len(r.queue.packets)); got != want {
		t.Errorf("%d of %d super-packets are sent", got, want)
	}
	for i, s := range r.tx.out[0].udp {
		if n := s.batch.Len(); n > 0 {
			t.Errorf("sender %d keeps %d of them", i, n)
		}
	}
}
