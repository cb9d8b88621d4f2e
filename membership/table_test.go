package membership

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// oracle is the slow, obvious table over the 256 addresses of 10.0.0.0/24: one
// entry for each address.
type oracle [256]Entry

func (o *oracle) merge(in []Entry) {
	for _, e := range in {
		for i := range o {
			if e.Prefix.Contains(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})) {
				if o[i].Version == 0 || e.beats(o[i]) {
					o[i] = e
				}
			}
		}
	}
}

func (o *oracle) check(t interface{ Fatalf(string, ...any) }, tab *Table) {
	for i, want := range o {
		got, ok := tab.Owner(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}))
		if ok != (want.Version != 0) || ok && !got.sameValue(want) {
			t.Fatalf("address %d: table says %v %v, oracle %v", i, got, ok, want)
		}
	}
	checkCanonical(t, tab)
}

// checkCanonical: sorted, disjoint, and no two halves that say the same.
func checkCanonical(t interface{ Fatalf(string, ...any) }, tab *Table) {
	list := tab.Entries()
	for i := 1; i < len(list); i++ {
		a, b := list[i-1], list[i]
		if comparePrefix(a.Prefix, b.Prefix) >= 0 || a.Prefix.Overlaps(b.Prefix) {
			t.Fatalf("%v before %v", a, b)
		}
		if _, ok := parent(a.Prefix, b.Prefix); ok && a.sameValue(b) {
			t.Fatalf("%v and %v are not joined", a, b)
		}
	}
}

func owner(i int) NodeID { return NodeID{0: byte(i + 1)} }

var anEntry = rapid.Custom(func(t *rapid.T) Entry {
	bits := rapid.IntRange(24, 32).Draw(t, "bits")
	a := netip.AddrFrom4([4]byte{10, 0, 0, rapid.Byte().Draw(t, "address")})
	e := Entry{
		Prefix:  netip.PrefixFrom(a, bits).Masked(),
		Owner:   owner(rapid.IntRange(0, 3).Draw(t, "owner")),
		Version: rapid.Uint64Range(1, 4).Draw(t, "version"),
	}
	if rapid.IntRange(0, 9).Draw(t, "external") == 0 {
		e.External = &External{Endpoint: netip.AddrFrom4([4]byte{192, 0, 2, rapid.ByteRange(1, 2).Draw(t, "endpoint")}), Encap: "vxlan",
			Port: rapid.Uint16Range(0, 1).Draw(t, "port"), MAC: [6]byte{5: rapid.ByteRange(0, 1).Draw(t, "MAC")}}
	}
	return e
})

func TestMergeAgainstOracle(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var tab Table
		var o oracle
		for range rapid.IntRange(1, 6).Draw(t, "merges") {
			in := rapid.SliceOfN(anEntry, 0, 12).Draw(t, "in")
			before := tab.Clone()
			changed, _ := tab.Merge(in)
			o.merge(in)
			o.check(t, &tab)
			// changed says exactly where the table differs, and how.
			mended := before.Clone()
			mended.Merge(changed)
			if !mended.Equal(&tab) {
				t.Fatalf("before + changed = %v, table %v", mended.Entries(), tab.Entries())
			}
			for _, c := range changed {
				for _, old := range before.Within(c.Prefix) {
					if old.sameValue(c) {
						t.Fatalf("%v is called changed, but was %v", c, old)
					}
				}
			}
		}
	})
}

// TestMergeIsALattice: commutative, associative, idempotent.
func TestMergeIsALattice(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		draw := func(name string) *Table { return NewTable(rapid.SliceOfN(anEntry, 0, 16).Draw(t, name)) }
		join := func(a, b *Table) *Table {
			c := a.Clone()
			c.Merge(b.Entries())
			return c
		}
		a, b, c := draw("a"), draw("b"), draw("c")
		switch {
		case !join(a, b).Equal(join(b, a)):
			t.Fatalf("a∨b = %v, b∨a = %v", join(a, b).Entries(), join(b, a).Entries())
		case !join(join(a, b), c).Equal(join(a, join(b, c))):
			t.Fatalf("not associative")
		case !join(a, a).Equal(a):
			t.Fatalf("not idempotent")
		case join(a, b).Digest() != join(b, a).Digest():
			t.Fatalf("digests of equal tables differ")
		}
	})
}

func TestMergeReportsTies(t *testing.T) {
	p := netip.MustParsePrefix("10.0.0.0/24")
	half := netip.MustParsePrefix("10.0.0.128/25")
	tab := NewTable([]Entry{{Prefix: p, Owner: owner(2), Version: 7}})
	changed, conflicts := tab.Merge([]Entry{{Prefix: half, Owner: owner(1), Version: 7}})
	want := []Conflict{{Prefix: half, Version: 7, Winner: owner(1), Loser: owner(2)}}
	if !slices.Equal(conflicts, want) || len(changed) != 1 || changed[0].Prefix != half {
		t.Fatalf("changed %v, conflicts %v", changed, conflicts)
	}
	if e, _ := tab.Owner(half.Addr()); e.Owner != owner(1) {
		t.Fatalf("the higher ID won: %v", e)
	}
	if _, conflicts = tab.Merge([]Entry{{Prefix: p, Owner: owner(2), Version: 7}}); len(conflicts) == 0 {
		t.Fatal("the same tie seen from the other side is not reported")
	}
}

func TestMergeSkipsInvalidEntries(t *testing.T) {
	tab := NewTable([]Entry{
		{Prefix: netip.MustParsePrefix("10.0.0.1/24"), Owner: owner(1), Version: 1},
		{Prefix: netip.MustParsePrefix("10.0.1.0/24"), Version: 1},
		{Prefix: netip.MustParsePrefix("10.0.2.0/24"), Owner: owner(1)},
		{Prefix: netip.MustParsePrefix("10.0.3.0/24"), Owner: owner(1), Version: MaxVersion + 1},
		{Owner: owner(1), Version: 1},
		{Prefix: netip.MustParsePrefix("10.0.4.0/24"), Owner: owner(1), Version: 1},
	})
	if tab.Len() != 1 || tab.Entries()[0].Prefix.String() != "10.0.4.0/24" {
		t.Fatalf("%v", tab.Entries())
	}
}

func TestAssign(t *testing.T) {
	p := netip.MustParsePrefix
	tab := new(Table)
	if _, err := tab.Assign(p("10.0.0.0/16"), owner(0), nil); err != nil {
		t.Fatal(err)
	}
	tab.Assign(p("10.0.128.0/17"), owner(1), nil)
	if _, err := tab.Assign(p("10.0.0.0/16"), owner(2), nil); err != nil { // spans two versions
		t.Fatal(err)
	}
	want := []Entry{{p("10.0.0.0/17"), owner(2), 2, nil}, {p("10.0.128.0/17"), owner(2), 3, nil}}
	if !slices.EqualFunc(tab.Entries(), want, Entry.Equal) {
		t.Fatalf("%v", tab.Entries())
	}
	if _, err := NewTable([]Entry{{p("10.0.0.0/8"), owner(1), MaxVersion, nil}}).Assign(p("10.0.0.0/8"), owner(2), nil); err == nil {
		t.Fatal("a version beyond the highest")
	}
}

func TestWholeAddressSpace(t *testing.T) {
	for _, s := range []string{"0.0.0.0/0", "::/0"} {
		p := netip.MustParsePrefix(s)
		tab := NewTable([]Entry{{Prefix: p, Owner: owner(1), Version: 1}})
		last := netip.PrefixFrom(highest(p), p.Addr().BitLen())
		tab.Merge([]Entry{{Prefix: last, Owner: owner(2), Version: 2}})
		if e, _ := tab.Owner(last.Addr()); e.Owner != owner(2) || tab.Len() != 1+p.Addr().BitLen() {
			t.Errorf("%v: %v, %d entries", p, e, tab.Len())
		}
		tab.Merge([]Entry{{Prefix: p, Owner: owner(3), Version: 9}})
		if tab.Len() != 1 {
			t.Errorf("%v: %v", p, tab.Entries())
		}
	}
}

func highest(p netip.Prefix) netip.Addr {
	for p.Bits() < p.Addr().BitLen() {
		_, p = halves(p)
	}
	return p.Addr()
}

// big returns a table of n prefixes that do not join.
func big(n int) *Table {
	list := make([]Entry, n)
	for i := range list {
		a := netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0})
		list[i] = Entry{Prefix: netip.PrefixFrom(a, 24), Owner: owner(i % 2 * 7), Version: uint64(i%5) + 1}
	}
	return NewTable(list)
}

func TestMergeOfEqualTablesAllocatesNothing(t *testing.T) {
	a := big(10000)
	b := NewTable(a.Clone().Entries())
	if n := testing.AllocsPerRun(10, func() { a.Merge(b.Entries()) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestMergeIsLinear counts the steps of a merge. A quadratic one would need a hundred times as many for ten times the table.
func TestMergeIsLinear(t *testing.T) {
	for _, n := range []int{1000, 10000} {
		a := big(n).Entries()
		newer := slices.Clone(a)
		for i := range newer {
			newer[i].Version += uint64(i % 2)
		}
		around := []Entry{{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Owner: owner(1), Version: 3}} // some of a is newer, some older
		for name, in := range map[string][]Entry{"the same": a, "every second newer": newer, "one around all": around, "one": newer[n/2 : n/2+1]} {
			for _, keep := range []bool{false, true} {
				m := merger{keep: keep}
				m.run(a, in)
				// Each step takes an entry, or halves one: at most once for each bit of an address below a covering prefix.
				limit := len(a) + len(in)
				if name == "one around all" {
					limit += 2 * len(a)
				}
				if m.steps > limit {
					t.Errorf("%s, %d prefixes: %d steps, at most %d", name, n, m.steps, limit)
				}
			}
		}
	}
}

func BenchmarkMerge(b *testing.B) {
	for _, n := range []int{100, 10000} {
		tab := big(n)
		equal := slices.Clone(tab.Entries())
		b.Run(fmt.Sprintf("equal/%d", n), func(b *testing.B) {
			for b.Loop() {
				tab.Merge(equal)
			}
		})
		b.Run(fmt.Sprintf("one/%d", n), func(b *testing.B) {
			r := rand.New(rand.NewPCG(1, 1))
			for b.Loop() {
				e := tab.Entries()[r.IntN(tab.Len())]
				e.Version++
				e.Version %= MaxVersion
				tab.Merge([]Entry{e})
			}
		})
	}
}

func TestIDs(t *testing.T) {
	id := NewNodeID()
	if got, err := ParseNodeID(id.String()); err != nil || got != id {
		t.Errorf("%v: %v, %v", id, got, err)
	}
	c := NewClusterID()
	if got, err := ParseClusterID(c.String()); err != nil || got != c {
		t.Errorf("%v: %v, %v", c, got, err)
	}
	for _, s := range []string{"", "zz", "0123456789abcdef0123456789abcde", "0123456789abcdef0123456789abcdeg", "0123456789abcdef0123456789abcdef0"} {
		if _, err := ParseNodeID(s); err == nil {
			t.Errorf("%q is taken for a node ID", s)
		}
	}
	if NewNodeID() == id || id.IsZero() || !(NodeID{}).IsZero() {
		t.Error("IDs are not random, or zero")
	}
}
