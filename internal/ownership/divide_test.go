package ownership

import (
	"math"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/ipam"
	"pgregory.net/rapid"
)

func TestDonation(t *testing.T) {
	for _, tc := range []struct{ free, want string }{
		{"10.244.0.0/16", "10.244.128.0/17"},
		{"10.244.1.0/24 10.244.2.0/23 10.244.4.0/22 10.244.8.0/21 10.244.16.0/20 10.244.32.0/19 10.244.64.0/18 10.244.128.0/17", "10.244.128.0/17"},
		{"10.244.1.0/24", "10.244.1.0/24"}, // at least one block
		{"10.244.1.0/24 10.244.3.0/24", "10.244.3.0/24"},
		{"10.244.1.0/24 10.244.3.0/24 10.244.5.0/24", "10.244.3.0/24 10.244.5.0/24"},
		{"10.244.2.0/23", "10.244.3.0/24"},
		{"", ""},
	} {
		got := donation(prefixes(tc.free), 24)
		if !slices.Equal(got, prefixes(tc.want)) {
			t.Errorf("of %s: %v, want %s", tc.free, got, tc.want)
		}
	}
}

func TestDonationIsAboutHalf(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		owned := prefixes("10.244.0.0/18")
		var busy []netip.Prefix
		for range rapid.IntRange(0, 40).Draw(t, "busy") {
			a := netip.AddrFrom4([4]byte{10, 244, byte(rapid.IntRange(0, 63).Draw(t, "block")), byte(rapid.IntRange(0, 255).Draw(t, "host"))})
			busy = append(busy, netip.PrefixFrom(a, rapid.IntRange(20, 32).Draw(t, "bits")).Masked())
		}
		free := freeSpace(owned, busy, 24)
		give := donation(free, 24)
		total, given := blockCount(free, 24), blockCount(give, 24)
		if total == 0 && len(give) != 0 || total > 0 && (given == 0 || given > total/2+1 || 4*given < total) {
			t.Fatalf("%d of %d blocks: %v of %v", given, total, give, free)
		}
		for i, p := range give {
			if p != p.Masked() || p.Bits() > 24 || ipam.Overlaps(busy, p) || ipam.Overlaps(give[:i], p) ||
				len(ipam.Subtract(p, free, 32)) != 0 {
				t.Fatalf("gives %v of %v, busy %v", p, free, busy)
			}
		}
	})
}

func TestBlockCountSaturates(t *testing.T) {
	if n := blockCount(prefixes("::/0 fd00::/64"), 128); n != math.MaxUint64 {
		t.Error(n)
	}
	if n := blockCount(prefixes("fd00::/48 fd00:1::/65"), 64); n != 1<<16 {
		t.Error(n)
	}
}

func prefixes(s string) (out []netip.Prefix) {
	for f := range strings.FieldsSeq(s) {
		out = append(out, netip.MustParsePrefix(f))
	}
	return out
}
