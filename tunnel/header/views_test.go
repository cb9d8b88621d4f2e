package header

import (
	"bytes"
	"net/netip"
	"testing"
)

// check compares accessors' results with what annotated bytes say.
type check struct {
	field     string
	got, want any
}

func compare(t *testing.T, checks []check) {
	t.Helper()
	for _, c := range checks {
		if c.got != c.want {
			t.Errorf("%s = %v, want %v", c.field, c.got, c.want)
		}
	}
}

func TestIPv4View(t *testing.T) {
	b := unhex(t, `
		46 b9 00 1c  12 34 60 05  3f 11 00 00  0a f4 01 02  0a f4 02 03
		01 01 01 00
		de ad be ef`)
	b = append(b, 0xff) // padding
	p, err := ParseIPv4(b)
	if err != nil {
		t.Fatal(err)
	}
	compare(t, []check{
		{"Version", p.Version(), 4}, {"HeaderLen", p.HeaderLen(), 24}, {"TOS", p.TOS(), uint8(0xb9)},
		{"TotalLen", p.TotalLen(), 28}, {"len", len(p), 28}, {"ID", p.ID(), uint16(0x1234)},
		{"DF", p.DF(), true}, {"MF", p.MF(), true}, {"FragmentOffset", p.FragmentOffset(), 40},
		{"TTL", p.TTL(), uint8(63)}, {"Proto", p.Proto(), uint8(ProtoUDP)}, {"Checksum", p.Checksum(), uint16(0)},
		{"Src", p.Src(), src4}, {"Dst", p.Dst(), dst4},
		{"SrcBytes", [4]byte(p.SrcBytes()), src4.As4()}, {"DstBytes", [4]byte(p.DstBytes()), dst4.As4()},
		{"Options", string(p.Options()), "\x01\x01\x01\x00"}, {"Payload", string(p.Payload()), "\xde\xad\xbe\xef"},
		{"ChecksumValid", p.ChecksumValid(), false},
	})
	p.SetChecksum()
	if !p.ChecksumValid() {
		t.Fatal("checksum wrong after SetChecksum")
	}
	for _, set := range []struct {
		name string
		do   func()
		ok   func() bool
	}{
		{"TOS", func() { p.SetTOS(0x02) }, func() bool { return p.TOS() == 0x02 && p.Version() == 4 }},
		{"TTL", func() { p.SetTTL(1) }, func() bool { return p.TTL() == 1 && p.Proto() == ProtoUDP }},
		{"TotalLen", func() { p.SetTotalLen(26) }, func() bool { return p.TotalLen() == 26 }},
		{"ID", func() { p.SetID(0xffff) }, func() bool { return p.ID() == 0xffff }},
	} {
		set.do()
		if !set.ok() || !p.ChecksumValid() {
			t.Errorf("Set%s: %x", set.name, []byte(p))
		}
	}
}

func TestIPv6View(t *testing.T) {
	b := unhex(t, `
		6b 9a bc de  00 04 11 3f
		fd 00 02 44 00 01 00 00  00 00 00 00 00 00 00 02
		fd 00 02 44 00 02 00 00  00 00 00 00 00 00 00 03
		de ad be ef  ff`)
	p, err := ParseIPv6(b)
	if err != nil {
		t.Fatal(err)
	}
	compare(t, []check{
		{"Version", p.Version(), 6}, {"TrafficClass", p.TrafficClass(), uint8(0xb9)}, {"FlowLabel", p.FlowLabel(), uint32(0xabcde)},
		{"PayloadLen", p.PayloadLen(), 4}, {"len", len(p), 44}, {"NextHeader", p.NextHeader(), uint8(ProtoUDP)}, {"HopLimit", p.HopLimit(), uint8(63)},
		{"Src", p.Src(), src6}, {"Dst", p.Dst(), dst6},
		{"SrcBytes", [16]byte(p.SrcBytes()), src6.As16()}, {"DstBytes", [16]byte(p.DstBytes()), dst6.As16()},
		{"Payload", string(p.Payload()), "\xde\xad\xbe\xef"},
	})
	if got := ip6(ProtoUDP, []byte("\xde\xad\xbe\xef")); !bytes.Equal(got, p) {
		t.Errorf("AppendIPv6 wrote %x", got)
	}
	p.SetTrafficClass(0x46)
	p.SetHopLimit(7)
	p.SetPayloadLen(3)
	compare(t, []check{
		{"TrafficClass", p.TrafficClass(), uint8(0x46)}, {"FlowLabel", p.FlowLabel(), uint32(0xabcde)}, {"Version", p.Version(), 6},
		{"HopLimit", p.HopLimit(), uint8(7)}, {"PayloadLen", p.PayloadLen(), 3},
	})
}

func TestParseViewsRefuse(t *testing.T) {
	udp := udp4("abc")[20:]
	seg := tcp(false, TCPAck, nil, []byte("abc"))[20:]
	vx := append(AppendVXLAN(nil, 1, [6]byte{}, [6]byte{}, EtherTypeIPv4), 1)
	for _, tt := range []struct {
		name string
		err  error
		want error
	}{
		{"IPv4 short", second(ParseIPv4(udp4("x")[:19])), ErrTruncated},
		{"IPv4 version", second(ParseIPv4(udp6("x"))), ErrVersion},
		{"IPv4 IHL", second(ParseIPv4(with(udp4("x"), 0, 0x41))), ErrHeaderLen},
		{"IPv4 total", second(ParseIPv4(with(udp4("x"), 3, 10))), ErrTotalLen},
		{"IPv4 cut", second(ParseIPv4(udp4("x")[:28])), ErrTruncated},
		{"IPv6 short", second(ParseIPv6(udp6("x")[:39])), ErrTruncated},
		{"IPv6 version", second(ParseIPv6(make([]byte, 60))), ErrVersion},
		{"IPv6 cut", second(ParseIPv6(udp6("x")[:48])), ErrTruncated},
		{"UDP short", second(ParseUDP(udp[:7])), ErrTruncated},
		{"UDP length below header", second(ParseUDP(with(udp, 5, 7))), ErrTotalLen},
		{"UDP cut", second(ParseUDP(udp[:10])), ErrTruncated},
		{"TCP short", second(ParseTCP(seg[:19])), ErrTruncated},
		{"TCP data offset below header", second(ParseTCP(with(seg, 12, 0x40))), ErrHeaderLen},
		{"TCP options cut", second(ParseTCP(with(seg, 12, 0xf0))), ErrTruncated},
		{"ICMP short", second(ParseICMPv4(make([]byte, 7))), ErrTruncated},
		{"ICMPv6 short", second(ParseICMPv6(make([]byte, 7))), ErrTruncated},
		{"VXLAN short", second(ParseVXLAN(vx[:21])), ErrTruncated},
		{"VXLAN without VNI", second(ParseVXLAN(with(vx, 0, 0))), ErrVXLAN},
		{"VXLAN reserved flag", second(ParseVXLAN(with(vx, 0, 0x0c))), ErrVXLAN},
		{"VXLAN reserved byte", second(ParseVXLAN(with(vx, 3, 1))), ErrVXLAN},
		{"VXLAN reserved last byte", second(ParseVXLAN(with(vx, 7, 1))), ErrVXLAN},
	} {
		if tt.err != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, tt.err, tt.want)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func TestUDPView(t *testing.T) {
	for _, p := range [][]byte{udp4("abc"), udp6("abc")} {
		var in Inner
		if err := ParseInner(p, &in); err != nil {
			t.Fatal(err)
		}
		u, err := ParseUDP(append(in.Payload(p), 0)) // padding
		if err != nil {
			t.Fatal(err)
		}
		src, dst := in.SrcBytes(p), in.DstBytes(p)
		compare(t, []check{
			{"SrcPort", u.SrcPort(), uint16(1000)}, {"DstPort", u.DstPort(), uint16(2000)}, {"Length", u.Length(), 11},
			{"Payload", string(u.Payload()), "abc"}, {"ChecksumValid", u.ChecksumValid(src, dst), true},
		})
		u[8] ^= 1
		if u.ChecksumValid(src, dst) {
			t.Error("a flipped bit is valid")
		}
		u.SetChecksum(src, dst)
		if !u.ChecksumValid(src, dst) {
			t.Error("SetChecksum")
		}
		u.SetLength(10)
		if u.Length() != 10 {
			t.Error("SetLength")
		}
		u[6], u[7] = 0, 0
		if u.ChecksumValid(src, dst) != (in.Version == 4) {
			t.Errorf("no checksum over IPv%d: %v", in.Version, u.ChecksumValid(src, dst))
		}
	}
}

// A sum of zero goes out as 0xffff, since 0 means none (RFC 768).
func TestUDPChecksumZero(t *testing.T) {
	from, to := netip.AddrPortFrom(src4, 1000), netip.AddrPortFrom(dst4, 2000)
	u := UDP(AppendUDP(nil, from, to, []byte{0, 0}))
	payload := []byte{u[6], u[7]} // makes the whole sum 0xffff
	u = UDP(AppendUDP(nil, from, to, payload))
	if u.Checksum() != 0xffff {
		t.Fatalf("checksum %04x", u.Checksum())
	}
	s, d := src4.As4(), dst4.As4()
	if !u.ChecksumValid(s[:], d[:]) {
		t.Error("0xffff is not valid")
	}
}

func TestTCPView(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		p := tcp(v6, TCPPsh|TCPAck|TCPEce, []byte{1, 1, 8}, []byte("abc"))
		var in Inner
		if err := ParseInner(p, &in); err != nil {
			t.Fatal(err)
		}
		s, err := ParseTCP(in.Payload(p))
		if err != nil {
			t.Fatal(err)
		}
		src, dst := in.SrcBytes(p), in.DstBytes(p)
		compare(t, []check{
			{"SrcPort", s.SrcPort(), uint16(1000)}, {"DstPort", s.DstPort(), uint16(2000)},
			{"Seq", s.Seq(), uint32(0x01020304)}, {"Ack", s.Ack(), uint32(0x05060708)},
			{"HeaderLen", s.HeaderLen(), 24}, {"Flags", s.Flags(), TCPFlags(0x58)}, {"Window", s.Window(), uint16(0x1000)},
			{"Urgent", s.Urgent(), uint16(7)}, {"Options", string(s.Options()), "\x01\x01\x08\x00"}, {"Payload", string(s.Payload()), "abc"},
			{"ChecksumValid", s.ChecksumValid(src, dst), true},
		})
		sum := s.Checksum()
		s.SetSeq(9)
		s.SetFlags(TCPFin)
		if s.Seq() != 9 || s.Flags() != TCPFin || s.ChecksumValid(src, dst) {
			t.Error("SetSeq, SetFlags")
		}
		s.SetChecksum(src, dst)
		if s.Checksum() == sum || !s.ChecksumValid(src, dst) {
			t.Error("SetChecksum")
		}
	}
}

func TestGUE(t *testing.T) {
	for _, tt := range []struct {
		name    string
		b       []byte
		want    error
		variant int
		proto   uint8
		hlen    int
	}{
		{"variant 1, IPv4", []byte{0x45}, nil, 1, ProtoIPv4, 0},
		{"variant 1, IPv6", []byte{0x60}, nil, 1, ProtoIPv6, 0},
		{"variant 1, neither", []byte{0x50, 0, 0, 0}, ErrGUE, 0, 0, 0},
		{"variant 1, 7", []byte{0x70, 0, 0, 0}, ErrGUE, 0, 0, 0},
		{"variant 0, IPv4", []byte{0, 4, 0, 0}, nil, 0, ProtoIPv4, 4},
		{"variant 0, IPv6", []byte{0, 41, 0, 0, 0x60}, nil, 0, ProtoIPv6, 4},
		{"variant 0, TCP", []byte{0, 6, 0, 0}, ErrGUE, 0, 0, 0},
		{"variant 0, control", []byte{0x20, 4, 0, 0}, ErrGUE, 0, 0, 0},
		{"variant 0, hlen 1", []byte{0x01, 4, 0, 0, 0, 0, 0, 0}, ErrGUE, 0, 0, 0},
		{"variant 0, hlen 31", []byte{0x1f, 4, 0, 0}, ErrGUE, 0, 0, 0},
		{"variant 0, flags high", []byte{0, 4, 0x80, 0}, ErrGUE, 0, 0, 0},
		{"variant 0, flags low", []byte{0, 4, 0, 1}, ErrGUE, 0, 0, 0},
		{"variant 2", []byte{0x80, 4, 0, 0}, ErrGUE, 0, 0, 0},
		{"variant 3", []byte{0xc0, 4, 0, 0}, ErrGUE, 0, 0, 0},
		{"empty", nil, ErrTruncated, 0, 0, 0},
		{"variant 0 cut", []byte{0, 4, 0}, ErrTruncated, 0, 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g, err := ParseGUE(tt.b)
			if err != tt.want {
				t.Fatalf("%v, want %v", err, tt.want)
			}
			if err != nil {
				return
			}
			if g.Variant() != tt.variant || g.Proto() != tt.proto || g.HeaderLen() != tt.hlen || g.Control() {
				t.Errorf("variant %d proto %d hlen %d control %v", g.Variant(), g.Proto(), g.HeaderLen(), g.Control())
			}
			if !bytes.Equal(g.Payload(), tt.b[tt.hlen:]) {
				t.Errorf("payload %x", g.Payload())
			}
			if tt.variant == 0 && !bytes.Equal(AppendGUE(nil, tt.proto), tt.b[:4]) {
				t.Error("AppendGUE writes something else")
			}
		})
	}
}

func FuzzGUE(f *testing.F) {
	f.Add([]byte{0, 4, 0, 0, 0x45})
	f.Add([]byte{0, 41, 0, 0, 0x60})
	f.Add(udp4("x"))
	f.Add([]byte{0x21, 0xff, 1, 2})
	f.Fuzz(func(t *testing.T, b []byte) {
		g, err := ParseGUE(b)
		if err != nil {
			return
		}
		if g.Control() || g.HeaderLen()+len(g.Payload()) != len(b) || g.Proto() != ProtoIPv4 && g.Proto() != ProtoIPv6 {
			t.Fatalf("%x accepted as variant %d, proto %d", b, g.Variant(), g.Proto())
		}
	})
}

func TestVXLANView(t *testing.T) {
	dst, src := [6]byte{2, 1, 2, 3, 4, 5}, [6]byte{2, 9, 8, 7, 6, 5}
	b := append(AppendVXLAN(nil, 0xabcdef, dst, src, EtherTypeIPv6), "inner"...)
	want := unhex(t, `08 00 00 00  ab cd ef 00  02 01 02 03 04 05  02 09 08 07 06 05  86 dd  69 6e 6e 65 72`)
	if !bytes.Equal(b, want) {
		t.Fatalf("AppendVXLAN wrote %x", b)
	}
	v, err := ParseVXLAN(b)
	if err != nil {
		t.Fatal(err)
	}
	compare(t, []check{
		{"VNI", v.VNI(), uint32(0xabcdef)}, {"DstMAC", [6]byte(v.DstMAC()), dst}, {"SrcMAC", [6]byte(v.SrcMAC()), src},
		{"EtherType", v.EtherType(), uint16(EtherTypeIPv6)}, {"Payload", string(v.Payload()), "inner"},
	})
}
