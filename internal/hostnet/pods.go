package hostnet

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// RouteMTUs returns the MTUs, in bytes, of the routes with our mark that lead into the TUN device, in the calling thread's
// network namespace: what an earlier run knew of the paths to other nodes. Without the device there are none.
func RouteMTUs(tun string) (map[netip.Prefix]int, error) {
	index, err := linkIndex(tun)
	if index == 0 || err != nil {
		return nil, err
	}
	routes, err := dump("routes", func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, err
	}
	out := map[netip.Prefix]int{}
	for i := range routes {
		if rt := &routes[i]; ours(rt, index) && rt.Gw == nil && rt.MTU != 0 {
			out[prefixOf(rt.Dst)] = rt.MTU
		}
	}
	return out, nil
}

// linkIndex is the index of the device in the calling thread's network namespace, 0 if there is none.
func linkIndex(name string) (int, error) {
	link, err := netlink.LinkByName(name)
	if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("hostnet: device %s: %w", name, err)
	}
	return link.Attrs().Index, nil
}

// PodRoute is one address of this node's own space that is in use: by a pod, or by the host itself on a bridge of pods.
type PodRoute struct {
	Addr   netip.Addr
	Device string // the host's end, or the bridge
}

// PodRoutes lists the addresses inside own that are in use, in the calling thread's network namespace: those with a host
// route (/32, /128) in the main table over a device other than the agent's own, and those that such a device has itself. A route by
// a router outside own leads to another host: a routing daemon has learned it from there.
func PodRoutes(tun string, own []netip.Prefix) ([]PodRoute, error) {
	links, err := dump("devices", netlink.LinkList)
	if err != nil {
		return nil, err
	}
	names := make(map[int]string, len(links))
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	routes, err := dump("routes", func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, err
	}
	addrs, err := dump("addresses", func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, err
	}
	var out []PodRoute
	seen := map[netip.Addr]bool{}
	inside := func(a netip.Addr) bool {
		return slices.ContainsFunc(own, func(o netip.Prefix) bool { return o.Contains(a) })
	}
	add := func(a netip.Addr, device string) {
		if device != tun && device != DirectDevice && !seen[a] && inside(a) {
			seen[a] = true
			out = append(out, PodRoute{a, device})
		}
	}
	for i := range addrs {
		add(addrOf(addrs[i].IP), names[addrs[i].LinkIndex])
	}
	for i := range routes {
		rt := &routes[i]
		away := rt.Gw != nil && !inside(addrOf(rt.Gw)) || rt.Via != nil || len(rt.MultiPath) > 0
		if p := prefixOf(rt.Dst); rt.Type == unix.RTN_UNICAST && p.IsValid() && p.IsSingleIP() && !away {
			add(p.Addr(), names[rt.LinkIndex])
		}
	}
	return out, nil
}
