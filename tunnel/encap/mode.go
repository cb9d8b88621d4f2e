// Package encap encapsulates and decapsulates packets. Each encapsulation has its
// own file with its overhead, writer and reader. [Validate] has the checks of every
// inner packet before delivery, for all encapsulations. A [Drop] is the reason why a
// packet is dropped; the engine counts them.
//
// Pure functions over the caller's buffers, without state, I/O, clock or
// allocation; safe for concurrent use.
//
// Sources: RFC 2003 (IP in IP), 2473 and 4213 (IPv6), 7348 (VXLAN), 6040 and 9601
// (ECN), 6935 and 6936 (UDP zero checksum), draft-ietf-intarea-gue (GUE), Linux
// net/ipv4/{ipip,fou_core,raw}.c.
package encap

import (
	"fmt"

	"github.com/tulle-net/tulle/tunnel/mtu"
)

// Mode is the way in which packets are sent to a peer. A node accepts all modes from
// members.
type Mode uint8

// The modes. Direct and Direct6 mean no encapsulation, but the host's own route, for
// IPv4 and for IPv6 packets: what the network lets through may differ. Both are called
// "direct"; the encapsulations carry both families.
const (
	Direct Mode = iota
	UDP
	IPIP
	VXLAN
	Direct6
)

// NumModes is the number of modes; they count from 0.
const NumModes = 5

// String is the mode's name in flags, configuration and output.
func (m Mode) String() string {
	switch m {
	case Direct, Direct6:
		return "direct"
	case UDP:
		return "udp"
	case IPIP:
		return "ipip"
	case VXLAN:
		return "vxlan"
	}
	return fmt.Sprintf("mode(%d)", uint8(m))
}

// IsDirect reports whether m is the host's own route.
func (m Mode) IsDirect() bool { return m == Direct || m == Direct6 }

// ParseMode is the inverse of [Mode.String]; "direct" gives Direct.
func ParseMode(s string) (Mode, error) {
	for m := range Mode(NumModes) {
		if m.String() == s {
			return m, nil
		}
	}
	return 0, fmt.Errorf("encap: unknown encapsulation %q: want direct, udp, ipip or vxlan", s)
}

// MarshalText is [Mode.String], for JSON and YAML.
func (m Mode) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText is [ParseMode].
func (m *Mode) UnmarshalText(b []byte) error {
	parsed, err := ParseMode(string(b))
	if err != nil {
		return err
	}
	*m = parsed
	return nil
}

// Overhead is what m puts in front of an inner packet, in bytes, the outer IP
// header (IPv6 when outer6) included: 28/48 for UDP, 20/40 for IPIP, 50/70 for VXLAN.
func Overhead(m Mode, outer6 bool) mtu.Overhead {
	ip := mtu.IPv4
	if outer6 {
		ip = mtu.IPv6
	}
	switch m {
	case UDP:
		return ip + mtu.UDP
	case IPIP:
		return ip
	case VXLAN:
		return ip + mtu.UDP + mtu.VXLAN + mtu.InnerEth
	}
	return 0
}
