package header

import (
	"encoding/binary"
	"net/netip"
)

// Inner is what forwarding needs to know of one IP packet, filled by [ParseInner].
// It holds no reference to the packet and may be reused for the next one.
type Inner struct {
	Src, Dst  netip.Addr // of the family that Version says; IPv4-mapped addresses are not unmapped
	HeaderLen int        // bytes up to the upper-layer header: options and IPv6 extension headers included
	Length    int        // total length of the packet in bytes; what the buffer holds beyond it is padding

	// SrcPort and DstPort are those of TCP, UDP, SCTP or UDP-Lite; 0 unless HasPorts.
	SrcPort, DstPort uint16

	Version uint8 // 4 or 6
	Proto   uint8 // upper-layer protocol, behind the extension headers
	TTL     uint8 // or hop limit
	TOS     uint8 // or traffic class: DSCP and ECN

	DF       bool // IPv4's Don't Fragment; always true for IPv6, which no router fragments
	HasPorts bool // the packet holds the ports: not a later fragment, and long enough

	// Fragment is true for every fragment, FirstFragment for that at offset 0. Both
	// are false for a whole packet, also one with an IPv6 "atomic" fragment header
	// (RFC 6946).
	Fragment, FirstFragment bool

	// fragProto is the protocol that all fragments of one packet agree on: behind
	// an IPv6 fragment header the first fragment may hold more extension headers,
	// which the later ones cannot show.
	fragProto uint8
}

// LaterFragment reports a fragment without the upper-layer header.
func (in *Inner) LaterFragment() bool { return in.Fragment && !in.FirstFragment }

// SrcBytes is the source address of b, 4 or 16 bytes in place. b has to be the
// packet that in was parsed from.
func (in *Inner) SrcBytes(b []byte) []byte {
	if in.Version == 4 {
		return b[ip4Src : ip4Src+4]
	}
	return b[ip6Src : ip6Src+16]
}

// DstBytes is the destination address of b, as SrcBytes.
func (in *Inner) DstBytes(b []byte) []byte {
	if in.Version == 4 {
		return b[ip4Dst : ip4Dst+4]
	}
	return b[ip6Dst : ip6Dst+16]
}

// Payload is the upper-layer header and data of b, cut to the packet's length.
func (in *Inner) Payload(b []byte) []byte { return b[in.HeaderLen:in.Length] }

// ParseInner reads the IP packet at the start of b in one pass and without
// allocation. b may be longer than the packet: in.Length says where it ends.
//
// It refuses, with one of this package's errors: a truncated packet, a version
// other than 4 and 6, an IHL or a length that contradicts itself, a fragment that
// reaches beyond 65535 bytes, and IPv6 extension headers that do not fit into the
// packet (RFC 7112 wants the whole chain in the first fragment) or are more than
// 16. Checksums are not looked at: the receiving kernel does that. After an error
// in holds nothing of use.
func ParseInner(b []byte, in *Inner) error {
	if len(b) < IPv4MinLen {
		return ErrTruncated
	}
	switch b[0] >> 4 {
	case 4:
		return parseInner4(b, in)
	case 6:
		return parseInner6(b, in)
	}
	return ErrVersion
}

func parseInner4(b []byte, in *Inner) error {
	_ = b[IPv4MinLen-1]
	hlen := int(b[ip4VersionIHL]&0x0f) * 4
	total := int(binary.BigEndian.Uint16(b[ip4TotalLen:]))
	if hlen < IPv4MinLen {
		return ErrHeaderLen
	}
	if total < hlen {
		return ErrTotalLen
	}
	if total > len(b) {
		return ErrTruncated
	}
	ff := binary.BigEndian.Uint16(b[ip4FlagsFrag:])
	proto := b[ip4Proto]
	in.Src = netip.AddrFrom4([4]byte(b[ip4Src:]))
	in.Dst = netip.AddrFrom4([4]byte(b[ip4Dst:]))
	in.HeaderLen, in.Length = hlen, total
	in.Version, in.Proto, in.fragProto = 4, proto, proto
	in.TTL, in.TOS = b[ip4TTL], b[ip4TOS]
	in.DF = ff&IPv4FlagDF != 0
	in.Fragment, in.FirstFragment = false, false
	if ff&(IPv4FlagMF|ip4FragOffMask) != 0 {
		off := int(ff&ip4FragOffMask) * 8
		if off+total-hlen > IPv4MaxTotalLen-IPv4MinLen {
			return ErrFragment
		}
		in.Fragment, in.FirstFragment = true, off == 0
		if off != 0 {
			in.SrcPort, in.DstPort, in.HasPorts = 0, 0, false
			return nil
		}
	}
	in.ports(b[:total], hlen, proto)
	return nil
}

func parseInner6(b []byte, in *Inner) error {
	if len(b) < IPv6Len {
		return ErrTruncated
	}
	total := IPv6Len + int(binary.BigEndian.Uint16(b[ip6PayloadLen:]))
	if total > len(b) {
		return ErrTruncated
	}
	next := b[ip6NextHeader]
	in.Src = netip.AddrFrom16([16]byte(b[ip6Src:]))
	in.Dst = netip.AddrFrom16([16]byte(b[ip6Dst:]))
	in.HeaderLen, in.Length = IPv6Len, total
	in.Version, in.Proto, in.fragProto = 6, next, next
	in.TTL = b[ip6HopLimit]
	in.TOS = uint8(binary.BigEndian.Uint16(b[ip6VersionClass:]) >> 4)
	in.DF = true
	in.Fragment, in.FirstFragment = false, false
	if isExtension(next) {
		return parseExtensions(b[:total], in)
	}
	in.ports(b[:total], IPv6Len, next)
	return nil
}

// isExtension reports an IPv6 extension header that can be walked over (IANA "IPv6
// Extension Header Types"; ESP hides what follows and so counts as a protocol).
func isExtension(next uint8) bool {
	switch next {
	case ProtoHopByHop, ProtoRouting, ProtoFragment, ProtoAH, ProtoDestOpts,
		ProtoMobility, ProtoHIP, ProtoShim6:
		return true
	}
	return false
}

// parseExtensions walks from the fixed header of b, cut to its length, to the
// upper-layer header (RFC 8200 §4).
func parseExtensions(b []byte, in *Inner) error {
	off, next := IPv6Len, in.Proto
	for range maxExtensions {
		if !isExtension(next) {
			in.HeaderLen, in.Proto = off, next
			if !in.Fragment {
				in.fragProto = next
			}
			in.ports(b, off, next)
			return nil
		}
		if len(b)-off < 8 {
			return ErrExtensions
		}
		h := b[off : off+8]
		n := (int(h[1]) + 1) * 8
		switch next {
		case ProtoFragment:
			n = IPv6FragmentLen
			field := binary.BigEndian.Uint16(h[2:])
			fragOff, more := int(field&^7), field&1 != 0
			if fragOff != 0 || more {
				if fragOff+len(b)-off-n > IPv6MaxPayloadLen {
					return ErrFragment
				}
				if !in.Fragment {
					in.fragProto = h[0]
				}
				in.Fragment, in.FirstFragment = true, fragOff == 0
			}
			if fragOff != 0 { // what follows is the middle of something
				in.HeaderLen, in.Proto = off+n, h[0]
				in.SrcPort, in.DstPort, in.HasPorts = 0, 0, false
				return nil
			}
		case ProtoAH:
			n = (int(h[1]) + 2) * 4 // RFC 4302 §2.2
		}
		if n > len(b)-off {
			return ErrExtensions
		}
		next = h[0]
		off += n
	}
	return ErrExtensions
}

// ports reads the ports of the upper-layer header at off of b, the whole packet.
func (in *Inner) ports(b []byte, off int, proto uint8) {
	switch proto {
	case ProtoTCP, ProtoUDP, ProtoSCTP, ProtoUDPLite:
		if len(b)-off >= 4 {
			p := binary.BigEndian.Uint32(b[off:])
			in.SrcPort, in.DstPort, in.HasPorts = uint16(p>>16), uint16(p), true
			return
		}
	}
	in.SrcPort, in.DstPort, in.HasPorts = 0, 0, false
}
