package api

import (
	"context"
	"net/netip"
	"time"
)

// Backend answers the requests. internal/agent implements it. Errors that carry an *Error keep its code on their way to
// the command line; every other error arrives as CodeFailed. A ctx ends when the caller hangs up.
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
}

// Kinds of destination in a RouteAnswer.
const (
	RouteLocal    = "local"    // this node's own space
	RouteRemote   = "remote"   // another node's
	RouteExternal = "external" // an external peer's
	RouteOutside  = "outside"  // not in the cluster CIDR: the host's routing decides
	RouteNone     = "none"     // in the cluster CIDR, and nobody owns it as far as this node knows
)

// RouteAnswer tells where a packet to Address goes now.
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
	Why           string         `json:"why"` // a sentence: why this owner, why this encapsulation, why not reachable
}

// PingRequest asks to probe a node through every encapsulation. Zero values mean the defaults: 3 probes a mode.
type PingRequest struct {
	Node  string `json:"node"` // name, ID, a unique beginning of the ID, or an address it owns
	Count int    `json:"count,omitempty"`
}

// MaxPingCount bounds PingRequest.Count.
const MaxPingCount = 1000

// PingResult is one PingMode for each encapsulation, in order of preference.
type PingResult struct {
	Node  NodeRef    `json:"node"`
	Modes []PingMode `json:"modes"`
}

// PingMode is what the probes through one encapsulation found.
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
	AllocationCooling = "cooling" // freed; not handed out again before Until
)

// PodAllocation is the addresses that one pod has, or had until a moment ago.
type PodAllocation struct {
	ID        string       `json:"id"`
	Name      string       `json:"name,omitempty"`
	Addresses []netip.Addr `json:"addresses"`
	State     string       `json:"state"`
	Since     time.Time    `json:"since"`
	Until     time.Time    `json:"until,omitzero"`
	Netns     string       `json:"netns,omitempty"`
}

// IPAMCheck compares allocations with what lives on the host.
type IPAMCheck struct {
	Checked int           `json:"checked"`
	Leaked  []LeakedAddr  `json:"leaked"`  // allocated, and no pod has it
	Unknown []UnknownAddr `json:"unknown"` // a pod on this host has it, and it is not allocated
}

// LeakedAddr is an address that is allocated to a pod that is gone.
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

// ReleaseRequest names leaked addresses to release, or all of them. Only what a check at that moment still finds leaked
// is released.
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

// AllocateRequest asks for one address of each family that the cluster has. The same ID again gets the same answer.
type AllocateRequest struct {
	ID        string       `json:"id"`                  // of the pod's interface: unique on this node, at most MaxIDLen bytes
	Name      string       `json:"name,omitempty"`      // for people
	Netns     string       `json:"netns,omitempty"`     // path of the pod's network namespace: `ipam check` looks there
	Requested []netip.Addr `json:"requested,omitempty"` // at most one of each family; must be free and in this node's blocks
}

// MaxIDLen and MaxNameLen bound what is stored for one pod, in bytes.
const (
	MaxIDLen   = 256
	MaxNameLen = 256
	maxPathLen = 4096
)

// Allocation is what a pod's interface needs.
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

// FreeRequest gives a pod's addresses back: its owner says that the pod is gone. Unknown IDs are no error.
type FreeRequest struct {
	ID string `json:"id"`
}

// FreeResult lists the addresses given back, none if the ID was unknown.
type FreeResult struct {
	Freed []netip.Addr `json:"freed"`
}

// Transfer is space that changed hands.
type Transfer struct {
	Prefix netip.Prefix `json:"prefix"`
	From   NodeRef      `json:"from"`
	To     NodeRef      `json:"to"`
}

// LeaveResult lists who took this node's space.
type LeaveResult struct {
	Transfers []Transfer `json:"transfers"`
}

// ForgetRequest takes over the space of a dead node. Force skips the test for a majority, never the test that the node is dead.
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

// KeyRequest names a gossip key: by its 32 bytes (install), or by the ID that KeyList shows.
type KeyRequest struct {
	Key []byte `json:"key,omitempty"` // base64 in JSON
	ID  string `json:"id,omitempty"`
}

// KeySize is the length of a gossip key in bytes: AES-256.
const KeySize = 32

// KeyList is the keys that this node has and, for each, how many members have it.
type KeyList struct {
	Encrypted bool  `json:"encrypted"`
	Members   int   `json:"members"` // that were asked, this node included
	Answered  int   `json:"answered"`
	Keys      []Key `json:"keys"`
}

// Key is a gossip key as it may be shown: never the key itself.
type Key struct {
	ID      string   `json:"id"` // a hash of the key, shortened
	Primary bool     `json:"primary"`
	Members int      `json:"members"` // how many have it
	Missing []string `json:"missing"` // names of those that answered and have it not
}

// KeyResult is what the members answered.
type KeyResult struct {
	ID      string       `json:"id"`
	Members int          `json:"members"`
	Done    int          `json:"done"`
	Failed  []KeyFailure `json:"failed"`
}

// KeyFailure is a member that did not do it.
type KeyFailure struct {
	Node NodeRef `json:"node"`
	Why  string  `json:"why"`
}

// ReloadResult is what changed in the configuration, and what needs a restart to change.
type ReloadResult struct {
	Changed      []ConfigChange `json:"changed"`
	NeedsRestart []ConfigChange `json:"needs_restart"`
}

// ConfigChange is one key whose value in the file is no longer the running one.
type ConfigChange struct {
	Key string `json:"key"`
	Old string `json:"old"`
	New string `json:"new"`
}
