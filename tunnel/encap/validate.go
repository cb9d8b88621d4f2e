package encap

import (
	"net/netip"

	"github.com/tulle-net/tulle/tunnel/header"
)

// Validator is the interface of [Validate] to the engine's tables, for one sending peer.
// Its methods run for every packet: they must not allocate, block or keep their
// arguments. IPv4-mapped IPv6 addresses are passed unchanged and belong to nobody.
type Validator interface {
	// OwnPort reports a UDP port of our own encapsulations, and Underlay an underlay address,
	// a member's (or external peer's) or this node's: together, a tunnel in the tunnel.
	OwnPort(port uint16) bool
	Underlay(dst netip.Addr) bool
	// Ours reports a source that only this node may send from.
	Ours(src netip.Addr) bool
	// MaySend reports whether src is the sending peer's: its prefixes, its tun address.
	MaySend(src netip.Addr) bool
	// Accepts reports whether we deliver to dst.
	Accepts(dst netip.Addr) bool
}

// Validate makes the checks 3 to 9 of the decapsulation on an inner packet, in this
// order, and reports the first that fails:
//
//	DropMalformed            it does not parse; trailing bytes are cut
//	DropNested               inner protocol 4 or 41, or our own port, toward an underlay address
//	DropTTLZero              TTL 0
//	DropSourceInvalid        source multicast, loopback, unspecified, reserved or ours
//	DropSourceNotSenders     source is not the sending peer's
//	DropDestinationNotOurs   destination is not ours
//	DropECN                  RFC 6040's drop cell
//
// pkt is b cut to the packet's length, its ECN field combined with the outer one and
// its IPv4 header checksum updated; in describes it. b is unchanged on a drop.
func Validate[V Validator](b []byte, in *header.Inner, outerTOS byte, v V) (pkt []byte, d Drop) {
	if header.ParseInner(b, in) != nil {
		return nil, DropMalformed
	}
	if tunnels(in, v) && v.Underlay(in.Dst) {
		return nil, DropNested
	}
	if in.TTL == 0 {
		return nil, DropTTLZero
	}
	if header.SourceInvalid(in.Src) || v.Ours(in.Src) {
		return nil, DropSourceInvalid
	}
	if !v.MaySend(in.Src) {
		return nil, DropSourceNotSenders
	}
	if !v.Accepts(in.Dst) {
		return nil, DropDestinationNotOurs
	}
	pkt = b[:in.Length:in.Length]
	if d := ApplyECN(pkt, in, outerTOS); d != DropNone {
		return nil, d
	}
	return pkt, DropNone
}

// tunnels reports IP in IP, which is known in a later fragment as well, and UDP to a port of ours. Between pods that is
// theirs to do: load balancers that answer directly, for instance, send IP in IP to pods.
func tunnels[V Validator](in *header.Inner, v V) bool {
	switch in.Proto {
	case header.ProtoIPv4, header.ProtoIPv6:
		return true
	case header.ProtoUDP:
		return in.HasPorts && v.OwnPort(in.DstPort)
	}
	return false
}
