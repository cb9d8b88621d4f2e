package header

import (
	"encoding/binary"
	"math/bits"
)

// Odd constants with evenly spread bits, for the multiplications of FlowHash.
const (
	flowK0 = 0xa0761d6478bd642f
	flowK1 = 0xe7037ed1a0b428db
	flowK2 = 0x8ebc6af09c88c6e3
)

// FlowHash spreads flows over 32 bits: addresses, protocol and ports decide, for
// every fragment addresses and protocol only, so that all fragments of a packet
// travel together. The two directions of a flow hash differently. b has to be the
// packet that in was parsed from. The same packet hashes alike on every host; it
// does not protect against a sender that provokes collisions.
func FlowHash(b []byte, in *Inner) uint32 {
	last := uint64(in.fragProto) << 32
	if !in.Fragment {
		last = uint64(in.Proto)<<32 | uint64(in.SrcPort)<<16 | uint64(in.DstPort)
	}
	if in.Version == 4 {
		return flowFold(mix(binary.BigEndian.Uint64(b[ip4Src:])^flowK0, last^flowK1))
	}
	a := b[ip6Src : ip6Src+32]
	h := mix(binary.BigEndian.Uint64(a)^flowK0, binary.BigEndian.Uint64(a[8:])^flowK1)
	h ^= mix(binary.BigEndian.Uint64(a[16:])^flowK1, binary.BigEndian.Uint64(a[24:])^flowK2)
	return flowFold(mix(h^flowK0, last^flowK2))
}

// mix multiplies to 128 bits and folds: every input bit reaches most output bits.
func mix(a, b uint64) uint64 {
	hi, lo := bits.Mul64(a, b)
	return hi ^ lo
}

func flowFold(h uint64) uint32 { return uint32(mix(h^flowK2, flowK0) >> 32) }
