package ownership

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/ipam"
)

// ask is the search for address space of one family.
//
//	idle ──▶ asks one owner ──▶ granted: idle
//	  ▲            │ refused, or no answer twice: the next owner
//	  │            ▼
//	  └── all asked: wait refusedEvery, report who owns how much
type ask struct {
	seq    uint64 // of the current request; 0: none
	to     NodeID
	prefix netip.Prefix // a fixed CIDR's part, or none
	sent   time.Time
	tries  int

	tried  map[NodeID]string // the refusals of this round
	resume time.Time         // the next round
	full   string            // why the last round had no result; "" before
}

// driveSpace opens blocks if they are needed, and asks for space if this node has no
// space for them.
func (s *Machine) driveSpace(now time.Time) {
	if !s.confirm.done || s.left || s.leave != nil {
		return
	}
	missing := ""
	for fam := range s.params.Families {
		if why := s.driveFamily(now, fam); why != "" {
			missing = why
		}
	}
	switch {
	case missing != "":
		s.setPhase(now, Joining, missing)
	case s.phase == Joining:
		s.setPhase(now, Ready, "")
	}
}

// driveFamily returns why the family has no open block, or "".
func (s *Machine) driveFamily(now time.Time, fam int) string {
	if fixed, ok := s.fixed(fam); ok {
		return s.driveFixed(now, fam, fixed)
	}
	f, a := s.params.Families[fam], &s.asks[fam]
	six := f.CIDR.Addr().Is6()
	has := slices.ContainsFunc(s.pool.Prefixes(), f.CIDR.Overlaps)
	if has && s.pool.Spare(now, six, spareWanted(f)) >= spareWanted(f) {
		*a = ask{full: ""}
		return ""
	}
	if p, ok := nextBlock(s.openable(fam), f.BlockLen); ok {
		if err := s.open(now, p); err != nil {
			return err.Error()
		}
		*a = ask{}
		return ""
	}
	s.askAround(now, fam, netip.Prefix{})
	if has {
		return ""
	}
	return cmp.Or(a.full, "asks the owners for space")
}

// spareWanted returns the number of free addresses below which a node opens or asks for
// the next block, so that pods that start together need not wait for the network.
func spareWanted(f ipam.Family) uint64 {
	return min(8, uint64(1)<<min(f.CIDR.Addr().BitLen()-f.BlockLen, 16)/16)
}

// open opens the block p and saves that.
func (s *Machine) open(now time.Time, p netip.Prefix) error {
	s.pool.Open(p)
	if err := s.save(now); err != nil {
		s.pool.Close(p)
		return err
	}
	s.log.Info("opened a block", "block", p.String())
	s.notify()
	return nil
}

// askAround asks one owner after the other for free space, or the owner of a part of a
// fixed CIDR for that part.
func (s *Machine) askAround(now time.Time, fam int, fixed netip.Prefix) {
	a := &s.asks[fam]
	if now.Before(a.resume) {
		return
	}
	// Save the ID first: space that is given to an ID which a crash makes this node forget would be lost.
	if s.generation == 0 || s.saveErr != nil {
		if s.save(now) != nil {
			return
		}
	}
	if a.seq != 0 {
		if now.Sub(a.sent) < retryEvery {
			return
		}
		if a.tries < 2 && s.isAlive(a.to) {
			s.request(now, fam) // the same request: the answer may have been lost
			return
		}
		a.refused(a.to, "does not answer")
	}
	to, ok := s.nextOwner(fam, fixed)
	if !ok {
		a.full = s.exhausted(fam, fixed)
		a.resume, a.tried, a.seq = now.Add(refusedEvery), nil, 0
		return
	}
	s.lastSeq++
	a.seq, a.to, a.prefix, a.tries = s.lastSeq, to, fixed, 0
	s.request(now, fam)
}

func (s *Machine) request(now time.Time, fam int) {
	a := &s.asks[fam]
	a.sent = now
	a.tries++
	var have []Entry
	for _, e := range s.table.Owned(s.cfg.ID) {
		if s.params.Families[fam].CIDR.Contains(e.Prefix.Addr()) {
			have = append(have, e)
		}
	}
	s.send(a.to, message{kind: kindRequest, seq: a.seq, count: uint64(fam), prefix: a.prefix, entries: have})
}

func (a *ask) refused(by NodeID, why string) {
	if a.tried == nil {
		a.tried = make(map[NodeID]string)
	}
	a.tried[by] = why
	a.seq = 0
}

// nextOwner returns the node to ask: the living owner of the fixed CIDR, or else the
// living owner with the most space that has not refused in this round.
func (s *Machine) nextOwner(fam int, fixed netip.Prefix) (NodeID, bool) {
	a := &s.asks[fam]
	usable := func(id NodeID) bool {
		_, tried := a.tried[id]
		return id != s.cfg.ID && !tried && s.isAlive(id)
	}
	if fixed.IsValid() {
		e, ok := s.table.Owner(fixed.Addr())
		return e.Owner, ok && usable(e.Owner)
	}
	var best NodeID
	var most uint64
	for _, sh := range s.shares() {
		if n := sh.Blocks[fam]; n > most && usable(sh.Node) {
			best, most = sh.Node, n
		}
	}
	return best, most > 0
}

// shares counts the blocks of each owner, largest share of the first family first. A block may be spread over entries with
// different versions; only the owner matters.
func (s *Machine) shares() []Share {
	byNode := make(map[NodeID]int)
	var out []Share
	var owned [][][]netip.Prefix // by node as in out, then by family
	for _, e := range s.table.Entries() {
		i, ok := byNode[e.Owner]
		if !ok {
			i = len(out)
			byNode[e.Owner] = i
			out = append(out, Share{Node: e.Owner, Name: s.peers[e.Owner].Name, Blocks: make([]uint64, len(s.params.Families))})
			owned = append(owned, make([][]netip.Prefix, len(s.params.Families)))
		}
		if fam := s.familyOf(e.Prefix); fam >= 0 && e.External == nil {
			owned[i][fam] = append(owned[i][fam], e.Prefix)
		}
	}
	for i := range out {
		for fam, f := range s.params.Families {
			out[i].Blocks[fam] = blockCount(ipam.Aggregate(owned[i][fam]), f.BlockLen)
		}
	}
	alive := make(map[NodeID]bool)
	for _, m := range s.env.Members() {
		alive[m.ID] = m.Alive
	}
	for i := range out {
		sh := &out[i]
		sh.Self = sh.Node == s.cfg.ID
		sh.Alive = sh.Self || alive[sh.Node]
		if sh.Self {
			sh.Name = s.cfg.Name
		}
	}
	slices.SortStableFunc(out, func(a, b Share) int {
		return cmp.Or(slices.Compare(b.Blocks, a.Blocks), a.Node.Compare(b.Node))
	})
	return out
}

// exhausted returns the reason why no owner gave space.
func (s *Machine) exhausted(fam int, fixed netip.Prefix) string {
	a := &s.asks[fam]
	if fixed.IsValid() {
		e, ok := s.table.Owner(fixed.Addr())
		switch why, tried := a.tried[e.Owner]; {
		case !ok:
			return fmt.Sprintf("--pod-cidr: nobody owns %v", fixed)
		case tried:
			return fmt.Sprintf("--pod-cidr: %s, which owns %v, does not give it: %s", s.name(e.Owner), fixed, why)
		default:
			return fmt.Sprintf("--pod-cidr: %s, which owns %v, is not alive: start it, or forget it (tulle forget)", s.name(e.Owner), fixed)
		}
	}
	f := s.params.Families[fam]
	var parts []string
	dead := false
	for _, sh := range s.shares() {
		if sh.Blocks[fam] == 0 {
			continue
		}
		state := cmp.Or(a.tried[sh.Node], "alive")
		if !sh.Alive {
			state, dead = "dead", true
		}
		parts = append(parts, fmt.Sprintf("%s owns %d (%s)", s.name(sh.Node), sh.Blocks[fam], state))
		if len(parts) == 16 {
			parts = append(parts, "…")
			break
		}
	}
	what := fmt.Sprintf("no free block of /%d in %v: %s", f.BlockLen, f.CIDR, strings.Join(parts, ", "))
	if dead {
		return what + ". Start the dead nodes, or take their space over with tulle forget"
	}
	return what + ". Let nodes leave that are not needed; a larger cluster CIDR needs a new cluster"
}

// handleGrant accepts space from an owner. It accepts a grant at any time, because the
// donor has saved it.
func (s *Machine) handleGrant(now time.Time, from NodeID, m *message) {
	before := s.table.Clone()
	s.learn(now, m.entries)
	if m.flags&flagLacking != 0 && s.table.Equal(before) {
		// The donor believes that we own space that we have given away since: tell it.
		s.send(from, s.state(0))
	}
	for fam := range s.params.Families {
		if a := &s.asks[fam]; a.seq == m.seq && a.to == from {
			if m.flags&flagLacking == 0 {
				a.tried = nil // there is space again
			}
			a.seq, a.full = 0, ""
		}
	}
	s.driveSpace(now)
}

func (s *Machine) handleRefuse(now time.Time, from NodeID, m *message) {
	if m.reason == refusedStale && m.count < 1<<63 {
		s.lastSeq = max(s.lastSeq, m.count)
	}
	for fam := range s.params.Families {
		a := &s.asks[fam]
		if a.seq != m.seq || a.to != from {
			continue
		}
		if m.reason == refusedStale {
			a.seq = 0 // ask again, with a new number
			break
		}
		a.refused(from, m.text)
	}
	s.driveSpace(now)
}
