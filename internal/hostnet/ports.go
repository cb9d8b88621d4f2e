package hostnet

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// Port is what the other hosts send to this one: a port of UDP or TCP, or an IP protocol.
type Port struct {
	Proto  uint8  // unix.IPPROTO_UDP and so on
	Number uint16 // destination port; 0 for a protocol without ports
}

func (p Port) String() string {
	switch p.Proto {
	case unix.IPPROTO_UDP:
		return fmt.Sprintf("UDP port %d", p.Number)
	case unix.IPPROTO_TCP:
		return fmt.Sprintf("TCP port %d", p.Number)
	}
	return fmt.Sprintf("IP protocol %d", p.Proto)
}

// match is the port in nft's language.
func (p Port) match() string {
	switch p.Proto {
	case unix.IPPROTO_UDP:
		return fmt.Sprintf("udp dport %d", p.Number)
	case unix.IPPROTO_TCP:
		return fmt.Sprintf("tcp dport %d", p.Number)
	}
	return fmt.Sprintf("meta l4proto %d", p.Proto)
}

// Outer is what the hosts of the cluster send each other, as a firewall sees it.
type Outer struct {
	Ports  []Port
	Gossip uint16         // the port whose packets are tracked; all others are not, between members
	Links  []string       // interfaces by which it arrives and leaves; none: not known
	Addrs  []netip.Addr   // this node's underlay addresses; none: not known
	Pods   []netip.Prefix // the cluster's space: no packet between hosts comes from there
}

// uses reports whether packets of that family go between hosts.
func (o *Outer) uses(v4 bool) bool {
	return len(o.Addrs) == 0 || slices.ContainsFunc(o.Addrs, func(a netip.Addr) bool { return a.Is4() == v4 })
}

// PortProblems lists the rules of this host's own firewall, on the hooks input and output of nftables and iptables-legacy in the calling thread's
// network namespace, that drop what the hosts of the cluster send each other: rules that name a port and refuse it, and chains
// that refuse what no rule accepts, where none names the port. It follows the chains that nftables rules lead to, such as firewalld's zones.
// Rules that it cannot weigh, such as those with ranges of ports, count as letting everything pass: it reports no block that is none.
func PortProblems(o Outer) ([]Problem, error) {
	conn, chains, err := listChains()
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.CloseLasting() }()
	var out []Problem
	for _, c := range chains {
		if c.Hooknum == nil || c.Type != nftables.ChainTypeFilter || c.Table.Name == Table {
			continue
		}
		if *c.Hooknum != *nftables.ChainHookInput && *c.Hooknum != *nftables.ChainHookOutput {
			continue
		}
		switch f := c.Table.Family; {
		case f == nftables.TableFamilyINet, f == nftables.TableFamilyIPv4 && o.uses(true), f == nftables.TableFamilyIPv6 && o.uses(false):
		default:
			continue
		}
		for _, p := range o.Ports {
			w := weigher{conn: conn, base: c, chains: chains, outer: o, port: p}
			pr, found, err := w.blocked()
			if err != nil {
				return nil, err
			}
			if found {
				out = append(out, pr)
			}
		}
	}
	legacy, err := legacyPorts(o)
	return append(out, legacy...), err
}
