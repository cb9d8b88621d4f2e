package hostnet

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// namedSource is an address of the host, not of the device, that routes by a router behind the device name as the source of the host's packets. So it is with BGP to
// the host: its address is on lo, and nobody but the router knows the link's. nf_tables masquerades as the device's address
// whatever the route says (nf_nat_masquerade.c, inet_select_addr), so the rules name this one.
type namedSource struct {
	device string
	addr   netip.Addr
	link   []netip.Prefix // the device's own networks, to which the host's packets have the device's address
}

// namedSources are at most one for each device and family: what the default route names, or else the route to the largest network.
func (p *pass) namedSources() (out []namedSource, err error) {
	if !p.s.Masquerade {
		return nil, nil
	}
	routes := slices.DeleteFunc(slices.Clone(p.before), func(rt netlink.Route) bool {
		return rt.Type != unix.RTN_UNICAST || rt.Protocol == Protocol || rt.Src == nil && !isDefault(&rt) || rt.Gw == nil && rt.Via == nil && len(rt.MultiPath) == 0
	})
	if !slices.ContainsFunc(routes, func(rt netlink.Route) bool { return rt.Src != nil }) {
		return nil, nil
	}
	addrs, err := dump("addresses", func() ([]netlink.Addr, error) { return p.r.rt.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(routes, func(a, b netlink.Route) int {
		return cmp.Or(cmp.Compare(max(0, prefixOf(a.Dst).Bits()), max(0, prefixOf(b.Dst).Bits())), cmp.Compare(uint32(a.Priority), uint32(b.Priority)))
	})
	type exit struct {
		index int
		v4    bool
	}
	seen := map[exit]bool{}
	for i := range routes {
		for _, h := range hops(&routes[i]) {
			e := exit{h, routes[i].Family == netlink.FAMILY_V4}
			if seen[e] || h == p.link {
				continue
			}
			seen[e] = true
			if n, ok := named(addrOf(routes[i].Src), h, addrs); ok {
				if n.device = p.r.linkName(h); n.device != "" {
					out = append(out, n)
				}
			}
		}
	}
	slices.SortFunc(out, func(a, b namedSource) int { return cmp.Or(cmp.Compare(a.device, b.device), a.addr.Compare(b.addr)) })
	return out, nil
}

// named completes the source of packets that leave by a device; ok is false if the device has it itself, or the host has it not.
func named(src netip.Addr, index int, addrs []netlink.Addr) (n namedSource, ok bool) {
	n.addr = src
	for i := range addrs {
		a := addrOf(addrs[i].IP)
		switch {
		case !src.IsValid() || a.Is4() != src.Is4():
		case a == src && addrs[i].LinkIndex == index:
			return n, false
		case a == src:
			ok = true
		case addrs[i].LinkIndex == index && !fullLength(addrs[i]) && !a.IsLinkLocalUnicast():
			ones, _ := addrs[i].Mask.Size()
			n.link = append(n.link, netip.PrefixFrom(a, ones).Masked())
		}
	}
	slices.SortFunc(n.link, netip.Prefix.Compare)
	n.link = slices.Compact(n.link)
	return n, ok
}
