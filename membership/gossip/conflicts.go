package gossip

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/membership"
)

// conflict is an identity of another member that is announced from two addresses, and memberlist has refused the second one. A
// host that has moved is the cause far more often than a cloned disk, and word of its old address may go round for minutes. So
// both addresses are asked: only a clone answers at two.
type conflict struct {
	known, other sighting
	confirmed    bool // both have answered
	silent       int  // rounds since then in which one did not
}

// conflicts are under investigation.
type conflicts struct {
	mu   sync.Mutex
	of   map[membership.NodeID]conflict
	wake chan struct{}
}

// sawConflict is called with memberlist's node lock held.
func (g *Gossip) sawConflict(known, other sighting) {
	id, err := membership.ParseNodeID(known.name)
	if err != nil {
		return
	}
	if id == g.cfg.ID {
		g.sawSelfElsewhere(other, nil)
		return
	}
	g.conflicts.mu.Lock()
	// Word of a third address does not put an end to what is known.
	if now, seen := g.conflicts.of[id]; !now.confirmed && (seen || len(g.conflicts.of) < maxProblems) {
		g.conflicts.of[id] = conflict{known: known, other: other}
	}
	g.conflicts.mu.Unlock()
	signal(g.conflicts.wake)
}

// investigateConflicts asks the addresses until ctx ends, each pair again as long as there is a host at both of them.
func (g *Gossip) investigateConflicts(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-g.conflicts.wake:
		}
		for open := g.conflicts.list(); len(open) > 0; open = g.conflicts.list() {
			if !pause(ctx, g.cfg.pace.conflict) {
				return
			}
			var wg sync.WaitGroup
			for id, c := range open {
				wg.Go(func() { g.investigate(ctx, id, c) })
			}
			wg.Wait()
		}
	}
}

func (c *conflicts) list() map[membership.NodeID]conflict {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.of)
}

// lostRounds is how many rounds in a row one of two hosts may be silent before a conflict is over.
const lostRounds = 2

// investigate reports the conflict if both addresses answer. If one does not, there is none, or it is over.
func (g *Gossip) investigate(ctx context.Context, id membership.NodeID, c conflict) {
	var known, other bool
	var wg sync.WaitGroup
	wg.Go(func() { known = !c.oneHost() && g.pings(ctx, id, c.known.addr) })
	wg.Go(func() { other = g.pings(ctx, id, c.other.addr) })
	wg.Wait()
	if ctx.Err() != nil {
		return
	}
	key := "conflict " + id.String()
	if known && other {
		c.confirmed, c.silent = true, 0
		g.note(key, fmt.Sprintf("node ID %v is in use by two live hosts, %s at %v and %s at %v", id, hostName(c.known), c.known.addr, hostName(c.other), c.other.addr),
			"one disk is a clone of the other: stop the clone and give it a fresh state directory")
	} else {
		c.silent++
	}
	if !known && other && !c.confirmed {
		g.tellOfOldAddress(ctx, id, c)
	}
	over := !c.confirmed || c.silent >= lostRounds
	g.conflicts.mu.Lock()
	now := g.conflicts.of[id]
	switch same := now.known.addr == c.known.addr && now.other.addr == c.other.addr; {
	case !same: // another pair is to be asked
		over = false
	case over:
		delete(g.conflicts.of, id)
	default:
		g.conflicts.of[id] = c
	}
	g.conflicts.mu.Unlock()
	if over && c.confirmed {
		g.mu.Lock()
		g.problems.drop(key)
		g.mu.Unlock()
	}
}

// oneHost reports whether a host at one of the addresses has both: with two families it is announced by one of them, and has lost or got that meanwhile.
func (c *conflict) oneHost() bool {
	has := func(s sighting, a netip.AddrPort) bool {
		m, err := membership.DecodeMeta(s.meta)
		return err == nil && slices.Contains(m.Underlay, a.Addr())
	}
	return has(c.known, c.other.addr) || has(c.other, c.known.addr)
}

// tellOfOldAddress lets a member that has moved hear that this node still has its old address, and refuses the new one: word that it has left there did
// not arrive, as of members that were cut off, or that have moved at the same time. It then withdraws the old address here (see withdraw). Where it is
// suspected, nobody else tells it, until the suspicion ends after half a minute or more.
//
// In a large cluster many may be behind at once, and one of them is enough: what is withdrawn goes round.
func (g *Gossip) tellOfOldAddress(ctx context.Context, id membership.NodeID, c conflict) {
	behind := func() bool {
		at, ok := g.announced(id)
		return ok && at == c.known.addr
	}
	if !behind() || !pause(ctx, rand.N(time.Duration(g.alive.Load()+1)*tellEach)) || !behind() {
		return
	}
	if err := g.pushPull(c.other.addr); err != nil {
		g.log.Debug("gossip: a member that has moved does not hear that its old address is known here", "peer", hostName(c.other), "addr", c.other.addr, "error", err)
	}
}

// tellEach spreads the members that are behind: a hundred a second tell one that has moved.
const tellEach = 10 * time.Millisecond

// announced is the address that a member in sight was last heard to have.
func (g *Gossip) announced(id membership.NodeID) (netip.AddrPort, bool) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	if p := g.peers[id]; p != nil && p.State <= StateSuspect {
		return p.Addr, true
	}
	return netip.AddrPort{}, false
}

// pings reports whether the node answers gossip's UDP pings at that very address: not by the other family, where it may live while a clone,
// or nobody, has this one.
func (g *Gossip) pings(ctx context.Context, id membership.NodeID, at netip.AddrPort) bool {
	ctx, cancel := context.WithTimeout(ctx, g.cfg.pace.presence)
	defer cancel()
	var answered atomic.Bool
	var wg sync.WaitGroup
	for i := range presenceTries {
		wg.Go(func() {
			if !pause(ctx, time.Duration(i)*g.cfg.pace.presence/4) {
				return
			}
			if _, err := g.ping(id, exactly(at)); err == nil { // ends by memberlist's probe timeout
				answered.Store(true)
				cancel()
			}
		})
	}
	wg.Wait()
	return answered.Load()
}
