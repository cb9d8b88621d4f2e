package membership

import (
	"fmt"
	"net/netip"
	"slices"
	"sort"
)

// A Table is a function from addresses to (version, owner). It is kept in canonical
// form: disjoint prefixes in address order, IPv4 before IPv6, each as short as
// possible. Two tables for the same function are equal entry by entry, whatever
// merges produced them.
//
// The zero Table is empty and ready to use. Its entries are copied on write: slices
// that it has returned never change.
type Table struct {
	entries []Entry
	digest  *[32]byte // of entries; nil until it is needed
}

// NewTable returns a table with the pointwise maximum of the entries.
func NewTable(entries []Entry) *Table {
	t := new(Table)
	t.Merge(entries)
	return t
}

// Merge sets every address of in to the maximum of its values in t and in in. It
// returns the parts that changed, in canonical form, and the ties between different
// owners. It skips entries that fail [Entry.Check]; [DecodeEntries] has refused
// them before, with an error.
//
// Merging an equal table takes one pass and allocates nothing. Merging k entries into
// n takes O(k·log n) comparisons and, if something changes, one copy of the table.
func (t *Table) Merge(in []Entry) (changed []Entry, conflicts []Conflict) {
	in = normalise(in)
	if len(in) == 0 {
		return nil, nil
	}
	lo, hi := t.window(in[0].Prefix, in[len(in)-1].Prefix)
	old := t.entries[lo:hi]
	if slices.EqualFunc(old, in, Entry.Equal) {
		return nil, nil
	}
	// A first pass without output finds out whether anything changes: most entries
	// that gossip delivers are known already.
	var m merger
	m.run(old, in)
	if len(m.changed) == 0 {
		return nil, m.conflicts
	}
	m = merger{keep: true}
	m.out = make([]Entry, 0, len(t.entries)+len(m.changed)+8)
	m.out = append(m.out, t.entries[:lo]...)
	m.run(old, in)
	for i := hi; i < len(t.entries); i++ {
		n := len(m.out)
		if m.out = appendCanonical(m.out, t.entries[i]); len(m.out) == n+1 && m.out[n].Prefix == t.entries[i].Prefix {
			m.out = append(m.out, t.entries[i+1:]...) // no entries can be joined after this point
			break
		}
	}
	t.entries, t.digest = m.out, nil
	return m.changed, m.conflicts
}

// Entries returns the canonical entries in order. The slice is shared and must not
// be modified; the table does not modify it either.
func (t *Table) Entries() []Entry { return t.entries }

// Len returns the number of canonical entries.
func (t *Table) Len() int { return len(t.entries) }

// Owned returns the entries that id owns, including external ones, in order.
func (t *Table) Owned(id NodeID) []Entry {
	var out []Entry
	for _, e := range t.entries {
		if e.Owner == id {
			out = append(out, e)
		}
	}
	return out
}

// Owner returns the entry that contains the address.
func (t *Table) Owner(a netip.Addr) (Entry, bool) {
	i := sort.Search(len(t.entries), func(i int) bool { return a.Less(t.entries[i].Prefix.Addr()) })
	if i == 0 || !t.entries[i-1].Prefix.Contains(a) {
		return Entry{}, false
	}
	return t.entries[i-1], true
}

// Overlapping returns the entries that overlap p, in order. They are not cut to p.
// The slice is shared, like that of Entries.
func (t *Table) Overlapping(p netip.Prefix) []Entry {
	lo, hi := t.window(p, p)
	return t.entries[lo:hi]
}

// Within returns the entries for the addresses of p, cut to p.
func (t *Table) Within(p netip.Prefix) []Entry {
	out := slices.Clone(t.Overlapping(p))
	for i := range out {
		if covers(out[i].Prefix, p) {
			out[i].Prefix = p
		}
	}
	return out
}

// Assign makes owner the owner of the addresses of p, raises the version of each by
// one, and returns the new entries. This is the only way to raise versions. The
// caller must be the owner of p, or take it over by forget, and must save the table
// before it sends the entries to anybody. Addresses without an entry start at
// version 1.
func (t *Table) Assign(p netip.Prefix, owner NodeID, x *External) ([]Entry, error) {
	in := make([]Entry, 0, 1)
	for _, e := range t.fill(p) {
		e.Owner, e.External = owner, x
		if e.Version++; e.Version > MaxVersion {
			return nil, fmt.Errorf("entry %v has reached the highest version", e.Prefix)
		}
		in = appendCanonical(in, e)
	}
	for _, e := range in {
		if err := e.Check(); err != nil {
			return nil, err
		}
	}
	t.Merge(in)
	return in, nil
}

// fill returns Within(p), with entries of version 0 for addresses without an entry.
func (t *Table) fill(p netip.Prefix) []Entry {
	cut := t.Within(p)
	var out []Entry
	var walk func(q netip.Prefix)
	walk = func(q netip.Prefix) {
		for len(cut) > 0 && comparePrefix(cut[0].Prefix, q) < 0 && !cut[0].Prefix.Overlaps(q) {
			cut = cut[1:]
		}
		switch {
		case len(cut) == 0 || !cut[0].Prefix.Overlaps(q):
			out = append(out, Entry{Prefix: q})
		case covers(cut[0].Prefix, q):
			e := cut[0]
			e.Prefix = q
			out = append(out, e)
		default:
			lo, hi := halves(q)
			walk(lo)
			walk(hi)
		}
	}
	walk(p)
	return out
}

// Equal reports whether both tables are equal.
func (t *Table) Equal(o *Table) bool {
	return slices.EqualFunc(t.entries, o.entries, Entry.Equal)
}

// Clone returns an independent table. It copies no entries.
func (t *Table) Clone() *Table {
	c := *t
	c.entries = slices.Clip(c.entries)
	return &c
}

// window returns the range of entries that can overlap the addresses from the first of
// a to the last of b.
func (t *Table) window(a, b netip.Prefix) (lo, hi int) {
	lo = sort.Search(len(t.entries), func(i int) bool { return a.Addr().Less(t.entries[i].Prefix.Addr()) })
	if lo > 0 && t.entries[lo-1].Prefix.Overlaps(a) {
		lo--
	}
	hi = lo + sort.Search(len(t.entries)-lo, func(i int) bool {
		p := t.entries[lo+i].Prefix
		return b.Addr().Less(p.Addr()) && !b.Contains(p.Addr())
	})
	return lo, hi
}

// normalise returns in in canonical form. A list that is already canonical is returned
// unchanged.
func normalise(in []Entry) []Entry {
	ok := true
	for i := range in {
		if in[i].Check() != nil {
			ok = false
			break
		}
		if i > 0 && (comparePrefix(in[i-1].Prefix, in[i].Prefix) >= 0 || in[i-1].Prefix.Overlaps(in[i].Prefix)) {
			ok = false
			break
		}
	}
	if ok {
		return in
	}
	if len(in) == 1 {
		return nil
	}
	mid := len(in) / 2
	m := merger{keep: true}
	m.run(normalise(in[:mid]), normalise(in[mid:]))
	return m.out
}
