package gossip

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"

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
	return nil
}

// announce sends changed metadata to the other members.
func (g *Gossip) announce(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-g.dirty:
		}
		if n, err := g.current(); err == nil {
			// After a timeout it is still queued.
			_ = n.ml.UpdateNode(time.Second)
		}
	}
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
		_ = n.ml.UpdateNode(wait)
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
	return err
}

// ping checks whether the host at addr is the live member with that ID.
func (g *Gossip) ping(id membership.NodeID, addr netip.AddrPort) (time.Duration, error) {
	n, err := g.current()
	if err != nil {
		return 0, err
	}
	return n.ml.Ping(id.String(), net.UDPAddrFromAddrPort(addr))
}
