package ownership

import (
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/membership"
)

// Short names for types of package membership.
type (
	NodeID    = membership.NodeID
	ClusterID = membership.ClusterID
	Entry     = membership.Entry
	External  = membership.External
)

// Env is the interface of a Machine to its environment. The Machine calls these methods
// with its lock held: they must not call back into it.
type Env interface {
	// Send queues a message to one member. It may be lost, repeated or reordered.
	Send(to NodeID, msg []byte)
	// Broadcast queues table entries (in the form of HandleBroadcast) for all members.
	Broadcast(msg []byte)
	// Persist saves the state durably before it returns nil. After an error the
	// disk may have either the old state or the new one. Persist must not keep or
	// modify the state.
	Persist(*ipam.State) error
	// Members returns the other nodes that gossip knows, in any order.
	Members() []Member
	// Seeds returns the state of the configured seeds.
	Seeds() Seeds
	// TunnelAnswers reports whether the data path to the node answers probes.
	TunnelAnswers(NodeID) bool
}

// A Member is another node, as gossip sees it.
type Member struct {
	ID      NodeID
	Name    string
	Cluster ClusterID      // zero: in no cluster yet
	Alive   bool           // alive, or only suspected
	Addr    netip.AddrPort // gossip address, remembered as a last known peer
}

// Seeds has the results of contacting the configured seeds since start.
type Seeds struct {
	Configured int      // entries of the configured list, this node itself included
	Names      int      // of these, how many are names, which may lead elsewhere a little later
	Others     int      // seeds other than this node itself
	Answered   int      // of these, how many have answered
	Silent     []string // of these, the ones that have not, for messages
	Tried      bool     // every seed was tried at least once since start
}

// Phase is the phase of a node on its way to pod addresses.
type Phase uint8

const (
	Waiting    Phase = iota // in no cluster yet; Status.Why says what is missing
	Confirming              // has state from disk; serves its pods, but opens no block and gives no space
	Joining                 // knows the cluster, asks for space
	Ready                   // owns open blocks
	Leaving                 // gives its space to another member
	Left                    // owns nothing, and accepts no space any more
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

// Config is the configuration of a Machine. Zero durations mean the defaults.
type Config struct {
	ID        NodeID     // of the state file when there is one; else a new one
	Name      string     // for messages
	Addr      netip.Addr // the underlay address by which members know this node, for messages
	Bootstrap bool       // this node may start the cluster
	// ForceBootstrap lets it start the cluster even if seeds do not answer.
	ForceBootstrap bool
	// Bootstrapper is the name of the node that starts the cluster according to the shared configuration, for messages;
	// "" if it names none.
	Bootstrapper string
	// CIDRs are the cluster CIDRs, at most one per family. A bootstrap needs them. Otherwise
	// they may be empty, or are compared with the cluster's.
	CIDRs []netip.Prefix
	// BlockLen4 and BlockLen6 are the prefix lengths of blocks, used at bootstrap, where 0 means 24 and 64; otherwise
	// those that are not 0 are compared with the cluster's.
	BlockLen4, BlockLen6 int
	// PodCIDRs are the fixed blocks of this node, at most one per family.
	PodCIDRs []netip.Prefix
	// Cooldown is the time before another pod gets a released address; 0: DefaultCooldown.
	Cooldown time.Duration
	// Fresh means that the state on disk is proven to be the last one that this node
	// wrote, and that nobody can have taken its space over since ([ipam.Store.Fresh]). Without it, the node allocates no new addresses from
	// its old blocks before the table is confirmed.
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

	retryEvery   = 2 * time.Second               // unanswered messages, to the same or another node
	refusedEvery = 10 * time.Second              // next round after all owners refused
	promiseLease = 60 * time.Second              // how long a promise about a forget lasts
	forgetWithin = 10 * time.Second              // time limit of a forget for collecting promises
	goneFor      = ipam.FreshFor + 5*time.Second // how long a node was not seen alive before its space is taken, unless by force
	seedPatience = 5 * time.Second               // a founder waits this long for members that call, from when all its seeds answer
	selfPatience = 15 * time.Second              // likewise, where every seed leads to the founder itself, some of them by name
	heldFor      = 10 * time.Minute              // cool-down of an address that another node's pod still has
	heldEvery    = time.Minute                   // interval at which such a node reports it
	reportFor    = 10 * time.Minute              // how long a loss that affects no pod is reported
)

// A Problem is a condition that an operator should know about, with its remedy.
type Problem struct {
	What   string `json:"what"`
	Remedy string `json:"remedy"`
	Topic  string `json:"topic"` // a word for what it is about, see problems
}

// Params are the parameters of the cluster, fixed at bootstrap.
type Params struct {
	Families []ipam.Family // IPv4 first; at most one of each
}

// A Share is the amount of space of one node, for status and for errors about exhausted space.
type Share struct {
	Node  NodeID
	Name  string // "" when unknown
	Self  bool
	Alive bool
	// Blocks is the amount of space in blocks, for each family of Params.
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

// A Route is the destination of packets to a prefix.
type Route struct {
	Owner    NodeID
	Self     bool
	External *External
}
