package header

import (
	"encoding/binary"
	"net/netip"
)

// Offsets of the UDP header's fields (RFC 768).
const (
	udpSrcPort  = 0
	udpDstPort  = 2
	udpLength   = 4
	udpChecksum = 6
)

// UDPLen is the UDP header's length in bytes.
const UDPLen = 8

// UDP is a view of a UDP datagram: header and payload.
type UDP []byte

// ParseUDP checks the length field against b and returns the datagram cut to it.
func ParseUDP(b []byte) (UDP, error) {
	if len(b) < UDPLen {
		return nil, ErrTruncated
	}
	n := int(binary.BigEndian.Uint16(b[udpLength:]))
	if n < UDPLen {
		return nil, ErrTotalLen
	}
	if n > len(b) {
		return nil, ErrTruncated
	}
	return UDP(b[:n:n]), nil
}

// SrcPort is the source port.
func (u UDP) SrcPort() uint16 { return binary.BigEndian.Uint16(u[udpSrcPort:]) }

// DstPort is the destination port.
func (u UDP) DstPort() uint16 { return binary.BigEndian.Uint16(u[udpDstPort:]) }

// Length is header and payload in bytes.
func (u UDP) Length() int { return int(binary.BigEndian.Uint16(u[udpLength:])) }

// Checksum is the checksum as stored; 0 means none (IPv4 only, RFC 768).
func (u UDP) Checksum() uint16 { return binary.BigEndian.Uint16(u[udpChecksum:]) }

// Payload is what follows the header.
func (u UDP) Payload() []byte { return u[UDPLen:] }

// SetLength writes the length field, in bytes.
func (u UDP) SetLength(n int) { binary.BigEndian.PutUint16(u[udpLength:], uint16(n)) }

// SetChecksum computes and writes the checksum over the pseudo-header (src and dst
// of 4 or 16 bytes each) and the whole view. A sum of 0 is sent as 0xffff (RFC 768).
func (u UDP) SetChecksum(src, dst []byte) {
	u[udpChecksum], u[udpChecksum+1] = 0, 0
	c := ^Fold(Sum(u, PseudoSum(ProtoUDP, src, dst, uint32(len(u)))))
	if c == 0 {
		c = 0xffff
	}
	binary.BigEndian.PutUint16(u[udpChecksum:], c)
}

// ChecksumValid reports whether the checksum is right for these addresses. A zero
// checksum is valid between IPv4 addresses and invalid between IPv6 ones (RFC 8200 §8.1).
func (u UDP) ChecksumValid(src, dst []byte) bool {
	if u.Checksum() == 0 {
		return len(src) == 4
	}
	return Fold(Sum(u, PseudoSum(ProtoUDP, src, dst, uint32(len(u))))) == 0xffff
}

// AppendUDP appends a UDP header and payload with the checksum over the
// pseudo-header of src and dst, which have to be of one family.
func AppendUDP(dst []byte, from, to netip.AddrPort, payload []byte) []byte {
	start := len(dst)
	dst = AppendUDPHeader(dst, from.Port(), to.Port(), len(payload))
	dst = append(dst, payload...)
	if from.Addr().Is4() {
		s, d := from.Addr().As4(), to.Addr().As4()
		UDP(dst[start:]).SetChecksum(s[:], d[:])
	} else {
		s, d := from.Addr().As16(), to.Addr().As16()
		UDP(dst[start:]).SetChecksum(s[:], d[:])
	}
	return dst
}

// AppendUDPHeader appends a UDP header with checksum 0 before a payload of
// payloadLen bytes, which is the caller's to append.
func AppendUDPHeader(dst []byte, srcPort, dstPort uint16, payloadLen int) []byte {
	dst = binary.BigEndian.AppendUint16(dst, srcPort)
	dst = binary.BigEndian.AppendUint16(dst, dstPort)
	dst = binary.BigEndian.AppendUint16(dst, uint16(UDPLen+payloadLen))
	return append(dst, 0, 0)
}
