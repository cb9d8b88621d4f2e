package header

import (
	"encoding/binary"
	"net/netip"
)

// Neighbour resolution as a VTEP asks it: ARP for IPv4 over Ethernet (RFC 826), and neighbour discovery for IPv6
// (RFC 4861). Only what one VTEP asks another is read and written: who has an address, and the answer.

// ARPLen is the length in bytes of an ARP message for IPv4 over Ethernet.
const ARPLen = 28

const (
	arpEthernetIPv4 = 0x0001_0800_06_04 // hardware type, protocol type, lengths of both addresses
	arpRequest      = 1
	arpReply        = 2
)

// Solicitation asks who has Target. Sender and SenderMAC are whom to answer; Sender is unspecified when a host looks
// whether Target is free before it takes it (RFC 5227 §2.1, RFC 4862 §5.4.2).
type Solicitation struct {
	Sender, Target netip.Addr
	SenderMAC      MAC
}

// ParseARPRequest reads an ARP request for IPv4 over Ethernet; false for anything else, replies among it.
func ParseARPRequest(b []byte) (s Solicitation, ok bool) {
	if len(b) < ARPLen || binary.BigEndian.Uint64(b) != arpEthernetIPv4<<16|arpRequest {
		return s, false
	}
	return Solicitation{
		SenderMAC: MAC(b[8:]), Sender: netip.AddrFrom4([4]byte(b[14:])), Target: netip.AddrFrom4([4]byte(b[24:])),
	}, true
}

// AppendARPReply appends the answer to s: its target is at mac.
func AppendARPReply(dst []byte, s Solicitation, mac MAC) []byte {
	target, sender := s.Target.As4(), s.Sender.As4()
	dst = binary.BigEndian.AppendUint64(dst, arpEthernetIPv4<<16|arpReply)
	dst = append(dst, mac[:]...)
	dst = append(dst, target[:]...)
	dst = append(dst, s.SenderMAC[:]...)
	return append(dst, sender[:]...)
}

// AppendARPRequest appends the question that s is.
func AppendARPRequest(dst []byte, s Solicitation) []byte {
	target, sender := s.Target.As4(), s.Sender.As4()
	dst = binary.BigEndian.AppendUint64(dst, arpEthernetIPv4<<16|arpRequest)
	dst = append(dst, s.SenderMAC[:]...)
	dst = append(dst, sender[:]...)
	dst = append(dst, make([]byte, len(s.SenderMAC))...)
	return append(dst, target[:]...)
}

// ICMPv6 types and options of neighbour discovery.
const (
	ICMPv6NeighborSolicit = 135
	ICMPv6NeighborAdvert  = 136

	neighborLen      = 24 // type, code, checksum, flags, target
	neighborHops     = 255
	optionSourceLink = 1
	optionTargetLink = 2
	optionLinkLen    = 8
	// advertFlags of the answers here: from a router, solicited, overriding what is known (RFC 4861 §4.4).
	advertFlags = 0xe0
)

// ParseNeighborSolicit reads an IPv6 packet that is a neighbour solicitation (RFC 4861 §4.3 and §7.1.1); false for
// anything else. Without a source link-layer address in it, SenderMAC is zero: then the frame's source is the sender.
func ParseNeighborSolicit(pkt []byte) (s Solicitation, ok bool) {
	if len(pkt) < IPv6Len+neighborLen || pkt[ip6NextHeader] != ProtoICMPv6 || pkt[IPv6Len] != ICMPv6NeighborSolicit {
		return s, false
	}
	p, err := ParseIPv6(pkt)
	if err != nil || p.HopLimit() != neighborHops || len(p.Payload()) < neighborLen {
		return s, false
	}
	m := ICMPv6(p.Payload())
	if m.Code() != 0 || !m.ChecksumValid(p.SrcBytes(), p.DstBytes()) {
		return s, false
	}
	s.Sender, s.Target = p.Src(), netip.AddrFrom16([16]byte(m[8:]))
	if s.Target.IsMulticast() {
		return s, false
	}
	for opts := m[neighborLen:]; len(opts) >= optionLinkLen; {
		n := int(opts[1]) * 8
		if n == 0 || n > len(opts) {
			return s, false
		}
		if opts[0] == optionSourceLink {
			s.SenderMAC = MAC(opts[2:])
		}
		opts = opts[n:]
	}
	return s, true
}

// AppendNeighborAdvert appends the IPv6 packet that answers s: its target is at mac.
func AppendNeighborAdvert(dst []byte, s Solicitation, mac MAC) []byte {
	return appendNeighbor(dst, s.Target, s.Sender, s.Target, ICMPv6NeighborAdvert, advertFlags, optionTargetLink, mac)
}

// AppendNeighborSolicit appends the IPv6 packet that s is, to the target's solicited-node address (RFC 4291 §2.7.1).
func AppendNeighborSolicit(dst []byte, s Solicitation) []byte {
	to := SolicitedNode(s.Target)
	return appendNeighbor(dst, s.Sender, to, s.Target, ICMPv6NeighborSolicit, 0, optionSourceLink, s.SenderMAC)
}

// SolicitedNode is the multicast address at which the owner of an IPv6 address listens for questions about it.
func SolicitedNode(a netip.Addr) netip.Addr {
	b := a.As16()
	return netip.AddrFrom16([16]byte{0: 0xff, 1: 0x02, 11: 1, 12: 0xff, 13: b[13], 14: b[14], 15: b[15]})
}

func appendNeighbor(dst []byte, src, to, target netip.Addr, typ, flags, option byte, mac MAC) []byte {
	dst = AppendIPv6(dst, IPv6Fields{
		Src: src, Dst: to, PayloadLen: neighborLen + optionLinkLen, HopLimit: neighborHops, NextHeader: ProtoICMPv6,
	})
	start := len(dst)
	t := target.As16()
	dst = append(dst, typ, 0, 0, 0, flags, 0, 0, 0)
	dst = append(dst, t[:]...)
	dst = append(dst, option, optionLinkLen/8)
	dst = append(dst, mac[:]...)
	s, d := src.As16(), to.As16()
	m := dst[start:]
	binary.BigEndian.PutUint16(m[2:], ^Fold(Sum(m, PseudoSum(ProtoICMPv6, s[:], d[:], uint32(len(m))))))
	return dst
}
