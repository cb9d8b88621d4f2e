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
// The order makes it safe: choose, raise the versions, save, and only then answer and
// broadcast. If the save fails, the change is undone in memory. The new state may be on
// the disk nevertheless; but nobody knows of it, and the next save, which precedes any
// use of that space, overwrites it.
//
// Repeated requests are harmless: a request lists what the requester holds, and the
// answer first contains grants that the requester does not know yet. The number of the last
// granted request is on disk, so that an old copy of a request gets the old answer.
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
	if m.prefix.IsValid() {
		r, why := s.mayGive(now, fam, m.prefix)
		if why != "" {
			refuse(r, 0, "%s", why)
			return
		}
		give = []netip.Prefix{m.prefix}
	} else {
		give = donation(s.free(now, fam), s.params.Families[fam].BlockLen)
		if len(give) == 0 {
			refuse(refusedExhausted, 0, "has no free block")
			return
		}
	}
	entries, err := s.transfer(now, give, from, func() {
		s.granted[from] = m.seq
		for _, b := range s.pool.Prefixes() {
			if b.Overlaps(m.prefix) {
				s.closeBlock(b, ipam.Subtract(b, give, b.Addr().BitLen())...)
			}
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

// transfer raises the versions of the prefixes, makes a node their owner, and saves. also
// makes further changes in the same save. On an error nothing has changed.
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
		for _, e := range s.table.Within(p) { // entries of external peers keep their endpoint
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

// lacking returns the entries of a node that the node does not know.
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

// mayGive returns why this node does not give a fixed CIDR away, or "" if it does.
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
