package gossip

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/tulle-net/tulle/membership"
)

// maxSuspects is how many suspects are pinged at a time. If there are more, a random choice is pinged.
const maxSuspects = 16

// udpTries is how many pings, one each second, a member has to miss that has answered a probe over TCP only, until its UDP counts as blocked.
const udpTries = 5

// askSuspects pings the suspects, and clears the suspicion of those that answer; and those of which it has to be found out whether they answer over UDP. memberlist reports no suspicion that is refuted with the
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
				if rtt, err := g.ping(id, net.UDPAddrFromAddrPort(addr)); err == nil { // ends by memberlist's probe timeout
					g.pinged(id.String(), rtt)
				} else {
					g.missed(id)
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
		if (p.State == StateSuspect || p.State == StateAlive && p.udpLost > 0) && len(some) < maxSuspects {
			some[id] = p.Addr
		}
	}
	return some
}

// missed counts a ping that a member has not answered.
func (g *Gossip) missed(id membership.NodeID) {
	g.mu.Lock()
	defer g.mu.Unlock()
	p := g.peers[id]
	if p == nil || p.udpLost == 0 {
		return
	}
	if p.udpLost++; p.udpLost > udpTries {
		p.udpLost = 0
		g.noteUDPLocked(id.String())
	}
}
