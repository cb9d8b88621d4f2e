package hostnet

import (
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
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

// PortProblems lists the rules of this host's own firewall, on the hooks input and output of nftables and iptables-legacy in the calling thread's
// network namespace, that drop what the hosts of the cluster send each other: rules that name a port and refuse it, and chains
// that refuse what no rule accepts, where none names the port. Rules that it cannot weigh, such as those with sets of ports,
// count as letting everything pass: it reports no block that is none.
func PortProblems(ports []Port) ([]Problem, error) {
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
		input := *c.Hooknum == *nftables.ChainHookInput
		if !input && *c.Hooknum != *nftables.ChainHookOutput {
			continue
		}
		switch c.Table.Family {
		case nftables.TableFamilyINet, nftables.TableFamilyIPv4, nftables.TableFamilyIPv6:
		default:
			continue
		}
		rules, err := conn.GetRules(c.Table, c)
		if err != nil {
			return nil, fmt.Errorf("hostnet: list the rules of nftables chain %s %s: %w", c.Table.Name, c.Name, err)
		}
		for _, p := range ports {
			if pr, found := portBlocked(c, rules, p); found {
				out = append(out, pr)
			}
		}
	}
	legacy, err := legacyPorts(ports)
	return append(out, legacy...), err
}

// portBlocked weighs one chain for one port.
func portBlocked(c *nftables.Chain, rules []*nftables.Rule, p Port) (Problem, bool) {
	chain := fmt.Sprintf("%s %s %s", familyName(c.Table.Family), c.Table.Name, c.Name)
	way := "arrives"
	if *c.Hooknum == *nftables.ChainHookOutput {
		way = "is sent"
	}
	for _, r := range rules {
		kind, rejects, matches := verdict(r)
		refuses := kind == expr.VerdictDrop || rejects
		switch names, certain := concerns(r, p); {
		case names && refuses:
			remedy := fmt.Sprintf("nft delete rule %s handle %d", chain, r.Handle)
			return Problem{What: fmt.Sprintf("nftables chain %s drops what %s by %v (rule with handle %d)", chain, way, p, r.Handle),
				Remedy: remedy, Command: remedy}, true
		case kind == expr.VerdictContinue || kind == expr.VerdictReturn || refuses:
		case names || !certain || !matches:
			return Problem{}, false // it passes, or may pass
		}
	}
	drops := c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop || len(rules) > 0 && refusesAll(rules[len(rules)-1])
	if !drops {
		return Problem{}, false
	}
	remedy := fmt.Sprintf("nft insert rule %s %s accept", chain, p.match())
	return Problem{What: fmt.Sprintf("nftables chain %s drops what no rule accepts, and none names %v", chain, p), Remedy: remedy, Command: remedy}, true
}

// concerns reports whether a rule is about all packets to the port that reach this host from others, or names it for some of them;
// certain is false if the rule may be about them, because of something that is not read here.
func concerns(r *nftables.Rule, p Port) (names, certain bool) {
	var load expr.Any
	var protocol, number, some, unread bool
	for _, e := range r.Exprs {
		switch e := e.(type) {
		case *expr.Meta, *expr.Payload, *expr.Ct:
			load = e
		case *expr.Cmp:
			equal := e.Op == expr.CmpOpEq
			switch what := fieldOf(load); {
			case what == fieldState:
				return false, true // whatever state it is, it is not how a connection begins
			case what == fieldProto && equal && len(e.Data) >= 1:
				if e.Data[0] != p.Proto {
					return false, true
				}
				protocol = true
			case what == fieldPort && equal && len(e.Data) == 2:
				if p.Number == 0 || binary.BigEndian.Uint16(e.Data) != p.Number {
					return false, true
				}
				number = true
			case what == fieldInterface && equal && strings.HasPrefix(string(e.Data), "lo\x00"):
				return false, true
			case what == fieldFamily:
			case what == fieldInterface, what == fieldAddress:
				some = true
			default:
				unread = true
			}
		case *expr.Verdict, *expr.Reject, *expr.Counter, *expr.Log, *expr.Immediate, *expr.Bitwise:
		default:
			unread = true // sets, ranges, extensions of iptables
		}
	}
	if unread {
		return false, false
	}
	if protocol && (number || p.Number == 0) {
		return true, true
	}
	return false, !protocol && !some
}

type field int

const (
	fieldUnread field = iota
	fieldProto
	fieldPort
	fieldInterface
	fieldAddress
	fieldFamily
	fieldState
)

// fieldOf is what was loaded into a register.
func fieldOf(load expr.Any) field {
	switch l := load.(type) {
	case *expr.Ct:
		if l.Key == expr.CtKeySTATE {
			return fieldState
		}
	case *expr.Meta:
		switch l.Key {
		case expr.MetaKeyL4PROTO:
			return fieldProto
		case expr.MetaKeyIIFNAME, expr.MetaKeyOIFNAME:
			return fieldInterface
		case expr.MetaKeyIIF, expr.MetaKeyOIF:
			return fieldAddress
		case expr.MetaKeyNFPROTO:
			return fieldFamily
		}
	case *expr.Payload:
		switch {
		case l.Base == expr.PayloadBaseTransportHeader && l.Offset == 2 && l.Len == 2:
			return fieldPort
		case l.Base == expr.PayloadBaseNetworkHeader && l.Len == 1 && (l.Offset == 9 || l.Offset == 6): // IPv4's protocol, IPv6's next header
			return fieldProto
		case l.Base == expr.PayloadBaseNetworkHeader:
			return fieldAddress
		}
	}
	return fieldUnread
}
