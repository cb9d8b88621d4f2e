package membership

import "net/netip"

// A merger walks through two sorted lists of disjoint prefixes in parallel. Two
// prefixes are nested or disjoint. So at each step either one list is ahead, or one
// prefix covers the other. A covering prefix that loses is halved until it does not
// cover the other any more. The walk is linear in the length of the lists, plus the
// halvings: at most one per address bit for each nested prefix.
type merger struct {
	keep bool // write the result; else only detect changes

	out       []Entry
	changed   []Entry
	conflicts []Conflict
	steps     int // of run, for the test of its cost
}

// cursor is a list with a stack of the pieces of its first element.
type cursor struct {
	list []Entry
	cut  []Entry // in reverse order; before list
}

func (c *cursor) head() (Entry, bool) {
	if n := len(c.cut); n > 0 {
		return c.cut[n-1], true
	}
	if len(c.list) > 0 {
		return c.list[0], true
	}
	return Entry{}, false
}

func (c *cursor) next() {
	if n := len(c.cut); n > 0 {
		c.cut = c.cut[:n-1]
		return
	}
	c.list = c.list[1:]
}

// halve replaces the head by its two halves.
func (c *cursor) halve() {
	e, _ := c.head()
	c.next()
	lo, hi := halves(e.Prefix)
	e.Prefix = hi
	c.cut = append(c.cut, e)
	e.Prefix = lo
	c.cut = append(c.cut, e)
}

func (m *merger) run(old, in []Entry) {
	a, b := cursor{list: old}, cursor{list: in}
	for ; ; m.steps++ {
		x, okx := a.head()
		y, oky := b.head()
		switch {
		case !okx && !oky:
			return
		case !oky:
			m.emit(x, false)
			a.next()
		case !okx:
			m.emit(y, true)
			b.next()
		case !x.Prefix.Overlaps(y.Prefix):
			if comparePrefix(x.Prefix, y.Prefix) < 0 {
				m.emit(x, false)
				a.next()
			} else {
				m.emit(y, true)
				b.next()
			}
		default:
			m.step(&a, &b, x, y)
		}
	}
}

// step merges the heads x and y, of which one covers the other.
func (m *merger) step(a, b *cursor, x, y Entry) {
	win := !x.sameValue(y) && y.beats(x)
	switch {
	case x.Prefix == y.Prefix:
		m.tie(x.Prefix, x, y)
		if win {
			m.emit(y, true)
		} else {
			m.emit(x, false)
		}
		a.next()
		b.next()
	case covers(x.Prefix, y.Prefix):
		if win {
			a.halve()
			return
		}
		m.tie(y.Prefix, x, y)
		b.next()
	default:
		if !win {
			b.halve()
			return
		}
		m.tie(x.Prefix, x, y)
		a.next()
	}
}

func (m *merger) tie(p netip.Prefix, x, y Entry) {
	if x.Version != y.Version || x.Owner == y.Owner {
		return
	}
	c := Conflict{Prefix: p, Version: x.Version, Winner: x.Owner, Loser: y.Owner}
	if y.beats(x) {
		c.Winner, c.Loser = c.Loser, c.Winner
	}
	m.conflicts = append(m.conflicts, c)
}

func (m *merger) emit(e Entry, changed bool) {
	if m.keep {
		m.out = appendCanonical(m.out, e)
	}
	if changed {
		m.changed = appendCanonical(m.changed, e)
	}
}

// appendCanonical appends e, which follows everything in list, and joins adjacent
// halves with the same value.
func appendCanonical(list []Entry, e Entry) []Entry {
	for len(list) > 0 {
		last := list[len(list)-1]
		p, ok := parent(last.Prefix, e.Prefix)
		if !ok || !last.sameValue(e) {
			break
		}
		e.Prefix = p
		list = list[:len(list)-1]
	}
	return append(list, e)
}
