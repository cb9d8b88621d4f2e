package hostnet

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
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
	left := false // some of the packets may have returned to the chain that led here
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
		case refuses && about == every && left:
			return falls, nil
		case refuses && about == every:
			w.where = c.Name
			return refused, nil
		case kind == expr.VerdictAccept || kind == expr.VerdictQueue || decidedByMap(r):
			return passes, nil
		case kind == expr.VerdictReturn:
			if about != maybe {
				return falls, nil
			}
			left = true
		case kind == expr.VerdictJump || kind == expr.VerdictGoto:
			f, err := w.follow(r, level)
			if err != nil || f == passes || w.rule != nil {
				return f, err
			}
			if about != maybe && (f == refused || kind == expr.VerdictGoto) {
				if left && f == refused {
					f = falls
				}
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
	var mask []byte // of what is loaded
	var protocol, number, some, unread bool
	for _, e := range r.Exprs {
		about := maybe
		switch e := e.(type) {
		case *expr.Meta, *expr.Payload, *expr.Ct:
			load, mask = e, nil
			continue
		case *expr.Bitwise:
			mask = e.Mask
			continue
		case *expr.Verdict, *expr.Reject, *expr.Counter, *expr.Log, *expr.Immediate, *expr.Target:
			continue
		case *expr.Cmp:
			about = w.compares(fieldOf(load), e, mask)
			unread = unread || e.Op == expr.CmpOpNeq && fieldOf(load) == fieldAddress
		case *expr.Lookup:
			var err error
			if about, err = w.looksUp(fieldOf(load), e); err != nil {
				return none, err
			}
			unread = unread || e.Invert && fieldOf(load) == fieldAddress
		case *expr.Match: // extensions of iptables
			if e.Name == "comment" {
				continue
			}
			load, about = nil, w.extension(e)
			if about == every {
				continue
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

// state is how connection tracking sees the first of the port's packets: those of the tunnel are not tracked between members (nft_rules.go).
// The bits are those of nftables (net/netfilter/nft_ct.c, include/uapi/linux/netfilter/nf_conntrack_common.h).
func (w *weigher) state() uint32 {
	if w.port.Number != 0 && w.port.Number == w.outer.Gossip {
		return stateNew
	}
	return stateUntracked
}

const stateNew, stateUntracked = 8, 64

// In xt_conntrack.h; xt_state.h has the bits of nftables.
const xtUntracked = 256

// extension weighs a match of iptables. Of connection tracking it reads the state.
func (w *weigher) extension(e *expr.Match) reach {
	is := w.state()
	switch info := e.Info.(type) {
	case *xt.ConntrackMtinfo3:
		return conntrack(info.MatchFlags, info.InvertFlags, info.StateMask, is)
	case *xt.ConntrackMtinfo2:
		return conntrack(info.MatchFlags, info.InvertFlags, info.StateMask, is)
	case *xt.ConntrackMtinfo1:
		return conntrack(info.MatchFlags, info.InvertFlags, uint16(info.StateMask), is)
	case *xt.Unknown:
		if e.Name == "state" && len(*info) >= 4 {
			return when(binary.NativeEndian.Uint32(*info)&is != 0)
		}
	}
	return maybe
}

// conntrack weighs a match of that name, as xt_conntrack.h has it, for packets of one state.
func conntrack(match, invert, mask uint16, state uint32) reach {
	const ofState = uint16(xt.ConntrackState)
	if state == stateUntracked {
		state = xtUntracked
	}
	switch {
	case match&ofState == 0:
		return none // NAT, or other properties of a connection that has begun
	case (uint32(mask)&state != 0) == (invert&ofState != 0):
		return none
	case match&^(ofState|uint16(xt.ConntrackStateAlias)) != 0:
		return maybe
	}
	return every
}

// compares weighs one comparison; mask is what counts of what was loaded, nil: all.
func (w *weigher) compares(what field, e *expr.Cmp, mask []byte) reach {
	switch equal := e.Op == expr.CmpOpEq; {
	case what == fieldState && len(mask) == 4: // those of a mask, or none of them
		has := binary.NativeEndian.Uint32(mask)&w.state() != 0
		return when(has != equal)
	case what == fieldState && len(e.Data) == 4:
		return when((binary.NativeEndian.Uint32(e.Data) == w.state()) == equal)
	case what == fieldStatus:
		return none
	case what == fieldLink && equal && len(e.Data) == 4:
		return w.index(binary.NativeEndian.Uint32(e.Data))
	case what == fieldPorts && equal && len(e.Data) == 4: // of the source and the destination
		if w.port.Number == 0 || binary.BigEndian.Uint16(e.Data[2:]) != w.port.Number {
			return none
		}
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

// index weighs the index of an interface.
func (w *weigher) index(i uint32) reach {
	if i == 1 { // lo, in every network namespace (net/core/dev.c, LOOPBACK_IFINDEX)
		return none
	}
	l, err := net.InterfaceByIndex(int(i))
	if err != nil {
		return maybe
	}
	return w.interfaces(append([]byte(l.Name), 0))
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
	if what == fieldStatus {
		return none, nil
	}
	if what != fieldProto && what != fieldPort && what != fieldState || e.Invert || e.IsDestRegSet && what != fieldState {
		return maybe, nil
	}
	set, err := w.conn.GetSetByName(w.base.Table, e.SetName)
	if err != nil {
		return none, fmt.Errorf("hostnet: read the nftables set %s of table %s: %w", e.SetName, w.base.Table.Name, err)
	}
	if set.Interval || set.IsMap && what != fieldState || set.Concatenation {
		return maybe, nil
	}
	elements, err := w.conn.GetSetElements(set)
	if err != nil {
		return none, fmt.Errorf("hostnet: read the elements of the nftables set %s of table %s: %w", e.SetName, w.base.Table.Name, err)
	}
	size := map[field]int{fieldProto: 1, fieldPort: 2, fieldState: 4}[what]
	for _, el := range elements {
		if len(el.Key) != size { // of several fields together
			return maybe, nil
		}
		if what == fieldState && binary.NativeEndian.Uint32(el.Key) == w.state() {
			return every, nil
		}
		if what == fieldProto && el.Key[0] == w.port.Proto ||
			what == fieldPort && w.port.Number != 0 && binary.BigEndian.Uint16(el.Key) == w.port.Number {
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
	fieldState  // of a connection
	fieldStatus // of a connection that has begun, or that is translated
	fieldLink   // index of an interface
	fieldPorts  // of source and destination
)

// fieldOf is what was loaded into a register.
func fieldOf(load expr.Any) field {
	switch l := load.(type) {
	case *expr.Ct:
		switch l.Key {
		case expr.CtKeySTATE:
			return fieldState
		case expr.CtKeySTATUS:
			return fieldStatus
		}
	case *expr.Meta:
		switch l.Key {
		case expr.MetaKeyL4PROTO:
			return fieldProto
		case expr.MetaKeyIIFNAME, expr.MetaKeyOIFNAME:
			return fieldInterface
		case expr.MetaKeyIIF, expr.MetaKeyOIF:
			return fieldLink
		case expr.MetaKeyNFPROTO:
			return fieldFamily
		}
	case *expr.Payload:
		switch {
		case l.Base == expr.PayloadBaseTransportHeader && l.Offset == 2 && l.Len == 2:
			return fieldPort
		case l.Base == expr.PayloadBaseTransportHeader && l.Offset == 0 && l.Len == 4:
			return fieldPorts
		case l.Base == expr.PayloadBaseNetworkHeader && l.Len == 1 && (l.Offset == 9 || l.Offset == 6): // IPv4's protocol, IPv6's next header
			return fieldProto
		case l.Base == expr.PayloadBaseNetworkHeader:
			return fieldAddress
		}
	}
	return fieldUnread
}
