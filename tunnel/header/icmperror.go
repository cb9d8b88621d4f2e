package header

import (
	"encoding/binary"
	"net/netip"
)

// ICMPKind is an ICMP error that the tunnel sends to the source of an inner packet.
type ICMPKind uint8

// The errors. NetUnreachable: nobody owns the destination. HostUnreachable: its
// owner cannot be reached. TooBig: the packet exceeds the path's MTU.
const (
	NetUnreachable ICMPKind = iota
	HostUnreachable
	TooBig
)

// String is the name of k.
func (k ICMPKind) String() string {
	switch k {
	case NetUnreachable:
		return "net unreachable"
	case HostUnreachable:
		return "host unreachable"
	case TooBig:
		return "too big"
	}
	return "unknown"
}

// How much of the offending packet an error quotes, in bytes.
const (
	icmp4MaxQuote = 576 - IPv4MinLen - ICMPHeaderLen     // RFC 1812 §4.3.2.3: 548
	icmp6MaxQuote = IPv6MinMTU - IPv6Len - ICMPHeaderLen // RFC 4443 §2.4(c): 1232
	icmpTTL       = 64                                   // RFC 1700
	icmp4TOS      = 0xc0                                 // internetwork control, RFC 1812 §4.3.2.5
)

// ICMPErrorMaxLen bounds what AppendICMPError appends, in bytes.
const ICMPErrorMaxLen = IPv6MinMTU

// AppendICMPError appends a complete IP packet: the ICMP error kind from src to the
// source of orig, quoting the start of orig (IPv4: up to 548 bytes, RFC 1812
// §4.3.2.3; IPv6: as much as keeps the packet within 1,280 bytes, RFC 4443 §2.4). mtu, in
// bytes, is used by TooBig only (RFC 1191 §4, RFC 4443 §3.2) and never below the
// family's minimum. It returns dst unchanged when orig is not an IP packet or src is of
// the other family. The caller checks with [MayAnswer] whether an error may be sent at all.
func AppendICMPError(dst []byte, orig []byte, src netip.Addr, kind ICMPKind, mtu int) []byte {
	var in Inner
	if ParseInner(orig, &in) != nil {
		return dst
	}
	return appendICMPError(dst, orig[:in.Length], &in, src, kind, mtu)
}

func appendICMPError(dst, orig []byte, in *Inner, src netip.Addr, kind ICMPKind, mtu int) []byte {
	switch {
	case in.Version == 4 && src.Is4():
		return appendICMPv4Error(dst, orig, src, in.Src, kind, mtu)
	case in.Version == 6 && src.Is6():
		return appendICMPv6Error(dst, orig, src, in.Src, kind, mtu)
	}
	return dst
}

func appendICMPv4Error(dst, orig []byte, src, to netip.Addr, kind ICMPKind, mtu int) []byte {
	quote := orig[:min(len(orig), icmp4MaxQuote)]
	dst = AppendIPv4(dst, IPv4Fields{
		Src: src, Dst: to, PayloadLen: ICMPHeaderLen + len(quote),
		FlagsFrag: IPv4FlagDF, TOS: icmp4TOS, TTL: icmpTTL, Proto: ProtoICMP,
	})
	code, rest := uint8(ICMPv4CodeNet), uint32(0)
	switch kind {
	case HostUnreachable:
		code = ICMPv4CodeHost
	case TooBig:
		code, rest = ICMPv4CodeFragNeeded, uint32(min(max(mtu, icmp4MinMTU), IPv4MaxTotalLen))
	}
	start := len(dst)
	dst = append(dst, ICMPv4DstUnreachable, code, 0, 0)
	dst = binary.BigEndian.AppendUint32(dst, rest)
	dst = append(dst, quote...)
	binary.BigEndian.PutUint16(dst[start+2:], Checksum(dst[start:]))
	return dst
}

// icmp4MinMTU is the least MTU of an IPv4 link (RFC 791 §3.2).
const icmp4MinMTU = 68

func appendICMPv6Error(dst, orig []byte, src, to netip.Addr, kind ICMPKind, mtu int) []byte {
	quote := orig[:min(len(orig), icmp6MaxQuote)]
	dst = AppendIPv6(dst, IPv6Fields{
		Src: src, Dst: to, PayloadLen: ICMPHeaderLen + len(quote),
		HopLimit: icmpTTL, NextHeader: ProtoICMPv6,
	})
	typ, code, rest := uint8(ICMPv6DstUnreachable), uint8(ICMPv6CodeNoRoute), uint32(0)
	switch kind {
	case HostUnreachable:
		code = ICMPv6CodeAddrUnreach
	case TooBig:
		typ, rest = ICMPv6PacketTooBig, uint32(max(mtu, IPv6MinMTU))
	}
	start := len(dst)
	dst = append(dst, typ, code, 0, 0)
	dst = binary.BigEndian.AppendUint32(dst, rest)
	dst = append(dst, quote...)
	m := dst[start:]
	s, d := src.As16(), to.As16()
	sum := PseudoSum(ProtoICMPv6, s[:], d[:], uint32(len(m)))
	binary.BigEndian.PutUint16(m[2:], ^Fold(Sum(m, sum)))
	return dst
}

// AppendRelayedError is AppendICMPError about a packet of which only the beginning is known: as much as a router quoted of it
// (RFC 2003 §4). It returns dst unchanged when [MayAnswer] allows no answer.
func AppendRelayedError(dst, quote []byte, src netip.Addr, kind ICMPKind) []byte {
	var in Inner
	if ParseQuote(quote, &in) != nil || !mayAnswer(quote, &in) {
		return dst
	}
	return appendICMPError(dst, quote[:in.Length], &in, src, kind, 0)
}

// ParseQuote is [ParseInner] of the beginning of a packet, of which it looks at no more than IPv6's least MTU. in.Length is the number of bytes
// that are there.
func ParseQuote(quote []byte, in *Inner) error {
	var room [IPv6MinMTU]byte
	b := room[:copy(room[:], quote)]
	switch {
	case len(b) >= IPv4MinLen && b[0]>>4 == 4:
		total := int(binary.BigEndian.Uint16(b[ip4TotalLen:]))
		binary.BigEndian.PutUint16(b[ip4TotalLen:], uint16(min(total, len(b))))
	case len(b) >= IPv6Len && b[0]>>4 == 6:
		payload := int(binary.BigEndian.Uint16(b[ip6PayloadLen:]))
		binary.BigEndian.PutUint16(b[ip6PayloadLen:], uint16(min(payload, len(b)-IPv6Len)))
	}
	return ParseInner(b, in)
}

// MayAnswer reports whether an ICMP error about orig may be sent (RFC 1122 §3.2.2,
// RFC 1812 §4.3.2.7, RFC 4443 §2.4(e)): orig is a well-formed IP packet, no ICMP error
// or redirect, no later fragment, its source is one host that can be answered –
// not unspecified, loopback, multicast, broadcast, reserved or link-local – and its
// destination is neither multicast, broadcast nor link-local.
func MayAnswer(orig []byte) bool {
	var in Inner
	return ParseInner(orig, &in) == nil && mayAnswer(orig, &in)
}

func mayAnswer(orig []byte, in *Inner) bool {
	if in.LaterFragment() {
		return false
	}
	if SourceInvalid(in.Src) || in.Src.IsLinkLocalUnicast() {
		return false
	}
	if in.Dst.IsMulticast() || in.Dst.IsLinkLocalUnicast() || isBroadcast(in.Dst) {
		return false
	}
	payload := in.Payload(orig)
	switch {
	case in.Version == 4 && in.Proto == ProtoICMP:
		return len(payload) >= 1 && !icmp4IsError(payload[0])
	case in.Version == 6 && in.Proto == ProtoICMPv6:
		return len(payload) >= 1 && !icmp6IsError(payload[0])
	}
	return true
}

// SourceInvalid reports an address that no packet on a network may come from:
// unspecified (all of 0.0.0.0/8, RFC 1122 §3.2.1.3), loopback, multicast, IPv4's
// reserved space with the limited broadcast (240.0.0.0/4), and IPv4-mapped IPv6
// (which Linux drops too, net/ipv6/ip6_input.c).
func SourceInvalid(a netip.Addr) bool {
	if a.Is4() {
		first := a.As4()[0]
		return first == 0 || first == 127 || first >= 224
	}
	return !a.IsValid() || a.Is4In6() || a.IsMulticast() || a.IsUnspecified() || a.IsLoopback()
}

func isBroadcast(a netip.Addr) bool { return a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) }
