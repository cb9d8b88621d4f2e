package hostnet

import (
	"bytes"
	"errors"
	"fmt"
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
		how := ""
		if c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop {
			how = "has the policy drop"
		} else if n := len(rules); n > 0 && refusesAll(rules[n-1]) {
			how = "refuses in its last rule what none before accepted"
		}
		if how == "" || slices.ContainsFunc(rules, acceptsAll) {
			continue
		}
		missing, err := unhandled(conn, chains, c.Table, tun, clusterCIDRs)
		if err != nil {
			return nil, err
		}
		if len(missing) > 0 {
			remedy := forwardRemedy(c, tun, missing)
			out = append(out, Problem{
				What:    fmt.Sprintf("nftables chain %s %s %s on the forward hook %s and does not name %s: pods' packets are dropped", familyName(c.Table.Family), c.Table.Name, c.Name, how, strings.Join(missing, ", ")),
				Remedy:  remedy,
				Command: remedy,
			})
		}
	}
	legacy, err := legacyForward(tun, clusterCIDRs)
	return append(out, legacy...), err
}

// unhandled says of what the table's chains should let pass, and have no rule about: the TUN device or the cluster, one of which is
// enough. firewalld decides by a packet's source or by the interface by which it comes, and pods' packets come by the pods' own
// links: so there it is each of them.
func unhandled(conn *nftables.Conn, chains []*nftables.Chain, table *nftables.Table, tun string, clusters []netip.Prefix) (missing []string, err error) {
	var all []*nftables.Rule
	for _, c := range chains {
		if c.Table.Name != table.Name || c.Table.Family != table.Family {
			continue
		}
		rules, err := conn.GetRules(c.Table, c)
		if err != nil {
			return nil, fmt.Errorf("hostnet: list the rules of nftables chain %s %s: %w", c.Table.Name, c.Name, err)
		}
		all = append(all, rules...)
	}
	if !slices.ContainsFunc(all, func(r *nftables.Rule) bool { return lets(r, tun, nil) }) {
		missing = append(missing, tun)
	}
	for _, p := range clusters {
		if !slices.ContainsFunc(all, func(r *nftables.Rule) bool { return lets(r, "", []netip.Prefix{p}) }) {
			missing = append(missing, p.Masked().String())
		}
	}
	if table.Name != firewalld && len(missing) < 1+len(clusters) {
		return nil, nil
	}
	return missing, nil
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

func forwardRemedy(c *nftables.Chain, tun string, missing []string) string {
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
	case c.Table.Name == "filter" && c.Name == "FORWARD": // iptables-nft's names
		tool := "iptables"
		if c.Table.Family == nftables.TableFamilyIPv6 {
			tool = "ip6tables"
		}
		return fmt.Sprintf("%s -I FORWARD -i %s -j ACCEPT && %s -I FORWARD -o %s -j ACCEPT", tool, tun, tool, tun)
	default:
		chain := fmt.Sprintf("%s %s %s", familyName(c.Table.Family), c.Table.Name, c.Name)
		return fmt.Sprintf(`nft insert rule %s iifname "%s" accept && nft insert rule %s oifname "%s" accept`, chain, tun, chain, tun)
	}
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

func acceptsAll(r *nftables.Rule) bool {
	kind, _, matches := verdict(r)
	return !matches && kind == expr.VerdictAccept
}

// lets reports whether a rule names the TUN device or the cluster and does not refuse:
// accepts, or leads to another chain, as firewalld's zones do.
func lets(r *nftables.Rule, tun string, clusters []netip.Prefix) bool {
	kind, rejects, _ := verdict(r)
	switch kind {
	case expr.VerdictAccept, expr.VerdictJump, expr.VerdictGoto:
	default:
		return false
	}
	if rejects {
		return false
	}
	for _, e := range r.Exprs {
		c, ok := e.(*expr.Cmp)
		if !ok || c.Op != expr.CmpOpEq {
			continue
		}
		if name := append([]byte(tun), 0); tun != "" && (bytes.HasPrefix(c.Data, name) || string(c.Data) == tun) {
			return true
		}
		for _, p := range clusters {
			if isPrefix(c.Data, p) {
				return true
			}
		}
	}
	return false
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
