package header

import (
	"encoding/binary"
	"net/netip"
)

// Offsets of the IPv4 header's fields (RFC 791 §3.1).
const (
	ip4VersionIHL = 0
	ip4TOS        = 1
	ip4TotalLen   = 2
	ip4ID         = 4
	ip4FlagsFrag  = 6
	ip4TTL        = 8
	ip4Proto      = 9
	ip4Checksum   = 10
	ip4Src        = 12
	ip4Dst        = 16
)

// Sizes of IPv4 in bytes (RFC 791 §3.1).
const (
	IPv4MinLen      = 20    // header without options
	IPv4MaxLen      = 60    // header with 40 bytes of options
	IPv4MaxTotalLen = 65535 // whole packet
)

// IPv4Flags are the top three bits of the flags-and-offset field, in place.
const (
	IPv4FlagDF     = 0x4000
	IPv4FlagMF     = 0x2000
	ip4FragOffMask = 0x1fff // in units of 8 bytes
)

// IPv4 is a view of an IPv4 packet: header, options and payload.
type IPv4 []byte

// ParseIPv4 checks version, IHL and total length and returns the packet cut to
// its total length. The header checksum is left to [IPv4.ChecksumValid].
func ParseIPv4(b []byte) (IPv4, error) {
	if len(b) < IPv4MinLen {
		return nil, ErrTruncated
	}
	if b[ip4VersionIHL]>>4 != 4 {
		return nil, ErrVersion
	}
	hlen := int(b[ip4VersionIHL]&0x0f) * 4
	if hlen < IPv4MinLen {
		return nil, ErrHeaderLen
	}
	total := int(binary.BigEndian.Uint16(b[ip4TotalLen:]))
	if total < hlen {
		return nil, ErrTotalLen
	}
	if total > len(b) {
		return nil, ErrTruncated
	}
	return IPv4(b[:total:total]), nil
}

// Version is 4 in a valid header.
func (p IPv4) Version() int { return int(p[ip4VersionIHL] >> 4) }

// HeaderLen is the header's length in bytes, options included (IHL × 4).
func (p IPv4) HeaderLen() int { return int(p[ip4VersionIHL]&0x0f) * 4 }

// TOS is the DSCP (RFC 2474) and ECN (RFC 3168) byte.
func (p IPv4) TOS() uint8 { return p[ip4TOS] }

// TotalLen is the packet's length in bytes as the header states it.
func (p IPv4) TotalLen() int { return int(binary.BigEndian.Uint16(p[ip4TotalLen:])) }

// ID is the identification field (RFC 6864: it has meaning only for fragments).
func (p IPv4) ID() uint16 { return binary.BigEndian.Uint16(p[ip4ID:]) }

// DF reports Don't Fragment.
func (p IPv4) DF() bool { return p.flagsFrag()&IPv4FlagDF != 0 }

// MF reports More Fragments.
func (p IPv4) MF() bool { return p.flagsFrag()&IPv4FlagMF != 0 }

// FragmentOffset is in bytes.
func (p IPv4) FragmentOffset() int { return int(p.flagsFrag()&ip4FragOffMask) * 8 }

// TTL is the time to live.
func (p IPv4) TTL() uint8 { return p[ip4TTL] }

// Proto is the protocol of the payload.
func (p IPv4) Proto() uint8 { return p[ip4Proto] }

// Checksum is the header checksum as stored.
func (p IPv4) Checksum() uint16 { return binary.BigEndian.Uint16(p[ip4Checksum:]) }

// ChecksumValid reports whether the header checksum is right.
func (p IPv4) ChecksumValid() bool { return Checksum(p[:p.HeaderLen()]) == 0 }

// Src is the source address.
func (p IPv4) Src() netip.Addr { return netip.AddrFrom4([4]byte(p[ip4Src:])) }

// Dst is the destination address.
func (p IPv4) Dst() netip.Addr { return netip.AddrFrom4([4]byte(p[ip4Dst:])) }

// SrcBytes is the source address in place, 4 bytes.
func (p IPv4) SrcBytes() []byte { return p[ip4Src : ip4Src+4] }

// DstBytes is the destination address in place, 4 bytes.
func (p IPv4) DstBytes() []byte { return p[ip4Dst : ip4Dst+4] }

// Options are the bytes between the fixed header and the payload.
func (p IPv4) Options() []byte { return p[IPv4MinLen:p.HeaderLen()] }

// Payload is what follows the header, up to the view's end.
func (p IPv4) Payload() []byte { return p[p.HeaderLen():] }

// SetTOS writes the TOS byte and mends the header checksum (RFC 1624).
func (p IPv4) SetTOS(tos uint8) {
	old := binary.BigEndian.Uint16(p[ip4VersionIHL:])
	p[ip4TOS] = tos
	p.mend(old, binary.BigEndian.Uint16(p[ip4VersionIHL:]))
}

// SetTTL writes the TTL and mends the header checksum.
func (p IPv4) SetTTL(ttl uint8) {
	old := binary.BigEndian.Uint16(p[ip4TTL:])
	p[ip4TTL] = ttl
	p.mend(old, binary.BigEndian.Uint16(p[ip4TTL:]))
}

// SetTotalLen writes the total length, in bytes, and mends the header checksum.
func (p IPv4) SetTotalLen(n int) {
	old := binary.BigEndian.Uint16(p[ip4TotalLen:])
	binary.BigEndian.PutUint16(p[ip4TotalLen:], uint16(n))
	p.mend(old, uint16(n))
}

// SetID writes the identification and mends the header checksum.
func (p IPv4) SetID(id uint16) {
	old := p.ID()
	binary.BigEndian.PutUint16(p[ip4ID:], id)
	p.mend(old, id)
}

// SetChecksum computes and writes the header checksum.
func (p IPv4) SetChecksum() {
	p[ip4Checksum], p[ip4Checksum+1] = 0, 0
	binary.BigEndian.PutUint16(p[ip4Checksum:], Checksum(p[:p.HeaderLen()]))
}

func (p IPv4) flagsFrag() uint16 { return binary.BigEndian.Uint16(p[ip4FlagsFrag:]) }

func (p IPv4) mend(old, new uint16) {
	binary.BigEndian.PutUint16(p[ip4Checksum:], UpdateChecksum16(p.Checksum(), old, new))
}

// IPv4Fields are what [AppendIPv4] writes; the rest is computed.
type IPv4Fields struct {
	Src, Dst   netip.Addr // IPv4
	PayloadLen int        // bytes that will follow the header
	ID         uint16
	FlagsFrag  uint16 // flags in place and fragment offset in 8-byte units: IPv4FlagDF | …
	TOS        uint8
	TTL        uint8
	Proto      uint8
}

// AppendIPv4 appends a 20-byte IPv4 header with its checksum. The payload, of
// f.PayloadLen bytes, is the caller's to append. Src and Dst have to be IPv4 and
// the packet at most [IPv4MaxTotalLen] long.
func AppendIPv4(dst []byte, f IPv4Fields) []byte {
	src4, dst4 := f.Src.As4(), f.Dst.As4()
	start := len(dst)
	dst = append(dst, 4<<4|IPv4MinLen/4, f.TOS)
	dst = binary.BigEndian.AppendUint16(dst, uint16(IPv4MinLen+f.PayloadLen))
	dst = binary.BigEndian.AppendUint16(dst, f.ID)
	dst = binary.BigEndian.AppendUint16(dst, f.FlagsFrag)
	dst = append(dst, f.TTL, f.Proto, 0, 0)
	dst = append(dst, src4[:]...)
	dst = append(dst, dst4[:]...)
	IPv4(dst[start:]).SetChecksum()
	return dst
}
