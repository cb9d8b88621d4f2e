package route

import (
	"fmt"
	"iter"
	"math/rand/v2"
	"net/netip"
	"testing"

	"pgregory.net/rapid"
)

type entry struct {
	p netip.Prefix
	v int
}

func seq(es []entry) iter.Seq2[netip.Prefix, int] {
	return func(yield func(netip.Prefix, int) bool) {
		for _, e := range es {
			if !yield(e.p, e.v) {
				return
			}
		}
	}
}

// slow is the oracle: the longest of all prefixes that hold the address, the later of two equals.
func slow(es []entry, a netip.Addr) (int, bool) {
	best := -1
	for i, e := range es {
		if e.p.Contains(a) && (best < 0 || e.p.Bits() >= es[best].p.Bits()) {
			best = i
		}
	}
	if best < 0 {
		return 0, false
	}
	return es[best].v, true
}

func addrGen(t *rapid.T, six bool, label string) netip.Addr {
	// Few distinct bits, so that prefixes nest and lookups hit.
	if six {
		b := [16]byte{0xfd, 0, 0, 0x10}
		copy(b[4:], rapid.SliceOfN(rapid.SampledFrom([]byte{0, 1, 0x80, 0xff}), 12, 12).Draw(t, label))
		return netip.AddrFrom16(b)
	}
	b := [4]byte{10}
	copy(b[1:], rapid.SliceOfN(rapid.SampledFrom([]byte{0, 1, 0x80, 0xff}), 3, 3).Draw(t, label))
	return netip.AddrFrom4(b)
}

func TestLookupAgainstOracle(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var es []entry
		for i := range rapid.IntRange(0, 40).Draw(t, "n") {
			six := rapid.Bool().Draw(t, "six")
			a := addrGen(t, six, "prefix")
			p := netip.PrefixFrom(a, rapid.IntRange(0, a.BitLen()).Draw(t, "bits")).Masked()
			es = append(es, entry{p, i})
		}
		tab := Build(seq(es))
		for range 50 {
			a := addrGen(t, rapid.Bool().Draw(t, "six"), "addr")
			want, wantOK := slow(es, a)
			got, ok := tab.Lookup(a)
			if ok != wantOK || got != want {
				t.Fatalf("Lookup(%v) = %v, %v; the oracle says %v, %v in %v", a, got, ok, want, wantOK, es)
			}
		}
	})
}

func TestLen(t *testing.T) {
	es := []entry{{netip.MustParsePrefix("10.0.0.0/8"), 1}, {netip.MustParsePrefix("10.0.0.1/8"), 2}, {netip.MustParsePrefix("fd00::/8"), 3}}
	tab := Build(seq(es))
	if tab.Len() != 2 {
		t.Fatalf("Len = %d, want 2", tab.Len())
	}
	if v, ok := tab.Lookup(netip.MustParseAddr("10.9.9.9")); !ok || v != 2 {
		t.Fatalf("the later of two equal prefixes must win, got %v, %v", v, ok)
	}
}

func BenchmarkLookup(b *testing.B) {
	for _, n := range []int{10, 1_000, 10_000, 100_000} {
		b.Run(fmt.Sprintf("prefixes=%d", n), func(b *testing.B) {
			es := make([]entry, n)
			for i := range es {
				es[i] = entry{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 12), byte(i >> 4), byte(i << 4)}), 28), i}
			}
			tab := Build(seq(es))
			addrs := make([]netip.Addr, 1024)
			for i := range addrs {
				addrs[i] = es[rand.IntN(n)].p.Addr()
			}
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				if _, ok := tab.Lookup(addrs[i&1023]); !ok {
					b.Fatal("missed")
				}
				i++
			}
		})
	}
}
