package ownership

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/membership"
)

// handleRequest is the owner's side of a request for space.
//
// The order is what makes it safe: choose, raise the versions, save, and only
// then answer and tell. When the save fails everything is taken back in memory;
// if the new state reached the disk all the same, nobody was told of it, and
// whatever this node does with that space next is saved over it first.
//
// Repeated requests cost nothing: a requester says what it holds, and gets what
// it does not know of yet before anything new; and the number of the last granted
// request is on disk, so that an old copy of a request gets an old answer.
func (s *Machine) handleRequest(now time.Time, from NodeID, m *message) {
	fam := int(m.count)
	if fam >= len(s.params.Families) || from == s.cfg.ID {
		return
	}
	refuse := func(r reason, count uint64, format string, args ...any) {
		s.send(from, message{kind: kindRefuse, seq: m.seq, reason: r, count: count, text: fmt.Sprintf(format, args...)})
	}
	s.learn(now, m.entries)
	if lacking := s.lacking(from, fam, m.entries); len(lacking) > 0 {
		s.send(from, message{kind: kindGrant, flags: flagLacking, seq: m.seq, entries: lacking})
		return
	}
	switch last := s.granted[from]; {
	case !s.confirm.done || s.left || s.leave != nil || !s.joined:
		refuse(refusedNotReady, 0, "is not ready to give")
		return
	case m.seq <= last:
		refuse(refusedStale, last, "request %d was answered before", m.seq)
		return
	}
	var give []netip.Prefix
	var closing []netip.Prefix
	if m.prefix.IsValid() {
		r, why := s.mayGive(now, fam, m.prefix)
		if why != "" {
			refuse(r, 0, "%s", why)
			return
		}
		give = []netip.Prefix{m.prefix}
		for _, b := range s.pool.Prefixes() {
			if b.Overlaps(m.prefix) {
				closing = append(closing, b)
			}
		}
	} else {
		give = donation(s.free(now, fam), s.params.Families[fam].BlockLen)
		if len(give) == 0 {
			refuse(refusedExhausted, 0, "has no free block")
			return
		}
	}
	entries, err := s.transfer(now, give, from, func() {
		s.granted[from] = m.seq
		for _, b := range closing {
			s.pool.Close(b)
		}
	})
	if err != nil {
		refuse(refusedNotReady, 0, "%v", err)
		return
	}
	s.log.Info("gave space", "to", from.String(), "prefixes", fmt.Sprint(give))
	s.send(from, message{kind: kindGrant, seq: m.seq, entries: entries})
	s.tell(entries)
}

// transfer raises the versions of the prefixes, gives them to a node, and saves.
// also changes what else belongs to it; on an error nothing has changed.
func (s *Machine) transfer(now time.Time, give []netip.Prefix, to NodeID, also func()) ([]Entry, error) {
	table, granted, blocks := s.table.Clone(), s.granted[to], s.pool.Prefixes()
	undo := func() {
		s.table = table
		if granted == 0 {
			delete(s.granted, to)
		} else {
			s.granted[to] = granted
		}
		s.reopen(blocks)
	}
	var entries []Entry
	for _, p := range give {
		for _, e := range s.table.Within(p) { // external peers stay what they are
			in, err := s.table.Assign(e.Prefix, to, e.External)
			if err != nil {
				undo()
				return nil, err
			}
			entries = append(entries, in...)
		}
	}
	also()
	if err := s.save(now); err != nil {
		undo()
		return nil, err
	}
	s.notify()
	return entries, nil
}

// reopen restores the open blocks and their order.
func (s *Machine) reopen(blocks []netip.Prefix) {
	if slices.Equal(blocks, s.pool.Prefixes()) {
		return
	}
	for _, b := range s.pool.Prefixes() {
		s.pool.Close(b)
	}
	for _, b := range blocks {
		s.pool.Open(b)
	}
}

// lacking returns what the table gives to a node and the node does not know of.
func (s *Machine) lacking(id NodeID, fam int, have []Entry) []Entry {
	known := membership.NewTable(have)
	var out []Entry
	for _, e := range s.table.Owned(id) {
		if !s.params.Families[fam].CIDR.Contains(e.Prefix.Addr()) {
			continue
		}
		cut := known.Within(e.Prefix)
		if len(cut) != 1 || !cut[0].Equal(e) {
			out = append(out, e)
		}
	}
	return out
}

// mayGive says why this node does not give a fixed CIDR away, or "".
func (s *Machine) mayGive(now time.Time, fam int, p netip.Prefix) (reason, string) {
	for _, e := range s.table.Overlapping(p) {
		if e.Owner != s.cfg.ID {
			return refusedElsewhere, fmt.Sprintf("%v of it belongs to %s", e.Prefix, s.name(e.Owner))
		}
		if e.External != nil {
			return refusedInUse, fmt.Sprintf("an external peer uses %v", e.Prefix)
		}
	}
	if !ipam.Covers(s.params.Families[fam].CIDR, p) {
		return refusedElsewhere, fmt.Sprintf("%v is outside the cluster CIDR", p)
	}
	if ipam.Overlaps(s.cfg.PodCIDRs, p) {
		return refusedInUse, fmt.Sprintf("it is in its own --pod-cidr %v", s.cfg.PodCIDRs)
	}
	pods := 0
	for _, a := range s.pool.Allocations() {
		if p.Contains(a.Addr) {
			pods++
		}
	}
	if pods > 0 {
		return refusedInUse, fmt.Sprintf("%d pods have addresses in it", pods)
	}
	if tun, ok := s.pool.TunAddr(p.Addr().Is6()); ok && p.Contains(tun) {
		return refusedInUse, fmt.Sprintf("its own tun address %v is in it", tun)
	}
	for _, c := range s.pool.Cooling(now) {
		if p.Contains(c.Addr) {
			return refusedInUse, fmt.Sprintf("%v, which a pod had lately, rests for another %v", c.Addr, c.Until.Sub(now).Round(time.Second))
		}
	}
	for _, b := range s.pool.Prefixes() {
		if b.Overlaps(p) && !ipam.Covers(p, b) && s.blockUsed(b) {
			return refusedInUse, fmt.Sprintf("it is a part of block %v, which is in use", b)
		}
	}
	return 0, ""
}

func (s *Machine) blockUsed(p netip.Prefix) bool {
	return slices.ContainsFunc(s.pool.Blocks(), func(b ipam.Block) bool { return b.Prefix == p && b.Used > 0 })
}
