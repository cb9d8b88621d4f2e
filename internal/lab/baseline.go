package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// The baselines that a tunnel is measured against. Both give hosts routes to single pods, which win over an agent's routes
// to whole prefixes: they can be laid over a lab whose agents run, and taken away again. They cover the pods of that moment.
// Forwarding, which they switch on where no agent has, stays on.

// undoList collects what takes a change back, and runs it last first.
type undoList []func() error

func (u undoList) run() error {
	var err error
	for i := len(u) - 1; i >= 0; i-- {
		err = errors.Join(err, u[i]())
	}
	return err
}

// DirectRoutes gives every host and the router a route to every pod, so that pods talk with no tunnel at all, and the pods'
// links the underlay's MTU. The underlay must have the pods' families. The result takes it all back.
func (l *Lab) DirectRoutes(ctx context.Context) (undo func() error, err error) {
	var u undoList
	defer func() {
		if err != nil {
			err = errors.Join(err, u.run())
		}
	}()
	router := Host{Name: Router, Netns: sys.NetnsPath(l.netnsName(Router))}
	for _, at := range append(l.Hosts(), router) {
		h, err := sys.OpenNetlink(at.Netns)
		if err != nil {
			return nil, err
		}
		defer h.Close()
		if err := sysctl(at.Netns, forwarding...); err != nil {
			return nil, err
		}
		for _, pod := range l.Pods() {
			owner, err := l.Host(pod.Host)
			if err != nil {
				return nil, err
			}
			if owner.Name == at.Name {
				continue
			}
			for _, a := range pod.Addresses {
				dev, via := "eth0", owner.Addr(a.Is6())
				switch {
				case !via.IsValid():
					return nil, fmt.Errorf("no direct route to %v: the lab's underlay lacks its family", a)
				case at.Name == Router:
					dev = gatewayName(owner.Subnet)
				case at.Subnet != owner.Subnet:
					via = pick(underlayAddrs(at.Subnet, routerHost, l.st.Options.Underlay), a.Is6())
				}
				back, err := podRoute(h, at.Netns, dev, a, via)
				if err != nil {
					return nil, fmt.Errorf("%s: %w", at.Name, err)
				}
				u = append(u, back)
			}
		}
	}
	back, err := l.podMTU(l.st.Options.MTU)
	if err != nil {
		return nil, err
	}
	return append(u, back).run, ctx.Err()
}

// podRoute adds a route to one pod and returns what takes it back.
func podRoute(h *sys.Netlink, path, dev string, pod, via netip.Addr) (back func() error, err error) {
	link, err := h.LinkByName(dev)
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", dev, err)
	}
	r := &netlink.Route{
		LinkIndex: link.Attrs().Index, Protocol: unix.RTPROT_STATIC,
		Dst: sys.IPNet(sys.HostPrefix(pod)), Gw: via.AsSlice(), Flags: int(netlink.FLAG_ONLINK),
	}
	if err := h.RouteAdd(r); err != nil {
		return nil, fmt.Errorf("route to %v via %v: %w", pod, via, err)
	}
	return func() error {
		h, err := sys.OpenNetlink(path)
		if err != nil {
			return err
		}
		defer h.Close()
		if err := h.RouteDel(r); err != nil && !errors.Is(err, unix.ESRCH) { // gone with its device
			return fmt.Errorf("remove the route to %v via %v: %w", pod, via, err)
		}
		return nil
	}, nil
}

// podMTU sets the MTU of both ends of every pod's link, and returns what sets them back.
func (l *Lab) podMTU(mtu int) (back func() error, err error) {
	var u undoList
	set := func(path, dev string, mtu int) error {
		h, err := sys.OpenNetlink(path)
		if err != nil {
			return err
		}
		defer h.Close()
		link, err := h.LinkByName(dev)
		if err != nil {
			return fmt.Errorf("find %s: %w", dev, err)
		}
		if err := h.LinkSetMTU(link, mtu); err != nil {
			return fmt.Errorf("set the MTU of %s to %d: %w", dev, mtu, err)
		}
		return nil
	}
	for _, p := range l.Pods() {
		h, err := l.Host(p.Host)
		if err != nil {
			return nil, err
		}
		for _, end := range [][2]string{{h.Netns, p.hostVeth()}, {p.Netns, "eth0"}} {
			if err := set(end[0], end[1], mtu); err != nil {
				return nil, errors.Join(err, u.run())
			}
			u = append(u, func() error { return set(end[0], end[1], p.MTU) })
		}
	}
	return u.run, nil
}

const (
	vxlanDev  = "vxlan0"
	vxlanVNI  = 4242
	vxlanPort = 8472 // not 4789, where an agent listens
)

// The VTEPs' addresses, next hops of the routes through the VXLAN device. They never leave their hosts.
func vtepAddr(h *Host, v6 bool) netip.Addr {
	if v6 {
		return netip.AddrFrom16([16]byte{0xfd, 0x00, 0x00, 0x0b, 15: byte(h.Number)})
	}
	return netip.AddrFrom4([4]byte{169, 254, 200, byte(h.Number)})
}

func vtepMAC(h *Host) net.HardwareAddr { return net.HardwareAddr{0x02, 0x76, 0, 0, 0, byte(h.Number)} }

// KernelVXLAN gives every host a VXLAN device of the kernel and, through it, a route to every pod of the others, and the
// pods' links its MTU. The outer family is IPv4 where the underlay has it. The result takes it all back.
func (l *Lab) KernelVXLAN(ctx context.Context) (undo func() error, err error) {
	var u undoList
	defer func() {
		if err != nil {
			err = errors.Join(err, u.run())
		}
	}()
	outer6 := !l.st.Options.Underlay.V4
	mtu := l.st.Options.MTU - 50 // outer Ethernet is not counted; IPv4, UDP, VXLAN and inner Ethernet are: RFC 7348 §5
	if outer6 {
		mtu -= 20
	}
	hosts := l.Hosts()
	for _, at := range hosts {
		h, err := sys.OpenNetlink(at.Netns)
		if err != nil {
			return nil, err
		}
		defer h.Close()
		if err := sysctl(at.Netns, forwarding...); err != nil {
			return nil, err
		}
		link, err := addVXLAN(ctx, h, &at, outer6, mtu)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", at.Name, err)
		}
		u = append(u, func() error {
			h, err := sys.OpenNetlink(at.Netns)
			if err != nil {
				return err
			}
			defer h.Close()
			return h.LinkDel(link) // its routes, neighbours and forwarding entries go with it
		})
		for _, peer := range hosts {
			if peer.Name == at.Name {
				continue
			}
			if err := l.vxlanPeer(h, link, &at, &peer, outer6); err != nil {
				return nil, fmt.Errorf("%s to %s: %w", at.Name, peer.Name, err)
			}
		}
	}
	back, err := l.podMTU(mtu)
	if err != nil {
		return nil, err
	}
	return append(u, back).run, ctx.Err()
}

func addVXLAN(ctx context.Context, h *sys.Netlink, at *Host, outer6 bool, mtu int) (netlink.Link, error) {
	eth0, err := h.LinkByName("eth0")
	if err != nil {
		return nil, fmt.Errorf("find eth0: %w", err)
	}
	v := &netlink.Vxlan{
		LinkAttrs: sys.LinkAttrs(vxlanDev), VxlanId: vxlanVNI, Port: vxlanPort,
		VtepDevIndex: eth0.Attrs().Index, SrcAddr: at.Addr(outer6).AsSlice(), UDPCSum: outer6,
	}
	v.MTU, v.HardwareAddr = mtu, vtepMAC(at)
	if err := h.LinkAdd(v); err != nil {
		return nil, fmt.Errorf("make %s: %w", vxlanDev, err)
	}
	link, err := h.LinkUp(vxlanDev)
	if err != nil {
		return nil, err
	}
	for _, v6 := range []bool{false, true} {
		if err := h.AddAddress(ctx, link, sys.HostPrefix(vtepAddr(at, v6))); err != nil {
			return nil, err
		}
	}
	return link, nil
}

// vxlanPeer makes peer and its pods known to a host's VXLAN device.
func (l *Lab) vxlanPeer(h *sys.Netlink, link netlink.Link, at, peer *Host, outer6 bool) error {
	fdb := &netlink.Neigh{
		LinkIndex: link.Attrs().Index, Family: unix.AF_BRIDGE, State: unix.NUD_PERMANENT, Flags: netlink.NTF_SELF,
		IP: peer.Addr(outer6).AsSlice(), HardwareAddr: vtepMAC(peer),
	}
	if err := h.NeighSet(fdb); err != nil {
		return fmt.Errorf("forwarding entry: %w", err)
	}
	for _, v6 := range []bool{false, true} {
		if err := h.NeighSet(sys.PermanentNeighbour(link, vtepAddr(peer, v6), vtepMAC(peer))); err != nil {
			return fmt.Errorf("neighbour: %w", err)
		}
	}
	for _, pod := range l.Pods() {
		if pod.Host != peer.Name {
			continue
		}
		for _, a := range pod.Addresses {
			if _, err := podRoute(h, at.Netns, vxlanDev, a, vtepAddr(peer, a.Is6())); err != nil {
				return err
			}
		}
	}
	return nil
}
