package gossip

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/tulle-net/tulle/membership"
)

// Presence is the question whether the node of an identity answers at an
// address. It is asked before this node takes its identity to another address:
// by this node itself, over UDP (a ping by name) and TCP (a presenceAsk to that
// very address), and on its behalf by members that list the identity there, who
// may reach what this node does not.
//
//	ask:    ID (8), identity (16), then, each after its length (1): the address
//	        asked about and the address of the asker, both in the binary form of
//	        netip.AddrPort, and the name of the asker
//	answer: ID (8), verdict (1)
type presenceAsk struct {
	id   uint64
	node membership.NodeID
	at   netip.AddrPort // is the node there?
	from netip.AddrPort // where the answer goes
	who  string         // name and address of the newcomer, for the problem when the answer is yes
}

type presenceAnswer struct {
	id      uint64
	verdict presence
}

// presence is the answer to a presenceAsk.
type presence byte

const (
	presenceUnknown presence = iota // the one that was asked does not list the identity there
	presenceNone                    // nobody of that identity answers there
	presenceLives                   // it answers
	presenceEnd
)

const (
	presenceTries  = 3                       // UDP may be lost
	maxPresence    = 16                      // questions of others that are looked into at once
	presenceSample = 3                       // members that are asked
	maxNewcomer    = membership.MaxName + 64 // bytes of a name and an address
)

func (a presenceAsk) encode() []byte {
	b := binary.BigEndian.AppendUint64(nil, a.id)
	b = append(b, a.node[:]...)
	for _, addr := range []netip.AddrPort{a.at, a.from} {
		s, _ := addr.MarshalBinary() // never fails
		b = append(append(b, byte(len(s))), s...)
	}
	who := a.who[:min(len(a.who), maxNewcomer)]
	return append(append(b, byte(len(who))), who...)
}

var errPresence = errors.New("question about a presence is malformed")

func decodePresenceAsk(b []byte) (a presenceAsk, err error) {
	if len(b) < 8+len(a.node) {
		return a, errPresence
	}
	a.id, a.node = binary.BigEndian.Uint64(b), membership.NodeID(b[8:])
	b = b[8+len(a.node):]
	for _, addr := range []*netip.AddrPort{&a.at, &a.from} {
		field, rest, ok := membership.CutField(b)
		if !ok || len(field) > 18 || addr.UnmarshalBinary(field) != nil || !addr.IsValid() || addr.Port() == 0 {
			return a, errPresence
		}
		b = rest
	}
	who, b, ok := membership.CutField(b)
	if !ok || len(b) > 0 || len(who) > maxNewcomer {
		return a, errPresence
	}
	a.who = strings.ToValidUTF8(string(who), "?")
	return a, nil
}

func (a presenceAnswer) encode() []byte {
	return append(binary.BigEndian.AppendUint64(nil, a.id), byte(a.verdict))
}

func decodePresenceAnswer(b []byte) (presenceAnswer, error) {
	if len(b) != 9 || presence(b[8]) >= presenceEnd {
		return presenceAnswer{}, errPresence
	}
	return presenceAnswer{binary.BigEndian.Uint64(b), presence(b[8])}, nil
}

// presenceWaiters routes answers to the questions that wait for them.
type presenceWaiters struct {
	mu sync.Mutex
	by map[uint64]chan presence
}

func (w *presenceWaiters) expect(id uint64, n int) chan presence {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.by == nil {
		w.by = map[uint64]chan presence{}
	}
	ch := make(chan presence, n)
	w.by[id] = ch
	return ch
}

func (w *presenceWaiters) forget(id uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.by, id)
}

func (g *Gossip) presenceAnswered(e envelope) {
	a, err := decodePresenceAnswer(e.body)
	if err != nil {
		g.count.malformed.Add(1)
		return
	}
	g.presence.mu.Lock()
	ch := g.presence.by[a.id]
	g.presence.mu.Unlock()
	select {
	case ch <- a.verdict: // never ready for a nil channel
	default:
	}
}

// askPresence sends one question to several addresses. It returns presenceLives with the first such answer; else, when all
// have answered or ctx has ended, presenceNone if one of them said so.
func (g *Gossip) askPresence(ctx context.Context, a presenceAsk, whom []netip.AddrPort) presence {
	var id [8]byte
	rand.Read(id[:])
	a.id, a.from = binary.BigEndian.Uint64(id[:]), g.boundTo()
	answers := g.presence.expect(a.id, len(whom))
	defer g.presence.forget(a.id)
	wire := envelope{kind: kindPresenceAsk, cluster: g.Cluster(), from: g.cfg.ID, body: a.encode()}.encode()
	for _, w := range whom {
		go func() { _ = g.sendTo(g.cfg.ID, w, wire) }() // ends by the stream timeout, or when the sockets close
	}
	found := presenceUnknown
	for range whom {
		select {
		case v := <-answers:
			if found = max(found, v); found == presenceLives {
				return found
			}
		case <-ctx.Done():
			return found
		}
	}
	return found
}

// lives reports whether the node that a asks about answers at that address, over UDP or TCP.
func (g *Gossip) lives(ctx context.Context, a presenceAsk) bool {
	ctx, cancel := context.WithTimeout(ctx, g.cfg.pace.presence)
	defer cancel()
	var present, pinged bool
	var wg sync.WaitGroup
	wg.Go(func() { present = g.askPresence(ctx, a, []netip.AddrPort{a.at}) == presenceLives })
	wg.Go(func() { pinged = g.pings(ctx, a.node, a.at) })
	wg.Wait()
	return present || pinged
}

// pause waits, and reports whether ctx has let it.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// answerPresence looks into the questions of others until ctx ends.
func (g *Gossip) answerPresence(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, maxPresence)
	for {
		select {
		case <-ctx.Done():
			return
		case e := <-g.presenceReqs:
			a, err := decodePresenceAsk(e.body)
			if err != nil {
				g.count.malformed.Add(1)
				continue
			}
			slots <- struct{}{}
			wg.Go(func() {
				defer func() { <-slots }()
				v := g.presenceOf(ctx, a)
				wire := envelope{kind: kindPresenceAnswer, cluster: g.Cluster(), from: g.cfg.ID, body: presenceAnswer{a.id, v}.encode()}.encode()
				_ = g.sendTo(e.from, a.from, wire) // who misses the answer asks again
			})
		}
	}
}

// presenceOf answers one question. Who looks for this node's own identity has a
// copy of it; for others only the address that this node has listed is asked, so that
// nobody can have it send packets to anywhere.
func (g *Gossip) presenceOf(ctx context.Context, a presenceAsk) presence {
	self := g.boundTo()
	if a.node == g.cfg.ID {
		if a.at != self || a.from == self {
			return presenceUnknown
		}
		g.noteClone(a, fmt.Sprintf("this host, %s at %v", g.cfg.Name, self))
		return presenceLives
	}
	if a.at == self {
		return presenceNone
	}
	g.mu.RLock()
	p := g.peers[a.node]
	known := p != nil && (p.Addr == a.at || p.Addr == a.from) // the latter: let in at its new address already
	name := ""
	if known {
		name = p.Name
	}
	g.mu.RUnlock()
	switch {
	case !known:
		return presenceUnknown
	case !g.lives(ctx, a):
		return presenceNone
	}
	g.noteClone(a, fmt.Sprintf("%s at %v", name, a.at))
	return presenceLives
}

func (g *Gossip) noteClone(a presenceAsk, elder string) {
	g.note("clone "+a.node.String(), fmt.Sprintf("%s has node ID %v, which is in use by %s; it does not run", a.who, a.node, elder),
		"the disk of the newcomer is a clone: give it a fresh state directory")
}

func (g *Gossip) boundTo() netip.AddrPort {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.bind
}
