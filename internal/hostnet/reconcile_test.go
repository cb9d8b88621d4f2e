package hostnet

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestReconcileFromEmpty(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	r := h.reconciler(Options{})
	rep := h.reconcile(r, dual())
	if len(rep.Removed)+len(rep.Repaired)+len(rep.Changed)+len(rep.Conflicts) != 0 {
		t.Errorf("a first run on an empty host did more than add: %+v", rep)
	}
	h.wantRoutes(dualRoutes)
	// Exactly these: no link-local address either.
	if got, want := h.addrsOf("tun0"), []string{"10.244.1.0/32", "fd00:244:0:1::/128"}; !slices.Equal(got, want) {
		t.Errorf("addresses %v, want %v", got, want)
	}
	a := h.link("tun0").Attrs()
	if a.MTU != 1472 || a.Flags&net.FlagUp == 0 {
		t.Errorf("tun0 has mtu %d and flags %v", a.MTU, a.Flags)
	}
	for name, want := range map[string]string{
		"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1",
		"net/ipv4/conf/tun0/rp_filter": "2", "net/ipv4/conf/tun0/send_redirects": "0",
		"net/ipv4/conf/tun0/accept_local":  "1",
		"net/ipv6/conf/tun0/addr_gen_mode": "1", "net/ipv6/conf/tun0/accept_ra": "0",
	} {
		if got := h.sysctl(name); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
	if got := h.tables(); !slices.Equal(got, []string{"1 tulle"}) {
		t.Errorf("nft tables %v", got)
	}
	h.quiet(r, dual())
	// Another run of the agent takes over without a change.
	h.quiet(h.reconciler(Options{}), dual())
}

func TestReconcileOneFamily(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	r := h.reconciler(Options{})
	s := State{Tun: "tun0", TunAddrs: ips("10.244.1.0"), ClusterCIDRs: pfx("10.244.0.0/16"), Own: pfx("10.244.1.0/24")}
	h.reconcile(r, s)
	h.quiet(r, s)
	if got := h.addrsOf("tun0"); !slices.Equal(got, []string{"10.244.1.0/32"}) {
		t.Errorf("addresses %v", got)
	}
	if got := h.sysctl("net/ipv6/conf/all/forwarding"); got != "0" {
		t.Errorf("IPv6 forwarding is %s without IPv6 in the cluster", got)
	}
	// The other family comes later: the device's IPv6 is switched on again.
	h.reconcile(r, dual())
	h.wantRoutes(dualRoutes)
	h.quiet(r, dual())
}

// A bootstrap node owns the whole cluster CIDR: its space must not lead into the tunnel.
func TestOwnsWholeCluster(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	r := h.reconciler(Options{})
	h.reconcile(r, State{Tun: "tun0", TunAddrs: ips("10.244.0.0"), ClusterCIDRs: pfx("10.244.0.0/16"), Own: pfx("10.244.0.0/16")})
	h.wantRoutes([]string{"unreachable 10.244.0.0/16 proto 84 metric 4294967295"})
}

func TestRepair(t *testing.T) {
	dead := func(h *host, prefix string, metric int) {
		h.check(h.nl.RouteDel(&netlink.Route{Dst: dst(prefix), Priority: metric, Scope: netlink.SCOPE_NOWHERE}))
	}
	for _, c := range []struct {
		name   string
		damage func(h *host)
		want   string // in Repaired, or "-" for Removed
	}{
		{"route deleted", func(h *host) { dead(h, "10.244.2.0/24", 0) }, "route 10.244.2.0/24"},
		{"IPv6 route deleted", func(h *host) { dead(h, "fd00:244:0:2::/64", 1024) }, "route fd00:244:0:2::/64"},
		{"unreachable route deleted", func(h *host) { dead(h, "10.244.1.0/24", 0) }, "route unreachable 10.244.1.0/24"},
		{"route's MTU changed", func(h *host) {
			rt := routeKey{netip.MustParsePrefix("10.244.2.0/24"), 0}.route(routeSpec{link: h.link("tun0").Attrs().Index, mtu: 600})
			h.check(h.nl.RouteReplace(rt))
		}, "route 10.244.2.0/24"},
		{"IPv6 route's MTU changed", func(h *host) {
			rt := routeKey{netip.MustParsePrefix("fd00:244:0:2::/64"), 1024}.route(routeSpec{link: h.link("tun0").Attrs().Index, mtu: 1300})
			h.check(h.nl.RouteReplace(rt))
		}, "route fd00:244:0:2::/64"},
		{"address deleted, and its routes with it", func(h *host) {
			h.check(h.nl.AddrDel(h.link("tun0"), &netlink.Addr{IPNet: dst("10.244.1.0/32")}))
		}, "address 10.244.1.0/32"},
		{"IPv6 address deleted", func(h *host) {
			h.check(h.nl.AddrDel(h.link("tun0"), &netlink.Addr{IPNet: dst("fd00:244:0:1::/128")}))
		}, "address fd00:244:0:1::/128"},
		{"device down, and all its routes gone", func(h *host) { h.check(h.nl.LinkSetDown(h.link("tun0"))) }, "device tun0 up"},
		{"device's MTU changed", func(h *host) { h.check(h.nl.LinkSetMTU(h.link("tun0"), 1300)) }, "device tun0 mtu 1472"},
		{"ruleset flushed", func(h *host) {
			h.nft(func(c *nftables.Conn) error { c.FlushRuleset(); return c.Flush() })
		}, "nft table inet tulle"},
		{"our table's rules flushed", func(h *host) {
			h.nft(func(c *nftables.Conn) error { c.FlushTable(ourTable); return c.Flush() })
		}, "nft table inet tulle"},
		{"a member taken out of the set", func(h *host) {
			h.nft(func(c *nftables.Conn) error {
				s, err := c.GetSetByName(ourTable, "members4")
				if err != nil {
					return err
				}
				if err := c.SetDeleteElements(s, []nftables.SetElement{{Key: []byte{192, 0, 2, 2}}}); err != nil {
					return err
				}
				return c.Flush()
			})
		}, "nft set members4"},
		{"forwarding switched off", func(h *host) { h.setSysctl("net/ipv4/ip_forward", "0") }, "sysctl net/ipv4/ip_forward=1"},
		{"IPv6 forwarding switched off", func(h *host) { h.setSysctl("net/ipv6/conf/all/forwarding", "0") }, "sysctl net/ipv6/conf/all/forwarding=1"},
		{"rp_filter made strict", func(h *host) { h.setSysctl("net/ipv4/conf/tun0/rp_filter", "1") }, "sysctl net/ipv4/conf/tun0/rp_filter=2"},
		{"another address on the device", func(h *host) { h.addrs("tun0", "169.254.7.7/16") }, "-address 169.254.7.7/16"},
		{"another route with our mark", func(h *host) { h.route("10.244.9.0/24", "", "tun0", 0, Protocol) }, "-route 10.244.9.0/24"},
		{"the address with another length", func(h *host) {
			h.check(h.nl.AddrDel(h.link("tun0"), &netlink.Addr{IPNet: dst("fd00:244:0:1::/128")}))
			h.addrs("tun0", "fd00:244:0:1::/64")
		}, "address fd00:244:0:1::/128"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			h.tun("tun0")
			r := h.reconciler(Options{})
			h.reconcile(r, dual())
			c.damage(h)
			rep := h.reconcile(r, dual())
			list, want := rep.Repaired, c.want
			if strings.HasPrefix(want, "-") {
				list, want = rep.Removed, want[1:]
			}
			if !slices.ContainsFunc(list, func(s string) bool { return strings.HasPrefix(s, want) }) {
				t.Errorf("%q is not told: %+v", c.want, rep)
			}
			if len(rep.Added)+len(rep.Changed) != 0 {
				t.Errorf("a repair counted as something else: %+v", rep)
			}
			h.wantRoutes(dualRoutes)
			if got, want := h.addrsOf("tun0"), []string{"10.244.1.0/32", "fd00:244:0:1::/128"}; !slices.Equal(got, want) {
				t.Errorf("addresses %v, want %v", got, want)
			}
			h.quiet(r, dual())
		})
	}
}

// The device's address is the source of packets to pods, and of no others: neither while the host's own address is deprecated, as
// when its prefix changes, nor where the host's address is on no link. An earlier version's address becomes one like that, and its routes stay.
func TestTunAddressIsNobodysSource(t *testing.T) {
	source := func(h *host, to, want string) {
		t.Helper()
		list, err := h.nl.RouteGet(netip.MustParseAddr(to).AsSlice())
		h.check(err)
		if got := list[0].Src.String(); got != want {
			t.Errorf("packets to %s leave from %s, want %s", to, got, want)
		}
	}
	h := newHost(t)
	h.up("lo")
	h.tun("tun0")
	h.device("eth0", "fd01:1::11/64")
	h.shell("ip route add default via fd01:1::1 dev eth0")
	h.addrs("tun0", "fd00:244:0:1::/128")
	r := h.reconciler(Options{})
	h.reconcile(r, dual())
	h.quiet(r, dual())
	h.shell("ip address change fd01:1::11/64 dev eth0 preferred_lft 0")
	for _, to := range []string{"2001:db8:9::1", "fd01:1::99", "fd02::1"} {
		source(h, to, "fd01:1::11")
	}
	source(h, "fd00:244:0:2::5", "fd00:244:0:1::")

	h.shell("ip address del fd01:1::11/64 dev eth0; ip address add fd01:1::11/128 dev lo; ip -6 route replace default via fe80::1 dev eth0")
	source(h, "fd00:299::1", "fd01:1::11")

	h.shell("ip address change fd00:244:0:1::/128 dev tun0 preferred_lft forever")
	if rep := h.reconcile(r, dual()); len(rep.Repaired) != 1 || !strings.HasPrefix(rep.Repaired[0], "address fd00:244:0:1::/128") {
		t.Errorf("an address that is not deprecated: %+v", rep)
	}
	h.wantRoutes(append([]string{"default via fe80::1 dev eth0 proto boot metric 1024"}, dualRoutes...))
}

func TestChangesAreNoRepairs(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	r := h.reconciler(Options{})
	h.reconcile(r, dual())
	s := dual()
	s.Peers[0].MTU = 1300
	s.Peers = append(s.Peers[:1], PeerRoute{Prefix: netip.MustParsePrefix("10.244.7.0/24")})
	s.Members = append(s.Members, ips("192.0.2.9", "2001:db8::9")...)
	s.TunAddrs[0] = netip.MustParseAddr("10.244.1.128")
	rep := h.reconcile(r, s)
	if len(rep.Repaired) != 0 {
		t.Errorf("wanted changes counted as repairs: %q", rep.Repaired)
	}
	h.wantRoutes([]string{
		"10.244.0.0/16 dev tun0 proto 84 src 10.244.1.128 mtu 1472",
		"10.244.2.0/24 dev tun0 proto 84 src 10.244.1.128 mtu 1300",
		"10.244.7.0/24 dev tun0 proto 84 src 10.244.1.128 mtu 1472",
		dualRoutes[5], dualRoutes[6], dualRoutes[7],
	})
	h.quiet(r, s)
}

// Without its last address of a family, the device loses all routes of that family, by the kernel. Those of a node that has left are back at once, and nobody
// else has taken them.
func TestLeftNodeKeepsRoutes(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	r := h.reconciler(Options{})
	h.reconcile(r, dual())
	s := dual()
	s.TunAddrs, s.Own = nil, nil
	rep := h.reconcile(r, s)
	if len(rep.Repaired) != 0 || len(rep.Conflicts) != 0 {
		t.Errorf("of the address that was taken away: repairs %q, conflicts %v", rep.Repaired, rep.Conflicts)
	}
	want := []string{
		"10.244.0.0/16 dev tun0 proto 84 mtu 1472",
		"10.244.2.0/24 dev tun0 proto 84 mtu 1400",
		"10.244.3.0/24 dev tun0 proto 84 mtu 1472",
		"fd00:244:0:2::/64 dev tun0 proto 84 metric 1024 mtu 1400",
		"fd00:244:0:2::/128 dev tun0 proto 84 metric 1024 mtu 1400",
		"fd00:244::/32 dev tun0 proto 84 metric 1024 mtu 1472",
	}
	h.wantRoutes(want)
	h.quiet(r, s)
	h.check(h.nl.RouteDel(&netlink.Route{Dst: dst("10.244.2.0/24"), Scope: netlink.SCOPE_NOWHERE, LinkIndex: h.link("tun0").Attrs().Index}))
	if rep = h.reconcile(r, s); len(rep.Repaired) != 1 {
		t.Errorf("a route that somebody has removed: %q", rep.Repaired)
	}
	h.wantRoutes(want)
}

// A replaced route is never missing in between: the kernel tells of no deletion.
func TestReplaceWithoutGap(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	r := h.reconciler(Options{})
	h.reconcile(r, dual())

	events := make(chan netlink.RouteUpdate, 1000)
	done := make(chan struct{})
	defer close(done)
	h.do(func() error { return netlink.RouteSubscribe(events, done) })
	s := dual()
	s.Peers[0].MTU, s.Peers[2].MTU = 1280, 1280
	s.Peers = append(s.Peers, PeerRoute{Prefix: netip.MustParsePrefix("10.244.99.0/24")}) // the last event
	h.reconcile(r, s)
	s.Peers = s.Peers[:3]
	h.reconcile(r, s)
	seen := map[string]bool{}
	for u := range events {
		p := prefixOf(u.Dst).String()
		if u.Type == unix.RTM_DELROUTE && p == "10.244.99.0/24" {
			break
		}
		if u.Type == unix.RTM_DELROUTE {
			t.Errorf("route %s was deleted on the way", p)
		}
		seen[p] = true
	}
	if !seen["10.244.2.0/24"] || !seen["fd00:244:0:2::/64"] {
		t.Errorf("replaced routes not seen: %v", seen)
	}
}

func TestForeignRoutesStay(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	h.device("eth0", "192.0.2.1/24", "2001:db8::1/64")
	h.route("10.244.2.0/24", "192.0.2.254", "eth0", 0, unix.RTPROT_STATIC)          // in the place of ours
	h.route("fd00:244:0:2::/64", "2001:db8::254", "eth0", 1024, unix.RTPROT_STATIC) // likewise
	h.route("10.244.3.0/24", "192.0.2.254", "eth0", 500, unix.RTPROT_STATIC)        // ours beats it
	h.route("10.244.8.0/24", "192.0.2.254", "eth0", 0, unix.RTPROT_BIRD)            // inside the cluster
	h.route("10.244.1.0/24", "", "eth0", 0, unix.RTPROT_BOOT)                       // in our own space: pods
	h.route("198.51.100.0/24", "192.0.2.254", "eth0", 0, Protocol)                  // our number, not our device
	foreign := h.routes()
	r := h.reconciler(Options{})
	for range 2 { // and again: still conflicts, still no change
		rep := h.reconcile(r, dual())
		var text []string
		for _, c := range rep.Conflicts {
			text = append(text, c.String())
			if daemon := strings.Contains(c.What, "proto bird"); daemon != strings.Contains(c.Remedy, "routing daemon") || daemon != (c.Command == "") {
				t.Errorf("a daemon makes its routes again, others are deleted: %+v", c)
			}
		}
		all := strings.Join(text, "\n")
		for _, want := range []string{
			"10.244.2.0/24 via 192.0.2.254 dev eth0 proto static", "fd00:244:0:2::/64 via 2001:db8::254 dev eth0 proto static metric 1024",
			"10.244.8.0/24 via 192.0.2.254 dev eth0 proto bird",
		} {
			if strings.Count(all, want) != 1 {
				t.Errorf("conflict %q told %d times in:\n%s", want, strings.Count(all, want), all)
			}
		}
		if len(rep.Conflicts) != 3 {
			t.Errorf("%d conflicts, want 3:\n%s", len(rep.Conflicts), all)
		}
	}
	got := h.routes()
	for _, f := range foreign {
		if !slices.Contains(got, f) {
			t.Errorf("foreign route is gone: %s", f)
		}
	}
	if slices.Contains(got, dualRoutes[1]) || !slices.Contains(got, dualRoutes[2]) {
		t.Errorf("routes:\n%s", strings.Join(got, "\n"))
	}
	if err := r.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.wantRoutes(foreign)
}

// A pod of this node whose space belongs to another node now keeps its route, and nobody is told to delete it. That of anybody else is told.
func TestRouteOfAStrayPod(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	h.device("eth0", "192.0.2.1/24")
	h.route("10.244.8.7/32", "", "eth0", 0, unix.RTPROT_STATIC)
	h.route("10.244.8.8/32", "", "eth0", 0, unix.RTPROT_STATIC)
	s := dual()
	s.Strays = []netip.Addr{netip.MustParseAddr("10.244.8.7")}
	rep := h.reconcile(h.reconciler(Options{}), s)
	if len(rep.Conflicts) != 1 || !strings.Contains(rep.Conflicts[0].What, "10.244.8.8/32") {
		t.Errorf("conflicts %v", rep.Conflicts)
	}
}

func TestMemberInsideClusterIsNotRouted(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	s := dual()
	s.Members = append(s.Members, netip.MustParseAddr("10.244.2.77"))
	rep := h.reconcile(h.reconciler(Options{}), s)
	if len(rep.Conflicts) != 2 || !strings.Contains(rep.Conflicts[0].What, "10.244.2.77") {
		t.Errorf("conflicts %v", rep.Conflicts)
	}
	h.wantRoutes(dualRoutes[2:])
}

func TestLeftovers(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	h.addrs("tun0", "10.244.77.0/32")
	h.up("tun0")
	h.addrs("tun0", "fd00:244:77::/128")
	h.route("10.244.77.0/24", "", "tun0", 0, Protocol)
	h.route("fd00:244:77::/64", "", "tun0", 1024, Protocol)
	h.route("10.244.2.0/24", "", "tun0", 0, Protocol) // wanted, but without source and MTU
	h.route("fd00:244:0:2::/64", "", "tun0", 1024, Protocol)
	h.check(h.nl.RouteAdd(&netlink.Route{Dst: dst("10.244.88.0/24"), Type: unix.RTN_UNREACHABLE, Protocol: Protocol, Priority: 4294967295}))
	h.check(h.nl.RouteAdd(&netlink.Route{Dst: dst("fd00:244:88::/64"), Type: unix.RTN_UNREACHABLE, Protocol: Protocol, Priority: 4294967295}))
	h.nft(func(c *nftables.Conn) error {
		tab := c.AddTable(ourTable)
		c.AddChain(&nftables.Chain{Name: "old", Table: tab})
		c.AddTable(&nftables.Table{Name: "theirs", Family: nftables.TableFamilyINet})
		return c.Flush()
	})
	r := h.reconciler(Options{})
	rep := h.reconcile(r, dual())
	h.wantRoutes(dualRoutes)
	if got, want := h.addrsOf("tun0"), []string{"10.244.1.0/32", "fd00:244:0:1::/128"}; !slices.Equal(got, want) {
		t.Errorf("addresses %v, want %v", got, want)
	}
	if len(rep.Repaired) != 3 {
		t.Errorf("want two routes and the table mended: %q", rep.Repaired)
	}
	if got := h.tables(); !slices.Contains(got, "1 theirs") {
		t.Errorf("nft tables %v", got)
	}
	h.quiet(r, dual())
}

// snapshot is all of a namespace that a Reconciler could change.
func (h *host) snapshot() string {
	var b strings.Builder
	fmt.Fprintln(&b, h.routes(), h.addrsOf("lo"), h.tables())
	for _, c := range sysctlsFor("eth0", "", nil, true, true) {
		fmt.Fprintln(&b, c.name, h.sysctl(c.name))
	}
	return b.String()
}

func TestRemoveLeavesNothing(t *testing.T) {
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprintf("restart=%v", restart), func(t *testing.T) {
			h := newHost(t)
			h.tun("tun0")
			h.device("eth0", "192.0.2.1/24")
			before := h.snapshot()
			tunBefore := h.sysctl("net/ipv4/conf/tun0/rp_filter")
			o := Options{Tun: "tun0", SysctlFile: filepath.Join(t.TempDir(), "run", "sysctls.json")}
			r := h.reconciler(o)
			h.reconcile(r, dual())
			if h.snapshot() == before {
				t.Fatal("the snapshot does not show what Reconcile does")
			}
			if restart {
				r = h.reconciler(o)
				h.quiet(r, dual())
			}
			for range 2 { // what is gone is no error
				if err := r.Remove(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			if after := h.snapshot(); after != before {
				t.Errorf("after:\n%s\nbefore:\n%s", after, before)
			}
			if got := h.addrsOf("tun0"); len(got) != 0 {
				t.Errorf("addresses left: %v", got)
			}
			if got := h.sysctl("net/ipv4/conf/tun0/rp_filter"); got != tunBefore {
				t.Errorf("rp_filter of tun0 is %s, was %s", got, tunBefore)
			}
			if m, _ := filepath.Glob(o.SysctlFile + "*"); len(m) != 0 {
				t.Errorf("files left: %v", m)
			}
			// And without the device.
			h.reconcile(r, dual())
			h.check(h.nl.LinkDel(h.link("tun0")))
			if err := r.Remove(t.Context()); err != nil {
				t.Fatal(err)
			}
			if after := h.snapshot(); after != before {
				t.Errorf("after, without the device:\n%s\nbefore:\n%s", after, before)
			}
		})
	}
}

// many is 1,000 peers with 10 prefixes each.
func many() State {
	s := dual()
	s.Peers, s.Members = nil, nil
	for i := range 1000 {
		a := byte(i >> 8)
		b := byte(i)
		s.Members = append(s.Members, netip.AddrFrom4([4]byte{198, 18, a, b}), netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 14: a, 15: b}))
		for j := range 5 {
			n := uint16(i*5+j) + 4096
			s.Peers = append(s.Peers,
				PeerRoute{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(n >> 8), byte(n)}), 32), MTU: 1400},
				PeerRoute{Prefix: netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 0, 2, 0x44, 1, 0, byte(n >> 8), byte(n)}), 64), MTU: 1400})
		}
	}
	return s
}

func TestScale(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	s := many()
	r := h.reconciler(Options{})
	if rep := h.reconcile(r, s); len(rep.Added) < 10000 {
		t.Errorf("%d added", len(rep.Added))
	}
	h.quiet(r, s)
	for i := range s.Peers {
		s.Peers[i].MTU = 1300
	}
	if rep := h.reconcile(r, s); len(rep.Changed) != 15000 { // of the 10,000, those of IPv6 have one of their first address, too
		t.Errorf("%d changed", len(rep.Changed))
	}
	h.check(r.Remove(t.Context()))
	h.wantRoutes(nil)
}

// BenchmarkReconcile is one pass over 10,000 routes of 1,000 peers.
func BenchmarkReconcile(b *testing.B) {
	h := newHost(b)
	h.tun("tun0")
	s := many()
	r := h.reconciler(Options{})
	h.reconcile(r, s)
	b.Run("same", func(b *testing.B) {
		for b.Loop() {
			h.reconcile(r, s)
		}
	})
	b.Run("one", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			s.Peers[0].MTU = 1300 + i%2
			h.reconcile(r, s)
		}
	})
}

func TestInvalidState(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	r := h.reconciler(Options{})
	for name, c := range map[string]struct {
		s    State
		want string
	}{
		"no device":     {State{}, "device name"},
		"gone device":   {State{Tun: "tun9"}, "tun9"},
		"two addresses": {State{Tun: "tun0", TunAddrs: ips("10.0.0.1", "10.0.0.2")}, "10.0.0.2"},
		"default route": {State{Tun: "tun0", ClusterCIDRs: pfx("0.0.0.0/0")}, "0.0.0.0/0"},
		"peer twice":    {State{Tun: "tun0", Peers: []PeerRoute{{Prefix: pfx("10.1.0.0/24")[0]}, {Prefix: pfx("10.1.0.7/24")[0]}}}, "twice"},
		"tiny MTU":      {State{Tun: "tun0", MTU: 20}, "20"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := r.Reconcile(t.Context(), c.s)
			wantError(t, err, c.want)
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Reconcile(ctx, dual()); err == nil {
		t.Error("an ended context is no error")
	}
}

// An error of nf_tables is told once, and not met again in what comes after it.
func TestNFTErrorDoesNotStick(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	r := h.reconciler(Options{Tun: "tun0"})
	r.nft.conn.DelTable(&nftables.Table{Name: "nowhere", Family: nftables.TableFamilyINet}) // in the next batch
	if _, err := r.Reconcile(t.Context(), dual()); err == nil {
		t.Fatal("no error")
	}
	h.wantRoutes(dualRoutes) // the rest is done all the same
	if got := h.tables(); len(got) != 0 {
		t.Errorf("half a batch was applied: %v", got)
	}
	h.reconcile(r, dual())
	h.quiet(r, dual())
	h.check(r.Remove(t.Context()))
}
