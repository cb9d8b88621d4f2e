package ownership

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/membership"
)

// kind is the type of a message.
type kind uint8

const (
	kindSync       kind = iota + 1 // request for the state: seq
	kindState                      // answer, and the push/pull state: seq, flags, text (see departed), families, entries
	kindRequest                    // request for space: seq, count (family), prefix (fixed) or none, entries (held by the sender)
	kindGrant                      // grant of space: seq, entries
	kindRefuse                     // refusal: seq, reason, text, count (last seq seen)
	kindOffer                      // offer of all space by a leaving node: seq, rests
	kindOfferAck                   // accepted, or text: seq, flags
	kindGive                       // the transfer is saved: seq, entries
	kindGiveAck                    // the receiver has saved it: seq
	kindPromise                    // request for a promise to let nobody else forget node: seq, node
	kindPromiseAck                 // promised, or text: seq, flags, node, families, entries
	kindUnpromise                  // the promise is not needed any more: node
	kindHeld                       // pods of the sender still have these addresses of the receiver: rests
	kindNews                       // broadcast: entries; flags (left) about the sender; node (forgotten)
	kindFound                      // request for consent to start the cluster: seq (from a node without a cluster)
	kindFoundAck                   // consent or refusal: seq, flags, node (another one that wants to start it)
	kindUnfound                    // the consent is not needed any more
	kindEnd
)

// Flags of a message, about its sender.
const (
	flagJoined    = 1 << 0 // has owned space; its table counts for a confirmation
	flagConfirmed = 1 << 1
	flagLeft      = 1 << 2
	flagYes       = 1 << 3 // of an OfferAck, PromiseAck or FoundAck
	flagFounder   = 1 << 6 // of a FoundAck: bootstrap is set on the sender too
	flagForced    = 1 << 5 // of a Promise: forget --force
	flagLacking   = 1 << 4 // of a Grant: nothing new; the receiver owned these entries already
)

// reason is why a request was refused.
type reason uint8

const (
	refusedNotReady  reason = iota + 1 // ask another node, or later
	refusedExhausted                   // has no free block
	refusedInUse                       // a fixed CIDR that is in use, until the operator acts
	refusedElsewhere                   // a fixed CIDR that this node does not own
	refusedStale                       // the sequence number is not new: count has the last one
)

// A message is a message between machines. Each kind uses some of the fields. Unused
// fields are zero and take about one byte.
//
// Encoding, integers as unsigned varints unless said otherwise:
//
//	offset  size  field
//	0       1     format version, 1
//	1       1     kind
//	2       16    cluster ID, zero from a node in no cluster
//	18      16    sender's node ID
//	34      1     flags
//	35      1     reason
//	36      …     seq, count
//	        17    node ID, after a byte 1; or a byte 0
//	        …     prefix: length byte 0 (none), 4 or 16, address, prefix length byte
//	        …     text: length (at most 1024), bytes
//	        …     families: number (at most 2), each a prefix and the block length byte
//	        …     rests: number (at most 4096), each length byte 4 or 16, address, seconds
//	        …     entries, as encoded by membership.AppendEntries; nothing follows
type message struct {
	kind     kind
	cluster  ClusterID
	sender   NodeID
	flags    uint8
	reason   reason
	seq      uint64
	count    uint64
	node     NodeID
	prefix   netip.Prefix
	text     string
	families []ipam.Family
	rests    []rest
	entries  []Entry

	pushed bool // not encoded: it came by push/pull
}

// rest is an address in cool-down. A message has the duration, not the end, because clocks
// of nodes may differ.
type rest struct {
	addr netip.Addr
	secs uint64
}

const (
	messageVersion = 1
	maxText        = 1024
	maxRests       = 4096
	maxRestSecs    = 7 * 24 * 3600
)

// errMalformed is wrapped by the errors of decode.
var errMalformed = errors.New("malformed message")

func (m *message) encode() []byte {
	b := make([]byte, 0, 80+len(m.text)+32*len(m.entries)+20*len(m.rests))
	b = append(b, messageVersion, byte(m.kind))
	b = append(b, m.cluster[:]...)
	b = append(b, m.sender[:]...)
	b = append(b, m.flags, byte(m.reason))
	b = binary.AppendUvarint(b, m.seq)
	b = binary.AppendUvarint(b, m.count)
	if m.node.IsZero() {
		b = append(b, 0)
	} else {
		b = append(append(b, 1), m.node[:]...)
	}
	b = appendPrefix(b, m.prefix)
	text := m.text[:min(len(m.text), maxText)]
	b = binary.AppendUvarint(b, uint64(len(text)))
	b = append(b, text...)
	b = binary.AppendUvarint(b, uint64(len(m.families)))
	for _, f := range m.families {
		b = appendPrefix(b, f.CIDR)
		b = append(b, byte(f.BlockLen))
	}
	rests := m.rests[:min(len(m.rests), maxRests)]
	b = binary.AppendUvarint(b, uint64(len(rests)))
	for _, r := range rests {
		b = appendAddr(b, r.addr)
		b = binary.AppendUvarint(b, r.secs)
	}
	return membership.AppendEntries(b, m.entries)
}

func appendAddr(b []byte, a netip.Addr) []byte {
	if !a.IsValid() {
		return append(b, 0)
	}
	v := a.AsSlice()
	return append(append(b, byte(len(v))), v...)
}

func appendPrefix(b []byte, p netip.Prefix) []byte {
	if !p.IsValid() {
		return append(b, 0)
	}
	return append(appendAddr(b, p.Addr()), byte(p.Bits()))
}

// decode never panics, and allocates in proportion to len(b).
func decode(b []byte) (*message, error) {
	r := reader{b: b}
	m := new(message)
	if v := r.byte(); r.ok() && v != messageVersion {
		return nil, fmt.Errorf("%w: version %d, this program supports %d", errMalformed, v, messageVersion)
	}
	if m.kind = kind(r.byte()); r.ok() && (m.kind == 0 || m.kind >= kindEnd) {
		return nil, fmt.Errorf("%w: kind %d", errMalformed, m.kind)
	}
	copy(m.cluster[:], r.take(16))
	copy(m.sender[:], r.take(16))
	m.flags, m.reason = r.byte(), reason(r.byte())
	m.seq, m.count = r.uvarint(), r.uvarint()
	if r.byte() != 0 {
		copy(m.node[:], r.take(16))
	}
	m.prefix = r.prefix()
	m.text = string(r.take(int(r.count(maxText))))
	for range r.count(2) {
		f := ipam.Family{CIDR: r.prefix(), BlockLen: int(r.byte())}
		m.families = append(m.families, f)
	}
	for range r.count(maxRests) {
		if !r.ok() {
			break
		}
		m.rests = append(m.rests, rest{r.addr(), min(r.uvarint(), maxRestSecs)})
	}
	if !r.ok() {
		return nil, fmt.Errorf("%w: truncated or out of bounds", errMalformed)
	}
	entries, tail, err := membership.DecodeEntries(r.b)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errMalformed, err)
	}
	if len(tail) != 0 {
		return nil, fmt.Errorf("%w: %d bytes after its end", errMalformed, len(tail))
	}
	m.entries = entries
	return m, nil
}

// reader reads from b. After the first error it returns only zeros.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) ok() bool { return !r.bad }

func (r *reader) take(n int) []byte {
	if r.bad || n < 0 || n > len(r.b) {
		r.bad = true
		return nil
	}
	v := r.b[:n]
	r.b = r.b[n:]
	return v
}

func (r *reader) byte() byte {
	if v := r.take(1); v != nil {
		return v[0]
	}
	return 0
}

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.b)
	if r.bad || n <= 0 {
		r.bad = true
		return 0
	}
	r.b = r.b[n:]
	return v
}

// count reads the number of elements, each of at least one byte.
func (r *reader) count(limit uint64) uint64 {
	n := r.uvarint()
	if n > limit || n > uint64(len(r.b)) {
		r.bad = true
		return 0
	}
	return n
}

func (r *reader) addr() netip.Addr {
	n := int(r.byte())
	if n != 4 && n != 16 {
		r.bad = true
		return netip.Addr{}
	}
	a, _ := netip.AddrFromSlice(r.take(n))
	if a.Is4In6() {
		r.bad = true
	}
	return a
}

func (r *reader) prefix() netip.Prefix {
	if len(r.b) > 0 && r.b[0] == 0 {
		r.take(1)
		return netip.Prefix{}
	}
	a := r.addr()
	p := netip.PrefixFrom(a, int(r.byte()))
	if r.bad || !p.IsValid() || p != p.Masked() {
		r.bad = true
		return netip.Prefix{}
	}
	return p
}

// toRests converts cool-downs for a message.
func toRests(now time.Time, list []ipam.Cooling) []rest {
	var out []rest
	for _, c := range list {
		if d := c.Until.Sub(now); d > 0 {
			out = append(out, rest{c.Addr, uint64((d + time.Second - 1) / time.Second)})
		}
	}
	return out
}
