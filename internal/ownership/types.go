package ownership

import (
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/membership"
)

// Shorter names for what the whole package speaks of.
type (
	NodeID    = membership.NodeID
	ClusterID = membership.ClusterID
	Entry     = membership.Entry
	External  = membership.External
)

// Env is what a Machine needs from the world. Its methods are called with the
// Machine's lock held: they must not call back into it.
type Env interface {
	// Send queues a message to one member. It may be lost, repeated or reordered.
	Send(to NodeID, msg []byte)
	// Broadcast queues table entries (in the form of HandleBroadcast) for all members.
	Broadcast(msg []byte)
	// Persist makes the state durable before it returns nil. After an error the
	// disk may hold either the old state or the new one. The state must not be
	// kept or changed.
	Persist(*ipam.State) error
	// Members returns the other nodes that gossip knows of, in any order.
	Members() []Member
	// Seeds says what became of the configured seeds.
	Seeds() Seeds
	// TunnelAnswers reports whether the data path to the node answers probes.
	TunnelAnswers(NodeID) bool
}

// A Member is another node, as gossip sees it.
type Member struct {
	ID      NodeID
	Name    string
	Cluster ClusterID      // zero: in no cluster yet
	Alive   bool           // answers, or is only suspected
	Addr    netip.AddrPort // gossip address, remembered as a last known peer
}

// Seeds tells how the attempts to reach the configured seeds went since start.
type Seeds struct {
	Others   int      // configured seeds other than this node itself
	Answered int      // of these, how many have answered
	Silent   []string // of these, the ones that have not, for messages
	Tried    bool     // every one was tried at least once since start
}

// Phase is where a node stands on its way to pod addresses.
type Phase uint8

const (
	Waiting    Phase = iota // in no cluster yet; Status.Why says what is missing
	Confirming              // has state from disk; serves its pods, opens and gives nothing
	Joining                 // knows the cluster, asks for space
	Ready                   // owns open blocks
	Leaving                 // gives its space back
	Left                    // owns nothing, and takes nothing any more
)

// String returns the phase in lower case.
func (p Phase) String() string {
	switch p {
	case Waiting:
		return "waiting"
	case Confirming:
		return "confirming"
	case Joining:
		return "joining"
	case Ready:
		return "ready"
	case Leaving:
		return "leaving"
	case Left:
		return "left"
	}
	return "unknown"
}

// Config is what the operator said. Zero durations mean the defaults.
type Config struct {
	ID        NodeID     // of the state file when there is one; else a new one
	Name      string     // for messages
	Addr      netip.Addr // the underlay address by which members know this node, for messages
	Bootstrap bool       // this node may start the cluster
	// ForceBootstrap lets it start the cluster although configured seeds are silent.
	ForceBootstrap bool
	// Bootstrapper is the name that the shared configuration gives to the node that starts the cluster, for messages;
	// "" if it gives none.
	Bootstrapper string
	// CIDRs are the cluster CIDRs, at most one for each family. Empty: learn them.
	// Needed to bootstrap; otherwise they are compared with the cluster's.
	CIDRs []netip.Prefix
	// BlockLen4 and BlockLen6 are the prefix lengths of blocks, used at bootstrap, where 0 means 24 and 64; otherwise
	// those that are not 0 are compared with the cluster's.
	BlockLen4, BlockLen6 int
	// PodCIDRs are the fixed blocks that this node wants, at most one for each family.
	PodCIDRs []netip.Prefix
	// Cooldown is how long a released address rests before another pod gets it; 0: DefaultCooldown.
	Cooldown time.Duration
	// Fresh says that the state on disk is proven to be the latest that this
	// node ever wrote (a witness on a file system that does not survive a reboot
	// agrees: [ipam.Store.Fresh]). Without it, a node starts no new pod from the
	// blocks that it had before the table is confirmed.
	Fresh bool
	// Rand is for retry jitter and request numbers; nil: seeded by the runtime.
	Rand   *rand.Rand
	Logger *slog.Logger // nil: discard
}

// Defaults and periods. They are durations of the caller's clock.
const (
	DefaultCooldown = 60 * time.Second
	DefaultBlock4   = 24 // prefix length in bits
	DefaultBlock6   = 64

	retryEvery   = 2 * time.Second  // unanswered messages, to the same or another node
	refusedEvery = 10 * time.Second // asking around again after everybody refused
	promiseLease = 60 * time.Second // how long a promise about a forget binds
	forgetWithin = 10 * time.Second // how long a forget may take to collect promises
	seedPatience = 3 * time.Second  // bootstrap gives seeds this long at least
	heldFor      = 10 * time.Minute // rest of an address that another node's pod still has
	heldEvery    = time.Minute      // how often such a node says so
	reportFor    = 10 * time.Minute // how long a loss without lasting harm is reported
)

// A Problem is something an operator should know, with the way out.
type Problem struct {
	What   string `json:"what"`
	Remedy string `json:"remedy"`
}

// Params are the cluster's parameters, fixed at bootstrap.
type Params struct {
	Families []ipam.Family // IPv4 first; at most one of each
}

// A Share is what one node owns, for status and for errors about exhausted space.
type Share struct {
	Node  NodeID
	Name  string // "" when unknown
	Self  bool
	Alive bool
	// Blocks is the number of blocks' worth of address space, for each family of Params.
	Blocks []uint64
}

// Status is a snapshot for `tulle status`.
type Status struct {
	Phase     Phase
	Since     time.Time
	Why       string // why it is not Ready; "" when it is
	Node      NodeID
	Cluster   ClusterID
	Params    Params
	Confirmed bool // the table was confirmed with the members since start
	Entries   int  // of the table
	Shares    []Share
	Problems  []Problem
}

// A Route says where packets to a prefix go.
type Route struct {
	Owner    NodeID
	Self     bool
	External *External
}
