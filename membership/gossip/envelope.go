package gossip

import (
	"fmt"
	"net/netip"

	"github.com/tulle-net/tulle/membership"
)

// Every message that Tulle sends over memberlist begins with an envelope:
//
//	0  format version (1)
//	1  kind
//	2  cluster of the sender (16), zero if it is in none yet
//
// and, except in broadcasts, which any member may relay,
//
//	18  node ID of the sender (16)
//
// State also has the sender's address, so that a clone can be distinguished from the
// member with the same ID:
//
//	34  gossip address of the sender: length (1), netip.AddrPort binary form
const envelopeVersion = 1

type envelopeKind byte

const (
	kindBroadcast envelopeKind = iota + 1
	kindMessage
	kindState
	kindKeyRequest
	kindKeyAnswer
	kindPresenceAsk
	kindPresenceAnswer
	kindEnd
)

const (
	broadcastHead = 2 + 16
	messageHead   = broadcastHead + 16
)

// Size limits of messages from other members, in bytes.
const (
	MaxMessage = 1 << 20  // of [Gossip.Send]
	MaxState   = 16 << 20 // of [Handler.LocalState]; memberlist refuses 20 MiB
)

type envelope struct {
	kind    envelopeKind
	cluster membership.ClusterID
	from    membership.NodeID // not for broadcasts
	addr    netip.AddrPort    // state only
	body    []byte            // shares memory with the message
}

func (e envelope) encode() []byte {
	b := make([]byte, 0, messageHead+24+len(e.body))
	b = append(b, envelopeVersion, byte(e.kind))
	b = append(b, e.cluster[:]...)
	if e.kind != kindBroadcast {
		b = append(b, e.from[:]...)
	}
	if e.kind == kindState {
		addr, _ := e.addr.MarshalBinary() // never fails
		b = append(b, byte(len(addr)))
		b = append(b, addr...)
	}
	return append(b, e.body...)
}

func decodeEnvelope(b []byte) (envelope, error) {
	if len(b) < broadcastHead {
		return envelope{}, fmt.Errorf("message of %d bytes", len(b))
	}
	if b[0] != envelopeVersion {
		return envelope{}, fmt.Errorf("message of format %d, this agent reads format %d", b[0], envelopeVersion)
	}
	e := envelope{kind: envelopeKind(b[1]), cluster: membership.ClusterID(b[2:])}
	if e.kind < kindBroadcast || e.kind >= kindEnd {
		return envelope{}, fmt.Errorf("message of unknown kind %d", b[1])
	}
	b = b[broadcastHead:]
	if e.kind != kindBroadcast {
		if len(b) < len(e.from) {
			return envelope{}, fmt.Errorf("message without a sender")
		}
		e.from, b = membership.NodeID(b), b[len(e.from):]
	}
	if e.kind == kindState {
		addr, rest, ok := membership.CutField(b)
		if !ok {
			return envelope{}, fmt.Errorf("state without the sender's address")
		}
		if len(addr) > 18 { // an IPv6 address with its port, without zone
			return envelope{}, fmt.Errorf("state with a sender's address of %d bytes", len(addr))
		}
		if err := e.addr.UnmarshalBinary(addr); err != nil {
			return envelope{}, fmt.Errorf("state with a bad address: %w", err)
		}
		b = rest
	}
	if e.kind == kindMessage && len(b) > MaxMessage {
		return envelope{}, fmt.Errorf("message of %d bytes, the limit is %d", len(b), MaxMessage)
	}
	e.body = b
	return e, nil
}
