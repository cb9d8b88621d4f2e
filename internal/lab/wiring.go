package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// The pod's next hop, the same for every pod (as Calico does): a link-local address that the pod finds in a permanent
// neighbour entry, so that no ARP and no neighbour discovery is ever needed.
var (
	podGateway4 = netip.MustParseAddr("169.254.1.1")
	podGateway6 = netip.MustParseAddr("fe80::1")
	hostVethMAC = net.HardwareAddr{0xee, 0xee, 0xee, 0xee, 0xee, 0xee}
)

func (p *Pod) mac(h *Host) net.HardwareAddr {
	return net.HardwareAddr{0x02, 0x74, 0x00, byte(h.Number), 0x00, byte(p.Number)}
}

func (p *Pod) hostVeth() string { return "veth-" + p.Name }

func routerMAC(subnet int) net.HardwareAddr {
	return net.HardwareAddr{0x02, 0x74, 0x01, 0x00, byte(subnet >> 8), byte(subnet)}
}

func bridgeName(subnet int) string { return fmt.Sprintf("br%d", subnet) }

func linkAttrs(name string) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name = name
	return a
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func hostPrefix(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// AddAddr gives a link an address that is usable when it returns: no duplicate address detection, and the kernel, which
// takes in IPv6 addresses a moment later, does take packets to it.
func AddAddr(ctx context.Context, h *sys.Netlink, link netlink.Link, p netip.Prefix) error {
	a := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	if err := h.AddrAdd(link, a); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add address %v to %s: %w", p, link.Attrs().Name, err)
	}
	if p.Addr().Is4() || p.Addr().IsLinkLocalUnicast() { // the latter are local to many links, and route get picks one
		return nil
	}
	err := poll(ctx, time.Millisecond, func() (bool, error) {
		routes, err := h.RouteGet(p.Addr().AsSlice())
		return err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL, nil
	})
	if err != nil {
		return fmt.Errorf("wait until %v on %s is taken in: %w", p, link.Attrs().Name, err)
	}
	return nil
}

func defaultRoute(link netlink.Link, via netip.Addr) *netlink.Route {
	return &netlink.Route{
		LinkIndex: link.Attrs().Index, Protocol: unix.RTPROT_STATIC,
		Dst: ipNet(netip.PrefixFrom(zeroOf(via), 0)), Gw: via.AsSlice(), Flags: int(netlink.FLAG_ONLINK),
	}
}

func zeroOf(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

func permanentNeigh(link netlink.Link, a netip.Addr, mac net.HardwareAddr) *netlink.Neigh {
	n := &netlink.Neigh{LinkIndex: link.Attrs().Index, State: unix.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: mac, Family: unix.AF_INET}
	if a.Is6() {
		n.Family = unix.AF_INET6
	}
	return n
}

func linkUp(h *sys.Netlink, name string) (netlink.Link, error) {
	link, err := h.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", name, err)
	}
	if err := h.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("set %s up: %w", name, err)
	}
	return link, nil
}

// Veth makes a pair, both ends down: name in the namespace of h, peer in the one at peerNS.
func Veth(h *sys.Netlink, name, peer, peerNS string, mtu int, mac, peerMAC net.HardwareAddr) error {
	ns, err := os.Open(peerNS)
	if err != nil {
		return fmt.Errorf("network namespace: %w", err)
	}
	defer ns.Close()
	v := &netlink.Veth{LinkAttrs: linkAttrs(name), PeerName: peer, PeerNamespace: netlink.NsFd(ns.Fd()), PeerTxQLen: -1, PeerHardwareAddr: peerMAC}
	v.MTU, v.HardwareAddr = mtu, mac
	if err := h.LinkAdd(v); err != nil {
		return fmt.Errorf("make veth %s with peer %s: %w", name, peer, err)
	}
	return nil
}

// noDAD makes an interface's link-local address usable at once: duplicate address detection would hold the first packets
// back for a second.
func noDAD(dev string) [2]string { return [2]string{"ipv6/conf/" + dev + "/accept_dad", "0"} }

var forwarding = [][2]string{{"ipv4/ip_forward", "1"}, {"ipv6/conf/all/forwarding", "1"}}

// buildRouter makes the router's namespace with a bridge for each subnet.
func (l *Lab) buildRouter(ctx context.Context) error {
	o := &l.st.Options
	path := sys.NetnsPath(l.netnsName(Router))
	if err := sys.NewNetns(l.netnsName(Router)); err != nil {
		return err
	}
	// The bridges are wires: what crosses them is no business of a packet filter.
	settings := append([][2]string{
		noDAD("default"),
		{"bridge/bridge-nf-call-iptables", "0"}, {"bridge/bridge-nf-call-ip6tables", "0"}, {"bridge/bridge-nf-call-arptables", "0"},
		{"ipv4/conf/all/send_redirects", "0"}, {"ipv4/conf/default/send_redirects", "0"},
	}, forwarding...)
	if err := sysctl(path, settings...); err != nil {
		return err
	}
	h, err := NetlinkIn(path)
	if err != nil {
		return err
	}
	defer h.Close()
	if _, err := linkUp(h, "lo"); err != nil {
		return err
	}
	for s := 1; s <= o.Subnets; s++ {
		br := &netlink.Bridge{LinkAttrs: linkAttrs(bridgeName(s))}
		br.MTU = o.MTU
		// Without an address of its own a bridge takes its lowest port's: another host's arrival would change the router's
		// address, and the neighbours that still send to the old one would lose packets.
		br.HardwareAddr = routerMAC(s)
		// A multicast snooping bridge without a querier may drop neighbour solicitations for a while.
		br.MulticastSnooping = new(bool)
		if err := h.LinkAdd(br); err != nil {
			return fmt.Errorf("make bridge %s: %w", br.Name, err)
		}
		link, err := linkUp(h, br.Name)
		if err != nil {
			return err
		}
		for _, a := range underlayAddrs(s, routerHost, o.Underlay) {
			if err := AddAddr(ctx, h, link, netip.PrefixFrom(a, underlayBits(a))); err != nil {
				return err
			}
		}
	}
	return nil
}

// buildHost makes a host's namespace and plugs it into its subnet.
func (l *Lab) buildHost(ctx context.Context, host *Host) error {
	o := &l.st.Options
	if err := os.MkdirAll(host.Dir, 0o755); err != nil {
		return err
	}
	if err := sys.NewNetns(l.netnsName(host.Name)); err != nil {
		return err
	}
	router, err := NetlinkIn(sys.NetnsPath(l.netnsName(Router)))
	if err != nil {
		return err
	}
	defer router.Close()
	if err := Veth(router, host.Name, "eth0", host.Netns, o.MTU, nil, nil); err != nil {
		return err
	}
	port, err := linkUp(router, host.Name)
	if err != nil {
		return err
	}
	bridge, err := router.LinkByName(bridgeName(host.Subnet))
	if err != nil {
		return fmt.Errorf("find %s: %w", bridgeName(host.Subnet), err)
	}
	if err := router.LinkSetMaster(port, bridge); err != nil {
		return fmt.Errorf("plug %s into %s: %w", host.Name, bridgeName(host.Subnet), err)
	}
	// Forwarding is for the agent to switch on.
	if err := sysctl(host.Netns, [2]string{"ipv6/conf/eth0/accept_ra", "0"}, noDAD("eth0")); err != nil {
		return err
	}
	h, err := NetlinkIn(host.Netns)
	if err != nil {
		return err
	}
	defer h.Close()
	if _, err := linkUp(h, "lo"); err != nil {
		return err
	}
	return l.addressHost(ctx, h, host)
}

// addressHost brings eth0 up with its addresses and default routes.
func (l *Lab) addressHost(ctx context.Context, h *sys.Netlink, host *Host) error {
	link, err := linkUp(h, "eth0")
	if err != nil {
		return err
	}
	for _, a := range host.Underlay {
		if err := AddAddr(ctx, h, link, netip.PrefixFrom(a, underlayBits(a))); err != nil {
			return err
		}
	}
	for _, gw := range underlayAddrs(host.Subnet, routerHost, l.st.Options.Underlay) {
		if err := h.RouteReplace(defaultRoute(link, gw)); err != nil {
			return fmt.Errorf("default route of %s via %v: %w", host.Name, gw, err)
		}
	}
	return nil
}

// WaitUp waits until links are operational. The kernel tells IPv6 about a link's carrier up to a second after it is there
// (it collects such news), and until then IPv6 neither answers nor asks for neighbours.
func WaitUp(ctx context.Context, path string, names ...string) error {
	h, err := NetlinkIn(path)
	if err != nil {
		return err
	}
	defer h.Close()
	for _, name := range names {
		err := poll(ctx, 2*time.Millisecond, func() (bool, error) {
			link, err := h.LinkByName(name)
			return err == nil && link.Attrs().OperState == netlink.OperUp, err
		})
		if err != nil {
			return fmt.Errorf("wait for link %s in %s: %w", name, path, err)
		}
	}
	return nil
}

// waitHosts waits until these hosts are on the network.
func (l *Lab) waitHosts(ctx context.Context, hosts ...Host) error {
	for _, h := range hosts {
		err := WaitUp(ctx, h.Netns, "eth0")
		if err == nil {
			err = WaitUp(ctx, sys.NetnsPath(l.netnsName(Router)), h.Name, bridgeName(h.Subnet))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// buildPod makes a pod's namespace and joins it to its host as a CNI plugin would.
func (l *Lab) buildPod(ctx context.Context, host *Host, pod *Pod) error {
	if err := sys.NewNetns(l.netnsName(pod.Name)); err != nil {
		return err
	}
	hh, err := NetlinkIn(host.Netns)
	if err != nil {
		return err
	}
	defer hh.Close()
	ph, err := NetlinkIn(pod.Netns)
	if err != nil {
		return err
	}
	defer ph.Close()
	if err := Veth(hh, pod.hostVeth(), "eth0", pod.Netns, pod.MTU, hostVethMAC, pod.mac(host)); err != nil {
		return err
	}
	if err := errors.Join(sysctl(host.Netns, noDAD(pod.hostVeth())), sysctl(pod.Netns, noDAD("eth0"))); err != nil {
		return err
	}
	if err := podSide(ctx, ph, pod); err != nil {
		return fmt.Errorf("pod %s: %w", pod.Name, err)
	}
	if err := hostSide(ctx, hh, host, pod); err != nil {
		return fmt.Errorf("pod %s on %s: %w", pod.Name, host.Name, err)
	}
	if err := WaitUp(ctx, pod.Netns, "eth0"); err != nil {
		return err
	}
	return WaitUp(ctx, host.Netns, pod.hostVeth())
}

func podSide(ctx context.Context, h *sys.Netlink, pod *Pod) error {
	if _, err := linkUp(h, "lo"); err != nil {
		return err
	}
	link, err := linkUp(h, "eth0")
	if err != nil {
		return err
	}
	for _, a := range pod.Addresses {
		if err := AddAddr(ctx, h, link, hostPrefix(a)); err != nil {
			return err
		}
		gw := podGateway4
		if a.Is6() {
			gw = podGateway6
		}
		if err := h.NeighSet(permanentNeigh(link, gw, hostVethMAC)); err != nil {
			return fmt.Errorf("neighbour %v: %w", gw, err)
		}
		if err := h.RouteReplace(defaultRoute(link, gw)); err != nil {
			return fmt.Errorf("default route via %v: %w", gw, err)
		}
	}
	return nil
}

func hostSide(ctx context.Context, h *sys.Netlink, host *Host, pod *Pod) error {
	link, err := linkUp(h, pod.hostVeth())
	if err != nil {
		return err
	}
	if err := AddAddr(ctx, h, link, netip.PrefixFrom(podGateway6, 64)); err != nil {
		return err
	}
	for _, a := range pod.Addresses {
		if err := h.NeighSet(permanentNeigh(link, a, pod.mac(host))); err != nil {
			return fmt.Errorf("neighbour %v: %w", a, err)
		}
		r := &netlink.Route{LinkIndex: link.Attrs().Index, Protocol: unix.RTPROT_STATIC, Scope: netlink.SCOPE_LINK, Dst: ipNet(hostPrefix(a))}
		if err := h.RouteReplace(r); err != nil {
			return fmt.Errorf("route to %v: %w", a, err)
		}
	}
	return nil
}
