package header

import "golang.org/x/sys/cpu"

// minAVX2 is the length in bytes from which sumAVX2 is faster than sumGo.
const minAVX2 = 256

var hasAVX2 = cpu.X86.HasAVX2

// sumAVX2 returns a one's-complement sum of b, whose length is a multiple of 32,
// as little-endian words, to be folded. The processor must have AVX2.
//
//go:noescape
func sumAVX2(b []byte) uint64

// sum returns the folded one's-complement sum of b.
func sum(b []byte) uint16 {
	if len(b) < minAVX2 || !hasAVX2 {
		return sumGo(b)
	}
	return sumVector(b)
}

// sumVector is sum with AVX2.
func sumVector(b []byte) uint16 {
	n := len(b) &^ 31
	return sumTail(sumAVX2(b[:n]), b[n:])
}
