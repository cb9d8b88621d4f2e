package header

import "encoding/binary"

// Sizes in bytes (RFC 7348 §5).
const (
	VXLANLen    = 8
	EthernetLen = 14 // without a VLAN tag
)

// EtherTypes (IANA "ETHER TYPES").
const (
	EtherTypeIPv4 = 0x0800
	EtherTypeIPv6 = 0x86dd
)

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

// DstMAC is the inner frame's destination, in place.
func (v VXLAN) DstMAC() []byte { return v[VXLANLen : VXLANLen+6] }

// SrcMAC is the inner frame's source, in place.
func (v VXLAN) SrcMAC() []byte { return v[VXLANLen+6 : VXLANLen+12] }

// EtherType is the inner frame's.
func (v VXLAN) EtherType() uint16 { return binary.BigEndian.Uint16(v[VXLANLen+12:]) }

// Payload is what follows the inner Ethernet header.
func (v VXLAN) Payload() []byte { return v[VXLANLen+EthernetLen:] }

// AppendVXLAN appends a VXLAN header and the Ethernet header behind it.
func AppendVXLAN(dst []byte, vni uint32, dstMAC, srcMAC [6]byte, etherType uint16) []byte {
	dst = binary.BigEndian.AppendUint32(dst, vxlanFlagVNI<<24)
	dst = binary.BigEndian.AppendUint32(dst, vni<<8)
	dst = append(dst, dstMAC[:]...)
	dst = append(dst, srcMAC[:]...)
	return binary.BigEndian.AppendUint16(dst, etherType)
}
