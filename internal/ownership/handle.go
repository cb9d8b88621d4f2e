package ownership

import (
	"fmt"
	"time"
)

// HandleMessage handles a message from another member. from is the sender according to
// gossip. An error is about the message, for a counter or a log line; the caller need
// do nothing else.
func (s *Machine) HandleMessage(now time.Time, from NodeID, b []byte) error {
	m, err := decode(b)
	if err != nil {
		return fmt.Errorf("message from %s: %w", from.Short(), err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if m.sender != from {
		return fmt.Errorf("%w from %s: it names %s as its sender", errMalformed, from.Short(), m.sender.Short())
	}
	return s.handle(now, m)
}

// HandleBroadcast handles a message that some member passed to Env.Broadcast.
func (s *Machine) HandleBroadcast(now time.Time, b []byte) error {
	m, err := decode(b)
	if err != nil {
		return fmt.Errorf("broadcast: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if m.kind != kindNews {
		return fmt.Errorf("%w: kind %d in a broadcast", errMalformed, m.kind)
	}
	return s.handle(now, m)
}

// LocalState returns the state of this node for a push/pull.
func (s *Machine) LocalState(now time.Time, join bool) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.state(0)
	m.cluster, m.sender = s.cluster, s.cfg.ID
	m.flags |= s.flags()
	return m.encode()
}

// MergeState merges another node's LocalState. It returns ErrOtherCluster if that node is
// in another cluster.
func (s *Machine) MergeState(now time.Time, b []byte, join bool) error {
	m, err := decode(b)
	if err != nil {
		return fmt.Errorf("push/pull state: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if m.kind != kindState {
		return fmt.Errorf("%w: kind %d in a push/pull", errMalformed, m.kind)
	}
	m.seq, m.pushed = 0, true // no answer to a question of ours
	return s.handle(now, m)
}

// state is the answer to a Sync.
func (s *Machine) state(seq uint64) message {
	m := message{kind: kindState, seq: seq, families: s.params.Families, entries: s.table.Entries()}
	m.setDeparted(s.departures())
	return m
}

func (s *Machine) handle(now time.Time, m *message) error {
	if m.sender == s.cfg.ID {
		return nil
	}
	if s.cluster.IsZero() {
		return s.handleWaiting(now, m)
	}
	if m.cluster.IsZero() {
		if m.kind == kindSync || m.kind == kindFound { // a newcomer
			s.send(m.sender, s.state(m.seq))
		}
		return nil
	}
	if m.cluster != s.cluster {
		s.noteAt(now, "cluster "+m.cluster.String(), fmt.Sprintf("node %s is in cluster %s, this node in %s: they never merge", m.sender.Short(), m.cluster, s.cluster),
			"stop the node that does not belong here; to move it, let it leave its cluster, remove its state directory and start it with --join")
		return fmt.Errorf("%w: %s of node %s, ours is %s", ErrOtherCluster, m.cluster, m.sender, s.cluster)
	}
	s.sawFlags(m)
	switch m.kind {
	case kindSync:
		s.send(m.sender, s.state(m.seq))
	case kindState:
		changed := s.learn(now, m.entries)
		if m.seq == 0 && s.confirm.done && len(changed) <= maxPassedOn {
			// By push/pull alone it would take minutes until all of a large cluster know what the other side of a partition did.
			s.tell(changed)
		}
		if m.pushed || m.seq == s.confirm.nonce {
			s.answered(m)
		}
		if m.flags&flagJoined != 0 {
			s.heardDeparted(m.departed())
		}
		s.drive(now)
	case kindNews:
		s.learn(now, m.entries)
		if !m.node.IsZero() {
			s.heardDeparted([]NodeID{m.node})
		}
	case kindRequest:
		s.handleRequest(now, m.sender, m)
	case kindGrant:
		s.handleGrant(now, m.sender, m)
	case kindRefuse:
		s.handleRefuse(now, m.sender, m)
	case kindOffer:
		s.handleOffer(now, m)
	case kindOfferAck:
		s.handleOfferAck(now, m)
	case kindGive:
		s.handleGive(now, m)
	case kindGiveAck:
		s.handleGiveAck(now, m)
	case kindPromise:
		s.handlePromise(now, m)
	case kindPromiseAck:
		s.handlePromiseAck(now, m)
	case kindUnpromise:
		if s.promises[m.node].to == m.sender {
			delete(s.promises, m.node)
			s.dirty = true
		}
	case kindHeld:
		s.handleHeld(now, m)
	}
	return nil
}

// handleWaiting handles the only messages that a node without a cluster accepts.
func (s *Machine) handleWaiting(now time.Time, m *message) error {
	switch {
	case m.kind == kindFound && m.cluster.IsZero():
		s.handleFound(now, m)
		return nil
	case m.kind == kindFoundAck && m.cluster.IsZero():
		s.handleFoundAck(now, m)
		return nil
	case m.kind == kindUnfound && m.cluster.IsZero():
		s.handleUnfound(m)
		return nil
	case m.cluster.IsZero() || m.kind != kindState:
		return nil
	}
	if s.plant.bootstrapLive && s.cfg.Bootstrap {
		return nil
	}
	if err := s.adopt(now, m); err != nil {
		s.noteAt(now, "adopt", err.Error(), "use the same version of tulle on all nodes")
		return err
	}
	s.unnote("adopt")
	s.sawFlags(m)
	s.drive(now)
	return nil
}

// answered records a member's table as of this start. That of a member that
// never owned space does not count: it comes from others, perhaps from this node.
func (s *Machine) answered(m *message) {
	if s.confirm.answers == nil {
		s.confirm.answers = make(map[NodeID]bool)
	}
	s.confirm.answers[m.sender] = s.confirm.answers[m.sender] || m.flags&flagJoined != 0
}

func (s *Machine) sawFlags(m *message) {
	if m.flags&flagLeft != 0 {
		s.departed[m.sender] = true
		s.dropPeer(m.sender)
	}
}

// An Op is an operation that runs in the background: a leave or a forget.
type Op struct {
	done chan struct{}
	err  error
	text string
}

func newOp() *Op { return &Op{done: make(chan struct{})} }

// Done returns a channel that is closed when the operation has ended.
func (o *Op) Done() <-chan struct{} { return o.done }

// Err returns the error of the operation, or nil; valid after Done.
func (o *Op) Err() error { return o.err }

// Result describes in one sentence what was done; valid after Done.
func (o *Op) Result() string { return o.text }

func (o *Op) end(text string, err error) {
	o.text, o.err = text, err
	close(o.done)
}

// errOf makes an error from the text of a refusal.
func errOf(base error, format string, args ...any) error {
	return fmt.Errorf("%w: %s", base, fmt.Sprintf(format, args...))
}
