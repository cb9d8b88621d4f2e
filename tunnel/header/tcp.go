package header

import (
	"encoding/binary"
	"net/netip"
)

// Offsets of the TCP header's fields (RFC 9293 §3.1).
const (
	tcpSrcPort  = 0
	tcpDstPort  = 2
	tcpSeq      = 4
	tcpAck      = 8
	tcpDataOff  = 12
	tcpFlags    = 13
	tcpWindow   = 14
	tcpChecksum = 16
	tcpUrgent   = 18
)

// Sizes of the TCP header in bytes.
const (
	TCPMinLen = 20
	TCPMaxLen = 60
)

// TCPFlags is the flags byte (RFC 9293 §3.1; CWR and ECE from RFC 3168 §6.1).
type TCPFlags uint8

// The TCP flags.
const (
	TCPFin TCPFlags = 1 << iota
	TCPSyn
	TCPRst
	TCPPsh
	TCPAck
	TCPUrg
	TCPEce
	TCPCwr
)

// TCP options (RFC 9293 §3.2).
const (
	tcpOptEnd = 0
	tcpOptNop = 1
	tcpOptMSS = 2
)

// TCP is a view of a TCP segment: header, options and payload.
type TCP []byte

// ParseTCP checks the data offset against b.
func ParseTCP(b []byte) (TCP, error) {
	if len(b) < TCPMinLen {
		return nil, ErrTruncated
	}
	hlen := int(b[tcpDataOff]>>4) * 4
	if hlen < TCPMinLen {
		return nil, ErrHeaderLen
	}
	if hlen > len(b) {
		return nil, ErrTruncated
	}
	return TCP(b), nil
}

// SrcPort is the source port.
func (t TCP) SrcPort() uint16 { return binary.BigEndian.Uint16(t[tcpSrcPort:]) }

// DstPort is the destination port.
func (t TCP) DstPort() uint16 { return binary.BigEndian.Uint16(t[tcpDstPort:]) }

// Seq is the sequence number.
func (t TCP) Seq() uint32 { return binary.BigEndian.Uint32(t[tcpSeq:]) }

// Ack is the acknowledgment number.
func (t TCP) Ack() uint32 { return binary.BigEndian.Uint32(t[tcpAck:]) }

// HeaderLen is the header's length in bytes, options included (data offset × 4).
func (t TCP) HeaderLen() int { return int(t[tcpDataOff]>>4) * 4 }

// Flags is the flags byte.
func (t TCP) Flags() TCPFlags { return TCPFlags(t[tcpFlags]) }

// Window is the receive window, unscaled.
func (t TCP) Window() uint16 { return binary.BigEndian.Uint16(t[tcpWindow:]) }

// Checksum is the checksum as stored.
func (t TCP) Checksum() uint16 { return binary.BigEndian.Uint16(t[tcpChecksum:]) }

// Urgent is the urgent pointer.
func (t TCP) Urgent() uint16 { return binary.BigEndian.Uint16(t[tcpUrgent:]) }

// Options are the bytes between the fixed header and the payload.
func (t TCP) Options() []byte { return t[TCPMinLen:t.HeaderLen()] }

// Payload is what follows the header.
func (t TCP) Payload() []byte { return t[t.HeaderLen():] }

// SetSeq writes the sequence number; the checksum is not mended.
func (t TCP) SetSeq(n uint32) { binary.BigEndian.PutUint32(t[tcpSeq:], n) }

// SetFlags writes the flags byte; the checksum is not mended.
func (t TCP) SetFlags(f TCPFlags) { t[tcpFlags] = uint8(f) }

// SetChecksum computes and writes the checksum over the pseudo-header (src and dst
// of 4 or 16 bytes each) and the whole view.
func (t TCP) SetChecksum(src, dst []byte) {
	t[tcpChecksum], t[tcpChecksum+1] = 0, 0
	c := ^Fold(Sum(t, PseudoSum(ProtoTCP, src, dst, uint32(len(t)))))
	binary.BigEndian.PutUint16(t[tcpChecksum:], c)
}

// ChecksumValid reports whether the checksum is right for these addresses.
func (t TCP) ChecksumValid(src, dst []byte) bool {
	return Fold(Sum(t, PseudoSum(ProtoTCP, src, dst, uint32(len(t))))) == 0xffff
}

// TCPFields are what [AppendTCP] writes.
type TCPFields struct {
	From, To netip.AddrPort // of one family
	Seq, Ack uint32
	Options  []byte // at most 40 bytes, padded here with zeros to a multiple of 4
	Window   uint16
	Urgent   uint16
	Flags    TCPFlags
}

// AppendTCP appends a TCP segment with its checksum.
func AppendTCP(dst []byte, f TCPFields, payload []byte) []byte {
	start := len(dst)
	hlen := TCPMinLen + (len(f.Options)+3)&^3
	dst = binary.BigEndian.AppendUint16(dst, f.From.Port())
	dst = binary.BigEndian.AppendUint16(dst, f.To.Port())
	dst = binary.BigEndian.AppendUint32(dst, f.Seq)
	dst = binary.BigEndian.AppendUint32(dst, f.Ack)
	dst = append(dst, uint8(hlen/4)<<4, uint8(f.Flags))
	dst = binary.BigEndian.AppendUint16(dst, f.Window)
	dst = append(dst, 0, 0)
	dst = binary.BigEndian.AppendUint16(dst, f.Urgent)
	dst = append(dst, f.Options...)
	for len(dst) < start+hlen {
		dst = append(dst, tcpOptEnd)
	}
	dst = append(dst, payload...)
	if f.From.Addr().Is4() {
		s, d := f.From.Addr().As4(), f.To.Addr().As4()
		TCP(dst[start:]).SetChecksum(s[:], d[:])
	} else {
		s, d := f.From.Addr().As16(), f.To.Addr().As16()
		TCP(dst[start:]).SetChecksum(s[:], d[:])
	}
	return dst
}
