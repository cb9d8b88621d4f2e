// Package api is the agent's control socket: its types, its server and its client.
//
// The protocol is HTTP with JSON bodies over a unix socket, under versioned paths (/v1/...). JSON field names are stable,
// tests and scripts outside this repository read them; fields may be added, never renamed. Everything the command line
// shows comes from here, so that `-o json` and the table for people cannot disagree.
//
// Units are in the names: rtt_us is microseconds, *_bytes bytes, mtu bytes, loss a share from 0 to 1. Counts of addresses
// are capped at MaxCount, because an IPv6 block holds more addresses than a JSON number can carry.
//
// Server and Client may be used by any number of goroutines. A Backend is called concurrently, one call a request.
package api

import (
	"math"
	"net/netip"
	"time"
)

// DefaultSocket is where agent and command line meet unless --socket says otherwise.
const DefaultSocket = "/run/tulle/tulle.sock"

// MaxCount is the largest count of addresses that the API reports; larger ones (an IPv6 /64) are shown as this value.
const MaxCount uint64 = math.MaxInt64

// States of a peer as gossip sees it.
const (
	PeerAlive    = "alive"
	PeerSuspect  = "suspect"
	PeerDead     = "dead"
	PeerLeft     = "left"
	PeerExternal = "external" // a router or kernel tunnel without an agent: gossip knows nothing of it
)

// States of a path to a peer.
const (
	PathUp      = "up"
	PathDown    = "down"
	PathProbing = "probing" // no verdict yet
	PathOff     = "off"     // not tried: --paths leaves it out, or this host cannot (the reason says which)
)

// Status is the answer to GET /v1/status: everything that `tulle status` shows.
type Status struct {
	Version  string            `json:"version"`
	Ready    bool              `json:"ready"` // table confirmed and tun up; if false, Problems says what is missing
	Started  time.Time         `json:"started,omitzero"`
	Node     Node              `json:"node"`
	Cluster  Cluster           `json:"cluster"`
	Peers    []Peer            `json:"peers"`
	Drops    map[string]uint64 `json:"drops"` // by reason (wire.md's names); all reasons are present, zero or not
	Problems []Problem         `json:"problems"`
	Counters Counters          `json:"counters"`
	Offload  Offload           `json:"offload"`
	IPAM     IPAMSummary       `json:"ipam"`
	Gossip   Gossip            `json:"gossip"`
}

// Healthy reports whether `tulle status` ends with exit code 0.
func (s *Status) Healthy() bool { return s.Ready && len(s.Problems) == 0 }

// Node is this host.
type Node struct {
	Name     string       `json:"name"`
	ID       string       `json:"id"`
	Underlay []netip.Addr `json:"underlay"`
	// Interface has the underlay addresses; UnderlayReason says why they are used, and what was before them.
	Interface      string `json:"interface,omitempty"`
	UnderlayReason string `json:"underlay_reason,omitempty"`
	// Links are the interfaces by which packets from Underlay leave, and LinkMTU is the least of theirs in bytes.
	Links    []string       `json:"links,omitempty"`
	LinkMTU  int            `json:"link_mtu,omitempty"`
	Tun      Tun            `json:"tun"`
	Prefixes []netip.Prefix `json:"prefixes"` // the space this node owns
	Blocks   []Block        `json:"blocks"`   // the part of it that pods get addresses from
}

// Tun is the TUN device. Addresses are those that host processes use as source toward remote pods.
type Tun struct {
	Name      string       `json:"name"`
	MTU       int          `json:"mtu"`
	Addresses []netip.Addr `json:"addresses"`
	Queues    int          `json:"queues,omitempty"`
}

// Block is a piece of the node's space out of which pods get addresses.
type Block struct {
	Prefix  netip.Prefix `json:"prefix"`
	Used    uint64       `json:"used"`    // addresses that pods have
	Cooling uint64       `json:"cooling"` // freed, and not yet handed out again
	Size    uint64       `json:"size"`    // addresses that pods may have at most, capped at MaxCount
}

// Cluster is what this node knows of the cluster.
type Cluster struct {
	ID       string         `json:"id"` // empty until this node has joined or bootstrapped
	CIDRs    []netip.Prefix `json:"cidrs"`
	Members  int            `json:"members"` // this node included
	Alive    int            `json:"alive"`   // this node included
	Isolated bool           `json:"isolated"`
	Since    time.Time      `json:"isolated_since,omitzero"`
	Table    Table          `json:"table"`
}

// Table sums up the replicated CIDR table. Two nodes whose digests are equal hold the same table.
type Table struct {
	Entries   int    `json:"entries"`
	Digest    string `json:"digest"`
	Confirmed bool   `json:"confirmed"` // compared with a live peer since this agent started, or made here
	Conflicts int    `json:"conflicts"` // ties seen, each a forced forget
}

// Peer is another node, or an external peer.
type Peer struct {
	Name       string         `json:"name"`
	ID         string         `json:"id"`
	State      string         `json:"state"` // PeerAlive and so on
	Since      time.Time      `json:"since"`
	Reason     string         `json:"reason"`
	Version    string         `json:"version,omitempty"`
	Underlay   []netip.Addr   `json:"underlay"`
	Leaves     []string       `json:"leaves,omitempty"` // interfaces by which packets to it really leave, where they are none of Node.Links
	Prefixes   []netip.Prefix `json:"prefixes"`
	Path       Path           `json:"path"`       // the one in use
	Candidates []Candidate    `json:"candidates"` // all of them, in order of preference
	TxPackets  uint64         `json:"tx_packets"`
	TxBytes    uint64         `json:"tx_bytes"`
	RxPackets  uint64         `json:"rx_packets"`
	RxBytes    uint64         `json:"rx_bytes"`
}

// Path is one way to a peer: an encapsulation and what is known of it.
type Path struct {
	Mode   string    `json:"mode"`   // direct, udp, ipip, vxlan; empty if there is none
	State  string    `json:"state"`  // PathUp and so on
	RTTUS  int64     `json:"rtt_us"` // smoothed, microseconds; 0 if none was measured
	Loss   float64   `json:"loss"`   // share of the last probes that got no answer, 0 to 1
	MTU    int       `json:"mtu"`    // largest inner packet proven, bytes
	Since  time.Time `json:"since"`
	Reason string    `json:"reason"`
}

// Candidate is a path that this node could use.
type Candidate struct {
	Path
	Active   bool           `json:"active"`
	Endpoint netip.AddrPort `json:"endpoint,omitzero"` // outer destination; port 0 where the encapsulation has none
}

// Problem is something that is wrong and what to do about it.
type Problem struct {
	What   string    `json:"what"`
	Remedy string    `json:"remedy"`
	Since  time.Time `json:"since,omitzero"`
}

// Counters are totals since the agent started. Tx is from pods to the underlay, Rx the other way; both count inner packets.
type Counters struct {
	TxPackets       uint64 `json:"tx_packets"`
	TxBytes         uint64 `json:"tx_bytes"`
	TxSends         uint64 `json:"tx_sends"` // messages handed to the underlay's kernel; TxPackets/TxSends is the mean batch
	RxPackets       uint64 `json:"rx_packets"`
	RxBytes         uint64 `json:"rx_bytes"`
	RxReceives      uint64 `json:"rx_receives"`
	RxWrites        uint64 `json:"rx_writes"` // packets and super-packets written to the TUN
	GSOFallbacks    uint64 `json:"gso_fallbacks"`
	SocketOverflows uint64 `json:"socket_overflows"`
	TunDrops        uint64 `json:"tun_drops"` // the kernel's own count of packets that found the TUN's queue full
	Probes          uint64 `json:"probes"`
	ProbeReplies    uint64 `json:"probe_replies"`
	Repairs         uint64 `json:"repairs"` // host state (routes, addresses, nft) that had to be mended
}

// Offload is what the kernel lets the engine do in one system call.
type Offload struct {
	TunCSUM bool   `json:"tun_csum"`
	TunTSO  bool   `json:"tun_tso"`
	TunUSO  bool   `json:"tun_uso"`
	UDPGSO  bool   `json:"udp_gso"`
	UDPGRO  bool   `json:"udp_gro"`
	Reason  string `json:"reason"` // why one of them is off
}

// IPAMSummary counts this node's addresses.
type IPAMSummary struct {
	Owned   uint64 `json:"owned"`   // addresses in the space this node owns, capped at MaxCount
	Used    uint64 `json:"used"`    // pods have them
	Cooling uint64 `json:"cooling"` // freed a moment ago
	Waiting string `json:"waiting"` // what this node waits for: space asked of another; empty if nothing
}

// Gossip is the health of membership.
type Gossip struct {
	Bind        netip.AddrPort `json:"bind"`
	Encrypted   bool           `json:"encrypted"`
	Keys        int            `json:"keys"`
	Undecrypted uint64         `json:"undecrypted"` // messages that no key opens
	Rejected    uint64         `json:"rejected"`    // hosts of another cluster, or with an ID that another live host has
	Health      int            `json:"health"`      // memberlist's awareness score: 0 is best
	Queued      int            `json:"queued"`      // broadcasts not yet sent
	LastSync    time.Time      `json:"last_sync,omitzero"`
}

// NodeRef names a node.
type NodeRef struct {
	Name string `json:"name"`
	ID   string `json:"id"`
}
