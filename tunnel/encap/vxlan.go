package encap

import "github.com/tulle-net/tulle/tunnel/header"

// UnwrapVXLAN checks the payload of an outer UDP datagram of the vxlan encapsulation (RFC 7348 §5): its flags, its VNI,
// and that the Ethernet frame inside is for us – for mac, or for a group of stations – and holds IPv4, IPv6 or ARP. As
// the Linux driver does, it refuses reserved bits that are set; a VLAN tag inside is refused too (RFC 7348 §6.1). What is
// behind the Ethernet header is not looked at. [DropBadEncap] or [DropMalformed] otherwise.
func UnwrapVXLAN(payload []byte, vni uint32, mac header.MAC) (header.VXLAN, Drop) {
	v, err := header.ParseVXLAN(payload)
	switch {
	case err == header.ErrTruncated:
		return nil, DropMalformed
	case err != nil || v.VNI() != vni:
		return nil, DropBadEncap
	}
	if to := v.DstMAC(); to != mac && !to.Group() {
		return nil, DropBadEncap
	}
	switch v.EtherType() {
	case header.EtherTypeIPv4, header.EtherTypeIPv6, header.EtherTypeARP:
		return v, DropNone
	}
	return nil, DropBadEncap
}

// InnerVXLAN takes the inner packet out of a frame that [UnwrapVXLAN] passed. It is at least one byte long, of the family
// that the EtherType announces; [DropMalformed] otherwise.
func InnerVXLAN(v header.VXLAN) (inner []byte, d Drop) {
	proto := uint8(header.ProtoIPv4)
	if v.EtherType() == header.EtherTypeIPv6 {
		proto = header.ProtoIPv6
	}
	return checkVersion(v.Payload(), proto)
}

// EtherType is the inner frame's, for an inner packet of IPv6 or IPv4.
func EtherType(inner6 bool) uint16 {
	if inner6 {
		return header.EtherTypeIPv6
	}
	return header.EtherTypeIPv4
}

// WrapVXLAN appends the whole outer packet for mode VXLAN: IP, UDP with its checksum, VXLAN, Ethernet between the VTEPs'
// MACs, inner. The data path lets the kernel write the outer headers; this is for captures and tests.
func WrapVXLAN(dst []byte, o *Outer, vni uint32, dstMAC, srcMAC header.MAC, inner []byte) ([]byte, error) {
	if _, err := innerProto(inner); err != nil {
		return dst, err
	}
	var frame [header.VXLANFrameLen]byte
	return wrapUDP(dst, o, header.AppendVXLAN(frame[:0], vni, dstMAC, srcMAC, EtherType(inner[0]>>4 == 6)), inner)
}
