// Package mtu has types for the packet sizes of a tunnel, in bytes, and the
// arithmetic between them. With different types, an underlay MTU cannot be used as
// an overlay MTU by mistake:
//
//	Link      largest IP packet that the underlay carries, outer headers included
//	Overhead  length of the headers that an encapsulation adds
//	TUN       largest inner packet: Link − Overhead
//
// Pure arithmetic, safe for concurrent use.
//
// Sources: RFC 791 (576), RFC 8200 §5 (1280), RFC 4459 (tunnels and MTU), RFC 9293 §3.7.1
// (MSS).
package mtu

import (
	"fmt"

	"github.com/tulle-net/tulle/tunnel/header"
)

// Link is the size of an outer IP packet, or the limit for it, in bytes.
type Link int

// TUN is the size of an inner IP packet, or the limit for it, in bytes.
type TUN int

// Overhead is the length of all outer headers, in bytes.
type Overhead int

// Limits, in bytes.
const (
	Min4     = 576  // every IPv4 host must accept a packet of this size, RFC 791 §3.1
	Min6     = 1280 // every IPv6 link must carry a packet of this size, RFC 8200 §5
	Max      = 65535
	Ethernet = Link(1500)
)

// Lengths of the headers in an encapsulation, in bytes.
const (
	IPv4     = Overhead(header.IPv4MinLen)
	IPv6     = Overhead(header.IPv6Len)
	UDP      = Overhead(header.UDPLen)
	VXLAN    = Overhead(header.VXLANLen)
	InnerEth = Overhead(header.EthernetLen)
)

// TUN returns the size of the largest inner packet that fits into l with overhead o; at
// least 0 and at most [Max].
func (l Link) TUN(o Overhead) TUN { return min(max(TUN(int(l)-int(o)), 0), Max) }

// Link returns the size of the outer packet for an inner packet of size t with overhead o.
func (t TUN) Link(o Overhead) Link { return Link(int(t) + int(o)) }

// MSS returns the TCP payload that fits into t without IP and TCP options, at least 0.
func (t TUN) MSS(v6 bool) int {
	if v6 {
		return max(int(t)-header.IPv6Len-header.TCPMinLen, 0)
	}
	return max(int(t)-header.IPv4MinLen-header.TCPMinLen, 0)
}

// Carries reports whether an inner packet of n bytes fits.
func (t TUN) Carries(n int) bool { return n <= int(t) }

// Validate returns an error if t cannot be the MTU of a TUN device that carries IPv4
// and, if v6 is set, IPv6 (RFC 8200 §5).
func (t TUN) Validate(v6 bool) error {
	least := TUN(Min4)
	if v6 {
		least = Min6
	}
	if t < least || t > Max {
		return fmt.Errorf("mtu: %d bytes is outside %d–%d", int(t), int(least), Max)
	}
	return nil
}
