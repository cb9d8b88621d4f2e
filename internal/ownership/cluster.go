package ownership

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/membership"
)

// Tick does everything that is due. It returns the time by which it must be called again.
func (s *Machine) Tick(now time.Time) time.Time {
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

// Flush saves what the disk does not have yet: members' addresses, for instance, which otherwise wait for the next Tick. It is
// called when the agent stops.
func (s *Machine) Flush(now time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.dirty || s.cluster.IsZero() {
		return nil
	}
	return s.save(now)
}

// MembersChanged reports that Env.Members has changed.
func (s *Machine) MembersChanged(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drive(now)
}

// drive advances the machine as far as possible without further input.
func (s *Machine) drive(now time.Time) {
	s.seeMembers(now)
	s.endNotes(now)
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

// seeMembers records the members of this cluster as peers, so that they are found again after a restart. A newcomer that has got
// space is one before it has told anybody that it has joined: if the network fails in that moment, nobody else may know of it.
func (s *Machine) seeMembers(now time.Time) {
	maps.DeleteFunc(s.seen, func(_ NodeID, at time.Time) bool { return now.Sub(at) > goneFor })
	for _, m := range s.env.Members() {
		if m.Alive {
			s.seen[m.ID] = now
		}
		if m.ID == s.cfg.ID || s.cluster.IsZero() || !m.Alive || s.departed[m.ID] {
			continue
		}
		if m.Cluster != s.cluster && !(m.Cluster.IsZero() && len(s.table.Owned(m.ID)) > 0) {
			continue
		}
		if old, ok := s.peers[m.ID]; !ok || old.Name != m.Name || m.Addr.IsValid() && old.Addr != m.Addr {
			p := ipam.Peer{ID: ipam.ID(m.ID), Name: m.Name, Addr: m.Addr}
			if !p.Addr.IsValid() {
				p.Addr = old.Addr
			}
			s.peers[m.ID], s.dirty = p, true
			if !ok {
				s.returned(m.ID)
			}
		}
	}
}

// alive returns the living members of this cluster, in the order of their IDs.
func (s *Machine) alive() []Member {
	var out []Member
	for _, m := range s.env.Members() {
		if m.Alive && m.ID != s.cfg.ID && m.Cluster == s.cluster {
			out = append(out, m)
		}
	}
	slices.SortFunc(out, func(a, b Member) int { return a.ID.Compare(b.ID) })
	return out
}

func (s *Machine) isAlive(id NodeID) bool {
	return slices.ContainsFunc(s.env.Members(), func(m Member) bool { return m.ID == id && m.Alive })
}

// driveWaiting asks members about their cluster, or starts one.
func (s *Machine) driveWaiting(now time.Time) {
	// Seeds before members: of a seed that has answered the members are known. The other way round a member of a cluster
	// that answers in between would count as a seed without one.
	seeds := s.env.Seeds()
	var inCluster []Member
	var newcomers []Member
	for _, m := range s.env.Members() {
		switch {
		case !m.Alive || m.ID == s.cfg.ID:
		case m.Cluster.IsZero():
			newcomers = append(newcomers, m)
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
		s.completeFrom = time.Time{}
		return
	}
	why := s.mayBootstrap(now, seeds, len(newcomers))
	if why == "" {
		why = s.mayFound(now, newcomers)
	} else {
		s.giveWordsBack()
	}
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

// mayBootstrap returns why this node does not start a cluster, or "" if it may.
//
// All hosts may share one configuration. So a first start looks like the start of a
// bootstrap node that has lost its disk: bootstrap is set, there is no state, and the
// other seeds may not answer because the network is down or because they are new.
// Therefore a node with seeds starts a cluster only when every one of them has
// answered and none is in a cluster; an operator who knows more can force it.
//
// The seeds may have lost their disks as well, while other members live. Those call
// every seed that they miss every two seconds. So the node waits for them for
// seedPatience, from when all seeds answer. Where every seed leads to the node itself, nobody else
// has answered, and its name server may know the others a little later: selfPatience. (Addresses stay what they are.)
//
// A node without any seed starts a cluster at once.
func (s *Machine) mayBootstrap(now time.Time, seeds Seeds, newcomers int) string {
	complete := seeds.Tried && seeds.Answered == seeds.Others
	if !complete || s.completeFrom.IsZero() || s.completeOthers != seeds.Others {
		s.completeFrom, s.completeOthers = now, seeds.Others
	}
	waited := now.Sub(s.completeFrom)
	switch {
	case !s.founder():
		return s.mayNot(seeds, newcomers)
	case seeds.Configured == 0 || s.plant.foundAtOnce && complete:
		return ""
	case !seeds.Tried || now.Sub(s.started) < seedPatience:
		return "trying the seeds before starting a cluster"
	case s.cfg.ForceBootstrap:
		return ""
	case seeds.Answered < seeds.Others:
		return fmt.Sprintf("this node may start the cluster, but %d of its %d other seeds do not answer, and they may already be one%s. "+
			"Start them; if this really is a new cluster, start this node once with --bootstrap=force", seeds.Others-seeds.Answered, seeds.Others, listed(": ", seeds.Silent))
	case seeds.Others == 0 && seeds.Names > 0 && waited < selfPatience:
		return fmt.Sprintf("every seed leads to this node itself: it starts the cluster %v after its start, if until then no member calls and no name leads to another host", selfPatience)
	case waited < seedPatience:
		return "every seed answers and is in no cluster: this node starts one in a few seconds, if no member calls"
	}
	return ""
}

// mayNot returns what a node waits for that must not start a cluster.
func (s *Machine) mayNot(seeds Seeds, newcomers int) string {
	answered := newcomers > 0 || seeds.Answered > 0
	named := s.cfg.Bootstrapper
	switch {
	case seeds.Others > 0 && !answered:
		return fmt.Sprintf("none of %d seeds answers: is an agent running there, is the gossip port open, is the key the same?", seeds.Others)
	case named != "" && slices.ContainsFunc(s.env.Members(), func(m Member) bool { return m.Alive && strings.EqualFold(m.Name, named) }):
		return fmt.Sprintf("%s, which is to start the cluster, waits itself: tulle status there says for what", named)
	case named != "":
		var names []string
		for _, m := range s.env.Members() {
			if m.Alive {
				names = append(names, m.Name)
			}
		}
		slices.Sort(names)
		others := ""
		if len(names) > 0 {
			others = listed(" (", names) + ")"
		}
		return fmt.Sprintf("no cluster yet: the configuration says that %s starts it (bootstrap: %[1]s), and neither this node (%s) nor any that answers%s has that name: "+
			"start that host, or correct `bootstrap` or `node_name`", named, s.cfg.Name, others)
	case seeds.Others == 0 && !answered:
		return "no state, no seed to join and no bootstrap flag: give --join HOST, or --bootstrap on exactly one node"
	}
	return "the seeds that answer are in no cluster yet: one node has to be started with --bootstrap"
}

// listed returns the first few names after a separator; "" if there are none.
func listed(sep string, names []string) string {
	const most = 5
	switch {
	case len(names) == 0:
		return ""
	case len(names) > most:
		return fmt.Sprintf("%s%s and %d more", sep, strings.Join(names[:most], ", "), len(names)-most)
	}
	return sep + strings.Join(names, ", ")
}

func (s *Machine) bootstrap(now time.Time) error {
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

// adopt joins the cluster that a member reported.
func (s *Machine) adopt(now time.Time, m *message) error {
	if m.cluster.IsZero() || len(m.families) == 0 {
		return nil
	}
	for _, f := range m.families {
		if err := checkFamily(f); err != nil {
			return fmt.Errorf("the cluster that %s tells of: %w", m.sender.Short(), err)
		}
	}
	s.cluster, s.params = m.cluster, Params{m.families}
	s.confirm.done = true // it owns nothing that it could give away because of an old disk
	s.log.Info("joins the cluster", "cluster", s.cluster.String(), "told by", m.sender.String())
	s.setPhase(now, Joining, "asks the owners for space")
	s.checkParams()
	s.learn(now, m.entries)
	s.seeMembers(now)
	s.dirty = true
	return nil
}

// checkParams compares the cluster's parameters with the configuration. The cluster's
// apply.
func (s *Machine) checkParams() {
	want := slices.Clone(s.cfg.CIDRs)
	ipam.Sort(want)
	var have []netip.Prefix
	s.unnote("block length")
	for _, f := range s.params.Families {
		have = append(have, f.CIDR)
		asked := s.cfg.BlockLen4
		if f.CIDR.Addr().Is6() {
			asked = s.cfg.BlockLen6
		}
		if asked != 0 && asked != f.BlockLen {
			s.note("block length", fmt.Sprintf("the configuration says --node-prefix-len %d, the cluster's blocks in %v are /%d", asked, f.CIDR, f.BlockLen),
				"correct --node-prefix-len, or leave it out on nodes that join; it is fixed when the cluster starts")
		}
	}
	if len(want) == 0 || slices.Equal(want, have) {
		s.unnote("params")
		return
	}
	s.note("params", fmt.Sprintf("the configuration says --cluster-cidr %v, the cluster uses %v", want, have),
		"correct --cluster-cidr, or leave it out on nodes that join; it is fixed when the cluster starts")
}

// due reports whether a message to a member must be sent (again), and records the time.
func (s *Machine) due(now time.Time, c *confirmation, id NodeID) bool {
	if at, ok := c.asked[id]; ok && now.Sub(at) < retryEvery {
		return false
	}
	if c.asked == nil {
		c.asked, c.first = make(map[NodeID]time.Time), make(map[NodeID]time.Time)
	}
	if c.asked[id] = now; c.first[id].IsZero() {
		c.first[id] = now
	}
	return true
}
