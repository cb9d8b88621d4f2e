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
	routes, err := wayOut(c.addr.Is4())
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
	case !lo && (slices.Contains(byGateway, c.index) || len(byGateway) == 0 || d.leads(c)):
		out = holder
	default:
		out = byGateway
	}
	out = slices.DeleteFunc(slices.Clone(out), d.loopback)
	slices.Sort(out)
	return slices.Compact(out)
}

// leads reports whether a route that names no gateway leaves by the device of an address: a VPN's routes do, as wg-quick makes them, also in a table of
// their own, as Tailscale does. The kernel's own routes come with addresses, and ours are to pods. A dummy leads nowhere.
func (d *detector) leads(c candidate) bool {
	routes, err := unicast(here, c.addr.Is4(), unix.RT_TABLE_UNSPEC)
	return err == nil && d.kinds[c.index] != "dummy" && slices.ContainsFunc(routes, func(rt netlink.Route) bool {
		return rt.Protocol != unix.RTPROT_KERNEL && slices.Contains(hops(&rt), c.index)
	})
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
func mainUnicast(v4 bool) ([]netlink.Route, error) { return unicast(here, v4, unix.RT_TABLE_MAIN) }

// here opens a socket for each request, in the network namespace of the calling thread.
var here = &netlink.Handle{}

// anywhere are addresses that no host has (RFC 5737, RFC 3849, RFC 9637): what leads there is the default route.
var anywhere = []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("203.0.113.1"),
	netip.MustParseAddr("3fff::1"), netip.MustParseAddr("2001:db8::1")}

// wayOut is mainUnicast and, if the main table has no default route, those of the table to which the host's policy rules lead.
func wayOut(v4 bool) ([]netlink.Route, error) {
	routes, err := mainUnicast(v4)
	if err != nil || slices.ContainsFunc(routes, func(rt netlink.Route) bool { return isDefault(&rt) }) {
		return routes, err
	}
	others, err := defaultByRule(here, v4)
	return append(routes, others...), err
}

// defaultByRule are the default routes of the table to which the host's policy rules lead, for hosts that have none in the main table.
func defaultByRule(rt *netlink.Handle, v4 bool) ([]netlink.Route, error) {
	for _, a := range anywhere {
		if a.Is4() != v4 {
			continue
		}
		way, err := rt.RouteGetWithOptions(a.AsSlice(), &netlink.RouteGetOptions{FIBMatch: true})
		if err != nil || len(way) == 0 || way[0].Type != unix.RTN_UNICAST || !isDefault(&way[0]) {
			continue // none, or a longer one
		}
		routes, err := unicast(rt, v4, way[0].Table)
		return slices.DeleteFunc(routes, func(rt netlink.Route) bool { return !isDefault(&rt) }), err
	}
	return nil, nil
}

// unicast lists those of one table, or of all (RT_TABLE_UNSPEC).
func unicast(rt *netlink.Handle, v4 bool, table int) ([]netlink.Route, error) {
	family := netlink.FAMILY_V6
	if v4 {
		family = netlink.FAMILY_V4
	}
	routes, err := dump("routes", func() ([]netlink.Route, error) {
		return rt.RouteListFiltered(family, &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
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

// Way is the path of packets to an address by the host's routes.
type Way struct {
	Devices []string   // sorted names of the devices by which packets leave; several for an equal-cost route
	MTU     int        // bytes, the smallest MTU of the devices and the route; 0 without a route
	Router  netip.Addr // the next hop; invalid if the address is on a link of this host
}

// Ways looks up and caches the paths to addresses. Create a new one when routes or devices may have changed. It belongs to
// one goroutine.
type Ways struct {
	r     *Reconciler
	from  []netip.Addr
	found map[netip.Addr]Way
	links map[int]*netlink.LinkAttrs // nil entries: gone
}

// NewWays returns Ways for packets from this host's underlay addresses, one per family.
func (r *Reconciler) NewWays(from []netip.Addr) *Ways {
	return &Ways{r: r, from: from, found: map[netip.Addr]Way{}, links: map[int]*netlink.LinkAttrs{}}
}

// To returns the path to an address; the zero Way if there is no route. It ignores path MTUs that the kernel has learned from ICMP.
func (w *Ways) To(a netip.Addr) Way {
	a = a.Unmap().WithZone("")
	way, ok := w.found[a]
	if !ok {
		way = w.ask(a)
		w.found[a] = way
	}
	return way
}

func (w *Ways) ask(to netip.Addr) (way Way) {
	o := &netlink.RouteGetOptions{FIBMatch: true}
	for _, a := range w.from {
		if a.Is4() == to.Is4() {
			o.SrcAddr = a.AsSlice()
		}
	}
	routes, err := w.r.rt.RouteGetWithOptions(to.AsSlice(), o)
	if err == nil && (len(routes) == 0 || len(hops(&routes[0])) == 0) { // next hops that are objects and not written out
		o.FIBMatch = false
		routes, err = w.r.rt.RouteGetWithOptions(to.AsSlice(), o)
	}
	if err != nil {
		return Way{}
	}
	for i := range routes {
		for _, h := range hops(&routes[i]) {
			if l := w.link(h); l != nil {
				way.Devices = append(way.Devices, l.Name)
				way.narrow(l.MTU)
			}
		}
		way.narrow(routes[i].MTU)
		if r := routerOf(&routes[i]); r.IsValid() {
			way.Router = r
		}
	}
	slices.Sort(way.Devices)
	way.Devices = slices.Compact(way.Devices)
	return way
}

func (w *Way) narrow(mtu int) {
	if mtu > 0 && (w.MTU == 0 || mtu < w.MTU) {
		w.MTU = mtu
	}
}

func (w *Ways) link(index int) *netlink.LinkAttrs {
	l, ok := w.links[index]
	if !ok {
		if found, err := w.r.rt.LinkByIndex(index); err == nil {
			l = found.Attrs()
		}
		w.links[index] = l
	}
	return l
}

// Devices are the MTUs of the devices on the ways that were asked for, and of those named: what [State.Uplinks] wants.
func (w *Ways) Devices(names ...string) map[string]int {
	out := map[string]int{}
	for _, l := range w.links {
		if l != nil {
			out[l.Name] = l.MTU
		}
	}
	for _, n := range names {
		if _, ok := out[n]; !ok {
			if l, err := w.r.rt.LinkByName(n); err == nil {
				out[n] = l.Attrs().MTU
				w.links[l.Attrs().Index] = l.Attrs()
			}
		}
	}
	return out
}
