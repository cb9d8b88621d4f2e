package gossip

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/membership"
)

// MemberState is this node's view of another one.
type MemberState uint8

const (
	// StateAlive: gossip considers it alive.
	StateAlive MemberState = iota
	// StateSuspect: gossip considers it alive, but it did not answer this node's
	// last probe, neither directly nor through others.
	StateSuspect
	// StateDead: no member could reach it.
	StateDead
	// StateLeft: it has announced that it leaves.
	StateLeft
)

// String returns the state's name in status output.
func (s MemberState) String() string {
	switch s {
	case StateAlive:
		return "alive"
	case StateSuspect:
		return "suspect"
	case StateDead:
		return "dead"
	case StateLeft:
		return "left"
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// MarshalText writes the state as String does.
func (s MemberState) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// A Member is another node as gossip sees it.
type Member struct {
	ID    membership.NodeID
	Name  string
	Addr  netip.AddrPort // gossip address, of a family that this node has too if there is one
	Meta  membership.Meta
	State MemberState
	Since time.Time     // of the state
	RTT   time.Duration // of the last probe that this node made; 0 before
	// OtherKey: of late it and this node could not open each other's messages.
	OtherKey bool
}

// How long members that are gone stay listed, and how many of them.
const (
	keepDead = 24 * time.Hour
	keepLeft = 10 * time.Minute
	keepNew  = time.Minute // that went while it was in no cluster: it had no state, and comes back under another ID
	maxPeers = 8192
	maxKnown = 4096

	pruneInterval = 10 * time.Second // at most this often, and on changes only
)

// Members returns the other members, including those that died in the last day,
// ordered by ID. The caller owns the slice; the slices within are shared and must
// not be modified.
func (g *Gossip) Members() []Member {
	now := time.Now()
	g.mu.RLock()
	list := make([]Member, 0, len(g.peers))
	for id, p := range g.peers {
		if _, foreign := g.guard.foreign[id]; !foreign && !p.ghost(now) {
			list = append(list, g.asSeen(p))
		}
	}
	g.mu.RUnlock()
	slices.SortFunc(list, func(a, b Member) int { return a.ID.Compare(b.ID) })
	return list
}

// Member returns one of the other members.
func (g *Gossip) Member(id membership.NodeID) (Member, bool) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	p := g.peers[id]
	if _, foreign := g.guard.foreign[id]; p == nil || foreign {
		return Member{}, false
	}
	return g.asSeen(p), true
}

// Forget removes a member that is not alive from the list, and from the addresses for
// rejoining.
func (g *Gossip) Forget(id membership.NodeID) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if p := g.peers[id]; p != nil && p.State > StateSuspect {
		delete(g.peers, id)
		delete(g.known, g.near(p))
	}
}

// KnownPeers returns the current and recent addresses of members, live members first.
// The caller saves them for [Config.LastPeers].
func (g *Gossip) KnownPeers() []netip.AddrPort {
	g.mu.RLock()
	defer g.mu.RUnlock()
	list := make([]netip.AddrPort, 0, len(g.known))
	for a := range g.known {
		list = append(list, a)
	}
	slices.SortFunc(list, func(a, b netip.AddrPort) int {
		if c := g.known[b].Compare(g.known[a]); c != 0 {
			return c
		}
		return a.Compare(b)
	})
	return list
}

// memberEvent handles a change that memberlist reports, with its node lock held.
func (g *Gossip) memberEvent(n sighting, state MemberState) {
	id, err := membership.ParseNodeID(n.name)
	if err != nil || id == g.cfg.ID {
		return
	}
	now := time.Now()
	g.mu.Lock()
	before := g.liveLocked(id)
	p := g.peers[id]
	if p == nil {
		p = &peer{Member: Member{ID: id, State: StateDead, Since: now}}
		g.peers[id] = p
	}
	was := p.State
	p.metaHash = hashOf(n.meta)
	if meta, err := membership.DecodeMeta(n.meta); err == nil {
		p.Meta, p.Name = meta, meta.Name
	}
	if state == StateDead && p.Meta.Leaving {
		state = StateLeft
	}
	p.gen = g.gen
	at := g.near(&peer{Member: Member{Addr: n.addr, Meta: p.Meta}})
	if before := g.near(p); before != at {
		delete(g.known, before)
	}
	p.Addr = n.addr
	if was != state || p.Since.IsZero() {
		p.State, p.Since = state, now
	}
	switch {
	case state == StateAlive:
		p.unsure = false
		g.known[at] = now
		delete(g.guard.foreign, id)
	case state == StateLeft:
		delete(g.known, at)
	default:
		g.known[at] = now
		g.lastDeath = now
		delete(g.tries, at) // a seed that has answered and is gone may have started a cluster meanwhile: it is tried anew
	}
	if now := g.liveLocked(id); g.alive.Add(now-before) == 1 && now > before {
		signal(g.dirty) // see announce
	} else if now < before && g.alive.Load() == 0 {
		g.alone = time.Now()
	}
	if now.Sub(g.pruned) > pruneInterval {
		g.pruneLocked(now)
	}
	alone := g.alive.Load() == 0
	g.mu.Unlock()
	g.inbox.membersChanged()
	if alone {
		g.wake()
	}
}

// liveLocked returns 1 if id is a live member, else 0.
func (g *Gossip) liveLocked(id membership.NodeID) int64 {
	p := g.peers[id]
	if _, foreign := g.guard.foreign[id]; p == nil || p.State > StateSuspect || foreign {
		return 0
	}
	return 1
}

// recountLocked recounts the live members.
func (g *Gossip) recountLocked() {
	alive := int64(0)
	for id := range g.peers {
		alive += g.liveLocked(id)
	}
	if g.alive.Swap(alive) > 0 && alive == 0 {
		g.alone = time.Now()
	}
}

// ghost reports whether a member is gone that never had anything: it waited for a cluster, and went.
func (p *peer) ghost(now time.Time) bool {
	return p.State > StateSuspect && p.Meta.Cluster.IsZero() && now.Sub(p.Since) > keepNew
}

// pruneLocked removes members that have been gone for long, and limits the number of
// the others that are gone.
func (g *Gossip) pruneLocked(now time.Time) {
	g.pruned = now
	for id, p := range g.peers {
		age := now.Sub(p.Since)
		if p.ghost(now) || p.State == StateLeft && age > keepLeft || p.State == StateDead && (age > keepDead || len(g.peers) > maxPeers) {
			delete(g.peers, id)
		}
	}
	for a, at := range g.known {
		if len(g.known) <= maxKnown {
			break
		}
		if now.Sub(at) > time.Minute {
			delete(g.known, a)
		}
	}
}

// dropUnseen declares members dead that the current memberlist instance has not seen:
// after a change of address it starts with an empty list.
func (g *Gossip) dropUnseen() {
	g.mu.Lock()
	now := time.Now()
	for _, p := range g.peers {
		if p.gen != g.gen && p.State <= StateSuspect {
			p.State, p.Since = StateDead, now
			g.lastDeath = now
		}
	}
	g.recountLocked()
	g.mu.Unlock()
	g.inbox.membersChanged()
}

// pinged clears a suspicion, because the member has answered.
func (g *Gossip) pinged(name string, rtt time.Duration) {
	id, err := membership.ParseNodeID(name)
	if err != nil {
		return
	}
	g.mu.Lock()
	changed := false
	if p := g.peers[id]; p != nil {
		p.RTT, p.udpLost = rtt, 0
		if changed = p.State == StateSuspect; changed {
			p.State, p.Since = StateAlive, time.Now()
		}
		if p.unsure && p.State == StateAlive {
			g.miss(missing{from: id, doubt: true})
		}
	}
	g.problems.drop(udpProblem + name)
	g.mu.Unlock()
	if changed {
		g.inbox.membersChanged()
	}
}

// suspected records that this node's own probe of a member has failed.
func (g *Gossip) suspected(name string) {
	id, err := membership.ParseNodeID(name)
	if err != nil {
		return
	}
	g.mu.Lock()
	p := g.peers[id]
	changed := p != nil && p.State == StateAlive
	if p != nil {
		p.doubted, p.unsure, p.udpLost = time.Now(), true, 0
	}
	if changed {
		p.State, p.Since = StateSuspect, time.Now()
	}
	g.mu.Unlock()
	if changed {
		g.inbox.membersChanged()
	}
}

// Isolated reports whether this node sees no other live member although it should: it
// had some before, or has seeds or last peers.
func (g *Gossip) Isolated() bool {
	if g.alive.Load() > 0 {
		return false
	}
	g.mu.RLock()
	known := len(g.known)
	g.mu.RUnlock()
	return known > 0 || slices.ContainsFunc(g.Seeds(), func(s Seed) bool { return !s.Self() })
}

// AloneSince is since when there has been no other live member: since the start, if there was none. It means nothing while there is one.
func (g *Gossip) AloneSince() time.Time {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.alone
}

// Alive returns the number of other live members.
func (g *Gossip) Alive() int { return int(g.alive.Load()) }

// Cluster returns the cluster that this node is in: that of its metadata, or the one
// that it has joined since; zero if neither.
func (g *Gossip) Cluster() membership.ClusterID {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.meta.Cluster
}

// SetMeta replaces this node's metadata and announces it soon. ID, Name and Started
// keep their values, and so does the capability of gossip itself. A zero Cluster keeps the current one. A different cluster is
// refused, because clusters never merge.
func (g *Gossip) SetMeta(m membership.Meta) error {
	g.mu.Lock()
	m.ID, m.Name, m.Started, m.Leaving = g.meta.ID, g.meta.Name, g.meta.Started, g.meta.Leaving
	m.Capabilities |= g.meta.Capabilities & membership.CapTellsRun
	if m.Cluster == (membership.ClusterID{}) {
		m.Cluster = g.meta.Cluster
	}
	if have := g.meta.Cluster; have != (membership.ClusterID{}) && have != m.Cluster {
		g.mu.Unlock()
		return fmt.Errorf("gossip: this node is in cluster %v and cannot become a member of %v", have, m.Cluster)
	}
	wire, err := g.encodeMeta(m)
	if err == nil {
		g.meta, g.metaWire = m, wire
	}
	g.mu.Unlock()
	if err == nil {
		signal(g.dirty)
	}
	return err
}

// Send sends b, at most [MaxMessage] bytes, to another live member over a stream,
// encrypted if there is a key. Without an error the receiver's kernel has the
// message. To know that the receiver has processed it, wait for an answer.
func (g *Gossip) Send(ctx context.Context, to membership.NodeID, b []byte) error {
	if len(b) > MaxMessage {
		return fmt.Errorf("gossip: message of %d bytes, the limit is %d", len(b), MaxMessage)
	}
	return g.sendEnvelope(ctx, to, envelope{kind: kindMessage, body: b})
}

func (g *Gossip) sendEnvelope(ctx context.Context, to membership.NodeID, e envelope) error {
	m, ok := g.Member(to)
	if !ok {
		return fmt.Errorf("gossip: no member %v is known", to)
	}
	if m.State > StateSuspect {
		return fmt.Errorf("gossip: member %s (%v) is %v since %v", m.Name, to.Short(), m.State, m.Since.Format(time.RFC3339))
	}
	e.from, e.cluster = g.cfg.ID, g.Cluster()
	wire := e.encode()
	done := make(chan error, 1)
	go func() { done <- g.sendTo(to, m.Addr, wire) }() // ends at the stream timeout, or when the sockets close
	select {
	case err := <-done:
		if err != nil {
			return fmt.Errorf("gossip: send to %s (%v): %w", m.Name, m.Addr, err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("gossip: send to %s (%v): %w", m.Name, m.Addr, ctx.Err())
	}
}

// ErrTooLarge is returned by [Gossip.Queue] for a broadcast that does not fit one packet.
var ErrTooLarge = errors.New("gossip: broadcast does not fit a gossip packet")

// MaxBroadcast returns the maximum size of a broadcast, in bytes.
func (g *Gossip) MaxBroadcast() int {
	// Compound header 2, its entry 2, message type 1, encryption 29
	// (memberlist's encryptOverhead for version 1).
	return g.cfg.packetSize() - 2 - 2 - 1 - 29 - broadcastHead
}

// Queue broadcasts b to all members. The gossip layer of each member relays it; the
// handlers need not. A broadcast may be lost, so push/pull must deliver the same
// information eventually. b is copied.
func (g *Gossip) Queue(b []byte) error {
	if limit := g.MaxBroadcast(); len(b) > limit {
		return fmt.Errorf("%w: %d bytes, the limit is %d", ErrTooLarge, len(b), limit)
	}
	if g.seen.passed(b) {
		return nil // came from the network recently and is queued already
	}
	g.queue.add(envelope{kind: kindBroadcast, cluster: g.Cluster(), body: b}.encode())
	return nil
}

// Queued returns the number of queued broadcasts.
func (g *Gossip) Queued() int { return g.queue.len() }

// Stats has counters since the start, and gauges.
type Stats struct {
	Alive, Dead     int    // other members
	Queue           int    // queued broadcasts
	Health          int    // memberlist's awareness score; 0 is healthy
	BytesSent       uint64 // UDP and TCP payload
	BytesReceived   uint64
	PacketsSent     uint64 // UDP datagrams
	PacketsReceived uint64
	LargestPacket   uint64    // bytes of the largest datagram sent, without IP and UDP headers
	Undecryptable   uint64    // messages that no key decrypts
	Refused         uint64    // from other clusters
	Malformed       uint64    // messages and metadata that could not be read
	Dropped         uint64    // messages for which the handler was too slow
	LastSync        time.Time // when a member's whole table has last arrived; zero: never
}

type counters struct {
	undecryptable, refused, malformed atomic.Uint64
}

// Stats returns the counters.
func (g *Gossip) Stats() Stats {
	s := Stats{
		Queue: g.queue.len(), Health: g.health(),
		BytesSent: g.traffic.sent.Load(), BytesReceived: g.traffic.received.Load(),
		PacketsSent: g.traffic.packetsSent.Load(), PacketsReceived: g.traffic.packetsReceived.Load(),
		LargestPacket: g.traffic.largest.Load(),
		Undecryptable: g.count.undecryptable.Load(), Refused: g.count.refused.Load(),
		Malformed: g.count.malformed.Load(), Dropped: g.inbox.dropped.Load(),
	}
	if at := g.synced.Load(); at != nil {
		s.LastSync = *at
	}
	for _, m := range g.Members() {
		if m.State <= StateSuspect {
			s.Alive++
		} else {
			s.Dead++
		}
	}
	return s
}

func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

func (g *Gossip) wake() { signal(g.rejoinNow) }
