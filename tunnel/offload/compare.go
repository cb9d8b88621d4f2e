package offload

import "encoding/binary"

// equalMask has a 1 for each bit of the headers that must be equal in all packets of a run, as little-endian words. It has
// zeros for lengths, IPv4 ID, checksums, TCP sequence number, FIN, PSH and CWR, which the Joiner checks separately.
// TCP options must be equal.
type equalMask [(maxJoinHeaders + 7) / 8]uint64

// maskOf returns the mask for packets with layout l, without IP options and extension
// headers.
func maskOf(l *layout) *equalMask {
	i := 0
	if l.v6 {
		i = 2
	}
	if l.proto == protoTCP {
		i++
	}
	return &equalMasks[i]
}

var equalMasks = [4]equalMask{
	newEqualMask(&layout{proto: protoUDP, l4: ipv4MinLen}),
	newEqualMask(&layout{proto: protoTCP, l4: ipv4MinLen}),
	newEqualMask(&layout{v6: true, proto: protoUDP, l4: ipv6Len}),
	newEqualMask(&layout{v6: true, proto: protoTCP, l4: ipv6Len}),
}

func newEqualMask(l *layout) (m equalMask) {
	var b [8 * len(m)]byte
	for i := range b {
		b[i] = 0xff
	}
	ignore := func(from, n int) { clear(b[from : from+n]) }
	if l.v6 {
		ignore(4, 2) // payload length
	} else {
		ignore(2, 4)  // total length, ID
		ignore(10, 2) // checksum
	}
	ignore(l.csumField(), 2)
	if l.proto == protoTCP {
		ignore(l.l4+4, 4) // sequence number
		b[l.l4+13] = 0xff &^ (tcpFIN | tcpPSH | tcpCWR)
	} else {
		ignore(l.l4+4, 2) // length
	}
	for i := range m {
		m[i] = binary.LittleEndian.Uint64(b[8*i:])
	}
	return m
}

// same reports whether a and b, headers of equal length, a multiple of 4 and at most
// maxJoinHeaders bytes, are equal under m.
func (m *equalMask) same(a, b []byte) bool {
	var diff uint64
	b = b[:len(a)]
	i := 0
	for ; i < len(m)-1 && i*8+8 <= len(a); i++ {
		diff |= (binary.LittleEndian.Uint64(a[i*8:i*8+8]) ^ binary.LittleEndian.Uint64(b[i*8:i*8+8])) & m[i]
	}
	if rest := i * 8; rest+4 <= len(a) {
		diff |= uint64(binary.LittleEndian.Uint32(a[rest:])^binary.LittleEndian.Uint32(b[rest:])) & m[i]
	}
	return diff == 0
}
