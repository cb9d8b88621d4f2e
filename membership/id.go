package membership

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"fmt"
)

// A NodeID is the random, persistent identity of one node. It is created once and
// kept in the state file. It is independent of the hostname and of the machine's
// UUID, which a cloned disk copies.
type NodeID [16]byte

// A ClusterID is the random identity of a cluster, created by the node that
// bootstraps it. The zero ClusterID means "in no cluster yet".
type ClusterID [16]byte

// NewNodeID returns a random node ID.
func NewNodeID() NodeID {
	var id NodeID
	rand.Read(id[:]) // never fails (crypto/rand, Go 1.24)
	return id
}

// NewClusterID returns a random cluster ID.
func NewClusterID() ClusterID {
	var id ClusterID
	rand.Read(id[:])
	return id
}

// ParseNodeID parses the 32 hexadecimal digits of [NodeID.String].
func ParseNodeID(s string) (NodeID, error) {
	id, err := parseID(s)
	if err != nil {
		return NodeID{}, fmt.Errorf("node ID %q: %w", s, err)
	}
	return NodeID(id), nil
}

// ParseClusterID parses the 32 hexadecimal digits of [ClusterID.String].
func ParseClusterID(s string) (ClusterID, error) {
	id, err := parseID(s)
	if err != nil {
		return ClusterID{}, fmt.Errorf("cluster ID %q: %w", s, err)
	}
	return ClusterID(id), nil
}

func parseID(s string) (id [16]byte, err error) {
	if len(s) != 2*len(id) {
		return id, fmt.Errorf("has %d characters, wants %d hexadecimal digits", len(s), 2*len(id))
	}
	if _, err := hex.Decode(id[:], []byte(s)); err != nil {
		return [16]byte{}, err
	}
	return id, nil
}

// String returns the ID as 32 lower-case hexadecimal digits.
func (id NodeID) String() string { return hex.EncodeToString(id[:]) }

// Short returns the first eight digits, for messages that people read.
func (id NodeID) Short() string { return hex.EncodeToString(id[:4]) }

// IsZero reports whether the ID is unset.
func (id NodeID) IsZero() bool { return id == NodeID{} }

// Compare orders IDs as byte strings. The lower one wins a tie in the table.
func (id NodeID) Compare(o NodeID) int { return bytes.Compare(id[:], o[:]) }

// MarshalText writes the ID as [NodeID.String] does.
func (id NodeID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (id *NodeID) UnmarshalText(b []byte) (err error) {
	*id, err = ParseNodeID(string(b))
	return err
}

// String returns the ID as 32 lower-case hexadecimal digits.
func (id ClusterID) String() string { return hex.EncodeToString(id[:]) }

// Short returns the first eight digits, for messages that people read.
func (id ClusterID) Short() string { return hex.EncodeToString(id[:4]) }

// IsZero reports whether the ID is unset: the node is in no cluster yet.
func (id ClusterID) IsZero() bool { return id == ClusterID{} }

// Compare orders IDs as byte strings.
func (id ClusterID) Compare(o ClusterID) int { return bytes.Compare(id[:], o[:]) }

// MarshalText writes the ID as [ClusterID.String] does.
func (id ClusterID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (id *ClusterID) UnmarshalText(b []byte) (err error) {
	*id, err = ParseClusterID(string(b))
	return err
}
