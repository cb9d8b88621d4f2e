package encap

import (
	"github.com/tulle-net/tulle/tunnel/header"
)

// Source ports of the outer UDP header: IANA's dynamic range, 14 bits.
const (
	FirstSourcePort = 49152
	LastSourcePort  = 65535
)

// SourcePort maps a flow's hash to an outer source port in 49152–65535 (RFC 7348 §5
// recommends the same for VXLAN), so that ECMP and NIC queues spread flows.
func SourcePort(hash uint32) uint16 { return FirstSourcePort | uint16(hash>>18) }

// UnwrapUDP takes the inner packet out of the payload of an outer UDP datagram: GUE
// variant 1 (the payload is the inner packet) and variant 0 with protocol 4 or 41
// and nothing optional. inner is a slice of payload, at least one byte long, its
// version nibble agreeing with the encapsulation; the rest is for [Shape] to check.
// [DropBadEncap] or [DropMalformed] otherwise.
func UnwrapUDP(payload []byte) (inner []byte, d Drop) {
	// The first nibble decides the common case without a call.
	if len(payload) > 0 {
		if v := payload[0] >> 4; v == 4 || v == 6 {
			return payload, DropNone
		}
	}
	return unwrapGUE0(payload)
}

func unwrapGUE0(payload []byte) (inner []byte, d Drop) {
	g, err := header.ParseGUE(payload)
	switch err {
	case nil:
	case header.ErrTruncated:
		return nil, DropMalformed
	default:
		return nil, DropBadEncap
	}
	return checkVersion(g.Payload(), g.Proto())
}

// checkVersion refuses an inner packet that is not of the family proto announces.
func checkVersion(inner []byte, proto uint8) ([]byte, Drop) {
	if got, err := innerProto(inner); err != nil || got != proto {
		return nil, DropMalformed
	}
	return inner, DropNone
}

// WrapUDP appends the whole outer packet for mode UDP, GUE variant 1: IP, UDP with its
// checksum, inner. The data path lets the kernel write the outer headers; this is
// for captures and tests.
func WrapUDP(dst []byte, o *Outer, inner []byte) ([]byte, error) {
	if _, err := innerProto(inner); err != nil {
		return dst, err
	}
	return wrapUDP(dst, o, nil, inner)
}

// WrapGUE0 is WrapUDP with a GUE variant 0 header, as a Linux fou port sends it.
func WrapGUE0(dst []byte, o *Outer, inner []byte) ([]byte, error) {
	proto, err := innerProto(inner)
	if err != nil {
		return dst, err
	}
	var gue [header.GUELen]byte
	return wrapUDP(dst, o, header.AppendGUE(gue[:0], proto), inner)
}

// wrapUDP appends an outer UDP packet; head is what the encapsulation puts in front of the inner packet.
func wrapUDP(dst []byte, o *Outer, head, inner []byte) ([]byte, error) {
	dst, err := o.appendIP(dst, header.ProtoUDP, header.UDPLen+len(head)+len(inner))
	if err != nil {
		return dst, err
	}
	start := len(dst)
	dst = header.AppendUDPHeader(dst, o.Src.Port(), o.Dst.Port(), len(head)+len(inner))
	dst = append(dst, head...)
	dst = append(dst, inner...)
	u := header.UDP(dst[start:])
	if o.Src.Addr().Is4() {
		s, d := o.Src.Addr().As4(), o.Dst.Addr().As4()
		u.SetChecksum(s[:], d[:])
	} else {
		s, d := o.Src.Addr().As16(), o.Dst.Addr().As16()
		u.SetChecksum(s[:], d[:])
	}
	return dst, nil
}
