package encap

import "iter"

// Drop is the reason why a packet was dropped; each has a counter. The names are
// part of the interface to operators (status, metrics).
type Drop uint8

// DropNone: the packet is fine.
const DropNone Drop = 0

// Decapsulation, in the order of the checks. The class of the source is checked before
// its owner, so that the reasons can be distinguished.
const (
	DropNotMember          Drop = iota + 1 // outer source is no member's underlay address
	DropBadEncap                           // bad GUE variant, flags or options; bad VXLAN flags or VNI
	DropMalformed                          // truncated, bad version, IHL or lengths
	DropNested                             // a tunnel inside the tunnel
	DropTTLZero                            // inner TTL or hop limit 0
	DropSourceInvalid                      // inner source multicast, loopback, unspecified or ours
	DropSourceNotSenders                   // inner source outside the sending member's space; of a probe, not its tun address
	DropDestinationNotOurs                 // inner destination is not in our space
	DropECN                                // inner Not-ECT in an outer CE (RFC 6040 §4.2)
	DropNoOwner                            // encapsulation: nobody owns the destination; answered
	DropLoop                               // owner is ourselves, or the endpoint is an inner address
	DropLocalMulticast                     // the kernel's own link-local or multicast packet; silent
	DropPeerDown                           // the owner does not answer; answered
	DropNoPath                             // no encapsulation to the owner is usable
	DropTooBig                             // larger than the path's MTU; answered
	DropTxMalformed                        // a packet from the TUN that is not IP
	DropTxTTLZero                          // inner TTL or hop limit 0 on the way out
	DropSendError                          // I/O: the kernel refused to send
	DropTunWrite                           // the TUN refused a packet
	DropSocketOverflow                     // the kernel dropped from a full socket buffer (SO_RXQ_OVFL)
	DropNoEncapSocket                      // no socket for the outer family or encapsulation
	DropQueueDelay                         // TCP with data, so that its sender slows down: packets wait too long in the TUN's queue, or the socket's
	dropEnd
)

// NumDrops is the length of an array of counters indexed by Drop; index 0, [DropNone],
// stays unused.
const NumDrops = int(dropEnd)

var dropNames = [NumDrops]string{
	DropNone:               "none",
	DropNotMember:          "not_member",
	DropBadEncap:           "bad_encap",
	DropMalformed:          "malformed",
	DropNested:             "nested",
	DropTTLZero:            "ttl_zero",
	DropSourceInvalid:      "source_invalid",
	DropSourceNotSenders:   "source_not_senders",
	DropDestinationNotOurs: "destination_not_ours",
	DropECN:                "ecn",
	DropNoOwner:            "no_owner",
	DropLoop:               "loop",
	DropLocalMulticast:     "local_multicast",
	DropPeerDown:           "peer_down",
	DropNoPath:             "no_path",
	DropTooBig:             "too_big",
	DropTxMalformed:        "tx_malformed",
	DropTxTTLZero:          "tx_ttl_zero",
	DropSendError:          "send_error",
	DropTunWrite:           "tun_write",
	DropSocketOverflow:     "socket_overflow",
	DropNoEncapSocket:      "no_encap_socket",
	DropQueueDelay:         "queue_delay",
}

// String is the reason's name in status and metrics.
func (d Drop) String() string {
	if int(d) < NumDrops {
		return dropNames[d]
	}
	return "unknown"
}

// Drops yields every reason, without [DropNone].
func Drops() iter.Seq[Drop] {
	return func(yield func(Drop) bool) {
		for d := DropNone + 1; d < dropEnd; d++ {
			if !yield(d) {
				return
			}
		}
	}
}
