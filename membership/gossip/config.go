package gossip

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/membership/keyring"
	"github.com/tulle-net/tulle/membership/seed"
)

// A Handler owns the table. It supplies the state for push/pull and receives the
// messages of other members. All methods are called from one goroutine, except
// LocalState, which memberlist calls from the goroutine of each push/pull. No method
// may block for long. Byte slices that are passed to a method belong to it; the
// gossip layer does not use them again.
type Handler interface {
	// LocalState returns the whole state for a push/pull, at most
	// [MaxState] bytes. join is true when the exchange is a join or a
	// [Gossip.SyncAll] and false for the periodic anti-entropy.
	LocalState(join bool) []byte
	// MergeState receives another member's LocalState.
	MergeState(b []byte, join bool)
	// Broadcast receives a message that some member passed to [Gossip.Queue]. It
	// is called once for each distinct message that this node has not seen
	// recently. The gossip layer has already queued it for other members.
	Broadcast(b []byte)
	// Message receives a message that another member passed to [Gossip.Send].
	Message(from membership.NodeID, b []byte)
	// Members is called after a change of the list of members, of a member's
	// metadata or of this node's [Gossip.Cluster]. Several changes may cause one
	// call.
	Members()
}

// Config describes this node and the members that it joins through.
type Config struct {
	ID   membership.NodeID // this node's identity; its hex form is its name in memberlist
	Name string            // name for people; at most [membership.MaxName] bytes

	Bind netip.Addr // underlay address, both bound and advertised; not unspecified
	Port int        // TCP and UDP port; also the default port of seeds
	MTU  int        // bytes of the underlay link; 0 means 1500

	// Also are further addresses of this host to listen at and to send from, above all one of the other family, so that members of
	// either family are reached. They belong into Meta.Underlay, too. What cannot be bound is done without.
	Also []netip.Addr

	// Seeds are any members; nil: none. The node's own addresses among them are passed over, so that all hosts can share one
	// list. Who has made the list runs it.
	Seeds *seed.List
	// Own reports whether an address leads to this host, so that a seed which has it is this node; nil: Bind and Also do.
	Own func(netip.Addr) bool
	// LastPeers are the addresses of members from before a restart, from
	// [Gossip.KnownPeers].
	LastPeers []netip.AddrPort

	// Meta is the metadata of this node for other members. New fills in ID, Name,
	// Started and the capability of gossip itself. A zero Cluster means that the node is in no cluster yet; it
	// then joins the first cluster that it meets.
	Meta membership.Meta

	Keyring *keyring.Ring // nil: gossip is neither encrypted nor authenticated
	Handler Handler       // required
	Logger  *slog.Logger  // nil: discard

	pace  pace                      // tests shorten memberlist's timings
	allow func(netip.AddrPort) bool // tests cut links; nil allows all
}

// pace has the timings that tests shorten. The zero value means memberlist's LAN
// profile and the delays below.
type pace struct {
	probeInterval, probeTimeout   time.Duration
	gossipInterval, pushPull      time.Duration
	gossipToTheDead, reclaim      time.Duration
	stream                        time.Duration // dial, read and write limit
	suspicionMult                 int
	rejoinMin, rejoinMax          time.Duration // alone: backoff
	newcomer                      time.Duration // in sight of others, but in no cluster
	heal, healSlow                time.Duration // not alone, but some peers are missing
	seeds                         time.Duration // in a cluster, and seeds are silent
	returning                     time.Duration // while peers still have this node's old address
	presence                      time.Duration // for an answer of whoever has an address
	conflict                      time.Duration // after which the addresses of one identity are asked, and asked again
	suspects                      time.Duration // between pings of suspects
	settle                        time.Duration // longer than news take to reach everybody
	repair                        time.Duration // between push/pulls for what was missed
	announced                     time.Duration // after which a broadcast of metadata that has not gone out is repeated, at the latest
	keySettle, keyTimeout, leaves time.Duration
}

func (p pace) withDefaults() pace {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&p.reclaim, time.Nanosecond)
	def(&p.conflict, 10*time.Second)
	def(&p.presence, time.Second) // two of the LAN profile's ping timeouts
	def(&p.stream, 10*time.Second)
	def(&p.rejoinMin, time.Second)
	def(&p.rejoinMax, 30*time.Second)
	def(&p.newcomer, 2*time.Second)
	def(&p.heal, 15*time.Second)
	def(&p.healSlow, time.Minute)
	def(&p.seeds, 2*time.Second)
	def(&p.returning, 3*time.Second)
	def(&p.suspects, time.Second)
	def(&p.settle, 2*time.Second)
	def(&p.repair, 5*time.Second)
	def(&p.announced, 4*time.Second)
	def(&p.keySettle, 2*time.Second)
	def(&p.keyTimeout, 10*time.Second)
	def(&p.leaves, 3*time.Second)
	return p
}

func (c *Config) validate() error {
	switch {
	case c.ID.IsZero():
		return errors.New("gossip: the node ID is zero")
	case !c.Bind.IsValid() || c.Bind.IsUnspecified() || c.Bind.IsMulticast():
		return fmt.Errorf("gossip: cannot bind to %v: an address of one interface is needed (--underlay)", c.Bind)
	case c.Port < 1 || c.Port > 65535:
		return fmt.Errorf("gossip: port %d is outside 1–65535 (--gossip-port)", c.Port)
	case c.Handler == nil:
		return errors.New("gossip: no handler")
	case c.MTU != 0 && c.MTU < minMTU:
		return fmt.Errorf("gossip: underlay MTU %d is below %d bytes", c.MTU, minMTU)
	}
	return nil
}

const (
	minMTU     = 576  // bytes, RFC 791 §3.1
	defaultMTU = 1500 // bytes, Ethernet
	// maxGossipPacket is memberlist's default. Larger packets gain little at the
	// rates of gossip, and are lost in tunnels and in networks where only some
	// links carry jumbo frames.
	maxGossipPacket = 1400
	// packetSlack is the number of bytes that memberlist adds to a packet beyond
	// UDPBufferSize: the CRC header (5) and the entry for a ping in the compound
	// header (2).
	packetSlack = 8
)

// packetSize returns memberlist's UDPBufferSize for an underlay link: no gossip
// datagram, with its IP and UDP headers, is larger than the link's MTU.
func (c *Config) packetSize() int {
	headers := 20 + 8
	for _, a := range append([]netip.Addr{c.Bind}, c.Also...) {
		if a.Unmap().Is6() {
			headers = 40 + 8
		}
	}
	mtu := c.MTU
	if mtu == 0 {
		mtu = defaultMTU
	}
	return min(maxGossipPacket, mtu-headers-packetSlack)
}
