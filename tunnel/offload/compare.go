package offload

import "encoding/binary"

// compare tells in a few 64-bit operations whether a packet's headers equal those of the first one
// of a run in all that must be equal. Fields that may differ (lengths, ID, checksums,
// sequence number, FIN and PSH) are masked out; the Joiner looks at them itself.
type compare struct {
	words int // of 8 bytes; the last ends with the headers and may overlap the one before
	last  int // offset of the last word
	want  [(maxJoinHeaders + 7) / 8]uint64
	mask  [(maxJoinHeaders + 7) / 8]uint64
}

// set makes pkt, whose layout is l, the packet to compare with. CWR is wanted to be
// absent: a run may have it on its first packet only.
func (c *compare) set(pkt []byte, l *layout) {
	var want, mask [maxJoinHeaders]byte
	copy(want[:], pkt[:l.hdr])
	for i := range l.hdr {
		mask[i] = 0xff
	}
	ignore := func(from, n int) { clear(mask[from : from+n]) }
	if l.v6 {
		ignore(4, 2) // payload length
	} else {
		ignore(2, 4)  // total length, ID
		ignore(10, 2) // checksum
	}
	ignore(l.csumField(), 2)
	if l.proto == protoTCP {
		ignore(l.l4+4, 4) // sequence number
		mask[l.l4+13] = 0xff &^ (tcpFIN | tcpPSH)
		want[l.l4+13] &^= tcpCWR
	} else {
		ignore(l.l4+4, 2) // length
	}
	c.words, c.last = 0, l.hdr-8
	for off := 0; off < l.hdr; off += 8 {
		off = min(off, c.last)
		m := binary.NativeEndian.Uint64(mask[off:])
		c.want[c.words] = binary.NativeEndian.Uint64(want[off:]) & m
		c.mask[c.words] = m
		c.words++
	}
}

// same reports whether pkt, which is longer than the headers compared, has the same headers.
func (c *compare) same(pkt []byte) bool {
	var diff uint64
	n := c.words - 1
	b := pkt
	for i := range n {
		diff |= binary.NativeEndian.Uint64(b)&c.mask[i] ^ c.want[i]
		b = b[8:]
	}
	diff |= binary.NativeEndian.Uint64(pkt[c.last:])&c.mask[n] ^ c.want[n]
	return diff == 0
}
