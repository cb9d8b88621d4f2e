package lab

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"

	"github.com/tulle-net/tulle/internal/podnet"
	"github.com/tulle-net/tulle/internal/sys"
)

func (p *Pod) mac(h *Host) net.HardwareAddr {
	return net.HardwareAddr{0x02, 0x74, 0x00, byte(h.Number), 0x00, byte(p.Number)}
}

func (p *Pod) hostVeth() string { return "veth-" + p.Name }

func routerMAC(subnet int) net.HardwareAddr {
	return net.HardwareAddr{0x02, 0x74, 0x01, 0x00, byte(subnet >> 8), byte(subnet)}
}

// Veth makes a pair, both ends down: name in the namespace of h, peer in the one at peerNS.
func Veth(h *sys.Netlink, name, peer, peerNS string, mtu int, mac, peerMAC net.HardwareAddr) error {
	ns, err := os.Open(peerNS)
	if err != nil {
		return fmt.Errorf("network namespace: %w", err)
	}
	defer ns.Close()
	v := &netlink.Veth{LinkAttrs: sys.LinkAttrs(name), PeerName: peer, PeerNamespace: netlink.NsFd(ns.Fd()), PeerTxQLen: -1, PeerHardwareAddr: peerMAC}
	v.MTU, v.HardwareAddr = mtu, mac
	if err := h.LinkAdd(v); err != nil {
		return fmt.Errorf("make veth %s with peer %s: %w", name, peer, err)
	}
	return nil
}

var forwarding = [][2]string{{"ipv4/ip_forward", "1"}, {"ipv6/conf/all/forwarding", "1"}}

// buildRouter makes the router's namespace with a switch for each subnet.
func (l *Lab) buildRouter(ctx context.Context) error {
	o := &l.st.Options
	path := sys.NetnsPath(l.netnsName(Router))
	if err := sys.NewNetns(l.netnsName(Router)); err != nil {
		return err
	}
	// The bridges are wires: what crosses them is no business of a packet filter.
	settings := append([][2]string{
		sys.NoDAD("default"),
		{"bridge/bridge-nf-call-iptables", "0"}, {"bridge/bridge-nf-call-ip6tables", "0"}, {"bridge/bridge-nf-call-arptables", "0"},
		{"ipv4/conf/all/send_redirects", "0"}, {"ipv4/conf/default/send_redirects", "0"},
	}, forwarding...)
	if err := sysctl(path, settings...); err != nil {
		return err
	}
	h, err := sys.OpenNetlink(path)
	if err != nil {
		return err
	}
	defer h.Close()
	if _, err := h.LinkUp("lo"); err != nil {
		return err
	}
	for s := 1; s <= o.Subnets && !o.Straight; s++ {
		if err := l.buildSubnet(ctx, h, s); err != nil {
			return err
		}
	}
	return nil
}

// buildHost makes a host's namespace and plugs it into its subnet.
func (l *Lab) buildHost(ctx context.Context, host *Host) error {
	if err := os.MkdirAll(host.Dir, 0o755); err != nil {
		return err
	}
	if err := sys.NewNetns(l.netnsName(host.Name)); err != nil {
		return err
	}
	router, err := sys.OpenNetlink(sys.NetnsPath(l.netnsName(Router)))
	if err != nil {
		return err
	}
	defer router.Close()
	if err := l.wireHost(router, host); err != nil {
		return err
	}
	// Forwarding is for the agent to switch on.
	if err := sysctl(host.Netns, [2]string{"ipv6/conf/eth0/accept_ra", "0"}, sys.NoDAD("eth0")); err != nil {
		return err
	}
	h, err := sys.OpenNetlink(host.Netns)
	if err != nil {
		return err
	}
	defer h.Close()
	if _, err := h.LinkUp("lo"); err != nil {
		return err
	}
	if err := l.addressHost(ctx, h, host); err != nil || !l.st.Options.Straight {
		return err
	}
	return l.addressRouter(ctx, router, host.Subnet)
}

// addressHost brings eth0 up with its addresses and default routes.
func (l *Lab) addressHost(ctx context.Context, h *sys.Netlink, host *Host) error {
	link, err := h.LinkUp("eth0")
	if err != nil {
		return err
	}
	for _, a := range host.Underlay {
		if err := h.AddAddress(ctx, link, netip.PrefixFrom(a, underlayBits(a))); err != nil {
			return err
		}
	}
	for _, gw := range underlayAddrs(host.Subnet, routerHost, l.st.Options.Underlay) {
		if err := h.RouteReplace(sys.DefaultRoute(link, gw)); err != nil {
			return fmt.Errorf("default route of %s via %v: %w", host.Name, gw, err)
		}
	}
	return nil
}

// WaitUp waits until links in the namespace at path are operational.
func WaitUp(ctx context.Context, path string, names ...string) error {
	h, err := sys.OpenNetlink(path)
	if err != nil {
		return err
	}
	defer h.Close()
	if err := h.WaitUp(ctx, names...); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// waitHosts waits until these hosts are on the network.
func (l *Lab) waitHosts(ctx context.Context, hosts ...Host) error {
	for _, h := range hosts {
		err := WaitUp(ctx, h.Netns, "eth0")
		if err == nil {
			err = WaitUp(ctx, sys.NetnsPath(l.netnsName(Router)), l.portName(&h), gatewayName(h.Subnet))
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
	h, err := podnet.Open(host.Netns)
	if err != nil {
		return err
	}
	defer h.Close()
	_, err = h.Add(ctx, podnet.Config{
		ID: pod.ID, HostInterface: pod.hostVeth(), Netns: pod.Netns, Interface: "eth0",
		Addresses: pod.Addresses, MTU: pod.MTU, MAC: pod.mac(host),
	})
	if err != nil {
		return fmt.Errorf("pod %s on %s: %w", pod.Name, host.Name, err)
	}
	return nil
}

// removeVeth removes a pod's link.
func (l *Lab) removeVeth(host *Host, pod *Pod) error {
	h, err := podnet.Open(host.Netns)
	if err != nil {
		return err
	}
	defer h.Close()
	return h.Remove(pod.hostVeth())
}
