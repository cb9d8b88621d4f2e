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
// because the operator has chosen the addresses of its pods.
func (s *Machine) driveFixed(now time.Time, fam int, p netip.Prefix) string {
	if slices.Contains(s.pool.Prefixes(), p) {
		s.asks[fam] = ask{}
		s.unnote("fixed")
		return ""
	}
	why := s.getFixed(now, fam, p)
	if why == "" {
		s.unnote("fixed")
		return ""
	}
	s.note("fixed", why, "choose another --pod-cidr, or free that prefix first; without --pod-cidr the node takes any free block")
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
		if b.Overlaps(p) || f.CIDR.Overlaps(b) && !s.blockUsed(b) {
			s.pool.Close(b)
		}
	}
	if err := s.open(now, p); err != nil {
		s.reopen(before)
		return err.Error()
	}
	return ""
}
