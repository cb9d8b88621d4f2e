package encap

import (
	"bytes"
	"net"
	"net/netip"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"

	"github.com/tulle-net/tulle/tunnel/header"
)

// tables is a Validator of a node that owns 10.244.2.0/24 and fd00:244:2::/48,
// about packets from the owner of 10.244.1.0/24 and fd00:244:1::/48.
type tables struct{}

var (
	_ Validator = tables{}

	underlay = map[string]bool{"192.0.2.1": true, "198.51.100.2": true, "2001:db8:1::1": true, "2001:db8:2::2": true}
	senders  = [2]netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:244:1::/48")}
	ours     = [2]netip.Prefix{netip.MustParsePrefix("10.244.2.0/24"), netip.MustParsePrefix("fd00:244:2::/48")}
)

func (tables) OwnPort(port uint16) bool     { return port == 6080 || port == 4789 }
func (tables) Underlay(dst netip.Addr) bool { return underlay[dst.String()] }
func (tables) Ours(src netip.Addr) bool     { return in(ours, src) }
func (tables) MaySend(src netip.Addr) bool  { return in(senders, src) }
func (tables) Accepts(dst netip.Addr) bool  { return in(ours, dst) }

func in(p [2]netip.Prefix, a netip.Addr) bool { return p[0].Contains(a) || p[1].Contains(a) }

// packet is a UDP packet made by gopacket. Its fields may be broken by edit.
type packet struct {
	src, dst string
	port     uint16
	ttl, tos uint8
	proto    layers.IPProtocol
	edit     func(b []byte) []byte
}

func (p packet) bytes(t testing.TB) []byte {
	t.Helper()
	src, dst := netip.MustParseAddr(p.src), netip.MustParseAddr(p.dst)
	udp := &layers.UDP{SrcPort: 40000, DstPort: layers.UDPPort(p.port)}
	var ip gopacket.NetworkLayer
	var first gopacket.SerializableLayer
	if dst.Is4() {
		l := &layers.IPv4{Version: 4, TTL: p.ttl, TOS: p.tos, Protocol: p.proto, SrcIP: net.IP(src.AsSlice()), DstIP: net.IP(dst.AsSlice())}
		ip, first = l, l
	} else {
		s, d := src.As16(), dst.As16()
		l := &layers.IPv6{Version: 6, HopLimit: p.ttl, TrafficClass: p.tos, NextHeader: p.proto, SrcIP: s[:], DstIP: d[:]}
		ip, first = l, l
	}
	if err := udp.SetNetworkLayerForChecksum(ip); err != nil {
		t.Fatal(err)
	}
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true},
		first, udp, gopacket.Payload("payload")); err != nil {
		t.Fatal(err)
	}
	b := buf.Bytes()
	if p.edit != nil {
		b = p.edit(b)
	}
	return b
}

func good(v6 bool) packet {
	p := packet{src: "10.244.1.2", dst: "10.244.2.3", port: 7, ttl: 63, proto: layers.IPProtocolUDP}
	if v6 {
		p.src, p.dst = "fd00:244:1::2", "fd00:244:2::3"
	}
	return p
}

const ce = header.ECNCE

// The checks in wire.md's order. Each case also fails every later check that it can
// fail at the same time, to show that the first one counts.
func TestValidateDropReasons(t *testing.T) {
	type test struct {
		name  string
		p     packet
		outer byte
		want  Drop
	}
	both := func(name string, want Drop, outer byte, f func(p *packet, v6 bool)) []test {
		var tests []test
		for _, v6 := range []bool{false, true} {
			p := good(v6)
			f(&p, v6)
			tests = append(tests, test{name + map[bool]string{false: ", v4", true: ", v6"}[v6], p, outer, want})
		}
		return tests
	}
	pick := func(v6 bool, four, six string) string {
		if v6 {
			return six
		}
		return four
	}
	stranger := func(p *packet, v6 bool) {
		p.src, p.dst = pick(v6, "10.244.9.9", "fd00:244:9::9"), pick(v6, "10.9.9.9", "fd00:9::9")
	}
	var tests []test
	add := func(more []test) { tests = append(tests, more...) }

	add(both("good", DropNone, 0, func(*packet, bool) {}))
	add(both("good, CE in CE", DropNone, ce, func(p *packet, _ bool) { p.tos = ce }))
	add(both("good, padded", DropNone, 0, func(p *packet, _ bool) {
		p.edit = func(b []byte) []byte { return append(b, "padding"...) }
	}))

	add(both("malformed: cut, and all else wrong", DropMalformed, ce, func(p *packet, v6 bool) {
		stranger(p, v6)
		p.ttl, p.proto = 0, layers.IPProtocolIPv4
		p.edit = func(b []byte) []byte { return b[:len(b)-1] }
	}))
	add(both("malformed: version", DropMalformed, 0, func(p *packet, _ bool) {
		p.edit = func(b []byte) []byte { b[0] = 0x75; return b }
	}))
	add(both("malformed: empty", DropMalformed, 0, func(p *packet, _ bool) {
		p.edit = func([]byte) []byte { return nil }
	}))
	tests = append(tests, test{"malformed: IHL", func() packet {
		p := good(false)
		p.edit = func(b []byte) []byte { b[0] = 0x44; return b }
		return p
	}(), 0, DropMalformed})

	add(both("nested: IPv4 toward an underlay address, and all else wrong", DropNested, ce, func(p *packet, v6 bool) {
		stranger(p, v6)
		p.dst, p.ttl, p.proto = pick(v6, "192.0.2.1", "2001:db8:1::1"), 0, layers.IPProtocolIPv4
	}))
	add(both("nested: IPv6 toward an underlay address", DropNested, 0, func(p *packet, v6 bool) {
		p.dst, p.proto = pick(v6, "198.51.100.2", "2001:db8:2::2"), layers.IPProtocolIPv6
	}))
	add(both("not nested: IPv4 in IP between pods", DropNone, 0, func(p *packet, _ bool) { p.proto = layers.IPProtocolIPv4 }))
	add(both("not nested: IPv6 in IP between pods", DropNone, 0, func(p *packet, _ bool) { p.proto = layers.IPProtocolIPv6 }))
	add(both("nested: UDP tunnel to an underlay address, and all else wrong", DropNested, ce, func(p *packet, v6 bool) {
		p.src, p.dst, p.port, p.ttl = pick(v6, "127.0.0.1", "::1"), pick(v6, "192.0.2.1", "2001:db8:1::1"), 6080, 0
	}))
	add(both("nested: VXLAN to an underlay address", DropNested, 0, func(p *packet, v6 bool) {
		p.dst, p.port = pick(v6, "198.51.100.2", "2001:db8:2::2"), 4789
	}))
	add(both("not nested: our port toward a pod", DropNone, 0, func(p *packet, _ bool) { p.port = 6080 }))
	add(both("not nested: another port of an underlay address", DropDestinationNotOurs, 0, func(p *packet, v6 bool) {
		p.dst = pick(v6, "192.0.2.1", "2001:db8:1::1")
	}))

	add(both("TTL zero, and all else wrong", DropTTLZero, ce, func(p *packet, v6 bool) { stranger(p, v6); p.ttl = 0 }))
	add(both("TTL one is fine", DropNone, 0, func(p *packet, _ bool) { p.ttl = 1 }))

	for _, s := range []struct{ name, four, six string }{
		{"multicast", "224.0.0.5", "ff02::5"}, {"loopback", "127.0.0.1", "::1"}, {"unspecified", "0.0.0.0", "::"},
		{"ours", "10.244.2.9", "fd00:244:2::9"}, {"broadcast or mapped", "255.255.255.255", "::ffff:10.244.1.2"},
	} {
		add(both("source "+s.name+", and all else wrong", DropSourceInvalid, ce, func(p *packet, v6 bool) {
			stranger(p, v6)
			p.src = pick(v6, s.four, s.six)
		}))
	}
	add(both("source of another member, and all else wrong", DropSourceNotSenders, ce, stranger))
	add(both("destination elsewhere, and drop cell", DropDestinationNotOurs, ce, func(p *packet, v6 bool) {
		p.dst = pick(v6, "10.244.9.9", "fd00:244:9::9")
	}))
	add(both("destination multicast", DropDestinationNotOurs, 0, func(p *packet, v6 bool) { p.dst = pick(v6, "239.1.1.1", "ff0e::1") }))
	add(both("Not-ECT in CE", DropECN, ce, func(*packet, bool) {}))

	seen := map[Drop]bool{}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := tt.p.bytes(t)
			before := bytes.Clone(b)
			var in header.Inner
			pkt, d := Validate(b, &in, tt.outer, tables{})
			if d != tt.want {
				t.Fatalf("%v, want %v", d, tt.want)
			}
			seen[d] = true
			if !bytes.Equal(b, before) {
				t.Error("packet changed")
			}
			if d == DropNone && (len(pkt) != in.Length || cap(pkt) != len(pkt) || &pkt[0] != &b[0]) {
				t.Errorf("%d bytes of %d", len(pkt), in.Length)
			}
			if d != DropNone && pkt != nil {
				t.Error("a dropped packet was returned")
			}
		})
	}
	for d := DropMalformed; d <= DropECN; d++ {
		if !seen[d] {
			t.Errorf("no case for %v", d)
		}
	}
}

// A tunnel in the tunnel cannot hide behind IPv6 extension headers or fragments.
func TestNestedHidden(t *testing.T) {
	src, dst := netip.MustParseAddr("fd00:244:1::2"), netip.MustParseAddr("2001:db8:2::2")
	build := func(next uint8, payload []byte) []byte {
		return append(header.AppendIPv6(nil, header.IPv6Fields{Src: src, Dst: dst, PayloadLen: len(payload), HopLimit: 9, NextHeader: next}), payload...)
	}
	inside := make([]byte, 48)
	for name, b := range map[string][]byte{
		"options":        build(header.ProtoDestOpts, append([]byte{header.ProtoIPv4, 0, 1, 4, 0, 0, 0, 0}, inside...)),
		"first fragment": build(header.ProtoFragment, append(header.AppendIPv6Fragment(nil, header.ProtoIPv6, 0, true, 1), inside...)),
		"later fragment": build(header.ProtoFragment, append(header.AppendIPv6Fragment(nil, header.ProtoIPv6, 8, false, 1), inside...)),
	} {
		if _, d := Validate(b, new(header.Inner), 0, tables{}); d != DropNested {
			t.Errorf("%s: %v", name, d)
		}
	}
}

func TestValidateAppliesECN(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		p := good(v6)
		p.tos = 0xb8 | header.ECNECT0
		b := p.bytes(t)
		var in header.Inner
		pkt, d := Validate(b, &in, ce, tables{})
		if d != DropNone || in.TOS != 0xb8|ce {
			t.Fatalf("v6 %v: %v, TOS %#x", v6, d, in.TOS)
		}
		p.tos = 0xb8 | ce
		if want := p.bytes(t); !bytes.Equal(pkt, want) {
			t.Errorf("v6 %v: got  %x\nwant %x", v6, pkt, want)
		}
	}
}

func FuzzValidate(f *testing.F) {
	for _, v6 := range []bool{false, true} {
		f.Add(good(v6).bytes(f), byte(0))
		f.Add(append(good(v6).bytes(f), "padding"...), byte(3))
		p := good(v6)
		p.proto, p.tos = layers.IPProtocolIPv4, 2
		f.Add(p.bytes(f), byte(1))
	}
	f.Fuzz(func(t *testing.T, b []byte, outer byte) {
		before := bytes.Clone(b)
		var in header.Inner
		pkt, d := Validate(b[:len(b):len(b)], &in, outer, tables{})
		if d != DropNone {
			if pkt != nil || !bytes.Equal(b, before) || d < DropMalformed || d > DropECN {
				t.Fatalf("%v, %d bytes", d, len(pkt))
			}
			return
		}
		if len(pkt) != in.Length || !senders[0].Contains(in.Src) && !senders[1].Contains(in.Src) || in.TTL == 0 {
			t.Fatalf("accepted %d bytes: %+v", len(pkt), in)
		}
		var again header.Inner
		if err := header.ParseInner(pkt, &again); err != nil || again != in {
			t.Fatalf("%v: %+v, then %+v", err, in, again)
		}
		if tos, d := DecapECN(before4or6TOS(before), outer); d != DropNone || tos != in.TOS {
			t.Fatalf("TOS %#x", in.TOS)
		}
	})
}

func before4or6TOS(b []byte) byte {
	if b[0]>>4 == 4 {
		return header.IPv4(b).TOS()
	}
	return header.IPv6(b).TrafficClass()
}

func BenchmarkValidate(b *testing.B) {
	for _, v6 := range []bool{false, true} {
		p := good(v6)
		p.tos = header.ECNECT0
		buf := p.bytes(b)
		b.Run(map[bool]string{false: "v4", true: "v6"}[v6], func(b *testing.B) {
			b.ReportAllocs()
			in := new(header.Inner)
			for b.Loop() {
				if _, d := Validate(buf, in, header.ECNECT0, tables{}); d != DropNone {
					b.Fatal(d)
				}
			}
		})
	}
}
