package gossip

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"github.com/tulle-net/tulle/membership"
)

// sighting is what memberlist reports about one node.
type sighting struct {
	name  string // NodeID in hex
	addr  netip.AddrPort
	meta  []byte
	alive bool
}

// guardState is what the guards have seen. Under Gossip.mu.
//
// The identity of this node at another address has two possible reasons, and
// nothing that others say tells them apart: either this host was known there
// before it got its present address, or a cloned host lives there. So the
// address itself is asked:
//
//	        listed elsewhere                no answer
//	quiet ───────────────────▶ elsewhere ───────────────▶ returning ──▶ quiet
//	                              │        (the old entry is withdrawn,  (peers list
//	                              │         or dies; rejoin every few     the new address)
//	                              │ a live  seconds until then)
//	                              │ host answers
//	                              ▼
//	           the newcomer of the two ends with a CloneError
//
// This node and up to three members ask, and one answer to any of them is
// enough: between this host and the other one the way may be blocked.
type guardState struct {
	foreign     map[membership.NodeID]membership.ClusterID // members that turned out to belong to another cluster
	established bool                                       // some member has accepted this run of the node
	elsewhere   *elsewhere                                 // this node's identity, seen at another address
	returning   bool                                       // peers may still know this node at an old address
	stale       int                                        // how many of them said so in the present round
}

type elsewhere struct {
	addr      netip.AddrPort
	name      string
	started   int64
	tells     bool         // its run
	witnesses []respondent // members that may list it there
}

// A CloneError means that two live hosts have the same node ID.
type CloneError struct {
	ID    membership.NodeID
	Self  string // name and address of this host
	Other string // name and address of the other one
}

// Error names both hosts and the remedy.
func (e *CloneError) Error() string {
	return fmt.Sprintf("node ID %v is in use by two live hosts: this one, %s, and %s. One disk is a clone of the other: stop the clone, move its state directory away (or at least its node ID), and start it again; this host, the newcomer of the two, does not run", e.ID, e.Self, e.Other)
}

var errUnresolvedIdentity = errors.New("this node's identity is listed at another address, which is being asked first")

// checkAlive decides whether to accept an alive message. It is called for every one of
// them with memberlist's node lock held, so it must be cheap.
func (g *Gossip) checkAlive(n sighting, self netip.AddrPort) error {
	id, cluster, err := membership.MetaHead(n.meta)
	if err == nil && n.name != id.String() {
		err = fmt.Errorf("it calls itself %.40q, its metadata %v", n.name, id)
	}
	if err != nil {
		g.count.malformed.Add(1)
		return fmt.Errorf("no Tulle node: %w", err)
	}
	if id == g.cfg.ID {
		if n.addr != self {
			g.sawSelfElsewhere(n, nil)
			return fmt.Errorf("it has this node's identity, at %v", n.addr)
		}
		return nil
	}
	return g.admit(id, cluster, n)
}

// admit accepts members of this node's cluster and nodes without a cluster. A node
// without a cluster joins the first cluster that it meets.
func (g *Gossip) admit(id membership.NodeID, cluster membership.ClusterID, n sighting) error {
	if cluster == (membership.ClusterID{}) {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	own := g.meta.Cluster
	if own == cluster {
		return nil
	}
	if own == (membership.ClusterID{}) {
		return g.adoptLocked(cluster)
	}
	g.count.refused.Add(1)
	if p := g.peers[id]; p != nil && p.State <= StateSuspect {
		// It was accepted while it had no cluster, and has joined another one.
		if g.guard.foreign == nil {
			g.guard.foreign = map[membership.NodeID]membership.ClusterID{}
		}
		g.guard.foreign[id] = cluster
		g.recountLocked()
		g.inbox.membersChanged()
	}
	err := foreignError{own, cluster}
	g.noteLocked("foreign "+cluster.String(), fmt.Sprintf("%s at %v: %v", hostName(n), n.addr, err), foreignRemedy)
	return err
}

const foreignRemedy = "two clusters never merge; correct --join, or stop all nodes of one of them, give each a fresh --state-dir, and start them again to join the other"

type foreignError struct{ own, other membership.ClusterID }

func (e foreignError) Error() string {
	return fmt.Sprintf("it belongs to cluster %v, this node to cluster %v", e.other, e.own)
}

func (g *Gossip) adoptLocked(c membership.ClusterID) error {
	m := g.meta
	m.Cluster = c
	wire, err := g.encodeMeta(m)
	if err != nil {
		return err
	}
	g.meta, g.metaWire = m, wire
	signal(g.dirty)
	g.inbox.membersChanged()
	g.log.Info("gossip: adopted by a cluster", "cluster", c.String())
	return nil
}

// checkMerge decides about a join, on both sides. list has all members that the other
// side knows, including itself.
func (g *Gossip) checkMerge(list []sighting, self netip.AddrPort) error {
	listed := false
	for _, n := range list {
		id, cluster, err := membership.MetaHead(n.meta)
		if err != nil {
			if n.alive {
				g.count.malformed.Add(1)
				return fmt.Errorf("%v is no Tulle node: %w", n.addr, err)
			}
			continue
		}
		if n.alive && id != g.cfg.ID {
			if err := g.admit(id, cluster, n); err != nil {
				return fmt.Errorf("%s at %v: %w", hostName(n), n.addr, err)
			}
		}
		if id == g.cfg.ID {
			listed = true
			if err := g.listedSelf(n, self, list); err != nil {
				return err
			}
		}
	}
	if !listed {
		// Nobody holds this identity there: the join lets this node in.
		g.mu.Lock()
		g.guard.established = true
		g.mu.Unlock()
	}
	return nil
}

// listedSelf checks this node's own entry in another member's list.
func (g *Gossip) listedSelf(n sighting, self netip.AddrPort, list []sighting) error {
	if n.addr == self {
		g.mu.Lock()
		g.guard.established = true
		g.mu.Unlock()
		return nil
	}
	g.mu.Lock()
	g.guard.returning = true
	g.guard.stale++
	established := g.guard.established
	g.mu.Unlock()
	if !n.alive {
		return nil
	}
	var witnesses []respondent
	for _, w := range list {
		if w.alive && w.name != n.name && w.addr != self {
			witnesses = append(witnesses, respondent{g.nearOf(w), tellsRun(w.meta)})
		}
	}
	g.sawSelfElsewhere(n, witnesses)
	if established {
		return nil
	}
	return fmt.Errorf("%w: %v", errUnresolvedIdentity, n.addr)
}

// sawSelfElsewhere has the rejoin loop ask that address, and the witnesses. Without them some live members are asked.
func (g *Gossip) sawSelfElsewhere(n sighting, witnesses []respondent) {
	m, _ := membership.DecodeMeta(n.meta)
	g.mu.Lock()
	if old := g.guard.elsewhere; len(witnesses) == 0 && old != nil && old.addr == n.addr {
		witnesses = old.witnesses
	}
	g.guard.elsewhere = &elsewhere{n.addr, m.Name, m.Started, tellsRun(n.meta), witnesses}
	g.mu.Unlock()
	g.wake()
}

// resolveIdentity asks the address at which this node's identity was seen. It
// returns false when a clone lives there and this node has to give way.
func (g *Gossip) resolveIdentity(ctx context.Context) bool {
	g.mu.Lock()
	e := g.guard.elsewhere
	g.guard.elsewhere = nil
	self := g.bind
	started := g.meta.Started
	g.mu.Unlock()
	if e == nil || e.addr == self {
		return true
	}
	if e.addr.Addr() != self.Addr() {
		g.leave(e.addr.Addr())
	}
	if len(e.witnesses) == 0 {
		e.witnesses = g.liveMembers(presenceSample)
	}
	rand.Shuffle(len(e.witnesses), func(i, j int) { e.witnesses[i], e.witnesses[j] = e.witnesses[j], e.witnesses[i] })
	e.witnesses = e.witnesses[:min(len(e.witnesses), presenceSample)]
	who := fmt.Sprintf("%s at %v", g.cfg.Name, self)
	found, other := presenceNone, (*run)(nil)
	if !g.owns(e.addr) { // it is this node that would answer there
		found, other = g.findSelf(ctx, e, who)
	}
	switch found {
	case presenceLives:
	case presenceNone:
		if err := g.withdraw(ctx, e.addr, addrsToAsk(e.witnesses)); err == nil {
			g.log.Info("gossip: this node has moved", "from", e.addr, "addr", self)
			g.setReturning()
			g.wake()
			return true
		}
		fallthrough
	default:
		if ctx.Err() != nil {
			return true
		}
		g.mu.Lock()
		g.guard.returning = true
		g.noteLocked(stillThere, fmt.Sprintf("members still know this node at %v, where nobody answers", e.addr),
			"if it has moved from there to "+self.String()+", this heals by itself as soon as the members find that address dead; if a host with a copy of this disk is there, stop it")
		g.mu.Unlock()
		return true
	}
	err := &CloneError{ID: g.cfg.ID, Self: who, Other: fmt.Sprintf("%s at %v", e.name, e.addr)}
	if e.elder(g.ownRun(), started, self, other) {
		g.log.Error("gossip: cloned identity", "err", err)
		g.fail(err)
		return false
	}
	g.noteClone(g.cfg.ID, err.Other, "this host, "+who)
	return true
}

// stillThere is the key of the problem that members know this node at an old address.
const stillThere = "clone address"

// sameStart is how far apart two nodes may start that count as started at once.
const sameStart = time.Second

// elder reports whether the node elsewhere is the elder, so that this one (its own run, started by its clock, at self) has to give
// way. other is the run of the one elsewhere; nil if nobody has told it.
//
// Both nodes may decide this at the same time, about each other, and never do both of them give way: an age is older when it
// arrives, so to each the other one seems younger than it is. That both stay takes two that started sameStart apart, to the
// millisecond; each asks again whenever it hears of the other.
func (e *elsewhere) elder(own run, started int64, self netip.AddrPort, other *run) bool {
	after := self.Compare(e.addr) > 0
	switch {
	case other != nil && own.established != other.established:
		return other.established
	case other != nil && after: // of two that started at once the one with the higher address is the newer one
		return own.age < other.age+sameStart
	case other != nil:
		return own.age < other.age-sameStart
	case !own.established:
		return true
	case e.tells: // some member has accepted this node, and nobody could ask about the other one
		return false
	default: // an older agent
		return started > e.started || started == e.started && after
	}
}

// findSelf looks for this node's identity at another address: by itself and through the witnesses. Only together with a
// witness that has found nobody there it says presenceNone.
func (g *Gossip) findSelf(ctx context.Context, e *elsewhere, who string) (presence, *run) {
	ctx, cancel := context.WithTimeout(ctx, g.cfg.pace.presence+g.cfg.pace.presence/2) // the witnesses' own time, and the ways
	defer cancel()
	a := presenceAsk{node: g.cfg.ID, at: e.addr, who: who, run: e.tells}
	var self bool
	var others presence
	var told, toldOthers *run
	var wg sync.WaitGroup
	wg.Go(func() { self, told = g.lives(ctx, a) })
	wg.Go(func() { others, toldOthers = g.askPresence(ctx, a, e.witnesses) }) // also when this node has found it: the witnesses report it
	wg.Wait()
	if self {
		others = presenceLives
	}
	return others, cmp.Or(told, toldOthers)
}

// liveMembers returns the addresses of up to n live members.
func (g *Gossip) liveMembers(n int) (list []respondent) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	for _, p := range g.peers {
		if p.State <= StateSuspect && len(list) < n {
			list = append(list, respondent{g.near(p), p.Meta.Capabilities&membership.CapTellsRun != 0})
		}
	}
	return list
}

func addrsToAsk(list []respondent) []netip.AddrPort {
	addrs := make([]netip.AddrPort, len(list))
	for i, r := range list {
		addrs[i] = r.addr
	}
	return addrs
}

// stateOfClone reports whether a push/pull came from a host with the ID of this node, or
// of a member at another address.
func (g *Gossip) stateOfClone(e envelope) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	known := g.bind
	if e.from != g.cfg.ID {
		p := g.peers[e.from]
		if p == nil || p.State > StateSuspect {
			return false
		}
		known = p.Addr
	}
	if e.addr == known {
		return false
	}
	g.count.refused.Add(1)
	return true
}

// setReturning records that peers may have another address of this node.
func (g *Gossip) setReturning() {
	g.mu.Lock()
	g.guard.returning = true
	g.mu.Unlock()
}

func (g *Gossip) note(key, what, remedy string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.noteLocked(key, what, remedy)
}

func (g *Gossip) noteLocked(key, what, remedy string) {
	if g.problems.note(key, what, remedy) {
		g.log.Warn("gossip: "+what, "remedy", remedy)
	}
}

func hostName(n sighting) string {
	if m, err := membership.DecodeMeta(n.meta); err == nil && m.Name != "" {
		return m.Name
	}
	return fmt.Sprintf("node %.8s", n.name)
}
