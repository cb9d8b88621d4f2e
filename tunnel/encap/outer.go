package encap

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/tulle-net/tulle/tunnel/header"
)

// OuterTTL is the TTL or hop limit of every outer packet.
const OuterTTL = 64

// Outer describes the outer headers of the Wrap functions.
type Outer struct {
	Src, Dst netip.AddrPort // of one family; ports for UDP only
	ID       uint16         // IPv4 identification
	TOS      byte           // see OuterTOS
	FlowHash uint32         // becomes the IPv6 flow label
}

// ErrNoIP: what is to be wrapped is neither IPv4 nor IPv6.
var ErrNoIP = errors.New("encap: inner packet is neither IPv4 nor IPv6")

// innerProto is the protocol number for an inner packet: 4 or 41.
func innerProto(inner []byte) (uint8, error) {
	if len(inner) > 0 {
		switch inner[0] >> 4 {
		case 4:
			return header.ProtoIPv4, nil
		case 6:
			return header.ProtoIPv6, nil
		}
	}
	return 0, ErrNoIP
}

// appendIP appends the outer IP header, with DF for IPv4: the underlay must never
// fragment silently.
func (o *Outer) appendIP(dst []byte, proto uint8, payloadLen int) ([]byte, error) {
	src, to := o.Src.Addr(), o.Dst.Addr()
	switch {
	case src.Is4() && to.Is4():
		if header.IPv4MinLen+payloadLen > header.IPv4MaxTotalLen {
			return dst, fmt.Errorf("encap: %d bytes do not fit into an IPv4 packet", payloadLen)
		}
		return header.AppendIPv4(dst, header.IPv4Fields{
			Src: src, Dst: to, PayloadLen: payloadLen, ID: o.ID,
			FlagsFrag: header.IPv4FlagDF, TOS: o.TOS, TTL: OuterTTL, Proto: proto,
		}), nil
	case src.Is6() && to.Is6():
		if payloadLen > header.IPv6MaxPayloadLen {
			return dst, fmt.Errorf("encap: %d bytes do not fit into an IPv6 packet", payloadLen)
		}
		return header.AppendIPv6(dst, header.IPv6Fields{
			Src: src, Dst: to, PayloadLen: payloadLen, FlowLabel: o.FlowHash,
			TrafficClass: o.TOS, HopLimit: OuterTTL, NextHeader: proto,
		}), nil
	}
	return dst, fmt.Errorf("encap: outer addresses %v and %v are not of one family", src, to)
}
