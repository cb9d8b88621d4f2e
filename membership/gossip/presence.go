package gossip

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
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
//	        netip.AddrPort, and the name of the asker; then a byte 1 where the
//	        answer is to have the run
//	answer: ID (8), verdict (1); of a node that lives, if its run was asked for
//	        and is known: 1 if it is established, else 0 (1), and for how long it
//	        has run, in milliseconds (8)
//
// Agents without [membership.CapTellsRun] refuse both additions. So they are asked
// without the first, and then answer, and are answered, without the second.
type presenceAsk struct {
	id   uint64
	node membership.NodeID
	at   netip.AddrPort // is the node there?
	from netip.AddrPort // where the answer goes
	who  string         // name and address of the asker, for the problem when the answer is yes
	run  bool           // tell its run, too: the node at that address does
}

type presenceAnswer struct {
	id      uint64
	verdict presence
	run     *run // nil: not told
}

// run is what decides which of two nodes with one identity is the newer one. It has
// no time of a clock: those of two hosts may differ by hours.
type run struct {
	established bool          // some member has accepted this run of the node
	age         time.Duration // told in whole milliseconds, rounded down
}

// tellsRun reports whether the node of that metadata answers questions about its run.
func tellsRun(meta []byte) bool {
	m, err := membership.DecodeMeta(meta)
	return err == nil && m.Capabilities&membership.CapTellsRun != 0
}

// respondent is an address to ask, and whether its node understands questions about a run.
type respondent struct {
	addr  netip.AddrPort
	tells bool
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
	presenceHead   = 8 + 1                   // of an answer: ID and verdict
	presenceRun    = presenceHead + 1 + 8    // an answer with the run
	maxRunMillis   = 1 << 43                 // 278 years: fits a time.Duration
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
	b = append(append(b, byte(len(who))), who...)
	if a.run {
		b = append(b, 1)
	}
	return b
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
	if !ok || len(b) > 1 || len(b) == 1 && b[0] != 1 || len(who) > maxNewcomer {
		return a, errPresence
	}
	a.run = len(b) == 1
	a.who = strings.ToValidUTF8(string(who), "?")
	return a, nil
}

func (a presenceAnswer) encode() []byte {
	b := append(binary.BigEndian.AppendUint64(nil, a.id), byte(a.verdict))
	if a.run == nil {
		return b
	}
	established := byte(0)
	if a.run.established {
		established = 1
	}
	return binary.BigEndian.AppendUint64(append(b, established), uint64(a.run.age/time.Millisecond))
}

func decodePresenceAnswer(b []byte) (presenceAnswer, error) {
	if len(b) != presenceHead && len(b) != presenceRun || presence(b[8]) >= presenceEnd {
		return presenceAnswer{}, errPresence
	}
	a := presenceAnswer{id: binary.BigEndian.Uint64(b), verdict: presence(b[8])}
	if b = b[presenceHead:]; len(b) > 0 {
		age := binary.BigEndian.Uint64(b[1:])
		if b[0] > 1 || age > maxRunMillis {
			return presenceAnswer{}, errPresence
		}
		a.run = &run{established: b[0] == 1, age: time.Duration(age) * time.Millisecond}
	}
	return a, nil
}

// presenceWaiters routes answers to the questions that wait for them.
type presenceWaiters struct {
	mu sync.Mutex
	by map[uint64]chan presenceAnswer
}

func (w *presenceWaiters) expect(id uint64, n int) chan presenceAnswer {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.by == nil {
		w.by = map[uint64]chan presenceAnswer{}
	}
	ch := make(chan presenceAnswer, n)
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
	case ch <- a: // never ready for a nil channel
	default:
	}
}

// askPresence sends one question to several addresses. It returns presenceLives with the first such answer that has the run too
// if that was asked for; else, when all have answered or ctx has ended, presenceLives without it, or presenceNone, if one of them
// said so.
func (g *Gossip) askPresence(ctx context.Context, a presenceAsk, whom []respondent) (presence, *run) {
	var id [8]byte
	rand.Read(id[:])
	a.id, a.from = binary.BigEndian.Uint64(id[:]), g.boundTo()
	answers := g.presence.expect(a.id, len(whom))
	defer g.presence.forget(a.id)
	for _, w := range whom {
		q := a
		q.run = a.run && w.tells
		wire := envelope{kind: kindPresenceAsk, cluster: g.Cluster(), from: g.cfg.ID, body: q.encode()}.encode()
		go func() { _ = g.sendTo(g.cfg.ID, w.addr, wire) }() // ends by the stream timeout, or when the sockets close
	}
	found := presenceUnknown
	for range whom {
		select {
		case v := <-answers:
			if found = max(found, v.verdict); v.verdict == presenceLives && (v.run != nil || !a.run) {
				return found, v.run
			}
		case <-ctx.Done():
			return found, nil
		}
	}
	return found, nil
}

// lives reports whether the node that a asks about answers at that address, over UDP or TCP, and its run if it has told that. At the others,
// which a member has beside that one, it is asked over TCP whether it is the node at that address: one that has moved may have kept them.
func (g *Gossip) lives(ctx context.Context, a presenceAsk, others ...netip.AddrPort) (bool, *run) {
	ctx, cancel := context.WithTimeout(ctx, g.cfg.pace.presence)
	defer cancel()
	var present presence
	var told *run
	var pinged bool
	var wg sync.WaitGroup
	whom := []respondent{{a.at, a.run}}
	for _, addr := range others {
		whom = append(whom, respondent{addr, a.run})
	}
	wg.Go(func() { present, told = g.askPresence(ctx, a, whom) })
	wg.Go(func() { pinged = g.pings(ctx, a.node, a.at) })
	wg.Wait()
	return present == presenceLives || pinged, told
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
				v, told := g.presenceOf(ctx, a)
				wire := envelope{kind: kindPresenceAnswer, cluster: g.Cluster(), from: g.cfg.ID, body: presenceAnswer{a.id, v, told}.encode()}.encode()
				_ = g.sendTo(e.from, a.from, wire) // who misses the answer asks again
			})
		}
	}
}

// presenceOf answers one question, with the run if that was asked for and is known. Who
// looks for this node's own identity has a copy of it; for others only the address that
// this node has listed is asked, so that nobody can have it send packets to anywhere.
func (g *Gossip) presenceOf(ctx context.Context, a presenceAsk) (presence, *run) {
	self := g.boundTo()
	if a.node == g.cfg.ID {
		if a.at != self || a.from == self {
			return presenceUnknown, nil
		}
		g.noteClone(a.node, a.who, fmt.Sprintf("this host, %s at %v", g.cfg.Name, self))
		if !a.run {
			return presenceLives, nil
		}
		own := g.ownRun()
		return presenceLives, &own
	}
	if a.at == self {
		return presenceNone, nil
	}
	g.mu.RLock()
	p := g.peers[a.node]
	known := p != nil && (p.Addr == a.at || p.Addr == a.from) // the latter: let in at its new address already
	name := ""
	var others []netip.AddrPort
	if known {
		name = p.Name
		if p.Addr == a.at {
			others = slices.DeleteFunc(addrsOf(p, a.at), func(o netip.AddrPort) bool { return o == a.at || !g.reaches(o.Addr()) })
		}
	}
	g.mu.RUnlock()
	if !known {
		return presenceUnknown, nil
	}
	switch lives, told := g.lives(ctx, a, others...); {
	case lives:
		g.noteClone(a.node, a.who, fmt.Sprintf("%s at %v", name, a.at))
		return presenceLives, told
	case g.reaches(a.at.Addr()):
		return presenceNone, nil
	}
	return presenceUnknown, nil
}

func (g *Gossip) noteClone(id membership.NodeID, who, other string) {
	g.note("clone "+id.String(), fmt.Sprintf("%s has node ID %v, which is in use by %s, too: the newer of them does not run", who, id, other),
		"the disk of the newer one is a clone: give it a fresh state directory")
}

// ownRun is the present run of this node.
func (g *Gossip) ownRun() run {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return run{g.guard.established, time.Since(g.born)}
}

func (g *Gossip) boundTo() netip.AddrPort {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.bind
}
