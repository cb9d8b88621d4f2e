package agent

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/tulle-net/tulle/internal/ownership"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/membership/gossip"
	"github.com/tulle-net/tulle/membership/seed"
)

// cluster connects the ownership state machine with gossip: it is the machine's Env and gossip's Handler. Messages go through
// an outbox, because the machine sends with its lock held and a stream to another host takes time.
type cluster struct {
	log    *slog.Logger
	store  *ipam.Store
	probes *prober
	outbox chan outgoing
	moved  func() // members have changed; must not block

	ownership *ownership.Machine
	gossip    *gossip.Gossip
	bench     *benches
	refusals  sparseLog
}

// outgoing is one message; to is zero for a broadcast.
type outgoing struct {
	to  membership.NodeID
	msg []byte
}

const (
	outboxSize  = 1024
	senders     = 4 // concurrent streams, so that a host that hangs does not delay the others
	sendTimeout = 5 * time.Second
)

var (
	_ ownership.Env  = (*cluster)(nil)
	_ gossip.Handler = handler{}
)

// Send implements ownership.Env. A full outbox loses the message, as the network may; the machine asks again.
func (c *cluster) Send(to membership.NodeID, msg []byte) { c.queue(outgoing{to, msg}) }

// Broadcast implements ownership.Env.
func (c *cluster) Broadcast(msg []byte) { c.queue(outgoing{msg: msg}) }

func (c *cluster) queue(o outgoing) {
	select {
	case c.outbox <- o:
	default:
		c.log.Warn("outbox is full, a message about address space is lost and will be sent again")
	}
}

// deliver empties the outbox until ctx is done.
func (c *cluster) deliver(ctx context.Context) error {
	var wg sync.WaitGroup
	for range senders {
		wg.Go(func() {
			for {
				select {
				case <-ctx.Done():
					return
				case o := <-c.outbox:
					c.deliverOne(ctx, o)
				}
			}
		})
	}
	wg.Wait()
	return nil
}

func (c *cluster) deliverOne(ctx context.Context, o outgoing) {
	var err error
	if o.to.IsZero() {
		err = c.gossip.Queue(o.msg)
	} else {
		ctx, cancel := context.WithTimeout(ctx, sendTimeout)
		defer cancel()
		err = c.gossip.Send(ctx, o.to, o.msg)
	}
	if err != nil && ctx.Err() == nil {
		c.log.Debug("message not sent", "node", o.to, "error", err)
	}
}

// Persist implements ownership.Env. It refuses the founding of a cluster when a member of another one has come in meanwhile.
func (c *cluster) Persist(st *ipam.State) error {
	if c.gossip != nil {
		if have, now := c.gossip.Cluster(), membership.ClusterID(st.Cluster); !have.IsZero() && !now.IsZero() && have != now {
			return fmt.Errorf("gossip is in cluster %v, the state in %v", have, now)
		}
	}
	began := time.Now()
	err := c.store.Save(st)
	if took := time.Since(began); took > slowSave {
		c.log.Warn("saving the state took long: whoever asked for addresses, space or the status has waited for the disk", "took", took, "file", c.store.Path())
	}
	return err
}

// slowSave is how long a save may take before the log tells of it.
const slowSave = time.Second

// Members implements ownership.Env.
func (c *cluster) Members() []ownership.Member {
	if c.gossip == nil {
		return nil
	}
	list := c.gossip.Members()
	out := make([]ownership.Member, len(list))
	for i, m := range list {
		out[i] = ownership.Member{
			ID: m.ID, Name: m.Name, Cluster: m.Meta.Cluster, Addr: m.Addr,
			Alive: m.State == gossip.StateAlive || m.State == gossip.StateSuspect,
		}
	}
	return out
}

// Seeds implements ownership.Env.
func (c *cluster) Seeds() ownership.Seeds {
	s := ownership.Seeds{Tried: true}
	if c.gossip == nil {
		return ownership.Seeds{Configured: 1} // not known yet
	}
	for _, e := range c.gossip.Seeds() {
		s.Tried = s.Tried && e.Tried
		s.Configured++
		if seed.IsName(e.Name) {
			s.Names++
		}
		s.Others += e.Others
		s.Answered += e.Answered
		s.Silent = append(s.Silent, silent(e)...)
	}
	return s
}

// silent names what of a seed has not answered: its name, or the addresses if they are several.
func silent(s gossip.Seed) []string {
	if s.Answered == s.Others {
		return nil
	}
	if len(s.Addrs) < 2 {
		return []string{s.Name}
	}
	var out []string
	for _, a := range s.Addrs {
		if !a.Self && !a.Answered {
			out = append(out, fmt.Sprintf("%s at %v", s.Name, a.Addr.Addr()))
		}
	}
	return out
}

// TunnelAnswers implements ownership.Env.
func (c *cluster) TunnelAnswers(id membership.NodeID) bool { return c.probes.answering(id.String()) }

// LocalState implements gossip.Handler.
func (c *cluster) LocalState(join bool) []byte { return c.ownership.LocalState(time.Now(), join) }

// MergeState implements gossip.Handler.
func (c *cluster) MergeState(b []byte, join bool) {
	if err := c.ownership.MergeState(time.Now(), b, join); err != nil {
		c.refused("another member's table was not taken", "error", err)
	}
}

// received logs an invalid message; the sender may have another version, or be hostile.
func (c *cluster) received(kind string, from membership.NodeID, err error) {
	if err != nil {
		c.refused("message about address space refused", "kind", kind, "node", from, "error", err)
	}
}

// refused logs what another node sent and this one does not take: who sends one bad message may send thousands.
func (c *cluster) refused(what string, args ...any) {
	c.refusals.log(c.log, slog.LevelWarn, what, what, args...)
}

// Message implements gossip.Handler.
func (c *cluster) Message(from membership.NodeID, b []byte) {
	if len(b) > 0 && b[0] == benchTag {
		if err := c.bench.letter(from, b[1:]); err != nil {
			c.refused("message about a benchmark refused", "node", from, "error", err)
		}
		return
	}
	c.received("message", from, c.ownership.HandleMessage(time.Now(), from, b))
}

// handler implements gossip.Handler for cluster; it is a separate type because both interfaces have a method Broadcast.
type handler struct{ *cluster }

// Broadcast implements gossip.Handler.
func (h handler) Broadcast(b []byte) {
	h.received("broadcast", membership.NodeID{}, h.ownership.HandleBroadcast(time.Now(), b))
}

// Members implements gossip.Handler: something about them has changed.
func (h handler) Members() {
	h.ownership.MembersChanged(time.Now())
	h.moved()
}
