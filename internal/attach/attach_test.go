package attach

import (
	"net/netip"
	"slices"
	"testing"
)

// An address that is requested twice is one request; two addresses stay two, in their order, for the agent to judge.
func TestDistinct(t *testing.T) {
	a, b, c := netip.MustParseAddr("10.244.0.9"), netip.MustParseAddr("fd00::9"), netip.MustParseAddr("10.244.0.8")
	for _, l := range []struct{ in, want []netip.Addr }{
		{nil, nil}, {[]netip.Addr{a, b}, []netip.Addr{a, b}}, {[]netip.Addr{a, b, a, b}, []netip.Addr{a, b}}, {[]netip.Addr{a, c, a}, []netip.Addr{a, c}},
	} {
		if got := distinct(l.in); !slices.Equal(got, l.want) {
			t.Errorf("%v: %v, want %v", l.in, got, l.want)
		}
	}
}
