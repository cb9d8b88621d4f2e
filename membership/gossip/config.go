package gossip

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/membership/keyring"
)

// A Handler is the owner of the table: it supplies the state that push/pull
// carries and takes what the other members send. Every method is called from
// one goroutine, except LocalState, which memberlist calls from the goroutine of
// whatever push/pull is going on. No method may block for long; byte slices that
// are handed over belong to the receiver and are not used again by the gossip
// layer.
type Handler interface {
	// LocalState returns the whole state for a push/pull, at most
	// [MaxState] bytes. join is true when the exchange is a join or a
	// [Gossip.SyncAll] and false for the periodic anti-entropy.
	LocalState(join bool) []byte
	// MergeState takes another member's LocalState.
	MergeState(b []byte, join bool)
	// Broadcast takes one message that some member gave to [Gossip.Queue]. It
	// is called once for each distinct message that this node has not seen
	// lately; the gossip layer has already passed the message on.
	Broadcast(b []byte)
	// Message takes what another member gave to [Gossip.Send].
	Message(from membership.NodeID, b []byte)
	// Members says that the list of members, a member's metadata or this
	// node's [Gossip.Cluster] has changed. Changes are coalesced.
	Members()
}

// Config says who this node is and whom it asks to be let in.
type Config struct {
	ID   membership.NodeID // this node's identity; its hex form is its name in memberlist
	Name string            // the name that people read; at most [MaxName] bytes

	Bind netip.Addr // underlay address, both bound and advertised; not unspecified
	Port int        // TCP and UDP port; also the default port of seeds
	MTU  int        // bytes of the underlay link; 0 means 1500

	// Seeds are HOST[:PORT] of any members. The node's own address among them
	// is passed over, so that all hosts can share one list.
	Seeds []string
	// LastPeers are addresses of members known before a restart: what
	// [Gossip.KnownPeers] returned then.
	LastPeers []netip.AddrPort

	// Meta is what the other members learn about this node. Its ID, Name and
	// Started are filled in. A zero Cluster means that the node is in no
	// cluster yet and may be adopted by the first one that it meets.
	Meta membership.Meta

	Keyring *keyring.Ring // nil: gossip is neither encrypted nor authenticated
	Handler Handler       // required
	Logger  *slog.Logger  // nil: discard

	pace  pace                      // tests shorten memberlist's timings
	allow func(netip.AddrPort) bool // tests cut links; nil allows all
}

// pace holds the timings that tests shorten. The zero value is memberlist's LAN
// profile and the delays below.
type pace struct {
	probeInterval, probeTimeout   time.Duration
	gossipInterval, pushPull      time.Duration
	gossipToTheDead, reclaim      time.Duration
	stream                        time.Duration // dial, read and write limit
	suspicionMult                 int
	rejoinMin, rejoinMax          time.Duration // alone: backoff
	heal, healSlow                time.Duration // not alone, but some peers are missing
	returning                     time.Duration // peers still know this node at its old address
	keySettle, keyTimeout, leaves time.Duration
}

func (p pace) withDefaults() pace {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&p.reclaim, 30*time.Second)
	def(&p.stream, 10*time.Second)
	def(&p.rejoinMin, time.Second)
	def(&p.rejoinMax, 30*time.Second)
	def(&p.heal, 15*time.Second)
	def(&p.healSlow, time.Minute)
	def(&p.returning, 3*time.Second)
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
	// maxGossipPacket is memberlist's own safe value. Larger packets gain
	// little at gossip's rates and do not survive tunnels and jumbo islands.
	maxGossipPacket = 1400
	// packetSlack is what memberlist adds to a packet beyond its
	// UDPBufferSize: the CRC header (5 bytes) and the compound header's entry
	// for a ping (2 bytes).
	packetSlack = 8
)

// packetSize returns memberlist's UDPBufferSize for an underlay link: no gossip
// datagram, with its IP and UDP headers, is larger than the link's MTU.
func (c *Config) packetSize() int {
	headers := 20 + 8
	if c.Bind.Is6() && !c.Bind.Is4In6() {
		headers = 40 + 8
	}
	mtu := c.MTU
	if mtu == 0 {
		mtu = defaultMTU
	}
	return min(maxGossipPacket, mtu-headers-packetSlack)
}
