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

// UnmarshalText parses the output of MarshalText.
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

// State is everything that a node keeps across restarts. Package membership defines
// the contents of Table.
type State struct {
	Generation uint64   `json:"generation"` // increases with each save
	Node       ID       `json:"node"`
	Cluster    ID       `json:"cluster"`
	Families   []Family `json:"families"`
	Joined     bool     `json:"joined"`         // has owned space, or started the cluster
	Left       bool     `json:"left,omitempty"` // has left the cluster
	// Unsure means that the state derives from one that may lack the node's last
	// changes of ownership (an old disk), and has not been confirmed since.
	Unsure      bool           `json:"unsure,omitempty"`
	Table       []byte         `json:"table"`  // encoded entries
	Blocks      []netip.Prefix `json:"blocks"` // open, in order of opening
	Allocations []Allocation   `json:"allocations"`
	Cooling     []Cooling      `json:"cooling,omitempty"`
	Peers       []Peer         `json:"peers,omitempty"`
	Departed    []ID           `json:"departed,omitempty"` // peers that left or were forgotten, oldest first; see forFile
	Granted     []Granted      `json:"granted,omitempty"`
	Promises    []Promise      `json:"promises,omitempty"`
}

// A Peer is another node that this one knows or knew.
type Peer struct {
	ID   ID             `json:"id"`
	Name string         `json:"name,omitempty"`
	Addr netip.AddrPort `json:"addr,omitzero"` // last known gossip address
}

// Granted is the last request that this node granted to another node. A late
// repetition of the request gets the old answer instead of more space.
type Granted struct {
	Node ID     `json:"node"`
	Seq  uint64 `json:"seq"`
}

// Cooling is a released address and the end of its cool-down.
type Cooling struct {
	Addr  netip.Addr `json:"addr"`
	Until time.Time  `json:"until"`
	Key   string     `json:"key,omitempty"` // had the address last, and may have it again; empty if that is not known
}

// Promise is a node's promise that until a given time it lets only To forget Victim.
type Promise struct {
	Victim ID        `json:"victim"`
	To     ID        `json:"to"`
	Until  time.Time `json:"until"`
}

// forFile returns what is written. An older version refuses a file with a field that it does not know, and nobody could go back to it once a node
// has left or was forgotten. So the peers that departed are written as promises to nobody, long over, which that version drops.
// A file that has them in a field of their own is read, too.
func (st *State) forFile() *State {
	out := *st
	out.Departed, out.Promises = nil, nil
	for _, id := range st.Departed {
		out.Promises = append(out.Promises, Promise{Victim: id})
	}
	out.Promises = append(out.Promises, st.Promises...)
	return &out
}

// fromFile undoes forFile.
func (st *State) fromFile() {
	var promises []Promise
	for _, p := range st.Promises {
		if p.To == (ID{}) && p.Until.IsZero() {
			st.Departed = append(st.Departed, p.Victim)
		} else {
			promises = append(promises, p)
		}
	}
	st.Promises = promises
}
