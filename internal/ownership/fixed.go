package ownership

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/ipam"
)

// fixed returns the prefix of --pod-cidr in a family.
func (s *Machine) fixed(fam int) (netip.Prefix, bool) {
	six := s.params.Families[fam].CIDR.Addr().Is6()
	for _, p := range s.cfg.PodCIDRs {
		if p.Addr().Is6() == six {
			return p, true
		}
	}
	return netip.Prefix{}, false
}

// driveFixed requests the fixed CIDR, part by part from the owners of its parts, and
// opens it as one block. A node with a fixed CIDR opens no other block of that family,
// because the operator has chosen the addresses of its pods. Pods get addresses of the
// blocks that it had before only if the fixed one is full, or if they ask for them; these blocks
// are closed when they have no pod any more.
func (s *Machine) driveFixed(now time.Time, fam int, p netip.Prefix) string {
	if slices.Contains(s.pool.Prefixes(), p) {
		s.asks[fam] = ask{}
		s.unnote("fixed " + p.String())
		s.closeOthers(now, fam, p)
		return ""
	}
	why := s.getFixed(now, fam, p)
	if why == "" {
		s.unnote("fixed " + p.String())
		return ""
	}
	s.note("fixed "+p.String(), why, "choose another --pod-cidr, or free that prefix first; without --pod-cidr the node takes any free block")
	if slices.ContainsFunc(s.pool.Prefixes(), s.params.Families[fam].CIDR.Overlaps) {
		return "" // it continues with its current block
	}
	return why
}

func (s *Machine) getFixed(now time.Time, fam int, p netip.Prefix) string {
	f := s.params.Families[fam]
	if !ipam.Covers(f.CIDR, p) {
		return fmt.Sprintf("--pod-cidr %v is outside the cluster CIDR %v", p, f.CIDR)
	}
	for _, e := range s.table.Within(p) {
		if e.Owner != s.cfg.ID {
			s.askAround(now, fam, e.Prefix)
			if full := s.asks[fam].full; full != "" {
				return full
			}
			return fmt.Sprintf("asks %s for %v", s.name(e.Owner), e.Prefix)
		}
		if e.External != nil {
			return fmt.Sprintf("--pod-cidr %v: an external peer uses %v", p, e.Prefix)
		}
	}
	for _, b := range s.pool.Prefixes() {
		if b.Overlaps(p) && s.blockUsed(b) {
			return fmt.Sprintf("--pod-cidr %v: pods of this node still live in block %v", p, b)
		}
	}
	before := s.pool.Prefixes()
	for _, b := range before {
		switch {
		case b.Overlaps(p):
			s.closeBlock(b, p)
		case f.CIDR.Overlaps(b) && !s.blockUsed(b):
			s.closeBlock(b)
		}
	}
	if err := s.open(now, p); err != nil {
		s.reopen(before)
		return err.Error()
	}
	return ""
}

// closeOthers closes the blocks of a family beside the fixed one in which no address is in use, or was lately.
func (s *Machine) closeOthers(now time.Time, fam int, fixed netip.Prefix) {
	before := s.pool.Prefixes()
	for _, b := range before {
		if b != fixed && s.params.Families[fam].CIDR.Overlaps(b) && !s.blockUsed(b) &&
			!slices.ContainsFunc(s.pool.Cooling(now), func(c ipam.Cooling) bool { return b.Contains(c.Addr) }) {
			s.closeBlock(b)
		}
	}
	if !slices.Equal(before, s.pool.Prefixes()) {
		s.dirty = true
		s.notify()
	}
}

// closeBlock closes a block. If the address of the TUN device is in it, that address stays as long as this node runs, because
// connections of the host have it: its block is replaced by the given ones if they have that address, else by the address
// alone, from which no pod gets anything. At the next start, openBlocks drops it.
func (s *Machine) closeBlock(b netip.Prefix, by ...netip.Prefix) {
	tun, ok := s.pool.TunAddr(b.Addr().Is6())
	switch {
	case !ok || !b.Contains(tun):
		s.pool.Close(b)
	case ipam.Overlaps(by, netip.PrefixFrom(tun, tun.BitLen())):
		s.pool.Replace(b, by...)
	default:
		s.pool.Replace(b, netip.PrefixFrom(tun, tun.BitLen()))
	}
}

// openBlocks opens the blocks of an earlier run, except what was there for the former address of the TUN device only: with a
// fixed CIDR it comes from that block now.
func (s *Machine) openBlocks(st *ipam.State) {
	six := func(p, q netip.Prefix) bool { return p.Addr().Is6() == q.Addr().Is6() }
	isFixed := func(p netip.Prefix) bool { return slices.Contains(s.cfg.PodCIDRs, p) }
	inUse := func(p netip.Prefix) bool {
		return slices.ContainsFunc(st.Allocations, func(a ipam.Allocation) bool { return p.Contains(a.Addr) }) ||
			slices.ContainsFunc(st.Cooling, func(c ipam.Cooling) bool { return p.Contains(c.Addr) })
	}
	for _, p := range st.Blocks {
		if isFixed(p) {
			s.pool.Open(p)
		}
	}
	for _, p := range st.Blocks {
		replaced := slices.ContainsFunc(st.Blocks, func(q netip.Prefix) bool {
			return q != p && six(p, q) && (p.IsSingleIP() || isFixed(q))
		})
		if !replaced || inUse(p) {
			s.pool.Open(p)
		}
	}
}
