package tunnel

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
)

// What really goes over the wire is what tunnel/encap writes, byte for byte, for each encapsulation and pair of families;
// only the IPv4 ID, the IPv6 flow label and the UDP source port are the kernel's or the flow's choice.
func TestGoldenOnTheWire(t *testing.T) {
	eachLink(t, func(t *testing.T, l testLink) {
		a, b := startPair(t, l)
		features(t, a.ns, "eth0", false, featureChecksum) // or checksums are never written
		host, wire, far := a.tap(t, "tun0"), b.tap(t, "eth0"), b.tap(t, "tun0")
		for f := range 2 {
			t.Run("inner "+familyName(f == 1), func(t *testing.T) {
				host.t, wire.t, far.t = t, t, t
				ports := map[uint16]bool{}
				for flow := range uint16(40) {
					var first []byte
					for n := range 3 {
						d := datagram{
							src: a.pod(f), dst: b.pod(f), sport: 20000 + flow, dport: 9, ttl: 63, tos: 0xb8 | byte(flow%3), // EF, not CE
							payload: fmt.Appendf(nil, "flow %d packet %d", flow, n),
						}
						inner := d.bytes(t)
						host.emit(inner)
						got := wire.next("the outer packet", func(pkt []byte) bool { return bytes.HasSuffix(pkt, inner) })
						checkGolden(t, l, a.under, b.under, got, inner)
						if first == nil {
							first = got
						}
						checkSameFlow(t, l, first, got)
						if l.mode != encap.IPIP {
							ports[binary.BigEndian.Uint16(got[outerHeader(l):])] = true
						}
						if in := far.next("the inner packet", carries(string(d.payload))); !bytes.Equal(in, inner) {
							t.Fatalf("arrived\n% x, sent\n% x", in, inner)
						}
					}
				}
				if l.mode != encap.IPIP && len(ports) < 4 {
					t.Errorf("40 flows share %d source ports: nothing spreads them over equal-cost paths", len(ports))
				}
			})
		}
	})
}

// outerHeader is the length of the outer IP header.
func outerHeader(l testLink) int {
	if l.underlay6 {
		return header.IPv6Len
	}
	return header.IPv4MinLen
}

// checkGolden compares an outer packet with what encap writes for the same ID, flow label and source port.
func checkGolden(t *testing.T, l testLink, src, dst netip.Addr, got, inner []byte) {
	t.Helper()
	var in header.Inner
	must(t, header.ParseInner(inner, &in))
	o := encap.Outer{TOS: in.TOS, Src: netip.AddrPortFrom(src, 0), Dst: netip.AddrPortFrom(dst, 0)}
	if l.dscp0 {
		o.TOS &= header.ECNMask
	}
	if l.underlay6 {
		o.FlowHash = binary.BigEndian.Uint32(got) & 0xfffff
	} else {
		o.ID = binary.BigEndian.Uint16(got[4:])
	}
	wrap := encap.WrapIPIP
	if l.mode != encap.IPIP {
		port := binary.BigEndian.Uint16(got[outerHeader(l):])
		if port < encap.FirstSourcePort || port > encap.LastSourcePort {
			t.Errorf("source port %d is not within %d and %d", port, encap.FirstSourcePort, encap.LastSourcePort)
		}
		o.Src, o.Dst = netip.AddrPortFrom(src, port), netip.AddrPortFrom(dst, 6080)
		wrap = encap.WrapUDP
		if l.mode == encap.VXLAN {
			o.Dst = netip.AddrPortFrom(dst, testVXLANPort)
			wrap = func(b []byte, o *encap.Outer, inner []byte) ([]byte, error) {
				return encap.WrapVXLAN(b, o, testVNI, macOf(1), macOf(0), inner)
			}
		}
		if sum := got[outerHeader(l)+6:][:2]; sum[0]|sum[1] == 0 {
			t.Error("no UDP checksum")
		}
	}
	want, err := wrap(nil, &o, inner)
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Fatalf("on the wire:\n% x, want\n% x", got, want)
	}
}

// checkSameFlow requires that routers see the packets as one flow.
func checkSameFlow(t *testing.T, l testLink, first, got []byte) {
	t.Helper()
	if l.mode != encap.IPIP && !slices.Equal(first[outerHeader(l):][:2], got[outerHeader(l):][:2]) {
		t.Error("the source port changed within a flow")
	}
	if l.underlay6 && !slices.Equal(first[:4], got[:4]) {
		t.Error("the flow label changed within a flow")
	}
}

// The outer DSCP is the inner one's copy or 0, by configuration; the ECN field is copied always.
func TestOuterDSCP(t *testing.T) {
	for _, l := range allLinks() {
		l.dscp0 = true
		t.Run(l.String(), func(t *testing.T) {
			a, b := startPair(t, l)
			features(t, a.ns, "eth0", false, featureChecksum)
			host, wire := a.tap(t, "tun0"), b.tap(t, "eth0")
			for f := range 2 {
				for _, tos := range []byte{0, 0xb8, 0xb9, 0xba, 0xbb, 0xff} {
					inner := datagram{src: a.pod(f), dst: b.pod(f), sport: 1, dport: 9, tos: tos, payload: []byte("DSCP")}.bytes(t)
					host.emit(inner)
					got := wire.next("the outer packet", func(pkt []byte) bool { return bytes.HasSuffix(pkt, inner) })
					checkGolden(t, l, a.under, b.under, got, inner)
				}
			}
		})
	}
}
