package hosts_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// BGP to the host: the address is on lo, behind equal-cost routes over two links that carry less than lo does.
func TestAddressOnLoopback(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, src, underlay string }{
		{"the route names it", "src 10.255.0.%d", ""},
		{"the operator names it", "", "10.255.0.%d"},
		{"nobody names it", "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			n := hosts.New(t)
			s1, s2, a, b := n.Host("s1"), n.Host("s2"), n.Host("a"), n.Host("b")
			args := func(i int, more ...string) []string {
				if c.underlay != "" {
					more = append(more, "--underlay", fmt.Sprintf(c.underlay, i))
				}
				return more
			}
			for i, h := range []*hosts.Host{a, b} {
				i++
				h.IP(fmt.Sprintf("addr add 10.255.0.%d/32 dev lo", i))
				for k, s := range []*hosts.Host{s1, s2} {
					k++
					h.LinkMTU(fmt.Sprintf("up%d", k), fmt.Sprintf("10.0.%d.%d/30", k, i*4+1), s, fmt.Sprintf("down%d", i), fmt.Sprintf("10.0.%d.%d/30", k, i*4+2), 1600-100*k)
					s.IP(fmt.Sprintf("route add 10.255.0.%d via 10.0.%d.%d", i, k, i*4+1))
					s.Sysctl("net.ipv4.ip_forward", "1")
				}
				src := c.src
				if src != "" {
					src = fmt.Sprintf(src, i)
				}
				h.IP(fmt.Sprintf("route add default %s nexthop via 10.0.1.%d dev up1 nexthop via 10.0.2.%d dev up2", src, i*4+2, i*4+2))
			}
			first := a.Agent(args(1, "--bootstrap")...)
			first.Ready(20 * time.Second)
			second := b.Agent(args(2, "--join", "10.255.0.1")...)
			second.Ready(20 * time.Second)
			web, db := first.Pod("web"), second.Pod("db")
			hosts.Within(t, 10*time.Second, "large packets", func() error { return web.PingSize(db.IPv4(), 4000) })
			st := first.Status()
			if st.Node.Tun.MTU != 1372 || st.Node.Underlay[0] != netip.MustParseAddr("10.255.0.1") || strings.Join(st.Node.Links, " ") != "up1 up2" {
				t.Errorf("%+v; want 10.255.0.1 by up1 and up2, and the smaller MTU of the two less 28", st.Node)
			}
		})
	}
}

// A container engine's bridge and a pod behind it, in the node's fixed block, before the agent's first start.
func TestPodsBeforeTheAgent(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	a, b, old := n.Host("a"), n.Host("b"), n.Host("old")
	a.Link("eth0", "10.0.1.10/24", b, "eth0", "10.0.1.11/24")
	a.IP("link add br0 type bridge", "link set br0 up", "addr add 10.244.1.1/24 dev br0", "addr add fd00:244:0:1::1/64 dev br0 nodad")
	old.Link("eth0", "10.244.1.5/24", a, "pod", "")
	old.IP("addr add fd00:244:0:1::5/64 dev eth0 nodad", "route add default via 10.244.1.1", "route add default via fd00:244:0:1::1")
	a.IP("link set pod master br0", "route add 10.244.1.128/26 via 10.244.1.5")
	args := []string{"--bootstrap", "--cluster-cidr", "10.244.0.0/16,fd00:244::/48", "--pod-cidr", "10.244.1.0/24,fd00:244:0:1::/64"}
	first := a.Agent(args...)
	first.Ready(20 * time.Second)
	second := b.Agent("--join", "10.0.1.10", "--pod-cidr", "10.244.2.0/24,fd00:244:0:2::/64")
	second.Ready(20 * time.Second)
	db := second.Pod("db")
	reached := func() {
		t.Helper()
		for _, addr := range []string{"10.244.1.5", "fd00:244:0:1::5"} {
			hosts.Within(t, 10*time.Second, "the pod behind the bridge", func() error { return db.Ping(netip.MustParseAddr(addr)) })
		}
	}
	reached()
	hosts.NoProblems(t, "with a pod behind a bridge", first)
	bridge := []netip.Addr{netip.MustParseAddr("10.244.1.1"), netip.MustParseAddr("fd00:244:0:1::1")}
	if web := first.Pod("web"); slices.ContainsFunc(web.Addrs, func(p netip.Addr) bool { return slices.Contains(bridge, p) }) {
		t.Errorf("a pod got the bridge's address: %v", web.Addrs)
	}
	first.Stop()
	first = a.Agent(args...)
	first.Ready(20 * time.Second)
	reached()
	first.Stop()

	// Space that is another node's is none of this host's.
	c := n.Host("c")
	c.Link("eth0", "10.0.3.10/24", b, "eth1", "10.0.3.11/24")
	c.IP("link add br0 type bridge", "link set br0 up", "addr add 10.244.1.1/24 dev br0")
	other := c.Agent("--bootstrap", "--cluster-cidr", "10.244.0.0/16", "--pod-cidr", "10.244.2.0/24")
	if code, log := other.Ended(20 * time.Second); code == 0 || !strings.Contains(log, "10.244.1.1/24 on br0") {
		t.Errorf("a bridge outside of the node's own block: %d %s", code, log)
	}
}

// rp_filter as RHEL and its kin have it, on a host with two interfaces in one subnet: status names what is lost and why, and
// by which interface packets really leave. Whatever families pods have: the tunnel's own packets are lost.
func TestStrictReversePathFilter(t *testing.T) {
	for name, cidr := range map[string]string{"IPv4 pods": "10.244.0.0/16", "IPv6 pods": "fd00:244::/48"} {
		t.Run(name, func(t *testing.T) { t.Parallel(); strictReversePathFilter(t, cidr) })
	}
}

func strictReversePathFilter(t *testing.T, cidr string) {
	n := hosts.New(t)
	sw := n.Switch()
	a, b := n.Host("a"), n.Host("b")
	a.Plug(sw, "eth0", "10.0.1.11/24")
	b.Plug(sw, "eth0", "10.0.1.12/24")
	b.Plug(sw, "eth1", "10.0.1.13/24")
	b.Sysctl("net.ipv4.conf.all.rp_filter", "0")
	b.Sysctl("net.ipv4.conf.eth0.rp_filter", "0")
	b.Sysctl("net.ipv4.conf.eth1.rp_filter", "0")
	first := a.Agent("--bootstrap", "--cluster-cidr", cidr)
	first.Ready(20 * time.Second)
	second := b.Agent("--join", "10.0.1.11", "--underlay", "eth1")
	second.Ready(20 * time.Second)
	hosts.Within(t, 10*time.Second, "packets to a leave by eth0, which is the first route's", func() error {
		p, err := peerOf(second, "a")
		if err == nil && (len(p.Leaves) != 1 || p.Leaves[0] != "eth0") {
			err = fmt.Errorf("they leave by %v", p.Leaves)
		}
		return err
	})
	hosts.Within(t, 10*time.Second, "tulle peers says so", func() error {
		if out, _, _ := second.Tulle("peers"); !strings.Contains(out, "packets leave by eth0") {
			return fmt.Errorf("tulle peers: %s", out)
		}
		return nil
	})
	if p := second.Problems(); strings.Contains(p, "rp_filter") {
		t.Errorf("problems: %s", p)
	}
	b.Sysctl("net.ipv4.conf.all.rp_filter", "1")
	b.Sysctl("net.ipv4.conf.eth0.rp_filter", "2")
	hosts.Within(t, 10*time.Second, "status names the filter of eth1 alone", func() error {
		if p := second.Problems(); !strings.Contains(p, "net.ipv4.conf.all.rp_filter=1, net.ipv4.conf.eth1.rp_filter=0") || strings.Contains(p, "eth0") {
			return fmt.Errorf("problems: %s", p)
		}
		return nil
	})
}

// The host's IPv6 comes by router advertisement, and the first one when the agent runs already; then by an interface that
// comes later. `tulle cleanup` puts everything back.
func TestRouterAdvertisements(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw := n.Switch()
	a, r := n.Host("a"), n.Host("r")
	a.Sysctl("net.ipv6.conf.all.forwarding", "0")
	a.Sysctl("net.ipv6.conf.default.accept_ra", "1")
	a.Plug(sw, "eth0", "10.0.1.11/24")
	r.Plug(sw, "eth0", "10.0.1.1/24")
	agent := a.Agent("--bootstrap", "--underlay", "eth0", "--cluster-cidr", "10.244.0.0/16,fd00:244::/48")
	agent.Ready(20 * time.Second)
	r.Advertise("eth0", "fd02::/64", 10*time.Minute)
	listens := func(device string) {
		t.Helper()
		hosts.Within(t, 10*time.Second, "an address and a default route by "+device, func() error {
			addr, route := a.Run("ip", "-6", "addr", "show", "dev", device), a.Run("ip", "-6", "route", "show", "default")
			if !strings.Contains(addr, "inet6 fd02:") || !strings.Contains(route, "dev "+device+" proto ra") {
				return fmt.Errorf("addresses %s, route %q", addr, route)
			}
			return nil
		})
	}
	listens("eth0")
	a.Plug(sw, "eth1", "10.0.9.11/24")
	listens("eth1")
	agent.Stop()
	if out, errs, code := agent.Tulle("cleanup"); code != 0 {
		t.Fatalf("cleanup: %s %s", out, errs)
	}
	for name, want := range map[string]string{"all.forwarding": "0", "default.accept_ra": "1", "eth0.accept_ra": "1", "eth1.accept_ra": "1"} {
		if got := a.GetSysctl("net.ipv6.conf." + name); got != want {
			t.Errorf("%s is %s after cleanup, want %s", name, got, want)
		}
	}
}

// Hosts in two subnets whose private network has its default route in a table of its own, chosen by the source, and whose main
// table leads to a public one: what a host answers to pods takes that table. Status names the rule, and its remedy helps.
func TestSourceRouting(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	a, b, r, public := n.Host("a"), n.Host("b"), n.Host("r"), n.Host("public")
	r.Sysctl("net.ipv4.ip_forward", "1")
	for i, h := range []*hosts.Host{a, b} {
		i++
		h.Link("eth0", fmt.Sprintf("10.0.%d.11/24", i), r, fmt.Sprintf("e%d", i), fmt.Sprintf("10.0.%d.1/24", i))
		h.Link("pub", fmt.Sprintf("192.0.2.1%d/24", i), public, fmt.Sprintf("e%d", i), "")
		h.IP("route add default via 192.0.2.1 dev pub", fmt.Sprintf("route add default via 10.0.%d.1 dev eth0 table 100", i), fmt.Sprintf("rule add from 10.0.%d.11 lookup 100", i))
	}
	first := a.Agent("--bootstrap", "--underlay", "10.0.1.11")
	first.Ready(20 * time.Second)
	second := b.Agent("--join", "10.0.1.11", "--underlay", "10.0.2.11")
	second.Ready(20 * time.Second)
	web, db := first.Pod("web"), second.Pod("db")
	hosts.Within(t, 10*time.Second, "from pod to pod", func() error { return web.Ping(db.IPv4()) })
	for _, agent := range []*hosts.Agent{first, second} {
		hosts.Within(t, 10*time.Second, agent.Host.Name+" names the rule", func() error {
			if p := agent.Problems(); !strings.Contains(p, "table 100") || !strings.Contains(p, "ip rule add to") {
				return fmt.Errorf("problems: %s", p)
			}
			return nil
		})
		agent.Host.IP("rule add to 10.244.0.0/16 lookup main priority 100")
	}
	for _, to := range []string{"10.0.1.11", "10.0.2.11"} {
		hosts.Within(t, 10*time.Second, "from the pod to "+to, func() error { return web.Ping(netip.MustParseAddr(to)) })
	}
	hosts.NoProblems(t, "with the rule", first, second)
}

// A rule leads pods' packets to the outside by an uplink of their own, and those to other nodes' pods with them. Status names it.
func TestRuleForPodsSources(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw, a, b, public := n.Switch(), n.Host("a"), n.Host("b"), n.Host("public")
	a.Plug(sw, "eth0", "10.0.1.11/24")
	b.Plug(sw, "eth0", "10.0.1.12/24")
	a.Link("pub", "192.0.2.11/24", public, "e1", "")
	first := a.Agent("--bootstrap", "--underlay", "10.0.1.11")
	first.Ready(20 * time.Second)
	second := b.Agent("--join", "10.0.1.11")
	second.Ready(20 * time.Second)
	web, db := first.Pod("web"), second.Pod("db")
	hosts.Within(t, 10*time.Second, "from pod to pod", func() error { return web.Ping(db.IPv4()) })
	a.IP("route add default via 192.0.2.1 dev pub table 100", "rule add from 10.244.0.0/16 lookup 100")
	hosts.Within(t, 10*time.Second, "a names the rule", func() error {
		if p := first.Problems(); !strings.Contains(p, "leave by pub") || !strings.Contains(p, "table 100") || !strings.Contains(p, "ip rule add to") {
			return fmt.Errorf("problems: %s", p)
		}
		return nil
	})
	a.IP("rule add to 10.244.0.0/16 lookup main priority 100")
	hosts.Within(t, 10*time.Second, "from pod to pod, with the rule", func() error { return web.Ping(db.IPv4()) })
	hosts.Within(t, 10*time.Second, "no problem, with the rule", func() error {
		if p := first.Problems(); p != "" {
			return fmt.Errorf("problems: %s", p)
		}
		return nil
	})
}

// What overlaps the pods' space comes while the pods run, and the agent is restarted: pods go on, and status names each thing once. A node without
// pods is refused.
func TestOverlapComesLater(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw, a, b, other := n.Switch(), n.Host("a"), n.Host("b"), n.Host("other")
	a.Plug(sw, "eth0", "10.0.1.11/24")
	b.Plug(sw, "eth0", "10.0.1.12/24")
	args := []string{"--bootstrap", "--cluster-cidr", "10.244.0.0/16", "--underlay", "eth0"}
	first := a.Agent(args...)
	first.Ready(20 * time.Second)
	second := b.Agent("--join", "10.0.1.11")
	second.Ready(20 * time.Second)
	web, db := first.Pod("web"), second.Pod("db")
	a.Link("eth1", "10.9.9.1/8", other, "e1", "")
	a.IP("route add 10.244.255.0/28 via 10.0.1.99 dev eth0", "addr add 10.244.254.7/32 dev lo")
	named := func() error {
		p := first.Problems()
		for _, want := range []string{"route 10.0.0.0/8 dev eth1", "route 10.244.255.0/28 via 10.0.1.99", "address 10.244.254.7/32 on lo"} {
			if strings.Count(p, want) != 1 {
				return fmt.Errorf("not once %q in: %s", want, p)
			}
		}
		return nil
	}
	hosts.Within(t, 10*time.Second, "a names them", named)
	first.Stop()
	first = a.Agent(args...)
	first.Ready(20 * time.Second)
	hosts.Within(t, 10*time.Second, "a names them again", named)
	hosts.Within(t, 10*time.Second, "from pod to pod", func() error { return web.Ping(db.IPv4()) })
	first.Stop()
	a.WipeDisk()
	if code, log := a.Agent(args...).Ended(20 * time.Second); code == 0 || !strings.Contains(log, "overlaps this host's") {
		t.Errorf("a new node: %d %s", code, log)
	}
}
