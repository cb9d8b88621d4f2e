package encap

import (
	"bytes"
	"encoding/hex"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"

	"github.com/tulle-net/tulle/tunnel/header"
)

// readHex reads a file of hex with comments after '#'.
func readHex(t testing.TB, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name+".hex"))
	if err != nil {
		t.Fatal(err)
	}
	var digits strings.Builder
	for line := range strings.Lines(string(text)) {
		line, _, _ = strings.Cut(line, "#")
		digits.WriteString(strings.Join(strings.Fields(line), ""))
	}
	b, err := hex.DecodeString(digits.String())
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return b
}

var goldens = []struct {
	name             string
	outer6, inner6   bool
	wrap             func([]byte, *Outer, []byte) ([]byte, error)
	overhead, inside int // bytes before the inner packet, and bytes before the IP payload
}{
	{"gue1_4in4", false, false, WrapUDP, 28, 20},
	{"gue1_6in4", false, true, WrapUDP, 28, 20},
	{"gue1_4in6", true, false, WrapUDP, 48, 40},
	{"gue1_6in6", true, true, WrapUDP, 48, 40},
	{"gue0_4in4", false, false, WrapGUE0, 32, 20},
	{"gue0_6in4", false, true, WrapGUE0, 32, 20},
	{"gue0_4in6", true, false, WrapGUE0, 52, 40},
	{"gue0_6in6", true, true, WrapGUE0, 52, 40},
	{"ipip_4in4", false, false, WrapIPIP, 20, 20},
	{"ipip_6in4", false, true, WrapIPIP, 20, 20},
	{"ipip_4in6", true, false, WrapIPIP, 40, 40},
	{"ipip_6in6", true, true, WrapIPIP, 40, 40},
	{"vxlan_4in4", false, false, wrapVXLAN, 50, 20},
	{"vxlan_6in4", false, true, wrapVXLAN, 50, 20},
	{"vxlan_4in6", true, false, wrapVXLAN, 70, 40},
	{"vxlan_6in6", true, true, wrapVXLAN, 70, 40},
}

// The VTEPs of the files, and their VNI.
var goldenTo, goldenFrom = header.MAC{2, 0x11, 0x22, 0x33, 0x44, 0x55}, header.MAC{2, 0x66, 0x77, 0x88, 0x99, 0xaa}

const goldenVNI = 0xabcdef

// wrapVXLAN is WrapVXLAN between the VTEPs of the files, to the port of vxlan.
func wrapVXLAN(dst []byte, o *Outer, inner []byte) ([]byte, error) {
	to := *o
	to.Dst = netip.AddrPortFrom(o.Dst.Addr(), 4789)
	return WrapVXLAN(dst, &to, goldenVNI, goldenTo, goldenFrom, inner)
}

// unwrapVXLAN takes the inner packet out of a datagram for the VTEP of the files.
func unwrapVXLAN(payload []byte) ([]byte, Drop) {
	v, d := UnwrapVXLAN(payload, goldenVNI, goldenTo)
	if d != DropNone {
		return nil, d
	}
	return InnerVXLAN(v)
}

// goldenInner is the inner packet of the files, made by the field.
func goldenInner(v6 bool) []byte {
	if v6 {
		src, dst := netip.MustParseAddr("fd00:244:1::2"), netip.MustParseAddr("fd00:244:2::3")
		u := header.AppendUDP(nil, netip.AddrPortFrom(src, 40000), netip.AddrPortFrom(dst, 7), []byte("tulle"))
		return append(header.AppendIPv6(nil, header.IPv6Fields{
			Src: src, Dst: dst, PayloadLen: len(u), FlowLabel: 0x12345, TrafficClass: 0xba, HopLimit: 63, NextHeader: header.ProtoUDP,
		}), u...)
	}
	src, dst := netip.MustParseAddr("10.244.1.2"), netip.MustParseAddr("10.244.2.3")
	u := header.AppendUDP(nil, netip.AddrPortFrom(src, 40000), netip.AddrPortFrom(dst, 7), []byte("tulle"))
	return append(header.AppendIPv4(nil, header.IPv4Fields{
		Src: src, Dst: dst, PayloadLen: len(u), ID: 0x1111, FlagsFrag: header.IPv4FlagDF, TOS: 0xba, TTL: 63, Proto: header.ProtoUDP,
	}), u...)
}

func goldenOuter(v6 bool, innerTOS byte) *Outer {
	o := &Outer{ID: 0x2222, TOS: OuterTOS(innerTOS, true), FlowHash: 0xffabcde}
	if v6 {
		o.Src, o.Dst = netip.MustParseAddrPort("[2001:db8:1::1]:51234"), netip.MustParseAddrPort("[2001:db8:2::2]:6080")
	} else {
		o.Src, o.Dst = netip.MustParseAddrPort("192.0.2.1:51234"), netip.MustParseAddrPort("198.51.100.2:6080")
	}
	return o
}

func TestGoldenPackets(t *testing.T) {
	for _, tt := range goldens {
		t.Run(tt.name, func(t *testing.T) {
			want, inner := readHex(t, tt.name), goldenInner(tt.inner6)
			got, err := tt.wrap([]byte("kept"), goldenOuter(tt.outer6, 0xba), inner)
			if err != nil {
				t.Fatal(err)
			}
			got = bytes.TrimPrefix(got, []byte("kept"))
			if !bytes.Equal(got, want) {
				t.Errorf("got  %x\nwant %x", got, want)
			}
			if !bytes.Equal(want[tt.overhead:], inner) {
				t.Errorf("the file's inner packet is %x\nours %x", want[tt.overhead:], inner)
			}
			unwrapped, d := unwrapGolden(want, tt.outer6, tt.inside)
			if d != DropNone || !bytes.Equal(unwrapped, inner) {
				t.Errorf("unwrapped to %v, %x", d, unwrapped)
			}
		})
	}
}

// unwrapGolden unwraps a whole outer packet in the way its socket would read it.
func unwrapGolden(p []byte, outer6 bool, inside int) ([]byte, Drop) {
	proto := header.IPv4(p).Proto
	if outer6 {
		proto = header.IPv6(p).NextHeader
	}
	switch {
	case proto() == header.ProtoUDP && header.UDP(p[inside:]).DstPort() == 4789:
		return unwrapVXLAN(p[inside+header.UDPLen:])
	case proto() == header.ProtoUDP:
		return UnwrapUDP(p[inside+header.UDPLen:])
	case outer6:
		return UnwrapRaw6(p[inside:], proto())
	}
	inner, tos, d := UnwrapRaw4(p)
	if tos != header.IPv4(p).TOS() {
		return nil, DropMalformed
	}
	return inner, d
}

// gopacket, which shares no code with us, reads the same packets and finds every
// checksum right by computing it again.
func TestGoldenPacketsByGopacket(t *testing.T) {
	for _, tt := range goldens {
		t.Run(tt.name, func(t *testing.T) {
			b := readHex(t, tt.name)
			checkByGopacket(t, b, tt.outer6)
			checkByGopacket(t, b[tt.overhead:], tt.inner6)
		})
	}
}

func checkByGopacket(t *testing.T, b []byte, v6 bool) {
	t.Helper()
	first := layers.LayerTypeIPv4
	if v6 {
		first = layers.LayerTypeIPv6
	}
	p := gopacket.NewPacket(b, first, gopacket.Default)
	var parts []gopacket.SerializableLayer
	switch ip := p.NetworkLayer().(type) {
	case *layers.IPv4:
		if int(ip.Length) != len(b) || ip.Flags != layers.IPv4DontFragment {
			t.Errorf("%+v", ip)
		}
		parts = append(parts, ip)
	case *layers.IPv6:
		if int(ip.Length) != len(b)-40 {
			t.Errorf("%+v", ip)
		}
		parts = append(parts, ip)
	default:
		t.Fatalf("no IP: %v", p)
	}
	rest := p.NetworkLayer().LayerPayload()
	if udp, ok := p.TransportLayer().(*layers.UDP); ok && len(p.Layers()) > 1 && p.Layers()[1] == gopacket.Layer(udp) {
		if int(udp.Length) != len(rest) {
			t.Errorf("%+v", udp)
		}
		if err := udp.SetNetworkLayerForChecksum(p.NetworkLayer()); err != nil {
			t.Fatal(err)
		}
		parts, rest = append(parts, udp), udp.Payload
	}
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{ComputeChecksums: true},
		append(parts, gopacket.Payload(rest))...); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(buf.Bytes(), b) {
		t.Errorf("gopacket writes %x\nthe file holds  %x", buf.Bytes(), b)
	}
}

func TestWrapRefuses(t *testing.T) {
	four, six := goldenOuter(false, 0), goldenOuter(true, 0)
	mixed := &Outer{Src: four.Src, Dst: six.Dst}
	big4, big6 := make([]byte, 65536), make([]byte, 65536)
	big4[0], big6[0] = 0x45, 0x60
	wraps := map[string]func([]byte, *Outer, []byte) ([]byte, error){"udp": WrapUDP, "gue0": WrapGUE0, "ipip": WrapIPIP, "vxlan": wrapVXLAN}
	for _, tt := range []struct {
		name  string
		o     *Outer
		inner []byte
	}{
		{"nothing", four, nil},
		{"no IP", four, []byte{0x51, 2, 3}},
		{"mixed families", mixed, goldenInner(false)},
		{"no addresses", &Outer{}, goldenInner(false)},
		{"too long for IPv4", four, big4},
		{"too long for IPv6", six, big6},
	} {
		for name, wrap := range wraps {
			if b, err := wrap([]byte("kept"), tt.o, tt.inner); err == nil || string(b) != "kept" {
				t.Errorf("%s, %s: %v, %d bytes", name, tt.name, err, len(b))
			}
		}
	}
}
