package ownership

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/membership"
)

// learn merges entries from other nodes and handles the consequences for this node. It returns what has changed.
func (s *Machine) learn(now time.Time, entries []Entry) []Entry {
	entries = s.inside(entries)
	before := s.table.Clone()
	merge := s.table.Merge
	if s.plant.merge != nil {
		merge = func(in []Entry) ([]Entry, []membership.Conflict) { return s.plant.merge(s.table, in) }
	}
	changed, conflicts := merge(entries)
	for _, c := range conflicts {
		s.noteAt(now, "tie "+c.Prefix.String(), fmt.Sprintf("two nodes claimed %v: %s keeps it, %s has lost it (a node was forgotten while it was alive)",
			c.Prefix, s.name(c.Winner), s.name(c.Loser)), "restart the pods of the loser that have addresses in it")
	}
	if len(changed) == 0 {
		return nil
	}
	s.dirty = true
	for _, e := range changed {
		if e.Owner == s.cfg.ID {
			s.joined = true
			continue
		}
		for _, old := range before.Within(e.Prefix) {
			if old.Owner == s.cfg.ID {
				s.lost(now, old.Prefix, e)
			}
		}
	}
	s.notify()
	return changed
}

// inside returns the entries that lie in the cluster's CIDRs.
func (s *Machine) inside(entries []Entry) []Entry {
	ok := func(e Entry) bool {
		return slices.ContainsFunc(s.params.Families, func(f ipam.Family) bool { return ipam.Covers(f.CIDR, e.Prefix) })
	}
	if !slices.ContainsFunc(entries, func(e Entry) bool { return !ok(e) }) {
		return entries
	}
	return slices.DeleteFunc(slices.Clone(entries), func(e Entry) bool { return !ok(e) })
}

// lost closes the blocks that another node owns now. This node did not give them away
// itself: it was forgotten while it was away, or its disk was older than the donation.
func (s *Machine) lost(now time.Time, p netip.Prefix, to Entry) {
	for _, b := range s.pool.Prefixes() {
		if b.Overlaps(p) {
			s.pool.Close(b)
		}
	}
	s.noteAt(now, "lost "+to.Prefix.String(), fmt.Sprintf("%v, which this node used, belongs to %s since version %d: this node was forgotten while it was away, or its disk is older than that",
		p, s.name(to.Owner), to.Version), "new pods get addresses from new space; restart pods that still have an old address (tulle ipam check)")
}

// owned returns this node's space of a family, without the prefixes of external peers.
func (s *Machine) owned(fam int) []netip.Prefix {
	var out []netip.Prefix
	for _, e := range s.table.Entries() {
		if e.Owner == s.cfg.ID && e.External == nil && s.params.Families[fam].CIDR.Contains(e.Prefix.Addr()) {
			out = append(out, e.Prefix)
		}
	}
	return out
}

// busy returns the space that must not be given away: the open blocks, addresses outside
// them that a pod has or that are in cool-down, and the parts of its fixed CIDR that this
// node has collected (two nodes that want one prefix would exchange its parts forever).
func (s *Machine) busy(now time.Time) []netip.Prefix {
	blocks := s.pool.Prefixes()
	out := slices.Concat(blocks, s.cfg.PodCIDRs)
	add := func(a netip.Addr) {
		if !slices.ContainsFunc(blocks, func(b netip.Prefix) bool { return b.Contains(a) }) {
			out = append(out, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	for _, a := range s.pool.Allocations() {
		add(a.Addr)
	}
	for _, c := range s.pool.Cooling(now) {
		add(c.Addr)
	}
	return out
}

// openable returns the space in which this node can open its next block. The pool takes
// care of addresses in it that a pod has already or that are in cool-down.
func (s *Machine) openable(fam int) []netip.Prefix {
	return freeSpace(s.owned(fam), s.pool.Prefixes(), s.params.Families[fam].BlockLen)
}

// free returns the space of a family that this node can give away.
func (s *Machine) free(now time.Time, fam int) []netip.Prefix {
	return freeSpace(s.owned(fam), s.busy(now), s.params.Families[fam].BlockLen)
}
