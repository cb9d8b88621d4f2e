package ownership

import (
	"fmt"
	"strings"
	"time"
)

// Founding a cluster. Several newcomers may hold the word to start it: cloned
// images with the bootstrap node's name, or --bootstrap on two hosts. At most one
// of those that can hear of each other may start, so a founder first asks every
// newcomer that it sees for its word, and starts when it has all of them:
//
//	founder                            every other newcomer
//	   │  found 7                            │
//	   ├────────────────────────────────────▶│  has given its word to nobody else:
//	   │                        found-ack 7  │  gives it, for foundLease
//	   │◀────────────────────────────────────┤
//	   │  has all words, none older than half the lease: starts
//
// A word binds until its lease ends, or the founder gives it back. Who has given it starts
// nothing itself. So of two founders that see each other, or see a third node
// both, only one can have all words.
//
// Which one is settled by the lower node ID: a founder gives its word to a lower one, and one that hears
// from an answer that a lower one wants to start gives all words back and waits for a lease. IDs
// of newcomers are random, so nothing can be read into who it is.
//
// A node that is in a cluster answers with its state, and the founder joins.
type founding struct {
	began   time.Time            // of the first question; zero: asks nobody
	nonce   uint64               // a question's number is this plus the nanoseconds since began
	sent    time.Time            // of the last round of questions
	words   map[NodeID]time.Time // who has agreed, and when it was asked
	word    NodeID               // to whom this node has given its own word
	until   time.Time            // when that ends
	rival   NodeID               // the lowest founder that was refused or heard of
	rivalAt time.Time
}

const (
	foundLease = 10 * time.Second
	foundForce = 10 * time.Second // a forced bootstrap waits for silent newcomers this long
	foundRetry = time.Second
)

// founder reports whether this node has the word of its operator to start a cluster.
func (s *Machine) founder() bool { return s.cfg.Bootstrap || s.cfg.ForceBootstrap }

// mayFound asks the newcomers for their word, and says what is missing; "" when this node is to start the cluster.
func (s *Machine) mayFound(now time.Time, newcomers []Member) string {
	f := &s.found
	if s.plant.foundAlone {
		return ""
	}
	if !f.word.IsZero() && now.Before(f.until) {
		return s.nameOf(f.word) + " is about to start the cluster"
	}
	f.word = NodeID{}
	if !f.rival.IsZero() && now.Sub(f.rivalAt) < foundLease && f.rival.Compare(s.cfg.ID) < 0 {
		return s.nameOf(f.rival) + " may start the cluster as well, and has the lower ID"
	}
	if f.began.IsZero() {
		f.began, f.nonce, f.words = now, s.rand.Uint64(), make(map[NodeID]time.Time)
	}
	var missing []string
	for _, m := range newcomers {
		if at, ok := f.words[m.ID]; !ok || now.Sub(at) >= foundLease/2 {
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

// handleFound gives this newcomer's word to another one, or says who has it.
func (s *Machine) handleFound(now time.Time, m *message) {
	f := &s.found
	ack := message{kind: kindFoundAck, seq: m.seq}
	if s.founder() {
		ack.flags = flagFounder
		s.noteFounder(now, m.sender)
	}
	held := !f.word.IsZero() && now.Before(f.until)
	switch {
	case held && f.word != m.sender:
		ack.node = f.word
		s.sawRival(now, m.sender)
	case !held && !f.began.IsZero() && s.cfg.ID.Compare(m.sender) < 0:
		ack.node = s.cfg.ID // this node asks for words itself, and goes first
	default:
		s.giveWordsBack()
		f.word, f.until = m.sender, now.Add(foundLease)
		ack.flags |= flagYes
		if now.Sub(f.rivalAt) < foundLease && f.rival != m.sender {
			ack.node = f.rival
		}
	}
	s.send(m.sender, ack)
}

// sawRival remembers the lowest founder that did not get this node's word.
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
		f.words[m.sender] = f.began.Add(asked)
		s.drive(now)
	}
}

// giveWordsBack ends this node's own attempt.
func (s *Machine) giveWordsBack() {
	f := &s.found
	for _, id := range sortedKeys(f.words) {
		s.send(id, message{kind: kindUnfound})
	}
	f.began, f.words, f.sent = time.Time{}, nil, time.Time{}
}

func (s *Machine) handleUnfound(m *message) {
	if s.found.word == m.sender {
		s.found.word = NodeID{}
	}
}

// noteFounder tells that two hosts have the word to start the cluster. It stays for a while: the
// configuration is still so when the cluster has begun.
func (s *Machine) noteFounder(now time.Time, id NodeID) {
	s.foundersAt = now
	s.note("founder "+id.String(), fmt.Sprintf("two nodes are told to start the cluster: this one (%s) and %s; the one with the lower ID does, the other one joins it", s.cfg.ID.Short(), s.nameOf(id)),
		"give --bootstrap to one of them only, or each host a name of its own (--node-name) where `bootstrap` names both")
}

// forgetFounders ends the report of several founders.
func (s *Machine) forgetFounders(now time.Time) {
	if s.foundersAt.IsZero() || now.Sub(s.foundersAt) < reportFor {
		return
	}
	s.unnotePrefix("founder ")
	s.foundersAt = time.Time{}
}
