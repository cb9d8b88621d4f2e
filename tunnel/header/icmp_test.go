package header

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"

	"github.com/tulle-net/tulle/internal/testing/damage"
)

// decode reads p by gopacket and fails on anything that it cannot read.
func decode(t *testing.T, p []byte) gopacket.Packet {
	t.Helper()
	first := layers.LayerTypeIPv4
	if p[0]>>4 == 6 {
		first = layers.LayerTypeIPv6
	}
	d := gopacket.NewPacket(p, first, gopacket.Default)
	if e := d.ErrorLayer(); e != nil {
		t.Fatal(e.Error())
	}
	return d
}

func TestICMPv4Error(t *testing.T) {
	from := netip.MustParseAddr("10.244.1.0")
	for _, tt := range []struct {
		name  string
		kind  ICMPKind
		mtu   int
		orig  []byte
		code  uint8
		seq   uint16 // the low half of the second word: the MTU
		quote int
	}{
		{"net unreachable", NetUnreachable, 0, udp4("x"), 0, 0, 29},
		{"host unreachable", HostUnreachable, 1400, udp4("x"), 1, 0, 29},
		{"fragmentation needed", TooBig, 1400, tcp(false, TCPAck, nil, make([]byte, 1460)), 4, 1400, 548},
		{"padding is not quoted", NetUnreachable, 0, append(udp4("x"), make([]byte, 90)...), 0, 0, 29},
		{"exactly 548", NetUnreachable, 0, udp4(string(make([]byte, 520))), 0, 0, 548},
		{"more than 548", NetUnreachable, 0, udp4(string(make([]byte, 521))), 0, 0, 548},
		{"MTU below the least", TooBig, 0, udp4("x"), 4, 68, 29},
		{"MTU beyond 16 bits", TooBig, 1 << 20, udp4("x"), 4, 65535, 29},
	} {
		t.Run(tt.name, func(t *testing.T) {
			prefix := []byte("kept")
			b := AppendICMPError(prefix, tt.orig, from, tt.kind, tt.mtu)
			if !bytes.HasPrefix(b, prefix) {
				t.Fatal("dst overwritten")
			}
			b = b[len(prefix):]
			if len(b) > 576 {
				t.Errorf("%d bytes", len(b))
			}
			p := decode(t, b)
			ip := p.NetworkLayer().(*layers.IPv4)
			icmp := p.Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4)
			if ip.SrcIP.String() != "10.244.1.0" || ip.DstIP.String() != src4.String() || ip.TTL != 64 || int(ip.Length) != len(b) {
				t.Errorf("outer header %+v", ip)
			}
			if !IPv4(b).ChecksumValid() {
				t.Error("header checksum")
			}
			if icmp.TypeCode != layers.CreateICMPv4TypeCode(3, tt.code) || icmp.Seq != tt.seq || icmp.Id != 0 {
				t.Errorf("type and code %v, id %d, MTU %d", icmp.TypeCode, icmp.Id, icmp.Seq)
			}
			m, err := ParseICMPv4(ip.Payload)
			if err != nil || !m.ChecksumValid() || !m.IsError() || m.MTU() != int(tt.seq) || m.Checksum() != icmp.Checksum || m.Type() != 3 || m.Code() != tt.code {
				t.Errorf("our own view disagrees: %x %v", []byte(m), err)
			}
			if !bytes.Equal(m.Payload(), tt.orig[:tt.quote]) {
				t.Errorf("quotes %d bytes, want %d", len(m.Payload()), tt.quote)
			}
			// gopacket computes the same checksum.
			buf := gopacket.NewSerializeBuffer()
			if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{ComputeChecksums: true},
				icmp, gopacket.Payload(icmp.Payload)); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(buf.Bytes(), m) {
				t.Errorf("gopacket writes %x, we %x", buf.Bytes(), []byte(m))
			}
		})
	}
}

func TestICMPv6Error(t *testing.T) {
	from := netip.MustParseAddr("fd00:244:1::")
	big := tcp(true, TCPAck, nil, make([]byte, 1440))
	for _, tt := range []struct {
		name      string
		kind      ICMPKind
		mtu       int
		orig      []byte
		typ, code uint8
		word      int
		quote     int
	}{
		{"no route", NetUnreachable, 0, udp6("x"), 1, 0, 0, 49},
		{"address unreachable", HostUnreachable, 1400, udp6("x"), 1, 3, 0, 49},
		{"packet too big", TooBig, 1400, big, 2, 0, 1400, 1232},
		{"MTU below the least", TooBig, 500, big, 2, 0, 1280, 1232},
		{"padding is not quoted", NetUnreachable, 0, append(udp6("x"), make([]byte, 90)...), 1, 0, 0, 49},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := AppendICMPError(nil, tt.orig, from, tt.kind, tt.mtu)
			if len(b) > 1280 {
				t.Errorf("%d bytes", len(b))
			}
			p := decode(t, b)
			ip := p.NetworkLayer().(*layers.IPv6)
			icmp := p.Layer(layers.LayerTypeICMPv6).(*layers.ICMPv6)
			if ip.SrcIP.String() != from.String() || ip.DstIP.String() != src6.String() || ip.HopLimit != 64 || int(ip.Length) != len(b)-40 {
				t.Errorf("outer header %+v", ip)
			}
			if icmp.TypeCode != layers.CreateICMPv6TypeCode(tt.typ, tt.code) {
				t.Errorf("type and code %v", icmp.TypeCode)
			}
			m, err := ParseICMPv6(ip.Payload)
			if err != nil || !m.ChecksumValid(ip.SrcIP, ip.DstIP) || !m.IsError() || m.MTU() != tt.word || m.Checksum() != icmp.Checksum || m.Type() != tt.typ || m.Code() != tt.code {
				t.Errorf("our own view disagrees: %x %v", []byte(m), err)
			}
			if !bytes.Equal(m.Payload(), tt.orig[:tt.quote]) {
				t.Errorf("quotes %d bytes, want %d", len(m.Payload()), tt.quote)
			}
			if err := icmp.SetNetworkLayerForChecksum(ip); err != nil {
				t.Fatal(err)
			}
			buf := gopacket.NewSerializeBuffer()
			if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{ComputeChecksums: true},
				icmp, gopacket.Payload(icmp.Payload)); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(buf.Bytes(), m) {
				t.Errorf("gopacket writes %x, we %x", buf.Bytes(), []byte(m))
			}
		})
	}
}

func TestICMPErrorNotMade(t *testing.T) {
	for _, tt := range []struct {
		name string
		orig []byte
		src  netip.Addr
	}{
		{"v4 about v6", udp6("x"), src4},
		{"v6 about v4", udp4("x"), src6},
		{"no packet", []byte{0x45, 0}, src4},
		{"no source", udp4("x"), netip.Addr{}},
	} {
		if got := AppendICMPError([]byte("kept"), tt.orig, tt.src, NetUnreachable, 0); string(got) != "kept" {
			t.Errorf("%s: %x", tt.name, got)
		}
	}
	for k, want := range map[ICMPKind]string{NetUnreachable: "net unreachable", HostUnreachable: "host unreachable", TooBig: "too big", 9: "unknown"} {
		if k.String() != want {
			t.Errorf("%d: %q", k, k)
		}
	}
}

func TestEcho(t *testing.T) {
	p := decode(t, ip4(ProtoICMP, 0, AppendICMPv4Echo(nil, ICMPv4EchoRequest, 7, 8, []byte("abc"))))
	e4 := p.Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4)
	if e4.Id != 7 || e4.Seq != 8 || e4.TypeCode.Type() != 8 || string(e4.Payload) != "abc" {
		t.Errorf("%+v", e4)
	}
	if m := ICMPv4(p.NetworkLayer().LayerPayload()); !m.ChecksumValid() || m.IsError() {
		t.Error("v4 echo")
	}
	m := ICMPv6(AppendICMPv6Echo(nil, src6, dst6, ICMPv6EchoReply, 7, 8, []byte("abc")))
	s, d := src6.As16(), dst6.As16()
	if !m.ChecksumValid(s[:], d[:]) || m.IsError() || m.Type() != ICMPv6EchoReply || m.MTU() != 7<<16|8 {
		t.Errorf("v6 echo %x", []byte(m))
	}
}

func TestMayAnswer(t *testing.T) {
	from := func(src, dst string) []byte {
		s, d := netip.MustParseAddr(src), netip.MustParseAddr(dst)
		payload := []byte{0, 1, 0, 2, 0, 8, 0, 0}
		if s.Is4() {
			return append(AppendIPv4(nil, IPv4Fields{Src: s, Dst: d, PayloadLen: 8, TTL: 9, Proto: ProtoUDP}), payload...)
		}
		return append(AppendIPv6(nil, IPv6Fields{Src: s, Dst: d, PayloadLen: 8, HopLimit: 9, NextHeader: ProtoUDP}), payload...)
	}
	icmp4 := func(typ byte) []byte { return ip4(ProtoICMP, 0, []byte{typ, 0, 0, 0, 0, 0, 0, 0}) }
	icmp6 := func(typ byte) []byte { return ip6(ProtoICMPv6, []byte{typ, 0, 0, 0, 0, 0, 0, 0}) }
	frag6 := func(off int) []byte {
		return ip6(ProtoFragment, join(AppendIPv6Fragment(nil, ProtoUDP, off, true, 1), make([]byte, 8)))
	}
	for _, tt := range []struct {
		name string
		p    []byte
		want bool
	}{
		{"v4 UDP", udp4("x"), true},
		{"v6 UDP", udp6("x"), true},
		{"v4 first fragment", ip4(ProtoUDP, IPv4FlagMF, make([]byte, 8)), true},
		{"v4 later fragment", ip4(ProtoUDP, 1, make([]byte, 8)), false},
		{"v6 first fragment", frag6(0), true},
		{"v6 later fragment", frag6(8), false},
		{"v4 echo request", icmp4(8), true},
		{"v4 echo reply", icmp4(0), true},
		{"v4 unreachable", icmp4(3), false},
		{"v4 source quench", icmp4(4), false},
		{"v4 redirect", icmp4(5), false},
		{"v4 time exceeded", icmp4(11), false},
		{"v4 parameter problem", icmp4(12), false},
		{"v4 ICMP without type", ip4(ProtoICMP, 0, nil), false},
		{"v6 echo request", icmp6(128), true},
		{"v6 unreachable", icmp6(1), false},
		{"v6 too big", icmp6(2), false},
		{"v6 unknown error", icmp6(127), false},
		{"v6 redirect", icmp6(137), false},
		{"v6 error behind options", ip6(ProtoDestOpts, join(ext(ProtoICMPv6), []byte{1, 0, 0, 0, 0, 0, 0, 0})), false},
		{"v6 ICMP without type", ip6(ProtoICMPv6, nil), false},
		{"v4 from zero", from("0.0.0.0", "10.1.1.1"), false},
		{"v4 from this network", from("0.1.2.3", "10.1.1.1"), false},
		{"v4 from loopback", from("127.0.0.1", "10.1.1.1"), false},
		{"v4 from multicast", from("224.0.0.1", "10.1.1.1"), false},
		{"v4 from broadcast", from("255.255.255.255", "10.1.1.1"), false},
		{"v4 from reserved", from("240.0.0.1", "10.1.1.1"), false},
		{"v4 from link-local", from("169.254.1.1", "10.1.1.1"), false},
		{"v4 to multicast", from("10.1.1.1", "239.1.1.1"), false},
		{"v4 to broadcast", from("10.1.1.1", "255.255.255.255"), false},
		{"v4 to link-local", from("10.1.1.1", "169.254.1.1"), false},
		{"v6 from unspecified", from("::", "fd00::1"), false},
		{"v6 from loopback", from("::1", "fd00::1"), false},
		{"v6 from multicast", from("ff02::1", "fd00::1"), false},
		{"v6 from link-local", from("fe80::1", "fd00::1"), false},
		{"v6 from IPv4-mapped", from("::ffff:10.1.1.1", "fd00::1"), false},
		{"v6 to multicast", from("fd00::1", "ff02::2"), false},
		{"v6 to link-local", from("fd00::1", "fe80::2"), false},
		{"truncated", udp4("x")[:25], false},
		{"empty", nil, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := MayAnswer(tt.p); got != tt.want {
				t.Errorf("MayAnswer = %v", got)
			}
		})
	}
}

// A quote is parsed as the packet is, as far as it goes, and an error relayed about it quotes it.
func TestQuote(t *testing.T) {
	for name, pkt := range map[string][]byte{"v4": udp4("a payload that is not quoted"), "v6": udp6("a payload that is not quoted")} {
		var whole, in Inner
		if err := ParseInner(pkt, &whole); err != nil {
			t.Fatal(err)
		}
		quote := pkt[:whole.HeaderLen+8]
		if err := ParseQuote(quote, &in); err != nil || in.Length != len(quote) {
			t.Fatalf("%s: %v, %d bytes", name, err, in.Length)
		}
		if in.Length = whole.Length; in != whole {
			t.Errorf("%s: %+v, of the whole packet %+v", name, in, whole)
		}
		if err := ParseQuote(append(bytes.Clone(pkt), "trailing"...), &in); err != nil || in != whole {
			t.Errorf("%s with trailing bytes: %v, %+v", name, err, in)
		}
		router := netip.MustParseAddr("192.0.2.9")
		if whole.Version == 6 {
			router = netip.MustParseAddr("2001:db8::9")
		}
		got := AppendRelayedError([]byte("kept"), quote, router, HostUnreachable)
		if !bytes.HasSuffix(got, quote) || !bytes.HasPrefix(got, []byte("kept")) {
			t.Errorf("%s: relayed % x", name, got)
		}
		if len(AppendRelayedError(nil, quote[:whole.HeaderLen-1], router, HostUnreachable)) != 0 {
			t.Errorf("%s: relayed about half a header", name)
		}
		if len(AppendRelayedError(nil, got[4:], router, HostUnreachable)) != 0 {
			t.Errorf("%s: an error about an error", name)
		}
		damage.Check(t, pkt, func(b []byte) error { AppendRelayedError(nil, b, router, NetUnreachable); return nil })
	}
}
