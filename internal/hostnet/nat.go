package hostnet

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// TranslationProblems lists the rules of NAT in the calling thread's network namespace that change the source of what pods send through the tunnel to pods
// of other nodes, which then see this host in place of the pod: those of a host that masquerades whatever leaves. (Rules about an uplink change what goes
// directly, and so the probes of that path.) It names a rule only if that is certain: packets that are marked, or of connections that were redirected to a
// pod, are others' concern. It reads nftables, and so iptables-nft and firewalld.
func TranslationProblems(tun string, clusterCIDRs []netip.Prefix) ([]Problem, error) {
	conn, chains, err := listChains()
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.CloseLasting() }()
	index, err := linkIndex(tun)
	if err != nil {
		return nil, err
	}
	var out []Problem
	for _, c := range chains {
		if c.Hooknum == nil || *c.Hooknum != *nftables.ChainHookPostrouting || c.Type != nftables.ChainTypeNAT || c.Table.Family == nftables.TableFamilyINet && c.Table.Name == Table {
			continue
		}
		var at *natRule
		var changed []netip.Prefix
		for _, p := range ofFamily(clusterCIDRs, c.Table.Family != nftables.TableFamilyIPv6, c.Table.Family != nftables.TableFamilyIPv4) {
			n := natReader{conn: conn, tun: tun, index: index, pods: p}
			found, _, err := n.chain(c, 0)
			switch {
			case err != nil:
				return nil, err
			case found != nil && (at == nil || *found == *at):
				at, changed = found, append(changed, p.Masked())
			}
		}
		if at != nil {
			command := at.exempt(tun, changed)
			out = append(out, Problem{
				What: fmt.Sprintf("rule %d of nftables chain %s %s %s translates the addresses of pods' packets to other nodes' pods, which see this host's address in place of the pod's",
					at.number, familyName(at.family), at.table, at.chain),
				Remedy: command, Command: command,
			})
		}
	}
	return out, nil
}

// natRule is a rule, and where it is.
type natRule struct {
	family       nftables.TableFamily
	table, chain string
	handle       uint64
	number       int // in its chain, from 1
}

// exempt is the command that lets packets between pods pass before the rule.
func (r *natRule) exempt(tun string, pods []netip.Prefix) string {
	if r.table == firewalld {
		return fmt.Sprintf("firewall-cmd --permanent --zone=trusted --add-interface=%s && firewall-cmd --reload", tun)
	}
	var commands []string
	for _, p := range pods {
		tool, proto := "iptables", "ip"
		if p.Addr().Is6() {
			tool, proto = "ip6tables", "ip6"
		}
		if r.table == "nat" && r.family != nftables.TableFamilyINet && r.chain == "POSTROUTING" { // iptables-nft's names
			commands = append(commands, fmt.Sprintf("%s -t nat -I %s %d -s %v -d %[4]v -j ACCEPT", tool, r.chain, r.number, p))
			continue
		}
		commands = append(commands, fmt.Sprintf("nft insert rule %s %s %s position %d %s saddr %v %[5]s daddr %[6]v accept", familyName(r.family), r.table, r.chain, r.handle, proto, p))
	}
	return strings.Join(commands, " && ")
}

// natReader follows what pods of a prefix send to others of it through the tunnel.
type natReader struct {
	conn  *nftables.Conn
	tun   string
	index int
	pods  netip.Prefix
}

// chain returns the rule that translates them; done says that no later rule decides, or that nobody can tell.
func (n *natReader) chain(c *nftables.Chain, level int) (at *natRule, done bool, err error) {
	rules, err := n.conn.GetRules(c.Table, c)
	if err != nil {
		return nil, true, fmt.Errorf("hostnet: list the rules of nftables chain %s %s: %w", c.Table.Name, c.Name, err)
	}
	for i, r := range rules {
		about := n.concerns(r)
		if about == none {
			continue
		}
		if translates(r) {
			if about == every {
				return &natRule{c.Table.Family, c.Table.Name, c.Name, r.Handle, i + 1}, true, nil
			}
			continue
		}
		switch kind, _, _ := verdict(r); {
		case decidedByMap(r), kind == expr.VerdictAccept, kind == expr.VerdictDrop:
			return nil, true, nil
		case kind == expr.VerdictReturn:
			return nil, false, nil
		case kind == expr.VerdictJump || kind == expr.VerdictGoto:
			if about == maybe || level == mostLevels {
				return nil, true, nil
			}
			to := &nftables.Chain{Table: c.Table, Name: r.Exprs[slices.IndexFunc(r.Exprs, isVerdict)].(*expr.Verdict).Chain}
			if at, done, err := n.chain(to, level+1); done || err != nil || kind == expr.VerdictGoto {
				return at, done, err
			}
		}
	}
	return nil, false, nil
}

// translates reports whether a rule changes sources.
func translates(r *nftables.Rule) bool {
	for _, e := range r.Exprs {
		switch e := e.(type) {
		case *expr.Masq:
			return true
		case *expr.NAT:
			return e.Type == expr.NATTypeSourceNAT
		case *expr.Target: // of iptables
			return e.Name == "MASQUERADE" || e.Name == "SNAT"
		}
	}
	return false
}

// concerns says which of the packets a rule is about.
func (n *natReader) concerns(r *nftables.Rule) reach {
	about := every
	var at operand
	for _, e := range r.Exprs {
		is := every
		switch e := e.(type) {
		case *expr.Meta:
			if !e.SourceRegister {
				at = operand{load: e}
			}
		case *expr.Payload:
			at = operand{load: e}
		case *expr.Bitwise:
			at.mask = e.Mask
		case *expr.Cmp:
			is = n.compares(at, e)
		case *expr.Match: // of iptables
			if e.Name != "comment" {
				is = maybe
			}
		case *expr.Counter, *expr.Log, *expr.Immediate, *expr.Verdict, *expr.Target, *expr.Masq, *expr.NAT:
		default:
			is = maybe
		}
		switch {
		case is == none:
			return none
		case is == maybe:
			about = maybe
		}
	}
	return about
}

func (n *natReader) compares(at operand, e *expr.Cmp) reach {
	if e.Op != expr.CmpOpEq && e.Op != expr.CmpOpNeq {
		return maybe
	}
	is := maybe
	named, isAddress := at.prefix(e.Data)
	switch {
	case at.is(expr.MetaKeyNFPROTO) && len(e.Data) == 1:
		is = when(int(e.Data[0]) == map[bool]int{true: int(nftables.TableFamilyIPv4), false: int(nftables.TableFamilyIPv6)}[n.pods.Addr().Is4()])
	case at.is(expr.MetaKeyOIFNAME):
		name, _, whole := strings.Cut(string(e.Data), "\x00")
		is = when(name == n.tun || !whole && strings.HasPrefix(n.tun, name))
	case at.is(expr.MetaKeyOIF) && len(e.Data) == 4:
		is = when(native.Uint32(e.Data) == uint32(n.index))
	case isAddress && contains(named, n.pods.Masked()):
		is = every
	case isAddress && !named.Overlaps(n.pods):
		is = none
	}
	if e.Op == expr.CmpOpNeq && is != maybe {
		return when(is == none)
	}
	return is
}
