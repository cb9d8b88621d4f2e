package offload

import (
	"encoding/binary"

	"github.com/tulle-net/tulle/tunnel/header"
)

const (
	maxUSOSegments = 64  // as the kernel's UDP_GRO_CNT_MAX
	maxTSOSegments = 128 // limits the vector of one write; 46 packets of 1,400 bytes fill 64 KiB
	maxJoinHeaders = ipv6Len + 60
)

// Joiner joins consecutive packets of one flow into a super-packet. It holds one run of
// packets at a time by reference: their buffers must not change from Add until the caller
// has used the result of Flush.
//
// It joins what the kernel's GRO joins:
//   - complete TCP or UDP packets without IP options and extension headers;
//   - equal addresses, ports, TTL, TOS, DF, flow label and, for TCP, acknowledgement, window,
//     flags and options;
//   - consecutive TCP sequence numbers and IPv4 IDs (with DF the ID may also be constant,
//     because it has no meaning then: RFC 6864 §4.1);
//   - payloads of equal length; a shorter one ends the run, as does PSH or FIN;
//   - no packet without payload, with SYN, RST or URG, with CWR unless it is the first, or
//     without UDP checksum.
//
// Split restores every byte of the packets, except for constant IDs.
type Joiner struct {
	// TrustChecksums joins without verifying TCP and UDP checksums. That is correct only if
	// an outer UDP checksum covered the payload on the way, and the peer is known to have
	// computed the inner checksum.
	TrustChecksums bool

	tso, uso bool

	parts    [][]byte // the packets of the run
	flushed  [][]byte // the packets of the last Flush
	iov      [][]byte // [0] is the virtio-net header; the rest as Flush returns it
	vnet     [VnetHdrLen]byte
	undo     [maxJoinHeaders]byte // the first packet's headers before Flush
	restore  bool                 // undo holds such headers
	total    int                  // bytes of the super-packet so far
	open     bool                 // another packet may join
	verified bool                 // the checksums of the first packet are verified
	mask     *equalMask
	l        layout // of the first packet
	mss      int    // its payload
	seq      uint32 // TCP: the next sequence number
	id       uint16 // IPv4: the last ID
	step     uint16 // IPv4: ID increment, known from the second packet on
	ipSum    uint32 // IPv4: sum of the header without length, ID and checksum
	pseudo   uint32 // pseudo-header without length
}

// NewJoiner returns a Joiner. It makes TCP super-packets if tso is set, and UDP super-packets if uso is set.
func NewJoiner(tso, uso bool) *Joiner {
	return &Joiner{
		tso:   tso,
		uso:   uso,
		parts: make([][]byte, 0, maxTSOSegments),
		iov:   make([][]byte, 0, maxTSOSegments+1),
	}
}

// Add adds pkt, a complete IP packet without trailing bytes, to the run. It returns false and adds nothing if pkt cannot join
// the run: the caller then calls Flush and adds pkt again. An empty Joiner accepts any packet.
func (j *Joiner) Add(pkt []byte) bool {
	if len(j.parts) == 0 {
		j.start(pkt)
		return true
	}
	return j.open && j.join(pkt)
}

// start makes pkt the first packet of a run.
func (j *Joiner) start(pkt []byte) {
	j.restore = false
	j.parts = append(j.parts, pkt)
	j.open = false
	l := &j.l
	if !l.parse(pkt) || l.total != len(pkt) || l.hdr == len(pkt) || len(pkt) > maxTotal {
		return
	}
	if l.v6 && l.l4 != ipv6Len || !l.v6 && l.l4 != ipv4MinLen {
		return
	}
	if l.proto == protoTCP {
		if !j.tso || pkt[l.l4+13]&(tcpSYN|tcpRST|tcpURG|tcpPSH|tcpFIN) != 0 {
			return
		}
		j.seq = binary.BigEndian.Uint32(pkt[l.l4+4:]) + uint32(len(pkt)-l.hdr)
	} else if !j.uso || udpLength(pkt, l.l4) != len(pkt)-l.l4 {
		return
	}
	j.open = true
	j.verified = false
	j.total = len(pkt)
	j.mss = len(pkt) - l.hdr
	if !l.v6 {
		j.id = binary.BigEndian.Uint16(pkt[4:])
	}
	j.mask = maskOf(l)
}

// udpLength returns the length field of the UDP header at l4.
func udpLength(pkt []byte, l4 int) int {
	return int(binary.BigEndian.Uint16(pkt[l4+4:]))
}

// join appends pkt if it continues the run.
func (j *Joiner) join(pkt []byte) bool {
	l := &j.l
	n := len(pkt) - l.hdr // payload
	if n <= 0 || n > j.mss || j.total+n > maxTotal || !j.mask.same(j.parts[0][:l.hdr], pkt[:l.hdr]) {
		return false
	}
	// From here on pkt has the same versions, protocol, header lengths and ports.
	count := len(j.parts)
	step := j.step
	if l.v6 {
		if ipv6Len+int(binary.BigEndian.Uint16(pkt[4:])) != len(pkt) {
			return false
		}
	} else {
		if int(binary.BigEndian.Uint16(pkt[2:])) != len(pkt) {
			return false
		}
		d := binary.BigEndian.Uint16(pkt[4:]) - j.id
		if count == 1 {
			if d > 1 || d == 0 && pkt[6]&0x40 == 0 {
				return false
			}
			step = d
		} else if d != step {
			return false
		}
	}
	last := n < j.mss
	if l.proto == protoTCP {
		if count == maxTSOSegments || binary.BigEndian.Uint32(pkt[l.l4+4:]) != j.seq {
			return false
		}
		flags := pkt[l.l4+13]
		if flags&tcpCWR != 0 { // the first packet's alone
			return false
		}
		last = last || flags&(tcpFIN|tcpPSH) != 0
	} else {
		if count == maxUSOSegments || udpLength(pkt, l.l4) != len(pkt)-l.l4 {
			return false
		}
	}
	if !j.verified {
		if !j.verifyFirst() {
			j.open = false
			return false
		}
		j.verified = true
	}
	if !j.verify(pkt) {
		return false
	}
	j.parts = append(j.parts, pkt)
	j.total += n
	j.seq += uint32(n)
	j.step = step
	j.id += step
	j.open = !last
	return true
}

// verifyFirst computes the sums that all packets share, and verifies the first packet.
func (j *Joiner) verifyFirst() bool {
	first := j.parts[0]
	src, dst := j.l.addrs(first)
	j.pseudo = uint32(header.Fold(header.PseudoSum(j.l.proto, src, dst, 0)))
	if !j.l.v6 {
		j.ipSum = sumIPv4(first[:ipv4MinLen])
	}
	return j.verify(first)
}

// verify reports whether the checksums of pkt are those that Split would write.
func (j *Joiner) verify(pkt []byte) bool {
	l4 := j.l.l4
	if !j.l.v6 {
		sum := j.ipSum + uint32(len(pkt)) + uint32(binary.BigEndian.Uint16(pkt[4:]))
		if binary.BigEndian.Uint16(pkt[10:]) != ^header.Fold(sum) {
			return false
		}
	}
	// A checksum of zero has two representations. TCP writes 0; UDP writes 0xffff, because there 0
	// means "no checksum" (and such a packet must not get a checksum from us).
	field := binary.BigEndian.Uint16(pkt[j.l.csumField():])
	if j.l.proto == protoTCP {
		if field == 0xffff {
			return false
		}
	} else if field == 0 {
		return false
	}
	if j.TrustChecksums {
		return true
	}
	return header.Fold(header.Sum(pkt[l4:], j.pseudo+uint32(len(pkt)-l4))) == 0xffff
}

// Flush ends the run and returns it as one packet: its virtio-net header, and its bytes as a vector of the first packet and
// the payloads of the others. It changes the headers of the first packet in place; the checksum field becomes the sum of the
// pseudo-header. Undo reverts that. A single packet is returned unchanged as GSONone. ok is false if the run is empty.
// The result is valid until the next Add.
func (j *Joiner) Flush() (h VnetHdr, iov [][]byte, ok bool) {
	h, ok = j.flush()
	if !ok {
		return h, nil, false
	}
	return h, j.iov[1:], true
}

// FlushVnet is Flush with the encoded virtio-net header as the first element of the vector, ready for
// writev.
func (j *Joiner) FlushVnet() (iov [][]byte, ok bool) {
	h, ok := j.flush()
	if !ok {
		return nil, false
	}
	h.Encode(j.vnet[:])
	return j.iov, true
}

func (j *Joiner) flush() (h VnetHdr, ok bool) {
	if len(j.parts) == 0 {
		return h, false
	}
	first := j.parts[0]
	j.iov = append(j.iov[:0], j.vnet[:], first)
	if len(j.parts) > 1 {
		hdr := j.l.hdr
		for _, p := range j.parts[1:] {
			j.iov = append(j.iov, p[hdr:])
		}
		h = j.seal(first)
	}
	j.flushed = j.parts
	j.parts = j.parts[:0]
	return h, true
}

// Undo restores the first packet of the last Flush and returns all packets as they were added. It is for a device that has
// refused the super-packet. The result is valid until the next Add.
func (j *Joiner) Undo() [][]byte {
	if j.restore {
		copy(j.flushed[0], j.undo[:j.l.hdr])
		j.restore = false
	}
	return j.flushed
}

// seal turns the headers of the first packet into those of the super-packet.
func (j *Joiner) seal(first []byte) VnetHdr {
	l := &j.l
	copy(j.undo[:], first[:l.hdr])
	j.restore = true
	if l.v6 {
		binary.BigEndian.PutUint16(first[4:], uint16(j.total-ipv6Len))
	} else {
		binary.BigEndian.PutUint16(first[2:], uint16(j.total))
		id := binary.BigEndian.Uint16(first[4:])
		binary.BigEndian.PutUint16(first[10:], ^header.Fold(j.ipSum+uint32(j.total)+uint32(id)))
	}
	h := VnetHdr{
		Flags:     NeedsCsum,
		GSOType:   GSOUDPL4,
		HdrLen:    uint16(l.hdr),
		GSOSize:   uint16(j.mss),
		CsumStart: uint16(l.l4),
	}
	length := j.total - l.l4
	if l.proto == protoTCP {
		h.GSOType = GSOTCPv4
		if l.v6 {
			h.GSOType = GSOTCPv6
		}
		if first[l.l4+13]&tcpCWR != 0 {
			h.GSOType |= GSOECN
		}
		h.CsumOffset = tcpCsumOffset
		last := j.parts[len(j.parts)-1]
		first[l.l4+13] |= last[l.l4+13] & (tcpFIN | tcpPSH)
	} else {
		h.CsumOffset = udpCsumOffset
		binary.BigEndian.PutUint16(first[l.l4+4:], uint16(length))
	}
	binary.BigEndian.PutUint16(first[l.csumField():], header.Fold(j.pseudo+uint32(length)))
	return h
}
