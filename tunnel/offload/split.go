package offload

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/tulle-net/tulle/tunnel/header"
)

// ErrArenaFull reports that the arena has no room for the segments of a packet. Send the
// segments that the Splitter holds, call Reset, and split the packet again.
var ErrArenaFull = errors.New("offload: header arena full")

// maxArena is the largest arena for one packet, in bytes. A super-packet of the kernel
// needs a few KiB; only a forged one with a tiny GSOSize needs more.
const maxArena = 1 << 20

// minHeaders is the length of the shortest headers: IPv4 and UDP.
const minHeaders = ipv4MinLen + udpLen

// Segment is one packet as two slices.
type Segment struct {
	Header  []byte // the prefix given to SplitBehind, then IP and transport headers, in the Splitter's arena
	Payload []byte // a slice of the super-packet; empty if that has no payload
}

// Splitter splits super-packets into segments. It keeps the segments of several packets
// until Reset.
type Splitter struct {
	arena  []byte    // headers; the length is what is used
	segs   []Segment // never more than cap(arena)/minHeaders
	prefix []byte    // of the present packet's segments
}

// NewSplitter returns a Splitter with arenaBytes for headers. A 64 KiB TCP super-packet with
// segments of 1,400 bytes needs about 2.5 KiB.
func NewSplitter(arenaBytes int) *Splitter {
	s := new(Splitter)
	s.grow(arenaBytes)
	return s
}

func (s *Splitter) grow(arenaBytes int) {
	s.arena = make([]byte, 0, arenaBytes)
	s.segs = make([]Segment, 0, arenaBytes/minHeaders)
}

// Reset discards all segments. Segments returned before become invalid.
func (s *Splitter) Reset() {
	s.arena = s.arena[:0]
	s.segs = s.segs[:0]
}

// Split splits pkt, a TCP or UDP super-packet described by h, into segments with complete
// checksums. All headers have the same length; all payloads except the last have h.GSOSize
// bytes. Segments are valid until Reset, and while pkt is not changed.
//
// The result equals the kernel's software segmentation: FIN and PSH only on the last
// segment, CWR only on the first, IPv4 IDs counting up. Bytes after the IP length are
// dropped. Errors are ErrHeader (wrapped) and ErrArenaFull.
func (s *Splitter) Split(pkt []byte, h VnetHdr) ([]Segment, error) { return s.SplitBehind(nil, pkt, h) }

// SplitBehind is Split with prefix (the headers of an encapsulation) in front of each segment's headers.
func (s *Splitter) SplitBehind(prefix, pkt []byte, h VnetHdr) ([]Segment, error) {
	var l layout
	if err := l.checkGSO(pkt, &h); err != nil {
		return nil, err
	}
	payload := pkt[l.hdr:l.total]
	mss := int(h.GSOSize)
	n := max(1, (len(payload)+mss-1)/mss)
	if need := n * (len(prefix) + l.hdr); need > cap(s.arena)-len(s.arena) {
		if len(s.arena) > 0 {
			return nil, ErrArenaFull
		}
		if need > maxArena {
			return nil, fmt.Errorf("%w: %d segments of %d bytes", ErrHeader, n, mss)
		}
		s.grow(need)
	}
	s.prefix = prefix
	if l.proto == protoTCP {
		return s.splitTCP(pkt, payload, &l, n, mss), nil
	}
	return s.splitUDP(pkt, payload, &l, n, mss), nil
}

// checkGSO parses pkt and compares it with h. It ignores h.HdrLen, because kernels differ in
// the value.
func (l *layout) checkGSO(pkt []byte, h *VnetHdr) error {
	if !l.parse(pkt) {
		return fmt.Errorf("%w: not a complete TCP or UDP packet", ErrHeader)
	}
	var ok bool
	switch h.GSOType &^ GSOECN {
	case GSOTCPv4:
		ok = !l.v6 && l.proto == protoTCP
	case GSOTCPv6:
		ok = l.v6 && l.proto == protoTCP
	case GSOUDPL4:
		ok = l.proto == protoUDP
	}
	switch {
	case !ok:
		return fmt.Errorf("%w: GSO type %#x over protocol %d", ErrHeader, h.GSOType, l.proto)
	case h.GSOSize == 0:
		return fmt.Errorf("%w: GSO size 0", ErrHeader)
	case h.Flags&NeedsCsum == 0:
		return fmt.Errorf("%w: GSO without NEEDS_CSUM", ErrHeader)
	case int(h.CsumStart) != l.l4 || int(h.CsumStart)+int(h.CsumOffset) != l.csumField():
		return fmt.Errorf("%w: checksum at %d+%d, transport header at %d", ErrHeader, h.CsumStart, h.CsumOffset, l.l4)
	}
	return nil
}

// ipTemplate has the fields of an IP header that differ between segments.
type ipTemplate struct {
	v6  bool
	id  uint16 // IPv4: ID of the next segment
	sum uint32 // IPv4: sum of the header without length, ID and checksum, folded
}

func newIPTemplate(pkt []byte, l *layout) ipTemplate {
	if l.v6 {
		return ipTemplate{v6: true}
	}
	return ipTemplate{id: binary.BigEndian.Uint16(pkt[4:]), sum: sumIPv4(pkt[:l.l4])}
}

// sumIPv4 returns the folded sum of an IPv4 header without length, ID and checksum.
func sumIPv4(h []byte) uint32 {
	s := uint32(binary.BigEndian.Uint16(h)) + uint32(binary.BigEndian.Uint16(h[6:])) +
		uint32(binary.BigEndian.Uint16(h[8:]))
	return uint32(header.Fold(header.Sum(h[12:], s)))
}

// splitTCP writes the headers of n TCP segments.
func (s *Splitter) splitTCP(pkt, payload []byte, l *layout, n, mss int) []Segment {
	first := len(s.segs)
	src, dst := l.addrs(pkt)
	hdr, l4 := l.hdr, l.l4
	flags := pkt[l4+13]
	middle := flags &^ (tcpFIN | tcpPSH | tcpCWR)
	seq := binary.BigEndian.Uint32(pkt[l4+4:])

	// The sum of everything that all segments share: pseudo-header without
	// length, TCP header without sequence number, flags and checksum.
	base := header.PseudoSum(protoTCP, src, dst, 0) + uint32(pkt[l4+12])<<8
	base = header.Sum(pkt[l4:l4+4], base)
	base = header.Sum(pkt[l4+8:l4+12], base)
	base = header.Sum(pkt[l4+14:l4+16], base)
	base = header.Sum(pkt[l4+18:hdr], base)
	base = uint32(header.Fold(base))

	ip := newIPTemplate(pkt, l)
	for i := range n {
		last := i == n-1
		p := payload
		if !last {
			p, payload = payload[:mss:mss], payload[mss:]
		}
		f := middle
		if i == 0 {
			f |= flags & tcpCWR
		}
		if last {
			f |= flags & (tcpFIN | tcpPSH)
		}
		whole, h := s.header(pkt[:hdr])
		ip.write(h, hdr+len(p))
		t := h[l4 : l4+tcpMinLen]
		binary.BigEndian.PutUint32(t[4:], seq)
		t[13] = f
		sum := base + uint32(hdr-l4+len(p)) + seq>>16 + seq&0xffff + uint32(f)
		binary.BigEndian.PutUint16(t[16:], ^header.Fold(header.Sum(p, sum)))
		seq += uint32(mss)
		s.segs = append(s.segs, Segment{whole, p})
	}
	return s.segs[first:]
}

// splitUDP writes the headers of n UDP datagrams.
func (s *Splitter) splitUDP(pkt, payload []byte, l *layout, n, mss int) []Segment {
	first := len(s.segs)
	src, dst := l.addrs(pkt)
	hdr, l4 := l.hdr, l.l4
	base := header.PseudoSum(protoUDP, src, dst, 0)
	base = uint32(header.Fold(header.Sum(pkt[l4:l4+4], base)))

	ip := newIPTemplate(pkt, l)
	for i := range n {
		p := payload
		if i < n-1 {
			p, payload = payload[:mss:mss], payload[mss:]
		}
		whole, h := s.header(pkt[:hdr])
		ip.write(h, hdr+len(p))
		u := h[l4 : l4+udpLen]
		length := uint32(udpLen + len(p))
		binary.BigEndian.PutUint16(u[4:], uint16(length))
		// The length counts twice: in the pseudo-header and in the header.
		c := ^header.Fold(header.Sum(p, base+2*length))
		if c == 0 {
			c = 0xffff // RFC 768: zero says that there is no checksum
		}
		binary.BigEndian.PutUint16(u[6:], c)
		s.segs = append(s.segs, Segment{whole, p})
	}
	return s.segs[first:]
}

// header appends the prefix and a copy of from to the arena, which must have room for both. It returns both together, and the
// copy alone.
func (s *Splitter) header(from []byte) (whole, h []byte) {
	at := len(s.arena)
	s.arena = append(append(s.arena, s.prefix...), from...)
	end := len(s.arena)
	return s.arena[at:end:end], s.arena[at+len(s.prefix) : end : end]
}

// write fills in the IP header of the next segment, a packet of total bytes, and increments
// the ID.
func (t *ipTemplate) write(h []byte, total int) {
	if t.v6 {
		binary.BigEndian.PutUint16(h[4:], uint16(total-ipv6Len))
		return
	}
	b := h[:ipv4MinLen]
	binary.BigEndian.PutUint16(b[2:], uint16(total))
	binary.BigEndian.PutUint16(b[4:], t.id)
	binary.BigEndian.PutUint16(b[10:], ^header.Fold(t.sum+uint32(total)+uint32(t.id)))
	t.id++
}
