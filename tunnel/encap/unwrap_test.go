package encap

import (
	"bytes"
	"encoding/json"
	"testing"

	"github.com/tulle-net/tulle/tunnel/header"
	"github.com/tulle-net/tulle/tunnel/mtu"
)

func TestUnwrapUDP(t *testing.T) {
	four, six := goldenInner(false), goldenInner(true)
	gue := func(h ...byte) func([]byte) []byte { return func(b []byte) []byte { return append(h, b...) } }
	for _, tt := range []struct {
		name    string
		payload []byte
		want    []byte
		drop    Drop
	}{
		{"variant 1, v4", four, four, DropNone},
		{"variant 1, v6", six, six, DropNone},
		{"variant 0, v4", gue(0, 4, 0, 0)(four), four, DropNone},
		{"variant 0, v6", gue(0, 41, 0, 0)(six), six, DropNone},
		{"one byte, for Shape to refuse", []byte{0x45}, []byte{0x45}, DropNone},
		{"empty", nil, nil, DropMalformed},
		{"variant 0 cut", []byte{0, 4, 0}, nil, DropMalformed},
		{"variant 0 without inner", []byte{0, 4, 0, 0}, nil, DropMalformed},
		{"variant 0, v6 as 4", gue(0, 4, 0, 0)(six), nil, DropMalformed},
		{"variant 0, v4 as 41", gue(0, 41, 0, 0)(four), nil, DropMalformed},
		{"variant 0, variant 0 inside", gue(0, 4, 0, 0, 0, 4, 0, 0)(four), nil, DropMalformed},
		{"variant 0, protocol", gue(0, 17, 0, 0)(four), nil, DropBadEncap},
		{"variant 0, control", gue(0x20, 4, 0, 0)(four), nil, DropBadEncap},
		{"variant 0, hlen", gue(1, 4, 0, 0, 0, 0, 0, 0)(four), nil, DropBadEncap},
		{"variant 0, flags", gue(0, 4, 0x01, 0)(four), nil, DropBadEncap},
		{"variant 0, flags low", gue(0, 4, 0, 0x40)(four), nil, DropBadEncap},
		{"variant 1, version 5", gue(0x50)(four), nil, DropBadEncap},
		{"variant 1, version 7", gue(0x70)(four), nil, DropBadEncap},
		{"variant 2", gue(0x80, 4, 0, 0)(four), nil, DropBadEncap},
		{"variant 3", gue(0xff, 4, 0, 0)(four), nil, DropBadEncap},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inner, d := UnwrapUDP(tt.payload)
			if d != tt.drop || !bytes.Equal(inner, tt.want) {
				t.Errorf("%v, %x", d, inner)
			}
		})
	}
}

func TestUnwrapVXLAN(t *testing.T) {
	four, six := readHex(t, "vxlan_4in4")[28:], readHex(t, "vxlan_6in4")[28:]
	edit := func(b []byte, off int, v ...byte) []byte { b = bytes.Clone(b); copy(b[off:], v); return b }
	for _, tt := range []struct {
		name    string
		payload []byte
		want    []byte
		drop    Drop
	}{
		{"v4", four, four[22:], DropNone},
		{"v6", six, six[22:], DropNone},
		{"to all stations", edit(four, 8, 255, 255, 255, 255, 255, 255), four[22:], DropNone},
		{"ARP, for the engine to read", edit(four, 20, 8, 6), four[22:], DropNone},
		{"another VNI", edit(four, 4, 0, 0, 1), nil, DropBadEncap},
		{"no VNI", edit(four, 0, 0), nil, DropBadEncap},
		{"reserved flag", edit(four, 0, 0x88), nil, DropBadEncap},
		{"reserved byte 1", edit(four, 1, 1), nil, DropBadEncap},
		{"reserved byte 3", edit(four, 3, 0x80), nil, DropBadEncap},
		{"reserved last byte", edit(four, 7, 1), nil, DropBadEncap},
		{"another station", edit(four, 13, 0x56), nil, DropBadEncap},
		{"a VLAN tag", edit(four, 20, 0x81, 0), nil, DropBadEncap},
		{"another EtherType", edit(four, 20, 0x88, 0x47), nil, DropBadEncap},
		{"v4 as v6", edit(four, 20, 0x86, 0xdd), nil, DropMalformed},
		{"v6 as v4", edit(six, 20, 8, 0), nil, DropMalformed},
		{"nothing inside", four[:22], nil, DropMalformed},
		{"cut", four[:21], nil, DropMalformed},
		{"empty", nil, nil, DropMalformed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v, d := UnwrapVXLAN(tt.payload, goldenVNI, goldenTo)
			inner := []byte(nil)
			if d == DropNone {
				if inner = v.Payload(); v.EtherType() != header.EtherTypeARP {
					inner, d = InnerVXLAN(v)
				}
			}
			if d != tt.drop || !bytes.Equal(inner, tt.want) {
				t.Errorf("%v, %x", d, inner)
			}
		})
	}
}

func TestUnwrapRaw(t *testing.T) {
	four4, six4 := readHex(t, "ipip_4in4"), readHex(t, "ipip_6in4")
	edit := func(b []byte, off int, v byte) []byte { b = bytes.Clone(b); b[off] = v; return b }
	for _, tt := range []struct {
		name   string
		packet []byte
		want   []byte
		drop   Drop
	}{
		{"v4", four4, four4[20:], DropNone},
		{"v6", six4, six4[20:], DropNone},
		{"outer padding is cut", append(bytes.Clone(four4), 1, 2, 3), four4[20:], DropNone},
		{"other protocol", edit(four4, 9, 47), nil, DropBadEncap},
		{"v4 as 41", edit(four4, 9, 41), nil, DropMalformed},
		{"v6 as 4", edit(six4, 9, 4), nil, DropMalformed},
		{"outer cut", four4[:40], nil, DropMalformed},
		{"outer version", edit(four4, 0, 0x65), nil, DropMalformed},
		{"outer IHL", edit(four4, 0, 0x44), nil, DropMalformed},
		{"outer fragment", edit(four4, 6, 0x20), nil, DropMalformed},
		{"outer later fragment", edit(four4, 7, 1), nil, DropMalformed},
		{"nothing inside", edit(edit(four4, 2, 0), 3, 20), nil, DropMalformed},
		{"empty", nil, nil, DropMalformed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inner, tos, d := UnwrapRaw4(tt.packet)
			if d != tt.drop || !bytes.Equal(inner, tt.want) {
				t.Errorf("%v, %x", d, inner)
			}
			if d == DropNone && tos != 0xba {
				t.Errorf("TOS %#x", tos)
			}
		})
	}
	for _, tt := range []struct {
		name  string
		proto uint8
		p     []byte
		drop  Drop
	}{
		{"v4", header.ProtoIPv4, goldenInner(false), DropNone},
		{"v6", header.ProtoIPv6, goldenInner(true), DropNone},
		{"v6 as 4", header.ProtoIPv4, goldenInner(true), DropMalformed},
		{"v4 as 41", header.ProtoIPv6, goldenInner(false), DropMalformed},
		{"empty", header.ProtoIPv6, nil, DropMalformed},
		{"other protocol", header.ProtoUDP, goldenInner(false), DropBadEncap},
	} {
		if inner, d := UnwrapRaw6(tt.p, tt.proto); d != tt.drop || d == DropNone && !bytes.Equal(inner, tt.p) {
			t.Errorf("raw6, %s: %v", tt.name, d)
		}
	}
}

// FuzzUnwrap feeds every decoder of outer packets.
func FuzzUnwrap(f *testing.F) {
	for _, g := range goldens {
		b := readHex(f, g.name)
		f.Add(b)
		f.Add(b[g.inside:])
		f.Add(b[g.overhead:])
		if g.inside+header.UDPLen < len(b) {
			f.Add(b[g.inside+header.UDPLen:])
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		b = b[:len(b):len(b)]
		udp, d := UnwrapUDP(b)
		checkUnwrapped(t, b, udp, d)
		vxlan, d := unwrapVXLAN(b)
		checkUnwrapped(t, b, vxlan, d)
		raw, _, d := UnwrapRaw4(b)
		checkUnwrapped(t, b, raw, d)
		for _, proto := range []uint8{header.ProtoIPv4, header.ProtoIPv6, header.ProtoUDP} {
			raw, d := UnwrapRaw6(b, proto)
			checkUnwrapped(t, b, raw, d)
		}
	})
}

func checkUnwrapped(t *testing.T, b, inner []byte, d Drop) {
	t.Helper()
	switch d {
	case DropNone:
		if len(inner) == 0 || len(inner) > len(b) || !bytes.Contains(b, inner) {
			t.Fatalf("%d bytes out of %d", len(inner), len(b))
		}
		if v := inner[0] >> 4; v != 4 && v != 6 {
			t.Fatalf("version %d", v)
		}
		var in header.Inner
		if header.ParseInner(inner, &in) == nil && in.Length > len(inner) {
			t.Fatal("longer than what it came in")
		}
	case DropBadEncap, DropMalformed:
		if inner != nil {
			t.Fatal("a dropped packet was returned")
		}
	default:
		t.Fatalf("%v", d)
	}
}

func TestModes(t *testing.T) {
	for m, want := range map[Mode]struct {
		name   string
		v4, v6 mtu.Overhead
	}{
		Direct: {"direct", 0, 0}, UDP: {"udp", 28, 48}, IPIP: {"ipip", 20, 40}, VXLAN: {"vxlan", 50, 70},
	} {
		if m.String() != want.name || Overhead(m, false) != want.v4 || Overhead(m, true) != want.v6 {
			t.Errorf("%v: %d, %d", m, Overhead(m, false), Overhead(m, true))
		}
		if got, err := ParseMode(want.name); got != m || err != nil {
			t.Errorf("ParseMode(%q) = %v, %v", want.name, got, err)
		}
		text, err := json.Marshal(m)
		var back Mode = 77
		if err != nil || string(text) != `"`+want.name+`"` || json.Unmarshal(text, &back) != nil || back != m {
			t.Errorf("JSON %s, %v, %v", text, err, back)
		}
	}
	for _, s := range []string{"", "UDP", "gre", "mode(9)"} {
		var m Mode
		if _, err := ParseMode(s); err == nil || m.UnmarshalText([]byte(s)) == nil {
			t.Errorf("ParseMode(%q) accepted", s)
		}
	}
	if Mode(9).String() != "mode(9)" || Overhead(Mode(9), true) != 0 {
		t.Error("unknown mode")
	}
}

func TestOverheadIsWhatTheWritersAdd(t *testing.T) {
	for _, outer6 := range []bool{false, true} {
		for m, wrap := range map[Mode]func([]byte, *Outer, []byte) ([]byte, error){UDP: WrapUDP, IPIP: WrapIPIP} {
			inner := goldenInner(false)
			b, err := wrap(nil, goldenOuter(outer6, 0), inner)
			if err != nil || len(b)-len(inner) != int(Overhead(m, outer6)) {
				t.Errorf("%v, v6 %v: %d, %v", m, outer6, len(b)-len(inner), err)
			}
		}
	}
}

func TestDropNames(t *testing.T) {
	want := []string{
		"not_member", "bad_encap", "malformed", "nested", "ttl_zero", "source_invalid", "source_not_senders",
		"destination_not_ours", "ecn", "no_owner", "loop", "local_multicast", "peer_down", "no_path", "too_big",
		"tx_malformed", "tx_ttl_zero", "send_error", "tun_write", "socket_overflow", "no_encap_socket", "queue_delay",
	}
	i := 0
	for d := range Drops() {
		if int(d) != i+1 || i >= len(want) || d.String() != want[i] {
			t.Fatalf("reason %d is %q", d, d)
		}
		i++
	}
	if i != len(want) || NumDrops != len(want)+1 || DropNone.String() != "none" || Drop(200).String() != "unknown" {
		t.Errorf("%d reasons, NumDrops %d", i, NumDrops)
	}
	for range Drops() { // may be left early
		break
	}
}

func TestSourcePort(t *testing.T) {
	if SourcePort(0) != FirstSourcePort || SourcePort(1<<32-1) != LastSourcePort {
		t.Errorf("%d–%d", SourcePort(0), SourcePort(1<<32-1))
	}
	seen := map[uint16]bool{}
	for i := range uint32(1 << 14) {
		seen[SourcePort(i<<18)] = true
	}
	if len(seen) != 1<<14 {
		t.Errorf("%d ports of %d", len(seen), 1<<14)
	}
}
