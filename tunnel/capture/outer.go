package capture

import (
	"net/netip"

	"github.com/tulle-net/tulle/tunnel/header"
)

// Outer describes the outer headers that the kernel writes, or has taken off, on the sockets of the underlay. A capture has
// them as the wire does, but for the fields that only the kernel knows: the IPv4 identification is 0, and a TTL 64.
type Outer struct {
	Src, Dst netip.AddrPort // of one family; ports for UDP only
	Proto    uint8          // 4, 41 or 17
	TOS      byte
}

const (
	maxOuter = header.IPv6Len + header.UDPLen // bytes of the headers
	ttl      = 64
)

// append appends the headers in front of n bytes.
func (o *Outer) append(dst []byte, n int) []byte {
	size := n
	if o.Proto == header.ProtoUDP {
		size += header.UDPLen
	}
	if src, to := o.Src.Addr(), o.Dst.Addr(); src.Is4() {
		dst = header.AppendIPv4(dst, header.IPv4Fields{Src: src, Dst: to, PayloadLen: size, FlagsFrag: header.IPv4FlagDF, TOS: o.TOS, TTL: ttl, Proto: o.Proto})
	} else {
		dst = header.AppendIPv6(dst, header.IPv6Fields{Src: src, Dst: to, PayloadLen: size, TrafficClass: o.TOS, HopLimit: ttl, NextHeader: o.Proto})
	}
	if o.Proto == header.ProtoUDP {
		dst = header.AppendUDPHeader(dst, o.Src.Port(), o.Dst.Port(), n)
	}
	return dst
}

// finish writes the UDP checksum of a packet that append began and that is complete.
func (o *Outer) finish(pkt []byte) {
	if o.Proto != header.ProtoUDP {
		return
	}
	if src, to := o.Src.Addr(), o.Dst.Addr(); src.Is4() {
		s, d := src.As4(), to.As4()
		header.UDP(pkt[header.IPv4MinLen:]).SetChecksum(s[:], d[:])
	} else {
		s, d := src.As16(), to.As16()
		header.UDP(pkt[header.IPv6Len:]).SetChecksum(s[:], d[:])
	}
}
