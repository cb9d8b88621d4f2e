package gossip

import (
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// beside are addresses of this host at which the node answers beside its own.
type beside struct {
	mu     sync.Mutex // held until the sockets are as the fields say
	wanted []netip.Addr
	left   map[netip.Addr]time.Time // those at which others have known this node, and when it has heard of that last
	again  bool                     // it could not listen at one that it had left, and tries again
}

// leftFor is how long a node is silent at an address that it has left, since it has last heard of itself there: word of it goes round for minutes.
const leftFor = 10 * time.Minute

// Listen makes the node answer at these addresses too, and at none that an earlier call named: those that this host has beside its
// own, as a virtual address that moves between hosts, by which others may look for a seed. It returns the first that could not be bound.
//
// An address that the node has left, and the host still has, is silent for a while (see leave).
func (g *Gossip) Listen(addrs []netip.Addr) error {
	g.beside.mu.Lock()
	defer g.beside.mu.Unlock()
	g.beside.wanted = slices.Clone(addrs)
	return g.listenLocked()
}

func (g *Gossip) listenLocked() error {
	n, err := g.current()
	if err != nil {
		return err
	}
	return n.tr.setExtra(slices.DeleteFunc(slices.Clone(g.beside.wanted), func(a netip.Addr) bool {
		_, left := g.beside.left[a]
		return left
	}))
}

// leave has the node answer no longer at an address where others still know it. The host may have kept the address, as where another one
// was configured: who asks there whether this node has moved, or has a clone, would find it at both.
func (g *Gossip) leave(a netip.Addr) {
	g.beside.mu.Lock()
	defer g.beside.mu.Unlock()
	if g.beside.left == nil {
		g.beside.left = map[netip.Addr]time.Time{}
	}
	if _, known := g.beside.left[a]; !known && len(g.beside.left) >= maxProblems {
		return
	}
	g.beside.left[a] = time.Now()
	_ = g.listenLocked() // it closes sockets
}

// listenAgain has the node answer again at addresses that nobody connects with it any more.
func (g *Gossip) listenAgain() {
	g.beside.mu.Lock()
	defer g.beside.mu.Unlock()
	before := len(g.beside.left)
	maps.DeleteFunc(g.beside.left, func(_ netip.Addr, heard time.Time) bool { return time.Since(heard) > leftFor })
	if len(g.beside.left) < before || g.beside.again {
		g.beside.again = g.listenLocked() != nil // what can never be bound was told when Listen was called
	}
}
