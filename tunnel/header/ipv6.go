package header

import (
	"encoding/binary"
	"net/netip"
)

// Offsets of the IPv6 header's fields (RFC 8200 §3).
const (
	ip6VersionClass = 0 // version, traffic class, flow label: 4 + 8 + 20 bits
	ip6PayloadLen   = 4
	ip6NextHeader   = 6
	ip6HopLimit     = 7
	ip6Src          = 8
	ip6Dst          = 24
)

// Sizes of IPv6 in bytes.
const (
	IPv6Len           = 40    // fixed header
	IPv6MaxPayloadLen = 65535 // without a jumbo option, RFC 8200 §3
	IPv6FragmentLen   = 8     // Fragment header, RFC 8200 §4.5
	IPv6MinMTU        = 1280  // RFC 8200 §5
)

// maxExtensions bounds the walk over IPv6 extension headers. RFC 8200 §4.1 names
// seven, RFC 8504 §5.3 lets a node refuse more than it expects.
const maxExtensions = 16

// IPv6 is a view of an IPv6 packet: header, extension headers and payload.
type IPv6 []byte

// ParseIPv6 checks version and payload length and returns the packet cut to its
// own length. Extension headers are not looked at: see [ParseInner].
func ParseIPv6(b []byte) (IPv6, error) {
	if len(b) < IPv6Len {
		return nil, ErrTruncated
	}
	if b[ip6VersionClass]>>4 != 6 {
		return nil, ErrVersion
	}
	total := IPv6Len + int(binary.BigEndian.Uint16(b[ip6PayloadLen:]))
	if total > len(b) {
		return nil, ErrTruncated
	}
	return IPv6(b[:total:total]), nil
}

// Version is 6 in a valid header.
func (p IPv6) Version() int { return int(p[ip6VersionClass] >> 4) }

// TrafficClass is the DSCP (RFC 2474) and ECN (RFC 3168) byte.
func (p IPv6) TrafficClass() uint8 {
	return uint8(binary.BigEndian.Uint16(p[ip6VersionClass:]) >> 4)
}

// FlowLabel is 20 bits (RFC 6437).
func (p IPv6) FlowLabel() uint32 {
	return binary.BigEndian.Uint32(p[ip6VersionClass:]) & 0xfffff
}

// PayloadLen is in bytes, extension headers included.
func (p IPv6) PayloadLen() int { return int(binary.BigEndian.Uint16(p[ip6PayloadLen:])) }

// NextHeader is the type of what follows the fixed header.
func (p IPv6) NextHeader() uint8 { return p[ip6NextHeader] }

// HopLimit is IPv4's TTL.
func (p IPv6) HopLimit() uint8 { return p[ip6HopLimit] }

// Src is the source address. An IPv4-mapped address stays as it is.
func (p IPv6) Src() netip.Addr { return netip.AddrFrom16([16]byte(p[ip6Src:])) }

// Dst is the destination address.
func (p IPv6) Dst() netip.Addr { return netip.AddrFrom16([16]byte(p[ip6Dst:])) }

// SrcBytes is the source address in place, 16 bytes.
func (p IPv6) SrcBytes() []byte { return p[ip6Src : ip6Src+16] }

// DstBytes is the destination address in place, 16 bytes.
func (p IPv6) DstBytes() []byte { return p[ip6Dst : ip6Dst+16] }

// Payload is what follows the fixed header, extension headers included.
func (p IPv6) Payload() []byte { return p[IPv6Len:] }

// SetTrafficClass writes the DSCP and ECN byte; IPv6 has no header checksum.
func (p IPv6) SetTrafficClass(tc uint8) {
	v := binary.BigEndian.Uint16(p[ip6VersionClass:])
	binary.BigEndian.PutUint16(p[ip6VersionClass:], v&0xf00f|uint16(tc)<<4)
}

// SetHopLimit writes the hop limit.
func (p IPv6) SetHopLimit(n uint8) { p[ip6HopLimit] = n }

// SetPayloadLen writes the payload length in bytes.
func (p IPv6) SetPayloadLen(n int) { binary.BigEndian.PutUint16(p[ip6PayloadLen:], uint16(n)) }

// IPv6Fields are what [AppendIPv6] writes.
type IPv6Fields struct {
	Src, Dst     netip.Addr // IPv6
	PayloadLen   int        // bytes that will follow the fixed header
	FlowLabel    uint32     // 20 bits
	TrafficClass uint8
	HopLimit     uint8
	NextHeader   uint8
}

// AppendIPv6 appends a 40-byte IPv6 header. The payload, of f.PayloadLen bytes, is
// the caller's to append.
func AppendIPv6(dst []byte, f IPv6Fields) []byte {
	src16, dst16 := f.Src.As16(), f.Dst.As16()
	dst = binary.BigEndian.AppendUint32(dst, 6<<28|uint32(f.TrafficClass)<<20|f.FlowLabel&0xfffff)
	dst = binary.BigEndian.AppendUint16(dst, uint16(f.PayloadLen))
	dst = append(dst, f.NextHeader, f.HopLimit)
	dst = append(dst, src16[:]...)
	return append(dst, dst16[:]...)
}

// AppendIPv6Fragment appends a Fragment extension header (RFC 8200 §4.5). offset is
// in bytes, a multiple of 8.
func AppendIPv6Fragment(dst []byte, next uint8, offset int, more bool, id uint32) []byte {
	field := uint16(offset) &^ 7
	if more {
		field |= 1
	}
	dst = append(dst, next, 0)
	dst = binary.BigEndian.AppendUint16(dst, field)
	return binary.BigEndian.AppendUint32(dst, id)
}
