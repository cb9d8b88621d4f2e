package gossip

import (
	"bytes"
	"context"
	"fmt"
	"hash/maphash"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/membership"
)

// inbox decouples memberlist's goroutines, which must not wait, from the handler. Its
// size is limited. Messages that do not fit are dropped and counted; push/pull
// compensates for them.
type inbox struct {
	mu      sync.Mutex
	items   []envelope
	joins   []bool
	bytes   int
	members bool
	wake    chan struct{}
	dropped atomic.Uint64
}

const (
	maxInboxItems = 4096
	maxInboxBytes = 32 << 20
)

func newInbox() *inbox { return &inbox{wake: make(chan struct{}, 1)} }

// put queues e. It owns e.body from then on.
func (q *inbox) put(e envelope, join bool) {
	q.mu.Lock()
	full := len(q.items) >= maxInboxItems || q.bytes+len(e.body) > maxInboxBytes
	if !full {
		q.items, q.joins = append(q.items, e), append(q.joins, join)
		q.bytes += len(e.body)
	}
	q.mu.Unlock()
	if full {
		q.dropped.Add(1)
		return
	}
	signal(q.wake)
}

func (q *inbox) membersChanged() {
	q.mu.Lock()
	q.members = true
	q.mu.Unlock()
	signal(q.wake)
}

func (q *inbox) take() (items []envelope, joins []bool, members bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	items, joins, members = q.items, q.joins, q.members
	q.items, q.joins, q.bytes, q.members = nil, nil, 0, false
	return items, joins, members
}

// dispatch calls the handler in the order of arrival, but with changes of members first,
// because messages may depend on them.
func (g *Gossip) dispatch(ctx context.Context) {
	h := g.cfg.Handler
	for {
		select {
		case <-ctx.Done():
			return
		case <-g.inbox.wake:
		}
		g.live()
		items, joins, members := g.inbox.take()
		if members {
			h.Members()
		}
		for i, e := range items {
			if ctx.Err() != nil {
				return
			}
			switch e.kind {
			case kindBroadcast:
				h.Broadcast(e.body)
			case kindMessage:
				h.Message(e.from, e.body)
			case kindState:
				h.MergeState(e.body, joins[i])
			}
			items[i] = envelope{}
			g.live()
		}
	}
}

// received handles one user message. b belongs to memberlist.
func (g *Gossip) received(b []byte) {
	e, err := g.unwrap(b)
	if err != nil {
		return
	}
	switch e.kind {
	case kindBroadcast:
		if !g.seen.first(e.body) {
			return
		}
		g.queue.add(bytes.Clone(b))
		e.body = bytes.Clone(e.body)
		g.inbox.put(e, false)
	case kindMessage:
		e.body = bytes.Clone(e.body)
		g.inbox.put(e, false)
	case kindKeyRequest:
		g.hand(g.keyReqs, e)
	case kindKeyAnswer:
		g.keyAnswer(e)
	case kindPresenceAsk:
		g.hand(g.presenceReqs, e)
	case kindPresenceAnswer:
		g.presenceAnswered(e)
	default:
		g.count.malformed.Add(1)
	}
}

// hand gives a request to the goroutine that answers it, or drops it where too many wait.
func (g *Gossip) hand(to chan<- envelope, e envelope) {
	e.body = bytes.Clone(e.body)
	select {
	case to <- e:
	default:
		g.inbox.dropped.Add(1)
	}
}

// receivedState handles the user part of a push/pull.
func (g *Gossip) receivedState(b []byte, join bool) {
	e, err := g.unwrap(b)
	if err != nil {
		return
	}
	if e.kind != kindState {
		g.count.malformed.Add(1)
		return
	}
	if g.stateOfClone(e) {
		return
	}
	now := time.Now()
	g.synced.Store(&now)
	e.body = bytes.Clone(e.body)
	g.inbox.put(e, join)
}

// unwrap decodes an envelope. It refuses one from another cluster, or with this node's own
// ID.
func (g *Gossip) unwrap(b []byte) (envelope, error) {
	e, err := decodeEnvelope(b)
	if err != nil {
		g.count.malformed.Add(1)
		g.log.Debug("gossip: message dropped", "err", err)
		return e, err
	}
	if have := g.Cluster(); have != (membership.ClusterID{}) && e.cluster != (membership.ClusterID{}) && have != e.cluster {
		g.count.refused.Add(1)
		return e, fmt.Errorf("message from cluster %v", e.cluster)
	}
	return e, nil
}

// localState is called by memberlist for every push/pull.
func (g *Gossip) localState(addr netip.AddrPort, join bool) []byte {
	body := g.cfg.Handler.LocalState(join)
	if len(body) > MaxState {
		g.log.Error("gossip: the table is too large for push/pull", "bytes", len(body), "limit", MaxState)
		body = nil
	}
	return envelope{kind: kindState, cluster: g.Cluster(), from: g.cfg.ID, addr: addr, body: body}.encode()
}

// seenSet has the hashes of recent broadcasts, in two generations: a message is removed
// after one to two periods, or sooner if there are very many. The value is true if it
// came from the network.
type seenSet struct {
	mu       sync.Mutex
	seed     maphash.Seed
	now, old map[uint64]bool
	since    time.Time
}

const (
	seenPeriod = time.Minute
	maxSeen    = 16384
)

// first reports whether a broadcast from the network is new, and records it.
func (s *seenSet) first(b []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.turn(b)
	if _, in := s.find(h); in {
		return false
	}
	s.now[h] = true
	return true
}

// passed reports whether this node has relayed a broadcast for others that it now wants to
// send itself. Otherwise it records the broadcast as the node's own: its echo is not new,
// but it may be repeated.
func (s *seenSet) passed(b []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.turn(b)
	if foreign, _ := s.find(h); foreign {
		return true
	}
	s.now[h] = false
	return false
}

func (s *seenSet) find(h uint64) (foreign, in bool) {
	if foreign, in = s.now[h]; !in {
		foreign, in = s.old[h]
	}
	return foreign, in
}

func (s *seenSet) turn(b []byte) uint64 {
	now := time.Now()
	if s.now == nil {
		s.seed, s.now, s.since = maphash.MakeSeed(), map[uint64]bool{}, now
	}
	if len(s.now) >= maxSeen || now.Sub(s.since) > seenPeriod {
		s.old, s.now, s.since = s.now, map[uint64]bool{}, now
	}
	return maphash.Bytes(s.seed, b)
}
