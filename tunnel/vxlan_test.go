package tunnel

import (
	"bytes"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
)

// frameFrom is the VXLAN frame that an outer packet from a node holds.
func frameFrom(pkt []byte, src netip.Addr) (header.VXLAN, bool) {
	udp, ok := udpOf(pkt)
	if from, _ := outerSource(pkt); !ok || from != src || udp.DstPort != testVXLANPort {
		return nil, false
	}
	v, err := header.ParseVXLAN(udp.Payload)
	return v, err == nil && v.VNI() == testVNI
}

// Whoever asks for an address of this node's space hears this node's MAC: for its tun address and its pods'. Nobody else's
// address is answered for, strangers are not answered, and neither is who only looks whether an address is free.
func TestNeighboursAreAnswered(t *testing.T) {
	for _, six := range []bool{false, true} {
		t.Run("over "+familyName(six), func(t *testing.T) {
			i := newIntruder(t, testLink{mode: encap.VXLAN, underlay6: six})
			asker := header.MAC{2, 9, 8, 7, 6, 5}
			ask := func(from netip.Addr, q header.Solicitation) {
				t.Helper()
				frame := appendQuestion(nil, testVNI, q)
				i.wire.emit(datagram{src: from, dst: i.victim.under, sport: 50123, dport: testVXLANPort, payload: frame}.bytes(t))
			}
			for f := range 2 {
				nobody := []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}[f]
				before := i.victim.counts()
				for _, target := range []netip.Addr{i.victim.tun[f], i.victim.pod(f)} {
					q := header.Solicitation{Sender: i.member.tun[f], Target: target, SenderMAC: asker}
					ask(i.member.under, header.Solicitation{Sender: nobody, Target: target, SenderMAC: asker})
					ask(i.member.under, header.Solicitation{Sender: q.Sender, Target: i.member.pod(f), SenderMAC: asker})
					ask(i.nobody, q)
					ask(i.member.under, q)
					pkt := i.wire.next("an answer", func(pkt []byte) bool { _, ok := frameFrom(pkt, i.victim.under); return ok })
					v, _ := frameFrom(pkt, i.victim.under)
					answer := header.AppendARPReply
					if f == 1 {
						answer = header.AppendNeighborAdvert
					}
					want := answer(nil, q, macOf(1))
					if v.DstMAC() != asker || v.SrcMAC() != macOf(1) || !bytes.Equal(v.Payload(), want) {
						t.Errorf("for %v: % x, want % x", target, v, want)
					}
				}
				i.victim.moved(t, before, encap.DropNotMember, 2)
				i.marker(f)
				for _, pkt := range i.wire.drain() {
					if v, ok := frameFrom(pkt, i.victim.under); ok {
						t.Errorf("one answer too many: % x", v)
					}
				}
				for _, pkt := range i.pods.drain() {
					t.Errorf("reached the pods: % x", pkt)
				}
			}
		})
	}
}

// Frames to all stations that are no question are noise, whatever is in them.
func TestNoiseOfVTEPs(t *testing.T) {
	i := newIntruder(t, testLink{mode: encap.VXLAN})
	noise := func() uint64 { return i.victim.engine.Stats().Drops[encap.DropLocalMulticast.String()] }
	for f := range 2 {
		good := datagram{src: i.member.pod(f), dst: i.victim.pod(f), sport: 1, dport: 9, payload: []byte("hello")}.bytes(t)
		before, counts := noise(), i.victim.counts()
		for _, to := range []header.MAC{header.BroadcastMAC, {0x33, 0x33, 0, 0, 0, 0x16}} {
			frame := framed(to, macOf(0), etherTypeOf(protoOf(f)), good)
			i.wire.emit(datagram{src: i.member.under, dst: i.victim.under, sport: 1, dport: testVXLANPort, payload: frame}.bytes(t))
		}
		i.marker(f)
		i.victim.moved(t, counts, encap.DropNone, 0)
		if n := noise() - before; n < 2 {
			t.Errorf("%d counted", n)
		}
		i.silent(netip.Addr{})
	}
}

// A VTEP whose MAC nobody knows is asked for it, about the packet's destination. As long as it may yet answer, the packets'
// sources hear nothing; then they hear that the host is unreachable.
func TestUnknownVTEP(t *testing.T) {
	r := newMemRig(encap.VXLAN)
	r.peer.VTEPMAC = header.MAC{}
	r.tun.keep = true
	r.e.Update(r.local, []Peer{r.peer})
	state := r.e.fwd.Load().peers["peer"].state
	for f := range 2 {
		state.questions.Store(0)
		r.tun.pkts = nil
		r.queue.packets = [][]byte{superPacket(f, 0, 1, false, 0, random(64), 1300), superPacket(f, 0, 1, true, 0, random(9000), 1300)}
		for n := range askTimes + 2 {
			state.asked.Store(0) // it was long ago
			if n%2 == 1 {        // or the host's clock was set back
				state.asked.Store(time.Now().Add(time.Hour).UnixNano())
			}
			before := r.sock.messages.Load()
			r.transmit(t)
			if sent := r.sock.messages.Load() - before; sent != 1 {
				t.Errorf("%d messages sent after question %d, want one question", sent, n)
			}
			if told := len(r.tun.pkts) > 0; told != (n >= askTimes) {
				t.Errorf("the sources were told %v after %d questions", told, n+1)
			}
		}
	}
	if s := r.e.Stats(); s.Drops["no_path"] != 2*2*(askTimes+2) || s.TxPackets != 0 {
		t.Errorf("%+v", s)
	}
	r.receive(underlayReceived(framed(macOf(0), macOf(1), header.EtherTypeIPv4, segmentsOf(t, superPacket(0, 1, 0, false, 0, random(9), 1300))[0])))
	if mac, ok := r.e.VTEPMAC("peer"); !ok || mac != macOf(1) {
		t.Errorf("learned %v, %v", mac, ok)
	}
	r.transmit(t)
	if s := r.e.Stats(); s.TxPackets != 1+7 { // one is a super-packet
		t.Errorf("%d packets sent to a VTEP that is known", s.TxPackets)
	}
	// A group's address is no VTEP's.
	r.receive(underlayReceived(framed(macOf(0), header.MAC{1, 2, 3, 4, 5, 6}, header.EtherTypeIPv4, []byte{0x45})))
	if mac, _ := r.e.VTEPMAC("peer"); mac != macOf(1) {
		t.Errorf("learned %v", mac)
	}
}

// A host whose kernel has the port of vxlan for itself runs without vxlan, and says who has it.
func TestVXLANPortIsTaken(t *testing.T) {
	l := testLink{mode: encap.UDP}
	a, _ := startPair(t, l)
	if err := a.engine.Unavailable(encap.VXLAN); err != nil {
		t.Fatal(err)
	}
	taken := a.listenUDP(t, netip.AddrPortFrom(a.under, 4790))
	e := &Engine{cfg: Config{VXLANPort: 4790}, tx: make([]*txWorker, 1)}
	var err error
	must(t, a.in(func() error { err = e.openVXLAN(a.under); return nil }))
	if lacks := e.Unavailable(encap.VXLAN); err != nil || !errors.Is(lacks, unix.EADDRINUSE) || !strings.Contains(lacks.Error(), "--vxlan-port") ||
		!strings.Contains(lacks.Error(), "ss -ulnp") {
		t.Errorf("%v, %v", err, lacks)
	}
	if e.Unavailable(encap.UDP) != nil || len(e.rx) != 0 {
		t.Errorf("%d workers", len(e.rx))
	}
	taken.Close()
}
