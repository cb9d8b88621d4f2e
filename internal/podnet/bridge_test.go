package podnet

import (
	"bytes"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// neighbour is the MAC that a pod has learned for an IPv4 address; nil if none.
func neighbour(t *testing.T, from Config, a netip.Addr) net.HardwareAddr {
	t.Helper()
	pod, err := sys.OpenNetlink(from.Netns)
	check(t, err)
	defer pod.Close()
	link, err := pod.LinkByName(from.Interface)
	check(t, err)
	list, err := pod.NeighList(link.Attrs().Index, netlink.FAMILY_V4)
	check(t, err)
	for _, n := range list {
		if n.IP.Equal(a.AsSlice()) {
			return n.HardwareAddr
		}
	}
	return nil
}

// Two pods behind a bridge reach each other directly, and their host, and a pod of the host with a link of its own; all see
// their own addresses. Nothing is dropped that an honest pod sends.
func TestBridge(t *testing.T) {
	w := newWorldBehind(t, "pods")
	w.bridge = ""
	carol := addrs("10.244.0.5", "fd00:244::5")
	c := w.add("carol", carol)
	for i := range alice {
		for _, c := range []struct {
			what, from, at string
			to, want       netip.Addr
		}{
			{"pod to pod", w.a.Netns, w.b.Netns, bob[i], alice[i]},
			{"pod to pod, back", w.b.Netns, w.a.Netns, alice[i], bob[i]},
			{"pod to host", w.a.Netns, w.hostPath, hostAddrs[i], alice[i]},
			{"host to pod", w.hostPath, w.a.Netns, alice[i], hostAddrs[i]},
			{"pod to a pod with a link of its own", w.a.Netns, c.Netns, carol[i], alice[i]},
			{"pod with a link of its own to pod", c.Netns, w.b.Netns, bob[i], carol[i]},
		} {
			seen, err := ask(c.from, echo(t, c.at, c.to))
			if err != nil || seen != c.want {
				t.Errorf("%s, %v: seen as %v (%v), want %v", c.what, c.to, seen, err, c.want)
			}
		}
	}
	if on, off := neighbour(t, w.a, bob[0]), neighbour(t, w.a, carol[0]); !slices.Equal(on, macOf(bob[0])) || !slices.Equal(off, HostMAC) {
		t.Errorf("the next hop to a pod on the bridge is %v, to another one %v: want the pod itself, and the host", on, off)
	}
	check(t, w.host.Check(w.a))
	counts, err := w.host.Drops()
	check(t, err)
	for reason, n := range counts {
		if n != 0 {
			t.Errorf("%s: %d dropped", reason, n)
		}
	}
}

// inbox counts how often a frame comes out of a pod's link behind a bridge. What kernels send by themselves is not counted.
func inbox(t *testing.T, c Config) (count func(frame []byte) int) {
	t.Helper()
	var fd int
	check(t, sys.WithNetns(c.Netns, func() error {
		link, err := net.InterfaceByName(c.Interface)
		if err != nil {
			return err
		}
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: link.Index, Protocol: 0x0300})
	}))
	t.Cleanup(func() { unix.Close(fd) })
	return func(frame []byte) (n int) {
		b := make([]byte, 2048)
		for {
			k, _, err := unix.Recvfrom(fd, b, 0)
			if err != nil {
				return n
			}
			if k >= 34 && bytes.HasPrefix(frame, b[:k]) { // a bridge cuts what pads IPv4 packets
				n++
			}
		}
	}
}

// A pod with CAP_NET_ADMIN and CAP_NET_RAW behind a bridge speaks as another pod, as its host, as another host, by MAC, IPv4,
// IPv6, ARP and neighbour discovery: nothing reaches the other pod or the host, and each is counted by what it is.
func TestBridgeSpoof(t *testing.T) {
	w := newWorldBehind(t, "pods")
	s := newSentry(t, w)
	const pass, silent = "pass", ""
	mac, bobMAC := macOf(alice[0]), macOf(bob[0])
	own4, own6, local := alice[0], alice[1], linkLocalOf(mac)
	otherHost4, otherHost6 := netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8::2")
	allNodes, none6 := netip.MustParseAddr("ff02::1"), netip.IPv6Unspecified()
	// from gives a frame's Ethernet header these addresses, and ARP's.
	from := func(src, dst net.HardwareAddr, l []gopacket.SerializableLayer) []gopacket.SerializableLayer {
		e := l[0].(*layers.Ethernet)
		e.SrcMAC, e.DstMAC = src, dst
		if a, ok := l[1].(*layers.ARP); ok {
			a.SourceHwAddress = src
		}
		return l
	}
	bob4, bob6 := bob[0], bob[1]
	toBob := func(l []gopacket.SerializableLayer) []gopacket.SerializableLayer { return from(mac, bobMAC, l) }
	toAll := func(l []gopacket.SerializableLayer) []gopacket.SerializableLayer {
		return from(mac, layers.EthernetBroadcast, l)
	}
	claim := toAll(arp(layers.ARPReply, own4, bob4))
	claim[1].(*layers.ARP).SourceHwAddress = bobMAC
	received := inbox(t, w.b)
	for _, c := range []struct {
		what, want string
		frame      []gopacket.SerializableLayer
	}{
		{"IPv4 as itself", pass, toBob(udp4(own4, bob4))},
		{"IPv4 as another pod's MAC", DropSource, from(bobMAC, HostMAC, udp4(own4, bob4))},
		{"IPv4 as the gateway's MAC", DropSource, from(HostMAC, bobMAC, udp4(own4, bob4))},
		{"IPv4 as the other pod", DropSource, toBob(udp4(bob4, bob4))},
		{"IPv4 as its host", DropSource, toBob(udp4(hostAddrs[0], bob4))},
		{"IPv4 as another host", DropSource, toBob(udp4(otherHost4, bob4))},
		{"IPv4 as the gateway", DropSource, toBob(udp4(Gateway4, bob4))},
		{"IPv6 as itself", pass, toBob(udp6(own6, bob6))},
		{"IPv6 as another pod's MAC", DropSource, from(bobMAC, HostMAC, udp6(own6, bob6))},
		{"IPv6 as another pod", DropSource, toBob(udp6(bob6, bob6))},
		{"IPv6 as its host", DropSource, toBob(udp6(hostAddrs[1], bob6))},
		{"IPv6 as another host", DropSource, toBob(udp6(otherHost6, bob6))},
		{"IPv6 as the gateway", DropSource, toBob(udp6(Gateway6, bob6))},
		{"IPv6 link-local as itself", pass, toBob(udp6(local, linkLocalOf(bobMAC)))},
		{"IPv6 link-local as another pod", DropSource, toBob(udp6(linkLocalOf(bobMAC), bob6))},
		{"IPv6 link-local to the host's services", DropSource, from(mac, HostMAC, udp6(local, Gateway6))},
		{"ARP request for another pod", pass, toAll(arp(layers.ARPRequest, own4, bob4))},
		{"ARP reply as itself", pass, toBob(arp(layers.ARPReply, own4, bob4))},
		{"ARP reply with another pod's MAC", DropNeighbour, claim},
		{"ARP reply as another pod", DropNeighbour, toAll(arp(layers.ARPReply, bob4, hostAddrs[0]))},
		{"ARP reply as the gateway", DropNeighbour, toBob(arp(layers.ARPReply, Gateway4, bob4))},
		{"ARP reply as its host", DropNeighbour, toBob(arp(layers.ARPReply, hostAddrs[0], bob4))},
		{"ARP announcement of another pod", DropNeighbour, toAll(arp(layers.ARPRequest, bob4, bob4))},
		{"ARP request in the name of another host", DropNeighbour, toAll(arp(layers.ARPRequest, otherHost4, bob4))},
		{"ND solicitation of another pod", pass, toBob(nd(135, own6, bob6, bob6, false))},
		{"ND solicitation, link-local", pass, toBob(nd(135, local, bob6, bob6, false))},
		{"ND advertisement of itself", pass, toBob(nd(136, own6, bob6, own6, false))},
		{"ND advertisement of its link-local address", pass, toBob(nd(136, local, bob6, local, false))},
		{"ND advertisement of another pod", DropNeighbour, toBob(nd(136, own6, allNodes, bob6, false))},
		{"ND advertisement of another pod behind an extension header", DropNeighbour, toBob(nd(136, own6, allNodes, bob6, true))},
		{"ND advertisement of another pod, link-local", DropNeighbour, toBob(nd(136, local, allNodes, bob6, false))},
		{"ND advertisement of another pod's link-local address", DropNeighbour, toBob(nd(136, local, allNodes, linkLocalOf(bobMAC), false))},
		{"ND advertisement of its host", DropNeighbour, toBob(nd(136, local, allNodes, hostAddrs[1], false))},
		{"ND advertisement of the gateway", DropNeighbour, toBob(nd(136, local, bob6, Gateway6, false))},
		{"ND advertisement as another pod", DropNeighbour, toBob(nd(136, bob6, allNodes, bob6, false))},
		{"ND solicitation as another pod", DropSource, toBob(nd(135, bob6, bob6, bob6, false))},
		{"DHCP answer", DropDHCP, toAll(udp4to(68, own4, netip.MustParseAddr("255.255.255.255")))},
		{"DHCPv6 answer from its link-local address", DropDHCP, toAll(udp6to(546, local, allNodes))},
		{"router advertisement", DropNeighbour, toBob(nd(134, local, allNodes, none6, false))},
		{"redirect", DropNeighbour, toBob(nd(137, local, bob6, bob6, false))},
		{"duplicate address detection", silent, toBob(nd(135, none6, netip.MustParseAddr("ff02::1:ff00:77"), bob6, false))},
		{"another ethertype", DropProtocol, []gopacket.SerializableLayer{&layers.Ethernet{SrcMAC: mac, DstMAC: bobMAC, EthernetType: 0x88b5}, gopacket.Payload(make([]byte, 46))}},
	} {
		before := s.drops()
		sent := s.inject(c.frame...)
		after, got := s.drops(), received(sent)
		rose := func(reason string) uint64 { return after[reason] - before[reason] }
		// A veth delivers before send returns, but where a busy kernel leaves that to a thread of its own.
		for end := time.Now().Add(patience); time.Now().Before(end) && (c.want == pass && got == 0 || c.want != pass && c.want != silent && rose(c.want) == 0); {
			time.Sleep(time.Millisecond)
			after, got = s.drops(), got+received(sent)
		}
		switch {
		case c.want == pass:
			if got == 0 {
				t.Errorf("%s: did not come through: %v", c.what, after)
			}
		case got != 0 || c.want != silent && rose(c.want) != 1 || c.want == silent && rose(DropSource)+rose(DropNeighbour)+rose(DropProtocol) != 0:
			t.Errorf("%s: %d came through, want it dropped as %q: %v, before %v", c.what, got, c.want, after, before)
		}
	}
	if _, err := ask(w.b.Netns, echo(t, w.hostPath, hostAddrs[0])); err != nil {
		t.Errorf("the other pod after all of that: %v", err)
	}
}

// Whatever somebody takes from a bridge and its pods comes back; what pods leave behind goes.
func TestBridgeReconcile(t *testing.T) {
	w := newWorldBehind(t, "pods")
	reconcile := func(what string, want int) {
		t.Helper()
		did, err := w.host.Reconcile(w.ctx)
		if err != nil || len(did) != want {
			t.Errorf("%s: repaired %q, %v; want %d", what, did, err, want)
		}
	}
	reaches := func(what string) {
		t.Helper()
		check(t, w.host.Check(w.a))
		for i := range alice {
			for _, from := range []string{w.hostPath, w.b.Netns} {
				if _, err := ask(from, echo(t, w.a.Netns, alice[i])); err != nil {
					t.Errorf("%s: to %v: %v", what, alice[i], err)
				}
			}
		}
	}
	bridge := func() netlink.Link {
		t.Helper()
		l, err := w.host.nl.LinkByName("pods")
		check(t, err)
		return l
	}
	reconcile("at first", 0)
	c, err := w.host.nft()
	check(t, err)
	c.DelTable(&nftables.Table{Name: Table, Family: nftables.TableFamilyNetdev})
	check(t, c.Flush())
	reconcile("nft delete table", 2)
	port, err := w.host.nl.LinkByName(w.a.HostInterface)
	check(t, err)
	check(t, w.host.nl.LinkSetNoMaster(port))
	reconcile("a port", 1)
	reaches("a port")
	check(t, w.host.nl.LinkDel(bridge()))
	if err := w.host.Check(w.a); err == nil {
		t.Error("Check finds nothing after the bridge was deleted")
	}
	reconcile("the bridge", 2)
	reaches("the bridge")

	// Bob's namespace goes, and his link with it; his routes stay with the bridge.
	check(t, sys.DeleteNetns(strings.TrimPrefix(w.b.Netns, sys.NetnsDir+"/")))
	check(t, sys.Poll(w.ctx, time.Millisecond, func() (bool, error) { return !w.host.Exists(w.b.HostInterface), nil }))
	reconcile("a pod that is gone", 0)
	w.noRoute(bob)
	check(t, w.host.RemoveBridges())
	if !w.host.Exists("pods") {
		t.Fatal("a bridge with a pod was removed")
	}
	check(t, w.host.Remove(w.a.HostInterface))
	w.noRoute(alice)
	check(t, w.host.RemoveBridges())
	if got := w.names(); !slices.Equal(got, []string{"eth0", "lo"}) {
		t.Errorf("left behind: %q", got)
	}
}

func (w *world) noRoute(to []netip.Addr) {
	w.t.Helper()
	routes, err := w.host.nl.RouteList(nil, netlink.FAMILY_ALL)
	check(w.t, err)
	for _, r := range routes {
		for _, a := range to {
			if r.Dst != nil && r.Dst.String() == sys.HostPrefix(a).String() {
				w.t.Errorf("left behind: a route to %v", a)
			}
		}
	}
}

// Devices of others are no bridges for pods, and an interface cannot be handed over behind one.
func TestBridgeRefusals(t *testing.T) {
	w := newWorld(t)
	check(t, w.host.nl.LinkAdd(&netlink.Bridge{LinkAttrs: sys.LinkAttrs("br0")}))
	before := w.names()
	for _, c := range []struct {
		what, bridge, netns, text string
	}{
		{"somebody else's bridge", "br0", namespace(t), "podnet: the host's end: the bridge br0 cannot be made: br0 is a device of somebody else"},
		{"no bridge", "eth0", namespace(t), "podnet: the host's end: the bridge eth0 cannot be made: eth0 is a device of somebody else"},
		{"no name", "a/b", namespace(t), "interface name"},
		{"handed over", "pods", "", "cannot be handed over"},
	} {
		_, err := w.host.Add(w.ctx, Config{ID: "test/dave", Netns: c.netns, Interface: "eth0", Addresses: addrs("10.244.0.6"), MTU: 1400, Bridge: c.bridge})
		if err == nil || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, want an error with %q", c.what, err, c.text)
		}
	}
	if after := w.names(); !slices.Equal(before, after) {
		t.Errorf("left behind: %q, before it was %q", after, before)
	}
}
