package header

import (
	"bytes"
	"net"
	"net/netip"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"

	"github.com/tulle-net/tulle/internal/testing/damage"
)

var askerMAC, ownMAC = MAC{2, 9, 8, 7, 6, 5}, MAC{2, 1, 2, 3, 4, 5}

// with is b with one byte changed.
func with(b []byte, off int, v byte) []byte {
	b = bytes.Clone(b)
	b[off] = v
	return b
}

func question(sender, target string) Solicitation {
	return Solicitation{Sender: netip.MustParseAddr(sender), Target: netip.MustParseAddr(target), SenderMAC: askerMAC}
}

// The layouts of RFC 826, byte by byte.
func TestARP(t *testing.T) {
	q := question("10.1.2.3", "10.9.8.7")
	want := unhex(t, `00 01 08 00 06 04 00 01  02 09 08 07 06 05  0a 01 02 03  00 00 00 00 00 00  0a 09 08 07`)
	request := AppendARPRequest(nil, q)
	if !bytes.Equal(request, want) {
		t.Errorf("request % x", request)
	}
	if got, ok := ParseARPRequest(append(request, "padding"...)); !ok || got != q {
		t.Errorf("parsed %+v, %v", got, ok)
	}
	want = unhex(t, `00 01 08 00 06 04 00 02  02 01 02 03 04 05  0a 09 08 07  02 09 08 07 06 05  0a 01 02 03`)
	reply := AppendARPReply(nil, q, ownMAC)
	if !bytes.Equal(reply, want) {
		t.Errorf("reply % x", reply)
	}
	for name, b := range map[string][]byte{
		"a reply": reply, "cut": request[:27], "nothing": nil, "token ring": with(request, 1, 6), "another protocol": with(request, 2, 0x86),
		"long addresses": with(request, 4, 8),
	} {
		if got, ok := ParseARPRequest(b); ok {
			t.Errorf("%s: parsed %+v", name, got)
		}
	}
}

// gopacket, which shares no code with us, reads what is written and writes what is read: RFC 4861 §4.3 and §4.4.
func TestNeighborDiscovery(t *testing.T) {
	q := question("fe80::1", "fd00::12:3456")
	ip := &layers.IPv6{
		Version: 6, HopLimit: 255, NextHeader: layers.IPProtocolICMPv6, SrcIP: net.IP(q.Sender.AsSlice()), DstIP: net.ParseIP("ff02::1:ff12:3456"),
	}
	icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(layers.ICMPv6TypeNeighborSolicitation, 0)}
	ns := &layers.ICMPv6NeighborSolicitation{TargetAddress: net.IP(q.Target.AsSlice()), Options: layers.ICMPv6Options{
		{Type: layers.ICMPv6OptSourceAddress, Data: askerMAC[:]},
	}}
	if err := icmp.SetNetworkLayerForChecksum(ip); err != nil {
		t.Fatal(err)
	}
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, ip, icmp, ns); err != nil {
		t.Fatal(err)
	}
	if got := AppendNeighborSolicit(nil, q); !bytes.Equal(got, buf.Bytes()) {
		t.Errorf("wrote % x\nwant  % x", got, buf.Bytes())
	}
	if got, ok := ParseNeighborSolicit(buf.Bytes()); !ok || got != q {
		t.Errorf("parsed %+v, %v", got, ok)
	}

	advert := AppendNeighborAdvert(nil, q, ownMAC)
	p := gopacket.NewPacket(advert, layers.LayerTypeIPv6, gopacket.Default)
	na, ok := p.Layer(layers.LayerTypeICMPv6NeighborAdvertisement).(*layers.ICMPv6NeighborAdvertisement)
	if !ok || !na.Solicited() || !na.Override() || !na.Router() || !na.TargetAddress.Equal(net.IP(q.Target.AsSlice())) ||
		len(na.Options) != 1 || na.Options[0].Type != layers.ICMPv6OptTargetAddress || !bytes.Equal(na.Options[0].Data, ownMAC[:]) {
		t.Errorf("advertisement %v", p)
	}
	var view IPv6 = advert
	if !ICMPv6(view.Payload()).ChecksumValid(view.SrcBytes(), view.DstBytes()) || view.Dst() != q.Sender || view.Src() != q.Target || view.HopLimit() != 255 {
		t.Errorf("advertisement % x", advert)
	}
}

// What is no solicitation, or comes from a router's distance, is none (RFC 4861 §7.1.1).
func TestNeighborSolicitRefused(t *testing.T) {
	good := AppendNeighborSolicit(nil, question("fe80::1", "fd00::12:3456"))
	remade := func(change func(b []byte)) []byte {
		b := bytes.Clone(good)
		change(b)
		b[42], b[43] = 0, 0
		var p IPv6 = b
		sum := ^Fold(Sum(b[40:], PseudoSum(ProtoICMPv6, p.SrcBytes(), p.DstBytes(), uint32(len(b)-40))))
		b[42], b[43] = byte(sum>>8), byte(sum)
		return b
	}
	if _, ok := ParseNeighborSolicit(remade(func([]byte) {})); !ok {
		t.Fatal("the packet itself is refused")
	}
	for name, b := range map[string][]byte{
		"hop limit":        remade(func(b []byte) { b[7] = 254 }),
		"advertisement":    remade(func(b []byte) { b[40] = 136 }),
		"code":             remade(func(b []byte) { b[41] = 1 }),
		"multicast target": remade(func(b []byte) { b[48] = 0xff }),
		"option of 0":      remade(func(b []byte) { b[65] = 0 }),
		"option too long":  remade(func(b []byte) { b[65] = 2 }),
		"checksum":         with(good, 60, 1),
		"UDP":              remade(func(b []byte) { b[6] = 17 }),
		"cut":              good[:len(good)-1],
		"IPv4":             remade(func(b []byte) { b[0] = 0x45 }),
	} {
		if q, ok := ParseNeighborSolicit(b); ok {
			t.Errorf("%s: parsed %+v", name, q)
		}
	}
	damage.Check(t, good, func(b []byte) error { ParseNeighborSolicit(b); return nil })
	damage.Check(t, AppendARPRequest(nil, question("10.1.2.3", "10.9.8.7")), func(b []byte) error { ParseARPRequest(b); return nil })
}

func TestMAC(t *testing.T) {
	for _, tt := range []struct {
		m              MAC
		text           string
		group, station bool
	}{
		{ownMAC, "02:01:02:03:04:05", false, true},
		{BroadcastMAC, "ff:ff:ff:ff:ff:ff", true, false},
		{MAC{1, 0, 0x5e, 0, 0, 1}, "01:00:5e:00:00:01", true, false},
		{MAC{}, "00:00:00:00:00:00", false, false},
	} {
		if tt.m.String() != tt.text || tt.m.Group() != tt.group || tt.m.Station() != tt.station || tt.m.IsZero() != (tt.m == MAC{}) {
			t.Errorf("%v: group %v, station %v", tt.m, tt.m.Group(), tt.m.Station())
		}
	}
}
