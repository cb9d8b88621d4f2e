package offload

import (
	"bytes"
	"encoding/binary"

	"github.com/tulle-net/tulle/tunnel/header"
)

// NotTold says that a socket does not tell the segment size of UDP super-packets, as raw sockets do not.
const NotTold = -1

// RawVnetHdr recognises an inner packet with a partial checksum that a socket has received: the kernel's GRO has joined it,
// or its sender left the checksum to the hardware. The TCP or UDP checksum field of such a packet holds only the sum of the
// pseudo-header (net/ipv4/tcp_offload.c, tcp_gro_complete). RawVnetHdr returns the virtio-net header for writing the packet to
// a TUN device. It returns false for any other packet; that one is GSONone.
//
// If the checksum of a damaged packet happens to equal that sum, the packet is taken for one with a partial checksum. This
// happens for one damaged packet in 65,536. Packets of udp and vxlan that agents send do not have this gap, because their outer checksum
// covers everything; those that a kernel sends in their place (the fast path) have none.
//
// No socket receives the segment size of TCP. A TCP packet longer than maxPacket bytes gets the largest segment size that
// keeps segments within maxPacket; for a byte stream any size is correct. A UDP packet is a super-packet of datagrams of segment bytes, as the
// UDP_GRO control message says, or one datagram if segment is 0. If that is NotTold, one longer than maxPacket cannot be split at its
// datagram boundaries, so it is not recognised. pkt must have no trailing bytes.
func RawVnetHdr(pkt []byte, maxPacket, segment int) (VnetHdr, bool) {
	var l layout
	if !l.parse(pkt) || l.total != len(pkt) {
		return VnetHdr{}, false
	}
	src, dst := l.addrs(pkt)
	pseudo := header.PseudoSum(l.proto, src, dst, uint32(len(pkt)-l.l4))
	if binary.BigEndian.Uint16(pkt[l.csumField():]) != header.Fold(pseudo) {
		return VnetHdr{}, false
	}
	// One complete checksum in 65,536 equals that sum too.
	if header.Fold(header.Sum(pkt[l.l4:], pseudo)) == 0xffff {
		return VnetHdr{}, false
	}
	h := VnetHdr{
		Flags:      NeedsCsum,
		HdrLen:     uint16(l.hdr),
		CsumStart:  uint16(l.l4),
		CsumOffset: uint16(l.csumField() - l.l4),
	}
	if l.proto != protoTCP {
		if segment > 0 && len(pkt) > l.hdr+segment {
			h.GSOType, h.GSOSize = GSOUDPL4, uint16(segment)
		}
		return h, segment != NotTold || len(pkt) <= maxPacket
	}
	if len(pkt) <= maxPacket {
		return h, true
	}
	if maxPacket <= l.hdr {
		return VnetHdr{}, false
	}
	h.GSOSize = uint16(min(maxPacket-l.hdr, len(pkt)-l.hdr))
	h.GSOType = GSOTCPv4
	if l.v6 {
		h.GSOType = GSOTCPv6
	}
	if pkt[l.l4+13]&tcpCWR != 0 {
		h.GSOType |= GSOECN
	}
	return h, true
}

// CutFirst cuts the first segment off pkt, a TCP super-packet of which RawVnetHdr has returned h. Both parts have partial checksums, as pkt has. first is a
// copy; rest is in the memory of pkt, which is overwritten.
func CutFirst(pkt []byte, h VnetHdr) (first, rest []byte) {
	var l layout
	if !l.parse(pkt) || h.GSOType == GSONone || l.proto != protoTCP || len(pkt) <= l.hdr+int(h.GSOSize) {
		return pkt, nil
	}
	size := int(h.GSOSize)
	first = bytes.Clone(pkt[:l.hdr+size])
	rest = pkt[size:]
	copy(rest, first[:l.hdr])
	seq := rest[l.l4+4:]
	binary.BigEndian.PutUint32(seq, binary.BigEndian.Uint32(seq)+uint32(size))
	first[l.l4+13] &^= tcpFIN | tcpPSH
	rest[l.l4+13] &^= tcpCWR
	if !l.v6 {
		ip := header.IPv4(rest)
		ip.SetID(ip.ID() + 1)
	}
	l.shorten(first)
	l.shorten(rest)
	return first, rest
}

// shorten has the headers of pkt, whose partial checksum is of a longer packet, say that it ends where it does.
func (l *layout) shorten(pkt []byte) {
	if l.v6 {
		binary.BigEndian.PutUint16(pkt[4:], uint16(len(pkt)-ipv6Len))
	} else {
		header.IPv4(pkt).SetTotalLen(len(pkt))
	}
	src, dst := l.addrs(pkt)
	pseudo := header.PseudoSum(l.proto, src, dst, uint32(len(pkt)-l.l4))
	binary.BigEndian.PutUint16(pkt[l.csumField():], header.Fold(pseudo))
}
