package gossip

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"github.com/tulle-net/tulle/membership"
)

// maxSuspects is how many suspects are pinged at a time. If there are more, a random choice is pinged.
const maxSuspects = 16

// askSuspects pings the suspects, and clears the suspicion of those that answer. memberlist reports no suspicion that is refuted with the
// same metadata, and probes that member again only when all the others have had their turn, a second each.
func (g *Gossip) askSuspects(ctx context.Context) {
	t := time.NewTicker(g.cfg.pace.suspects)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		var wg sync.WaitGroup
		for id, addr := range g.suspects() {
			wg.Go(func() {
				if rtt, err := g.ping(id, addr); err == nil { // ends by memberlist's probe timeout
					g.pinged(id.String(), rtt)
				}
			})
		}
		wg.Wait()
	}
}

func (g *Gossip) suspects() map[membership.NodeID]netip.AddrPort {
	g.mu.RLock()
	defer g.mu.RUnlock()
	some := map[membership.NodeID]netip.AddrPort{}
	for id, p := range g.peers { // begins at random
		if p.State == StateSuspect && len(some) < maxSuspects {
			some[id] = p.Addr
		}
	}
	return some
}
