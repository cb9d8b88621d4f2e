package encap

import "github.com/tulle-net/tulle/tunnel/header"

// UnwrapRaw4 takes the inner packet out of what a raw IPv4 socket for protocol 4 or
// 41 reads: the outer header and what follows (Linux net/ipv4/raw.c). tos is the
// outer TOS byte. inner is a slice of packet, at least one byte long, of the family
// that the protocol announces. [DropMalformed] for a broken outer header or the
// wrong family, [DropBadEncap] for another protocol.
func UnwrapRaw4(packet []byte) (inner []byte, tos byte, d Drop) {
	p, err := header.ParseIPv4(packet)
	if err != nil || p.MF() || p.FragmentOffset() != 0 {
		return nil, 0, DropMalformed
	}
	proto := p.Proto()
	if proto != header.ProtoIPv4 && proto != header.ProtoIPv6 {
		return nil, p.TOS(), DropBadEncap
	}
	inner, d = checkVersion(p.Payload(), proto)
	return inner, p.TOS(), d
}

// UnwrapRaw6 does the same for a raw IPv6 socket for protocol proto, 4 or 41. Such a
// socket reads no outer header (RFC 3542 §3): the traffic class comes as a control
// message.
func UnwrapRaw6(payload []byte, proto uint8) (inner []byte, d Drop) {
	if proto != header.ProtoIPv4 && proto != header.ProtoIPv6 {
		return nil, DropBadEncap
	}
	return checkVersion(payload, proto)
}

// WrapIPIP appends the whole outer packet for mode IPIP: IP with protocol 4 (RFC 2003)
// or 41 (RFC 2473, 4213), inner. The data path lets the kernel write the outer
// header; this is for captures and tests.
func WrapIPIP(dst []byte, o *Outer, inner []byte) ([]byte, error) {
	proto, err := innerProto(inner)
	if err != nil {
		return dst, err
	}
	dst, err = o.appendIP(dst, proto, len(inner))
	if err != nil {
		return dst, err
	}
	return append(dst, inner...), nil
}
