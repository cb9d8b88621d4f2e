package sys

import (
	"encoding/binary"
	"net"
	"net/netip"
	"strconv"

	"golang.org/x/sys/unix"
)

// AppendSockaddr appends addr as a struct sockaddr_in or sockaddr_in6
// (linux/in.h, linux/in6.h): family in host order, port and address in network
// order.
func AppendSockaddr(b []byte, addr netip.AddrPort) []byte {
	if a := addr.Addr(); a.Is4() {
		a4 := a.As4()
		b = binary.NativeEndian.AppendUint16(b, unix.AF_INET)
		b = binary.BigEndian.AppendUint16(b, addr.Port())
		b = append(b, a4[:]...)
		return append(b, make([]byte, 8)...)
	}
	a16 := addr.Addr().As16()
	b = binary.NativeEndian.AppendUint16(b, unix.AF_INET6)
	b = binary.BigEndian.AppendUint16(b, addr.Port())
	b = append(b, 0, 0, 0, 0) // flow information
	b = append(b, a16[:]...)
	return binary.NativeEndian.AppendUint32(b, zoneID(addr.Addr()))
}

// ParseSockaddr parses a struct sockaddr_in or sockaddr_in6. It ignores the scope,
// which would need an allocation and does not exist in the underlay.
func ParseSockaddr(b []byte) (netip.AddrPort, bool) {
	if len(b) < 2 {
		return netip.AddrPort{}, false
	}
	switch binary.NativeEndian.Uint16(b) {
	case unix.AF_INET:
		if len(b) >= unix.SizeofSockaddrInet4 {
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), binary.BigEndian.Uint16(b[2:])), true
		}
	case unix.AF_INET6:
		if len(b) >= unix.SizeofSockaddrInet6 {
			return netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[8:24])), binary.BigEndian.Uint16(b[2:])), true
		}
	}
	return netip.AddrPort{}, false
}

// zoneID returns the interface index of an IPv6 zone, which is a number or a name.
func zoneID(a netip.Addr) uint32 {
	zone := a.Zone()
	if zone == "" {
		return 0
	}
	if n, err := strconv.ParseUint(zone, 10, 32); err == nil {
		return uint32(n)
	}
	if ifi, err := net.InterfaceByName(zone); err == nil {
		return uint32(ifi.Index)
	}
	return 0
}
