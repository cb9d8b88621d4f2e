package ownership

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Founding a cluster. Several new nodes may be configured to start it: cloned images
// with the bootstrap node's name, or --bootstrap on two hosts. Of those that can see
// each other at most one may start. So a founder first asks every new node that it sees
// for its consent, and starts when it has all consents:
//
//	founder                            every other new node
//	   │  found 7                            │
//	   ├────────────────────────────────────▶│  has consented to no other founder:
//	   │                        found-ack 7  │  consents, for foundLease
//	   │◀────────────────────────────────────┤
//	   │  has all consents, none older than half the lease: starts
//
// A consent lasts until its lease ends or the founder releases it. A node that has
// consented starts no cluster itself. So of two founders that see each other, or both see
// a third node, only one can have all consents.
//
// The lower node ID decides which one: a founder consents to a founder with a lower ID.
// A founder that learns from an answer that a lower one wants to start releases all
// consents and waits for one lease. IDs of new nodes are random, so the order means
// nothing else.
//
// A node that is in a cluster answers with its state, and the founder joins it.
type founding struct {
	began     time.Time            // time of the first request; zero: not asking
	nonce     uint64               // a request's number is this plus the nanoseconds since began
	sent      time.Time            // time of the last round of requests
	consents  map[NodeID]time.Time // the consents of other nodes, and when each was requested
	consented NodeID               // the founder that this node has consented to
	until     time.Time            // end of that consent
	rival     NodeID               // the lowest other founder that this node has refused or heard of
	rivalAt   time.Time
}

const (
	foundLease = 10 * time.Second
	foundForce = 10 * time.Second // how long a forced bootstrap waits for new nodes that do not answer
	foundRetry = time.Second
)

// founder reports whether this node is configured to start a cluster.
func (s *Machine) founder() bool { return s.cfg.Bootstrap || s.cfg.ForceBootstrap }

// mayFound asks the new nodes for their consent. It returns what is missing, or "" if this node may start the cluster.
func (s *Machine) mayFound(now time.Time, newcomers []Member) string {
	f := &s.found
	if s.plant.foundAlone {
		return ""
	}
	if !f.consented.IsZero() && now.Before(f.until) {
		return s.nameOf(f.consented) + " is about to start the cluster"
	}
	f.consented = NodeID{}
	if !f.rival.IsZero() && now.Sub(f.rivalAt) < foundLease && f.rival.Compare(s.cfg.ID) < 0 {
		return s.nameOf(f.rival) + " may start the cluster as well, and has the lower ID"
	}
	if f.began.IsZero() {
		f.began, f.nonce, f.consents = now, s.rand.Uint64(), make(map[NodeID]time.Time)
	}
	var missing []string
	for _, m := range newcomers {
		if at, ok := f.consents[m.ID]; !ok || now.Sub(at) >= foundLease/2 {
			missing = append(missing, s.nameOf(m.ID))
		}
	}
	if len(missing) == 0 {
		return ""
	}
	if now.Sub(f.sent) >= foundRetry {
		f.sent = now
		for _, m := range newcomers {
			s.send(m.ID, message{kind: kindFound, seq: f.nonce + uint64(now.Sub(f.began))})
		}
	}
	if s.cfg.ForceBootstrap && now.Sub(f.began) >= foundForce {
		return ""
	}
	return "waits until other new nodes agree that this one starts the cluster: " + strings.Join(missing, ", ")
}

// nameOf returns how people call a node that may be in no cluster.
func (s *Machine) nameOf(id NodeID) string {
	for _, m := range s.env.Members() {
		if m.ID == id {
			return described(m)
		}
	}
	return s.name(id)
}

func described(m Member) string {
	if !m.Addr.IsValid() {
		return fmt.Sprintf("%s (%s)", m.Name, m.ID.Short())
	}
	return fmt.Sprintf("%s (%s) at %v", m.Name, m.ID.Short(), m.Addr.Addr())
}

// handleFound gives this newcomer's consent to another one, or says who has it.
func (s *Machine) handleFound(now time.Time, m *message) {
	f := &s.found
	ack := message{kind: kindFoundAck, seq: m.seq}
	if s.founder() {
		ack.flags = flagFounder
		s.noteFounder(now, m.sender)
	}
	held := !f.consented.IsZero() && now.Before(f.until)
	switch {
	case slices.ContainsFunc(s.env.Members(), func(o Member) bool { return o.Alive && !o.Cluster.IsZero() }):
		// There is a cluster, which the founder does not see. This node is about to join it, and the founder follows.
	case held && f.consented != m.sender:
		ack.node = f.consented
		s.sawRival(now, m.sender)
	case !held && !f.began.IsZero() && s.cfg.ID.Compare(m.sender) < 0:
		ack.node = s.cfg.ID // this node asks for consents itself, and goes first
	default:
		s.giveWordsBack()
		f.consented, f.until = m.sender, now.Add(foundLease)
		ack.flags |= flagYes
		if now.Sub(f.rivalAt) < foundLease && f.rival != m.sender {
			ack.node = f.rival
		}
	}
	s.send(m.sender, ack)
}

// sawRival remembers the lowest founder that did not get this node's consent.
func (s *Machine) sawRival(now time.Time, id NodeID) {
	f := &s.found
	if f.rival.IsZero() || now.Sub(f.rivalAt) >= foundLease || id.Compare(f.rival) <= 0 {
		f.rival, f.rivalAt = id, now
	}
}

func (s *Machine) handleFoundAck(now time.Time, m *message) {
	f := &s.found
	if m.flags&flagFounder != 0 {
		s.noteFounder(now, m.sender)
	}
	asked := time.Duration(m.seq - f.nonce) // after began; of an answer to an earlier attempt anything
	if f.began.IsZero() || asked < 0 || asked > now.Sub(f.began) {
		return
	}
	if !m.node.IsZero() && m.node != s.cfg.ID {
		s.sawRival(now, m.node)
		if f.rival.Compare(s.cfg.ID) < 0 {
			s.giveWordsBack()
			s.send(m.sender, message{kind: kindUnfound})
			return
		}
	}
	if m.flags&flagYes != 0 {
		f.consents[m.sender] = f.began.Add(asked)
		s.drive(now)
	}
}

// giveWordsBack ends this node's own attempt.
func (s *Machine) giveWordsBack() {
	f := &s.found
	for _, id := range sortedKeys(f.consents) {
		s.send(id, message{kind: kindUnfound})
	}
	f.began, f.consents, f.sent = time.Time{}, nil, time.Time{}
}

func (s *Machine) handleUnfound(m *message) {
	if s.found.consented == m.sender {
		s.found.consented = NodeID{}
	}
}

// noteFounder reports that two hosts may start the cluster: both have --bootstrap, or the bootstrap node's name. The
// report stays for a while, because the configuration is still so when the cluster has begun.
func (s *Machine) noteFounder(now time.Time, id NodeID) {
	s.noteAt(now, "founder "+id.String(), fmt.Sprintf("two nodes are told to start the cluster: this one (%s) and %s; the one with the lower ID does, the other one joins it", s.cfg.ID.Short(), s.nameOf(id)),
		"give --bootstrap to one of them only, or each host a name of its own (--node-name) where `bootstrap` names both")
}
