package hostnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// DirectTable is the number of the routing table for probes of direct paths, and of its policy rule's priority as that of HostsTable ("iif
// DEVICE lookup 8485"): a route to each peer's probe address by the next hop that is to be proven, and unreachable for the
// rest. So what comes from that device never takes the tunnel, nor a router.
const DirectTable = 8485

// DirectDevice is the name of the device for these probes.
const DirectDevice = "tulle-direct"

// NextHop is a way to a peer's probe address that is to be proven.
type NextHop struct {
	Probe  netip.Addr
	Via    netip.Addr // the peer's underlay address, of Probe's family
	Device string     // on whose link Via is
}

// probeAddr4 is the address of the device for probes. It is not used: the kernel accepts no packets from a device without
// an IPv4 address where a reverse path filter is on, loose or not (fib_frontend.c, __fib_validate_source).
var probeAddr4 = netip.MustParsePrefix("169.254.84.85/32")

// probeUp brings the device for probes up, should somebody have set it down, and gives it its address.
func (p *pass) probeUp() error {
	if p.probe == 0 {
		return nil
	}
	link, err := p.r.rt.LinkByIndex(p.probe)
	if err == nil && link.Attrs().Flags&net.FlagUp == 0 {
		err = p.r.rt.LinkSetUp(link)
	}
	if err == nil && p.s.uses(true) {
		err = p.r.rt.AddrReplace(link, &netlink.Addr{IPNet: &net.IPNet{IP: probeAddr4.Addr().AsSlice(), Mask: net.CIDRMask(32, 32)}, Scope: unix.RT_SCOPE_LINK})
	}
	if err != nil {
		return fmt.Errorf("hostnet: set %s up: %w", p.s.Direct, err)
	}
	return nil
}

// reconcileNextHops brings table and rule to the state.
func (p *pass) reconcileNextHops() error {
	var errs []error
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		errs = append(errs, p.nextHops(family))
	}
	return errors.Join(errs...)
}

func (p *pass) nextHops(family int) error {
	v4 := family == netlink.FAMILY_V4
	want := p.wantedHops(v4)
	err := p.directRule(family, len(want) > 0)
	list, listErr := p.r.directRoutes(family)
	if err = errors.Join(err, listErr); err != nil {
		return err
	}
	for i := range list {
		rt := &list[i]
		dst := prefixOf(rt.Dst)
		if !dst.IsValid() {
			dst = netip.PrefixFrom(unspecified(v4), 0)
		}
		if w, ok := want[dst]; ok && w == specOf(rt) {
			delete(want, dst)
		} else if !ok || w.unreachable != specOf(rt).unreachable {
			err = errors.Join(err, p.r.delRoute(rt))
		}
	}
	for dst, spec := range want {
		rt := routeKey{dst, metricOf(v4, false)}.route(spec)
		rt.Table, rt.Priority = DirectTable, int(metricOf(v4, false))
		// An address that cannot be reached at the moment is not proven, and no error.
		if e := p.r.rt.RouteReplace(rt); e != nil && spec.unreachable {
			err = errors.Join(err, fmt.Errorf("hostnet: route unreachable %v table %d: %w", dst, DirectTable, e))
		}
	}
	return err
}

// wantedHops are a family's routes in the table.
func (p *pass) wantedHops(v4 bool) map[netip.Prefix]routeSpec {
	want := map[netip.Prefix]routeSpec{}
	if p.probe == 0 || !p.s.uses(v4) {
		return want
	}
	want[netip.PrefixFrom(unspecified(v4), 0)] = routeSpec{unreachable: true}
	for _, h := range p.s.NextHops {
		if l := p.device(h.Device); l != 0 && h.Probe.Is4() == v4 && h.Via.Is4() == v4 {
			want[netip.PrefixFrom(h.Probe, h.Probe.BitLen())] = routeSpec{link: l, via: h.Via}
		}
	}
	return want
}

func unspecified(v4 bool) netip.Addr {
	if v4 {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// directRule makes the policy rule, or removes it. The rule names the device, which may come later.
func (p *pass) directRule(family int, on bool) error {
	list, err := p.r.tableRules(family, DirectTable)
	if err != nil {
		return err
	}
	rank := p.ranks[family].direct
	text := fmt.Sprintf("rule iif %s lookup %d priority %d", DirectDevice, DirectTable, rank)
	object := fmt.Sprintf("direct rule %d", family)
	i := slices.IndexFunc(list, func(o netlink.Rule) bool { return o.IifName == p.s.Direct && o.Priority == rank })
	switch {
	case on && i >= 0:
		list = slices.Delete(list, i, i+1)
		p.keep(object, text)
	case on:
		rule := netlink.NewRule()
		rule.Family, rule.Priority, rule.Table, rule.Protocol, rule.IifName = family, rank, DirectTable, uint8(Protocol), p.s.Direct
		if err := p.r.rt.RuleAdd(rule); err != nil {
			return fmt.Errorf("hostnet: %s: %w", text, err)
		}
		p.put(object, "", text)
	}
	for i := range list {
		err = errors.Join(err, p.r.delRule(&list[i]))
	}
	return err
}

// directRoutes lists our routes in the table.
func (r *Reconciler) directRoutes(family int) ([]netlink.Route, error) {
	return dump("routes", func() ([]netlink.Route, error) {
		return r.rt.RouteListFiltered(family, &netlink.Route{Table: DirectTable, Protocol: Protocol}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
	})
}

// LeftDirect returns the direct routes with our mark that an earlier run left in the calling thread's network namespace.
func LeftDirect() (out []PeerRoute, err error) {
	routes, err := dump("routes", func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, err
	}
	for i := range routes {
		rt := &routes[i]
		if !ours(rt) || rt.Gw == nil || rt.Type != unix.RTN_UNICAST {
			continue
		}
		if l, err := netlink.LinkByIndex(rt.LinkIndex); err == nil {
			out = append(out, PeerRoute{Prefix: prefixOf(rt.Dst), MTU: rt.MTU, Via: addrOf(rt.Gw), Device: l.Attrs().Name})
		}
	}
	return out, nil
}

// OnLink returns the device on whose link an address is by the host's routes: the only one, without a router. Otherwise
// device is empty, and why says what the routes say.
func (w *Ways) OnLink(a netip.Addr) (device, why string) {
	way := w.To(a)
	switch {
	case len(way.Devices) == 0:
		return "", "no route to it"
	case way.Router.IsValid():
		return "", fmt.Sprintf("other subnet, behind router %v", way.Router)
	case len(way.Devices) > 1:
		return "", fmt.Sprintf("packets to it leave by several devices, %v", way.Devices)
	}
	if l := w.named(way.Devices[0]); l != nil && l.Flags&(net.FlagLoopback|net.FlagPointToPoint) != 0 {
		return "", "other subnet, behind the point-to-point device " + way.Devices[0]
	}
	return way.Devices[0], ""
}

func (w *Ways) named(name string) *netlink.LinkAttrs {
	for _, l := range w.links {
		if l != nil && l.Name == name {
			return l
		}
	}
	return nil
}

// routerOf is the gateway of a route, of any hop of an equal-cost one; the zero Addr on a link.
func routerOf(rt *netlink.Route) netip.Addr {
	if via, ok := rt.Via.(*netlink.Via); ok {
		return addrOf(via.Addr)
	}
	if i := slices.IndexFunc(rt.MultiPath, func(h *netlink.NexthopInfo) bool { return h.Gw != nil }); i >= 0 {
		return addrOf(rt.MultiPath[i].Gw)
	}
	return addrOf(rt.Gw)
}
