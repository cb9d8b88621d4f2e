package offload

import (
	"encoding/binary"

	"github.com/tulle-net/tulle/tunnel/header"
)

// RawVnetHdr recognises a packet that the kernel has joined, or never gave a checksum, before a raw
// socket read it out of IPIP: its TCP or UDP checksum field holds only the sum of the
// pseudo-header (net/ipv4/tcp_offload.c, tcp_gro_complete). It returns the virtio-net header with which
// such a packet may be written to a TUN device, and false for any other packet, which
// is then GSONone.
//
// A packet that was damaged on its way cannot be told from one without checksum when its checksum happens to equal
// that sum: one damaged packet in 65,536 then counts as right. The udp encapsulation, whose outer
// checksum covers everything, has no such gap.
//
// The segment size is not told to raw sockets. A TCP packet longer than maxPacket bytes gets the largest
// size that keeps its segments within maxPacket, which a byte stream does not mind. A UDP packet
// longer than that cannot be cut where its sender would have: it is not recognised. pkt has no
// trailing bytes.
func RawVnetHdr(pkt []byte, maxPacket int) (VnetHdr, bool) {
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
	if len(pkt) <= maxPacket {
		return h, true
	}
	if l.proto != protoTCP || maxPacket <= l.hdr {
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
