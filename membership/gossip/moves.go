package gossip

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/tulle-net/tulle/membership"
)

// Rebind moves the running node to another underlay address. From the new address it
// announces that the old one is gone, so that memberlist accepts the new one at once
// instead of after its reclaim time, and joins the members again. The caller must
// change the addresses in the metadata with SetMeta, before or after.
func (g *Gossip) Rebind(ctx context.Context, bind netip.Addr) error {
	next := g.cfg
	next.Bind = bind
	if err := next.validate(); err != nil {
		return err
	}
	if err := g.rebind(bind); err != nil {
		return err
	}
	n, err := g.SyncAll(ctx)
	g.dropUnseen()
	g.wake()
	g.log.Info("gossip: address changed", "addr", bind, "synced", n)
	return err
}

func (g *Gossip) rebind(bind netip.Addr) error {
	g.life.Lock()
	defer g.life.Unlock()
	old, err := g.current()
	if err != nil {
		return err
	}
	tr, err := g.listen(netip.AddrPortFrom(bind.Unmap(), uint16(g.cfg.Port)))
	if err != nil {
		return err
	}
	old.d.closed.Store(true)
	old.tr.via.Store(tr)
	if err := old.ml.Leave(g.cfg.pace.leaves); err != nil {
		g.log.Warn("gossip: not every member may know of the new address yet", "addr", tr.addr, "err", err)
	}
	_ = old.ml.Shutdown()
	if err := g.startLocked(tr); err != nil {
		err = fmt.Errorf("gossip: after the change of address to %v: %w", bind, err)
		g.fail(err)
		return err
	}
	g.setReturning()
	signal(g.dirty) // metadata that changed meanwhile may have gone to the old instance
	return nil
}

// announce sends changed metadata to the other members, and again when the first other member comes (see update).
func (g *Gossip) announce(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-g.dirty:
		}
		if n, err := g.current(); err == nil {
			g.update(ctx, n)
		}
	}
}

// announcements is how often metadata are announced at most.
const announcements = 3

// update broadcasts this node's metadata, and returns when they have gone out. It repeats the broadcast if memberlist does not say so
// in time (outWithin), because memberlist may lose one: if the only entry of its queue is replaced by a newer one of
// the same node, the next entry but one gets the same number, and takes its place if it is as long (memberlist 0.7.0, queue.go,
// deleteItem). The wait is well above the time that a broadcast takes (1.2 s for two nodes, 1.6 s for a thousand, more if much is queued), for a
// repetition begins anew with all the transmissions. Where nobody is alive, memberlist does not wait.
func (g *Gossip) update(ctx context.Context, n *network) {
	for range announcements {
		done := make(chan error, 1)
		go func() { done <- g.updateOnce(n) }()
		select {
		case err := <-done:
			if err == nil {
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

// updateOnce is one broadcast at a time: a second one would replace the first, which memberlist then reports as gone out.
func (g *Gossip) updateOnce(n *network) error {
	g.updating.Lock()
	defer g.updating.Unlock()
	return n.ml.UpdateNode(g.outWithin())
}

// outWithin is twice the time that a broadcast takes to go out, and half a second: its transmissions, to up to three members in each gossip
// interval (memberlist's GossipNodes). It is pace.announced at most.
func (g *Gossip) outWithin() time.Duration {
	others := max(1, int(g.alive.Load()))
	transmissions := retransmitMult * int(math.Ceil(math.Log10(float64(others+2))))
	each := cmp.Or(g.cfg.pace.gossipInterval, memberlist.DefaultLANConfig().GossipInterval)
	rounds := (transmissions + min(3, others) - 1) / min(3, others)
	return min(2*time.Duration(rounds)*each+500*time.Millisecond, g.cfg.pace.announced)
}

// Leave announces that this node leaves, so that the members do not suspect it first.
// Run continues; end it with its context.
func (g *Gossip) Leave(ctx context.Context) error {
	g.mu.Lock()
	meta := g.meta
	meta.Leaving = true
	wire, err := g.encodeMeta(meta)
	if err == nil {
		g.meta, g.metaWire = meta, wire
	}
	g.mu.Unlock()
	if err != nil {
		return err
	}
	wait := g.cfg.pace.leaves
	if deadline, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(deadline))
	}
	if wait <= 0 {
		return context.DeadlineExceeded
	}
	done := make(chan error, 1)
	g.life.Lock() // prevents a shutdown at the same time, at which memberlist panics
	go func() {
		defer g.life.Unlock()
		n, err := g.current()
		if err != nil {
			done <- err
			return
		}
		g.update(ctx, n)
		done <- n.ml.Leave(wait)
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// SyncAll does a full push/pull with every live member, a few at a time. It returns
// the number of successful ones.
func (g *Gossip) SyncAll(ctx context.Context) (int, error) {
	var addrs []netip.AddrPort
	for _, m := range g.Members() {
		if m.State <= StateSuspect {
			addrs = append(addrs, m.Addr)
		}
	}
	return g.joinAll(ctx, addrs)
}

// pushPull does a push/pull with the member at addr.
func (g *Gossip) pushPull(addr netip.AddrPort) error {
	n, err := g.current()
	if err != nil {
		return err
	}
	_, err = n.ml.Join([]string{addr.String()})
	g.called(addr.Addr(), err)
	return err
}

// ping checks whether the host at addr is the live member with that ID. A member that is known there is reached by its other family, too,
// unless the address is to be taken exactly.
func (g *Gossip) ping(id membership.NodeID, addr net.Addr) (time.Duration, error) {
	n, err := g.current()
	if err != nil {
		return 0, err
	}
	return n.ml.Ping(id.String(), addr)
}

// Answers reports whether a member answers a ping right now, at its gossip port of one of these addresses: its state lags by
// seconds. It takes up to half a second for each.
func (g *Gossip) Answers(id membership.NodeID, at ...netip.Addr) bool {
	m, ok := g.Member(id)
	return ok && slices.ContainsFunc(at, func(a netip.Addr) bool {
		_, err := g.ping(id, exactly(netip.AddrPortFrom(a, m.Addr.Port())))
		return err == nil
	})
}
