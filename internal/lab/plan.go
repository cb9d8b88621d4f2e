package lab

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"

	"github.com/tulle-net/tulle/internal/sys"
)

// The underlay's addresses. Host n of subnet s is 192.168.s.(10+n) and fd00:a:s::(10+n), the router 192.168.s.1 and
// fd00:a:s::1.
var (
	underlay4All = netip.MustParsePrefix("192.168.0.0/16")
	underlay6All = netip.MustParsePrefix("fd00:a::/32")
)

func underlayAddrs(subnet, host int, f Families) []netip.Addr {
	var out []netip.Addr
	if f.V4 {
		out = append(out, netip.AddrFrom4([4]byte{192, 168, byte(subnet), byte(host)}))
	}
	if f.V6 {
		out = append(out, netip.MustParseAddr(fmt.Sprintf("fd00:a:%d::%d", subnet, host)))
	}
	return out
}

// bits is the length of the prefix on the link of an underlay address.
func underlayBits(a netip.Addr) int {
	if a.Is4() {
		return 24
	}
	return 64
}

const routerHost = 1

func (l *Lab) netnsName(target string) string { return l.st.Options.Name + "-" + target }

// planHost names host number n.
func (l *Lab) planHost(n, subnet int) Host {
	o := &l.st.Options
	name := fmt.Sprintf("h%d", n)
	dir := filepath.Join(labDir(o.Name), name)
	return Host{
		Name: name, Number: n, Subnet: subnet,
		Netns:    sys.NetnsPath(l.netnsName(name)),
		Underlay: underlayAddrs(subnet, 10+n, o.Underlay),
		Dir:      dir,
		Config:   filepath.Join(dir, "tulle.yaml"),
		Socket:   filepath.Join(dir, "tulle.sock"),
		Log:      filepath.Join(dir, "agent.log"),
	}
}

// planPod names pod number n, from 1, of a host.
func (l *Lab) planPod(h *Host, n int) Pod {
	name := fmt.Sprintf("p%d%s", h.Number, letters(n))
	return Pod{
		Name: name, Number: n, Host: h.Name,
		Netns: sys.NetnsPath(l.netnsName(name)),
		ID:    l.netnsName(name),
		MTU:   l.st.Options.MTU,
	}
}

// letters counts a, b … z, aa, ab …
func letters(n int) string {
	s := ""
	for ; n > 0; n = (n - 1) / 26 {
		s = string(rune('a'+(n-1)%26)) + s
	}
	return s
}

// staticAddrs are a pod's addresses in a bare lab: 10.244.H.(P+1) and fd00:10:244:H::(P+1).
func (l *Lab) staticAddrs(h *Host, p *Pod) ([]netip.Addr, error) {
	var out []netip.Addr
	for _, c := range l.st.Options.ClusterCIDRs {
		b := c.Addr().AsSlice()
		if c.Addr().Is4() {
			b[2], b[3] = b[2]+byte(h.Number), byte(p.Number+1)
		} else {
			b[7], b[15] = b[7]+byte(h.Number), byte(p.Number+1)
		}
		a, _ := netip.AddrFromSlice(b)
		if !c.Contains(a) {
			return nil, fmt.Errorf("cluster CIDR %v is too small for the static addresses of a bare lab: use a /16 or a /48", c)
		}
		out = append(out, a)
	}
	return out, nil
}

// isOurs tells whether a namespace's name is one that the lab of that name would give.
func isOurs(lab, ns string) bool {
	rest, ok := strings.CutPrefix(ns, lab+"-")
	if !ok || rest == "" {
		return false
	}
	if rest == Router {
		return true
	}
	digits := strings.TrimLeft(rest[1:], "0123456789")
	switch rest[0] {
	case 'h':
		return len(rest) > 1 && digits == ""
	case 'p':
		return len(digits) < len(rest)-1 && digits != "" && strings.Trim(digits, "abcdefghijklmnopqrstuvwxyz") == ""
	}
	return false
}

// netnsOf is the path of a target's namespace.
func (l *Lab) netnsOf(target string) (string, error) {
	if target == Router {
		return sys.NetnsPath(l.netnsName(Router)), nil
	}
	if h, err := l.Host(target); err == nil {
		return h.Netns, nil
	}
	if p, err := l.Pod(target); err == nil {
		return p.Netns, nil
	}
	return "", l.noTarget("host or pod", target)
}

// noTarget says what there is instead.
func (l *Lab) noTarget(kind, name string) error {
	var have []string
	for _, h := range l.Hosts() {
		have = append(have, h.Name)
	}
	for _, p := range l.Pods() {
		have = append(have, p.Name)
	}
	return fmt.Errorf("lab %s has no %s %q; it has the router %s and %s", l.Name(), kind, name, Router, strings.Join(have, ", "))
}
