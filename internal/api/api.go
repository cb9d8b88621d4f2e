// Package api is the agent's control socket: its types, its server and its client.
//
// The protocol is HTTP with JSON bodies over a unix socket, with versioned paths (/v1/...). JSON field names are stable,
// because tests and scripts outside this repository read them: fields may be added, never renamed. The command line shows
// only data from here, so that `-o json` and the tables always agree.
//
// Units are in the names: rtt_us is microseconds, *_bytes bytes, mtu bytes, loss a fraction from 0 to 1. Counts of addresses
// are capped at MaxCount, because an IPv6 block has more addresses than a JSON number can represent.
//
// Server and Client may be used by any number of goroutines. A Backend is called concurrently, once per request.
package api

import (
	"math"
	"net/netip"
	"time"
)

// DefaultSocket is the path of the control socket unless --socket names another.
const DefaultSocket = "/run/tulle/tulle.sock"

// MaxCount is the largest count of addresses that the API reports. Larger counts (an IPv6 /64) are reported as MaxCount.
const MaxCount uint64 = math.MaxInt64

// States of a peer in gossip.
const (
	PeerAlive    = "alive"
	PeerSuspect  = "suspect"
	PeerDead     = "dead"
	PeerLeft     = "left"
	PeerExternal = "external" // a router or kernel tunnel without an agent; not part of gossip
)

// States of a path to a peer.
const (
	PathUp      = "up"
	PathDown    = "down"
	PathProbing = "probing" // not decided yet
	PathOff     = "off"     // not used: not in --paths, not supported on this host, or the peer has left (the reason says which)
)

// Status is the answer to GET /v1/status, the data of `tulle status`.
type Status struct {
	Version string            `json:"version"`
	Ready   bool              `json:"ready"` // table confirmed and TUN up; if false, Problems has the reason
	Started time.Time         `json:"started,omitzero"`
	Node    Node              `json:"node"`
	Cluster Cluster           `json:"cluster"`
	Peers   []Peer            `json:"peers"`
	Drops   map[string]uint64 `json:"drops"` // by reason (names as in wire.md); includes reasons with count 0
	// LastSendError is what the kernel said about the last packet that it did not send (drops of send_error).
	LastSendError string      `json:"last_send_error,omitempty"`
	Problems      []Problem   `json:"problems"`
	Counters      Counters    `json:"counters"`
	Offload       Offload     `json:"offload"`
	FastPath      FastPath    `json:"fast_path,omitzero"`
	IPAM          IPAMSummary `json:"ipam"`
	Gossip        Gossip      `json:"gossip"`
}

// Healthy reports whether `tulle status` has exit code 0.
func (s *Status) Healthy() bool { return s.Ready && len(s.Problems) == 0 }

// Node describes this node.
type Node struct {
	Name     string       `json:"name"`
	ID       string       `json:"id"`
	Underlay []netip.Addr `json:"underlay"`
	// Interface has the underlay addresses; UnderlayReason says why they are used, and what was before them.
	Interface      string `json:"interface,omitempty"`
	UnderlayReason string `json:"underlay_reason,omitempty"`
	// Links are the interfaces by which packets from Underlay leave. LinkMTU is their smallest MTU, in bytes.
	Links   []string `json:"links,omitempty"`
	LinkMTU int      `json:"link_mtu,omitempty"`
	// UDPPort and VXLANPort are the UDP ports on which it receives these encapsulations.
	UDPPort   uint16         `json:"udp_port,omitempty"`
	VXLANPort uint16         `json:"vxlan_port,omitempty"`
	Tun       Tun            `json:"tun"`
	Prefixes  []netip.Prefix `json:"prefixes"` // the space this node owns
	Blocks    []Block        `json:"blocks"`   // the part of it from which pods get addresses
	// Stranded are addresses of this node's pods that belong to other nodes now.
	Stranded []netip.Addr `json:"stranded,omitempty"`
}

// Tun describes the TUN device. Host processes use Addresses as their source toward remote pods.
type Tun struct {
	Name      string       `json:"name"`
	MTU       int          `json:"mtu"`
	Addresses []netip.Addr `json:"addresses"`
	Queues    int          `json:"queues,omitempty"`
}

// Block is a part of the node's space from which pods get addresses.
type Block struct {
	Prefix  netip.Prefix `json:"prefix"`
	Used    uint64       `json:"used"`    // addresses that pods have
	Cooling uint64       `json:"cooling"` // freed, and not available again yet
	Size    uint64       `json:"size"`    // maximum number of addresses for pods, capped at MaxCount
}

// Cluster is this node's view of the cluster.
type Cluster struct {
	ID       string         `json:"id"` // empty until this node has joined or bootstrapped
	CIDRs    []netip.Prefix `json:"cidrs"`
	Members  int            `json:"members"` // this node included, unless it has left
	Alive    int            `json:"alive"`   // likewise
	Isolated bool           `json:"isolated"`
	Since    time.Time      `json:"isolated_since,omitzero"`
	Table    Table          `json:"table"`
}

// Table summarises the replicated CIDR table. Two nodes with equal digests have the same table.
type Table struct {
	Entries   int    `json:"entries"`
	Digest    string `json:"digest"`
	Confirmed bool   `json:"confirmed"` // compared with a live peer since this agent started, or created here
}

// Peer is another node, or an external peer.
type Peer struct {
	Name    string    `json:"name"`
	ID      string    `json:"id"`
	State   string    `json:"state"`          // PeerAlive and so on
	Since   time.Time `json:"since,omitzero"` // zero: not known, as of an external peer that was there before the agent
	Reason  string    `json:"reason"`
	Version string    `json:"version,omitempty"`
	// ClockSkewMS is how far its clock is ahead of this host's, in milliseconds; 0 if it does not tell.
	ClockSkewMS int64          `json:"clock_skew_ms,omitempty"`
	Underlay    []netip.Addr   `json:"underlay"`
	Leaves      []string       `json:"leaves,omitempty"` // interfaces by which packets to it really leave, where they are none of Node.Links
	Prefixes    []netip.Prefix `json:"prefixes"`
	Path        Path           `json:"path"`       // the one in use, or the first of two: see InUse
	Candidates  []Candidate    `json:"candidates"` // all of them, in order of preference
	TxPackets   uint64         `json:"tx_packets"` // through the tunnel or directly, since the agent started, or as Counters
	TxBytes     uint64         `json:"tx_bytes"`
	RxPackets   uint64         `json:"rx_packets"`
	RxBytes     uint64         `json:"rx_bytes"`
}

// Path is a path to a peer: an encapsulation and its state.
type Path struct {
	Mode string `json:"mode"` // direct, udp, ipip, vxlan; empty if there is none
	// Family of pods' packets that the path can carry, ipv4 or ipv6: of direct paths in a cluster with both, where each family has its own.
	Family string  `json:"family,omitempty"`
	State  string  `json:"state"`  // PathUp and so on
	RTTUS  int64   `json:"rtt_us"` // smoothed, microseconds; 0 if none was measured
	Loss   float64 `json:"loss"`   // fraction of the last 64 probes without answer, 0 to 1: since the path is up, and of the last two minutes
	MTU    int     `json:"mtu"`    // largest inner packet proven, bytes
	// MTULimit is the largest inner packet that this host's links toward the peer carry, bytes; 0 if the path is not probed.
	MTULimit int `json:"mtu_limit,omitempty"`
	// Heard is when the last probe of the peer arrived by this encapsulation: its packets get here, whether or not it answers.
	Heard  time.Time `json:"heard,omitzero"`
	Since  time.Time `json:"since,omitzero"`
	Reason string    `json:"reason"`
}

// Candidate is a path that this node could use.
type Candidate struct {
	Path
	Active   bool           `json:"active"`            // packets of some family go this way
	Endpoint netip.AddrPort `json:"endpoint,omitzero"` // outer destination; port 0 where the encapsulation has none
}

// InUse returns the paths by which packets to the peer go: two where those of IPv4 and IPv6 go different ways.
func (p *Peer) InUse() (out []Path) {
	for i := range p.Candidates {
		if c := &p.Candidates[i]; c.Active {
			out = append(out, c.Path)
		}
	}
	if out == nil {
		out = []Path{p.Path}
	}
	return out
}

// Problem is a fault and its remedy.
type Problem struct {
	What   string `json:"what"`
	Remedy string `json:"remedy"`
	// Command is the shell command that does what Remedy says; empty if an operator has to choose. Check is the check of
	// `tulle doctor` that the problem belongs to.
	Command string    `json:"command,omitempty"`
	Check   string    `json:"check,omitempty"`
	Since   time.Time `json:"since,omitzero"`
	// Last is when it was seen last, of a problem that events tell of (packets of another cluster, say) and that stays listed for some minutes
	// after the last of them.
	Last time.Time `json:"last,omitzero"`
}

// Counters are totals since the agent started, or has begun again with another underlay address. Tx is from pods to the underlay, Rx the other direction. Both count inner packets
// of the tunnel as they travel: the segments of a super-packet. (What a network card or a kernel joins before the agent receives it by ipip is one.) The fields
// Direct… and Fast… count packets that the kernel carries on the direct path or in the fast path; there, a super-packet is one.
type Counters struct {
	DirectTxPackets uint64 `json:"direct_tx_packets"`
	DirectTxBytes   uint64 `json:"direct_tx_bytes"`
	DirectRxPackets uint64 `json:"direct_rx_packets"`
	DirectRxBytes   uint64 `json:"direct_rx_bytes"`
	FastTxPackets   uint64 `json:"fast_tx_packets"` // by the fast path; not in the others
	FastTxBytes     uint64 `json:"fast_tx_bytes"`
	FastRxPackets   uint64 `json:"fast_rx_packets"`
	FastRxBytes     uint64 `json:"fast_rx_bytes"`
	TxPackets       uint64 `json:"tx_packets"`
	TxBytes         uint64 `json:"tx_bytes"`
	TxSends         uint64 `json:"tx_sends"` // messages handed to the underlay's kernel; TxPackets/TxSends is the mean batch
	RxPackets       uint64 `json:"rx_packets"`
	RxBytes         uint64 `json:"rx_bytes"`
	RxReceives      uint64 `json:"rx_receives"`   // receives with packets of pods; RxPackets/RxReceives is the mean train
	RxWrites        uint64 `json:"rx_writes"`     // packets and super-packets written to the TUN
	GSOFallbacks    uint64 `json:"gso_fallbacks"` // trains that the underlay's kernel refused and that went as single packets
	TunFallbacks    uint64 `json:"tun_fallbacks"` // super-packets that the TUN refused and that went as single packets
	ICMPSent        uint64 `json:"icmp_sent"`     // ICMP errors to senders in this node's pods
	ICMPReceived    uint64 `json:"icmp_received"` // ICMP errors of the underlay about packets of the tunnel
	SocketOverflows uint64 `json:"socket_overflows"`
	TunDrops        uint64 `json:"tun_drops"`      // the kernel's count of packets dropped because the TUN's queue was full
	QueueMarks      uint64 `json:"queue_marks"`    // TCP packets and super-packets marked by ECN because packets waited too long in the TUN's queue or a socket's; drops have those of others as queue_delay
	QueueDelay      int64  `json:"queue_delay_us"` // how long the last packet that was timed under load waited there, µs, the longest of all queues; 0 if they have been empty since
	Probes          uint64 `json:"probes"`         // probe packets sent, answers to those of peers among them
	ProbeReplies    uint64 `json:"probe_replies"`  // answers that have arrived to this node's probes
	Repairs         uint64 `json:"repairs"`        // repairs of host state (routes, addresses, nft)
}

// FastPath says whether the kernel carries packets in the agent's place.
type FastPath struct {
	Wanted bool   `json:"wanted"`
	On     bool   `json:"on"`
	Reason string `json:"reason,omitempty"` // why it is not on though it is wanted
}

// Offload lists the offloads that the kernel supports and the engine uses.
type Offload struct {
	TunCSUM bool   `json:"tun_csum"`
	TunTSO  bool   `json:"tun_tso"`
	TunUSO  bool   `json:"tun_uso"`
	UDPGSO  bool   `json:"udp_gso"`
	UDPGRO  bool   `json:"udp_gro"`
	Reason  string `json:"reason"` // why an offload is off
}

// IPAMSummary counts this node's addresses.
type IPAMSummary struct {
	Owned   uint64 `json:"owned"`   // addresses in the space this node owns, capped at MaxCount
	Used    uint64 `json:"used"`    // allocated to pods
	Cooling uint64 `json:"cooling"` // in cool-down
	Waiting string `json:"waiting"` // what this node waits for, such as requested space; empty if nothing
	// Families has the numbers of each of the cluster's families: IPv4 addresses run out alone.
	Families []IPAMFamily `json:"families,omitempty"`
}

// IPAMFamily counts this node's addresses of one family.
type IPAMFamily struct {
	Family  string `json:"family"` // ipv4 or ipv6
	Owned   uint64 `json:"owned"`
	Used    uint64 `json:"used"`
	Cooling uint64 `json:"cooling"`
}

// Gossip is the state of gossip on this node.
type Gossip struct {
	Bind        netip.AddrPort   `json:"bind"` // the first of Listens
	Listens     []netip.AddrPort `json:"listens"`
	Encrypted   bool             `json:"encrypted"`
	Keys        int              `json:"keys"`
	Undecrypted uint64           `json:"undecrypted"`        // messages that no key decrypts
	Rejected    uint64           `json:"rejected"`           // hosts of another cluster, or with the ID of another live host
	Health      int              `json:"health"`             // memberlist's awareness score: 0 is best
	Queued      int              `json:"queued"`             // broadcasts not yet sent
	LastSync    time.Time        `json:"last_sync,omitzero"` // when a member's whole table has last arrived
}

// NodeRef names a node.
type NodeRef struct {
	Name string `json:"name"`
	ID   string `json:"id"`
}
