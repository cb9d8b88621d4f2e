package hostnet

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

func TestDetectUnderlay(t *testing.T) {
	links := func(h *host) {
		h.device("eth0", "192.0.2.1/24", "192.0.2.3/24", "2001:db8::1/64")
		h.device("eth1", "198.51.100.1/24", "2001:db8:1::1/64")
	}
	two := func(h *host) {
		links(h)
		h.addrs("lo", "203.0.113.9/32")
	}
	for _, c := range []struct {
		name  string
		setup func(h *host)
		want  string
		seeds []netip.Addr
		iface string
		addrs []netip.Addr
		err   []string // parts of the refusal
		wait  bool     // ErrNotYet
	}{
		{name: "by a seed on the same subnet", setup: two, seeds: ips("198.51.100.7"), iface: "eth1", addrs: ips("198.51.100.1", "2001:db8:1::1")},
		{name: "by an IPv6 seed", setup: two, seeds: ips("2001:db8::7"), iface: "eth0", addrs: ips("2001:db8::1", "192.0.2.1")},
		{name: "by a seed which is this host", setup: two, seeds: ips("192.0.2.1", "192.0.2.8"), iface: "eth0", addrs: ips("192.0.2.1", "2001:db8::1")},
		{name: "by a seed behind a router, with a source", setup: func(h *host) {
			two(h)
			rt := h.route("203.0.113.0/28", "198.51.100.254", "eth1", 0, unix.RTPROT_STATIC)
			h.check(h.nl.RouteDel(rt))
			rt.Src = []byte{192, 0, 2, 3}
			h.check(h.nl.RouteAdd(rt))
		}, seeds: ips("203.0.113.1"), iface: "eth0", addrs: ips("192.0.2.3", "2001:db8::1")},
		{name: "one seed without a route", setup: two, seeds: ips("203.0.113.200", "192.0.2.8"), iface: "eth0", addrs: ips("192.0.2.1", "2001:db8::1")},
		{name: "seeds on two devices", setup: two, seeds: ips("192.0.2.8", "198.51.100.8"), err: []string{"ambiguous", "eth0 192.0.2.1", "eth1 198.51.100.1", "--underlay"}},
		{name: "seeds without a route and a loopback one", setup: func(h *host) { h.device("eth0", "192.0.2.1/24") }, seeds: ips("127.0.0.1", "203.0.113.1"), err: []string{"203.0.113.1"}, wait: true},
		{name: "no route to the seed", setup: func(h *host) { h.device("eth0", "192.0.2.1/24") }, seeds: ips("203.0.113.1"), err: []string{"203.0.113.1"}, wait: true},
		{name: "loopback seed, as no seed", setup: links, seeds: ips("127.0.0.1"), err: []string{"ambiguous", "eth0 192.0.2.1", "eth1 198.51.100.1", "--underlay"}},
		{name: "by name", setup: two, want: "eth1", iface: "eth1", addrs: ips("198.51.100.1", "2001:db8:1::1")},
		{name: "by address", setup: two, want: "192.0.2.3", iface: "eth0", addrs: ips("192.0.2.3")},
		{name: "by IPv6 address", setup: two, want: "2001:db8:1::1", iface: "eth1", addrs: ips("2001:db8:1::1")},
		{name: "unknown name", setup: two, want: "eth7", err: []string{"eth7", "eth0 192.0.2.1", "--underlay"}, wait: true},
		{name: "unknown address", setup: two, want: "192.0.2.99", err: []string{"192.0.2.99", "eth1 198.51.100.1", "--underlay"}, wait: true},
		{name: "loopback address", setup: two, want: "127.0.0.1", err: []string{"loopback", "--underlay"}},
		{name: "loopback device without an address", setup: func(h *host) { h.device("eth0", "192.0.2.1/24") }, want: "lo", err: []string{"lo", "loopback", "--underlay"}},
		{name: "loopback device, and no route", setup: two, want: "lo", err: []string{"203.0.113.9", "lo", "no route", "--underlay"}, wait: true},
		{name: "address on the loopback device, and no route", setup: two, want: "203.0.113.9", err: []string{"lo", "no route", "--underlay"}, wait: true},
		{name: "link-local address", setup: func(h *host) { h.device("eth0", "fe80::5/64") }, want: "fe80::5", err: []string{"link-local", "--underlay"}},
		{name: "device without address", setup: func(h *host) { h.device("eth0") }, want: "eth0", err: []string{"eth0", "address"}, wait: true},
		{name: "default route", setup: func(h *host) {
			two(h)
			h.route("0.0.0.0/0", "198.51.100.254", "eth1", 0, unix.RTPROT_STATIC)
		}, iface: "eth1", addrs: ips("198.51.100.1", "2001:db8:1::1")},
		{name: "the better of two default routes", setup: func(h *host) {
			two(h)
			h.route("0.0.0.0/0", "198.51.100.254", "eth1", 100, unix.RTPROT_DHCP)
			h.route("0.0.0.0/0", "192.0.2.254", "eth0", 50, unix.RTPROT_DHCP)
		}, iface: "eth0", addrs: ips("192.0.2.1", "2001:db8::1")},
		{name: "default routes of the families differ", setup: func(h *host) {
			two(h)
			h.route("0.0.0.0/0", "198.51.100.254", "eth1", 0, unix.RTPROT_STATIC)
			h.route("::/0", "2001:db8::254", "eth0", 1024, unix.RTPROT_STATIC)
		}, err: []string{"ambiguous", "eth0", "eth1", "--underlay"}},
		{name: "no default route, one device", setup: func(h *host) { h.device("eth0", "192.0.2.1/24") }, iface: "eth0", addrs: ips("192.0.2.1")},
		{name: "no default route, one device, and an address on lo", setup: func(h *host) {
			h.device("eth0", "192.0.2.1/31")
			h.addrs("lo", "203.0.113.9/32")
		}, err: []string{"lo 203.0.113.9", "eth0 192.0.2.1", "no default route", "--underlay"}, wait: true},
		{name: "no default route, two devices, and an address on lo", setup: two, err: []string{"lo 203.0.113.9", "eth0 192.0.2.1", "eth1 198.51.100.1", "--underlay"}, wait: true},
		{name: "no default route, two devices", setup: links, err: []string{"ambiguous", "eth0 192.0.2.1", "eth1 198.51.100.1", "--underlay"}},
		{name: "nothing at all", setup: func(*host) {}, err: []string{"--underlay"}, wait: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			c.setup(h)
			u, err := h.detect(c.want, c.seeds)
			if errors.Is(err, ErrNotYet) != c.wait {
				t.Errorf("%v: to be waited for: %v", err, c.wait)
			}
			if c.err != nil {
				wantError(t, err, c.err...)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if u.Iface != c.iface || u.MTU != 1500 || u.Index != h.link(c.iface).Attrs().Index || !slices.Equal(u.Addrs, c.addrs) {
				t.Errorf("got %+v, want %s %v", u, c.iface, c.addrs)
			}
		})
	}
}

func TestCheckOverlap(t *testing.T) {
	for _, c := range []struct {
		name  string
		setup func(h *host)
		own   []netip.Prefix
		err   []string

		member bool
	}{
		{name: "nothing near", setup: func(h *host) { h.device("eth0", "192.0.2.1/24", "2001:db8::1/64") }},
		{name: "address inside", setup: func(h *host) { h.device("eth0", "10.244.7.1/24") }, err: []string{"10.244.0.0/16", "10.244.7.1/24 on eth0", "--cluster-cidr"}},
		{name: "IPv6 address inside", setup: func(h *host) { h.device("eth0", "fd00:244:7::1/64") }, err: []string{"fd00:244::/32", "fd00:244:7::1/64 on eth0", "--cluster-cidr"}},
		{name: "connected network around", setup: func(h *host) { h.device("eth0", "10.1.0.1/8") }, err: []string{"route 10.0.0.0/8 dev eth0", "--cluster-cidr"}},
		{name: "routed network around", setup: func(h *host) {
			h.device("eth0", "192.0.2.1/24")
			h.route("10.0.0.0/8", "192.0.2.254", "eth0", 0, unix.RTPROT_STATIC)
			h.route("0.0.0.0/0", "192.0.2.254", "eth0", 0, unix.RTPROT_STATIC)
		}},
		// As `wg-quick` makes them of AllowedIPs, and VPNs that put two halves in front of the default route: there is no gateway to name.
		{name: "network around, behind a VPN's device", setup: func(h *host) {
			h.tun("wg0")
			h.up("wg0")
			h.addrs("wg0", "192.0.2.1/24", "2001:db8::1/64")
			h.route("10.0.0.0/8", "", "wg0", 0, unix.RTPROT_BOOT)
			h.route("0.0.0.0/1", "", "wg0", 0, unix.RTPROT_BOOT)
			h.route("fc00::/7", "", "wg0", 1024, unix.RTPROT_BOOT)
			h.route("8000::/1", "", "wg0", 1024, unix.RTPROT_BOOT)
		}},
		{name: "network of a VPN's own address around", setup: func(h *host) {
			h.tun("wg0")
			h.up("wg0")
			h.addrs("wg0", "10.1.0.1/8")
		}, err: []string{"route 10.0.0.0/8 dev wg0", "--cluster-cidr"}},
		{name: "route inside", setup: func(h *host) {
			h.device("eth0", "192.0.2.1/24")
			h.route("10.244.9.0/24", "192.0.2.254", "eth0", 0, unix.RTPROT_BGP)
		}, err: []string{"route 10.244.9.0/24 via 192.0.2.254 dev eth0 proto bgp", "--cluster-cidr"}},
		{name: "the very route", setup: func(h *host) {
			h.device("eth0", "192.0.2.1/24")
			h.route("10.244.0.0/16", "192.0.2.254", "eth0", 0, unix.RTPROT_STATIC)
		}, err: []string{"route 10.244.0.0/16 via 192.0.2.254 dev eth0 proto static", "--cluster-cidr"}},
		{name: "what an earlier run left", setup: func(h *host) {
			h.tun("tun0")
			h.reconcile(h.reconciler(Options{}), dual())
			h.device("pods", "10.244.1.1/24", "fd00:244:0:1::1/64")
		}, own: pfx("10.244.1.0/24", "fd00:244:0:1::/64")},
		{name: "what an earlier run left, told by its routes", setup: func(h *host) {
			h.tun("tun0")
			h.reconcile(h.reconciler(Options{}), dual())
			h.device("pods", "10.244.1.1/24", "fd00:244:0:1::1/64")
		}},
		{name: "what another agent left, of another cluster", setup: func(h *host) {
			h.tun("tun9")
			h.up("tun9")
			h.route("10.99.0.0/16", "", "tun9", 0, Protocol)
		}},
		{name: "what another agent left, of this cluster", member: true, setup: func(h *host) {
			h.tun("tun9")
			h.up("tun9")
			h.route("10.244.0.0/16", "", "tun9", 0, Protocol)
		}, err: []string{"10.244.0.0/16 dev tun9", "tulle cleanup --tun tun9"}},
		{name: "what has come since this node is a member", member: true, setup: func(h *host) {
			h.device("eth0", "10.1.0.1/8")
			h.device("docker1", "10.244.7.1/24")
			h.route("10.244.9.0/24", "10.1.0.9", "eth0", 0, unix.RTPROT_BGP)
		}},
		{name: "a bridge over several blocks of ours", setup: func(h *host) { h.device("pods", "10.244.1.1/24", "fd00:244:0:1::1/64") },
			own: pfx("10.244.1.0/25", "10.244.1.192/26", "10.244.1.128/26", "fd00:244:0:1:8000::/65", "fd00:244:0:1::/65")},
		{name: "a bridge of which a part is ours", setup: func(h *host) { h.device("pods", "10.244.1.1/24") }, own: pfx("10.244.1.0/25", "10.244.1.128/26"),
			err: []string{"route 10.244.1.0/24 dev pods", "--cluster-cidr"}},
		{name: "routes to pods behind a bridge of ours", setup: func(h *host) {
			h.device("pods", "10.244.1.1/24")
			h.route("10.244.1.5/32", "", "pods", 0, unix.RTPROT_STATIC)
			h.route("10.244.1.64/26", "10.244.1.5", "pods", 0, unix.RTPROT_STATIC)
		}, own: pfx("10.244.1.0/24")},
		{name: "pods, of space that is not ours", setup: func(h *host) { h.device("pods", "10.244.1.1/24") }, own: pfx("10.244.2.0/24"), err: []string{"10.244.1.1/24 on pods"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			c.setup(h)
			var err error
			h.do(func() error {
				err = CheckOverlap("tun0", pfx("10.244.0.0/16", "fd00:244::/32"), c.own, c.member)
				return nil
			})
			if c.err != nil {
				wantError(t, err, c.err...)
			} else if err != nil {
				t.Error(err)
			}
		})
	}
}

// The host's own addresses on a bridge of pods go to no pod, any more than those that pods have.
func TestPodRoutes(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	h.reconcile(h.reconciler(Options{}), dual())
	h.device("pods", "10.244.1.1/24", "fd00:244:0:1::1/64", "192.0.2.9/24")
	h.route("10.244.1.5/32", "", "pods", 0, unix.RTPROT_STATIC)
	h.route("10.244.1.1/32", "", "pods", 0, unix.RTPROT_STATIC)
	h.route("10.244.2.5/32", "", "pods", 0, unix.RTPROT_STATIC)
	h.device("eth0", "198.51.100.1/24", "2001:db8::1/64")
	h.shell("ip route add 10.244.1.6 via 198.51.100.2 proto bird; ip route add 10.244.1.7 proto bird nexthop via 198.51.100.2 nexthop via 198.51.100.3; ip -6 route add fd00:244:0:1::6 via fe80::2 dev eth0 proto bird; " +
		"ip route add 10.244.1.8 via inet6 fe80::2 dev eth0 proto bird; ip route add 10.244.1.9 via 10.244.1.5") // the last one by a pod
	var got []PodRoute
	h.do(func() (err error) { got, err = PodRoutes("tun0", dual().Own); return err })
	want := []PodRoute{{netip.MustParseAddr("10.244.1.1"), "pods"}, {netip.MustParseAddr("10.244.1.5"), "pods"}, {netip.MustParseAddr("10.244.1.9"), "pods"}, {netip.MustParseAddr("fd00:244:0:1::1"), "pods"}}
	slices.SortFunc(got, func(a, b PodRoute) int { return a.Addr.Compare(b.Addr) })
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// A VPN's rule for a larger network comes before the main table.
func TestCheckPods(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	h.device("vpn0", "192.0.2.1/24", "2001:db8::1/64")
	h.reconcile(h.reconciler(Options{}), dual())
	check := func() ([]Problem, error) {
		return CheckPods("tun0", ips("192.0.2.1", "2001:db8::1", "203.0.113.7"), ips("10.244.64.0", "10.244.65.0", "fd00:244:64::"), ips("10.244.1.255", "fd00:244:0:1::ffff"))
	}
	if got := h.found(check); len(got) != 0 {
		t.Fatalf("problems %v", got)
	}
	h.shell("ip route add 10.0.0.0/8 via 192.0.2.9 table 52; ip rule add priority 5270 lookup 52; ip -6 route add fd00::/8 via 2001:db8::9 table 53; ip -6 rule add priority 5270 lookup 53")
	got := h.found(check)
	if len(got) != 2 || !strings.Contains(got[0].What, "10.244.64.0, of another node's pods, leave by vpn0") || !strings.Contains(got[0].What, "table 52") || !strings.Contains(got[1].What, "fd00:244:64::") {
		t.Errorf("problems %v", got)
	}
	h.shell("ip route add 10.244.0.0/16 dev tun0 table 54; ip rule add priority 5260 lookup 54") // a rule that leads them into the tunnel, too
	if got := h.found(check); len(got) != 1 || !strings.Contains(got[0].What, "fd00:244:64::") {
		t.Errorf("with a rule that leads IPv4 into the tunnel: %v", got)
	}
	h.shell("ip rule add to 10.244.0.0/16 lookup main priority 100; ip -6 rule add to fd00:244::/32 lookup main priority 100")
	if got := h.found(check); len(got) != 0 {
		t.Errorf("with rules for the pods: %v", got)
	}
}

// Hosts with several uplinks have rules by source: what the host answers from its underlay address goes elsewhere than what it sends
// by itself. That is named for other nodes' pods and for its own.
func TestCheckPodsBySource(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	h.device("eth0", "192.0.2.1/24", "2001:db8::1/64")
	h.device("pub", "198.51.100.1/24")
	h.reconcile(h.reconciler(Options{}), dual())
	h.shell("ip route add default via 198.51.100.9; ip route add default via 192.0.2.9 table 100; ip rule add from 192.0.2.1 lookup 100")
	h.shell("ip -6 route add default via 2001:db8::9 table 101; ip -6 rule add from 2001:db8::1 lookup 101")
	look := func(others, own []netip.Addr) []Problem {
		return h.found(func() ([]Problem, error) {
			return CheckPods("tun0", ips("192.0.2.1", "2001:db8::1"), others, own)
		})
	}
	others, own := ips("10.244.2.0", "fd00:244:0:2::"), ips("10.244.1.255", "fd00:244:0:1::ffff")
	for whose, got := range map[string][]Problem{"another node's": look(others, nil), "this node's": look(nil, own)} {
		if len(got) != 2 || !strings.Contains(got[0].What, "packets from 192.0.2.1 to 10.244.") || !strings.Contains(got[0].What, whose+" pods, leave by eth0") ||
			!strings.Contains(got[0].What, "table 100") || !strings.Contains(got[1].What, "from 2001:db8::1") || !strings.Contains(got[1].What, "table 101") {
			t.Errorf("%s: problems %v", whose, got)
		}
	}
	if got := look(others, own); len(got) != 2 {
		t.Errorf("one problem for each table is enough: %v", got)
	}
	h.shell("ip rule add to 10.244.0.0/16 lookup main priority 100; ip -6 rule add to fd00:244::/32 lookup main priority 100")
	if got := look(others, own); len(got) != 0 {
		t.Errorf("with rules for the pods: %v", got)
	}
}

// A rule refuses packets to pods, or leads them to a table that does. That is named, once for each family, and not where the main table refuses them, too:
// such a route is named elsewhere.
func TestCheckPodsRefused(t *testing.T) {
	for _, c := range []struct{ name, rule, without string }{
		{"prohibit", "rule add to PODS prohibit priority 200", "rule del priority 200"},
		{"blackhole", "rule add from PODS blackhole priority 200", "rule del priority 200"},
		{"unreachable but for a mark, as a kill switch", "rule add not fwmark 7 to PODS unreachable priority 200", "rule del priority 200"},
		{"a table's blackhole", "route add blackhole default table 77; ip FAMILY rule add from PODS lookup 77 priority 200", "rule del priority 200"},
		{"a table's unreachable", "route add unreachable PODS table 77; ip FAMILY rule add lookup 77 priority 200", "rule del priority 200"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			h.tun("tun0")
			h.device("eth0", "192.0.2.1/24", "2001:db8::1/64")
			h.reconcile(h.reconciler(Options{}), dual())
			check := func() ([]Problem, error) {
				return CheckPods("tun0", ips("10.244.1.0", "fd00:244:0:1::"), ips("10.244.64.0", "10.244.65.0", "fd00:244:64::", "fd00:244:65::"), nil)
			}
			for _, f := range [][2]string{{"-4", "10.244.0.0/16"}, {"-6", "fd00:244::/32"}} {
				run := func(line string) {
					h.shell(strings.NewReplacer("PODS", f[1], "FAMILY", f[0]).Replace("ip FAMILY " + line))
				}
				run(c.rule)
				got := h.found(check)
				if first := strings.Split(f[1], "/")[0]; len(got) != 1 || !strings.Contains(got[0].What, first[:5]) || !strings.Contains(got[0].What, "are refused") || !strings.Contains(got[0].Remedy, "ip rule add to") {
					t.Errorf("%s: problems %v", f[0], got)
				}
				run("rule add to PODS lookup main priority 100")
				if got := h.found(check); len(got) != 0 {
					t.Errorf("%s with a rule before: %v", f[0], got)
				}
				run("rule del priority 100")
				run("route replace blackhole PODS")
				run("route flush proto 84")
				if got := h.found(check); len(got) != 0 {
					t.Errorf("%s, refused by the main table: %v", f[0], got)
				}
				run(c.without)
			}
		})
	}
}

func TestCheckMembers(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	h.device("eth0", "192.0.2.1/24", "2001:db8::1/64")
	h.reconcile(h.reconciler(Options{}), dual())
	h.route("203.0.113.0/24", "", "tun0", 0, unix.RTPROT_STATIC)
	h.route("2001:db8:9::/64", "", "tun0", 1024, unix.RTPROT_STATIC)
	var got []Problem
	h.do(func() (err error) {
		got, err = CheckMembers("tun0", ips("192.0.2.1", "192.0.2.2", "203.0.113.5", "198.51.100.1", "2001:db8::2", "2001:db8:9::5"))
		return err
	})
	if len(got) != 2 || !strings.Contains(got[0].What, "203.0.113.5") || !strings.Contains(got[1].What, "2001:db8:9::5") {
		t.Errorf("problems %v", got)
	}
}

func TestForwardProblems(t *testing.T) {
	policy := func(p nftables.ChainPolicy) *nftables.ChainPolicy { return &p }
	accept := &expr.Verdict{Kind: expr.VerdictAccept}
	dropped := &expr.Verdict{Kind: expr.VerdictDrop}
	byName := func(key expr.MetaKey, name string, then ...expr.Any) []expr.Any {
		return append(equal(&expr.Meta{Key: key, Register: 1}, ifname(name)...), then...)
	}
	cluster := func(then ...expr.Any) []expr.Any { // ip saddr 10.244.0.0/16, as nft writes it
		return append(equal(&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 2}, 10, 244), then...)
	}
	for _, c := range []struct {
		name   string
		table  string
		family nftables.TableFamily
		chain  string
		hook   *nftables.ChainHook
		policy *nftables.ChainPolicy
		rules  [][]expr.Any
		want   []string

		clusters []netip.Prefix // nil: of both families
	}{
		{name: "IPv4 is dropped, and no pod has it", table: "t", family: nftables.TableFamilyIPv4, chain: "fwd", policy: policy(nftables.ChainPolicyDrop), clusters: pfx("fd00:244::/32")},
		{name: "no prefix is known yet", table: "t", family: nftables.TableFamilyIPv4, chain: "fwd", policy: policy(nftables.ChainPolicyDrop), clusters: []netip.Prefix{}, want: []string{"does not name tun0", "cluster_cidr"}},
		{name: "none", table: "t", family: nftables.TableFamilyINet, chain: "forward", policy: policy(nftables.ChainPolicyAccept)},
		{name: "policy drop", table: "t", family: nftables.TableFamilyINet, chain: "fwd", policy: policy(nftables.ChainPolicyDrop), want: []string{"inet t fwd", "policy drop", "nft insert rule inet t fwd ip saddr 10.244.0.0/16 accept && nft insert rule inet t fwd ip daddr 10.244.0.0/16 accept", "nft insert rule inet t fwd ip6 daddr fd00:244::/32 accept"}},
		{name: "policy drop on input is none of ours", table: "t", family: nftables.TableFamilyINet, chain: "in", hook: nftables.ChainHookInput, policy: policy(nftables.ChainPolicyDrop)},
		{name: "iptables-nft", table: "filter", family: nftables.TableFamilyIPv4, chain: "FORWARD", policy: policy(nftables.ChainPolicyDrop), want: []string{"ip filter FORWARD", "does not name tun0, 10.244.0.0/16: pods", "iptables -I FORWARD -s 10.244.0.0/16 -j ACCEPT && iptables -I FORWARD -d 10.244.0.0/16 -j ACCEPT"}},
		{name: "ip6tables-nft", table: "filter", family: nftables.TableFamilyIPv6, chain: "FORWARD", policy: policy(nftables.ChainPolicyDrop), want: []string{"ip6 filter FORWARD", "does not name tun0, fd00:244::/32: pods", "ip6tables -I FORWARD -s fd00:244::/32 -j ACCEPT"}},
		{name: "the device accepted", table: "filter", family: nftables.TableFamilyIPv4, chain: "FORWARD", policy: policy(nftables.ChainPolicyDrop), rules: [][]expr.Any{byName(expr.MetaKeyIIFNAME, "tun0", accept)}},
		{name: "another device accepted", table: "filter", family: nftables.TableFamilyIPv4, chain: "FORWARD", policy: policy(nftables.ChainPolicyDrop), rules: [][]expr.Any{byName(expr.MetaKeyIIFNAME, "tun01", accept)}, want: []string{"FORWARD"}},
		{name: "the device dropped by name", table: "t", family: nftables.TableFamilyINet, chain: "fwd", policy: policy(nftables.ChainPolicyDrop), rules: [][]expr.Any{byName(expr.MetaKeyIIFNAME, "tun0", dropped)}, want: []string{"inet t fwd"}},
		{name: "the cluster accepted", table: "t", family: nftables.TableFamilyINet, chain: "fwd", policy: policy(nftables.ChainPolicyDrop), rules: [][]expr.Any{cluster(accept)}, clusters: pfx("10.244.0.0/16")},
		{name: "everything accepted", table: "t", family: nftables.TableFamilyINet, chain: "fwd", policy: policy(nftables.ChainPolicyDrop), rules: [][]expr.Any{{&expr.Counter{}, accept}}},
		{name: "firewalld", table: "firewalld", family: nftables.TableFamilyINet, chain: "filter_FORWARD", policy: policy(nftables.ChainPolicyAccept), rules: [][]expr.Any{{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}}}, want: []string{"inet firewalld filter_FORWARD", "last rule", "firewall-cmd"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			if c.clusters == nil {
				c.clusters = pfx("10.244.0.0/16", "fd00:244::/32")
			}
			if c.hook == nil {
				c.hook = nftables.ChainHookForward
			}
			h.nft(func(conn *nftables.Conn) error {
				tab := conn.AddTable(&nftables.Table{Name: c.table, Family: c.family})
				ch := conn.AddChain(&nftables.Chain{Name: c.chain, Table: tab, Type: nftables.ChainTypeFilter, Hooknum: c.hook, Priority: nftables.ChainPriorityFilter, Policy: c.policy})
				for _, r := range c.rules {
					conn.AddRule(&nftables.Rule{Table: tab, Chain: ch, Exprs: r})
				}
				return conn.Flush()
			})
			var got []Problem
			h.do(func() (err error) {
				got, err = ForwardProblems("tun0", c.clusters)
				return err
			})
			if c.want == nil {
				if len(got) != 0 {
					t.Errorf("problems %v", got)
				}
				return
			}
			if len(got) != 1 {
				t.Fatalf("problems %v, want one", got)
			}
			for _, w := range c.want {
				if !strings.Contains(got[0].String(), w) {
					t.Errorf("%q is not in %q", w, got[0])
				}
			}
		})
	}
}
