package hostnet

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

// rules are the host's policy rules beside the kernel's own, as text.
func (h *host) rules() (out []string) {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := h.nl.RuleList(family)
		h.check(err)
		for i := range list {
			if list[i].Priority != 0 && list[i].Priority < 32766 {
				out = append(out, hostRuleText(prefixOf(list[i].Src), list[i].Priority))
			}
		}
	}
	slices.Sort(out)
	return out
}

// hostWay is the device by which a packet from src, of a pod behind veth0, leaves to dst.
func (h *host) hostWay(src, dst string) string {
	list, err := h.nl.RouteGetWithOptions(netip.MustParseAddr(dst).AsSlice(), &netlink.RouteGetOptions{SrcAddr: netip.MustParseAddr(src).AsSlice(), Iif: "veth0"})
	h.check(err)
	l, err := h.nl.LinkByIndex(list[0].LinkIndex)
	h.check(err)
	return l.Attrs().Name
}

// Pods' packets to members' underlay addresses take the tunnel, and nothing else does: not the host's own, not those to
// other hosts beside the members. What is taken away comes back, and Remove leaves nothing.
func TestHostsThroughTheTunnel(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	h.device("eth0", "192.0.2.1/24", "2001:db8::1/64")
	h.device("veth0")
	for _, p := range []string{"10.244.1.5/32", "fd00:244:0:1::5/128"} {
		h.route(p, "", "veth0", 0, 0)
	}
	r := h.reconciler(Options{})
	s := dual()
	s.Members = ips("192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2")
	s.Hosts = []HostRoute{{netip.MustParseAddr("192.0.2.2"), 1400, ""}, {netip.MustParseAddr("2001:db8::2"), 1380, ""}}
	h.reconcile(r, s)
	h.quiet(r, s)
	h.quiet(h.reconciler(Options{}), s)
	if got, want := h.rules(), []string{"rule from 10.244.1.0/24 lookup 8484", "rule from fd00:244:0:1::/64 lookup 8484"}; !slices.Equal(got, want) {
		t.Errorf("rules %v, want %v", got, want)
	}
	for _, c := range []struct{ src, dst, dev string }{
		{"10.244.1.5", "192.0.2.2", "tun0"}, {"10.244.1.5", "192.0.2.3", "eth0"},
		{"fd00:244:0:1::5", "2001:db8::2", "tun0"}, {"fd00:244:0:1::5", "2001:db8::3", "eth0"},
	} {
		if got := h.hostWay(c.src, c.dst); got != c.dev {
			t.Errorf("from %s to %s by %s, want %s", c.src, c.dst, got, c.dev)
		}
	}
	own, err := h.nl.RouteGet(netip.MustParseAddr("192.0.2.2").AsSlice())
	h.check(err)
	if own[0].LinkIndex != h.link("eth0").Attrs().Index {
		t.Error("the host's own packets to a member enter the tunnel")
	}

	list, err := h.nl.RuleList(netlink.FAMILY_V4)
	h.check(err)
	for i := range list {
		if list[i].Table == HostsTable {
			h.check(h.nl.RuleDel(&list[i]))
		}
	}
	if rep := h.reconcile(r, s); len(rep.Repaired) != 1 || !strings.Contains(rep.Repaired[0], "rule from 10.244.1.0/24") {
		t.Errorf("a rule was taken away: %+v", rep)
	}
	s.Hosts[0].MTU = 1300
	if rep := h.reconcile(r, s); len(rep.Changed) != 1 || !strings.Contains(rep.Changed[0], "mtu 1300") {
		t.Errorf("another MTU: %+v", rep)
	}
	s.Hosts = s.Hosts[1:]
	if rep := h.reconcile(r, s); len(rep.Removed) != 2 || h.hostWay("10.244.1.5", "192.0.2.2") != "eth0" {
		t.Errorf("a member has gone: %+v", rep)
	}
	h.check(r.Remove(t.Context()))
	if got := h.rules(); len(got) != 0 {
		t.Errorf("left behind: %v", got)
	}
}

// VPNs have policy rules, too: Tailscale's come before 8484, and those of wg-quick, which names no priority, before whatever is there. Ours stay
// in front of them, and are back where they were when the VPN ends. Rules behind ours, or that lead nowhere, change nothing.
func TestRulesBeforeVPNs(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	h.tun(DirectDevice)
	h.device("eth0", "192.0.2.1/24", "2001:db8::1/64")
	h.device("vpn0", "198.51.100.1/24", "2001:db8:99::1/64")
	h.device("veth0")
	for _, p := range []string{"10.244.1.5/32", "fd00:244:0:1::5/128"} {
		h.route(p, "", "veth0", 0, 0)
	}
	r := h.reconciler(Options{Tun: "tun0", Debounce: watchDebounce})
	s := tabled()
	h.reconcile(r, s)
	calls := h.watch(r)
	before := h.policies()
	probe := func(dst netip.Addr) string {
		list, err := h.nl.RouteGetWithOptions(dst.AsSlice(), &netlink.RouteGetOptions{SrcAddr: s.tunAddr(dst.Is4()).AsSlice(), Iif: DirectDevice})
		h.check(err)
		l, err := h.nl.LinkByIndex(list[0].LinkIndex)
		h.check(err)
		return l.Attrs().Name
	}
	ways := func(what string) {
		t.Helper()
		if got := h.hostWay("10.244.1.5", "192.0.2.2"); got != "tun0" {
			t.Errorf("%s: a pod's packets to a member leave by %s", what, got)
		}
		for _, n := range s.NextHops {
			if got := probe(n.Probe); got != "eth0" {
				t.Errorf("%s: a probe of the direct path to %v leaves by %s", what, n.Probe, got)
			}
		}
	}
	ways("at first")
	change := func(what, line string, told bool) {
		t.Helper()
		h.settle(calls)
		n := calls.Load()
		h.shell(line)
		if told {
			eventually(t, what+": a callback", func() bool { return calls.Load() > n })
		}
		h.settle(calls)
		if !told && calls.Load() > n {
			t.Errorf("%s: %d callbacks", what, calls.Load()-n)
		}
		n = calls.Load()
		if rep := h.reconcile(r, s); len(rep.Added)+len(rep.Removed)+len(rep.Repaired)+len(rep.Conflicts) > 0 || told != (len(rep.Changed) > 0) {
			t.Errorf("%s: %+v", what, rep)
		}
		h.settle(calls)
		if calls.Load() > n {
			t.Errorf("%s: our answer to it gives %d callbacks", what, calls.Load()-n)
		}
		h.quiet(r, s)
		ways(what)
	}
	for _, f := range []string{"-4", "-6"} {
		h.shell("ip " + f + " route add default dev vpn0 table 52")
		change("Tailscale "+f, "ip "+f+" rule add lookup 52 priority 5270", true)
		change("wg-quick "+f, "ip "+f+" rule add not fwmark 51820 lookup 52; ip "+f+" rule add lookup main suppress_prefixlength 0", true)
		change("a rule that leads nowhere "+f, "ip "+f+" rule add fwmark 7 prohibit priority 100", false)
		change("a rule behind ours "+f, "ip "+f+" rule add fwmark 7 lookup 52 priority 20000", false)
		change("no VPN "+f, "ip "+f+" rule del not fwmark 51820 lookup 52; ip "+f+" rule del lookup main suppress_prefixlength 0; ip "+f+" rule del lookup 52 priority 5270", true)
	}
	if got := h.policies(); !slices.Equal(got, before) {
		t.Errorf("when they are gone: %q, were %q", got, before)
	}
	h.shell("ip rule add lookup 52 priority 1") // nothing fits before it
	h.reconcile(r, s)
	h.quiet(r, s)
	h.check(r.Remove(t.Context()))
	if got := h.policies(); len(got) > 0 {
		t.Errorf("left behind: %q", got)
	}
}
