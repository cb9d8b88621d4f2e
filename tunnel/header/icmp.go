package header

import (
	"encoding/binary"
	"net/netip"
)

// ICMP types and codes (RFC 792, 1191, 1812) that Tulle distinguishes.
const (
	ICMPv4EchoReply       = 0
	ICMPv4DstUnreachable  = 3
	ICMPv4SourceQuench    = 4
	ICMPv4Redirect        = 5
	ICMPv4EchoRequest     = 8
	ICMPv4TimeExceeded    = 11
	ICMPv4ParamProblem    = 12
	ICMPv4CodeNet         = 0
	ICMPv4CodeHost        = 1
	ICMPv4CodeProto       = 2
	ICMPv4CodePort        = 3
	ICMPv4CodeFragNeeded  = 4
	ICMPv6DstUnreachable  = 1
	ICMPv6PacketTooBig    = 2
	ICMPv6TimeExceeded    = 3
	ICMPv6ParamProblem    = 4
	ICMPv6FirstInfo       = 128 // types below are errors, RFC 4443 §2.1
	ICMPv6EchoRequest     = 128
	ICMPv6EchoReply       = 129
	ICMPv6Redirect        = 137
	ICMPv6CodeNoRoute     = 0
	ICMPv6CodeAddrUnreach = 3
)

// ICMPHeaderLen is the ICMP header with the four bytes whose meaning depends on
// the type, for both families.
const ICMPHeaderLen = 8

// ICMPv4 is a view of an ICMP message (RFC 792).
type ICMPv4 []byte

// ICMPv6 is a view of an ICMPv6 message (RFC 4443 §2.1).
type ICMPv6 []byte

// ParseICMPv4 checks the length.
func ParseICMPv4(b []byte) (ICMPv4, error) {
	if len(b) < ICMPHeaderLen {
		return nil, ErrTruncated
	}
	return ICMPv4(b), nil
}

// Type is the message type.
func (m ICMPv4) Type() uint8 { return m[0] }

// Code refines the type.
func (m ICMPv4) Code() uint8 { return m[1] }

// Checksum is the checksum as stored.
func (m ICMPv4) Checksum() uint16 { return binary.BigEndian.Uint16(m[2:]) }

// ChecksumValid reports whether the checksum over the whole view is right.
func (m ICMPv4) ChecksumValid() bool { return Checksum(m) == 0 }

// MTU is the next hop's MTU in bytes in a "fragmentation needed" message (RFC 1191 §4).
func (m ICMPv4) MTU() int { return int(binary.BigEndian.Uint16(m[6:])) }

// IsError reports the messages about which, and in answer to which, no error is
// ever sent (RFC 1122 §3.2.2): errors and redirects.
func (m ICMPv4) IsError() bool { return icmp4IsError(m[0]) }

// Payload is what follows the eight bytes: for errors, the quoted packet.
func (m ICMPv4) Payload() []byte { return m[ICMPHeaderLen:] }

// ParseICMPv6 checks the length.
func ParseICMPv6(b []byte) (ICMPv6, error) {
	if len(b) < ICMPHeaderLen {
		return nil, ErrTruncated
	}
	return ICMPv6(b), nil
}

// Type is the message type.
func (m ICMPv6) Type() uint8 { return m[0] }

// Code refines the type.
func (m ICMPv6) Code() uint8 { return m[1] }

// Checksum is the checksum as stored.
func (m ICMPv6) Checksum() uint16 { return binary.BigEndian.Uint16(m[2:]) }

// ChecksumValid reports whether the checksum over the pseudo-header of src and dst
// (16 bytes each) and the whole view is right.
func (m ICMPv6) ChecksumValid(src, dst []byte) bool {
	return Fold(Sum(m, PseudoSum(ProtoICMPv6, src, dst, uint32(len(m))))) == 0xffff
}

// MTU is the next hop's MTU in bytes in a Packet Too Big message (RFC 4443 §3.2).
func (m ICMPv6) MTU() int { return int(binary.BigEndian.Uint32(m[4:])) }

// IsError reports errors and redirects, as ICMPv4's.
func (m ICMPv6) IsError() bool { return icmp6IsError(m[0]) }

// Payload is what follows the eight bytes: for errors, the quoted packet.
func (m ICMPv6) Payload() []byte { return m[ICMPHeaderLen:] }

func icmp4IsError(typ uint8) bool {
	switch typ {
	case ICMPv4DstUnreachable, ICMPv4SourceQuench, ICMPv4Redirect,
		ICMPv4TimeExceeded, ICMPv4ParamProblem:
		return true
	}
	return false
}

func icmp6IsError(typ uint8) bool { return typ < ICMPv6FirstInfo || typ == ICMPv6Redirect }

// AppendICMPv4Echo appends an echo request or reply (RFC 792) with its checksum.
func AppendICMPv4Echo(dst []byte, typ uint8, id, seq uint16, payload []byte) []byte {
	start := len(dst)
	dst = appendEcho(dst, typ, id, seq, payload)
	binary.BigEndian.PutUint16(dst[start+2:], Checksum(dst[start:]))
	return dst
}

// AppendICMPv6Echo appends an echo request or reply (RFC 4443 §4) with its checksum.
func AppendICMPv6Echo(dst []byte, src, to netip.Addr, typ uint8, id, seq uint16, payload []byte) []byte {
	start := len(dst)
	dst = appendEcho(dst, typ, id, seq, payload)
	s, d := src.As16(), to.As16()
	m := dst[start:]
	sum := PseudoSum(ProtoICMPv6, s[:], d[:], uint32(len(m)))
	binary.BigEndian.PutUint16(m[2:], ^Fold(Sum(m, sum)))
	return dst
}

func appendEcho(dst []byte, typ uint8, id, seq uint16, payload []byte) []byte {
	dst = append(dst, typ, 0, 0, 0)
	dst = binary.BigEndian.AppendUint16(dst, id)
	dst = binary.BigEndian.AppendUint16(dst, seq)
	return append(dst, payload...)
}
