package hostnet

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// ForwardProblems lists the firewall chains on the forward hook of the calling thread's network namespace that drop pods'
// packets: chains with policy drop, or with a last rule that drops or rejects everything, and without a rule about the TUN
// device or the cluster. An accept rule in our own table cannot help, because a packet has to pass all chains.
//
// It reads nftables, and so iptables-nft and firewalld, and the tables of iptables-legacy.
func ForwardProblems(tun string, clusterCIDRs []netip.Prefix) ([]Problem, error) {
	conn, chains, err := listChains()
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.CloseLasting() }()
	var out []Problem
	for _, c := range chains {
		if c.Hooknum == nil || *c.Hooknum != *nftables.ChainHookForward || c.Type != nftables.ChainTypeFilter {
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
		concerned := ofFamily(clusterCIDRs, c.Table.Family != nftables.TableFamilyIPv6, c.Table.Family != nftables.TableFamilyIPv4)
		if len(concerned) == 0 && len(clusterCIDRs) > 0 {
			continue // no pod has addresses of this family
		}
		how := ""
		if c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop {
			how = "has the policy drop"
		} else if n := len(rules); n > 0 && refusesAll(rules[n-1]) {
			how = "refuses in its last rule what none before accepted"
		}
		if how == "" {
			continue
		}
		if passes, err := acceptsAll(conn, c, rules, 0); err != nil {
			return nil, err
		} else if passes {
			continue
		}
		all, err := reachable(conn, chains, c)
		if err != nil {
			return nil, err
		}
		missing := unhandled(conn, all, c.Table.Name == firewalld, tun, concerned)
		if len(missing) > 0 {
			concerned = slices.DeleteFunc(concerned, func(p netip.Prefix) bool { return !slices.Contains(missing, p.Masked().String()) })
			out = append(out, dropsPods(fmt.Sprintf("nftables chain %s %s %s on the forward hook %s and does not name %s", familyName(c.Table.Family), c.Table.Name, c.Name, how, strings.Join(missing, ", ")),
				forwardRemedy(c, tun, concerned, missing)))
		}
	}
	legacy, err := legacyForward(tun, clusterCIDRs)
	return append(out, legacy...), err
}

// dropsPods is the problem of a chain that drops pods' packets; command is "" where the cluster's prefixes are not known yet.
func dropsPods(what, command string) Problem {
	p := Problem{What: what + ": pods' packets are dropped", Remedy: command, Command: command}
	if command == "" {
		p.Remedy = "accept packets from and to cluster_cidr there"
	}
	return p
}

// unhandled says of what the rules should let pass, and none is about: each prefix of the cluster, or the TUN device, by which pods of other hosts
// come. firewalld decides by a packet's source or by the interface by which it comes, and pods' packets come by the pods' own
// links: so there it is each of them.
func unhandled(conn *nftables.Conn, rules []*nftables.Rule, byZone bool, tun string, clusters []netip.Prefix) (missing []string) {
	throughTun := slices.ContainsFunc(rules, func(r *nftables.Rule) bool { return lets(conn, r, tun, netip.Prefix{}) })
	if throughTun && !byZone {
		return nil
	}
	for _, p := range clusters {
		if !slices.ContainsFunc(rules, func(r *nftables.Rule) bool { return lets(conn, r, "", p) }) {
			missing = append(missing, p.Masked().String())
		}
	}
	if !throughTun && (byZone || len(missing) == len(clusters)) {
		missing = slices.Insert(missing, 0, tun)
	}
	return missing
}

// reachable are the rules of a chain and of those that it leads to. Where a map decides which these are, they are all of the table's.
func reachable(conn *nftables.Conn, chains []*nftables.Chain, base *nftables.Chain) (all []*nftables.Rule, err error) {
	ours := slices.DeleteFunc(slices.Clone(chains), func(c *nftables.Chain) bool {
		return c.Table.Name != base.Table.Name || c.Table.Family != base.Table.Family
	})
	names := []string{base.Name}
	for i := 0; i < len(names); i++ {
		at := slices.IndexFunc(ours, func(c *nftables.Chain) bool { return c.Name == names[i] })
		if at < 0 {
			continue // made since the chains were listed
		}
		rules, err := conn.GetRules(ours[at].Table, ours[at])
		if err != nil {
			return nil, fmt.Errorf("hostnet: list the rules of nftables chain %s %s: %w", ours[at].Table.Name, ours[at].Name, err)
		}
		all = append(all, rules...)
		for _, r := range rules {
			var next []string
			for _, e := range r.Exprs {
				if v, ok := e.(*expr.Verdict); ok && v.Chain != "" {
					next = append(next, v.Chain)
				}
			}
			if decidedByMap(r) {
				for _, c := range ours {
					next = append(next, c.Name)
				}
			}
			for _, n := range next {
				if !slices.Contains(names, n) {
					names = append(names, n)
				}
			}
		}
	}
	return all, nil
}

func familyName(f nftables.TableFamily) string {
	switch f {
	case nftables.TableFamilyIPv4:
		return "ip"
	case nftables.TableFamilyIPv6:
		return "ip6"
	default:
		return "inet"
	}
}

// ofFamily are the IPv4 prefixes, the IPv6 ones, or both.
func ofFamily(prefixes []netip.Prefix, v4, v6 bool) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(prefixes), func(p netip.Prefix) bool { return p.Addr().Is4() && !v4 || p.Addr().Is6() && !v6 })
}

func forwardRemedy(c *nftables.Chain, tun string, clusters []netip.Prefix, missing []string) string {
	switch {
	case c.Table.Name == firewalld:
		var commands []string
		for _, m := range missing { // firewall-cmd takes interfaces and sources only apart
			kind := "source"
			if m == tun {
				kind = "interface"
			}
			commands = append(commands, fmt.Sprintf("firewall-cmd --permanent --zone=trusted --add-%s=%s", kind, m))
		}
		return strings.Join(append(commands, "firewall-cmd --reload"), " && ")
	case c.Table.Name == "filter" && c.Name == "FORWARD" && c.Table.Family != nftables.TableFamilyINet: // iptables-nft's names
		tool := "iptables"
		if c.Table.Family == nftables.TableFamilyIPv6 {
			tool = "ip6tables"
		}
		return iptablesRemedy(tool, clusters)
	default:
		chain := fmt.Sprintf("%s %s %s", familyName(c.Table.Family), c.Table.Name, c.Name)
		var commands []string
		for _, p := range clusters {
			proto := "ip"
			if p.Addr().Is6() {
				proto = "ip6"
			}
			for _, end := range []string{"saddr", "daddr"} {
				commands = append(commands, fmt.Sprintf("nft insert rule %s %s %s %s accept", chain, proto, end, p.Masked()))
			}
		}
		return strings.Join(commands, " && ")
	}
}

// iptablesRemedy lets all packets of pods pass: through the tunnel and past it, between pods of this host, and to the outside. Rules
// about the TUN device would do so for the tunnel only.
func iptablesRemedy(tool string, clusters []netip.Prefix) string {
	var commands []string
	for _, p := range clusters {
		commands = append(commands, fmt.Sprintf("%s -I FORWARD -s %s -j ACCEPT && %[1]s -I FORWARD -d %[2]s -j ACCEPT", tool, p.Masked()))
	}
	return strings.Join(commands, " && ")
}

// verdict gives a rule's end, and whether anything in it narrows the packets.
func verdict(r *nftables.Rule) (kind expr.VerdictKind, rejects, matches bool) {
	kind = expr.VerdictContinue
	for _, e := range r.Exprs {
		switch e := e.(type) {
		case *expr.Verdict:
			kind = e.Kind
		case *expr.Reject:
			rejects = true
		case *expr.Target: // of iptables
			rejects = rejects || e.Name == "REJECT"
		case *expr.Match:
			matches = matches || e.Name != "comment"
		case *expr.Counter, *expr.Log, *expr.Meta, *expr.Payload, *expr.Immediate:
		default:
			matches = true // compares, lookups, limits, xtables matches
		}
	}
	return kind, rejects, matches
}

func refusesAll(r *nftables.Rule) bool {
	kind, rejects, matches := verdict(r)
	return !matches && (kind == expr.VerdictDrop || rejects)
}

// acceptsAll reports whether a chain accepts every packet, or one does to which it leads each packet, such as Docker's DOCKER-USER.
func acceptsAll(conn *nftables.Conn, c *nftables.Chain, rules []*nftables.Rule, level int) (bool, error) {
	for _, r := range rules {
		kind, rejects, matches := verdict(r)
		if matches {
			continue
		}
		switch kind {
		case expr.VerdictAccept:
			return true, nil
		case expr.VerdictReturn, expr.VerdictDrop:
			return false, nil
		case expr.VerdictJump, expr.VerdictGoto:
			to := &nftables.Chain{Table: c.Table, Name: r.Exprs[slices.IndexFunc(r.Exprs, isVerdict)].(*expr.Verdict).Chain}
			more, err := conn.GetRules(to.Table, to)
			if err != nil || level == mostLevels {
				return false, err
			}
			if passes, err := acceptsAll(conn, to, more, level+1); passes || err != nil || kind == expr.VerdictGoto {
				return passes, err
			}
		}
		if rejects {
			return false, nil
		}
	}
	return false, nil
}

func isVerdict(e expr.Any) bool { _, is := e.(*expr.Verdict); return is }

// lets reports whether a rule names the TUN device or all of a prefix, each if given, and does not refuse: accepts, or leads to another chain, as
// firewalld's zones do. Sets of addresses are not read, and count.
func lets(conn *nftables.Conn, r *nftables.Rule, tun string, prefix netip.Prefix) bool {
	kind, rejects, _ := verdict(r)
	switch kind {
	case expr.VerdictAccept, expr.VerdictJump, expr.VerdictGoto:
	default:
		if !decidedByMap(r) {
			return false
		}
	}
	if rejects {
		return false
	}
	var at operand
	for _, e := range r.Exprs {
		switch e := e.(type) {
		case *expr.Meta, *expr.Payload, *expr.Ct:
			at = operand{load: e}
		case *expr.Bitwise:
			at.mask = e.Mask
		case *expr.Cmp:
			name, _, whole := bytes.Cut(e.Data, []byte{0})
			named, isAddress := at.prefix(e.Data)
			switch {
			case e.Op != expr.CmpOpEq:
			case tun != "" && at.is(expr.MetaKeyIIFNAME, expr.MetaKeyOIFNAME) && (string(name) == tun || !whole && strings.HasPrefix(tun, string(name))):
				return true
			case prefix.IsValid() && isAddress && contains(named, prefix.Masked()):
				return true
			}
		case *expr.Lookup:
			family, isAddress := at.address()
			switch {
			case e.Invert:
			case tun != "" && at.is(expr.MetaKeyIIFNAME, expr.MetaKeyOIFNAME) && hasName(conn, r.Table, e.SetName, tun):
				return true
			case prefix.IsValid() && isAddress && family == prefix.Addr().Is4():
				return true
			}
		}
	}
	return false
}

// hasName reports whether a set of interfaces has one of that name. A set that cannot be read, or has more than names, counts as if it had.
func hasName(conn *nftables.Conn, table *nftables.Table, set, name string) bool {
	s, err := conn.GetSetByName(table, set)
	if err != nil || s.Interval || s.Concatenation {
		return true
	}
	elements, err := conn.GetSetElements(s)
	return err != nil || slices.ContainsFunc(elements, func(e nftables.SetElement) bool {
		text, _, _ := bytes.Cut(e.Key, []byte{0})
		return string(text) == name
	})
}

// operand is what a rule compares: what it has loaded, and which bits of that count (nil: all).
type operand struct {
	load expr.Any
	mask []byte
}

func (o operand) is(keys ...expr.MetaKey) bool {
	m, ok := o.load.(*expr.Meta)
	return ok && slices.Contains(keys, m.Key)
}

// address reports whether it is a source or destination address, or the beginning of one, and of IPv4.
func (o operand) address() (v4, ok bool) {
	l, is := o.load.(*expr.Payload)
	if !is || l.Base != expr.PayloadBaseNetworkHeader {
		return false, false
	}
	switch {
	case (l.Offset == ip4Src || l.Offset == ip4Dst) && l.Len <= net.IPv4len:
		return true, true
	case (l.Offset == ip6Src || l.Offset == ip6Dst) && l.Len <= net.IPv6len:
		return false, true
	}
	return false, false
}

// Offsets of the addresses in the headers of IPv4 (RFC 791) and IPv6 (RFC 8200), in bytes.
const ip4Src, ip4Dst, ip6Src, ip6Dst = 12, 16, 8, 24

// prefix is the network of which an address is, if it equals data.
func (o operand) prefix(data []byte) (netip.Prefix, bool) {
	v4, ok := o.address()
	whole := make([]byte, net.IPv6len)
	if v4 {
		whole = whole[:net.IPv4len]
	}
	if !ok || len(data) > len(whole) {
		return netip.Prefix{}, false
	}
	bits := 8 * len(data)
	if o.mask != nil {
		bits = ones(o.mask)
	}
	copy(whole, data)
	a, _ := netip.AddrFromSlice(whole)
	p, err := a.Prefix(bits)
	return p, err == nil
}

// listChains lists all nftables chains of the calling thread's network namespace. The caller closes the connection, by which their
// rules can be read.
func listChains() (*nftables.Conn, []*nftables.Chain, error) {
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return nil, nil, fmt.Errorf("hostnet: open an nftables netlink socket: %w", err)
	}
	chains, err := conn.ListChains()
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("hostnet: list the nftables chains: %w", err), conn.CloseLasting())
	}
	return conn, chains, nil
}
