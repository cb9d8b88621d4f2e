package encap

import (
	"net/netip"

	"github.com/tulle-net/tulle/tunnel/header"
)

// ProbePort is the UDP destination port of probes, and inside an encapsulation also
// their source port.
const ProbePort = 6080

// AppendProbe appends a probe to b: an IP packet of size bytes, or as few as payload
// needs, padded with zeros behind payload.
func AppendProbe(b []byte, src, dst netip.Addr, payload []byte, size int) []byte {
	return AppendProbeFrom(b, netip.AddrPortFrom(src, ProbePort), dst, payload, size)
}

// AppendProbeFrom is AppendProbe with another source port, which receivers do not look at.
func AppendProbeFrom(b []byte, from netip.AddrPort, dst netip.Addr, payload []byte, size int) []byte {
	src := from.Addr()
	ipLen := header.IPv4MinLen
	if src.Is6() {
		ipLen = header.IPv6Len
	}
	body := make([]byte, max(len(payload), min(size, 65535)-ipLen-header.UDPLen))
	copy(body, payload)
	if src.Is4() {
		b = header.AppendIPv4(b, header.IPv4Fields{
			Src: src, Dst: dst, PayloadLen: header.UDPLen + len(body), FlagsFrag: header.IPv4FlagDF, TTL: 64, Proto: header.ProtoUDP,
		})
	} else {
		b = header.AppendIPv6(b, header.IPv6Fields{
			Src: src, Dst: dst, PayloadLen: header.UDPLen + len(body), HopLimit: 64, NextHeader: header.ProtoUDP,
		})
	}
	return header.AppendUDP(b, from, netip.AddrPortFrom(dst, ProbePort), body)
}
