package podnet

import (
	"net"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// sentry counts what comes through a pod's checks: a chain at the same ingress, behind them.
type sentry struct {
	t    *testing.T
	w    *world
	send int // packet socket on the pod's eth0
}

const sentryTable = "sentry"

func newSentry(t *testing.T, w *world) *sentry {
	t.Helper()
	s := &sentry{t: t, w: w}
	c, err := w.host.nft()
	check(t, err)
	tab := c.AddTable(&nftables.Table{Name: sentryTable, Family: nftables.TableFamilyNetdev})
	accept := nftables.ChainPolicyAccept
	ch := c.AddChain(&nftables.Chain{
		Name: sentryTable, Table: tab, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookIngress,
		Priority: nftables.ChainPriorityFilter, Policy: &accept, Device: w.a.HostInterface,
	})
	c.AddRule(&nftables.Rule{Table: tab, Chain: ch, Exprs: []expr.Any{&expr.Counter{}}})
	check(t, c.Flush())
	check(t, sys.WithNetns(w.a.Netns, func() error {
		link, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		if s.send, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Bind(s.send, &unix.SockaddrLinklayer{Ifindex: link.Index, Protocol: 0x0300})
	}))
	t.Cleanup(func() { unix.Close(s.send) })
	return s
}

func (s *sentry) passed() uint64 {
	s.t.Helper()
	c, err := s.w.host.nft()
	check(s.t, err)
	tab := &nftables.Table{Name: sentryTable, Family: nftables.TableFamilyNetdev}
	rules, err := c.GetRules(tab, &nftables.Chain{Name: sentryTable, Table: tab})
	check(s.t, err)
	return rules[0].Exprs[0].(*expr.Counter).Packets
}

func (s *sentry) drops() map[string]uint64 {
	s.t.Helper()
	d, err := s.w.host.Drops()
	check(s.t, err)
	return d
}

// inject sends a frame from the pod as its root could.
func (s *sentry) inject(l ...gopacket.SerializableLayer) (frame []byte) {
	s.t.Helper()
	buf := gopacket.NewSerializeBuffer()
	check(s.t, gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, l...))
	check(s.t, unix.Send(s.send, buf.Bytes(), 0))
	return buf.Bytes()
}

// frame builders.

func ether(kind layers.EthernetType) *layers.Ethernet {
	return &layers.Ethernet{SrcMAC: net.HardwareAddr{2, 0, 0, 0, 0, 9}, DstMAC: HostMAC, EthernetType: kind}
}

func udp4(from, to netip.Addr) []gopacket.SerializableLayer { return udp4to(2, from, to) }

// udp4to has the destination's port, as udp6to has.
func udp4to(port layers.UDPPort, from, to netip.Addr) []gopacket.SerializableLayer {
	ip := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: from.AsSlice(), DstIP: to.AsSlice()}
	u := &layers.UDP{SrcPort: 1, DstPort: port}
	_ = u.SetNetworkLayerForChecksum(ip)
	return []gopacket.SerializableLayer{ether(layers.EthernetTypeIPv4), ip, u}
}

func udp6(from, to netip.Addr) []gopacket.SerializableLayer { return udp6to(2, from, to) }

func udp6to(port layers.UDPPort, from, to netip.Addr) []gopacket.SerializableLayer {
	ip := ip6(from, to, layers.IPProtocolUDP)
	u := &layers.UDP{SrcPort: 1, DstPort: port}
	_ = u.SetNetworkLayerForChecksum(ip)
	return []gopacket.SerializableLayer{ether(layers.EthernetTypeIPv6), ip, u}
}

func ip6(from, to netip.Addr, next layers.IPProtocol) *layers.IPv6 {
	return &layers.IPv6{Version: 6, HopLimit: 255, NextHeader: next, SrcIP: from.AsSlice(), DstIP: to.AsSlice()}
}

func arp(op uint16, sender, target netip.Addr) []gopacket.SerializableLayer {
	return []gopacket.SerializableLayer{ether(layers.EthernetTypeARP), &layers.ARP{
		AddrType: layers.LinkTypeEthernet, Protocol: layers.EthernetTypeIPv4, HwAddressSize: 6, ProtAddressSize: 4, Operation: op,
		SourceHwAddress: []byte{2, 0, 0, 0, 0, 9}, SourceProtAddress: sender.AsSlice(),
		DstHwAddress: make([]byte, 6), DstProtAddress: target.AsSlice(),
	}}
}

// nd is a neighbour discovery message of a kind about target, behind a hop-by-hop header if so wanted.
func nd(kind byte, from, to, target netip.Addr, behind bool) []gopacket.SerializableLayer {
	ip := ip6(from, to, layers.IPProtocolICMPv6)
	icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(kind, 0)}
	_ = icmp.SetNetworkLayerForChecksum(ip)
	body := append(make([]byte, 4), target.AsSlice()...)
	if !behind {
		return []gopacket.SerializableLayer{ether(layers.EthernetTypeIPv6), ip, icmp, gopacket.Payload(body)}
	}
	ip.NextHeader = layers.IPProtocolIPv6HopByHop
	hop := gopacket.Payload([]byte{byte(layers.IPProtocolICMPv6), 0, 1, 4, 0, 0, 0, 0})
	return []gopacket.SerializableLayer{ether(layers.EthernetTypeIPv6), ip, hop, icmp, gopacket.Payload(body)}
}

// A pod whose processes have CAP_NET_ADMIN and CAP_NET_RAW speaks as another pod, as its host, as another host: nothing of
// that comes through, and each packet is counted by what it is. What it says as itself comes through.
func TestSpoof(t *testing.T) {
	w := newWorld(t)
	s := newSentry(t, w)
	const silent, pass = "", "pass"
	own4, own6 := alice[0], alice[1]
	ownLocal, otherHost4, otherHost6 := netip.MustParseAddr("fe80::77"), netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8::2")
	allNodes, none6 := netip.MustParseAddr("ff02::1"), netip.IPv6Unspecified()
	vlan := func(l []gopacket.SerializableLayer) []gopacket.SerializableLayer {
		return append([]gopacket.SerializableLayer{ether(layers.EthernetTypeDot1Q), &layers.Dot1Q{Type: l[0].(*layers.Ethernet).EthernetType}}, l[1:]...)
	}
	for _, c := range []struct {
		what, want string
		frame      []gopacket.SerializableLayer
	}{
		{"IPv4 as itself", pass, udp4(own4, bob[0])},
		{"IPv4 as another pod", DropSource, udp4(bob[0], hostAddrs[0])},
		{"IPv4 as its host", DropSource, udp4(hostAddrs[0], bob[0])},
		{"IPv4 as another host", DropSource, udp4(otherHost4, hostAddrs[0])},
		{"IPv4 as the gateway", DropSource, udp4(Gateway4, hostAddrs[0])},
		{"IPv4 as loopback", DropSource, udp4(netip.MustParseAddr("127.0.0.1"), hostAddrs[0])},
		{"IPv4 as another pod, in a VLAN", DropSource, vlan(udp4(bob[0], hostAddrs[0]))},
		{"IPv6 as itself", pass, udp6(own6, bob[1])},
		{"IPv6 as another pod", DropSource, udp6(bob[1], hostAddrs[1])},
		{"IPv6 as its host", DropSource, udp6(hostAddrs[1], bob[1])},
		{"IPv6 as another host", DropSource, udp6(otherHost6, hostAddrs[1])},
		{"IPv6 as the gateway", DropSource, udp6(Gateway6, hostAddrs[1])},
		{"IPv6 link-local to the host's services", DropSource, udp6(ownLocal, Gateway6)},
		{"ARP reply as itself", pass, arp(layers.ARPReply, own4, Gateway4)},
		{"ARP request for the gateway", pass, arp(layers.ARPRequest, own4, Gateway4)},
		{"ARP announcement of itself", pass, arp(layers.ARPRequest, own4, own4)},
		{"ARP reply as another pod", DropNeighbour, arp(layers.ARPReply, bob[0], hostAddrs[0])},
		{"ARP reply as the gateway", DropNeighbour, arp(layers.ARPReply, Gateway4, own4)},
		{"ARP reply as its host", DropNeighbour, arp(layers.ARPReply, hostAddrs[0], Gateway4)},
		{"ARP announcement of another pod", DropNeighbour, arp(layers.ARPRequest, bob[0], bob[0])},
		{"ARP request for another pod", DropNeighbour, arp(layers.ARPRequest, own4, bob[0])},
		{"ARP request in the name of another host", DropNeighbour, arp(layers.ARPRequest, otherHost4, Gateway4)},
		{"ND solicitation as itself", pass, nd(135, own6, Gateway6, Gateway6, false)},
		{"ND solicitation, link-local", pass, nd(135, ownLocal, Gateway6, Gateway6, false)},
		{"ND advertisement of itself", pass, nd(136, own6, Gateway6, own6, false)},
		{"ND advertisement of its link-local address", pass, nd(136, ownLocal, Gateway6, ownLocal, false)},
		{"ND advertisement of another pod", DropNeighbour, nd(136, own6, allNodes, bob[1], false)},
		{"ND advertisement of another pod behind an extension header", DropNeighbour, nd(136, own6, allNodes, bob[1], true)},
		{"ND advertisement of another pod, link-local", DropNeighbour, nd(136, ownLocal, allNodes, bob[1], false)},
		{"ND advertisement of its host", DropNeighbour, nd(136, ownLocal, allNodes, hostAddrs[1], false)},
		{"ND advertisement of the gateway", DropNeighbour, nd(136, ownLocal, Gateway6, Gateway6, false)},
		{"ND advertisement as another pod", DropNeighbour, nd(136, bob[1], Gateway6, bob[1], false)},
		{"ND solicitation as another pod", DropSource, nd(135, bob[1], Gateway6, Gateway6, false)},
		{"DHCP answer to whoever asks", DropDHCP, udp4to(68, own4, netip.MustParseAddr("255.255.255.255"))},
		{"DHCP answer to an address that the host has yet to get", DropDHCP, udp4to(68, own4, otherHost4)},
		{"DHCPv6 answer", DropDHCP, udp6to(546, own6, hostAddrs[1])},
		{"DHCP as a client", pass, udp4to(67, own4, hostAddrs[0])},
		{"router advertisement from an address of its own", DropNeighbour, nd(134, own6, allNodes, none6, false)},
		{"router advertisement", DropNeighbour, nd(134, ownLocal, allNodes, none6, false)},
		{"redirect", DropNeighbour, nd(137, ownLocal, Gateway6, bob[1], false)},
		{"duplicate address detection", silent, nd(135, none6, netip.MustParseAddr("ff02::1:ff00:77"), ownLocal, false)},
		{"router solicitation", silent, nd(133, ownLocal, netip.MustParseAddr("ff02::2"), none6, false)},
		{"another ethertype", DropProtocol, []gopacket.SerializableLayer{ether(0x88b5), gopacket.Payload(make([]byte, 46))}},
		{"a truncated IPv4 header", DropSource, []gopacket.SerializableLayer{ether(layers.EthernetTypeIPv4), gopacket.Payload{0x45, 0}}},
		{"a truncated ARP packet", DropNeighbour, []gopacket.SerializableLayer{ether(layers.EthernetTypeARP), gopacket.Payload{0, 1, 8, 0, 6, 4}}},
	} {
		// The pod's own kernel says something now and then: what is asked for must be there, more of it may be.
		before, passed := s.drops(), s.passed()
		s.inject(c.frame...)
		after, now := s.drops(), s.passed()
		rose := func(reason string) uint64 { return after[reason] - before[reason] }
		// A veth delivers before send returns, but where a busy kernel leaves that to a thread of its own.
		for end := time.Now().Add(patience); time.Now().Before(end) && (c.want == pass && now == passed || c.want != pass && c.want != silent && rose(c.want) == 0); {
			time.Sleep(time.Millisecond)
			after, now = s.drops(), s.passed()
		}
		switch c.want {
		case pass:
			if now == passed {
				t.Errorf("%s: did not come through: %v", c.what, after)
			}
		case silent:
			if now != passed || rose(DropSource)+rose(DropNeighbour)+rose(DropProtocol) != 0 {
				t.Errorf("%s: want it dropped without a count: %d came through, %v, before %v", c.what, now-passed, after, before)
			}
		default:
			if now != passed || rose(c.want) != 1 {
				t.Errorf("%s: %d came through, want it dropped as %s: %v, before %v", c.what, now-passed, c.want, after, before)
			}
		}
	}
	// And nothing is counted against the other pod.
	list, err := w.host.ListDropped()
	check(t, err)
	for _, a := range list {
		if got, ok, err := w.host.Get(a.ID); a.HostInterface == InterfaceName(a.ID) && (err != nil || !ok || !reflect.DeepEqual(got, a)) {
			t.Errorf("one pod is %+v, %v, %v, in the list it is %+v", got, ok, err, a)
		}
		if (a.Dropped == 0) != (a.HostInterface == w.b.HostInterface) {
			t.Errorf("%s: %d dropped", a.ID, a.Dropped)
		}
	}
}

// Multicast and broadcast of a pod with a link of its own reach nobody, and are counted; what kernels say by themselves about groups is not.
func TestMulticast(t *testing.T) {
	w := newWorld(t)
	s := newSentry(t, w)
	all4, mdns4, mdns6, site6 := netip.MustParseAddr("255.255.255.255"), netip.MustParseAddr("224.0.0.251"), netip.MustParseAddr("ff02::fb"), netip.MustParseAddr("ff05::1")
	local := netip.MustParseAddr("fe80::77")
	igmp := udp4(alice[0], mdns4)
	igmp[1].(*layers.IPv4).Protocol = layers.IPProtocolIGMP
	for _, quiet := range [][]gopacket.SerializableLayer{igmp, nd(143, local, mdns6, mdns6, true), udp4(alice[0], bob[0]), udp6(alice[1], bob[1])} {
		s.inject(quiet...)
	}
	loud := [][]gopacket.SerializableLayer{udp4(alice[0], all4), udp4(alice[0], mdns4), udp6(alice[1], site6), udp6(alice[1], mdns6), udp6(local, mdns6)}
	for _, l := range loud {
		s.inject(l...)
	}
	d := s.drops()
	for end := time.Now().Add(patience); time.Now().Before(end) && d[DropMulticast] < uint64(len(loud)); d = s.drops() {
		time.Sleep(time.Millisecond)
	}
	for reason, n := range d {
		if want := map[string]int{DropMulticast: len(loud)}[reason]; int(n) != want {
			t.Errorf("%s: %d, want %d", reason, n, want)
		}
	}
}

// The checks are there before the pod's link is: its first packet meets them. And a pod with one family has no other.
func TestSpoofOneFamily(t *testing.T) {
	w := newWorld(t)
	w.a = w.add("carol", addrs("10.244.0.5"))
	s := newSentry(t, w)
	before := s.passed()
	s.inject(udp6(alice[1], bob[1])...)
	s.inject(nd(136, alice[1], Gateway6, alice[1], false)...)
	d := s.drops()
	for end := time.Now().Add(patience); time.Now().Before(end) && (d[DropSource] == 0 || d[DropNeighbour] == 0); d = s.drops() {
		time.Sleep(time.Millisecond)
	}
	if s.passed() != before || d[DropSource] != 1 || d[DropNeighbour] != 1 {
		t.Errorf("an IPv4 pod speaks IPv6: %d came through, %v", s.passed()-before, d)
	}
	if _, err := ask(w.a.Netns, echo(t, w.b.Netns, bob[0])); err != nil {
		t.Error(err)
	}
}
