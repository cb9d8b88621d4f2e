package space

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/membership"
)

// confirmation is the exchange with every living member that a node with state
// on disk goes through before it gives away or opens space.
//
// What it proves (S1 after a rollback). A node's words are the changes that it
// made to what it owned: donations, external peers, leaving. Only an owner speaks,
// so a disk that is older than the node's last words can hurt in one way only: the
// node may take for its own what it has given since, because its disk says so, or
// because a member says so that has not heard the later word either. Every word
// carries a higher version than all before it, so one answer that knows the word
// is enough. Hence:
//
//	S1 holds for a node with a rolled back disk if, for every word that the disk
//	has lost, at least one of the members that answered its confirmation knows
//	that word (or a later one over the same addresses).
//
// That is met whenever one member is alive that heard of it, since all who are
// alive are asked: the receiver of a donation has it from the moment of the
// answer, everybody else within a few gossip rounds. It is not met when all who
// heard the word are dead or out of reach at that moment, and no protocol without
// a quorum for each donation could do better. A disk that was not rolled back needs
// no witness: words are on it before anybody hears them. What rests for other
// pods, however, is forgotten with the disk: after a rollback, the cool-down of
// addresses that were given and released since is not kept.
//
// A node that knows of no other member (it owns the whole table and has no
// peers) is confirmed by itself: there is nobody to ask. A disk that was rolled
// back to that moment is outside of what can be proven.
type confirmation struct {
	done    bool
	nonce   uint64               // of this start: answers to an earlier one do not count
	asked   map[NodeID]time.Time // when last
	answers map[NodeID]bool      // who answered; true when it counts: it has owned space
}

// Tick does what is due and returns when it wants to be called again at the latest.
func (s *Space) Tick(now time.Time) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drive(now)
	if s.dirty && !s.cluster.IsZero() {
		s.save(now) // an error shows in the problems and is tried again
	}
	if s.phase == Ready && s.leave == nil && s.forget == nil && !s.dirty {
		return now.Add(5 * time.Second)
	}
	return now.Add(500 * time.Millisecond)
}

// MembersChanged tells that Env.Members has news.
func (s *Space) MembersChanged(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drive(now)
}

// drive moves the machine as far as it goes without news from outside.
func (s *Space) drive(now time.Time) {
	s.seeMembers(now)
	s.forgetLoss(now)
	if s.phase == Waiting {
		s.driveWaiting(now)
	}
	if s.cluster.IsZero() {
		return
	}
	if !s.confirm.done {
		s.driveConfirm(now)
	}
	if s.leave != nil {
		s.driveLeave(now)
	} else if s.confirm.done {
		s.driveSpace(now)
	}
	s.driveForget(now)
	s.driveHeld(now)
}

// seeMembers remembers the members of this cluster as peers.
func (s *Space) seeMembers(now time.Time) {
	for _, m := range s.env.Members() {
		if m.ID == s.cfg.ID || s.cluster.IsZero() || m.Cluster != s.cluster || !m.Alive || s.departed[m.ID] {
			continue
		}
		if old, ok := s.peers[m.ID]; !ok || old.Name != m.Name || m.Addr.IsValid() && old.Addr != m.Addr {
			p := ipam.Peer{ID: ipam.ID(m.ID), Name: m.Name, Addr: m.Addr}
			if !p.Addr.IsValid() {
				p.Addr = old.Addr
			}
			s.peers[m.ID], s.dirty = p, true
		}
	}
}

// alive returns the living members of this cluster, in the order of their IDs.
func (s *Space) alive() []Member {
	var out []Member
	for _, m := range s.env.Members() {
		if m.Alive && m.ID != s.cfg.ID && m.Cluster == s.cluster {
			out = append(out, m)
		}
	}
	slices.SortFunc(out, func(a, b Member) int { return a.ID.Compare(b.ID) })
	return out
}

func (s *Space) isAlive(id NodeID) bool {
	return slices.ContainsFunc(s.env.Members(), func(m Member) bool { return m.ID == id && m.Alive })
}

// driveWaiting asks members that are in a cluster about it, or starts one.
func (s *Space) driveWaiting(now time.Time) {
	var inCluster []Member
	newcomers := 0
	for _, m := range s.env.Members() {
		switch {
		case !m.Alive || m.ID == s.cfg.ID:
		case m.Cluster.IsZero():
			newcomers++
		default:
			inCluster = append(inCluster, m)
		}
	}
	live := s.plant.bootstrapLive && s.cfg.Bootstrap
	if len(inCluster) > 0 && !live {
		for _, m := range inCluster {
			if s.due(now, &s.confirm, m.ID) {
				s.send(m.ID, message{kind: kindSync, seq: s.confirm.nonce})
			}
		}
		s.setPhase(now, Waiting, "a member answers, its cluster's table is on the way")
		return
	}
	why := s.mayBootstrap(now, newcomers)
	if live {
		why = ""
	}
	if why != "" {
		s.setPhase(now, Waiting, why)
		return
	}
	if err := s.bootstrap(now); err != nil {
		s.setPhase(now, Waiting, err.Error())
	}
}

// mayBootstrap says why this node does not start a cluster, or "".
//
// All hosts may share one configuration, so a first start and a bootstrap node
// that lost its disk look alike: the word is there, the state is not, and the
// other seeds may be silent only because the network is down, or be new
// themselves. A node that has other seeds therefore starts a cluster only when
// every one of them has answered and none is in a cluster; an operator who knows
// better can force it. A node without other seeds starts at once.
func (s *Space) mayBootstrap(now time.Time, newcomers int) string {
	seeds := s.env.Seeds()
	if s.cfg.ForceBootstrap {
		return ""
	}
	if !s.cfg.Bootstrap {
		if seeds.Others == 0 {
			return "no state, no seed to join and no bootstrap word: give --join HOST, or --bootstrap on exactly one node"
		}
		if newcomers > 0 || seeds.Answered > 0 {
			return "the seeds that answer are in no cluster yet: one node has to be started with --bootstrap"
		}
		return fmt.Sprintf("none of %d seeds answers: is an agent running there, is the gossip port open, is the key the same?", seeds.Others)
	}
	if seeds.Others == 0 {
		return ""
	}
	if !seeds.Tried || now.Sub(s.started) < seedPatience {
		return "trying the seeds before starting a cluster"
	}
	if seeds.Answered < seeds.Others {
		return fmt.Sprintf("this node may start the cluster, but %d of its %d other seeds do not answer, and they may already be one. "+
			"Start them; if this really is a new cluster, force the bootstrap, or start this node without --join", seeds.Others-seeds.Answered, seeds.Others)
	}
	return ""
}

// Bootstrap starts a cluster now, whatever the seeds say. It is refused when the
// node is in one.
func (s *Space) Bootstrap(now time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.phase != Waiting {
		return fmt.Errorf("%w: this node is in cluster %s already", ErrRefused, s.cluster)
	}
	return s.bootstrap(now)
}

func (s *Space) bootstrap(now time.Time) error {
	families, err := s.cfg.families()
	if err != nil {
		return err
	}
	for i := range s.cluster {
		s.cluster[i] = byte(s.rand.Uint32())
	}
	s.params = Params{families}
	for _, f := range families {
		if _, err := s.table.Assign(f.CIDR, s.cfg.ID, nil); err != nil {
			return err
		}
	}
	s.joined, s.confirm.done = true, true
	if err := s.save(now); err != nil {
		s.cluster, s.params, s.joined, s.confirm.done = ClusterID{}, Params{}, false, false
		s.table = new(membership.Table)
		return err
	}
	s.log.Info("started a cluster", "cluster", s.cluster.String(), "cidrs", s.cfg.CIDRs)
	s.setPhase(now, Joining, "opening the first blocks")
	s.driveSpace(now)
	return nil
}

// adopt takes over the cluster that a member told of.
func (s *Space) adopt(now time.Time, m *message) error {
	if m.cluster.IsZero() || len(m.families) == 0 {
		return nil
	}
	for _, f := range m.families {
		if err := checkFamily(f); err != nil {
			return fmt.Errorf("the cluster that %s tells of: %w", m.sender.Short(), err)
		}
	}
	s.cluster, s.params = m.cluster, Params{m.families}
	s.confirm.done = true // it owns nothing that an old disk could tempt it to give
	s.log.Info("joins the cluster", "cluster", s.cluster.String(), "told by", m.sender.String())
	s.setPhase(now, Joining, "asks the owners for space")
	s.checkParams()
	s.learn(now, m.entries)
	s.seeMembers(now)
	s.dirty = true
	return nil
}

// checkParams compares the cluster's parameters with the configuration's. The
// cluster's hold.
func (s *Space) checkParams() {
	if len(s.cfg.CIDRs) == 0 {
		return
	}
	want := slices.Clone(s.cfg.CIDRs)
	ipam.Sort(want)
	var have []netip.Prefix
	for _, f := range s.params.Families {
		have = append(have, f.CIDR)
	}
	if slices.Equal(want, have) {
		s.unnote("params")
		return
	}
	s.note("params", fmt.Sprintf("the configuration says --cluster-cidr %v, the cluster uses %v", want, have),
		"correct --cluster-cidr, or leave it out on nodes that join; it is fixed when the cluster starts")
}

// driveConfirm asks every living member, and is done when all have answered.
func (s *Space) driveConfirm(now time.Time) {
	alive := s.alive()
	var silent []string
	counted := 0
	for _, m := range alive {
		counts, answered := s.confirm.answers[m.ID]
		if counts {
			counted++
		}
		if !answered {
			silent = append(silent, s.name(m.ID))
		}
		// One that does not count yet may do so when it has got space.
		if !counts && s.due(now, &s.confirm, m.ID) {
			s.send(m.ID, message{kind: kindSync, seq: s.confirm.nonce})
		}
	}
	lone := s.isLone(alive)
	switch {
	case len(silent) > 0:
		s.why = "waiting for the table of " + strings.Join(silent, ", ")
	case counted == 0 && !lone:
		s.why = "no member that knows the table answers yet; opens and gives no space until one does"
	default:
		s.confirmed(now)
	}
}

// isLone reports whether nobody else can know more of this node's space than it
// does: it owns the whole table, and has no peers but newcomers, which have
// answered that they never owned anything.
func (s *Space) isLone(alive []Member) bool {
	for _, e := range s.table.Entries() {
		if e.Owner != s.cfg.ID {
			return false
		}
	}
	for id := range s.peers {
		counts, answered := s.confirm.answers[id]
		if counts || !answered || !slices.ContainsFunc(alive, func(m Member) bool { return m.ID == id }) {
			return false
		}
	}
	return true
}

// vouched reports whether a living member has answered, or may yet answer, that
// counts for the confirmation.
func (s *Space) vouched() bool {
	for _, m := range s.alive() {
		if counts, answered := s.confirm.answers[m.ID]; counts || !answered {
			return true
		}
	}
	return false
}

func (s *Space) confirmed(now time.Time) {
	s.confirm.done = true
	s.log.Info("the table is confirmed", "members", len(s.confirm.answers))
	if s.phase == Confirming {
		s.setPhase(now, Joining, "opening blocks")
	}
	s.notify()
}

// due reports whether a message to a member is to be sent (again), and notes it.
func (s *Space) due(now time.Time, c *confirmation, id NodeID) bool {
	if at, ok := c.asked[id]; ok && now.Sub(at) < retryEvery {
		return false
	}
	if c.asked == nil {
		c.asked = make(map[NodeID]time.Time)
	}
	c.asked[id] = now
	return true
}

// learn merges what others say and looks after what that means for this node.
func (s *Space) learn(now time.Time, entries []Entry) {
	entries = s.inside(entries)
	before := s.table.Clone()
	merge := s.table.Merge
	if s.plant.merge != nil {
		merge = func(in []Entry) ([]Entry, []membership.Conflict) { return s.plant.merge(s.table, in) }
	}
	changed, conflicts := merge(entries)
	for _, c := range conflicts {
		s.note("tie "+c.Prefix.String(), fmt.Sprintf("two nodes claimed %v: %s keeps it, %s has lost it (a node was forgotten while it was alive)",
			c.Prefix, s.name(c.Winner), s.name(c.Loser)), "restart the pods of the loser that have addresses in it")
	}
	if len(changed) == 0 {
		return
	}
	s.dirty = true
	for _, e := range changed {
		if e.Owner == s.cfg.ID {
			s.joined = true
			continue
		}
		for _, old := range before.Within(e.Prefix) {
			if old.Owner == s.cfg.ID {
				s.lostAt = now
				s.lost(old.Prefix, e)
			}
		}
	}
	s.notify()
}

// inside keeps the entries that lie in the cluster's CIDRs.
func (s *Space) inside(entries []Entry) []Entry {
	ok := func(e Entry) bool {
		return slices.ContainsFunc(s.params.Families, func(f ipam.Family) bool { return ipam.Covers(f.CIDR, e.Prefix) })
	}
	if !slices.ContainsFunc(entries, func(e Entry) bool { return !ok(e) }) {
		return entries
	}
	return slices.DeleteFunc(slices.Clone(entries), func(e Entry) bool { return !ok(e) })
}

// lost closes the blocks that somebody else owns now. This node has not given
// them: it was forgotten while it was away, or its disk was older than that.
func (s *Space) lost(p netip.Prefix, to Entry) {
	for _, b := range s.pool.Prefixes() {
		if b.Overlaps(p) {
			s.pool.Close(b)
		}
	}
	s.note("lost "+to.Prefix.String(), fmt.Sprintf("%v, which this node used, belongs to %s since version %d: this node was forgotten while it was away, or its disk is older than that",
		p, s.name(to.Owner), to.Version), "new pods get addresses from new space; restart pods that still have an old address (tulle ipam check)")
}

// forgetLoss ends the report of lost space when no pod suffers from it any more
// and it has been there long enough to be read.
func (s *Space) forgetLoss(now time.Time) {
	if s.lostAt.IsZero() || now.Sub(s.lostAt) < reportFor || len(s.stranded()) > 0 {
		return
	}
	for key := range s.notes {
		if strings.HasPrefix(key, "lost ") {
			s.unnote(key)
		}
	}
	s.lostAt = time.Time{}
}

// owned returns this node's space of a family, without what external peers use.
func (s *Space) owned(fam int) []netip.Prefix {
	var out []netip.Prefix
	for _, e := range s.table.Entries() {
		if e.Owner == s.cfg.ID && e.External == nil && s.params.Families[fam].CIDR.Contains(e.Prefix.Addr()) {
			out = append(out, e.Prefix)
		}
	}
	return out
}

// busy returns what must not be given away: the open blocks, and addresses outside
// them that a pod has or that rest.
func (s *Space) busy(now time.Time) []netip.Prefix {
	blocks := s.pool.Prefixes()
	out := slices.Clone(blocks)
	add := func(a netip.Addr) {
		if !slices.ContainsFunc(blocks, func(b netip.Prefix) bool { return b.Contains(a) }) {
			out = append(out, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	for _, a := range s.pool.Allocations() {
		add(a.Addr)
	}
	for _, c := range s.pool.Resting(now) {
		add(c.Addr)
	}
	return out
}

// openable returns where this node can open its next block. Addresses in it that
// a pod has already, or that rest, are minded by the pool.
func (s *Space) openable(fam int) []netip.Prefix {
	return ipam.Free(s.owned(fam), s.pool.Prefixes(), s.params.Families[fam].BlockLen)
}

// free returns what this node can give away of a family.
func (s *Space) free(now time.Time, fam int) []netip.Prefix {
	return ipam.Free(s.owned(fam), s.busy(now), s.params.Families[fam].BlockLen)
}
