package hostnet

import (
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// twoNICs is a host with a private network on eth0, and the way out on eth1.
func twoNICs(h *host) {
	h.device("eth0", "10.0.1.11/24", "2001:db8:1::11/64")
	h.device("eth1", "192.0.2.11/24", "2001:db8:2::11/64")
	h.route("0.0.0.0/0", "192.0.2.1", "eth1", 100, unix.RTPROT_DHCP)
	h.route("::/0", "2001:db8:2::1", "eth1", 1024, unix.RTPROT_RA)
}

// onlyIPv6 is a host that has no IPv4 (any more).
func onlyIPv6(h *host) { h.device("eth0", "2001:db8:1::11/64") }

// docker is a host whose eth0 has no address (any more), beside a container engine's bridge with a container.
func docker(h *host) {
	h.device("eth0")
	h.device("docker0", "172.17.0.1/16")
}

// bridge is a host with the bridge of a container engine, with a container, and an address on eth0.
func bridge(h *host) {
	h.device("eth0", "10.0.1.11/24")
	h.device("vct")
	h.shell("ip link add docker0 type bridge && ip link set vct master docker0 && ip addr add 172.17.0.1/16 dev docker0 && ip link set docker0 up")
	eventually(h.t, "docker0 has a carrier", func() bool { return h.link("docker0").Attrs().RawFlags&unix.IFF_RUNNING != 0 })
}

// noCarrier makes a device without carrier, such as a bridge whose ports are gone.
func noCarrier(h *host, name, addr string) {
	h.device(name, addr)
	h.check(h.nl.LinkSetDown(h.link(name + "-far")))
	eventually(h.t, name+" has no carrier", func() bool { return h.link(name).Attrs().RawFlags&unix.IFF_RUNNING == 0 })
}

// deprecate makes an address of eth0 one whose preferred lifetime is over.
func deprecate(h *host, addr string, bits int) {
	h.t.Helper()
	n := &netlink.Addr{IPNet: dst(netip.PrefixFrom(netip.MustParseAddr(addr), bits).String()), ValidLft: 3600, PreferedLft: 0, Flags: unix.IFA_F_NODAD}
	h.check(h.nl.AddrReplace(h.link("eth0"), n))
}

// lostIPv6 is a host whose eth0 has lost its address and still has the default route, whose gateway is link-local.
func lostIPv6(h *host) {
	h.tun("tun0")
	h.up("tun0")
	h.device("eth0")
	h.route("::/0", "fe80::1", "eth0", 1024, unix.RTPROT_RA)
}

// clat is a host with IPv6 only and IPv4 over a translator (RFC 6877), whose device has an address that all hosts of this kind have.
func clat(h *host) {
	h.device("eth0", "2001:db8:1::11/64")
	h.route("::/0", "2001:db8:1::1", "eth0", 1024, unix.RTPROT_RA)
	h.device("clat", "192.0.0.1/32")
	h.shell("ip route add default dev clat mtu 1260")
}

// virtualMAC gives a virtual address with a MAC address of its own to a host with eth0, as keepalived does (use_vmac), and one to lo.
func virtualMAC(h *host) {
	h.shell("ip link add vrrp.51 link eth0 address 00:00:5e:00:01:33 type macvlan mode private && ip link set vrrp.51 up && ip addr add 10.0.1.7/32 dev vrrp.51 && ip addr add 10.255.0.1/32 dev lo")
}

func sorted(list []netip.Addr) []netip.Addr {
	return slices.SortedFunc(slices.Values(list), netip.Addr.Compare)
}

func TestSought(t *testing.T) {
	for _, c := range []struct {
		name   string
		setup  func(h *host)
		sought Sought
		addrs  []netip.Addr
		by     Basis
		err    []string
		wait   bool
	}{
		{name: "a seed at this host's virtual address with a MAC address of its own", setup: func(h *host) { h.device("eth0", "10.0.1.11/24"); virtualMAC(h) },
			sought: Sought{Seeds: [][]netip.Addr{ips("10.0.1.7")}}, addrs: ips("10.0.1.11"), by: BySeeds},
		{name: "a seed's name that lists this host and others", sought: Sought{Seeds: [][]netip.Addr{ips("10.0.1.11", "10.0.1.12", "10.0.1.13")}},
			addrs: ips("10.0.1.11", "2001:db8:1::11"), by: BySeeds},
		{name: "this host's own name is loopback, the others' are not", sought: Sought{Seeds: [][]netip.Addr{ips("127.0.1.1"), ips("10.0.1.12")}},
			addrs: ips("10.0.1.11", "2001:db8:1::11"), by: BySeeds},
		{name: "only this host is listed, by an address", sought: Sought{Seeds: [][]netip.Addr{ips("127.0.1.1", "10.0.1.11")}},
			addrs: ips("10.0.1.11", "2001:db8:1::11"), by: BySeeds},
		{name: "only this host is listed, by loopback", sought: Sought{Seeds: [][]netip.Addr{ips("127.0.1.1", "::1")}},
			addrs: ips("192.0.2.11", "2001:db8:2::11"), by: ByGuess},
		{name: "a seed with both families, and IPv4 by a translator", setup: clat, sought: Sought{Seeds: [][]netip.Addr{ips("203.0.113.12", "2001:db8:1::12")}},
			addrs: ips("2001:db8:1::11"), by: BySeeds},
		{name: "no seed, and IPv4 by a translator", setup: clat, addrs: ips("2001:db8:1::11"), by: ByGuess},
		{name: "a seed with IPv4 only, which a translator reaches", setup: clat, sought: Sought{Seeds: [][]netip.Addr{ips("203.0.113.12")}},
			err: []string{"203.0.113.12", "192.0.0.1", "translator"}, wait: true},
		{name: "IPv6 first from the name server", sought: Sought{Seeds: [][]netip.Addr{ips("2001:db8:1::12", "10.0.1.12")}},
			addrs: ips("10.0.1.11", "2001:db8:1::11"), by: BySeeds},
		{name: "one seed by IPv6 only", sought: Sought{Seeds: [][]netip.Addr{ips("2001:db8:1::12")}},
			addrs: ips("2001:db8:1::11", "10.0.1.11"), by: BySeeds},
		{name: "one seed with one family, one with the other", sought: Sought{Seeds: [][]netip.Addr{ips("2001:db8:1::12"), ips("10.0.1.13")}},
			addrs: ips("10.0.1.11", "2001:db8:1::11"), by: BySeeds},
		{name: "public and private addresses, the private ones in all", sought: Sought{Seeds: [][]netip.Addr{ips("10.0.1.12", "198.51.100.12"), ips("10.0.1.13")}},
			addrs: ips("10.0.1.11", "2001:db8:1::11"), by: BySeeds},
		{name: "private IPv4, public IPv6", sought: Sought{Seeds: [][]netip.Addr{ips("10.0.1.12", "2001:db8:9::12")}},
			addrs: ips("10.0.1.11", "2001:db8:1::11"), by: BySeeds},
		{name: "public and private addresses in all", sought: Sought{Seeds: [][]netip.Addr{ips("10.0.1.12", "198.51.100.12")}},
			err: []string{"ambiguous", "eth0 10.0.1.11", "eth1 192.0.2.11"}},
		{name: "and one of them was in use", sought: Sought{Seeds: [][]netip.Addr{ips("10.0.1.12", "198.51.100.12")}, Last: ips("10.0.1.11"), LastBy: BySeeds},
			addrs: ips("10.0.1.11", "2001:db8:1::11"), by: BySeeds},
		{name: "no name resolves", sought: Sought{Unknown: "node-a (its name does not resolve: no such host)"}, err: []string{"node-a", "no such host"}, wait: true},
		{name: "no name resolves, loopback only", setup: func(*host) {}, sought: Sought{Unknown: "node-a"}, err: []string{"node-a"}, wait: true},
		{name: "one name resolves, to this host's loopback", sought: Sought{Seeds: [][]netip.Addr{ips("127.0.1.1")}, Unknown: "node-b"}, err: []string{"node-b"}, wait: true},
		{name: "one name resolves, to this host", sought: Sought{Seeds: [][]netip.Addr{ips("10.0.1.11")}, Unknown: "node-b"},
			addrs: ips("10.0.1.11", "2001:db8:1::11"), by: BySeeds},
		{name: "one name resolves, to another host", sought: Sought{Seeds: [][]netip.Addr{ips("10.0.1.12")}, Unknown: "node-c"},
			addrs: ips("10.0.1.11", "2001:db8:1::11"), by: BySeeds},
		{name: "no name resolves, the members are known", sought: Sought{Unknown: "node-b", Peers: ips("10.0.1.12", "10.0.1.13", "198.51.100.4")},
			addrs: ips("10.0.1.11", "2001:db8:1::11"), by: ByPeers},
		{name: "no name resolves, an address was in use", sought: Sought{Unknown: "node-b", Last: ips("10.0.1.11"), LastBy: BySeeds},
			addrs: ips("10.0.1.11", "2001:db8:1::11"), by: BySeeds},
		{name: "a better default route came since", sought: Sought{Last: ips("10.0.1.11"), LastBy: ByGuess}, addrs: ips("10.0.1.11", "2001:db8:1::11"), by: ByGuess},
		{name: "the address in use is gone", sought: Sought{Last: ips("10.0.1.99"), LastBy: ByGuess}, addrs: ips("192.0.2.11", "2001:db8:2::11"), by: ByGuess},
		{name: "the seeds say more than a guess that was in use", sought: Sought{Seeds: [][]netip.Addr{ips("10.0.1.12")}, Last: ips("192.0.2.11"), LastBy: ByGuess},
			addrs: ips("10.0.1.11", "2001:db8:1::11"), by: BySeeds},
		{name: "the seeds have IPv4 and no route, the members IPv6", setup: onlyIPv6, sought: Sought{Seeds: [][]netip.Addr{ips("10.0.1.12")}, Peers: ips("10.0.1.12", "2001:db8:1::12")},
			addrs: ips("2001:db8:1::11"), by: ByPeers},
		{name: "the seeds have no route, one of two addresses is left", setup: onlyIPv6, sought: Sought{Seeds: [][]netip.Addr{ips("10.0.1.12")}, Last: ips("10.0.1.11", "2001:db8:1::11"), LastBy: BySeeds},
			addrs: ips("2001:db8:1::11"), by: BySeeds},
		{name: "a seed's address is link-local", setup: onlyIPv6, sought: Sought{Seeds: [][]netip.Addr{ips("fe80::1%eth0")}}, err: []string{"seed fe80::1%eth0 is link-local"}, wait: true},
		{name: "the seeds have no route, and nothing is known", setup: onlyIPv6, sought: Sought{Seeds: [][]netip.Addr{ips("10.0.1.12")}}, err: []string{"no route to 10.0.1.12"}, wait: true},
		{name: "the device with the lost address has nothing, another has", setup: docker, sought: Sought{Device: "eth0"}, err: []string{"eth0 has no other address"}, wait: true},
		{name: "the same, and no route to the members", setup: docker, sought: Sought{Device: "eth0", Peers: ips("10.0.1.12")}, err: []string{"eth0 has no other address"}, wait: true},
		{name: "the same, and no route to the seeds", setup: docker, sought: Sought{Device: "eth0", Seeds: [][]netip.Addr{ips("10.0.1.12")}}, err: []string{"no route to 10.0.1.12"}, wait: true},
		{name: "the same, and no name resolves", setup: docker, sought: Sought{Device: "eth0", Unknown: "node-b"}, err: []string{"node-b"}, wait: true},
		{name: "the device with the lost address has a new one", setup: func(h *host) { docker(h); h.addrs("eth0", "10.0.1.33/24") },
			sought: Sought{Device: "eth0", Peers: ips("10.0.9.12")}, addrs: ips("10.0.1.33"), by: ByGuess},
		{name: "it has a single one, which may be virtual", setup: func(h *host) { docker(h); h.addrs("eth0", "10.0.1.5/32") },
			sought: Sought{Device: "eth0"}, err: []string{"eth0 has no other address"}, wait: true},
		{name: "the same, and the default route leads there", setup: func(h *host) {
			docker(h)
			h.addrs("eth0", "10.0.1.5/32")
			h.check(h.nl.RouteAdd(&netlink.Route{Dst: dst("10.0.1.1/32"), LinkIndex: h.link("eth0").Attrs().Index, Scope: netlink.SCOPE_LINK}))
			h.route("0.0.0.0/0", "10.0.1.1", "eth0", 0, unix.RTPROT_STATIC)
		}, sought: Sought{Device: "eth0"}, addrs: ips("10.0.1.5"), by: ByGuess},
		{name: "the address is lost, and the kernel would send from the TUN's", setup: func(h *host) { lostIPv6(h); h.addrs("tun0", "fd00:244:0:1::/128") },
			sought: Sought{Tun: "tun0", Device: "eth0", Peers: ips("2001:db8:1::12")}, err: []string{"eth0 has no other address"}, wait: true},
		{name: "the same of a bridge of pods", setup: func(h *host) { lostIPv6(h); h.device("pods", "fd00:244:0:1::1/64") },
			sought: Sought{Pods: pfx("fd00:244::/32"), Peers: ips("2001:db8:1::12")}, err: []string{"no device of this host has an address"}, wait: true},
		{name: "the same of a container engine's bridge", setup: func(h *host) { lostIPv6(h); h.device("docker0", "fd00:d0c::1/64") },
			sought: Sought{Device: "eth0", Peers: ips("2001:db8:1::12")}, err: []string{"eth0 has no other address"}, wait: true},
		{name: "the same of a container engine's bridge, toward the seeds", setup: func(h *host) { lostIPv6(h); h.device("docker0", "fd00:d0c::1/64") },
			sought: Sought{Device: "eth0", Seeds: [][]netip.Addr{ips("2001:db8:1::12")}}, err: []string{"eth0 has no address"}, wait: true},
		{name: "the address is lost, and the route names another", setup: func(h *host) {
			lostIPv6(h)
			h.device("eth1", "fd00:99::1/64")
			h.shell("ip -6 route replace default via fe80::1 dev eth0 src fd00:99::1")
		}, sought: Sought{Device: "eth0", Peers: ips("2001:db8:1::12")}, addrs: ips("fd00:99::1"), by: ByPeers},
		{name: "the address is lost, and there is one on lo", setup: func(h *host) { lostIPv6(h); h.up("lo"); h.addrs("lo", "2001:db8:7::7/128") },
			sought: Sought{Device: "eth0", Peers: ips("2001:db8:1::12")}, addrs: ips("2001:db8:7::7"), by: ByPeers},
		{name: "the address is lost, and another device leads to the members", sought: Sought{Device: "eth2", Peers: ips("10.0.1.12")},
			addrs: ips("10.0.1.11", "2001:db8:1::11"), by: ByPeers},
		{name: "a guess was at a bridge of containers, and a default route came since", setup: func(h *host) {
			bridge(h)
			h.route("0.0.0.0/0", "10.0.1.1", "eth0", 100, unix.RTPROT_DHCP)
		}, sought: Sought{Last: ips("172.17.0.1"), LastBy: ByGuess}, addrs: ips("10.0.1.11"), by: ByRoute},
		{name: "the same, and members are known", setup: func(h *host) {
			bridge(h)
			h.shell("ip route add 172.16.0.0/12 via 172.17.0.2")
			h.route("0.0.0.0/0", "10.0.1.1", "eth0", 100, unix.RTPROT_DHCP)
		}, sought: Sought{Last: ips("172.17.0.1"), LastBy: ByGuess, Peers: ips("172.18.0.1")}, addrs: ips("172.17.0.1"), by: ByPeers},
		{name: "a guess was at a bridge of containers, and another device has an address now", setup: bridge,
			sought: Sought{Last: ips("172.17.0.1"), LastBy: ByGuess}, addrs: ips("10.0.1.11"), by: ByRoute},
		{name: "a guess was at a bridge of containers, and there is nothing else", setup: func(h *host) { bridge(h); h.shell("ip addr flush dev eth0") },
			sought: Sought{Last: ips("172.17.0.1"), LastBy: ByGuess}, addrs: ips("172.17.0.1"), by: ByGuess},
		{name: "no default route, a device and a bridge of containers", setup: bridge, addrs: ips("10.0.1.11"), by: ByGuess},
		{name: "no default route, two bridges of containers", setup: func(h *host) {
			bridge(h)
			h.shell("ip addr flush dev eth0 && ip link add virbr0 type bridge && ip link set eth0 master virbr0 && ip addr add 192.168.122.1/24 dev virbr0 && ip link set virbr0 up")
			eventually(h.t, "virbr0 has a carrier", func() bool { return h.link("virbr0").Attrs().RawFlags&unix.IFF_RUNNING != 0 })
		}, err: []string{"docker0 172.17.0.1", "virbr0 192.168.122.1", "only bridges of containers"}, wait: true},
		{name: "a guess was at a bridge with an uplink, and a default route came since", setup: func(h *host) {
			bridge(h)
			h.shell("ip link add link eth0 name eth0.7 type macvlan && ip link set eth0.7 master docker0")
			h.route("0.0.0.0/0", "10.0.1.1", "eth0", 100, unix.RTPROT_DHCP)
		}, sought: Sought{Last: ips("172.17.0.1"), LastBy: ByGuess}, addrs: ips("172.17.0.1"), by: ByGuess},
		{name: "the device with the lost address has become a part of a bridge", setup: func(h *host) {
			h.device("eth0")
			h.shell("ip link add br0 type bridge && ip link set eth0 master br0 && ip addr add 10.0.1.57/24 dev br0 && ip link set br0 up")
		}, sought: Sought{Device: "eth0"}, addrs: ips("10.0.1.57"), by: ByGuess},
		{name: "no default route, and the only device has no carrier", setup: func(h *host) { noCarrier(h, "docker0", "172.17.0.1/16") },
			err: []string{"docker0 172.17.0.1", "no carrier"}, wait: true},
		{name: "the same beside another device", setup: func(h *host) { noCarrier(h, "docker0", "172.17.0.1/16"); h.device("eth0", "10.0.1.11/24") },
			addrs: ips("10.0.1.11"), by: ByGuess},
		{name: "a virtual address of full length, added first", setup: func(h *host) {
			h.device("eth0", "10.0.1.5/32", "10.0.1.11/24")
			h.route("0.0.0.0/0", "10.0.1.1", "eth0", 0, unix.RTPROT_STATIC)
		}, addrs: ips("10.0.1.11"), by: ByGuess},
		{name: "a virtual address within the subnet", setup: func(h *host) {
			h.device("eth0", "10.0.1.11/24", "10.0.1.5/24")
			h.route("0.0.0.0/0", "10.0.1.1", "eth0", 0, unix.RTPROT_STATIC)
		}, addrs: ips("10.0.1.11"), by: ByGuess},
		{name: "the seeds' only address is virtual, and this host has it", setup: func(h *host) { h.device("eth0", "10.0.1.5/32", "10.0.1.11/24") },
			sought: Sought{Seeds: [][]netip.Addr{ips("10.0.1.5")}}, addrs: ips("10.0.1.11"), by: BySeeds},
		{name: "a host whose only address has full length", setup: func(h *host) {
			h.device("eth0", "10.0.1.11/32")
			h.check(h.nl.RouteAdd(&netlink.Route{Dst: dst("10.0.1.1/32"), LinkIndex: h.link("eth0").Attrs().Index, Scope: netlink.SCOPE_LINK}))
			h.route("0.0.0.0/0", "10.0.1.1", "eth0", 0, unix.RTPROT_STATIC)
		}, addrs: ips("10.0.1.11"), by: ByGuess},
		{name: "a device by name, the seeds choose its address", setup: func(h *host) { h.device("eth0", "10.0.1.11/24", "10.0.2.11/24") },
			sought: Sought{Interface: "eth0", Seeds: [][]netip.Addr{ips("10.0.2.12")}}, addrs: ips("10.0.2.11"), by: BySeeds},
		{name: "a device by name, no name resolves", setup: func(h *host) { h.device("eth0", "10.0.1.11/24", "10.0.2.11/24") },
			sought: Sought{Interface: "eth0", Unknown: "node-b"}, addrs: ips("10.0.1.11"), by: ByGuess},
		{name: "a device by name, an address was in use", setup: func(h *host) { h.device("eth0", "10.0.1.11/24", "10.0.2.11/24") },
			sought: Sought{Interface: "eth0", Last: ips("10.0.2.11"), LastBy: ByGuess}, addrs: ips("10.0.2.11"), by: ByGuess},
		{name: "a device by name, the seeds are elsewhere", sought: Sought{Interface: "eth1", Seeds: [][]netip.Addr{ips("10.0.1.12")}},
			addrs: ips("192.0.2.11", "2001:db8:2::11"), by: ByGuess},
		{name: "an IPv6 default route in a table to which a rule leads", setup: func(h *host) {
			h.device("eth0", "2001:db8:1::11/64")
			h.device("eth1", "2001:db8:2::11/64")
			h.shell("ip -6 route add default via 2001:db8:2::1 table 200 && ip -6 rule add lookup 200")
		}, addrs: ips("2001:db8:2::11"), by: ByGuess},
		{name: "one address of two is not there", sought: Sought{Addresses: ips("10.0.1.11", "2001:db8:1::99")}, err: []string{"2001:db8:1::99"}, wait: true},
		{name: "addresses, whatever the seeds", sought: Sought{Addresses: ips("192.0.2.11"), Seeds: [][]netip.Addr{ips("10.0.1.12")}, Unknown: "node-c"},
			addrs: ips("192.0.2.11"), by: ByOperator},
		{name: "a deprecated address was in use", setup: func(h *host) {
			h.device("eth0", "2001:db8:1::11/64", "2001:db8:5::11/64")
			deprecate(h, "2001:db8:1::11", 64)
		}, sought: Sought{Last: ips("2001:db8:1::11"), LastBy: ByGuess}, addrs: ips("2001:db8:1::11"), by: ByGuess},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			if c.setup == nil {
				c.setup = twoNICs
			}
			c.setup(h)
			var u Underlay
			var err error
			h.do(func() error { u, err = DetectUnderlay(c.sought); return nil })
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
			if !slices.Equal(u.Addrs, c.addrs) || u.By != c.by || u.Why == "" {
				t.Errorf("got %v by %s (%s), want %v by %s", u.Addrs, u.By, u.Why, c.addrs, c.by)
			}
		})
	}
}

// The address in use stays whatever else the host gets, and is missed when it is gone.
func TestKeptUnderlay(t *testing.T) {
	h := newHost(t)
	h.device("eth0", "10.0.1.11/24")
	h.route("0.0.0.0/0", "10.0.1.1", "eth0", 100, unix.RTPROT_DHCP)
	var u Underlay
	h.do(func() (err error) { u, err = DetectUnderlay(Sought{}); return err })
	kept := func() (k Kept) {
		t.Helper()
		h.do(func() (err error) { k, err = KeptUnderlay(u); return err })
		return k
	}
	if k := kept(); k.Underlay.Iface != "eth0" || len(k.Lost) > 0 || k.More.IsValid() || k.Down != "" {
		t.Errorf("at rest: %+v", k)
	}
	h.device("vpn0", "192.0.2.11/24")
	h.route("0.0.0.0/0", "192.0.2.1", "vpn0", 50, unix.RTPROT_STATIC)
	h.addrs("eth0", "10.0.1.5/32", "10.0.1.6/24")
	if k := kept(); len(k.Lost) > 0 || k.More.IsValid() {
		t.Errorf("with a VPN and virtual addresses: %+v", k)
	}
	virtualMAC(h)
	if k := kept(); len(k.Lost) > 0 || !slices.Equal(sorted(k.Beside), ips("10.0.1.5", "10.0.1.6", "10.0.1.7", "10.255.0.1")) {
		t.Errorf("with virtual addresses on a macvlan and on lo: %+v", k)
	}
	h.addrs("eth0", "2001:db8:1::11/64")
	if k := kept(); len(k.Lost) > 0 || k.More != netip.MustParseAddr("2001:db8:1::11") {
		t.Errorf("with another family: %+v", k)
	}
	u.Addrs = append(u.Addrs, netip.MustParseAddr("2001:db8:1::11"))
	deprecate(h, "2001:db8:1::11", 64)
	h.addrs("eth0", "2001:db8:5::11/64")
	if k := kept(); len(k.Lost) > 0 || k.More.IsValid() {
		t.Errorf("with a new prefix beside a deprecated one: %+v", k)
	}
	if k := kept(); !slices.Equal(k.Stale, ips("2001:db8:1::11")) || !slices.Equal(sorted(k.Fresh), ips("10.0.1.11", "2001:db8:5::11")) {
		t.Errorf("deprecated, beside addresses that are meant to last: %+v", k)
	}
	u.Addrs = ips("10.0.1.99")
	if k := kept(); !slices.Equal(k.Lost, u.Addrs) || !slices.Equal(k.Near, ips("10.0.1.11")) {
		t.Errorf("lost, beside an address of its subnet, virtual ones and other subnets: %+v", k)
	}
	u.Addrs = ips("10.0.1.11", "2001:db8:1::11")
	h.check(h.nl.LinkSetDown(h.link("eth0-far")))
	var k Kept
	for deadline := time.Now().Add(30 * time.Second); k.Down == "" && time.Now().Before(deadline); { // the kernel takes its time
		k = kept()
	}
	if k.Down != "eth0 has no carrier" || len(k.Lost) > 0 {
		t.Errorf("without carrier: %+v", k)
	}
	h.check(h.nl.LinkSetDown(h.link("eth0")))
	if k := kept(); k.Down != "eth0 is down" || !slices.Equal(k.Lost, ips("2001:db8:1::11")) {
		t.Errorf("down, which takes IPv6 addresses: %+v", k)
	}
	h.up("eth0")
	h.up("eth0-far")
	h.check(h.nl.AddrDel(h.link("eth0"), &netlink.Addr{IPNet: dst("10.0.1.11/24")}))
	if k := kept(); !slices.Equal(k.Lost, ips("10.0.1.11", "2001:db8:1::11")) {
		t.Errorf("without the address: %+v", k)
	}
	h.addrs("vpn0", "10.0.1.11/24") // as when a bridge takes over
	if k := kept(); k.Underlay.Iface != "vpn0" || slices.Contains(k.Lost, u.Addrs[0]) {
		t.Errorf("the address moved to another device: %+v", k)
	}
}
