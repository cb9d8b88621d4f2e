package header

import (
	"encoding/binary"
	"math/bits"
)

// Sum returns the one's-complement partial sum (RFC 1071) of b read as
// big-endian 16-bit words, plus initial. An odd last byte counts as the high
// byte of a word, so only the last piece of a datagram may have an odd length.
// The result is a partial sum for another Sum, PseudoSum or Fold; it is zero
// only when initial and every byte of b are zero.
func Sum(b []byte, initial uint32) uint32 {
	return add32(initial, uint32(sum(b)))
}

// Fold folds a partial sum into 16 bits. The result is not complemented.
func Fold(s uint32) uint16 {
	s = s>>16 + s&0xffff
	return uint16(s>>16 + s)
}

// Checksum returns the internet checksum of b (RFC 1071): the complement of its
// folded sum. Over bytes that hold a right checksum it returns zero.
func Checksum(b []byte) uint16 {
	return ^sum(b)
}

// PseudoSum returns the partial sum of the pseudo-header of IPv4 (RFC 9293
// §3.1) or IPv6 (RFC 8200 §8.1). src and dst are 4 or 16 bytes each; length is
// that of the upper-layer header and its payload in bytes.
func PseudoSum(proto uint8, src, dst []byte, length uint32) uint32 {
	s := length>>16 + length&0xffff + uint32(proto)
	if len(src) == 4 && len(dst) == 4 {
		a, b := binary.BigEndian.Uint32(src), binary.BigEndian.Uint32(dst)
		return s + a>>16 + a&0xffff + b>>16 + b&0xffff
	}
	return s + uint32(sum(src)) + uint32(sum(dst))
}

// UpdateChecksum16 returns the checksum sum after a 16-bit word under it went
// from old to new (RFC 1624, equation 3).
func UpdateChecksum16(sum uint16, old, new uint16) uint16 {
	return ^Fold(uint32(^sum) + uint32(^old) + uint32(new))
}

// add32 is one's-complement addition of 32-bit words.
func add32(a, b uint32) uint32 {
	s, c := bits.Add32(a, b, 0)
	return s + c // cannot carry again: s is at most 2^32-2 when c is 1
}

// sumGo is sum in plain Go: the fastest there is without vector instructions, and the
// reference that tests compare the others with. One's-complement addition does not depend on byte order
// (RFC 1071 §2B), so it adds little-endian 64-bit words and swaps bytes at the end. A run of Add64
// becomes one chain of add-with-carry. (acc += c cannot wrap: a carry out of an
// addition leaves all ones only when a carry came in too, and the first has none.)
func sumGo(b []byte) uint16 {
	var acc, c uint64
	for len(b) >= 128 {
		p := (*[128]byte)(b)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[0:]), 0)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[8:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[16:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[24:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[32:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[40:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[48:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[56:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[64:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[72:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[80:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[88:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[96:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[104:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[112:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[120:]), c)
		acc += c
		b = b[128:]
	}
	if len(b) >= 64 {
		p := (*[64]byte)(b)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[0:]), 0)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[8:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[16:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[24:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[32:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[40:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[48:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[56:]), c)
		acc += c
		b = b[64:]
	}
	if len(b) >= 32 {
		p := (*[32]byte)(b)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[0:]), 0)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[8:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[16:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[24:]), c)
		acc += c
		b = b[32:]
	}
	return sumTail(acc, b)
}

// sumTail adds b, of less than 32 bytes, to a little-endian sum and folds it.
func sumTail(acc uint64, b []byte) uint16 {
	var c uint64
	if len(b) >= 16 {
		p := (*[16]byte)(b)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[0:]), 0)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[8:]), c)
		acc += c
		b = b[16:]
	}
	if len(b) >= 8 {
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(b), 0)
		acc += c
		b = b[8:]
	}
	var tail uint64 // the last 0–7 bytes, as the low ones of a little-endian word
	shift := 0
	if len(b) >= 4 {
		tail = uint64(binary.LittleEndian.Uint32(b))
		shift = 32
		b = b[4:]
	}
	if len(b) >= 2 {
		tail |= uint64(binary.LittleEndian.Uint16(b)) << shift
		shift += 16
		b = b[2:]
	}
	if len(b) == 1 {
		tail |= uint64(b[0]) << shift
	}
	acc, c = bits.Add64(acc, tail, 0)
	return bits.ReverseBytes16(foldWide(acc + c))
}

// foldWide folds a 64-bit one's-complement sum into 16 bits.
func foldWide(s uint64) uint16 {
	s = s>>32 + s&0xffffffff
	s = s>>32 + s&0xffffffff
	return Fold(uint32(s))
}
