package api

import (
	"context"
	"net/netip"
	"time"
)

// Backend answers the requests. internal/agent implements it. An error that wraps an *Error keeps its code; the command line
// gets any other error as CodeFailed. ctx ends when the caller closes the connection.
type Backend interface {
	Status(ctx context.Context) (Status, error)
	Peers(ctx context.Context) ([]Peer, error)
	Route(ctx context.Context, addr netip.Addr) (RouteAnswer, error)
	Ping(ctx context.Context, req PingRequest) (PingResult, error)

	IPAM(ctx context.Context) (IPAM, error)
	IPAMCheck(ctx context.Context) (IPAMCheck, error)
	IPAMRelease(ctx context.Context, req ReleaseRequest) (ReleaseResult, error)
	Allocate(ctx context.Context, req AllocateRequest) (Allocation, error)
	Free(ctx context.Context, req FreeRequest) (FreeResult, error)
	Pods(ctx context.Context) ([]Pod, error)
	// PodsOf lists the pods of one container that have an allocation. It looks at no link of another container.
	PodsOf(ctx context.Context, container string) ([]Pod, error)

	Leave(ctx context.Context) (LeaveResult, error)
	Forget(ctx context.Context, req ForgetRequest) (ForgetResult, error)

	Externals(ctx context.Context) ([]External, error)
	ExternalAdd(ctx context.Context, req ExternalRequest) (External, error)
	ExternalRemove(ctx context.Context, prefix netip.Prefix) (External, error)

	Keys(ctx context.Context) (KeyList, error)
	KeyInstall(ctx context.Context, req KeyRequest) (KeyResult, error)
	KeyUse(ctx context.Context, req KeyRequest) (KeyResult, error)
	KeyRemove(ctx context.Context, req KeyRequest) (KeyResult, error)

	Reload(ctx context.Context) (ReloadResult, error)
	LogLevel(ctx context.Context, req LogLevelRequest) (LogLevel, error)

	// Trace times a sample of packets in the agent for a while.
	Trace(ctx context.Context, req TraceRequest) (Trace, error)

	// Capture calls each with packets until ctx ends or each returns an error. It calls each once at the start, with an
	// event without a packet, and again now and then while there is no packet.
	Capture(ctx context.Context, req CaptureRequest, each func(CaptureEvent) error) error

	// Bench opens paths to another member and calls each with them, then every second, until ctx ends or each returns an
	// error. It closes them before it returns.
	Bench(ctx context.Context, req BenchRequest, each func(BenchEvent) error) error
}

// Kinds of destination in a RouteAnswer.
const (
	RouteLocal    = "local"    // this node's own space
	RouteRemote   = "remote"   // another node's
	RouteExternal = "external" // an external peer's
	RouteOutside  = "outside"  // not in the cluster CIDR: the host's routing decides
	RouteNone     = "none"     // in the cluster CIDR, but without a known owner
)

// RouteAnswer describes the path of a packet to Address. If that is a member's underlay address, Kind is RouteOutside, Owner is the
// member, and Endpoint, Encapsulation and MTU are those of pods' packets, empty where these take the host's own routes, too.
type RouteAnswer struct {
	Address       netip.Addr     `json:"address"`
	Kind          string         `json:"kind"`
	Prefix        netip.Prefix   `json:"prefix,omitzero"` // the table's entry
	Version       uint64         `json:"version"`         // of that entry
	Owner         NodeRef        `json:"owner"`
	Reachable     bool           `json:"reachable"`         // through the cluster: false for RouteOutside
	Endpoint      netip.AddrPort `json:"endpoint,omitzero"` // outer destination; port 0 where the encapsulation has none
	Encapsulation string         `json:"encapsulation"`
	MTU           int            `json:"mtu"`
	Why           string         `json:"why"` // reason for the owner, the encapsulation, or being unreachable
}

// PingRequest requests probes to a node through every encapsulation. Count 0 means 3 probes per encapsulation.
type PingRequest struct {
	Node  string `json:"node"` // name, ID, a unique prefix of the ID, or an address that it owns
	Count int    `json:"count,omitempty"`
}

// MaxPingCount is the maximum of PingRequest.Count.
const MaxPingCount = 1000

// PingResult has one PingMode per encapsulation, in order of preference.
type PingResult struct {
	Node  NodeRef    `json:"node"`
	Modes []PingMode `json:"modes"`
}

// PingMode is the result of the probes through one encapsulation.
type PingMode struct {
	Mode          string         `json:"mode"`
	State         string         `json:"state"` // PathUp, PathDown or PathOff
	Active        bool           `json:"active"`
	Endpoint      netip.AddrPort `json:"endpoint,omitzero"`
	Sent          int            `json:"sent"`
	Received      int            `json:"received"`
	Lost          int            `json:"lost"`
	RTTMinUS      int64          `json:"rtt_min_us"`
	RTTUS         int64          `json:"rtt_us"` // mean
	RTTMaxUS      int64          `json:"rtt_max_us"`
	LargestPacket int            `json:"largest_packet"` // largest inner packet that was answered, bytes
	Reason        string         `json:"reason"`
}

// IPAM is the answer to `tulle ipam show`.
type IPAM struct {
	Prefixes    []netip.Prefix  `json:"prefixes"`
	Blocks      []Block         `json:"blocks"`
	Allocations []PodAllocation `json:"allocations"`
}

// States of a PodAllocation.
const (
	AllocationUsed    = "used"
	AllocationCooling = "cooling" // freed; not available again before Until
)

// PodAllocation has the addresses of one pod, or of a pod that is gone while they are in cool-down.
type PodAllocation struct {
	ID        string       `json:"id"`
	Name      string       `json:"name,omitempty"`
	Addresses []netip.Addr `json:"addresses"`
	State     string       `json:"state"`
	Since     time.Time    `json:"since"`
	Until     time.Time    `json:"until,omitzero"`
	Netns     string       `json:"netns,omitempty"`
}

// IPAMCheck is the comparison of the allocations with the pods on the host.
type IPAMCheck struct {
	Checked int           `json:"checked"`
	Leaked  []LeakedAddr  `json:"leaked"`  // allocated, and no pod has it
	Unknown []UnknownAddr `json:"unknown"` // a pod on this host has it, and it is not allocated
	// Stranded are addresses of pods that belong to other nodes now: other hosts do not reach these pods until they are restarted.
	Stranded []LeakedAddr `json:"stranded"`
}

// LeakedAddr is an address that is allocated to a pod that is gone, or is stranded.
type LeakedAddr struct {
	Address netip.Addr `json:"address"`
	ID      string     `json:"id"`
	Since   time.Time  `json:"since"`
	Reason  string     `json:"reason"`
}

// UnknownAddr is an address in use that was never allocated.
type UnknownAddr struct {
	Address netip.Addr `json:"address"`
	Where   string     `json:"where"` // interface or namespace
}

// ReleaseRequest names leaked addresses to release, or all of them. An address is released only if a new check still finds
// it leaked.
type ReleaseRequest struct {
	Addresses []netip.Addr `json:"addresses,omitempty"`
	All       bool         `json:"all,omitempty"`
}

// ReleaseResult lists what was released and what was refused.
type ReleaseResult struct {
	Released []netip.Addr  `json:"released"`
	Refused  []RefusedAddr `json:"refused"`
}

// RefusedAddr is an address that was not released.
type RefusedAddr struct {
	Address netip.Addr `json:"address"`
	Why     string     `json:"why"`
}

// AllocateRequest requests one address per IP family of the cluster. Repeated requests with the same ID get the same answer.
type AllocateRequest struct {
	ID        string       `json:"id"`                  // of the pod's interface: unique on this node, at most MaxIDLen bytes
	Name      string       `json:"name,omitempty"`      // for people
	Netns     string       `json:"netns,omitempty"`     // path of the pod's network namespace: `ipam check` looks there
	Requested []netip.Addr `json:"requested,omitempty"` // at most one per family; must be free and in this node's blocks
	From      string       `json:"from,omitempty"`      // an ID whose addresses pass to this one, except where others are requested
}

// MaxIDLen and MaxNameLen are the maximum lengths of a pod's ID and name, in bytes.
const (
	MaxIDLen   = 256
	MaxNameLen = 256
	maxPathLen = 4096
)

// Allocation has the settings of a pod's interface.
type Allocation struct {
	ID        string             `json:"id"`
	Addresses []AllocatedAddress `json:"addresses"`
	MTU       int                `json:"mtu"` // for the pod's interface
	// Bounds of the super-packets that the TUN device takes, bytes and segments; 0: as the kernel has it.
	GSOMaxSize int            `json:"gso_max_size,omitempty"`
	GSOMaxSegs int            `json:"gso_max_segs,omitempty"`
	CIDRs      []netip.Prefix `json:"cidrs"` // the cluster's, for routes in the pod
}

// AllocatedAddress is one address with its next hop.
type AllocatedAddress struct {
	Address netip.Addr   `json:"address"`
	Block   netip.Prefix `json:"block"`
	Gateway netip.Addr   `json:"gateway"` // the node's own address in that family
}

// FreeRequest frees the addresses of a pod that is gone. An unknown ID is not an error.
type FreeRequest struct {
	ID     string `json:"id"`
	Rested bool   `json:"rested,omitempty"` // the addresses have been out of use for the cool-down already, and need none
}

// FreeResult lists the freed addresses, none if the ID was unknown.
type FreeResult struct {
	Freed []netip.Addr `json:"freed"`
}

// Transfer is a change of the owner of a prefix.
type Transfer struct {
	Prefix netip.Prefix `json:"prefix"`
	From   NodeRef      `json:"from"`
	To     NodeRef      `json:"to"`
}

// LeaveResult lists the new owners of this node's space.
type LeaveResult struct {
	Transfers []Transfer `json:"transfers"`
}

// ForgetRequest takes over the space of a dead node. Force skips only the check for a majority and the wait, never the check that the node is dead.
type ForgetRequest struct {
	Node  string `json:"node"`
	Force bool   `json:"force,omitempty"`
}

// ForgetResult lists what this node took over.
type ForgetResult struct {
	Node      NodeRef    `json:"node"`
	Transfers []Transfer `json:"transfers"`
}

// ExternalRequest gives a prefix to an external peer.
type ExternalRequest struct {
	Prefix        netip.Prefix `json:"prefix"`
	Endpoint      netip.Addr   `json:"endpoint"`
	Encapsulation string       `json:"encapsulation"`  // udp, ipip, vxlan or direct
	Port          uint16       `json:"port,omitempty"` // UDP port of udp or vxlan, if not this cluster's
	MAC           string       `json:"mac,omitempty"`  // of its VTEP, for vxlan, if it shall not be learned
}

// External is an external peer: a router, or a host with a plain kernel tunnel and no agent.
type External struct {
	Prefix        netip.Prefix `json:"prefix"`
	Endpoint      netip.Addr   `json:"endpoint"`
	Encapsulation string       `json:"encapsulation"`
	Port          uint16       `json:"port,omitempty"`
	MAC           string       `json:"mac,omitempty"`
	Owner         NodeRef      `json:"owner"` // the node that added it and keeps it
	Version       uint64       `json:"version"`
}

// KeyRequest names a gossip key: by its 32 bytes (install), or by its ID in KeyList (use, remove).
type KeyRequest struct {
	Key []byte `json:"key,omitempty"` // base64 in JSON
	ID  string `json:"id,omitempty"`
}

// KeySize is the length of a gossip key in bytes: AES-256.
const KeySize = 32

// KeyList lists the keys of this node and, for each key, how many members have it.
type KeyList struct {
	Encrypted bool  `json:"encrypted"`
	Members   int   `json:"members"` // this node included, and those that are not alive
	Answered  int   `json:"answered"`
	Keys      []Key `json:"keys"`
	// Silent are the members that have not answered. An older version does not tell them.
	Silent []NodeRef `json:"silent,omitempty"`
}

// Key describes a gossip key without revealing it.
type Key struct {
	ID      string   `json:"id"` // a hash of the key, shortened
	Primary bool     `json:"primary"`
	Members int      `json:"members"` // how many have it
	Missing []string `json:"missing"` // names of members that answered but lack the key
}

// KeyResult has the answers of the members.
type KeyResult struct {
	ID      string       `json:"id"`
	Members int          `json:"members"`
	Done    int          `json:"done"`
	Failed  []KeyFailure `json:"failed"`
}

// KeyFailure is a member on which the operation failed.
type KeyFailure struct {
	Node NodeRef `json:"node"`
	Why  string  `json:"why"`
}

// ReloadResult lists the applied changes of the configuration, and those that need a restart.
type ReloadResult struct {
	Changed      []ConfigChange `json:"changed"`
	NeedsRestart []ConfigChange `json:"needs_restart"`
}

// LogLevelRequest sets the level of the log until the agent restarts; "" only asks for it.
type LogLevelRequest struct {
	Level string `json:"level,omitempty"` // debug, info, warn or error
}

// LogLevel has the level of the log before and after the request.
type LogLevel struct {
	Old string `json:"old"`
	New string `json:"new"`
}

// ConfigChange is a key whose value in the file differs from the running one.
type ConfigChange struct {
	Key string `json:"key"`
	Old string `json:"old"`
	New string `json:"new"`
}
