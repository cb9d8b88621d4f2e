package ipam

import (
	"encoding/hex"
	"fmt"
	"net/netip"
	"time"
)

// ID is a node's or a cluster's identity; hexadecimal in the file.
type ID [16]byte

// MarshalText writes 32 hexadecimal digits.
func (id ID) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(id[:])), nil }

// UnmarshalText reads what MarshalText wrote.
func (id *ID) UnmarshalText(b []byte) error {
	if len(b) != 2*len(id) {
		return fmt.Errorf("ID %q: %d characters, wants %d", b, len(b), 2*len(id))
	}
	_, err := hex.Decode(id[:], b)
	return err
}

// A Family is one address family of a cluster: its CIDR, and the prefix length of
// the blocks that nodes open in it.
type Family struct {
	CIDR     netip.Prefix `json:"cidr"`
	BlockLen int          `json:"node_prefix_len"`
}

// State is all that a node remembers across restarts. Package ipam keeps it; what
// Table holds is the business of the replicated table.
type State struct {
	Generation uint64   `json:"generation"` // rises with each save
	Node       ID       `json:"node"`
	Cluster    ID       `json:"cluster"`
	Families   []Family `json:"families"`
	Joined     bool     `json:"joined"`         // owned space once, or started the cluster
	Left       bool     `json:"left,omitempty"` // left for good
	// Unsure says that the state goes back to one that may have been older than
	// the node's last words, and has not been confirmed since.
	Unsure      bool           `json:"unsure,omitempty"`
	Table       []byte         `json:"table"`  // encoded entries
	Blocks      []netip.Prefix `json:"blocks"` // open, in order of opening
	Allocations []Allocation   `json:"allocations"`
	Cooling     []Cooling      `json:"cooling,omitempty"`
	Peers       []Peer         `json:"peers,omitempty"`
	Granted     []Granted      `json:"granted,omitempty"`
	Promises    []Promise      `json:"promises,omitempty"`
}

// A Peer is another node that this one has known.
type Peer struct {
	ID   ID             `json:"id"`
	Name string         `json:"name,omitempty"`
	Addr netip.AddrPort `json:"addr,omitzero"` // gossip, as last seen
}

// Granted remembers the last request that this node granted to another, so that a
// late repetition of it gets the old answer instead of more space.
type Granted struct {
	Node ID     `json:"node"`
	Seq  uint64 `json:"seq"`
}

// Cooling is an address that rests until a moment.
type Cooling struct {
	Addr  netip.Addr `json:"addr"`
	Until time.Time  `json:"until"`
}

// Promise is a node's word to let nobody but To forget Victim until a moment.
type Promise struct {
	Victim ID        `json:"victim"`
	To     ID        `json:"to"`
	Until  time.Time `json:"until"`
}
