package offload

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/tulle-net/tulle/tunnel/header"
)

// VnetHdrLen is the size in bytes of a virtio-net header without the count of
// merged buffers (struct virtio_net_hdr, linux/virtio_net.h).
const VnetHdrLen = 10

// Values of VnetHdr.Flags (VIRTIO_NET_HDR_F_*).
const (
	NeedsCsum = 1 // the checksum field holds only the pseudo-header's sum
	DataValid = 2 // the checksum has been verified
)

// Values of VnetHdr.GSOType (VIRTIO_NET_HDR_GSO_*).
const (
	GSONone  = 0
	GSOTCPv4 = 1
	GSOTCPv6 = 4
	GSOUDPL4 = 5
	GSOECN   = 0x80 // flag added to a TCP type: the super-packet has CWR set
)

// ErrShort reports a buffer too short for a virtio-net header.
var ErrShort = errors.New("offload: buffer shorter than a virtio-net header")

// VnetHdr is a virtio-net header. Sizes and offsets are in bytes, offsets count
// from the first byte of the IP header.
type VnetHdr struct {
	Flags      uint8
	GSOType    uint8
	HdrLen     uint16 // network and transport headers together; the kernel does not always set it
	GSOSize    uint16 // payload of every segment but the last
	CsumStart  uint16 // where the checksum's coverage begins: the transport header
	CsumOffset uint16 // the checksum field, from CsumStart
}

// Decode reads h from the first VnetHdrLen bytes of b.
func (h *VnetHdr) Decode(b []byte) error {
	if len(b) < VnetHdrLen {
		return ErrShort
	}
	h.Flags = b[0]
	h.GSOType = b[1]
	h.HdrLen = binary.NativeEndian.Uint16(b[2:])
	h.GSOSize = binary.NativeEndian.Uint16(b[4:])
	h.CsumStart = binary.NativeEndian.Uint16(b[6:])
	h.CsumOffset = binary.NativeEndian.Uint16(b[8:])
	return nil
}

// Encode writes h to the first VnetHdrLen bytes of b.
func (h *VnetHdr) Encode(b []byte) error {
	if len(b) < VnetHdrLen {
		return ErrShort
	}
	b[0] = h.Flags
	b[1] = h.GSOType
	binary.NativeEndian.PutUint16(b[2:], h.HdrLen)
	binary.NativeEndian.PutUint16(b[4:], h.GSOSize)
	binary.NativeEndian.PutUint16(b[6:], h.CsumStart)
	binary.NativeEndian.PutUint16(b[8:], h.CsumOffset)
	return nil
}

// CompleteChecksum completes the checksum of a GSONone packet with NeedsCsum in place, as the
// kernel's skb_checksum_help does. Without NeedsCsum it does nothing.
func CompleteChecksum(pkt []byte, h VnetHdr) error {
	if h.Flags&NeedsCsum == 0 {
		return nil
	}
	if h.GSOType != GSONone {
		return fmt.Errorf("%w: type %#x is not a single packet", ErrHeader, h.GSOType)
	}
	start, field := int(h.CsumStart), int(h.CsumStart)+int(h.CsumOffset)
	if field+2 > len(pkt) {
		return fmt.Errorf("%w: checksum field at %d of a packet of %d bytes", ErrHeader, field, len(pkt))
	}
	// The field holds the sum of the pseudo-header and is included in the sum. In UDP zero
	// means "no checksum" (RFC 768); 0xffff is the same sum.
	c := header.Checksum(pkt[start:])
	if c == 0 && h.CsumOffset == udpCsumOffset {
		c = 0xffff
	}
	binary.BigEndian.PutUint16(pkt[field:], c)
	return nil
}
