package podnet

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// ours tells bridges that Add has made, by their MAC. Unlike an alias, a device has it from its first moment.
func ours(l netlink.Link) bool {
	return l.Type() == "bridge" && slices.Equal(l.Attrs().HardwareAddr, HostMAC)
}

// validateBridge holds what a pod behind a bridge needs.
func (c *Config) validateBridge() error {
	if err := CheckInterface(c.Bridge); err != nil {
		return fmt.Errorf("podnet: bridge: %w", err)
	}
	if c.Netns == "" {
		return fmt.Errorf("podnet: a pod behind the bridge %s needs its network namespace: its interface cannot be handed over", c.Bridge)
	}
	if c.MAC != nil && (len(c.MAC) != len(HostMAC) || c.MAC[0]&1 != 0 || slices.Equal(c.MAC, HostMAC)) {
		return fmt.Errorf("podnet: MAC %v cannot be a pod's: want that of one station, other than the gateway's", c.MAC)
	}
	return nil
}

// macOf derives a locally administered MAC from an address. Whoever has the address later has the same MAC, so that what its
// neighbours remember stays true.
func macOf(a netip.Addr) net.HardwareAddr {
	sum := sha256.Sum256(a.AsSlice())
	sum[0] = sum[0]&^0x03 | 0x02
	return sum[:6]
}

// linkLocalOf is the link-local address that a kernel derives from a MAC (RFC 4291 appendix A, modified EUI-64).
func linkLocalOf(mac net.HardwareAddr) netip.Addr {
	a := [16]byte{0: 0xfe, 1: 0x80, 8: mac[0] ^ 0x02, 9: mac[1], 10: mac[2], 11: 0xff, 12: 0xfe, 13: mac[3], 14: mac[4], 15: mac[5]}
	return netip.AddrFrom16(a)
}

// ensureBridge makes the bridge, or finds it; six: a pod behind it has IPv6. Several callers may do so at once.
func (h *Host) ensureBridge(ctx context.Context, name string, six bool) (netlink.Link, error) {
	link, err := h.nl.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		b := &netlink.Bridge{LinkAttrs: sys.LinkAttrs(name), MulticastSnooping: new(bool)} // there is no querier
		b.HardwareAddr = HostMAC
		if err := h.nl.LinkAdd(b); err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, fmt.Errorf("make the bridge %s: %w", name, err)
		}
		link, err = h.nl.LinkByName(name)
	}
	if err != nil {
		return nil, fmt.Errorf("find the bridge %s: %w", name, err)
	}
	if !ours(link) {
		return nil, fmt.Errorf("the bridge %[1]s cannot be made: %[1]s is a device of somebody else (%[2]s): choose a name that no device has", name, link.Type())
	}
	return link, h.setBridge(ctx, link, six)
}

// setBridge gives the bridge its settings and the next hops' addresses, and puts back those that are missing.
func (h *Host) setBridge(ctx context.Context, link netlink.Link, six bool) error {
	name := link.Attrs().Name
	if err := h.do(func() error { return sys.SetSysctls(settingsOfBridge(name, six)...) }); err != nil {
		return fmt.Errorf("the bridge %s: %w", name, err)
	}
	if err := h.nl.LinkSetUp(link); err != nil {
		return fmt.Errorf("set the bridge %s up: %w", name, err)
	}
	return h.gatewayAddresses(ctx, link, six)
}

// behindBridge makes the pod's link a port of its bridge, and leads the host's packets to the pod there.
func (h *Host) behindBridge(ctx context.Context, a *Attachment) error {
	bridge, err := h.ensureBridge(ctx, a.Bridge, hasSix(a))
	if err != nil {
		return err
	}
	port, err := h.nl.LinkByName(a.HostInterface)
	if err != nil {
		return fmt.Errorf("find %s: %w", a.HostInterface, err)
	}
	if err := h.do(func() error { return sys.SetSysctls(settingsOf(a)...) }); err != nil {
		return err
	}
	if err := h.plug(port, bridge, a.MAC); err != nil {
		return err
	}
	return h.hostRoutes(bridge, a)
}

// behind finds the link by which the host reaches a pod: the pod's own, or the bridge if the pod's is a port of it.
func (h *Host) behind(port netlink.Link, a *Attachment) (netlink.Link, error) {
	if a.Bridge == "" {
		return port, nil
	}
	bridge, err := h.nl.LinkByName(a.Bridge)
	if err == nil && port.Attrs().MasterIndex != bridge.Attrs().Index {
		err = fmt.Errorf("podnet: %s is no port of the bridge %s", a.HostInterface, a.Bridge)
	}
	return bridge, err
}

// plug makes the pod's link a port of its bridge. The bridge knows the pod's MAC, and sends the port no other pod's packets.
func (h *Host) plug(port, bridge netlink.Link, mac net.HardwareAddr) error {
	fdb := &netlink.Neigh{
		LinkIndex: port.Attrs().Index, Family: unix.AF_BRIDGE, State: unix.NUD_NOARP, Flags: unix.NTF_MASTER, HardwareAddr: mac,
	}
	// Hairpin: where bridges call iptables (br_netfilter), a port that portmap publishes leads from a pod straight back to itself.
	for _, err := range []error{
		h.nl.LinkSetMaster(port, bridge), h.nl.LinkSetLearning(port, false), h.nl.LinkSetFlood(port, false),
		h.nl.LinkSetHairpin(port, true), h.nl.NeighSet(fdb),
	} {
		if err != nil {
			return fmt.Errorf("make %s a port of the bridge %s: %w", port.Attrs().Name, bridge.Attrs().Name, err)
		}
	}
	return nil
}

// sweepBridges takes the routes and neighbours of pods that are gone from our bridges: unlike those of a pod with a link of its own, they
// stay when the pod's link goes.
func (h *Host) sweepBridges() error {
	links, err := h.nl.LinkList()
	if err != nil {
		return fmt.Errorf("podnet: list devices: %w", err)
	}
	for _, l := range links {
		if ours(l) {
			if err := h.sweepBridge(l); err != nil {
				return fmt.Errorf("podnet: the bridge %s: %w", l.Attrs().Name, err)
			}
		}
	}
	return nil
}

func (h *Host) sweepBridge(bridge netlink.Link) error {
	// First the routes, then the pods: a pod is there before its routes.
	routes, err := h.nl.RouteList(bridge, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	pods, err := h.attachments()
	if err != nil {
		return err
	}
	live := map[netip.Addr]bool{}
	for _, p := range pods {
		for _, a := range p.Addresses {
			live[a] = live[a] || p.Bridge == bridge.Attrs().Name
		}
	}
	for i := range routes {
		r := &routes[i]
		if r.Dst == nil || r.Protocol != unix.RTPROT_STATIC {
			continue
		}
		a, _ := netip.AddrFromSlice(r.Dst.IP)
		if a = a.Unmap(); live[a] || r.Dst.String() != sys.HostPrefix(a).String() {
			continue
		}
		if err := h.nl.RouteDel(r); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("remove the route to %v: %w", a, err)
		}
		if err := h.nl.NeighDel(sys.PermanentNeighbour(bridge, a, nil)); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove the neighbour %v: %w", a, err)
		}
	}
	return nil
}

// RemoveBridges removes the bridges that Add has made and that have no port.
func (h *Host) RemoveBridges() error {
	links, err := h.nl.LinkList()
	if err != nil {
		return fmt.Errorf("podnet: list devices: %w", err)
	}
	var errs []error
	for _, l := range links {
		inUse := slices.ContainsFunc(links, func(p netlink.Link) bool { return p.Attrs().MasterIndex == l.Attrs().Index })
		if ours(l) && !inUse {
			if err := h.nl.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
				errs = append(errs, fmt.Errorf("podnet: remove the bridge %s: %w", l.Attrs().Name, err))
			}
		}
	}
	return errors.Join(errs...)
}
