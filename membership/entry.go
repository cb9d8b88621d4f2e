package membership

import (
	"bytes"
	"cmp"
	"fmt"
	"net/netip"
	"strings"
)

// MaxVersion is the highest valid version. A version rises by one with each transfer,
// so it never gets near this limit in practice. The limit prevents that a hostile or
// damaged entry claims a prefix forever with a version that nobody can exceed. Above
// the version of any accepted entry there is room for 2^47 transfers.
const MaxVersion = 1 << 48

// An Entry says that Owner owns all addresses of Prefix, at Version.
//
// The version of an address counts its changes of ownership, from 1 at bootstrap.
// Only the present owner may raise it; forget does so in place of an owner that is
// gone.
type Entry struct {
	Prefix  netip.Prefix // masked
	Owner   NodeID
	Version uint64 // 1…MaxVersion
	// External is set if a peer without an agent uses the prefix. Owner is then
	// the node that keeps the entry. It is never modified in place.
	External *External
}

// External describes how to reach a peer without an agent.
type External struct {
	Endpoint netip.Addr // underlay address
	Encap    string     // an encapsulation's name: "udp", "ipip", "vxlan", "direct"
	Port     uint16     // UDP port of "udp" or "vxlan"; 0: this cluster's own
	MAC      [6]byte    // of its VTEP, for "vxlan"; zero: to be learned from what it sends
}

// Way is the encapsulation with what belongs to it.
func (x External) Way() string {
	way := x.Encap
	if x.Port != 0 {
		way += fmt.Sprintf(" port %d", x.Port)
	}
	if x.MAC != [6]byte{} {
		way += fmt.Sprintf(" MAC %x", x.MAC)
	}
	return way
}

// maxEncapLen is the maximum length of External.Encap, in bytes.
const maxEncapLen = 16

// String returns the entry in one line, for messages and tests.
func (e Entry) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%v@%d→%s", e.Prefix, e.Version, e.Owner.Short())
	if e.External != nil {
		fmt.Fprintf(&b, " via %v %s", e.External.Endpoint, e.External.Way())
	}
	return b.String()
}

// Equal reports whether both entries are equal.
func (e Entry) Equal(o Entry) bool { return e.Prefix == o.Prefix && e.sameValue(o) }

// Check returns an error if the entry cannot be part of a table.
func (e Entry) Check() error {
	switch {
	case !e.Prefix.IsValid() || e.Prefix.Addr().Zone() != "" || e.Prefix.Addr().Is4In6():
		return fmt.Errorf("entry %v: not a plain IPv4 or IPv6 prefix", e.Prefix)
	case e.Prefix != e.Prefix.Masked():
		return fmt.Errorf("entry %v: host bits are set", e.Prefix)
	case e.Owner.IsZero():
		return fmt.Errorf("entry %v: no owner", e.Prefix)
	case e.Version == 0 || e.Version > MaxVersion:
		return fmt.Errorf("entry %v: version %d is outside 1…%d", e.Prefix, e.Version, uint64(MaxVersion))
	}
	if x := e.External; x != nil {
		if !x.Endpoint.IsValid() || x.Endpoint.Zone() != "" || x.Endpoint.Is4In6() {
			return fmt.Errorf("entry %v: external endpoint %v is not a plain address", e.Prefix, x.Endpoint)
		}
		if len(x.Encap) > maxEncapLen {
			return fmt.Errorf("entry %v: encapsulation name of %d bytes, at most %d", e.Prefix, len(x.Encap), maxEncapLen)
		}
	}
	return nil
}

// sameValue reports whether both entries map their addresses to the same value.
func (e Entry) sameValue(o Entry) bool {
	return e.Version == o.Version && e.Owner == o.Owner && sameExternal(e.External, o.External)
}

func sameExternal(a, b *External) bool {
	return a == b || a != nil && b != nil && *a == *b
}

// beats reports whether e is greater than o in the order of the pointwise maximum: the
// higher version, then the lower owner ID. One owner never uses the same version for
// two values, unless its disk was rolled back; the last two keys make the order
// total in that case too.
func (e Entry) beats(o Entry) bool {
	if e.Version != o.Version {
		return e.Version > o.Version
	}
	if c := e.Owner.Compare(o.Owner); c != 0 {
		return c < 0
	}
	if e.External == nil || o.External == nil {
		return e.External == nil && o.External != nil
	}
	if c := e.External.Endpoint.Compare(o.External.Endpoint); c != 0 {
		return c < 0
	}
	return cmp.Or(cmp.Compare(e.External.Encap, o.External.Encap), cmp.Compare(e.External.Port, o.External.Port),
		bytes.Compare(e.External.MAC[:], o.External.MAC[:])) < 0
}

// A Conflict is a tie: two owners claim the same addresses with the same version. It
// can only result from a forget of a node that was alive, or from two forced forgets.
// It must be reported to the operator.
type Conflict struct {
	Prefix  netip.Prefix // the addresses that both claim
	Version uint64
	Winner  NodeID // the lower ID
	Loser   NodeID
}

// String names both claimants.
func (c Conflict) String() string {
	return fmt.Sprintf("%v at version %d is claimed by %s and %s; %s keeps it",
		c.Prefix, c.Version, c.Winner.Short(), c.Loser.Short(), c.Winner.Short())
}
