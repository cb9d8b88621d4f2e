package ownership

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// confirmation is the exchange with every living member that a node with state on disk
// completes before it gives away or opens space.
//
// What it proves (S1 after a rollback). A node's own changes are its donations, its
// external peers and its leave. Only the owner makes such changes. So a disk that lacks
// the last of them can do harm in one way only: the node may believe that it owns
// space that it has given away since. Either its disk says so, or a member that does not
// know the later change. Every change has a higher version than all changes before it,
// so one answer that knows it is enough. Hence:
//
//	S1 holds for a node with a rolled-back disk if, for every change that the disk
//	has lost, at least one of the members that answered its confirmation knows
//	that change (or a later one of the same addresses).
//
// The condition is met if one member that knows the change is alive, because the node
// asks all living members: the receiver of a donation knows it from the moment of the
// answer, all others within a few gossip rounds. It is not met if all members that know
// the change are dead or out of reach at that moment; no protocol without a quorum for
// each donation could do better. A disk that was not rolled back needs no confirmation,
// because changes are saved before anybody learns of them. Cool-downs, however, are
// only on the disk: after a rollback, the cool-down of addresses that were allocated and
// released since is lost.
//
// A push/pull is as good as an answer. What matters is that the sender's table is from after this start: an earlier one may lack
// what this node did in between. A Sync has a number of this start, because its answer may come late. A push/pull is one exchange over one
// connection, to a socket that this start has opened, and either side reads its table only when the connection is there. So a
// member that cannot be asked, because its TCP port is filtered, still confirms by the connections that it makes itself.
//
// A node that knows no other member (it owns the whole table and has no peers) is
// confirmed by itself, because there is nobody to ask. A disk that was rolled back to
// that time is outside of this proof.
type confirmation struct {
	done    bool
	nonce   uint64               // of this start; answers to earlier starts do not count
	asked   map[NodeID]time.Time // when last
	first   map[NodeID]time.Time // when first
	answers map[NodeID]bool      // the members that answered; true if the answer counts: the member has owned space
	blocked bool                 // a member has not answered for answerWithin
	unsaved bool                 // done, if the disk took the state
}

// answerWithin is how long an answer may take before its way counts as blocked.
const answerWithin = 5 * time.Second

// driveConfirm asks every living member. It is done when all have answered.
func (s *Machine) driveConfirm(now time.Time) {
	alive := s.alive()
	var silent, blocked []string
	counted := 0
	for _, m := range alive {
		counts, answered := s.confirm.answers[m.ID]
		if counts {
			counted++
		}
		if !answered {
			silent = append(silent, s.name(m.ID))
			if at, ok := s.confirm.first[m.ID]; ok && now.Sub(at) >= answerWithin && m.Addr.IsValid() {
				blocked = append(blocked, fmt.Sprintf("TCP port %d of %s at %v", m.Addr.Port(), s.name(m.ID), m.Addr.Addr()))
			}
		}
		// A member whose answer does not count yet may count once it has space.
		if !counts && s.due(now, &s.confirm, m.ID) {
			s.send(m.ID, message{kind: kindSync, seq: s.confirm.nonce})
		}
	}
	lone := s.isLone(alive)
	s.confirm.blocked, s.confirm.unsaved = len(blocked) > 0, false
	switch {
	case len(silent) > 0:
		s.why = "waiting for the table of " + strings.Join(silent, ", ") + listed("; gossip sees it alive, but it does not answer: ", blocked)
		if len(blocked) > 0 {
			s.why += " may be blocked"
		}
	case counted == 0 && !lone:
		_, unseen := s.quorum(s.cfg.ID)
		s.why = fmt.Sprintf("no member that knows the table answers yet%s; opens and gives no space until one does", listed(", of ", unseen))
	default:
		s.confirmed(now)
	}
}

// isLone reports whether no other node can know more about this node's space: this
// node owns the whole table, and its only peers are new ones that have answered that
// they never owned space.
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

// vouched reports whether a living member whose answer counts has answered, or may
// still answer.
func (s *Machine) vouched() bool {
	for _, m := range s.alive() {
		if counts, answered := s.confirm.answers[m.ID]; counts || !answered {
			return true
		}
	}
	return false
}

// confirmed saves what the members answered before this node acts on it, because the
// member that knew a change may be gone at the next start.
func (s *Machine) confirmed(now time.Time) {
	s.confirm.done = true
	if err := s.save(now); err != nil {
		s.confirm.done, s.confirm.unsaved = false, true
		s.why = err.Error()
		return
	}
	s.log.Info("the table is confirmed", "members", len(s.confirm.answers))
	if s.phase == Confirming {
		s.setPhase(now, Joining, "opening blocks")
	}
	s.notify()
}
