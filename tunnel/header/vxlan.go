package header

import (
	"encoding/binary"
	"fmt"
)

// Sizes in bytes (RFC 7348 §5).
const (
	VXLANLen      = 8
	EthernetLen   = 14                     // without a VLAN tag
	VXLANFrameLen = VXLANLen + EthernetLen // what is in front of an inner packet, behind UDP
)

// EtherTypes (IANA "ETHER TYPES").
const (
	EtherTypeIPv4 = 0x0800
	EtherTypeARP  = 0x0806
	EtherTypeIPv6 = 0x86dd
)

// MAC is an Ethernet address (IEEE 802, EUI-48).
type MAC [6]byte

// BroadcastMAC is the address of all stations.
var BroadcastMAC = MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// String is six bytes in hexadecimal, separated by colons.
func (m MAC) String() string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// Group reports an address of several stations: multicast or broadcast.
func (m MAC) Group() bool { return m[0]&1 != 0 }

// IsZero reports the address of nobody.
func (m MAC) IsZero() bool { return m == MAC{} }

// Station reports an address that one station can have: not zero, no group.
func (m MAC) Station() bool { return !m.IsZero() && !m.Group() }

// vxlanFlagVNI is the I flag: the VNI is valid. Every other bit is reserved and,
// as the Linux driver does (drivers/net/vxlan), refused when set.
const vxlanFlagVNI = 0x08

// VXLAN is a view of a VXLAN header and the Ethernet frame behind it.
type VXLAN []byte

// ParseVXLAN checks the flags, the reserved bits and that an Ethernet header follows.
func ParseVXLAN(b []byte) (VXLAN, error) {
	if len(b) < VXLANLen+EthernetLen {
		return nil, ErrTruncated
	}
	if binary.BigEndian.Uint32(b) != vxlanFlagVNI<<24 || b[7] != 0 {
		return nil, ErrVXLAN
	}
	return VXLAN(b), nil
}

// VNI is the 24-bit VXLAN network identifier.
func (v VXLAN) VNI() uint32 { return binary.BigEndian.Uint32(v[4:]) >> 8 }

// DstMAC is the inner frame's destination.
func (v VXLAN) DstMAC() MAC { return MAC(v[VXLANLen:]) }

// SrcMAC is the inner frame's source.
func (v VXLAN) SrcMAC() MAC { return MAC(v[VXLANLen+6:]) }

// EtherType is the inner frame's.
func (v VXLAN) EtherType() uint16 { return binary.BigEndian.Uint16(v[VXLANLen+12:]) }

// Payload is what follows the inner Ethernet header.
func (v VXLAN) Payload() []byte { return v[VXLANLen+EthernetLen:] }

// AppendVXLAN appends a VXLAN header and the Ethernet header behind it.
func AppendVXLAN(dst []byte, vni uint32, dstMAC, srcMAC MAC, etherType uint16) []byte {
	dst = binary.BigEndian.AppendUint32(dst, vxlanFlagVNI<<24)
	dst = binary.BigEndian.AppendUint32(dst, vni<<8)
	dst = append(dst, dstMAC[:]...)
	dst = append(dst, srcMAC[:]...)
	return binary.BigEndian.AppendUint16(dst, etherType)
}
