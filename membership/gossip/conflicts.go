package gossip

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/tulle-net/tulle/membership"
)

// conflict is an identity of another member that is announced from two addresses, and memberlist has refused the second one. A
// host that has moved is the cause far more often than a cloned disk, and word of its old address may go round for minutes. So
// both addresses are asked: only a clone answers at two.
type conflict struct{ known, other sighting }

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
	if _, seen := g.conflicts.of[id]; seen || len(g.conflicts.of) < maxProblems {
		g.conflicts.of[id] = conflict{known, other}
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
	open := make(map[membership.NodeID]conflict, len(c.of))
	for id, one := range c.of {
		open[id] = one
	}
	return open
}

// investigate reports the conflict if both addresses answer; otherwise there is none (any more).
func (g *Gossip) investigate(ctx context.Context, id membership.NodeID, c conflict) {
	key := "conflict " + id.String()
	var known bool
	var wg sync.WaitGroup
	wg.Go(func() { known = g.pings(ctx, id, c.known.addr) })
	other := g.pings(ctx, id, c.other.addr)
	wg.Wait()
	if known && other {
		g.note(key, fmt.Sprintf("node ID %v is in use by two live hosts, %s at %v and %s at %v", id, hostName(c.known), c.known.addr, hostName(c.other), c.other.addr),
			"one disk is a clone of the other: stop the clone and give it a fresh state directory")
		return
	}
	g.conflicts.mu.Lock()
	if now := g.conflicts.of[id]; now.known.addr == c.known.addr && now.other.addr == c.other.addr {
		delete(g.conflicts.of, id)
	}
	g.conflicts.mu.Unlock()
	g.mu.Lock()
	g.problems.drop(key)
	g.mu.Unlock()
}

// pings reports whether the node answers gossip's UDP pings at the address.
func (g *Gossip) pings(ctx context.Context, id membership.NodeID, at netip.AddrPort) bool {
	ctx, cancel := context.WithTimeout(ctx, g.cfg.pace.presence)
	defer cancel()
	answers := make(chan bool, presenceTries)
	for i := range presenceTries {
		go func() {
			if !pause(ctx, time.Duration(i)*g.cfg.pace.presence/4) {
				answers <- false
				return
			}
			_, err := g.ping(id, at) // ends by memberlist's probe timeout
			answers <- err == nil
		}()
	}
	for range presenceTries {
		if <-answers {
			return true
		}
	}
	return false
}
