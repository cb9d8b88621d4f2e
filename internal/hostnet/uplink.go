package hostnet

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// carried completes an underlay whose first address is c: the devices by which its packets leave, and their MTU. An
// address with a subnet of its own leaves by the device that has it. One of full length belongs to no link, above all
// one on lo, as with BGP on the host: there the routes tell.
func (d *detector) carried(u Underlay, c candidate) (Underlay, error) {
	routes, err := mainUnicast(c.addr.Is4())
	if err != nil {
		return u, err
	}
	indexes := d.uplinks(c, routes)
	if len(indexes) == 0 {
		return u, notYet{fmt.Errorf("underlay address %v is on %s, and no route of this host leads out from there: add one, or %s", c.addr, d.name(c.index), pick)}
	}
	for _, i := range indexes {
		l := d.links[i]
		if l == nil {
			continue
		}
		u.Uplinks = append(u.Uplinks, l.Name)
		if u.MTU == 0 || l.MTU < u.MTU {
			u.MTU, u.Narrowest = l.MTU, l.Name
		}
	}
	for i := range routes {
		rt := &routes[i]
		if isDefault(rt) && rt.MTU > 0 && rt.MTU < u.MTU && slices.ContainsFunc(hops(rt), func(h int) bool { return slices.Contains(indexes, h) }) {
			u.MTU, u.Narrowest = rt.MTU, "route "+routeText(rt, d.name)
		}
	}
	return u, nil
}

// uplinks are the devices by which packets from c leave, in order of their indexes.
func (d *detector) uplinks(c candidate, routes []netlink.Route) []int {
	var bySource, byGateway []int
	for i := range routes {
		rt := &routes[i]
		switch {
		case addrOf(rt.Src) == c.addr:
			bySource = append(bySource, hops(rt)...)
		case isDefault(rt) || rt.Gw != nil || rt.Via != nil || len(rt.MultiPath) > 0:
			byGateway = append(byGateway, hops(rt)...)
		}
	}
	holder := []int{c.index}
	lo := d.loopback(c.index)
	var out []int
	switch {
	case !lo && !d.whole(c):
		out = append(holder, bySource...)
	case len(bySource) > 0:
		out = bySource
	case !lo && (slices.Contains(byGateway, c.index) || len(byGateway) == 0):
		out = holder
	default:
		out = byGateway
	}
	out = slices.DeleteFunc(slices.Clone(out), d.loopback)
	slices.Sort(out)
	return slices.Compact(out)
}

func (d *detector) loopback(index int) bool {
	l := d.links[index]
	return l == nil || l.Flags&net.FlagLoopback != 0
}

// whole reports whether the address has its full length on its device: a /32 or /128.
func (d *detector) whole(c candidate) bool {
	return !slices.ContainsFunc(d.all, func(h netlink.Addr) bool {
		return h.LinkIndex == c.index && addrOf(h.IP) == c.addr && !fullLength(h)
	})
}

func fullLength(a netlink.Addr) bool {
	ones, bits := a.Mask.Size()
	return ones == bits
}

// mainUnicast lists the unicast routes of one family's main table that are not ours.
func mainUnicast(v4 bool) ([]netlink.Route, error) {
	family := netlink.FAMILY_V6
	if v4 {
		family = netlink.FAMILY_V4
	}
	routes, err := dump("routes", func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	})
	return slices.DeleteFunc(routes, func(rt netlink.Route) bool { return rt.Type != unix.RTN_UNICAST || rt.Protocol == Protocol }), err
}

func isDefault(rt *netlink.Route) bool { p := prefixOf(rt.Dst); return !p.IsValid() || p.Bits() == 0 }

// hops are the devices of a route: several for an equal-cost one.
func hops(rt *netlink.Route) []int {
	var out []int
	if rt.LinkIndex != 0 {
		out = append(out, rt.LinkIndex)
	}
	for _, nh := range rt.MultiPath {
		out = append(out, nh.LinkIndex)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// Way is how the host's routes take packets to an address.
type Way struct {
	Devices []string // names of the devices by which they leave, sorted: several for an equal-cost route
	MTU     int      // bytes, the least of the devices' and of the route's own; 0 where no route leads there
}

// Way asks the kernel for the route of packets between two addresses. What ICMP has told the kernel of the path is not in it.
func (r *Reconciler) Way(from, to netip.Addr) (Way, error) {
	var w Way
	src := from.AsSlice()
	routes, err := r.rt.RouteGetWithOptions(to.AsSlice(), &netlink.RouteGetOptions{SrcAddr: src, FIBMatch: true})
	if err == nil && (len(routes) == 0 || len(hops(&routes[0])) == 0) { // next hops that are objects, and not expanded
		routes, err = r.rt.RouteGetWithOptions(to.AsSlice(), &netlink.RouteGetOptions{SrcAddr: src})
	}
	if err != nil {
		return w, fmt.Errorf("hostnet: no route from %v to %v: %w", from, to, err)
	}
	for i := range routes {
		for _, h := range hops(&routes[i]) {
			l, err := r.rt.LinkByIndex(h)
			if err != nil {
				return w, fmt.Errorf("hostnet: device of the route to %v: %w", to, err)
			}
			w.Devices = append(w.Devices, l.Attrs().Name)
			if m := l.Attrs().MTU; w.MTU == 0 || m < w.MTU {
				w.MTU = m
			}
		}
		if m := routes[i].MTU; m > 0 && m < w.MTU {
			w.MTU = m
		}
	}
	slices.Sort(w.Devices)
	w.Devices = slices.Compact(w.Devices)
	return w, nil
}
