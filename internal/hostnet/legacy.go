package hostnet

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// The rules of iptables-legacy and ip6tables-legacy, as the kernel hands them out over a raw socket (linux/netfilter_ipv4/ip_tables.h,
// linux/netfilter_ipv6/ip6_tables.h, linux/netfilter/x_tables.h). Numbers are in the host's byte order, offsets in bytes.
const (
	iptGetInfo    = 64 // IPT_SO_GET_INFO, IP6T_SO_GET_INFO
	iptGetEntries = 65 // IPT_SO_GET_ENTRIES, IP6T_SO_GET_ENTRIES
	iptInfoLen    = 84 // name (32), valid hooks, first entries (5), policies' entries (5), count, size (4 each)
	iptInfoHook   = 36
	iptInfoPolicy = 56
	iptInfoSize   = 80
	iptHeadLen    = 40 // struct ipt_get_entries before the first entry
	iptTargetLen  = 32 // struct xt_entry_target: size (2), name (29), revision (1)
	iptName       = 32 // bytes for a table's name
	iptMost       = 16 << 20
)

// legacyLayout is where a family's struct ipt_entry has what is read of it.
type legacyLayout struct {
	names      string // file that lists the tables which exist
	tool       string
	domain     int
	level      int
	src, mask  int // source address and its mask; the destination's follow each
	addr       int // length of an address
	in, out    int // interface names, 16 bytes each
	proto      int
	inverted   int // flags that turn the meaning of the fields round
	offsets    int // target offset (2), next offset (2)
	extensions int // length of the entry before its matches
}

var legacyLayouts = []legacyLayout{
	{names: "/proc/thread-self/net/ip_tables_names", tool: "iptables-legacy", domain: unix.AF_INET, level: unix.IPPROTO_IP,
		src: 0, mask: 8, addr: 4, in: 16, out: 32, proto: 80, inverted: 83, offsets: 88, extensions: 112},
	{names: "/proc/thread-self/net/ip6_tables_names", tool: "ip6tables-legacy", domain: unix.AF_INET6, level: unix.IPPROTO_IPV6,
		src: 0, mask: 32, addr: 16, in: 64, out: 80, proto: 128, inverted: 132, offsets: 140, extensions: 168},
}

// legacyRule is a rule of a chain, as far as it matters here.
type legacyRule struct {
	proto    uint16         // IP protocol that it names; 0 for any
	ports    [2]uint16      // destination ports of it, first and last; of a rule without, all
	matches  []string       // names of its extensions
	in, out  string         // interfaces that it names
	src, dst netip.Prefix   // source and destination that it names; not valid if it names none
	inverted byte           // which of these names mean all others: the bits below
	tracked  []legacyStates // what it says about connections
	narrow   bool           // it does not match every packet
	target   string         // name of its target; "" is a verdict
	verdict  int32          // of target "": -1 drops, -2 accepts, 0 and more is a jump
}

const (
	legacyDrop   = -1
	legacyAccept = -2
	legacyReturn = -5 // XT_RETURN
)

// Bits of the byte of inverted fields (include/uapi/linux/netfilter_ipv4/ip_tables.h, IPT_INV_VIA_IN and so on; those of IPv6 are the same).
const invertedIn, invertedOut, invertedSrc, invertedDst = 1, 2, 8, 16

// legacyStates are states of a connection, with the flags of xt_conntrack.h.
type legacyStates struct{ match, invert, mask uint16 }

// legacyForward does what ForwardProblems says for the filter tables of iptables-legacy. A table that nobody has made is not looked
// at: asking for it would make it.
func legacyForward(tun string, clusters []netip.Prefix) ([]Problem, error) {
	var out []Problem
	for _, l := range legacyLayouts {
		if !l.exists() {
			continue
		}
		concerned := ofFamily(clusters, l.domain == unix.AF_INET, l.domain == unix.AF_INET6)
		if len(concerned) == 0 && len(clusters) > 0 {
			continue // no pod has addresses of this family
		}
		rules, policy, entries, err := l.chain(unix.NF_INET_FORWARD)
		if err != nil {
			return out, fmt.Errorf("hostnet: read the rules of %s: %w", l.tool, err)
		}
		how := ""
		switch {
		case policy == legacyDrop:
			how = "has the policy DROP"
		case len(rules) > 0 && rules[len(rules)-1].refusesAll():
			how = "refuses in its last rule what none before accepted"
		}
		if how == "" {
			continue
		}
		if handled, err := l.handles(entries, rules, true, tun, concerned, 0); err != nil {
			return out, fmt.Errorf("hostnet: read the rules of %s: %w", l.tool, err)
		} else if handled {
			continue
		}
		out = append(out, dropsPods(fmt.Sprintf("the FORWARD chain of %s %s and names neither %s nor the cluster", l.tool, how, tun), iptablesRemedy(l.tool, concerned)))
	}
	return out, nil
}

// handles reports whether rules, or those of a chain to which they lead, let pods' packets pass; whole says that every packet comes to these.
func (l *legacyLayout) handles(entries []byte, rules []legacyRule, whole bool, tun string, clusters []netip.Prefix, level int) (bool, error) {
	for i := range rules {
		r := &rules[i]
		if (r.narrow || whole) && r.lets(tun, clusters) {
			return true, nil
		}
		if r.target == "" && r.verdict >= 0 && level < mostLevels {
			more, err := l.user(entries, int(r.verdict))
			if err != nil {
				return false, err
			}
			if ok, err := l.handles(entries, more, whole && !r.narrow, tun, clusters, level+1); ok || err != nil {
				return ok, err
			}
		}
		if !r.narrow && (r.refusesAll() || r.target == "" && r.verdict == legacyReturn) {
			return false, nil // no packet comes to the next rules
		}
	}
	return false, nil
}

// exists reports whether the family's filter table exists in this namespace.
func (l *legacyLayout) exists() bool {
	b, err := os.ReadFile(l.names)
	if err != nil {
		return false // no such module
	}
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		if strings.TrimSpace(s.Text()) == "filter" {
			return true
		}
	}
	return false
}

// chain reads the rules of the filter table's chain on a hook, its policy, and the entries of all chains.
func (l *legacyLayout) chain(hook int) (rules []legacyRule, policy int32, entries []byte, err error) {
	fd, err := sys.Socket(l.domain, unix.SOCK_RAW, unix.IPPROTO_RAW)
	if err != nil {
		return nil, 0, nil, err
	}
	defer sys.Close(fd)
	info := make([]byte, iptInfoLen)
	copy(info, "filter")
	if _, err := sys.GetBytes(fd, l.level, iptGetInfo, info); err != nil {
		return nil, 0, nil, err
	}
	number := func(b []byte, at int) int { return int(binary.NativeEndian.Uint32(b[at:])) }
	size := number(info, iptInfoSize)
	if size < 0 || size > iptMost {
		return nil, 0, nil, fmt.Errorf("a table of %d bytes, the limit is %d", size, iptMost)
	}
	b := make([]byte, iptHeadLen+size)
	copy(b, "filter")
	binary.NativeEndian.PutUint32(b[iptName:], uint32(size))
	if _, err := sys.GetBytes(fd, l.level, iptGetEntries, b); err != nil {
		return nil, 0, nil, err // EAGAIN: somebody has changed it in between
	}
	entries = b[iptHeadLen:]
	rules, policy, err = l.parse(entries, number(info, iptInfoHook+4*hook), number(info, iptInfoPolicy+4*hook))
	return rules, policy, entries, err
}

var errLegacy = errors.New("its layout is not the one that Tulle knows")

// parse reads the entries from the offset first to last, which is the policy.
func (l *legacyLayout) parse(b []byte, first, last int) (rules []legacyRule, policy int32, err error) {
	for at := first; ; {
		if at > last {
			return nil, 0, errLegacy
		}
		r, next, err := l.entry(b, at)
		if err != nil {
			return nil, 0, err
		}
		if at == last {
			return rules, r.verdict, nil
		}
		rules, at = append(rules, r), next
	}
}

// user reads the entries of a chain that rules lead to, from the offset of its first one. The next chain, and the table's end, begin with an entry
// whose target is ERROR.
func (l *legacyLayout) user(b []byte, first int) (rules []legacyRule, err error) {
	for at := first; ; {
		r, next, err := l.entry(b, at)
		if err != nil || r.target == "ERROR" {
			return rules, err
		}
		rules, at = append(rules, r), next
	}
}

// entry reads the entry at an offset, and says where the next one is.
func (l *legacyLayout) entry(b []byte, at int) (r legacyRule, next int, err error) {
	if at < 0 || at+l.extensions > len(b) {
		return r, 0, errLegacy
	}
	e := b[at:]
	target, size := int(binary.NativeEndian.Uint16(e[l.offsets:])), int(binary.NativeEndian.Uint16(e[l.offsets+2:]))
	if target < l.extensions || size < target+iptTargetLen || size > len(e) {
		return r, 0, errLegacy
	}
	return l.rule(e, target, size), at + size, nil
}

func (l *legacyLayout) rule(e []byte, target, next int) legacyRule {
	text := func(b []byte) string { s, _, _ := bytes.Cut(b, []byte{0}); return string(s) }
	r := legacyRule{
		proto: binary.NativeEndian.Uint16(e[l.proto:]), ports: [2]uint16{0, 0xffff},
		in: text(e[l.in : l.in+16]), out: text(e[l.out : l.out+16]),
		target: text(e[target+2 : target+31]), narrow: target > l.extensions || binary.NativeEndian.Uint16(e[l.proto:]) != 0,
	}
	for i, to := range []*netip.Prefix{&r.src, &r.dst} {
		addr, _ := netip.AddrFromSlice(e[l.src+i*l.addr : l.src+(i+1)*l.addr])
		if bits := ones(e[l.mask+i*l.addr : l.mask+(i+1)*l.addr]); bits > 0 {
			*to = netip.PrefixFrom(addr, bits).Masked()
		}
	}
	r.readMatches(e[l.extensions:target])
	if r.inverted = e[l.inverted]; r.inverted != 0 {
		r.narrow, r.matches = true, append(r.matches, "inverted")
	}
	r.narrow = r.narrow || r.in != "" || r.out != "" || r.src.IsValid() || r.dst.IsValid()
	if r.target == "" && next >= target+iptTargetLen+4 {
		r.verdict = int32(binary.NativeEndian.Uint32(e[target+iptTargetLen:]))
	}
	return r
}

// iptMatchLen is the length of struct xt_entry_match: size (2), name (29), revision (1).
const iptMatchLen = 32

// readMatches reads the extensions of a rule. Those of UDP and TCP begin with the first and last source and destination port.
func (r *legacyRule) readMatches(b []byte) {
	for len(b) >= iptMatchLen {
		size := int(binary.NativeEndian.Uint16(b))
		if size < iptMatchLen || size > len(b) {
			return
		}
		name, _, _ := bytes.Cut(b[2:31], []byte{0})
		data := b[iptMatchLen:size]
		const udpInverted, tcpInverted = 8, 11 // offsets of the flags that turn the ports' meaning round
		at := map[string]int{"udp": udpInverted, "tcp": tcpInverted}[string(name)]
		switch {
		case string(name) == "comment":
		case string(name) == "conntrack" || string(name) == "state":
			if s, ok := readStates(string(name), b[31], data); ok {
				r.tracked = append(r.tracked, s)
			} else {
				r.matches = append(r.matches, string(name))
			}
		case at == 0 || len(data) <= at:
			r.matches = append(r.matches, string(name))
		case data[at] != 0:
			r.matches = append(r.matches, "inverted ports")
		default:
			r.ports = [2]uint16{binary.NativeEndian.Uint16(data[4:]), binary.NativeEndian.Uint16(data[6:])}
		}
		b = b[size:]
	}
}

// readStates reads what a match says about the state of a connection: struct xt_state_info, or struct xt_conntrack_mtinfo1 to 3 by its revision.
func readStates(name string, revision byte, data []byte) (s legacyStates, ok bool) {
	const flags = 8*16 + 2*4 + 5*2 // behind eight addresses, two times and five numbers
	switch {
	case name == "state" && len(data) >= 4:
		mask := binary.NativeEndian.Uint32(data)
		s = legacyStates{match: uint16(xt.ConntrackState), mask: uint16(mask &^ stateUntracked)}
		if mask&stateUntracked != 0 {
			s.mask |= xtUntracked
		}
	case name == "conntrack" && len(data) >= flags+6 && revision >= 1 && revision <= 3:
		s = legacyStates{match: binary.NativeEndian.Uint16(data[flags:]), invert: binary.NativeEndian.Uint16(data[flags+2:]), mask: uint16(data[flags+4])}
		if revision > 1 {
			s.mask = binary.NativeEndian.Uint16(data[flags+4:])
		}
	default:
		return s, false
	}
	return s, true
}

// legacyPorts does what PortProblems says for the filter tables of iptables-legacy.
func legacyPorts(o Outer) ([]Problem, error) {
	var out []Problem
	for _, l := range legacyLayouts {
		if !o.uses(l.domain == unix.AF_INET) || !l.exists() {
			continue
		}
		for hook, name := range map[int]string{unix.NF_INET_LOCAL_IN: "INPUT", unix.NF_INET_LOCAL_OUT: "OUTPUT"} {
			rules, policy, _, err := l.chain(hook)
			if err != nil {
				return out, fmt.Errorf("hostnet: read the rules of %s: %w", l.tool, err)
			}
			for _, p := range o.Ports {
				w := weigher{outer: o, port: p}
				if pr, found := legacyBlocked(l.tool, name, rules, policy, p, w.state()); found {
					out = append(out, pr)
				}
			}
		}
	}
	return out, nil
}

// legacyBlocked weighs one chain for one port, as a weigher does; its packets are of that state.
func legacyBlocked(tool, chain string, rules []legacyRule, policy int32, p Port, state uint32) (Problem, bool) {
	for i, r := range rules {
		other, unread := false, len(r.matches) > 0
		for _, s := range r.tracked {
			about := conntrack(s.match, s.invert, s.mask, state)
			other, unread = other || about == none, unread || about == maybe
		}
		if other {
			continue
		}
		if slices.Contains(r.matches, "inverted") {
			if r.target == "" && r.verdict == legacyAccept {
				return Problem{}, false
			}
			continue
		}
		if r.proto != 0 && r.proto != uint16(p.Proto) || p.Number < r.ports[0] || p.Number > r.ports[1] || r.in == "lo" {
			continue // about other packets
		}
		refuses := r.target == "REJECT" || r.target == "" && r.verdict == legacyDrop
		passes := r.target == "" && (r.verdict == legacyAccept || r.verdict >= 0)
		exact := r.proto != 0 && (p.Number == 0 || r.ports[0] == r.ports[1])
		switch {
		case refuses && exact && !unread:
			remedy := fmt.Sprintf("%s -D %s %d", tool, chain, i+1)
			return Problem{What: fmt.Sprintf("chain %s of %s drops %v (rule %d)", chain, tool, p, i+1), Remedy: remedy, Command: remedy}, true
		case passes:
			return Problem{}, false // it passes, or may pass
		}
	}
	if drops := policy == legacyDrop || len(rules) > 0 && rules[len(rules)-1].refusesAll(); !drops {
		return Problem{}, false
	}
	remedy := fmt.Sprintf("%s -I %s -p %d -j ACCEPT", tool, chain, p.Proto)
	if p.Number != 0 {
		remedy = fmt.Sprintf("%s -I %s -p %d --dport %d -j ACCEPT", tool, chain, p.Proto, p.Number)
	}
	return Problem{What: fmt.Sprintf("chain %s of %s drops what no rule accepts, and none names %v", chain, tool, p), Remedy: remedy, Command: remedy}, true
}

// ones counts the bits of a mask.
func ones(mask []byte) (n int) {
	for _, b := range mask {
		for ; b != 0; b &= b - 1 {
			n++
		}
	}
	return n
}

func (r *legacyRule) refusesAll() bool {
	return !r.narrow && (r.target == "REJECT" || r.target == "" && r.verdict == legacyDrop)
}

// lets reports whether the rule accepts everything, or names the TUN device or the cluster and does not refuse.
func (r *legacyRule) lets(tun string, clusters []netip.Prefix) bool {
	if r.target != "" || r.verdict != legacyAccept && r.verdict < 0 {
		return false
	}
	ofCluster := func(p netip.Prefix) bool {
		return p.IsValid() && slices.ContainsFunc(clusters, func(c netip.Prefix) bool { return contains(p, c.Masked()) })
	}
	if r.inverted != 0 { // it may accept them, unless another field says that it does not
		is := func(bit byte, named, pods bool) bool { return !named || r.inverted&bit != 0 || pods }
		return is(invertedIn, r.in != "", r.in == tun) && is(invertedOut, r.out != "", r.out == tun) &&
			is(invertedSrc, r.src.IsValid(), ofCluster(r.src)) && is(invertedDst, r.dst.IsValid(), ofCluster(r.dst))
	}
	return r.in == tun || r.out == tun || !r.narrow && r.verdict == legacyAccept || ofCluster(r.src) || ofCluster(r.dst)
}
