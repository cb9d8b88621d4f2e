package tunnel

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/gopacket/layers"

	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
)

// intruder emits hand-made outer packets toward a node, from any underlay address on its link.
type intruder struct {
	t      testing.TB
	l      testLink
	victim *testNode
	member *testNode  // whose space the marker comes from
	wire   *tap       // at the member's end of the link: sees all that the victim sends
	pods   *tap       // at the victim's TUN: sees all that it delivers
	other  netip.Addr // a second member
	nobody netip.Addr // no member
	serial int
}

func newIntruder(t testing.TB, l testLink) *intruder {
	a, b := startPair(t, l)
	c := Peer{
		ID: "third", Endpoint: underlayOf(l.underlay6, 2), Accept: []netip.Addr{underlayOf(l.underlay6, 2)}, UDPPort: 6080,
		Prefixes: []netip.Prefix{spaceOf(0, 2), spaceOf(1, 2)}, Mode: l.mode, MTU: l.mtu(),
	}
	liar := b.peers[0]
	liar.Accept = append(liar.Accept, b.under) // what a peer says of itself does not make our address its own
	b.update(liar, c)
	return &intruder{
		t: t, l: l, victim: b, member: a, other: c.Endpoint, nobody: underlayOf(l.underlay6, 98),
		wire: a.tap(t, "eth0").toward(b.ns, "eth0"), pods: b.tap(t, "tun0"),
	}
}

// marker makes a good packet of the family pass the whole way, behind everything that the same socket has received before.
func (i *intruder) marker(family int) {
	i.t.Helper()
	i.serial++
	text := fmt.Sprintf("marker %d", i.serial)
	inner := datagram{src: i.member.pod(family), dst: i.victim.pod(family), sport: 1, dport: 9, payload: []byte(text)}.bytes(i.t)
	i.wire.emit(outerPacket(i.t, i.l.mode, i.member.under, i.victim.under, 0, protoOf(family), inner))
	got := i.pods.next(text, carries(text))
	if !bytes.Equal(got, inner) {
		i.t.Fatalf("a good packet arrived changed:\n% x, sent\n% x", got, inner)
	}
}

// silent requires that nothing went to the pods, and nothing but neighbour discovery to the wire, in which the address of
// a stranger does not occur.
func (i *intruder) silent(stranger netip.Addr) {
	i.t.Helper()
	for _, pkt := range i.pods.drain() {
		i.t.Errorf("reached the pod: % x", pkt)
	}
	for _, pkt := range i.wire.drain() {
		if stranger.IsValid() && bytes.Contains(pkt, stranger.AsSlice()) {
			i.t.Errorf("a stranger is answered: % x", pkt)
		}
		src, ok := outerSource(pkt)
		if ok && src == i.victim.under && !(pkt[0]>>4 == 6 && pkt[6] == 58 && pkt[40] >= 133 && pkt[40] <= 136) {
			i.t.Errorf("answered on the wire: % x", pkt)
		}
	}
}

// attack is a bad packet: its inner bytes (or what stands for them), and why it must be dropped when a member sends it.
type attack struct {
	name  string
	drop  encap.Drop
	tos   byte // of the outer header
	other bool // sent by the second member
	inner []byte
	frame []byte            // if not nil, what stands for VXLAN header, Ethernet frame and all
	proto layers.IPProtocol // of the outer IPIP header; 0 means the family's
}

// emit sends it from an underlay address.
func (k attack) emit(i *intruder, from netip.Addr, family int) {
	i.t.Helper()
	if k.frame != nil {
		i.wire.emit(datagram{src: from, dst: i.victim.under, sport: 50123, dport: testVXLANPort, tos: k.tos, payload: k.frame}.bytes(i.t))
		return
	}
	proto := k.proto
	if proto == 0 {
		proto = protoOf(family)
	}
	i.wire.emit(outerPacket(i.t, i.l.mode, from, i.victim.under, k.tos, proto, k.inner))
}

// badFrames are VXLAN frames that must be dropped, with a good packet inside.
func (i *intruder) badFrames(f int, good []byte) (as []attack) {
	edited := func(name string, d encap.Drop, at int, v ...byte) {
		b := framed(macOf(1), macOf(0), etherTypeOf(protoOf(f)), good)
		copy(b[at:], v)
		as = append(as, attack{name: name, drop: d, frame: b})
	}
	edited("VXLAN without a VNI", encap.DropBadEncap, 0, 0)
	edited("a reserved flag of VXLAN", encap.DropBadEncap, 0, 0x48)
	edited("a reserved byte of VXLAN", encap.DropBadEncap, 7, 1)
	edited("another VNI", encap.DropBadEncap, 6, 2)
	edited("another station", encap.DropBadEncap, 13, 99)
	edited("a VLAN tag", encap.DropBadEncap, 20, 0x81, 0)
	edited("an EtherType that announces the other family", encap.DropMalformed, 20, 0x08+0x7e*byte(1-f), 0xdd*byte(1-f))
	as = append(as, attack{name: "half a frame", drop: encap.DropMalformed, frame: framed(macOf(1), macOf(0), 0x800, nil)[:20]})
	return as
}

// attacks are those of one inner family.
func (i *intruder) attacks(f int) (as []attack) {
	t, a, b := i.t, i.member, i.victim
	ok := datagram{src: a.pod(f), dst: b.pod(f), sport: 40000, dport: 9, payload: []byte("do not deliver this")}
	add := func(name string, d encap.Drop, change func(*datagram)) {
		p := ok
		change(&p)
		as = append(as, attack{name: name, drop: d, inner: p.bytes(t)})
	}
	raw := func(name string, d encap.Drop, b []byte) { as = append(as, attack{name: name, drop: d, inner: b}) }
	v4 := f == 0
	good := ok.bytes(t)
	edited := func(change func(b []byte)) []byte {
		b := bytes.Clone(good)
		change(b)
		return b
	}

	switch i.l.mode {
	case encap.VXLAN:
		as = append(as, i.badFrames(f, good)...)
	case encap.UDP:
		proto := byte(protoOf(f))
		raw("GUE with the control bit", encap.DropBadEncap, append([]byte{0x20, proto, 0, 0}, good...))
		raw("GUE with an option", encap.DropBadEncap, append([]byte{0x01, proto, 0, 0, 0, 0, 0, 0}, good...))
		raw("GUE with a flag", encap.DropBadEncap, append([]byte{0x00, proto, 0x80, 0}, good...))
		raw("GUE that carries TCP", encap.DropBadEncap, append([]byte{0x00, 6, 0, 0}, good...))
		raw("GUE variant 2", encap.DropBadEncap, append([]byte{0x80, proto, 0, 0}, good...))
		raw("GUE that announces the other family", encap.DropMalformed, append([]byte{0x00, byte(protoOf(1 - f)), 0, 0}, good...))
		raw("half a GUE header", encap.DropMalformed, []byte{0x00, proto})
	case encap.IPIP:
		as = append(as, attack{name: "the other family's protocol number", drop: encap.DropMalformed, inner: good, proto: protoOf(1 - f)})
	}
	raw("nothing inside", encap.DropMalformed, nil)
	raw("cut in the header", encap.DropMalformed, good[:19])
	raw("cut in the payload", encap.DropMalformed, good[:len(good)-1])
	if v4 {
		raw("IHL 4", encap.DropMalformed, edited(func(b []byte) { b[0] = 0x44 }))
		raw("IHL beyond the packet", encap.DropMalformed, edited(func(b []byte) { b[0] = 0x4f; b[3] = 47 }))
		raw("total length 0", encap.DropMalformed, edited(func(b []byte) { b[2], b[3] = 0, 0 }))
	} else {
		raw("endless extension headers", encap.DropMalformed, edited(func(b []byte) { b[6] = 0; b[40], b[41] = 0, 255 }))
		raw("payload length beyond the packet", encap.DropMalformed, edited(func(b []byte) { b[4] = 0xff }))
	}

	if i.l.underlay6 != v4 { // the underlay has one family
		add("IPv4 in IP toward a member", encap.DropNested, func(d *datagram) { d.dst, d.proto, d.payload = a.under, 4, good })
		add("IPv6 in IP toward ourselves", encap.DropNested, func(d *datagram) { d.dst, d.proto, d.payload = b.under, 41, good })
		add("our port toward a member", encap.DropNested, func(d *datagram) { d.dst, d.dport = a.under, 6080 })
		add("our port toward another member", encap.DropNested, func(d *datagram) { d.dst, d.dport = i.other, 6080 })
		add("VXLAN toward ourselves", encap.DropNested, func(d *datagram) { d.dst, d.dport = b.under, 4789 })
	}
	if !v4 && i.l.underlay6 {
		add("IPv6 behind destination options", encap.DropNested, func(d *datagram) {
			d.dst, d.proto, d.payload = b.under, layers.IPProtocolIPv6Destination, append([]byte{41, 0, 1, 4, 0, 0, 0, 0}, good...)
		})
	}
	raw("TTL 0", encap.DropTTLZero, edited(func(b []byte) {
		if v4 {
			sum := header.UpdateChecksum16(binary.BigEndian.Uint16(b[10:]), uint16(b[8])<<8|uint16(b[9]), uint16(b[9]))
			binary.BigEndian.PutUint16(b[10:], sum)
			b[8] = 0
		} else {
			b[7] = 0
		}
	}))

	invalid := []string{"0.0.0.0", "127.0.0.1", "224.0.0.1", "240.1.2.3", "255.255.255.255"}
	if !v4 {
		invalid = []string{"::", "::1", "ff02::1", "::ffff:10.77.0.5"}
	}
	for _, s := range append(invalid, b.pod(f).String(), b.tun[f].String()) {
		add("source "+s, encap.DropSourceInvalid, func(d *datagram) { d.src = netip.MustParseAddr(s) })
	}
	outside := []string{"192.0.2.7", "10.77.3.5"}
	if !v4 {
		outside = []string{"2001:db8::7", "fd77:0:0:3::5", "fe80::5"}
	}
	for _, s := range append(outside, podOf(f, [2]netip.Prefix{spaceOf(0, 2), spaceOf(1, 2)}).String()) {
		add("source "+s, encap.DropSourceNotSenders, func(d *datagram) { d.src = netip.MustParseAddr(s) })
	}
	if i.l.underlay6 != v4 {
		add("another member's host as source", encap.DropSourceNotSenders, func(d *datagram) { d.src = i.other })
		add("our host as source", encap.DropSourceInvalid, func(d *datagram) { d.src = b.under })
	}
	as = append(as, attack{name: "one member as another", drop: encap.DropSourceNotSenders, other: true, inner: good})
	dsts := []string{a.pod(f).String(), podOf(f, [2]netip.Prefix{spaceOf(0, 2), spaceOf(1, 2)}).String()}
	if v4 {
		dsts = append(dsts, "192.0.2.9", "255.255.255.255", "224.0.0.9", "127.0.0.1")
	} else {
		dsts = append(dsts, "2001:db8::9", "ff02::9", "::1")
	}
	if i.l.underlay6 == v4 {
		dsts = append(dsts, underlayOf(f == 1, 1).String()) // would be ours in the other family
	} else {
		dsts = append(dsts, i.other.String())
		add("its host to our host", encap.DropDestinationNotOurs, func(d *datagram) { d.src, d.dst = a.under, b.under })
	}
	for _, s := range dsts {
		add("destination "+s, encap.DropDestinationNotOurs, func(d *datagram) { d.dst = netip.MustParseAddr(s) })
	}
	as = append(as, attack{name: "Not-ECT in CE", drop: encap.DropECN, tos: 3, inner: good})
	return as
}

// Every reason to drop a packet that arrives: a member's packet moves exactly that counter by one and does not reach the
// pod; the same packet of a stranger moves not_member only, whatever is in it, and nobody answers.
func TestSpoofing(t *testing.T) {
	eachLink(t, func(t *testing.T, l testLink) {
		i := newIntruder(t, l)
		tried := map[encap.Drop]bool{encap.DropNotMember: true}
		for f := range 2 {
			i.marker(f)
			i.wire.drain()
			for _, k := range i.attacks(f) {
				tried[k.drop] = true
				from := i.member.under
				if k.other {
					from = i.other
				}
				t.Run(fmt.Sprintf("inner %s/%s", familyName(f == 1), k.name), func(t *testing.T) {
					i.t, i.wire.t, i.pods.t = t, t, t
					marker := f
					if k.proto != 0 { // it arrives on the other family's socket
						marker = 1 - f
					}
					before := i.victim.counts()
					k.emit(i, from, f)
					i.marker(marker)
					i.victim.moved(t, before, k.drop, 1)
					i.silent(netip.Addr{})

					before = i.victim.counts()
					k.emit(i, i.nobody, f)
					i.marker(marker)
					i.victim.moved(t, before, encap.DropNotMember, 1)
					i.silent(i.nobody)
				})
			}
		}
		for d := encap.DropNotMember; d <= encap.DropECN; d++ {
			if !tried[d] && !(d == encap.DropBadEncap && l.mode == encap.IPIP) { // raw sockets receive nothing else than 4 and 41
				t.Errorf("%v was never provoked", d)
			}
		}
	})
}

// A stranger's good packet is dropped too; the same packet from the member that may send it arrives, as GUE variant 0 as well,
// and whatever trails the inner packet is cut off.
func TestGoodPackets(t *testing.T) {
	eachLink(t, func(t *testing.T, l testLink) {
		i := newIntruder(t, l)
		for f := range 2 {
			good := datagram{src: i.member.pod(f), dst: i.victim.pod(f), sport: 1, dport: 9, payload: []byte("hello")}.bytes(t)
			before := i.victim.counts()
			i.wire.emit(outerPacket(t, l.mode, i.nobody, i.victim.under, 0, protoOf(f), good))
			i.marker(f)
			i.victim.moved(t, before, encap.DropNotMember, 1)
			i.silent(i.nobody)

			bodies := [][]byte{good, append(bytes.Clone(good), "trailing bytes"...)}
			if l.mode == encap.UDP {
				bodies = append(bodies, append([]byte{0, byte(protoOf(f)), 0, 0}, good...))
			}
			before = i.victim.counts()
			for _, body := range bodies {
				i.wire.emit(outerPacket(t, l.mode, i.member.under, i.victim.under, 0, protoOf(f), body))
				if got := i.pods.next("hello", carries("hello")); !bytes.Equal(got, good) {
					t.Errorf("arrived:\n% x, want\n% x", got, good)
				}
			}
			i.victim.moved(t, before, encap.DropNone, 0)
		}
	})
}

// A member's host may answer pods from its underlay address.
func TestHostAsSource(t *testing.T) {
	eachLink(t, func(t *testing.T, l testLink) {
		i := newIntruder(t, l)
		f := map[bool]int{false: 0, true: 1}[l.underlay6]
		good := datagram{src: i.member.under, dst: i.victim.pod(f), sport: 1, dport: 9, payload: []byte("hello")}.bytes(t)
		before := i.victim.counts()
		i.wire.emit(outerPacket(t, l.mode, i.member.under, i.victim.under, 0, protoOf(f), good))
		if got := i.pods.next("hello", carries("hello")); !bytes.Equal(got, good) {
			t.Errorf("arrived:\n% x, want\n% x", got, good)
		}
		i.victim.moved(t, before, encap.DropNone, 0)
	})
}

// The outer UDP checksum may be missing over IPv4, as a Linux gue port sends it.
func TestOuterChecksumZero(t *testing.T) {
	i := newIntruder(t, testLink{mode: encap.UDP})
	inner := datagram{src: i.member.pod(0), dst: i.victim.pod(0), sport: 1, dport: 9, payload: []byte("hello")}.bytes(t)
	pkt := outerPacket(t, encap.UDP, i.member.under, i.victim.under, 0, 0, append([]byte{0, 4, 0, 0}, inner...))
	pkt[26], pkt[27] = 0, 0
	i.wire.emit(pkt)
	if got := i.pods.next("hello", carries("hello")); !bytes.Equal(got, inner) {
		t.Errorf("arrived % x", got)
	}
}

// sendTrain sends packets of one length in one UDP_SEGMENT message, from an underlay address of the member's namespace.
func (i *intruder) sendTrain(from netip.Addr, packets [][]byte) {
	i.t.Helper()
	c := i.member.listenUDP(i.t, netip.AddrPortFrom(from, 0))
	sendGSO(i.t, c, netip.AddrPortFrom(i.victim.under, 6080), len(packets[0]), bytes.Join(packets, nil))
}

// Every check is made on every packet of a train, wherever in it the bad packet is: only that one is dropped.
func TestTrainWithOneBadPacket(t *testing.T) {
	for _, six := range []bool{false, true} {
		l := testLink{mode: encap.UDP, underlay6: six}
		t.Run(l.String(), func(t *testing.T) {
			i := newIntruder(t, l)
			for f := range 2 {
				for _, k := range i.attacks(f) {
					if k.tos != 0 || k.other || len(k.inner) < 20 || k.name == "cut in the payload" {
						continue // all packets of a train have one outer header, and are padded to one length
					}
					for _, at := range []int{0, 2, 4} {
						t.Run(fmt.Sprintf("inner %s/%s at %d", familyName(f == 1), k.name, at), func(t *testing.T) {
							i.t, i.wire.t, i.pods.t = t, t, t
							stats := i.victim.engine.Stats()
							i.marker(f)
							before := i.victim.counts()
							// All have one length, by padding; each good one is of a flow of its own, so that they do not join.
							size := max(len(k.inner), 60)
							var train [][]byte
							for n := range 5 {
								p := k.inner
								if n != at {
									p = datagram{src: i.member.pod(f), dst: i.victim.pod(f), sport: uint16(n), dport: 9, payload: fmt.Appendf(nil, "good %d", n)}.bytes(t)
								}
								train = append(train, append(bytes.Clone(p), make([]byte, size-len(p))...))
							}
							if at == 4 && len(k.inner) < size {
								train[4] = k.inner
							}
							i.sendTrain(i.member.under, train)
							for n := range 5 {
								if n != at {
									i.pods.next(fmt.Sprint("good ", n), carries(fmt.Sprint("good ", n)))
								}
							}
							i.marker(f)
							i.victim.moved(t, before, k.drop, 1)
							i.silent(netip.Addr{})
							// The train and two markers: what was sent really was a train.
							receives := func() uint64 { return i.victim.engine.Stats().RxReceives - stats.RxReceives }
							eventually(t, "the receives are counted", func() bool { return receives() >= 3 })
							if got := receives(); got != 3 {
								t.Errorf("%d receives, want those of the train and two markers", got)
							}
						})
					}
				}
			}
		})
	}
}

// A packet with a member's inner source from an address that is no member's is dropped, and the engine can tell from where it came: NAT does that.
func TestTranslated(t *testing.T) {
	eachLink(t, func(t *testing.T, l testLink) {
		i := newIntruder(t, l)
		from := i.nobody
		for f := range 2 {
			if tr := i.victim.engine.Translated(i.member.ns); tr.From == from {
				t.Fatalf("before anything has come: %+v", tr)
			}
			inner := datagram{src: i.member.pod(f), dst: i.victim.pod(f), sport: 1, dport: 9, payload: []byte("no")}.bytes(t)
			before := i.victim.counts()
			i.wire.emit(outerPacket(t, l.mode, from, i.victim.under, 0, protoOf(f), inner))
			i.victim.moved(t, before, encap.DropNotMember, 1)
			eventually(t, "the engine tells from where", func() bool { return i.victim.engine.Translated(i.member.ns).From == from })
			if tr := i.victim.engine.Translated("third"); !tr.At.IsZero() {
				t.Errorf("of another peer: %+v", tr)
			}
			from = from.Next()
		}
	})
}

// A stranger's train counts as the packets that it is.
func TestTrainOfStranger(t *testing.T) {
	for _, six := range []bool{false, true} {
		l := testLink{mode: encap.UDP, underlay6: six}
		t.Run(l.String(), func(t *testing.T) {
			i := newIntruder(t, l)
			// The sender's own address is a member's to the victim no more.
			peers := append([]Peer(nil), i.victim.peers...)
			peers[0].Accept = []netip.Addr{i.nobody}
			i.victim.update(peers...)
			before := i.victim.counts()
			pkt := datagram{src: i.member.pod(0), dst: i.victim.pod(0), sport: 1, dport: 9, payload: []byte("no")}.bytes(t)
			i.sendTrain(i.member.under, [][]byte{pkt, pkt, pkt, pkt, pkt, pkt, pkt})
			i.victim.moved(t, before, encap.DropNotMember, 7)
			i.silent(netip.Addr{}) // the kernels do look for each other's neighbours
		})
	}
}
