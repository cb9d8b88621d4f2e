package hostnet

import (
	"errors"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// ip runs iproute2 in the namespace, a command a line: for what a few words say there and many lines of Go here.
func (h *host) ip(commands string) {
	h.t.Helper()
	cmd := exec.Command("ip", "-n", h.name, "-batch", "-")
	cmd.Stdin = strings.NewReader(commands)
	if out, err := cmd.CombinedOutput(); err != nil {
		h.t.Fatalf("ip: %v: %s", err, out)
	}
}

// Hosts as networks of routers, several links and other people's tools leave them.
func TestDetectUnderlayCorners(t *testing.T) {
	const two = `
		link add up1 type veth peer up1-far
		link add up2 type veth peer up2-far
		link set up1-far up
		link set up2-far up
		link set up1 up mtu 1500
		link set up2 up mtu 1400
		addr add 10.0.1.5/30 dev up1
		addr add 10.0.2.5/30 dev up2
		addr add 2001:db8:1::5/64 dev up1 nodad
		addr add 2001:db8:2::5/64 dev up2 nodad
	`
	const bgp = two + `
		addr add 10.255.0.1/32 dev lo
		addr add 2001:db8:ff::1/128 dev lo nodad
	`
	const longName = "enx0123456789ab-uplink-to-the-first-switch"
	for _, c := range []struct {
		name    string
		setup   string
		want    string
		seeds   []netip.Addr
		iface   string
		uplinks string
		mtu     int
		addrs   []netip.Addr
		err     []string
	}{
		{name: "lo: equal-cost default route with a source", iface: "lo", uplinks: "up1 up2", mtu: 1400, addrs: ips("10.255.0.1", "2001:db8:ff::1"), setup: bgp + `
			route add default src 10.255.0.1 nexthop via 10.0.1.6 dev up1 nexthop via 10.0.2.6 dev up2`},
		{name: "lo: the same toward a seed", seeds: ips("10.255.0.2"), iface: "lo", uplinks: "up1 up2", mtu: 1400, addrs: ips("10.255.0.1", "2001:db8:ff::1"), setup: bgp + `
			route add default src 10.255.0.1 nexthop via 10.0.1.6 dev up1 nexthop via 10.0.2.6 dev up2`},
		{name: "lo: many seeds over both links", seeds: ips("10.255.0.2", "10.255.0.3", "10.255.0.4", "10.255.0.5", "10.255.0.6"), iface: "lo", uplinks: "up1 up2", mtu: 1400, addrs: ips("10.255.0.1", "2001:db8:ff::1"), setup: bgp + `
			route add default src 10.255.0.1 nexthop via 10.0.1.6 dev up1 nexthop via 10.0.2.6 dev up2`},
		{name: "lo: its own address among the seeds", seeds: ips("10.255.0.1"), iface: "lo", uplinks: "up1", mtu: 1500, addrs: ips("10.255.0.1", "2001:db8:ff::1"), setup: bgp + `
			route add default src 10.255.0.1 via 10.0.1.6`},
		{name: "lo: one default route with a source", iface: "lo", uplinks: "up1", mtu: 1500, addrs: ips("10.255.0.1", "2001:db8:ff::1"), setup: bgp + `
			route add default src 10.255.0.1 via 10.0.1.6`},
		{name: "lo: equal-cost default route without a source", iface: "lo", uplinks: "up1 up2", mtu: 1400, addrs: ips("10.255.0.1", "2001:db8:ff::1"), setup: bgp + `
			route add default nexthop via 10.0.1.6 dev up1 nexthop via 10.0.2.6 dev up2`},
		{name: "lo: the same toward seeds", seeds: ips("10.255.0.2", "10.255.0.3", "10.255.0.4", "10.255.0.5"), iface: "lo", uplinks: "up1 up2", mtu: 1400, addrs: ips("10.255.0.1", "2001:db8:ff::1"), setup: bgp + `
			route add default nexthop via 10.0.1.6 dev up1 nexthop via 10.0.2.6 dev up2`},
		{name: "equal-cost toward seeds over two devices that have addresses", seeds: ips("10.255.0.2", "10.255.0.3", "10.255.0.4", "10.255.0.5"), iface: "up1", uplinks: "up1", mtu: 1500, addrs: ips("10.0.1.5", "2001:db8:1::5"), setup: two + `
			route add default nexthop via 10.0.2.6 dev up2 nexthop via 10.0.1.6 dev up1`},
		{name: "IPv6 equal-cost toward seeds", seeds: ips("2001:db8:fe::2", "2001:db8:fe::3"), iface: "lo", uplinks: "up1 up2", mtu: 1400, addrs: ips("2001:db8:ff::1", "10.255.0.1"), setup: bgp + `
			route add default nexthop via 2001:db8:1::6 dev up1 nexthop via 2001:db8:2::6 dev up2`},
		{name: "lo: a default route without a source", iface: "up1", uplinks: "up1", mtu: 1500, addrs: ips("10.0.1.5", "2001:db8:1::5"), setup: bgp + `
			route add default via 10.0.1.6`},
		{name: "lo: by its address", want: "10.255.0.1", iface: "lo", uplinks: "up1 up2", mtu: 1400, addrs: ips("10.255.0.1"), setup: bgp + `
			route add default nexthop via 10.0.1.6 dev up1 nexthop via 10.0.2.6 dev up2`},
		{name: "lo: by its address, with routes to parts of the network only", want: "10.255.0.1", iface: "lo", uplinks: "up2", mtu: 1400, addrs: ips("10.255.0.1"), setup: bgp + `
			route add 10.255.0.2 via 10.0.2.6 src 10.255.0.1
			route add default via 10.0.1.6`},
		{name: "lo: by its IPv6 address", want: "2001:db8:ff::1", iface: "lo", uplinks: "up1 up2", mtu: 1400, addrs: ips("2001:db8:ff::1"), setup: bgp + `
			route add default nexthop via 2001:db8:1::6 dev up1 nexthop via 2001:db8:2::6 dev up2`},
		{name: "lo: IPv6 alone, equal-cost with a source", iface: "lo", uplinks: "up1 up2", mtu: 1400, addrs: ips("2001:db8:ff::1", "10.255.0.1"), setup: bgp + `
			route add default src 2001:db8:ff::1 nexthop via 2001:db8:1::6 dev up1 nexthop via 2001:db8:2::6 dev up2`},
		{name: "lo: by its name", want: "lo", iface: "lo", uplinks: "up1 up2", mtu: 1400, addrs: ips("10.255.0.1", "2001:db8:ff::1"), setup: bgp + `
			route add default nexthop via 10.0.1.6 dev up1 nexthop via 10.0.2.6 dev up2`},
		{name: "lo: next hops that are objects", iface: "lo", uplinks: "up1 up2", mtu: 1400, addrs: ips("10.255.0.1", "2001:db8:ff::1"), setup: bgp + `
			nexthop add id 1 via 10.0.1.6 dev up1
			nexthop add id 2 via 10.0.2.6 dev up2
			nexthop add id 9 group 1/2
			route add default nhid 9 src 10.255.0.1`},
		{name: "lo: several addresses there, and no word which", setup: bgp + `
			addr add 10.255.9.9/32 dev lo
			addr flush dev up1
			addr flush dev up2
			route add default dev up1`, err: []string{"--underlay"}},
		{name: "lo: unnumbered links", seeds: ips("10.255.0.2"), iface: "lo", uplinks: "up1 up2", mtu: 1400, addrs: ips("10.255.0.1", "2001:db8:ff::1"), setup: bgp + `
			addr flush dev up1 scope global
			addr flush dev up2 scope global
			route add 0.0.0.0/0 nexthop via inet6 fe80::1 dev up1 nexthop via inet6 fe80::2 dev up2`},
		{name: "lo: an unnumbered link by its name", want: "up2", iface: "lo", uplinks: "up2", mtu: 1400, addrs: ips("10.255.0.1", "2001:db8:ff::1"), setup: bgp + `
			addr flush dev up2 scope global
			route add 0.0.0.0/0 via inet6 fe80::2 dev up2`},
		{name: "a link that waits for its address does not take that of lo", want: "up2", err: []string{"up2", "no usable address"}, setup: bgp + `
			addr flush dev up2 scope global`},
		{name: "links that borrow the address of lo", seeds: ips("10.255.0.2"), iface: "lo", uplinks: "up1 up2", mtu: 1400, addrs: ips("10.255.0.1", "2001:db8:ff::1"), setup: bgp + `
			addr flush dev up1
			addr flush dev up2
			addr add 10.255.0.1/32 dev up1
			addr add 10.255.0.1/32 dev up2
			route add default nexthop via 10.0.9.1 dev up1 onlink nexthop via 10.0.9.1 dev up2 onlink`},
		{name: "a bridge that has the address", seeds: ips("10.255.0.2"), iface: "br0", uplinks: "up1 up2", mtu: 1400, addrs: ips("10.254.0.1"), setup: two + `
			link add br0 type bridge
			link set br0 up
			addr add 10.254.0.1/32 dev br0
			route add default src 10.254.0.1 nexthop via 10.0.1.6 dev up1 nexthop via 10.0.2.6 dev up2`},
		{name: "equal-cost over one device", iface: "up1", uplinks: "up1", mtu: 1500, addrs: ips("10.0.1.5", "2001:db8:1::5"), setup: two + `
			route add default nexthop via 10.0.1.4 dev up1 onlink nexthop via 10.0.1.6 dev up1`},
		{name: "equal-cost over two devices that have addresses", iface: "up1", uplinks: "up1", mtu: 1500, addrs: ips("10.0.1.5", "2001:db8:1::5"), setup: two + `
			route add default nexthop via 10.0.2.6 dev up2 nexthop via 10.0.1.6 dev up1`},
		{name: "equal-cost with a source on one of the devices", iface: "up2", uplinks: "up1 up2", mtu: 1400, addrs: ips("10.0.2.5", "2001:db8:2::5"), setup: two + `
			route add default src 10.0.2.5 nexthop via 10.0.1.6 dev up1 nexthop via 10.0.2.6 dev up2`},
		{name: "IPv6 equal-cost over two devices", iface: "up1", uplinks: "up1", mtu: 1500, addrs: ips("2001:db8:1::5", "10.0.1.5"), setup: two + `
			route add default nexthop via 2001:db8:1::6 dev up1 nexthop via 2001:db8:2::6 dev up2`},
		{name: "the default route's own MTU", iface: "up1", uplinks: "up1", mtu: 1450, addrs: ips("10.0.1.5", "2001:db8:1::5"), setup: two + `
			route add default via 10.0.1.6 mtu 1450`},
		{name: "an alternative name of more than 15 bytes", want: longName, iface: "up2", uplinks: "up2", mtu: 1400, addrs: ips("10.0.2.5", "2001:db8:2::5"), setup: two + `
			link property add dev up2 altname ` + longName},
		{name: "a short alternative name", want: "fabric", iface: "up2", uplinks: "up2", mtu: 1400, addrs: ips("10.0.2.5", "2001:db8:2::5"), setup: two + `
			link property add dev up2 altname first altname fabric`},
		{name: "deprecated addresses are for when there is no other", want: "up1", iface: "up1", uplinks: "up1", mtu: 1500, addrs: ips("2001:db8:1::7"), setup: two + `
			addr flush dev up1 scope global
			addr add 2001:db8:1::6/64 dev up1 nodad valid_lft 1000 preferred_lft 0
			addr add 2001:db8:1::7/64 dev up1 nodad`},
		{name: "a deprecated address alone", want: "up1", iface: "up1", uplinks: "up1", mtu: 1500, addrs: ips("2001:db8:1::6"), setup: two + `
			addr flush dev up1 scope global
			addr add 2001:db8:1::6/64 dev up1 nodad valid_lft 1000 preferred_lft 0`},
		{name: "an address that only this host knows", want: "up1", err: []string{"up1", "no usable address"}, setup: two + `
			addr flush dev up1 scope global
			addr add 10.9.9.9/24 dev up1 scope link`},
		{name: "a virtual address beside the host's own", want: "up1", iface: "up1", uplinks: "up1", mtu: 1500, addrs: ips("10.0.1.5"), setup: two + `
			addr flush dev up1 scope global
			addr add 10.0.1.100/32 dev up1
			addr add 10.0.1.5/30 dev up1`},
		{name: "a cloud's /32 behind a gateway", want: "up1", iface: "up1", uplinks: "up1", mtu: 1500, addrs: ips("10.7.7.7"), setup: two + `
			addr flush dev up1 scope global
			addr add 10.7.7.7/32 dev up1
			route add 172.31.1.1 dev up1
			route add default via 172.31.1.1`},
		{name: "a VPN's /32, with routes that name no gateway", seeds: ips("10.9.0.2"), iface: "up2", uplinks: "up2", mtu: 1400, addrs: ips("10.9.0.1"), setup: two + `
			addr flush dev up2 scope global
			addr add 10.9.0.1/32 dev up2
			route add 10.9.0.2 dev up2
			route add default via 10.0.1.6`},
		{name: "the same in a table of its own", seeds: ips("10.9.0.2"), iface: "up2", uplinks: "up2", mtu: 1400, addrs: ips("10.9.0.1"), setup: two + `
			addr flush dev up2 scope global
			addr add 10.9.0.1/32 dev up2
			route add 10.9.0.2 dev up2 table 52
			rule add priority 5270 lookup 52
			route add default via 10.0.1.6`},
		{name: "the same by IPv6", seeds: ips("2001:db8:9::2"), iface: "up2", uplinks: "up2", mtu: 1400, addrs: ips("2001:db8:9::1"), setup: two + `
			addr flush dev up2 scope global
			addr add 2001:db8:9::1/128 dev up2 nodad
			route add 2001:db8:9::2 dev up2
			route add default via 2001:db8:1::6`},
		{name: "a default route in a table to which a rule leads", iface: "up1", uplinks: "up1", mtu: 1450, addrs: ips("10.0.1.5", "2001:db8:1::5"), setup: two + `
			route add default via 10.0.1.6 mtu 1450 table 200
			rule add lookup 200`},
		{name: "the same, and the address is on lo", iface: "lo", uplinks: "up1 up2", mtu: 1400, addrs: ips("10.255.0.1", "2001:db8:ff::1"), setup: bgp + `
			route add default src 10.255.0.1 table 200 nexthop via 10.0.1.6 dev up1 nexthop via 10.0.2.6 dev up2
			rule add lookup 200`},
		{name: "a default route in a table for other packets", err: []string{"no default route applies to all packets", "up1 10.0.1.5", "up2 10.0.2.5"}, setup: two + `
			route add default via 10.0.1.6 table 200
			rule add fwmark 7 lookup 200`},
		{name: "no default route, and the other device is down", iface: "up2", uplinks: "up2", mtu: 1400, addrs: ips("10.0.2.5", "2001:db8:2::5"), setup: two + `
			link set up1 down`},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			h.ip(c.setup)
			u, err := h.detect(c.want, c.seeds)
			if c.err != nil {
				wantError(t, err, c.err...)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if u.Iface != c.iface || strings.Join(u.Uplinks, " ") != c.uplinks || u.MTU != c.mtu || !slices.Equal(u.Addrs, c.addrs) {
				t.Errorf("got %s, out by %v, MTU %d of %s, %v; want %s, %s, %d, %v", u.Iface, u.Uplinks, u.MTU, u.Narrowest, u.Addrs, c.iface, c.uplinks, c.mtu, c.addrs)
			}
		})
	}
}

// An address on a dummy device, with BGP on the host, leaves by the links, whatever routes a daemon has put there. CI's kernel has no such device.
func TestUplinksOfDummy(t *testing.T) {
	h := newHost(t)
	h.device("up1", "10.0.1.5/30")
	h.device("dummy0", "10.255.0.1/32")
	h.route("0.0.0.0/0", "10.0.1.6", "up1", 0, unix.RTPROT_BGP)
	h.route("10.255.0.0/24", "", "dummy0", 0, unix.RTPROT_BGP)
	for kind, want := range map[string]string{"veth": "dummy0", "dummy": "up1"} {
		h.do(func() error {
			d, err := newDetector()
			if err != nil {
				return err
			}
			index := h.link("dummy0").Attrs().Index
			d.kinds[index] = kind
			u, err := d.choose(candidate{index, ips("10.255.0.1")[0]})
			if err == nil && strings.Join(u.Uplinks, " ") != want {
				t.Errorf("%s: out by %v, want %s", kind, u.Uplinks, want)
			}
			return err
		})
	}
}

// No socket outside of a VRF gets an address inside. A bridge stands for the VRF, which CI's kernel lacks.
func TestUnderlayInVRF(t *testing.T) {
	h := newHost(t)
	h.device("eth0", "10.0.1.11/24")
	h.ip(`link add mgmt type bridge
		link set mgmt up
		link set eth0 master mgmt`)
	look := func() (d *detector) {
		h.do(func() (err error) {
			d, err = newDetector()
			return err
		})
		d.kinds[h.link("mgmt").Attrs().Index] = "vrf"
		d.sift()
		return d
	}
	text := []string{"10.0.1.11", "VRF mgmt", "take eth0 out", "ip link set eth0 nomaster"}
	for _, s := range []Sought{{}, {Interface: "eth0"}, {Addresses: ips("10.0.1.11")}, {Last: ips("10.0.1.11"), LastBy: ByGuess}, {Seeds: [][]netip.Addr{ips("10.9.0.1")}}} {
		h.do(func() error {
			_, err := look().detect(s)
			if s.Interface != "" {
				wantError(t, err, "underlay device eth0", "VRF mgmt", "take eth0 out")
			} else {
				wantError(t, err, text...)
			}
			if !errors.Is(err, ErrNotYet) {
				t.Errorf("%v is not waited for", err)
			}
			return nil
		})
	}
	h.do(func() error {
		if k := look().kept(Underlay{Iface: "eth0", Index: h.link("eth0").Attrs().Index, Addrs: ips("10.0.1.11")}); !slices.Equal(k.Lost, ips("10.0.1.11")) || k.VRF != "mgmt" {
			t.Errorf("after the device was put into the VRF: %+v", k)
		}
		return nil
	})
	h.device("eth1", "10.0.2.11/24")
	h.do(func() error {
		if u, err := look().detect(Sought{}); err != nil || !slices.Equal(u.Addrs, ips("10.0.2.11")) {
			t.Errorf("beside a device outside of the VRF: %v, %v", u.Addrs, err)
		}
		return nil
	})
}

func (h *host) detect(want string, seeds []netip.Addr) (u Underlay, err error) {
	s := Sought{Interface: want}
	if a, err := netip.ParseAddr(want); err == nil {
		s = Sought{Addresses: []netip.Addr{a}}
	}
	for _, a := range seeds {
		s.Seeds = append(s.Seeds, []netip.Addr{a})
	}
	h.do(func() error { u, err = DetectUnderlay(s); return nil })
	return u, err
}

// The kernel prefers temporary addresses as source where use_tempaddr is 2, as desktops and some distributions have it.
func TestDetectUnderlayTemporaryAddress(t *testing.T) {
	h := newHost(t)
	h.device("eth0")
	h.setSysctl("net/ipv6/conf/eth0/use_tempaddr", "2")
	h.setSysctl("net/ipv6/conf/eth0/accept_dad", "0")
	h.ip(`addr add 2001:db8:1::5/64 dev eth0 mngtmpaddr nodad valid_lft 3600 preferred_lft 1800
		route add default via 2001:db8:1::1`)
	eventually(t, "a temporary address", func() bool { return len(h.addrsOf("eth0")) == 3 })
	for _, seeds := range [][]netip.Addr{ips("2001:db8:9::9"), ips("2001:db8:1::9"), nil} {
		u, err := h.detect("", seeds)
		if err != nil || !slices.Equal(u.Addrs, ips("2001:db8:1::5")) {
			t.Errorf("seeds %v: %v, %v; want the stable address", seeds, u.Addrs, err)
		}
	}
}

// Before the detection of duplicates is over, an address cannot be bound to: that passes.
func TestDetectUnderlayTentativeAddress(t *testing.T) {
	h := newHost(t)
	h.device("eth0")
	h.setSysctl("net/ipv6/conf/eth0/accept_dad", "1")
	h.setSysctl("net/ipv6/conf/eth0/dad_transmits", "200")
	h.ip("addr add 2001:db8:1::5/64 dev eth0")
	for _, want := range []string{"", "eth0", "2001:db8:1::5"} {
		if u, err := h.detect(want, nil); !errors.Is(err, ErrNotYet) {
			t.Errorf("%q: %v, %v; want it to be waited for", want, u.Addrs, err)
		}
	}
}

// How packets leave for each peer, and by what MTU.
func TestWays(t *testing.T) {
	h := newHost(t)
	h.ip(`link add up1 type veth peer up1-far
		link add up2 type veth peer up2-far
		link set up1-far up
		link set up2-far up
		link set up1 up mtu 1500
		link set up2 up mtu 1400
		addr add 10.0.1.5/24 dev up1
		addr add 10.0.1.6/24 dev up2
		addr add 2001:db8:1::5/64 dev up1 nodad
		nexthop add id 1 via 10.0.1.6 dev up1
		nexthop add id 2 via 10.0.1.7 dev up2
		nexthop add id 9 group 1/2
		route add 10.9.0.0/16 nhid 9
		route add 10.8.0.0/16 nexthop via 10.0.1.9 dev up1 nexthop via 10.0.1.9 dev up2
		route add 10.7.0.0/16 via 10.0.1.9 dev up1 mtu 1350
		route add 2001:db8:9::/48 via 2001:db8:1::9 mtu 1300`)
	w := h.reconciler(Options{}).NewWays(ips("10.0.1.6", "2001:db8:1::5"))
	for _, c := range []struct {
		to, devices string
		mtu         int
	}{
		{"10.0.1.77", "up1", 1500}, // the first of two routes to the subnet, though the address is up2's
		{"10.9.0.1", "up1 up2", 1400},
		{"10.8.0.1", "up1 up2", 1400},
		{"10.7.0.1", "up1", 1350},
		{"2001:db8:1::7", "up1", 1500},
		{"2001:db8:9::1", "up1", 1300},
		{"192.0.2.1", "", 0},
	} {
		if got := w.To(netip.MustParseAddr(c.to)); strings.Join(got.Devices, " ") != c.devices || got.MTU != c.mtu {
			t.Errorf("%s: %+v, want %s, %d", c.to, got, c.devices, c.mtu)
		}
	}
	if got := w.Devices("up2-far", "gone"); len(got) != 3 || got["up1"] != 1500 || got["up2"] != 1400 || got["up2-far"] != 1500 {
		t.Errorf("devices %v", got)
	}
}
