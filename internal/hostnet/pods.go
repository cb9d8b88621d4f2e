package hostnet

import (
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// PodRoute is a route to one address out of this node's own space: somebody has connected a pod.
type PodRoute struct {
	Addr   netip.Addr
	Device string // the host's end
}

// PodRoutes lists the host routes (/32, /128) in the main table that lead to single addresses inside own, over any device
// but the TUN, in the calling thread's network namespace.
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
	var out []PodRoute
	for i := range routes {
		rt := &routes[i]
		p := prefixOf(rt.Dst)
		if rt.Type != unix.RTN_UNICAST || !p.IsValid() || !p.IsSingleIP() || names[rt.LinkIndex] == tun {
			continue
		}
		for _, o := range own {
			if o.Contains(p.Addr()) {
				out = append(out, PodRoute{p.Addr(), names[rt.LinkIndex]})
				break
			}
		}
	}
	return out, nil
}
