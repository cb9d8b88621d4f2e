package hostnet

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// weigher follows one port's packets through a base chain and the chains that its rules lead to.
type weigher struct {
	conn   *nftables.Conn
	base   *nftables.Chain
	chains []*nftables.Chain
	outer  Outer
	port   Port

	rule  *nftables.Rule // that names the port and refuses it
	where string         // the chain with that rule, or the one that refuses what no rule accepted
}

// fate is what becomes of the packets in a chain.
type fate int

const (
	falls   fate = iota // the chain that led here decides
	passes              // they are accepted, or may be
	refused             // they are dropped or rejected
)

// reach says which of the port's packets a rule is about.
type reach int

const (
	none   reach = iota
	maybe        // some of them, or it depends on something that is not read here
	every        // every packet
	byPort       // it names the port
)

// mostLevels is more than the kernel allows of chains that lead to each other (NFT_JUMP_STACK_SIZE).
const mostLevels = 16

// firewalld is the name of firewalld's table.
const firewalld = "firewalld"

// blocked reports whether the base chain refuses the port's packets, and what mends it.
func (w *weigher) blocked() (Problem, bool, error) {
	f, err := w.chain(w.base, 0)
	if err != nil {
		return Problem{}, false, err
	}
	if f == falls && w.base.Policy != nil && *w.base.Policy == nftables.ChainPolicyDrop {
		f, w.where = refused, w.base.Name
	}
	if f != refused {
		return Problem{}, false, nil
	}
	table := familyName(w.base.Table.Family) + " " + w.base.Table.Name
	if w.rule != nil {
		way := "arrives"
		if *w.base.Hooknum == *nftables.ChainHookOutput {
			way = "is sent"
		}
		remedy := fmt.Sprintf("nft delete rule %s %s handle %d", table, w.where, w.rule.Handle)
		pr := Problem{What: fmt.Sprintf("nftables chain %s %s drops what %s by %v (rule with handle %d)", table, w.where, way, w.port, w.rule.Handle), Remedy: remedy, Command: remedy}
		if w.base.Table.Name == firewalld {
			pr.Remedy, pr.Command = "remove that rule from firewalld; `firewall-cmd --list-all-zones` shows it", ""
		}
		return pr, true, nil
	}
	remedy := fmt.Sprintf("nft insert rule %s %s %s accept", table, w.base.Name, w.port.match())
	if w.base.Table.Name == firewalld {
		remedy = w.firewallCmd()
	}
	return Problem{What: fmt.Sprintf("nftables chain %s %s drops what no rule accepts, and none names %v", table, w.where, w.port), Remedy: remedy, Command: remedy}, true, nil
}

// firewallCmd accepts the port in the zone whose chain refused it, or else in the default zone.
func (w *weigher) firewallCmd() string {
	zone := ""
	if z, ok := strings.CutPrefix(w.where, "filter_IN_"); ok {
		zone = " --zone=" + z
	}
	add := fmt.Sprintf("--add-protocol=%d", w.port.Proto) // by its number: the protocol with the name ipip is 94
	if w.port.Number != 0 {
		add = fmt.Sprintf("--add-port=%d/%s", w.port.Number, map[uint8]string{6: "tcp", 17: "udp"}[w.port.Proto])
	}
	return fmt.Sprintf("firewall-cmd --permanent%s %s && firewall-cmd --reload", zone, add)
}

// chain weighs the rules of a chain in their order.
func (w *weigher) chain(c *nftables.Chain, level int) (fate, error) {
	if level > mostLevels {
		return passes, nil
	}
	rules, err := w.conn.GetRules(c.Table, c)
	if err != nil {
		return passes, fmt.Errorf("hostnet: list the rules of nftables chain %s %s: %w", c.Table.Name, c.Name, err)
	}
	for _, r := range rules {
		about, err := w.concerns(r)
		if err != nil {
			return passes, err
		}
		kind, rejects, _ := verdict(r)
		refuses := kind == expr.VerdictDrop || rejects
		switch {
		case about == none:
		case refuses && about == byPort:
			w.rule, w.where = r, c.Name
			return refused, nil
		case refuses && about == every:
			w.where = c.Name
			return refused, nil
		case kind == expr.VerdictAccept || kind == expr.VerdictQueue || decidedByMap(r):
			return passes, nil
		case kind == expr.VerdictReturn && about != maybe:
			return falls, nil
		case kind == expr.VerdictJump || kind == expr.VerdictGoto:
			f, err := w.follow(r, level)
			if err != nil || f == passes || w.rule != nil {
				return f, err
			}
			if about != maybe && (f == refused || kind == expr.VerdictGoto) {
				return f, nil
			}
		}
	}
	return falls, nil
}

// follow weighs the chain that a rule leads to.
func (w *weigher) follow(r *nftables.Rule, level int) (fate, error) {
	name := ""
	for _, e := range r.Exprs {
		if v, ok := e.(*expr.Verdict); ok {
			name = v.Chain
		}
	}
	i := slices.IndexFunc(w.chains, func(c *nftables.Chain) bool {
		return c.Name == name && c.Table.Name == w.base.Table.Name && c.Table.Family == w.base.Table.Family
	})
	if i < 0 {
		return passes, nil // made since the chains were listed
	}
	return w.chain(w.chains[i], level+1)
}

// decidedByMap reports whether a rule takes its verdict from a map, which is not read here.
func decidedByMap(r *nftables.Rule) bool {
	return slices.ContainsFunc(r.Exprs, func(e expr.Any) bool {
		l, ok := e.(*expr.Lookup)
		return ok && l.IsDestRegSet && l.DestRegister == 0
	})
}

// concerns says which of the port's packets that come from other hosts, or go to them, a rule is about.
func (w *weigher) concerns(r *nftables.Rule) (reach, error) {
	var load expr.Any
	var protocol, number, some, unread bool
	for _, e := range r.Exprs {
		about := maybe
		switch e := e.(type) {
		case *expr.Meta, *expr.Payload, *expr.Ct:
			load = e
			continue
		case *expr.Verdict, *expr.Reject, *expr.Counter, *expr.Log, *expr.Immediate, *expr.Bitwise:
			continue
		case *expr.Cmp:
			about = w.compares(fieldOf(load), e)
		case *expr.Lookup:
			var err error
			if about, err = w.looksUp(fieldOf(load), e); err != nil {
				return none, err
			}
		case *expr.Match: // extensions of iptables
			load = nil
			if e.Name == "conntrack" || e.Name == "state" {
				about = none
			}
		default:
			load = nil
		}
		switch what := fieldOf(load); {
		case about == none:
			return none, nil
		case about == maybe:
			some, unread = true, unread || what == fieldUnread
		case what == fieldProto:
			protocol = true
		case what == fieldPort:
			number = true
		}
	}
	switch {
	case protocol && (number || w.port.Number == 0) && !unread:
		return byPort, nil
	case some:
		return maybe, nil
	}
	return every, nil // a rule about the whole protocol included
}

// compares weighs one comparison.
func (w *weigher) compares(what field, e *expr.Cmp) reach {
	switch equal := e.Op == expr.CmpOpEq; {
	case what == fieldState:
		return none // whatever state it is, it is not how a connection begins
	case what == fieldProto && equal && len(e.Data) >= 1:
		return when(e.Data[0] == w.port.Proto)
	case what == fieldPort && equal && len(e.Data) == 2:
		return when(w.port.Number != 0 && binary.BigEndian.Uint16(e.Data) == w.port.Number)
	case what == fieldInterface && equal:
		return w.interfaces(e.Data)
	case what == fieldAddress && equal && slices.ContainsFunc(w.outer.Pods, func(p netip.Prefix) bool { return isPrefix(e.Data, p) }):
		return none
	}
	return maybe
}

func when(equal bool) reach {
	if equal {
		return every
	}
	return none
}

// interfaces weighs the name of an interface; one without its final zero is the beginning of a name.
func (w *weigher) interfaces(data []byte) reach {
	text, _, whole := bytes.Cut(data, []byte{0})
	name := string(text)
	if whole && name == "lo" {
		return none
	}
	if len(w.outer.Links) == 0 {
		return maybe
	}
	n := 0
	for _, l := range w.outer.Links {
		if l == name || !whole && strings.HasPrefix(l, name) {
			n++
		}
	}
	switch n {
	case 0:
		return none
	case len(w.outer.Links):
		return every
	}
	return maybe
}

// looksUp weighs a set of protocols or ports. Ranges and maps are not read.
func (w *weigher) looksUp(what field, e *expr.Lookup) (reach, error) {
	if what == fieldState {
		return none, nil
	}
	if what != fieldProto && what != fieldPort || e.Invert || e.IsDestRegSet {
		return maybe, nil
	}
	set, err := w.conn.GetSetByName(w.base.Table, e.SetName)
	if err != nil {
		return none, fmt.Errorf("hostnet: read the nftables set %s of table %s: %w", e.SetName, w.base.Table.Name, err)
	}
	if set.Interval || set.IsMap {
		return maybe, nil
	}
	elements, err := w.conn.GetSetElements(set)
	if err != nil {
		return none, fmt.Errorf("hostnet: read the elements of the nftables set %s of table %s: %w", e.SetName, w.base.Table.Name, err)
	}
	for _, el := range elements {
		if what == fieldProto && len(el.Key) >= 1 && el.Key[0] == w.port.Proto ||
			what == fieldPort && len(el.Key) >= 2 && w.port.Number != 0 && binary.BigEndian.Uint16(el.Key) == w.port.Number {
			return every, nil
		}
	}
	return none, nil
}

// isPrefix reports whether a comparison is with that prefix. Whole bytes are compared alone, other lengths with the full address after a mask.
func isPrefix(data []byte, p netip.Prefix) bool {
	network := p.Masked().Addr().AsSlice()
	return bytes.Equal(data, network) || p.Bits()%8 == 0 && bytes.Equal(data, network[:p.Bits()/8])
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
		if l.Key == expr.CtKeySTATE || l.Key == expr.CtKeySTATUS {
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
