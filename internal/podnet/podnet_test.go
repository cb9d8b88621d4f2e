package podnet

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// Pods reach each other, their host and the underlay's addresses of it, and are seen under their own address; the host
// reaches them.
func TestTraffic(t *testing.T) {
	w := newWorld(t)
	for i := range alice {
		for _, c := range []struct {
			what, from, at string
			to, want       netip.Addr
		}{
			{"pod to pod", w.a.Netns, w.b.Netns, bob[i], alice[i]},
			{"pod to host", w.a.Netns, w.hostPath, hostAddrs[i], alice[i]},
			{"host to pod", w.hostPath, w.a.Netns, alice[i], hostAddrs[i]},
		} {
			seen, err := ask(c.from, echo(t, c.at, c.to))
			if err != nil || seen != c.want {
				t.Errorf("%s, %v: seen as %v (%v), want %v", c.what, c.to, seen, err, c.want)
			}
		}
	}
	for _, c := range []Config{w.a, w.b} {
		check(t, w.host.Check(c))
	}
	list, err := w.host.List()
	check(t, err)
	if len(list) != 2 {
		t.Fatalf("List: %+v, want two pods", list)
	}
	for _, a := range list {
		if a.Dropped != 0 {
			t.Errorf("%s: %d packets dropped that an honest pod sends", a.ID, a.Dropped)
		}
	}
	counts, err := w.host.Drops()
	check(t, err)
	for reason, n := range counts {
		if n != 0 {
			t.Errorf("%s: %d", reason, n)
		}
	}
}

// A pod that forgets its permanent neighbours finds the gateway by ARP and neighbour discovery: an engine that configures
// the pod's end by itself sets none.
func TestGatewayAnswers(t *testing.T) {
	w := newWorld(t)
	pod, err := sys.OpenNetlink(w.a.Netns)
	check(t, err)
	defer pod.Close()
	link, err := pod.LinkByName("eth0")
	check(t, err)
	for i, a := range alice {
		check(t, pod.NeighDel(sys.PermanentNeighbour(link, Gateway(a), HostMAC)))
		if _, err := ask(w.a.Netns, echo(t, w.b.Netns, bob[i])); err != nil {
			t.Errorf("to %v: %v", bob[i], err)
		}
	}
}

// A pod whose MAC somebody has changed is not reached: the host does not ask for it.
func TestCheckMAC(t *testing.T) {
	for _, bridge := range []string{"", "pods"} {
		w := newWorldBehind(t, bridge)
		check(t, w.host.Check(w.a))
		pod, err := sys.OpenNetlink(w.a.Netns)
		check(t, err)
		defer pod.Close()
		link, err := pod.LinkByName("eth0")
		check(t, err)
		check(t, pod.LinkSetHardwareAddr(link, net.HardwareAddr{2, 0, 0, 0, 0, 0x77}))
		if err := w.host.Check(w.a); err == nil || !strings.Contains(err.Error(), "02:00:00:00:00:77") {
			t.Errorf("bridge %q: %v, want an error with the new MAC", bridge, err)
		}
	}
}

// What goes wrong on the way leaves nothing behind.
func TestAddIsAtomic(t *testing.T) {
	w := newWorld(t)
	before := w.names()
	good := Config{ID: "test/carol", Netns: namespace(t), Interface: "eth0", Addresses: addrs("10.244.0.5"), MTU: 1400}
	for _, c := range []struct {
		what   string
		change func(*Config)
		is     error
		text   string
	}{
		{"no namespace", func(c *Config) { c.Netns += "-not-there" }, fs.ErrNotExist, ""},
		{"the host's own namespace", func(c *Config) { c.Netns = w.hostPath }, nil, "own network namespace"},
		{"no namespace at all", func(c *Config) { c.Netns = "/etc/hostname" }, nil, "/etc/hostname is not a network namespace"},
		{"the same pod again", func(c *Config) { c.ID = w.a.ID }, fs.ErrExist, ""},
		{"the interface is taken", func(c *Config) { c.Netns = w.a.Netns }, fs.ErrExist, ""},
		{"two addresses of one family", func(c *Config) { c.Addresses = addrs("10.244.0.5", "10.244.0.6") }, nil, "one of each family"},
		{"a loopback address", func(c *Config) { c.Addresses = addrs("127.0.0.5") }, nil, "unicast"},
		{"MTU below IPv6's", func(c *Config) { c.Addresses, c.MTU = addrs("fd00:244::5"), 1279 }, nil, "1280"},
		{"a long name", func(c *Config) { c.Interface = "eth0-of-this-pod" }, nil, "1 to 15 bytes"},
		{"a long ID", func(c *Config) { c.ID = strings.Repeat("x", 250) }, nil, "bytes too long"},
		{"lo", func(c *Config) { c.Interface = "lo" }, fs.ErrExist, ""},
	} {
		bad := good
		c.change(&bad)
		_, err := w.host.Add(w.ctx, bad)
		if err == nil || c.is != nil && !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, want an error with %q (%v)", c.what, err, c.text, c.is)
		}
	}
	if after := w.names(); !slices.Equal(before, after) {
		t.Errorf("left behind: %q, before it was %q", after, before)
	}
	if _, err := ask(w.a.Netns, echo(t, w.b.Netns, bob[0])); err != nil {
		t.Errorf("the pod that was there does not work any more: %v", err)
	}
}

// A pod's link has the MTU and the limits of super-packets that its caller wants, at both ends, and its offloads are on.
func TestLinkLimits(t *testing.T) {
	for _, bridge := range []string{"", "pods"} {
		w := newWorldBehind(t, bridge)
		c := Config{
			ID: "test/carol", Netns: namespace(t), Interface: "eth0", Addresses: addrs("10.244.0.5", "fd00:244::5"), MTU: 1412,
			GSOMaxSize: 20000, GSOMaxSegs: 13, Bridge: bridge, OnLink: blocks,
		}
		a, err := w.host.Add(w.ctx, c)
		check(t, err)
		pod, err := sys.OpenNetlink(c.Netns)
		check(t, err)
		defer pod.Close()
		for _, end := range []struct {
			nl   *sys.Netlink
			name string
		}{{w.host.nl, a.HostInterface}, {pod, c.Interface}} {
			link, err := end.nl.LinkByName(end.name)
			check(t, err)
			if at := link.Attrs(); at.MTU != 1412 || at.GSOMaxSize != 20000 || at.GSOMaxSegs != 13 || at.GSOIPv4MaxSize != 20000 {
				t.Errorf("bridge %q, %s: MTU %d, GSO %d bytes (IPv4 %d), %d segments", bridge, end.name, at.MTU, at.GSOMaxSize, at.GSOIPv4MaxSize, at.GSOMaxSegs)
			}
		}
		check(t, sys.WithNetns(c.Netns, func() error {
			for name, offload := range map[string]sys.Offload{"TSO": sys.TSO, "GSO": sys.GSO} {
				if on, err := sys.GetOffload(c.Interface, offload); err != nil || !on {
					t.Errorf("bridge %q: %s is off in the pod (%v)", bridge, name, err)
				}
			}
			return nil
		}))
	}
}

// names lists the host's devices and chains.
func (w *world) names() []string {
	w.t.Helper()
	links, err := w.host.nl.LinkList()
	check(w.t, err)
	var out []string
	for _, l := range links {
		out = append(out, l.Attrs().Name)
	}
	c, err := w.host.nft()
	check(w.t, err)
	have, err := chains(c)
	check(w.t, err)
	for name := range have {
		out = append(out, "chain "+name)
	}
	slices.Sort(out)
	return out
}

func TestRemove(t *testing.T) {
	w := newWorld(t)
	check(t, w.host.Remove(w.a.HostInterface))
	check(t, w.host.Remove(w.a.HostInterface)) // again
	check(t, w.host.Remove("never-there"))
	check(t, sys.DeleteNetns(strings.TrimPrefix(w.b.Netns, sys.NetnsDir+"/"))) // the pod goes first
	check(t, w.host.Remove(w.b.HostInterface))
	if got := w.names(); !slices.Equal(got, []string{"eth0", "lo"}) {
		t.Errorf("left behind: %q", got)
	}
}

// An engine gets the pod's end in the host's namespace, moves it and gives it its addresses.
func TestHandOver(t *testing.T) {
	w := newWorld(t)
	mac := net.HardwareAddr{2, 0x42, 10, 244, 0, 5}
	c := Config{ID: "docker/net/0123", Addresses: addrs("10.244.0.5", "fd00:244::5"), MTU: 1400, MAC: mac}
	a, err := w.host.Add(w.ctx, c)
	check(t, err)
	if a.PodInterface == "" || a.MAC.String() != mac.String() {
		t.Fatalf("Add: %+v, want the name of the pod's end and the MAC %v", a, mac)
	}
	link, err := w.host.nl.LinkByName(a.PodInterface)
	check(t, err)
	if !w.host.HasPodEnd(c.ID) {
		t.Error("the host has no pod's end to hand over")
	}
	path := namespace(t)
	ns, err := os.Open(path)
	check(t, err)
	defer ns.Close()
	check(t, w.host.nl.LinkSetNsFd(link, int(ns.Fd())))
	pod, err := sys.OpenNetlink(path)
	check(t, err)
	defer pod.Close()
	check(t, pod.LinkSetName(link, "eth7"))
	link, err = pod.LinkUp("eth7")
	check(t, err)
	for _, addr := range c.Addresses {
		check(t, pod.AddAddress(w.ctx, link, sys.HostPrefix(addr)))
		check(t, pod.RouteReplace(sys.DefaultRoute(link, Gateway(addr))))
	}
	check(t, pod.WaitUp(w.ctx, "eth7"))
	for i := range bob {
		if seen, err := ask(path, echo(t, w.b.Netns, bob[i])); err != nil || seen != c.Addresses[i] {
			t.Errorf("to %v: seen as %v, %v", bob[i], seen, err)
		}
	}
	if w.host.HasPodEnd(c.ID) {
		t.Error("the host has the pod's end still")
	}
}

// Hosts may have IPv6 switched off for new devices: pods with IPv6 have it all the same, and those without do not switch it on.
func TestIPv6OffByDefault(t *testing.T) {
	for _, bridge := range []string{"", "pods"} {
		w := newWorldBehind(t, bridge, [2]string{"ipv6/conf/default/disable_ipv6", "1"})
		for i := range alice {
			if seen, err := ask(w.a.Netns, echo(t, w.b.Netns, bob[i])); err != nil || seen != alice[i] {
				t.Errorf("bridge %q: to %v: seen as %v, %v", bridge, bob[i], seen, err)
			}
		}
		if bridge != "" {
			w.bridge = "pods4" // without IPv6
		}
		c := w.add("carol", addrs("10.244.0.5"))
		device := c.HostInterface
		if bridge != "" {
			device = w.bridge
		}
		check(t, w.host.do(func() error {
			off, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + device + "/disable_ipv6")
			if err == nil && string(off) != "1\n" {
				t.Errorf("bridge %q: disable_ipv6 of %s is %s", bridge, device, off)
			}
			return err
		}))
		if seen, err := ask(w.a.Netns, echo(t, c.Netns, c.Addresses[0])); err != nil || seen != alice[0] {
			t.Errorf("bridge %q: to %v: seen as %v, %v", bridge, c.Addresses, seen, err)
		}
	}
}

// What a file of sysctls or a network manager sets on pods' links is put back: by itself, and where it takes addresses and
// routes along, with them.
func TestReconcileSettings(t *testing.T) {
	for _, bridge := range []string{"", "pods"} {
		w := newWorldBehind(t, bridge)
		c := w.add("carol", addrs("10.244.0.5")) // without IPv6
		device := cmp.Or(bridge, w.a.HostInterface)
		for _, setting := range []struct{ name, value string }{
			{"ipv6/conf/all/disable_ipv6", "1"},
			{"ipv6/conf/all/disable_ipv6", "0"},
			{"ipv6/conf/" + device + "/disable_ipv6", "1"},
			{"ipv6/conf/" + device + "/forwarding", "0"},
			{"ipv6/conf/" + device + "/accept_ra", "2"},
			{"ipv4/conf/" + device + "/forwarding", "0"},
		} {
			_, err := w.host.Reconcile(w.ctx) // ports that all.disable_ipv6=0 has switched on are part of the first round
			check(t, err)
			check(t, w.host.do(func() error { return sys.SetSysctls([2]string{setting.name, setting.value}) }))
			on := setting.name == "ipv6/conf/all/disable_ipv6" && setting.value == "0"
			if err := w.host.Check(w.a); !on && err == nil {
				t.Errorf("bridge %q: %v: Check finds nothing", bridge, setting)
			}
			did, err := w.host.Reconcile(w.ctx)
			if err != nil || !on && !strings.Contains(strings.Join(did, "\n"), "sysctl net/"+strings.Replace(setting.name, "/all/", "/"+device+"/", 1)) {
				t.Errorf("bridge %q: %v: repaired %q, %v", bridge, setting, did, err)
			}
			for i := range alice {
				if seen, err := ask(w.a.Netns, echo(t, w.b.Netns, bob[i])); err != nil || seen != alice[i] {
					t.Errorf("bridge %q: %v: to %v: seen as %v, %v", bridge, setting, bob[i], seen, err)
				}
			}
			check(t, w.host.Check(w.a))
			check(t, w.host.Check(c))
			if did, err := w.host.Reconcile(w.ctx); err != nil || len(did) != 0 {
				t.Errorf("bridge %q: %v: repaired again %q, %v", bridge, setting, did, err)
			}
		}
	}
}

// Whatever is flushed comes back, without a word about what is as it should be.
func TestReconcile(t *testing.T) {
	w := newWorld(t)
	reconcile := func(what string, want int) {
		t.Helper()
		did, err := w.host.Reconcile(w.ctx)
		if err != nil || len(did) != want {
			t.Errorf("%s: repaired %q, %v; want %d", what, did, err, want)
		}
		check(t, w.host.Check(w.a))
	}
	reconcile("at first", 0)

	c, err := w.host.nft()
	check(t, err)
	c.FlushRuleset()
	check(t, c.Flush())
	if err := w.host.Check(w.a); err == nil {
		t.Error("Check finds nothing after nft flush ruleset")
	}
	reconcile("nft flush ruleset", 2)

	have, err := chains(c)
	check(t, err)
	c.FlushChain(have[w.b.HostInterface])
	check(t, c.Flush())
	reconcile("nft flush chain", 1)

	link, err := w.host.nl.LinkByName(w.a.HostInterface)
	check(t, err)
	check(t, w.host.nl.RouteDel(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: sys.IPNet(sys.HostPrefix(alice[1]))}))
	if err := w.host.Check(w.a); err == nil || !strings.Contains(err.Error(), alice[1].String()) {
		t.Errorf("Check after a route was deleted: %v", err)
	}
	reconcile("a route", 1)

	// A pod whose namespace went with its link leaves a chain.
	link, err = w.host.nl.LinkByName(w.b.HostInterface)
	check(t, err)
	check(t, w.host.nl.LinkDel(link))
	reconcile("a pod that is gone", 0)
	if got := w.names(); slices.Contains(got, "chain "+w.b.HostInterface) {
		t.Errorf("the chain of a pod that is gone stays: %q", got)
	}
}

// BenchmarkReconcile looks at a host of a large cluster with many pods: the agent does so whenever a peer's path changes, among others.
func BenchmarkReconcile(b *testing.B) {
	const pods, routes = 100, 2000
	w := newWorld(b)
	ns := namespace(b)
	for i := range pods {
		c := Config{ID: fmt.Sprint("test/", i), Netns: ns, Interface: fmt.Sprint("eth", i), MTU: 1400,
			Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 244, 1, byte(i)}), netip.MustParseAddr(fmt.Sprintf("fd00:244:1::%x", i))}}
		_, err := w.host.Add(w.ctx, c)
		check(b, err)
	}
	for i := range routes {
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{100, byte(i >> 8), byte(i), 0}), 24)
		check(b, w.host.nl.RouteAdd(&netlink.Route{Dst: sys.IPNet(p), Type: unix.RTN_UNREACHABLE}))
	}
	for b.Loop() {
		if did, err := w.host.Reconcile(w.ctx); err != nil || len(did) > 0 {
			b.Fatal(did, err)
		}
	}
}

func TestAlias(t *testing.T) {
	routed := Config{ID: "cni/tulle/c0ffee/eth0", Addresses: bob}
	bridged := routed
	bridged.Bridge, bridged.MAC = "pods@0", macOf(bob[0])
	for _, c := range []Config{routed, bridged} {
		a, ours := parseAlias(aliasOf(&c))
		if !ours || !slices.Equal(a.Addresses, bob) || a.ID != c.ID || a.Bridge != c.Bridge || a.MAC.String() != c.MAC.String() {
			t.Errorf("%q is read as %+v, %v", aliasOf(&c), a, ours)
		}
	}
	for _, bad := range []string{"", "uplink", "tulle-pod", "tulle-pod ", "tulle-pod 10.0.0.1", "tulle-pod 10.0.0.1 ", "tulle-pod 10.0.0 x", "tulle-pod  x",
		"xtulle-pod 10.0.0.1 x", "tulle-pod 10.0.0.1@pods x", "tulle-pod 10.0.0.1@pods/02:00 x", "tulle-pod 10.0.0.1@/02:00:00:00:00:01 x"} {
		if _, ours := parseAlias(bad); ours {
			t.Errorf("%q is taken for ours", bad)
		}
	}
}

// Any process of the host can lock its namespace, and keep the lock: pods come and go all the same.
func TestForeignLock(t *testing.T) {
	w := newWorld(t)
	patience := sharedPatience
	t.Cleanup(func() { sharedPatience = patience })
	sharedPatience = 0
	unlock, ok, err := w.host.lockAlone(w.ctx)
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	defer unlock()
	c := w.add("carol", addrs("10.244.0.5"))
	check(t, w.host.Remove(c.HostInterface))
	if w.host.Exists(c.HostInterface) {
		t.Errorf("%s is still there", c.HostInterface)
	}
}

// A container may have another network, whose default routes are there first: those of the pod are used, and the others again when it is gone.
func TestForeignDefaultRoute(t *testing.T) {
	w := newWorld(t)
	for _, metric := range []int{0, 100} { // the kernel's, and netavark's
		c := Config{ID: "test/carol", Netns: namespace(t), Interface: "eth0", Addresses: addrs("10.244.0.5", "fd00:244::5"), MTU: 1400}
		pod, err := sys.OpenNetlink(c.Netns)
		check(t, err)
		defer pod.Close()
		check(t, pod.LinkAdd(&netlink.Veth{LinkAttrs: sys.LinkAttrs("other"), PeerName: "far"}))
		_, err = pod.LinkUp("far")
		check(t, err)
		other, err := pod.LinkUp("other")
		check(t, err)
		for _, a := range addrs("198.51.100.2", "2001:db8:9::2") {
			check(t, pod.AddAddress(w.ctx, other, sys.HostPrefix(a)))
		}
		for _, gw := range addrs("198.51.100.1", "2001:db8:9::1") {
			r := sys.DefaultRoute(other, gw)
			r.Priority = metric
			check(t, pod.RouteReplace(r))
		}
		out := func(when, want string) {
			t.Helper()
			link, err := pod.LinkByName(want)
			check(t, err)
			for _, to := range addrs("203.0.113.9", "2001:db8:ffff::9") {
				routes, err := pod.RouteGet(to.AsSlice())
				if err != nil || len(routes) != 1 || routes[0].LinkIndex != link.Attrs().Index {
					t.Errorf("metric %d, %s: to %v by %v (%v), want %s", metric, when, to, routes, err, want)
				}
			}
		}
		out("before", "other")
		_, err = w.host.Add(w.ctx, c)
		check(t, err)
		out("with the pod's interface", "eth0")
		check(t, w.host.Check(c))
		check(t, w.host.Remove(InterfaceName(c.ID)))
		out("after it", "other")
	}
}

// A container's other networks may come later with default routes that the kernel takes first, may be larger than the pods' space, or claim it. Other pods are reached by the pod's interface, and its next hop is on the link for whoever adds routes by it.
func TestForeignNetworks(t *testing.T) {
	w := newWorld(t)
	for _, first := range []bool{true, false} {
		c := Config{
			ID: fmt.Sprint("test/foreign", first), Netns: namespace(t), Interface: "eth0", Addresses: addrs("10.244.0.5", "fd00:244::5"), MTU: 1400,
			Space: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/48")},
		}
		pod, err := sys.OpenNetlink(c.Netns)
		check(t, err)
		defer pod.Close()
		others := func() {
			check(t, pod.LinkAdd(&netlink.Veth{LinkAttrs: sys.LinkAttrs("other"), PeerName: "far"}))
			_, err := pod.LinkUp("far")
			check(t, err)
			link, err := pod.LinkUp("other")
			check(t, err)
			networks := []string{"10.0.0.5/8", "fd00::5/16"}
			if first { // the same prefix later: the kernel cannot tell which is meant
				networks = append(networks, "10.244.9.5/16", "fd00:244::9/48")
			}
			for _, p := range networks {
				p := netip.MustParsePrefix(p)
				check(t, pod.AddAddress(w.ctx, link, p))
				check(t, pod.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Scope: netlink.SCOPE_LINK, Dst: sys.IPNet(p.Masked())}))
			}
			for _, gw := range addrs("10.0.0.1", "fd00::1") {
				check(t, pod.RouteAddEcmp(sys.DefaultRoute(link, gw)))
			}
		}
		if first {
			others()
		}
		_, err = w.host.Add(w.ctx, c)
		check(t, err)
		link, err := pod.LinkByName("eth0")
		check(t, err)
		if !first {
			others()
		}
		for _, to := range addrs("10.244.77.7", "fd00:244:0:77::7") {
			routes, err := pod.RouteGet(to.AsSlice())
			if err != nil || len(routes) != 1 || routes[0].LinkIndex != link.Attrs().Index {
				t.Errorf("the others first: %v: to %v by %v (%v), want eth0", first, to, routes, err)
			}
		}
		for _, gw := range []netip.Addr{Gateway4, Gateway6} {
			to := netip.MustParsePrefix("203.0.113.0/24")
			if gw.Is6() {
				to = netip.MustParsePrefix("2001:db8:113::/48")
			}
			if err := pod.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: sys.IPNet(to), Gw: gw.AsSlice()}); err != nil {
				t.Errorf("a route by %v: %v", gw, err)
			}
		}
		check(t, w.host.Check(c))
	}
}

// Behind a bridge, pods of one block reach each other directly, also where the block is the whole space.
func TestSpaceOfOneBlock(t *testing.T) {
	w := newWorldBehind(t, "pods")
	block := []netip.Prefix{netip.MustParsePrefix("10.244.0.0/24")}
	c := Config{ID: "test/carol", Netns: namespace(t), Interface: "eth0", Addresses: addrs("10.244.0.5"), MTU: 1400, Bridge: "pods", OnLink: block, Space: block}
	_, err := w.host.Add(w.ctx, c)
	check(t, err)
	pod, err := sys.OpenNetlink(c.Netns)
	check(t, err)
	defer pod.Close()
	routes, err := pod.RouteGet(netip.MustParseAddr("10.244.0.77").AsSlice())
	if err != nil || len(routes) != 1 || routes[0].Gw != nil {
		t.Errorf("by %v (%v), want no next hop", routes, err)
	}
}

// Pods come and go while the agent reconciles: it repairs nothing, and brings back nothing that is gone.
func TestReconcileAmongChanges(t *testing.T) {
	w := newWorld(t)
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			did, err := w.host.Reconcile(w.ctx)
			if len(did) > 0 || err != nil {
				t.Errorf("repaired %q, %v", did, err)
			}
		}
	})
	var pods sync.WaitGroup
	for i := range 4 {
		c := Config{ID: fmt.Sprint("test/", i), Netns: namespace(t), Interface: "eth0", Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 244, 1, byte(i)})}, MTU: 1400}
		pods.Go(func() {
			for range 25 {
				if _, err := w.host.Add(w.ctx, c); err != nil {
					t.Error(err)
				}
				if err := w.host.Remove(InterfaceName(c.ID)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	pods.Wait()
	close(done)
	wg.Wait()
	want := []string{"chain " + w.a.HostInterface, "chain " + w.b.HostInterface, "eth0", "lo", w.a.HostInterface, w.b.HostInterface}
	slices.Sort(want)
	if got := w.names(); !slices.Equal(got, want) {
		t.Errorf("left: %q, want %q", got, want)
	}
}

// portmap lets packets from 127.0.0.0/8 out of the host's end, which makes the kernel take addresses of scope host into account: the pod
// still sees the host under its own address, not as the gateway.
func TestRouteLocalnet(t *testing.T) {
	for _, bridge := range []string{"", "pods"} {
		w := newWorldBehind(t, bridge)
		check(t, sys.WithNetns(w.hostPath, func() error {
			return sys.SetSysctls([2]string{"ipv4/conf/" + cmp.Or(bridge, w.a.HostInterface) + "/route_localnet", "1"})
		}))
		seen, err := ask(w.hostPath, echo(t, w.a.Netns, alice[0]))
		if err != nil || seen != hostAddrs[0] {
			t.Errorf("bridge %q: the pod sees its host as %v (%v), want %v", bridge, seen, err, hostAddrs[0])
		}
	}
}
