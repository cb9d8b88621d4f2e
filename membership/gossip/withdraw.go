package gossip

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/netip"
	"time"

	"github.com/hashicorp/memberlist"
)

// withdraw tells the members at those addresses that this node is no more at old,
// whatever they thought of it there: as if it had left before it moved. memberlist
// then takes it at its new address at once. A member's entry can be ended only by
// a message that is as new as the entry, so a short-lived memberlist instance
// that says to be the node at its old address learns how new that is, and leaves.
//
// This is no more than what every holder of the gossip key can do; that the old
// address is empty has been asked before (see resolveIdentity).
func (g *Gossip) withdraw(ctx context.Context, old netip.AddrPort, members []netip.AddrPort) error {
	n, err := g.current()
	if err != nil {
		return err
	}
	conf := g.commonConfig(old)
	if g.cfg.Keyring != nil {
		if conf.Keyring, err = memberlist.NewKeyring(g.cfg.Keyring.Copy()); err != nil {
			return fmt.Errorf("gossip: %w", err)
		}
	}
	d := &delegate{g: g, addr: old}
	d.closed.Store(true)
	conf.Delegate = d // for the metadata
	conf.Transport = &pastTransport{tr: n.tr, old: old}
	conf.ProbeInterval, conf.PushPullInterval = 0, 0
	conf.Logger = log.New(io.Discard, "", 0)
	past, err := memberlist.Create(conf)
	if err != nil {
		return fmt.Errorf("gossip: %w", err)
	}
	defer past.Shutdown()
	addrs := make([]string, len(members))
	for i, a := range members {
		addrs[i] = a.String()
	}
	if _, err := past.Join(addrs); err != nil {
		return err
	}
	if err := past.Leave(g.cfg.pace.leaves); err != nil {
		g.log.Debug("gossip: not every member may know yet that the old address is empty", "addr", old, "err", err)
	}
	// Let it spread: where the word of the new address is faster, the address in use is refused until the old one is dead.
	pause(ctx, withdrawRounds*conf.GossipInterval)
	_, err = past.Join(addrs) // those who were asked know it for sure
	return err
}

// withdrawRounds is how many rounds of gossip a member needs to pass on a withdrawal in a cluster of a thousand.
const withdrawRounds = 4

// pastTransport sends for an address that this host no longer has, from the one that it has now. Nothing arrives there.
type pastTransport struct {
	tr  *transport
	old netip.AddrPort
}

func (t *pastTransport) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return t.old.Addr().AsSlice(), int(t.old.Port()), nil
}
func (t *pastTransport) WriteTo(b []byte, addr string) (time.Time, error) { return t.tr.write(b, addr) }
func (t *pastTransport) DialTimeout(addr string, d time.Duration) (net.Conn, error) {
	return t.tr.dial(addr, d)
}
func (t *pastTransport) PacketCh() <-chan *memberlist.Packet { return nil }
func (t *pastTransport) StreamCh() <-chan net.Conn           { return nil }
func (t *pastTransport) Shutdown() error                     { return nil }
