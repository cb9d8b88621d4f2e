package gossip

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/tulle-net/tulle/membership"
)

// Limits of one round of attempts.
const (
	parallelJoins   = 8
	isolatedSample  = 16 // last known peers tried in a round while alone
	healSample      = 2  // missing peers tried in a round otherwise
	healersPerRound = 32 // members that try in a round, on average
	returnSample    = 16 // members told of a new address in a round
	recentDeath     = 10 * time.Minute
)

// rejoin joins the cluster, and joins it again after a partition. memberlist gives up on
// members half a minute after it has declared them dead, so a longer partition never
// heals by itself (memberlist #222). This loop tries forever: all known addresses with
// backoff while the node is alone, otherwise a few missing members, which costs almost
// nothing.
func (g *Gossip) rejoin(ctx context.Context) {
	p := g.cfg.pace
	backoff := p.rejoinMin
	seeds := g.cfg.Seeds.Changed()
	for ctx.Err() == nil {
		if !g.resolveIdentity(ctx) {
			return
		}
		g.listenAgain()
		var wait time.Duration
		switch returning := g.isReturning(); {
		case g.alive.Load() == 0:
			g.joinRound(ctx, backoff > p.rejoinMin)
			wait = backoff
			backoff = min(2*backoff, p.rejoinMax)
		case g.Cluster() == membership.ClusterID{}:
			// Whoever is in sight has no cluster either: that of a seed which was silent at first may be there by now.
			g.joinRound(ctx, false)
			wait, backoff = p.newcomer, p.rejoinMin
		case returning:
			g.returnRound(ctx)
			wait = p.returning
		default:
			backoff = p.rejoinMin
			// One connection heals a partition: in a large cluster not every member
			// must try each time.
			if rand.Int64N(g.alive.Load()+1) < healersPerRound {
				g.healRound(ctx)
			}
			if wait = p.heal; g.lostFor() > recentDeath {
				wait = p.healSlow
			}
		}
		// Jitter prevents that both halves of a cluster try at the same moments.
		wait = wait*3/4 + rand.N(wait/2+1)
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-t.C:
		case <-seeds:
			seeds, backoff = g.cfg.Seeds.Changed(), p.rejoinMin
		case <-g.rejoinNow:
			// Events arrive in bursts: wait until they settle, and never spin.
			select {
			case <-ctx.Done():
			case <-time.After(p.rejoinMin / 4):
			}
		}
		t.Stop()
	}
}

func (g *Gossip) isReturning() bool {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.guard.returning
}

// lostFor returns how long ago the last member died.
func (g *Gossip) lostFor() time.Duration {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return time.Since(g.lastDeath)
}

// returnRound announces a new address to members until none of them has the old one.
func (g *Gossip) returnRound(ctx context.Context) {
	g.mu.Lock()
	g.guard.stale = 0
	g.mu.Unlock()
	n, _ := g.joinAll(ctx, addrsToAsk(g.liveMembers(returnSample)))
	g.mu.Lock()
	if n > 0 && g.guard.stale == 0 {
		g.guard.returning = false
		g.problems.drop(stillThere)
	}
	g.mu.Unlock()
}

// missingPeers returns up to n random addresses without a live member.
func (g *Gossip) missingPeers(n int) []netip.AddrPort {
	g.mu.RLock()
	live := map[netip.AddrPort]bool{g.bind: true}
	for _, p := range g.peers {
		if p.State <= StateSuspect {
			live[g.near(p)] = true
		}
	}
	var list []netip.AddrPort
	for a := range g.known {
		if !live[a] {
			list = append(list, a)
		}
	}
	g.mu.RUnlock()
	rand.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	return list[:min(n, len(list))]
}

func (g *Gossip) isLive(a netip.AddrPort) bool {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.liveLockedAt(a)
}

// liveLockedAt reports whether a live member is at an address: at the one that it announces or at another one of its host.
func (g *Gossip) liveLockedAt(a netip.AddrPort) bool {
	if a == g.bind {
		return false
	}
	for _, p := range g.peers {
		if p.State <= StateSuspect && (p.Addr == a || p.Addr.Port() == a.Port() && slices.Contains(p.Meta.Underlay, a.Addr())) {
			return true
		}
	}
	return false
}

// joinAll does a push/pull with all addresses, a few at a time. It returns the number of
// successful ones and the first error.
func (g *Gossip) joinAll(ctx context.Context, addrs []netip.AddrPort) (int, error) {
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		n     int
		first error
		slots = make(chan struct{}, parallelJoins)
	)
	for _, a := range addrs {
		if ctx.Err() != nil {
			break
		}
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			err := g.pushPull(a)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				n++
			} else if first == nil {
				first = fmt.Errorf("gossip: push/pull with %v: %w", a, err)
			}
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		first = ctx.Err()
	}
	return n, first
}
