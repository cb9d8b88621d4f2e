package ownership

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/ipam"
)

// promise is this node's promise that only one node may forget a given node for a while.
type promise struct {
	to    NodeID
	until time.Time
}

// forgetting is the takeover of a dead node's space.
//
// Versions exclude two owners only if nobody but the owner raises them. A forget raises
// the versions of another owner. So two nodes that forget the same node at the same
// time would tie. Therefore the node first asks every living member for a promise, and
// needs the promises of a majority. Each answer contains the table of that member, so
// that donations of the dead node that any of them knows are not taken. With force no
// majority is needed, but a living member that objects still stops the forget. A member
// saves its promise before it answers; the promise lasts promiseLease. The takeover
// happens within forgetWithin or not at all.
//
// A node that is restarted at once serves new pods before it has confirmed its table (Config.Fresh). So without force, a node
// is forgotten only when nobody who promises has seen it alive for longer than its state stays fresh. The forget waits for
// that, goneFor from when this node has seen it; the others refuse for ipam.FreshFor, which leaves them some seconds
// to notice a death later.
type forgetting struct {
	op     *Op
	victim NodeID
	force  bool
	seq    uint64
	after  time.Time // waits until then
	begun  time.Time // zero: still waits
	sent   time.Time
	yes    map[NodeID]bool
}

// Forget takes over the space of a node that is gone for good; one that owns nothing just stops to count as a member. It is refused while the
// node is alive, while its tunnel answers, while another node is forgetting it, and,
// unless forced, while this node does not reach a majority of the members. A node whose
// table is not confirmed may forget only by force, and only if no living member can
// confirm the table: the operator then guarantees that the disk is not an old one. Forget
// runs in the background.
func (s *Machine) Forget(now time.Time, id NodeID, force bool) (*Op, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, known := s.peers[id]
	known = known || len(s.table.Owned(id)) > 0
	switch {
	case s.cluster.IsZero():
		return nil, errOf(ErrRefused, "this node is in no cluster")
	case id == s.cfg.ID:
		return nil, errOf(ErrRefused, "a node does not forget itself; tulle leave gives its space back")
	case !known:
		return nil, errOf(ErrRefused, "no node %s is known here", id)
	case s.leave != nil || s.forget != nil:
		return nil, ErrBusy
	case !s.confirm.done && s.vouched():
		return nil, errOf(ErrUnconfirmed, "%s", s.why)
	case !s.confirm.done && !force:
		return nil, errOf(ErrUnconfirmed, "%s. Start the other nodes; if all of them are gone for good, --force does without", s.why)
	}
	if err := s.mayForget(now, id, s.cfg.ID); err != nil {
		return nil, err
	}
	if all, unseen := s.quorum(id); !force && all-len(unseen) <= all/2 {
		return nil, errOf(ErrNoMajority, "it sees %d of %d (itself counted)%s; --force does without", all-len(unseen), all, listed(", not ", unseen))
	}
	op := newOp()
	s.lastSeq++
	f := &forgetting{op: op, victim: id, force: force, seq: s.lastSeq, after: now, yes: make(map[NodeID]bool)}
	if !force && len(s.table.Owned(id)) > 0 {
		f.after = s.lastSeen(id).Add(goneFor)
	}
	if wait := f.after.Sub(now); wait > 0 {
		s.log.Info("forgets a node when it has been gone for long enough", "node", id.String(), "wait", wait.String())
	}
	s.forget = f
	s.driveForget(now)
	return op, nil
}

// lastSeen returns when this node has last seen another one alive, or when it started itself, as it may have missed it then.
func (s *Machine) lastSeen(id NodeID) time.Time {
	if at, ok := s.seen[id]; ok {
		return at
	}
	return s.started
}

// mayForget is the check that each node makes before it promises.
func (s *Machine) mayForget(now time.Time, id, by NodeID) error {
	if s.plant.forgetLive {
		return nil
	}
	if s.isAlive(id) {
		return errOf(ErrAlive, "%s sees %s; stop its agent and wait some seconds, or let it leave", s.name(s.cfg.ID), s.name(id))
	}
	if s.env.TunnelAnswers(id) {
		return errOf(ErrAlive, "the tunnel from %s to %s answers, although gossip does not: look at the gossip port", s.name(s.cfg.ID), s.name(id))
	}
	if p, ok := s.promises[id]; ok && p.to != by && now.Before(p.until) {
		return errOf(ErrBusy, "%s is forgetting it; try again in %v", s.name(p.to), p.until.Sub(now).Round(time.Second))
	}
	return nil
}

// quorum counts the members, and names those that are not alive. Members are the nodes that own space, the nodes that were
// ever seen and have not departed, and the node in question.
func (s *Machine) quorum(victim NodeID) (all int, unseen []string) {
	ids := map[NodeID]bool{victim: false}
	for _, e := range s.table.Entries() {
		ids[e.Owner] = false
	}
	for id := range s.peers {
		ids[id] = false
	}
	for _, m := range s.alive() {
		ids[m.ID] = true
	}
	ids[s.cfg.ID] = true
	for _, id := range sortedKeys(ids) {
		if !ids[id] {
			unseen = append(unseen, s.name(id))
		}
	}
	return len(ids), unseen
}

func (s *Machine) driveForget(now time.Time) {
	f := s.forget
	if f == nil {
		return
	}
	if f.begun.IsZero() {
		err := s.mayForget(now, f.victim, s.cfg.ID)
		switch {
		case err != nil: // it may have come back
			s.endForget("", err)
			return
		case now.Before(f.after):
			return
		}
		f.begun, s.promises[f.victim] = now, promise{s.cfg.ID, now.Add(promiseLease)}
	}
	late := now.Sub(f.begun) >= forgetWithin
	var missing []string
	var flags uint8
	if f.force {
		flags = flagForced
	}
	for _, m := range s.alive() {
		if m.ID != f.victim && !f.yes[m.ID] {
			missing = append(missing, s.name(m.ID))
			if !late && (f.sent.IsZero() || now.Sub(f.sent) >= retryEvery) {
				s.send(m.ID, message{kind: kindPromise, flags: flags, seq: f.seq, node: f.victim})
			}
		}
	}
	if f.sent.IsZero() || now.Sub(f.sent) >= retryEvery {
		f.sent = now
	}
	switch {
	case late:
		s.endForget("", errOf(ErrTimeout, "%s did not promise to let nobody else forget that node", strings.Join(missing, ", ")))
	case len(missing) == 0:
		s.takeOver(now)
	}
}

func (s *Machine) handlePromise(now time.Time, m *message) {
	ack := message{kind: kindPromiseAck, seq: m.seq, node: m.node}
	refuse := func(format string, args ...any) {
		ack.text = fmt.Sprintf(format, args...)
		s.send(m.sender, ack)
	}
	if m.node == s.cfg.ID {
		refuse("%s is alive, and it is the one that is to be forgotten", s.name(s.cfg.ID))
		return
	}
	if !s.confirm.done && m.flags&flagForced == 0 {
		refuse("%s has not confirmed its table yet", s.name(s.cfg.ID))
		return
	}
	if err := s.mayForget(now, m.node, m.sender); err != nil {
		refuse("%v", err)
		return
	}
	if at, ok := s.seen[m.node]; ok && m.flags&flagForced == 0 && now.Sub(at) < ipam.FreshFor && len(s.table.Owned(m.node)) > 0 {
		refuse("%s saw it alive %v ago; try again in %v", s.name(s.cfg.ID), now.Sub(at).Round(time.Second), (ipam.FreshFor - now.Sub(at)).Round(time.Second))
		return
	}
	old, had := s.promises[m.node]
	s.promises[m.node] = promise{m.sender, now.Add(promiseLease)}
	if err := s.save(now); err != nil {
		if delete(s.promises, m.node); had {
			s.promises[m.node] = old
		}
		refuse("%s: %v", s.name(s.cfg.ID), err)
		return
	}
	ack.flags, ack.entries = flagYes, s.table.Entries()
	s.send(m.sender, ack)
}

func (s *Machine) handlePromiseAck(now time.Time, m *message) {
	f := s.forget
	if f == nil || f.seq != m.seq || f.victim != m.node {
		return
	}
	if m.flags&flagYes == 0 {
		s.endForget("", errOf(ErrRefused, "%s", m.text))
		return
	}
	s.learn(now, m.entries)
	f.yes[m.sender] = true
	s.driveForget(now)
}

// takeOver raises the versions of all entries of the dead node. It checks the guards
// again, because collecting promises takes time.
func (s *Machine) takeOver(now time.Time) {
	f := s.forget
	if err := s.mayForget(now, f.victim, s.cfg.ID); err != nil {
		s.endForget("", err)
		return
	}
	if all, _ := s.quorum(f.victim); !f.force && len(f.yes)+1 <= all/2 {
		s.endForget("", errOf(ErrNoMajority, "%d of %d promised (itself counted)", len(f.yes)+1, all))
		return
	}
	table := s.table.Clone()
	var entries []Entry
	for _, e := range s.table.Owned(f.victim) {
		in, err := s.table.Assign(e.Prefix, s.cfg.ID, e.External)
		if err != nil {
			s.table = table
			s.endForget("", err)
			return
		}
		entries = append(entries, in...)
	}
	peer, had := s.peers[f.victim]
	former := slices.Clone(s.former)
	delete(s.peers, f.victim)
	s.addFormer(f.victim)
	s.joined = s.joined || len(entries) > 0
	if err := s.save(now); err != nil {
		if s.table, s.former = table, former; had {
			s.peers[f.victim] = peer
		}
		s.endForget("", err)
		return
	}
	s.tell(entries)
	news := message{kind: kindNews, cluster: s.cluster, sender: s.cfg.ID, flags: s.flags(), node: f.victim}
	s.env.Broadcast(news.encode())
	s.log.Warn("forgot a node", "node", f.victim.String(), "prefixes", len(entries), "forced", f.force)
	s.endForget(takenOver(entries), nil)
	s.notify()
	if s.leave == nil {
		s.driveSpace(now)
	}
}

func takenOver(entries []Entry) string {
	if len(entries) == 0 {
		return "it owned no space; it is no member any more"
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Prefix.String())
	}
	return fmt.Sprintf("took over %d prefixes: %s", len(entries), strings.Join(names, ", "))
}

func (s *Machine) endForget(text string, err error) {
	f := s.forget
	s.forget = nil
	if s.promises[f.victim].to == s.cfg.ID {
		delete(s.promises, f.victim)
	}
	if err != nil { // so that others may try at once
		for id := range f.yes {
			s.send(id, message{kind: kindUnpromise, node: f.victim})
		}
	}
	f.op.end(text, err)
}
