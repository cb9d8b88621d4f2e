package ownership

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/ipam"
)

// leaving is the state of a node's leave.
//
//	offering ── a member agrees ──▶ transfer saved ──▶ giving ── it has saved it ──▶ gone
//	   ▲ └─ refuses or no answer: the next one               └─ it dies: any living member
//	   └── more space arrives (another node left to us at that moment)
//
// The offer contains the addresses in cool-down, so that the heir respects the cool-down
// before it owns them. The transfer and the fact that this node has left are in one save:
// after a crash the node owns nothing.
type leaving struct {
	op    *Op
	to    NodeID
	seq   uint64
	sent  time.Time
	gave  bool // the transfer is saved
	acked bool // another member has saved it
	no    map[NodeID]string
}

// Leave gives all space to a living member and ends this node's membership. It is refused
// while pods have addresses, before the table is confirmed, and if there is no member to
// give to. Leave runs in the background; when the Op is done the agent may stop. A stop
// without Leave is not a leave.
func (s *Machine) Leave(now time.Time) (*Op, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	pods := len(s.pool.Allocations())
	switch {
	case s.left:
		return nil, errOf(ErrRefused, "this node has left already")
	case s.leave != nil || s.forget != nil:
		return nil, ErrBusy
	case s.cluster.IsZero():
		return nil, errOf(ErrRefused, "this node is in no cluster: just stop it")
	case !s.confirm.done:
		return nil, errOf(ErrUnconfirmed, "%s", s.why)
	case pods > 0:
		return nil, errOf(ErrPodsAlive, "%d on this node; stop them first (tulle ipam show lists them)", pods)
	case len(s.alive()) == 0:
		return nil, errOf(ErrRefused, "no other member is alive that could take the space of this node; the last node of a cluster is just stopped")
	}
	op := newOp()
	s.leave = &leaving{op: op}
	s.setPhase(now, Leaving, "offers its space to a member")
	s.driveLeave(now)
	return op, nil
}

func (s *Machine) driveLeave(now time.Time) {
	l := s.leave
	owns := len(s.table.Owned(s.cfg.ID)) > 0
	if l.gave = l.gave || s.left; l.acked && !owns {
		return
	}
	if !s.confirm.done || now.Sub(l.sent) < retryEvery && !l.sent.IsZero() {
		return
	}
	if owns {
		s.offer(now)
		return
	}
	if !l.gave { // owned nothing
		s.gone(now, nil)
		return
	}
	to := l.to
	if to.IsZero() || !s.isAlive(to) { // the heir is dead: any member may confirm
		alive := s.alive()
		if len(alive) == 0 {
			return
		}
		to = alive[s.rand.IntN(len(alive))].ID
	}
	l.sent = now
	s.send(to, message{kind: kindGive, seq: l.seq, entries: s.table.Entries()})
}

// offer asks the next member whether it accepts all space.
func (s *Machine) offer(now time.Time) {
	l := s.leave
	if !l.to.IsZero() && l.no[l.to] == "" && !l.gave {
		l.refused(l.to, "does not answer")
	}
	l.to = NodeID{}
	alive := s.alive()
	for _, m := range alive {
		if l.no[m.ID] == "" {
			l.to = m.ID
			break
		}
	}
	if l.to.IsZero() {
		if l.op != nil && !s.left {
			var why strings.Builder
			for id, text := range l.no {
				why.WriteString(fmt.Sprintf(" %s %s.", s.name(id), text))
			}
			s.stay(now, errOf(ErrRefused, "no member takes the space of this node:%s", why.String()))
			return
		}
		l.no, l.sent = nil, now
		return
	}
	s.lastSeq++
	l.seq, l.sent, l.gave = s.lastSeq, now, false
	s.send(l.to, message{kind: kindOffer, seq: l.seq, rests: toRests(now, s.pool.Cooling(now))})
}

func (l *leaving) refused(by NodeID, why string) {
	if l.no == nil {
		l.no = make(map[NodeID]string)
	}
	l.no[by] = why
}

// stay cancels the leave.
func (s *Machine) stay(now time.Time, err error) {
	op := s.leave.op
	s.leave = nil
	s.setPhase(now, Joining, "the leave was called off")
	s.driveSpace(now)
	op.end("", err)
}

// handleOffer stores the addresses in cool-down, and agrees to become the heir.
func (s *Machine) handleOffer(now time.Time, m *message) {
	ack := message{kind: kindOfferAck, seq: m.seq}
	switch {
	case s.leave != nil || s.left:
		ack.text = "is leaving, too"
	case !s.confirm.done || s.phase != Ready && s.phase != Joining:
		ack.text = "is not ready"
	default:
		for _, r := range m.rests {
			s.pool.Cool(now, r.addr, now.Add(time.Duration(r.secs)*time.Second))
		}
		if err := s.save(now); err != nil {
			ack.text = err.Error()
		} else {
			ack.flags = flagYes
		}
	}
	s.send(m.sender, ack)
}

func (s *Machine) handleOfferAck(now time.Time, m *message) {
	l := s.leave
	if l == nil || l.gave || m.seq != l.seq || m.sender != l.to {
		return
	}
	if m.flags&flagYes == 0 {
		l.refused(m.sender, m.text)
		l.sent = time.Time{}
		s.driveLeave(now)
		return
	}
	var give []netip.Prefix
	for _, e := range s.table.Owned(s.cfg.ID) {
		give = append(give, e.Prefix)
	}
	was := s.left
	entries, err := s.transfer(now, give, l.to, func() {
		s.left = true
		for _, b := range s.pool.Prefixes() {
			s.pool.Close(b)
		}
	})
	if err != nil {
		if s.left = was; !was {
			s.stay(now, err)
		}
		return
	}
	l.gave, l.acked = true, false
	s.setPhase(now, Left, "waits until a member has the space on disk")
	s.tell(entries)
	l.sent = time.Time{}
	s.driveLeave(now)
}

// handleGive saves what a leaving node gave, to this node or to another one.
func (s *Machine) handleGive(now time.Time, m *message) {
	s.learn(now, m.entries)
	if err := s.save(now); err != nil {
		return // the leaving node asks again
	}
	s.send(m.sender, message{kind: kindGiveAck, seq: m.seq})
	s.drive(now)
}

func (s *Machine) handleGiveAck(now time.Time, m *message) {
	l := s.leave
	if l == nil || !l.gave || m.seq != l.seq {
		return
	}
	s.gone(now, &m.sender)
}

// gone ends the leave.
func (s *Machine) gone(now time.Time, heir *NodeID) {
	l := s.leave
	l.acked = true
	if !s.left {
		s.left = true
		if err := s.save(now); err != nil {
			s.left = false
			s.stay(now, err)
			return
		}
	}
	text := "this node owned nothing; it has left"
	switch {
	case heir != nil && !l.to.IsZero():
		text = fmt.Sprintf("%s has the space of this node", s.name(l.to))
	case heir != nil: // left before the last restart
		text = fmt.Sprintf("%s knows who has the space of this node", s.name(*heir))
	}
	s.setPhase(now, Left, text)
	news := message{kind: kindNews, cluster: s.cluster, sender: s.cfg.ID, flags: s.flags()}
	s.env.Broadcast(news.encode())
	if op := l.op; op != nil {
		l.op = nil
		op.end(text, nil)
	}
}

// driveHeld tells owners not to use addresses that pods of this node still have although
// the space belongs to those owners now.
func (s *Machine) driveHeld(now time.Time) {
	if now.Before(s.heldNext) {
		return
	}
	s.heldNext = now.Add(heldEvery)
	byOwner := make(map[NodeID][]rest)
	for _, a := range s.stranded() {
		if e, ok := s.table.Owner(a.Addr); ok {
			byOwner[e.Owner] = append(byOwner[e.Owner], rest{a.Addr, uint64(heldFor / time.Second)})
		}
	}
	for _, id := range sortedKeys(byOwner) {
		s.send(id, message{kind: kindHeld, rests: byOwner[id]})
	}
}

// Stranded returns the allocations whose addresses belong to other nodes now, in the order of these.
func (s *Machine) Stranded() []ipam.Allocation {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := s.stranded()
	slices.SortFunc(list, func(a, b ipam.Allocation) int { return a.Addr.Compare(b.Addr) })
	return list
}

// stranded returns the allocations outside this node's space.
func (s *Machine) stranded() (out []ipam.Allocation) {
	for _, a := range s.pool.Allocations() {
		if e, ok := s.table.Owner(a.Addr); !ok || e.Owner != s.cfg.ID {
			out = append(out, a)
		}
	}
	return out
}

func (s *Machine) handleHeld(now time.Time, m *message) {
	for _, r := range m.rests {
		if e, ok := s.table.Owner(r.addr); !ok || e.Owner != s.cfg.ID {
			continue
		}
		if a, ok := s.pool.At(r.addr); ok {
			s.noteAt(now, "twice "+r.addr.String(), fmt.Sprintf("%v is used by a pod here (%s) and by one on %s, which was forgotten while it was alive", r.addr, a.Key, s.name(m.sender)),
				"restart one of the two pods")
			continue
		}
		s.pool.Cool(now, r.addr, now.Add(time.Duration(r.secs)*time.Second))
		s.dirty = true
	}
}
