package ipam

import (
	"net/netip"
	"slices"
)

// Overlaps reports whether p shares an address with any of list.
func Overlaps(list []netip.Prefix, p netip.Prefix) bool {
	return slices.ContainsFunc(list, p.Overlaps)
}

// Covers reports whether every address of b is in a.
func Covers(a, b netip.Prefix) bool {
	return a.Bits() <= b.Bits() && a.Contains(b.Addr())
}

// Sort sorts prefixes: IPv4 before IPv6, then by first address, then shorter ones first.
func Sort(list []netip.Prefix) {
	slices.SortFunc(list, func(a, b netip.Prefix) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits()
	})
}

// Subtract returns the addresses of p that are in none of minus, as the smallest
// number of prefixes, in order. Prefixes longer than maxBits are omitted.
func Subtract(p netip.Prefix, minus []netip.Prefix, maxBits int) []netip.Prefix {
	return subtract(nil, p, minus, maxBits)
}

func subtract(out []netip.Prefix, p netip.Prefix, minus []netip.Prefix, maxBits int) []netip.Prefix {
	if p.Bits() > maxBits {
		return out
	}
	var in []netip.Prefix // the elements of minus inside p
	for _, m := range minus {
		if !m.Overlaps(p) {
			continue
		}
		if Covers(m, p) {
			return out
		}
		in = append(in, m)
	}
	if len(in) == 0 {
		return append(out, p)
	}
	lo, hi := Halves(p) // something lies inside p, so p has more than one address
	out = subtract(out, lo, in, maxBits)
	return subtract(out, hi, in, maxBits)
}

// Aggregate returns the union of the prefixes as the smallest number of prefixes, in order.
func Aggregate(list []netip.Prefix) []netip.Prefix {
	list = slices.Clone(list)
	Sort(list)
	var out []netip.Prefix
	for _, p := range list {
		if len(out) > 0 && Covers(out[len(out)-1], p) {
			continue
		}
		for len(out) > 0 && p.Bits() > 0 {
			lo, hi := Halves(netip.PrefixFrom(p.Addr(), p.Bits()-1).Masked())
			if out[len(out)-1] != lo || p != hi {
				break
			}
			p = netip.PrefixFrom(lo.Addr(), lo.Bits()-1)
			out = out[:len(out)-1]
		}
		out = append(out, p)
	}
	return out
}

// Halves splits p, which must have more than one address.
func Halves(p netip.Prefix) (lo, hi netip.Prefix) {
	bits := p.Bits() + 1
	lo = netip.PrefixFrom(p.Addr(), bits)
	i := bits - 1
	if p.Addr().Is4() {
		b := p.Addr().As4()
		b[i/8] |= 0x80 >> (i % 8)
		return lo, netip.PrefixFrom(netip.AddrFrom4(b), bits)
	}
	b := p.Addr().As16()
	b[i/8] |= 0x80 >> (i % 8)
	return lo, netip.PrefixFrom(netip.AddrFrom16(b), bits)
}

// Last returns the highest address of p.
func Last(p netip.Prefix) netip.Addr {
	if p.Addr().Is4() {
		b := p.Addr().As4()
		for i := p.Bits(); i < 32; i++ {
			b[i/8] |= 0x80 >> (i % 8)
		}
		return netip.AddrFrom4(b)
	}
	b := p.Addr().As16()
	for i := p.Bits(); i < 128; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom16(b)
}
