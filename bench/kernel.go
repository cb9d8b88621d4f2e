package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/tulle-net/tulle/internal/lab"
)

// The tunnels of the kernel, beside VXLAN (lab.KernelVXLAN).

// fouPort is the UDP port of the FOU tunnels.
const fouPort = 5555

// setupKernelIPIP connects the hosts by ipip devices (RFC 2003).
func setupKernelIPIP(_ context.Context, l *lab.Lab, o *AllOptions) (*tunnel, error) {
	if o.Six {
		return nil, lackError("the kernel's ipip device carries IPv4 only")
	}
	return setupIPTunnel(l, o, 20, 0, "this kernel has no ipip device (CONFIG_NET_IPIP)")
}

// setupKernelFOU connects the hosts by ipip or ip6tnl devices whose packets are in UDP (foo over UDP, ip-fou(8)). The UDP
// source port is chosen by flow. Over IPv4 the UDP checksum is left out, as the kernel does unless asked; over IPv6 it is there.
func setupKernelFOU(_ context.Context, l *lab.Lab, o *AllOptions) (*tunnel, error) {
	family, proto, overhead := unix.AF_INET, unix.IPPROTO_IPIP, 28
	if o.Six {
		family, proto, overhead = unix.AF_INET6, unix.IPPROTO_IPV6, 48
	}
	for _, h := range l.Hosts() {
		err := l.Do(h.Name, func() error {
			err := netlink.FouAdd(netlink.Fou{Family: family, Port: fouPort, Protocol: proto, EncapType: netlink.FOU_ENCAP_DIRECT})
			switch {
			case errors.Is(err, unix.ENOENT), errors.Is(err, netlink.ErrNotImplemented): // no such family of generic netlink
				return lackError("this kernel has no foo over UDP (CONFIG_NET_FOU, CONFIG_NET_FOU_IP_TUNNELS)")
			case errors.Is(err, unix.EAFNOSUPPORT):
				return lackError("this kernel has no foo over UDP for IPv6 (CONFIG_IPV6_FOU)")
			case err != nil:
				return fmt.Errorf("FOU on port %d: %w", fouPort, err)
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return setupIPTunnel(l, o, overhead, fouEncap, "this kernel has no ipip or ip6tnl device with FOU (CONFIG_NET_IPIP, CONFIG_IPV6_TUNNEL)")
}

// fouEncap is TUNNEL_ENCAP_FOU of linux/if_tunnel.h.
const fouEncap = 1

// setupIPTunnel gives each host a device that puts IP into IP, and with encap that into UDP.
func setupIPTunnel(l *lab.Lab, o *AllOptions, overhead int, encap uint16, lacking string) (*tunnel, error) {
	const device = "ipt0"
	t := &tunnel{mtu: l.Options().MTU - overhead}
	for i, h := range l.Hosts() {
		peer := l.Hosts()[1-i]
		local, remote := h.Addr(o.Six).AsSlice(), peer.Addr(o.Six).AsSlice()
		attrs := netlink.LinkAttrs{Name: device, MTU: t.mtu}
		port := uint16(0)
		if encap != 0 {
			port = fouPort
		}
		var link netlink.Link = &netlink.Iptun{LinkAttrs: attrs, PMtuDisc: 1, Ttl: 64, Local: local, Remote: remote, EncapType: encap, EncapDport: port}
		if o.Six {
			const ignoreEncapLimit, checksum6 = 1, 2 // IP6_TNL_F_IGN_ENCAP_LIMIT: no header for it; TUNNEL_ENCAP_FLAG_CSUM6
			link = &netlink.Ip6tnl{LinkAttrs: attrs, Ttl: 64, Local: local, Remote: remote, Flags: ignoreEncapLimit, EncapType: encap, EncapDport: port, EncapFlags: checksum6}
		}
		err := l.Do(h.Name, func() error {
			if err := netlink.LinkAdd(link); err != nil {
				return lack(err, lacking)
			}
			return forwardInto(device, podsOf(l, peer.Name))
		})
		if err != nil {
			return nil, err
		}
	}
	return t, setPodMTU(l, t.mtu)
}

// setupKernelWireGuard connects the hosts by WireGuard devices, with the keys and the MTU that wireguard-go gets.
func setupKernelWireGuard(_ context.Context, l *lab.Lab, o *AllOptions) (*tunnel, error) {
	const device = "wgk0"
	t := &tunnel{mtu: wireguardMTU(l)}
	var keys [2]wgtypes.Key
	for i := range keys {
		var err error
		if keys[i], err = wgtypes.GeneratePrivateKey(); err != nil {
			return nil, err
		}
	}
	for i, h := range l.Hosts() {
		peer := l.Hosts()[1-i]
		port, routes := wireguardPort, podsOf(l, peer.Name)
		to := wgtypes.PeerConfig{
			PublicKey:  keys[1-i].PublicKey(),
			Endpoint:   net.UDPAddrFromAddrPort(netip.AddrPortFrom(peer.Addr(o.Six), wireguardPort)),
			AllowedIPs: make([]net.IPNet, len(routes)),
		}
		for k, p := range routes {
			to.AllowedIPs[k] = *ipNet(p)
		}
		err := l.Do(h.Name, func() error {
			if err := netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: netlink.LinkAttrs{Name: device, MTU: t.mtu}}); err != nil {
				return lack(err, "this kernel has no WireGuard device (CONFIG_WIREGUARD)")
			}
			c, err := wgctrl.New() // its socket is of this thread's namespace
			if err != nil {
				return fmt.Errorf("configure WireGuard: %w", err)
			}
			defer c.Close()
			if err := c.ConfigureDevice(device, wgtypes.Config{PrivateKey: &keys[i], ListenPort: &port, Peers: []wgtypes.PeerConfig{to}}); err != nil {
				return fmt.Errorf("configure WireGuard: %w", err)
			}
			return forwardInto(device, routes)
		})
		if err != nil {
			return nil, err
		}
	}
	return t, setPodMTU(l, t.mtu)
}
