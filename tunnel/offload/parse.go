package offload

import (
	"encoding/binary"
	"errors"
)

// ErrHeader reports a packet whose headers are inconsistent, or do not match its virtio-net header.
var ErrHeader = errors.New("offload: bad header")

const (
	protoTCP = 6
	protoUDP = 17

	ipv4MinLen = 20
	ipv6Len    = 40
	tcpMinLen  = 20
	udpLen     = 8

	tcpCsumOffset = 16
	udpCsumOffset = 6

	maxTotal = 65535 // bytes, network header included
)

// TCP flags, byte 13 of the header (RFC 9293 §3.1).
const (
	tcpFIN = 0x01
	tcpSYN = 0x02
	tcpRST = 0x04
	tcpPSH = 0x08
	tcpURG = 0x20
	tcpCWR = 0x80
)

// layout has the offsets of the headers of an unfragmented TCP or UDP packet.
type layout struct {
	v6    bool
	proto uint8 // protoTCP or protoUDP
	l4    int   // offset of the transport header
	hdr   int   // length of all headers: offset of the payload
	total int   // length of the packet by its IP header, at most len(pkt)
}

// addrs returns the source and destination address of pkt.
func (l *layout) addrs(pkt []byte) (src, dst []byte) {
	if l.v6 {
		return pkt[8:24], pkt[24:40]
	}
	return pkt[12:16], pkt[16:20]
}

// csumField returns the offset of the transport checksum.
func (l *layout) csumField() int {
	if l.proto == protoTCP {
		return l.l4 + tcpCsumOffset
	}
	return l.l4 + udpCsumOffset
}

// parse finds the layout of pkt. It returns false unless pkt is a complete, unfragmented
// TCP or UDP packet with consistent lengths. Bytes after the IP length are allowed.
func (l *layout) parse(pkt []byte) bool {
	if len(pkt) < ipv4MinLen {
		return false
	}
	switch pkt[0] >> 4 {
	case 4:
		l.v6 = false
		l.l4 = int(pkt[0]&15) * 4
		l.total = int(binary.BigEndian.Uint16(pkt[2:]))
		l.proto = pkt[9]
		if l.l4 < ipv4MinLen || binary.BigEndian.Uint16(pkt[6:])&0x3fff != 0 { // MF, offset
			return false
		}
	case 6:
		if len(pkt) < ipv6Len {
			return false
		}
		l.v6 = true
		l.total = ipv6Len + int(binary.BigEndian.Uint16(pkt[4:]))
		if !l.walk6(pkt) {
			return false
		}
	default:
		return false
	}
	if l.total > len(pkt) {
		return false
	}
	switch l.proto {
	case protoTCP:
		if l.l4+tcpMinLen > l.total {
			return false
		}
		l.hdr = l.l4 + int(pkt[l.l4+12]>>4)*4
		return l.hdr >= l.l4+tcpMinLen && l.hdr <= l.total
	case protoUDP:
		l.hdr = l.l4 + udpLen
		return l.hdr <= l.total
	}
	return false
}

// walk6 finds the transport header after the extension headers that segmentation may
// copy: hop-by-hop, routing and destination options (RFC 8200 §4).
func (l *layout) walk6(pkt []byte) bool {
	next, off := pkt[6], ipv6Len
	for {
		switch next {
		case protoTCP, protoUDP:
			l.proto, l.l4 = next, off
			return true
		case 0, 43, 60:
			if off+8 > len(pkt) {
				return false
			}
			next, off = pkt[off], off+8+int(pkt[off+1])*8
		default:
			return false
		}
	}
}
