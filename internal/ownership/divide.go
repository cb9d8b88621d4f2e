package ownership

import (
	"math"
	"math/bits"
	"net/netip"
	"slices"

	"github.com/tulle-net/tulle/ipam"
)

// blockCount returns the number of blocks of length blockLen in the prefixes. Prefixes
// smaller than a block do not count. It saturates at math.MaxUint64.
func blockCount(list []netip.Prefix, blockLen int) uint64 {
	var n uint64
	for _, p := range list {
		d := blockLen - p.Bits()
		if d < 0 {
			continue
		}
		if d > 63 {
			return math.MaxUint64
		}
		sum, carry := bits.Add64(n, 1<<d, 0)
		if carry != 0 {
			return math.MaxUint64
		}
		n = sum
	}
	return n
}

// freeSpace returns the part of the owned prefixes that does not overlap busy, as
// aligned prefixes of at least one block, in order. One busy address makes its whole
// block busy.
func freeSpace(owned, busy []netip.Prefix, blockLen int) []netip.Prefix {
	wide := make([]netip.Prefix, 0, len(busy))
	for _, b := range busy {
		if b.Bits() > blockLen && b.Addr().BitLen() >= blockLen {
			b = netip.PrefixFrom(b.Addr(), blockLen).Masked()
		}
		wide = append(wide, b)
	}
	var out []netip.Prefix
	for _, p := range ipam.Aggregate(owned) {
		out = append(out, ipam.Subtract(p, wide, blockLen)...)
	}
	return out
}

// donation chooses the space that an owner gives to a node that asks: about half of its
// free space, in as few and as large aligned prefixes as possible, at least one block.
// It takes from the upper end, so that the owner's next blocks are adjacent to its
// current ones. free is the result of freeSpace. The result is empty only if free is.
func donation(free []netip.Prefix, blockLen int) []netip.Prefix {
	total := blockCount(free, blockLen)
	want := total/2 + total%2
	target := want
	left := slices.Clone(free)
	var out []netip.Prefix
	for want > target/8 && len(left) > 0 { // do not add table entries for the last few blocks
		// The largest prefix that is not larger than wanted; of several the highest.
		best, wide := -1, -1
		for i, p := range left {
			n := blockCount(left[i:i+1], blockLen)
			if n <= want && (best < 0 || p.Bits() <= left[best].Bits()) {
				best = i
			}
			if wide < 0 || p.Bits() <= left[wide].Bits() {
				wide = i
			}
		}
		if best >= 0 {
			want -= blockCount(left[best:best+1], blockLen)
			out = append(out, left[best])
			left = slices.Delete(left, best, best+1)
			continue
		}
		if len(out) > 0 && want <= target/2 { // do not split a prefix for the rest
			break
		}
		lo, hi := ipam.Halves(left[wide])
		left[wide] = lo
		left = slices.Insert(left, wide+1, hi)
	}
	ipam.Sort(out)
	return out
}

// nextBlock returns the block to open next: the lowest block in the free space.
func nextBlock(free []netip.Prefix, blockLen int) (netip.Prefix, bool) {
	if len(free) == 0 {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(free[0].Addr(), blockLen), true
}
