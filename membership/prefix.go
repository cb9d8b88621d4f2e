package membership

import "net/netip"

// comparePrefix is the order of prefixes in a table: IPv4 before IPv6, then by first
// address, then shorter prefixes first.
func comparePrefix(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 { // Compare puts IPv4 before IPv6
		return c
	}
	return a.Bits() - b.Bits()
}

// covers reports whether every address of b is in a.
func covers(a, b netip.Prefix) bool {
	return a.Bits() <= b.Bits() && a.Contains(b.Addr())
}

// halves splits p, which must have more than one address.
func halves(p netip.Prefix) (lo, hi netip.Prefix) {
	bits := p.Bits() + 1
	lo = netip.PrefixFrom(p.Addr(), bits)
	return lo, netip.PrefixFrom(setBit(p.Addr(), bits-1), bits)
}

// parent returns the union of lo and hi if they are the lower and the upper half of
// one prefix.
func parent(lo, hi netip.Prefix) (netip.Prefix, bool) {
	bits := lo.Bits()
	if bits != hi.Bits() || bits <= 0 || lo.Addr().BitLen() != hi.Addr().BitLen() {
		return netip.Prefix{}, false
	}
	p := netip.PrefixFrom(lo.Addr(), bits-1)
	if p.Masked() != p { // lo is an upper half
		return netip.Prefix{}, false
	}
	if setBit(lo.Addr(), bits-1) != hi.Addr() {
		return netip.Prefix{}, false
	}
	return p, true
}

// setBit returns a with bit i (0 is the highest) set.
func setBit(a netip.Addr, i int) netip.Addr {
	if a.Is4() {
		b := a.As4()
		b[i/8] |= 0x80 >> (i % 8)
		return netip.AddrFrom4(b)
	}
	b := a.As16()
	b[i/8] |= 0x80 >> (i % 8)
	return netip.AddrFrom16(b)
}
