package hostnet

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/nftables"
	nl "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// watch counts callbacks until the test ends.
func (h *host) watch(r *Reconciler) *atomic.Int64 {
	h.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var calls atomic.Int64
	done := make(chan error, 1)
	go func() { done <- r.Watch(ctx, func() { calls.Add(1) }) }()
	h.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			h.t.Error(err)
		}
	})
	eventually(h.t, "the watch begins", func() bool { return calls.Load() > 0 })
	h.settle(&calls)
	return &calls
}

// settle waits until no callback came for some debounce times in which this process was not held up: on a busy machine a callback may be
// due and late.
func (h *host) settle(calls *atomic.Int64) {
	const late = 10 * watchDebounce
	last, end := calls.Load(), time.Now().Add(5*time.Second)
	for quiet := 0; quiet < 30; quiet++ {
		began := time.Now()
		time.Sleep(watchDebounce)
		if now := calls.Load(); now != last || time.Since(began) > watchDebounce+late && began.Before(end) {
			last, quiet = now, -1
		}
	}
}

const watchDebounce = 5 * time.Millisecond

func watched(t *testing.T) (*host, *Reconciler, *atomic.Int64) {
	t.Helper()
	h := newHost(t)
	h.tun("tun0")
	h.device("eth0", "192.0.2.1/24", "2001:db8::1/64")
	r := h.reconciler(Options{Tun: "tun0", PodsTable: "tulle-pods", Debounce: watchDebounce})
	h.reconcile(r, dual())
	return h, r, h.watch(r)
}

func TestWatchTells(t *testing.T) {
	for _, c := range []struct {
		name   string
		damage func(h *host)
	}{
		{"route deleted", func(h *host) {
			h.check(h.nl.RouteDel(&netlink.Route{Dst: dst("10.244.2.0/24"), Scope: netlink.SCOPE_NOWHERE}))
		}},
		{"IPv6 route deleted", func(h *host) { h.check(h.nl.RouteDel(&netlink.Route{Dst: dst("fd00:244:0:2::/64")})) }},
		{"route taken over by another", func(h *host) {
			h.check(h.nl.RouteReplace(&netlink.Route{Dst: dst("10.244.2.0/24"), Gw: []byte{192, 0, 2, 7}, Protocol: unix.RTPROT_STATIC}))
		}},
		{"foreign route inside the cluster", func(h *host) { h.route("10.244.9.0/24", "192.0.2.7", "eth0", 0, unix.RTPROT_STATIC) }},
		{"address deleted", func(h *host) {
			h.check(h.nl.AddrDel(h.link("tun0"), &netlink.Addr{IPNet: dst("10.244.1.0/32")}))
		}},
		{"another address on the device", func(h *host) { h.addrs("tun0", "10.9.9.9/32") }},
		{"device down", func(h *host) { h.check(h.nl.LinkSetDown(h.link("tun0"))) }},
		{"device gone", func(h *host) { h.check(h.nl.LinkDel(h.link("tun0"))) }},
		{"device's MTU", func(h *host) { h.check(h.nl.LinkSetMTU(h.link("tun0"), 1300)) }},
		{"ruleset flushed", func(h *host) {
			h.nft(func(c *nftables.Conn) error { c.FlushRuleset(); return c.Flush() })
		}},
		{"member deleted from the set", func(h *host) {
			h.nft(func(c *nftables.Conn) error {
				c.FlushSet(&nftables.Set{Table: ourTable, Name: "members4"})
				return c.Flush()
			})
		}},
		{"forwarding off", func(h *host) { h.setSysctl("net/ipv4/ip_forward", "0") }},
		{"forwarding off on an uplink", func(h *host) { h.setSysctl("net/ipv4/conf/eth0/forwarding", "0") }},
		{"IPv6 forwarding off", func(h *host) { h.setSysctl("net/ipv6/conf/all/forwarding", "0") }},
		{"rp_filter", func(h *host) { h.setSysctl("net/ipv4/conf/tun0/rp_filter", "1") }},
		{"default route", func(h *host) { h.route("0.0.0.0/0", "192.0.2.7", "eth0", 0, unix.RTPROT_STATIC) }},
		{"an uplink's MTU", func(h *host) { h.check(h.nl.LinkSetMTU(h.link("eth0"), 1400)) }},
		{"an uplink is gone", func(h *host) { h.check(h.nl.LinkDel(h.link("eth0"))) }},
		{"the way to a member", func(h *host) { h.route("192.0.2.2/32", "192.0.2.9", "eth0", 0, unix.RTPROT_STATIC) }},
		{"underlay address", func(h *host) { h.addrs("eth0", "192.0.2.33/24") }},
	} {
		t.Run(c.name, func(t *testing.T) {
			h, _, calls := watched(t)
			before := calls.Load()
			c.damage(h)
			eventually(t, "a callback", func() bool { return calls.Load() > before })
		})
	}
}

// tabled is dual with all that HostsTable and DirectTable hold.
func tabled() State {
	s := dual()
	s.Members = ips("192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2")
	s.Hosts = []HostRoute{{s.Members[1], 1400, ""}, {s.Members[3], 1380, "eth0"}}
	s.Direct, s.ProbeAddrs = DirectDevice, ips("10.244.1.255", "fd00:244:0:1:ffff:ffff:ffff:ffff")
	s.NextHops = []NextHop{
		{netip.MustParseAddr("10.244.2.255"), s.Members[1], "eth0"},
		{netip.MustParseAddr("fd00:244:0:2:ffff:ffff:ffff:ffff"), s.Members[3], "eth0"},
	}
	return s
}

// policies lists both tables and their rules as text.
func (h *host) policies() (out []string) {
	h.t.Helper()
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		for _, table := range []int{HostsTable, DirectTable} {
			rules, err := h.nl.RuleListFiltered(family, &netlink.Rule{Table: table}, netlink.RT_FILTER_TABLE)
			h.check(err)
			for i := range rules {
				out = append(out, rules[i].String())
			}
			routes, err := dump("routes", func() ([]netlink.Route, error) {
				return h.nl.RouteListFiltered(family, &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
			})
			h.check(err)
			for i := range routes {
				out = append(out, routes[i].String())
			}
		}
	}
	slices.Sort(out)
	return out
}

// Without these rules and routes pods' packets to hosts leave under pods' addresses. Whoever takes one away is told of, what we do
// ourselves is not, and with a Reconcile as the callback the two come to rest.
func TestWatchTables(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	h.tun(DirectDevice)
	h.device("eth0", "192.0.2.1/24", "2001:db8::1/64")
	r := h.reconciler(Options{Tun: "tun0", Debounce: watchDebounce})
	h.reconcile(r, tabled())
	calls := h.watch(r)
	all := h.policies()
	told := func(what string, f func()) {
		t.Helper()
		h.settle(calls)
		before := calls.Load()
		f()
		eventually(t, what+": a callback", func() bool { return calls.Load() > before })
		h.settle(calls)
		before = calls.Load()
		h.reconcile(r, tabled())
		h.settle(calls)
		if n := calls.Load() - before; n != 0 {
			t.Errorf("%s: its repair gives %d callbacks", what, n)
		}
		if got := h.policies(); !slices.Equal(got, all) {
			t.Errorf("%s: %q, want %q", what, got, all)
		}
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		for _, table := range []int{HostsTable, DirectTable} {
			what := fmt.Sprintf("table %d, family %d", table, family)
			rules, err := h.nl.RuleListFiltered(family, &netlink.Rule{Table: table}, netlink.RT_FILTER_TABLE)
			h.check(err)
			told(what+": rule deleted", func() { h.check(h.nl.RuleDel(&rules[0])) })
			routes, err := h.nl.RouteListFiltered(family, &netlink.Route{Table: table, Protocol: Protocol}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
			h.check(err)
			for i := range routes {
				told(what+": route deleted", func() { h.check(h.nl.RouteDel(&routes[i])) })
				theirs := &netlink.Route{Dst: routes[i].Dst, Table: table, Priority: routes[i].Priority, Protocol: unix.RTPROT_STATIC, Type: unix.RTN_UNREACHABLE}
				told(what+": route taken over by another", func() { h.check(h.nl.RouteReplace(theirs)) })
			}
		}
	}
	told("rule of another source", func() {
		rule := netlink.NewRule()
		rule.Priority, rule.Table, rule.Src = HostsTable, HostsTable, dst("10.244.77.0/24")
		h.check(h.nl.RuleAdd(rule))
	})
	quiet := func(what string, f func()) {
		t.Helper()
		before := calls.Load()
		f()
		h.settle(calls)
		if n := calls.Load() - before; n != 0 {
			t.Errorf("%s: %d callbacks", what, n)
		}
	}
	quiet("our own changes", func() {
		s := tabled()
		s.Hosts[0].MTU, s.Hosts[1].Device = 1300, ""
		h.reconcile(r, s)
		h.settle(calls)
		s.Hosts, s.NextHops = s.Hosts[1:], s.NextHops[:1]
		h.reconcile(r, s)
		h.settle(calls)
		s.Direct = ""
		h.reconcile(r, s)
	})
	quiet("others' rules and tables", func() {
		rule := netlink.NewRule()
		rule.Priority, rule.Table, rule.Src = 10000, 100, dst("10.244.1.0/24") // behind ours; see TestRulesBeforeVPNs
		h.check(h.nl.RuleAdd(rule))
		h.check(h.nl.RouteAdd(&netlink.Route{Dst: dst("192.0.2.2/32"), LinkIndex: h.link("eth0").Attrs().Index, Table: 100, Scope: netlink.SCOPE_LINK}))
	})
	quiet("remove", func() { h.check(r.Remove(t.Context())) })
}

// A carrier that comes back changes no route, and its loss was reported to an operator.
func TestWatchTellsOfCarriers(t *testing.T) {
	h, _, calls := watched(t)
	for _, set := range []func(netlink.Link) error{h.nl.LinkSetDown, h.nl.LinkSetUp, h.nl.LinkSetDown, h.nl.LinkSetUp} {
		h.settle(calls)
		before := calls.Load()
		h.check(set(h.link("eth0-far")))
		eventually(t, "a callback", func() bool { return calls.Load() > before })
	}
}

// The agent knows uplinks by their names, and another one would be missed until the next look at the whole host. Of IPv4 addresses the kernel
// tells again when their device gets another name, of IPv6 ones it does not.
func TestWatchTellsOfNames(t *testing.T) {
	h, _, calls := watched(t)
	h.shell("ip address del 192.0.2.1/24 dev eth0; ip link set eth0 down") // kernels before 6.2 rename nothing that is up
	h.settle(calls)
	before := calls.Load()
	h.check(h.nl.LinkSetName(h.link("eth0"), "ens3"))
	eventually(t, "a callback", func() bool { return calls.Load() > before })
}

// Without their table pods' source checks are gone. It is told of when it goes, not of each pod.
func TestWatchTellsOfSourceChecks(t *testing.T) {
	h, _, calls := watched(t)
	checks := &nftables.Table{Name: "tulle-pods", Family: nftables.TableFamilyNetdev}
	h.settle(calls)
	before := calls.Load()
	h.nft(func(c *nftables.Conn) error {
		c.AddTable(checks)
		c.AddChain(&nftables.Chain{Name: "pod", Table: checks})
		if err := c.Flush(); err != nil {
			return err
		}
		c.DelChain(&nftables.Chain{Name: "pod", Table: checks})
		c.AddTable(&nftables.Table{Name: "others", Family: nftables.TableFamilyNetdev})
		c.DelTable(&nftables.Table{Name: "others", Family: nftables.TableFamilyNetdev})
		return c.Flush()
	})
	h.settle(calls)
	if n := calls.Load() - before; n != 0 {
		t.Errorf("%d callbacks for pods and others", n)
	}
	before = calls.Load()
	h.nft(func(c *nftables.Conn) error { c.DelTable(checks); return c.Flush() })
	eventually(t, "a callback", func() bool { return calls.Load() > before })
}

// A network manager that starts again may flush the routes to pods: those are told, and not those that go with a pod's link.
func TestWatchTellsOfPodsRoutes(t *testing.T) {
	h, _, calls := watched(t)
	for _, pod := range []string{"10.244.1.77/32", "fd00:244:0:1::77/128"} {
		h.settle(calls)
		h.device("veth-pod")
		rt := h.route(pod, "", "veth-pod", 0, unix.RTPROT_STATIC)
		h.settle(calls)
		before := calls.Load()
		h.check(h.nl.RouteDel(rt))
		eventually(t, "a callback", func() bool { return calls.Load() > before })
		h.route(pod, "", "veth-pod", 0, unix.RTPROT_STATIC)
		h.settle(calls)
		before = calls.Load()
		h.check(h.nl.LinkDel(h.link("veth-pod")))
		h.settle(calls)
		if n := calls.Load() - before; n != 0 {
			t.Errorf("%s: %d callbacks for a pod that goes", pod, n)
		}
	}
}

func TestWatchIsSilent(t *testing.T) {
	h, r, calls := watched(t)
	quiet := func(what string, f func()) {
		t.Helper()
		before := calls.Load()
		f()
		h.settle(calls)
		if n := calls.Load() - before; n != 0 {
			t.Errorf("%s: %d callbacks", what, n)
		}
	}
	quiet("a reconcile without work", func() { h.quiet(r, dual()) })
	s := dual()
	quiet("our own changes", func() {
		s.Peers[0].MTU, s.Peers[2].MTU = 1300, 1300
		s.Peers = append(s.Peers, PeerRoute{Prefix: pfx("10.244.66.0/24")[0]})
		s.Members = append(s.Members, ips("192.0.2.44")...)
		s.TunAddrs = ips("10.244.1.9", "fd00:244:0:1::9")
		s.MTU = 1450
		h.reconcile(r, s)
		h.settle(calls) // or the first State's events would be held against the second one
		s.Peers = s.Peers[:3]
		s.Masquerade = false
		h.reconcile(r, s)
	})
	quiet("pods", func() {
		h.device("veth-pod", "10.244.1.1/24", "fd00:244:0:1::1/64")
		h.route("10.244.1.77/32", "", "veth-pod", 0, unix.RTPROT_STATIC)
		h.check(h.nl.LinkDel(h.link("veth-pod")))
	})
	quiet("others' routes and tables", func() {
		h.route("198.51.100.0/24", "192.0.2.7", "eth0", 0, unix.RTPROT_STATIC)
		h.nft(func(c *nftables.Conn) error {
			c.AddTable(&nftables.Table{Name: "theirs", Family: nftables.TableFamilyINet})
			return c.Flush()
		})
	})
	quiet("remove", func() { h.check(r.Remove(t.Context())) })
}

// Many events give few callbacks, and the last event is never lost.
func TestWatchGathers(t *testing.T) {
	h, _, calls := watched(t)
	before, began := calls.Load(), time.Now()
	for i := range 200 {
		h.route("10.244.9.0/24", "192.0.2.7", "eth0", i+1, unix.RTPROT_STATIC)
	}
	eventually(t, "a callback", func() bool { return calls.Load() > before })
	h.settle(calls)
	// One for each time that events are gathered, and one for what was under way.
	if n, most := calls.Load()-before, int64(time.Since(began)/watchDebounce)+2; n > most {
		t.Errorf("%d callbacks for 200 events, at most %d may be", n, most)
	}
}

// With a Reconcile as its callback, damage is repaired and the two come to rest.
func TestWatchAndReconcile(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	r := h.reconciler(Options{Tun: "tun0", Debounce: watchDebounce})
	h.reconcile(r, dual())
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var runs atomic.Int64
	var last atomic.Pointer[error] // a run may meet the damage while it is done; the event brings another
	done := make(chan error, 1)
	go func() {
		done <- r.Watch(ctx, func() {
			runs.Add(1)
			if _, err := r.Reconcile(ctx, dual()); ctx.Err() == nil {
				last.Store(&err)
			}
		})
	}()
	repaired := func() bool {
		routes := h.routes()
		return len(routes) == len(dualRoutes) && len(h.tables()) == 1
	}
	h.check(h.nl.RouteDel(&netlink.Route{Dst: dst("10.244.2.0/24"), Scope: netlink.SCOPE_NOWHERE}))
	eventually(t, "the route is back", repaired) // even if it went before the watch began
	h.nft(func(c *nftables.Conn) error { c.FlushRuleset(); return c.Flush() })
	h.check(h.nl.LinkSetDown(h.link("tun0")))
	eventually(t, "all is back", repaired)
	h.settle(&runs)
	h.wantRoutes(dualRoutes)
	if err := *last.Load(); err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Events that the socket had no room for count as one that concerns us.
func TestLostEventsCount(t *testing.T) {
	h := newHost(t)
	h.device("eth0", "192.0.2.1/24")
	ctx := t.Context()
	events := make(chan struct{}, 1)
	done := make(chan error, 1)
	h.do(func() error {
		c, err := listen(unix.NETLINK_ROUTE, unix.RTNLGRP_IPV4_ROUTE)
		if err != nil {
			return err
		}
		t.Cleanup(func() { c.Close() })
		if err := c.SetReadBuffer(1); err != nil { // the kernel's smallest
			return err
		}
		for i := range 100 {
			h.route("198.51.100.0/24", "192.0.2.7", "eth0", i+1, unix.RTPROT_STATIC)
		}
		go func() { done <- receive(ctx, c, func(nl.Message) bool { return false }, events) }()
		return nil
	})
	select {
	case <-events:
	case err := <-done:
		t.Fatal(err)
	case <-time.After(30 * time.Second):
		t.Fatal("nothing told")
	}
}
