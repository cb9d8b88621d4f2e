package hostnet

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

// TestDirectRoutes switches prefixes and a host between the tunnel and the direct path, in one step each, and removes all.
func TestDirectRoutes(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	h.tun(DirectDevice)
	h.device("eth0", "192.0.2.1/24", "2001:db8::1/64")
	r := h.reconciler(Options{})
	s := dual()
	s.Members = ips("192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2")
	s.Direct, s.ProbeAddrs = DirectDevice, ips("10.244.1.255", "fd00:244:0:1:ffff:ffff:ffff:ffff")
	probes := ips("10.244.2.255", "fd00:244:0:2:ffff:ffff:ffff:ffff")
	s.NextHops = []NextHop{{probes[0], s.Members[1], "eth0"}, {probes[1], s.Members[3], "eth0"}}
	s.Hosts = []HostRoute{{s.Members[1], 1400, ""}, {s.Members[3], 1380, ""}}
	h.reconcile(r, s)
	h.quiet(r, s)
	h.quiet(h.reconciler(Options{}), s)
	if h.sysctl("net/ipv4/conf/"+DirectDevice+"/accept_local") != "1" {
		t.Error("its own source would be a martian")
	}
	way := func(to netip.Addr, iif string) string {
		got, err := h.nl.RouteGetWithOptions(to.AsSlice(), &netlink.RouteGetOptions{Iif: iif, SrcAddr: s.tunAddr(to.Is4()).AsSlice()})
		if err != nil {
			return err.Error()
		}
		l, err := h.nl.LinkByIndex(got[0].LinkIndex)
		h.check(err)
		return l.Attrs().Name + " " + addrOf(got[0].Gw).String()
	}
	for i, a := range probes {
		if got, want := way(a, DirectDevice), "eth0 "+s.NextHops[i].Via.String(); got != want {
			t.Errorf("a probe to %v leaves by %s, want %s", a, got, want)
		}
		if got := way(a.Prev(), DirectDevice); strings.Contains(got, "tun0") || strings.Contains(got, "eth0") {
			t.Errorf("what no peer answers to leaves by %s", got)
		}
	}

	tunnel := s.Peers
	s.Peers = slices.Clone(s.Peers)
	for i := range s.Peers {
		via := s.Members[1]
		if s.Peers[i].Prefix.Addr().Is6() {
			via = s.Members[3]
		}
		s.Peers[i].Via, s.Peers[i].Device, s.Peers[i].MTU = via, "eth0", 1500
	}
	s.Hosts = []HostRoute{{s.Members[1], 1500, "eth0"}, {s.Members[3], 1500, "eth0"}}
	rep := h.reconcile(r, s)
	own := []string{"route fd00:244:0:2::/128 dev tun0 src fd00:244:0:1:: mtu 1400"} // only the tunnel needs it
	if len(rep.Changed) != len(s.Peers)+len(s.Hosts) || !slices.Equal(rep.Removed, own) || len(rep.Repaired)+len(rep.Conflicts) != 0 {
		t.Errorf("to direct: %+v", rep)
	}
	h.quiet(r, s)
	h.quiet(h.reconciler(Options{}), s)
	for _, p := range s.Peers {
		if want := "route " + p.Prefix.String() + " via " + p.Via.String() + " dev eth0"; !slices.ContainsFunc(rep.Changed, func(c string) bool { return strings.HasPrefix(c, want) && strings.Contains(c, "mtu 1500") }) {
			t.Errorf("%s is not in %v", want, rep.Changed)
		}
		left, err := []PeerRoute(nil), error(nil)
		h.do(func() error { left, err = LeftDirect(); return err })
		if !slices.Contains(left, p) {
			t.Errorf("%+v is not left: %+v", p, left)
		}
	}
	s.Peers = tunnel
	s.Hosts = []HostRoute{{s.Members[1], 1400, ""}, {s.Members[3], 1380, ""}}
	if rep := h.reconcile(r, s); len(rep.Changed) != len(s.Peers)+len(s.Hosts) || !slices.Equal(rep.Added, own) || len(rep.Removed) != 0 {
		t.Errorf("back to the tunnel: %+v", rep)
	}

	// The link goes, and the direct routes with it: into the tunnel, without an error.
	for i := range s.Peers {
		s.Peers[i].Via, s.Peers[i].Device = s.Members[1], "eth0"
		if s.Peers[i].Prefix.Addr().Is6() {
			s.Peers[i].Via = s.Members[3]
		}
	}
	h.reconcile(r, s)
	h.check(h.nl.LinkSetDown(h.link("eth0")))
	h.reconcile(r, s)
	if got := way(probes[0], ""); !strings.HasPrefix(got, "tun0") {
		t.Errorf("without the link packets leave by %s", got)
	}

	h.check(r.Remove(t.Context()))
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := r.directRoutes(family)
		h.check(err)
		rules, err := r.tableRules(family, DirectTable)
		h.check(err)
		if len(routes)+len(rules) > 0 {
			t.Errorf("left behind: %v %v", routes, rules)
		}
	}
	for _, rt := range h.routes() {
		if strings.Contains(rt, "10.244") || strings.Contains(rt, "fd00:244") {
			t.Errorf("left behind: %s", rt)
		}
	}
}

// The kernel takes the preferred source from an IPv6 route when somebody removes that address (net/ipv6/route.c, rt6_remove_prefsrc), and an IPv4 route
// goes with it. Either is put back, nobody else is blamed, and the next agent starts and finds the direct path.
func TestDirectRoutesLoseTheirSource(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	h.device("eth0", "192.0.2.1/24", "2001:db8::1/64")
	r := h.reconciler(Options{})
	s, tunnel := dual(), dual().Peers
	for i := range s.Peers {
		p := &s.Peers[i]
		p.Via, p.Device, p.MTU = netip.MustParseAddr("192.0.2.2"), "eth0", 1500
		if p.Prefix.Addr().Is6() {
			p.Via = netip.MustParseAddr("2001:db8::2")
		}
	}
	h.reconcile(r, s)
	want := h.routes()
	flush := func() {
		t.Helper()
		h.shell("ip addr flush dev tun0; ip -6 addr flush dev tun0")
		if got := h.found(func() ([]Problem, error) { return OverlapProblems("tun0", s.ClusterCIDRs, s.Own) }); len(got) != 0 {
			t.Errorf("overlaps: %v", got)
		}
		h.do(func() error { return CheckOverlap("tun0", s.ClusterCIDRs, s.Own, true) })
	}
	flush()
	rep := h.reconcile(r, s)
	if len(rep.Conflicts) != 0 {
		t.Errorf("conflicts %v", rep.Conflicts)
	}
	h.wantRoutes(want)
	h.quiet(r, s)

	flush()
	var left []PeerRoute
	h.do(func() (err error) { left, err = LeftDirect(); return err })
	if !slices.ContainsFunc(left, func(p PeerRoute) bool { return p.Prefix.Addr().Is6() }) {
		t.Errorf("left: %v", left)
	}
	s.Peers = tunnel
	if rep := h.reconcile(h.reconciler(Options{}), s); len(rep.Conflicts) != 0 {
		t.Errorf("back to the tunnel: conflicts %v", rep.Conflicts)
	}
	for _, rt := range h.routes() {
		if strings.Contains(rt, " via ") && strings.Contains(rt, "proto 84") {
			t.Errorf("not back in the tunnel: %s", rt)
		}
	}
}
