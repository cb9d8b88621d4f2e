package gossip

import "sync/atomic"

// signs are how somebody finds out that gossip is stuck.
type signs struct{ asked, seen atomic.Uint64 }

// Stalled asks the goroutine that delivers messages for a sign of life, and reports whether it has not given the one that the
// last call asked for: a method of the Handler does not return, or memberlist's members are locked. An idle node is woken for
// it. One goroutine at a time may call it, at intervals of seconds. It never waits.
func (g *Gossip) Stalled() bool {
	select {
	case <-g.ready:
	default:
		return false
	}
	asked := g.signs.asked.Load()
	stalled := g.signs.seen.Load() != asked
	g.signs.asked.Add(1)
	signal(g.inbox.wake)
	return stalled
}

// live gives the sign of life that was last asked for. It looks at memberlist's members, because a lock that is never released
// stops all of gossip.
func (g *Gossip) live() {
	asked := g.signs.asked.Load()
	if asked == g.signs.seen.Load() {
		return
	}
	if n, err := g.current(); err == nil {
		n.ml.NumMembers()
	}
	g.signs.seen.Store(asked)
}
