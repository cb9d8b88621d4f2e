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
	prefixes []netip.Prefix // source and destination that it names
	narrow   bool           // it does not match every packet
	target   string         // name of its target; "" is a verdict
	verdict  int32          // of target "": -1 drops, -2 accepts, 0 and more is a jump
}

const (
	legacyDrop   = -1
	legacyAccept = -2
)

// legacyForward does what ForwardProblems says for the filter tables of iptables-legacy. A table that nobody has made is not looked
// at: asking for it would make it.
func legacyForward(tun string, clusters []netip.Prefix) ([]Problem, error) {
	var out []Problem
	for _, l := range legacyLayouts {
		if !l.exists() {
			continue
		}
		rules, policy, err := l.chain(unix.NF_INET_FORWARD)
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
		handled := false
		for _, r := range rules {
			handled = handled || r.lets(tun, clusters)
		}
		if how == "" || handled {
			continue
		}
		remedy := fmt.Sprintf("%s -I FORWARD -i %s -j ACCEPT && %[1]s -I FORWARD -o %[2]s -j ACCEPT", l.tool, tun)
		out = append(out, Problem{
			What:    fmt.Sprintf("the FORWARD chain of %s %s and names neither %s nor the cluster: pods' packets are dropped", l.tool, how, tun),
			Remedy:  remedy,
			Command: remedy,
		})
	}
	return out, nil
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

// chain reads the rules of the filter table's chain on a hook, and its policy.
func (l *legacyLayout) chain(hook int) (rules []legacyRule, policy int32, err error) {
	fd, err := sys.Socket(l.domain, unix.SOCK_RAW, unix.IPPROTO_RAW)
	if err != nil {
		return nil, 0, err
	}
	defer sys.Close(fd)
	info := make([]byte, iptInfoLen)
	copy(info, "filter")
	if _, err := sys.GetBytes(fd, l.level, iptGetInfo, info); err != nil {
		return nil, 0, err
	}
	number := func(b []byte, at int) int { return int(binary.NativeEndian.Uint32(b[at:])) }
	size := number(info, iptInfoSize)
	if size < 0 || size > iptMost {
		return nil, 0, fmt.Errorf("a table of %d bytes, the limit is %d", size, iptMost)
	}
	b := make([]byte, iptHeadLen+size)
	copy(b, "filter")
	binary.NativeEndian.PutUint32(b[iptName:], uint32(size))
	if _, err := sys.GetBytes(fd, l.level, iptGetEntries, b); err != nil {
		return nil, 0, err // EAGAIN: somebody has changed it in between
	}
	return l.parse(b[iptHeadLen:], number(info, iptInfoHook+4*hook), number(info, iptInfoPolicy+4*hook))
}

var errLegacy = errors.New("its layout is not the one that Tulle knows")

// parse reads the entries from the offset first to last, which is the policy.
func (l *legacyLayout) parse(b []byte, first, last int) (rules []legacyRule, policy int32, err error) {
	for at := first; ; {
		if at < 0 || at > last || at+l.extensions > len(b) {
			return nil, 0, errLegacy
		}
		e := b[at:]
		target, next := int(binary.NativeEndian.Uint16(e[l.offsets:])), int(binary.NativeEndian.Uint16(e[l.offsets+2:]))
		if target < l.extensions || next < target+iptTargetLen || next > len(e) {
			return nil, 0, errLegacy
		}
		r := l.rule(e, target, next)
		if at == last {
			return rules, r.verdict, nil
		}
		rules = append(rules, r)
		at += next
	}
}

func (l *legacyLayout) rule(e []byte, target, next int) legacyRule {
	text := func(b []byte) string { s, _, _ := bytes.Cut(b, []byte{0}); return string(s) }
	r := legacyRule{
		proto: binary.NativeEndian.Uint16(e[l.proto:]), ports: [2]uint16{0, 0xffff},
		in: text(e[l.in : l.in+16]), out: text(e[l.out : l.out+16]),
		target: text(e[target+2 : target+31]), narrow: target > l.extensions || binary.NativeEndian.Uint16(e[l.proto:]) != 0,
	}
	for i := range 2 { // source, destination
		addr, _ := netip.AddrFromSlice(e[l.src+i*l.addr : l.src+(i+1)*l.addr])
		if bits := ones(e[l.mask+i*l.addr : l.mask+(i+1)*l.addr]); bits > 0 {
			r.prefixes = append(r.prefixes, netip.PrefixFrom(addr, bits).Masked())
		}
	}
	r.readMatches(e[l.extensions:target])
	if e[l.inverted] != 0 {
		r.narrow, r.matches = true, append(r.matches, "inverted")
	}
	r.narrow = r.narrow || r.in != "" || r.out != "" || len(r.prefixes) > 0
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

// legacyPorts does what PortProblems says for the filter tables of iptables-legacy.
func legacyPorts(ports []Port) ([]Problem, error) {
	var out []Problem
	for _, l := range legacyLayouts {
		if !l.exists() {
			continue
		}
		for hook, name := range map[int]string{unix.NF_INET_LOCAL_IN: "INPUT", unix.NF_INET_LOCAL_OUT: "OUTPUT"} {
			rules, policy, err := l.chain(hook)
			if err != nil {
				return out, fmt.Errorf("hostnet: read the rules of %s: %w", l.tool, err)
			}
			for _, p := range ports {
				if pr, found := legacyBlocked(l.tool, name, rules, policy, p); found {
					out = append(out, pr)
				}
			}
		}
	}
	return out, nil
}

// legacyBlocked weighs one chain for one port, as a weigher does.
func legacyBlocked(tool, chain string, rules []legacyRule, policy int32, p Port) (Problem, bool) {
	for i, r := range rules {
		if slices.Contains(r.matches, "inverted") {
			if r.target == "" && r.verdict == legacyAccept {
				return Problem{}, false
			}
			continue
		}
		if r.proto != 0 && r.proto != uint16(p.Proto) || p.Number < r.ports[0] || p.Number > r.ports[1] || r.in == "lo" ||
			slices.Contains(r.matches, "conntrack") || slices.Contains(r.matches, "state") {
			continue // about other packets
		}
		refuses := r.target == "REJECT" || r.target == "" && r.verdict == legacyDrop
		passes := r.target == "" && (r.verdict == legacyAccept || r.verdict >= 0)
		exact := r.proto != 0 && (p.Number == 0 || r.ports[0] == r.ports[1])
		switch {
		case refuses && exact && len(r.matches) == 0:
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
	if slices.Contains(r.matches, "inverted") { // it may accept them
		return true
	}
	if r.in == tun || r.out == tun || !r.narrow && r.verdict == legacyAccept {
		return true
	}
	for _, p := range r.prefixes {
		for _, c := range clusters {
			if contains(p, c.Masked()) {
				return true
			}
		}
	}
	return false
}
