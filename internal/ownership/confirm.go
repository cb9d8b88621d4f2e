package ownership

import (
	"slices"
	"strings"
	"time"
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

// driveConfirm asks every living member, and is done when all have answered.
func (s *Machine) driveConfirm(now time.Time) {
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
func (s *Machine) isLone(alive []Member) bool {
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
func (s *Machine) vouched() bool {
	for _, m := range s.alive() {
		if counts, answered := s.confirm.answers[m.ID]; counts || !answered {
			return true
		}
	}
	return false
}

// confirmed makes what the members told durable before this node acts on it: the
// one who knew may be gone at the next start.
func (s *Machine) confirmed(now time.Time) {
	s.confirm.done = true
	if err := s.save(now); err != nil {
		s.confirm.done = false
		s.why = err.Error()
		return
	}
	s.log.Info("the table is confirmed", "members", len(s.confirm.answers))
	if s.phase == Confirming {
		s.setPhase(now, Joining, "opening blocks")
	}
	s.notify()
}
