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

// CheckOverlap returns an error of one line if there are [OverlapProblems]: the first of them. For a member, whose pods run already, only what
// another agent has left is an error: two TUN devices.
func CheckOverlap(tun string, clusterCIDRs, own []netip.Prefix, member bool) error {
	list, err := overlaps(tun, clusterCIDRs, own)
	if err != nil {
		return err
	}
	for _, o := range list {
		if o.agent || !member {
			return fmt.Errorf("%s: %s", o.What, o.Remedy)
		}
	}
	return nil
}

// overlap is something of the host that a cluster CIDR overlaps.
type overlap struct {
	Problem
	agent bool // a route of another agent
}

// OverlapProblems are the addresses and routes of the host that a cluster CIDR overlaps, in the
// calling thread's network namespace. It ignores what carries our mark, the
// device tun, and everything inside own: the prefixes that this node has from an earlier run or
// from its configuration, where the routes and bridges of its pods are. Until the host reboots,
// our unreachable routes also show these prefixes, so own may be empty.
//
// A route over a gateway to a larger network, such as a default route or a site's 10.0.0.0/8, is
// no overlap, because the cluster's prefix is longer. Nor is one into the device of a VPN, which needs no gateway. A larger network that is
// directly connected is an overlap, because its hosts would become unreachable.
func OverlapProblems(tun string, clusterCIDRs, own []netip.Prefix) (out []Problem, err error) {
	list, err := overlaps(tun, clusterCIDRs, own)
	for _, o := range list {
		out = append(out, o.Problem)
	}
	return out, err
}

func overlaps(tun string, clusterCIDRs, own []netip.Prefix) ([]overlap, error) {
	d, err := newDetector()
	if err != nil {
		return nil, err
	}
	tunIndex := 0
	for index, l := range d.links {
		if l.Name == tun {
			tunIndex = index
		}
	}
	var routes []netlink.Route
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := dump("routes", func() ([]netlink.Route, error) {
			return netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return nil, err
		}
		routes = append(routes, list...)
	}
	own = slices.Clone(own)
	for i := range routes {
		if rt := &routes[i]; ours(rt, tunIndex) && rt.Type == unix.RTN_UNREACHABLE {
			own = append(own, prefixOf(rt.Dst))
		}
	}
	inOwn := func(p netip.Prefix) bool { return covered(own, p) }
	var out []overlap
	// No command takes the address or the network from a device by which the host may be reached.
	uplink := map[int]bool{}
	for i := range routes {
		if p := prefixOf(routes[i].Dst); !p.IsValid() || p.Bits() == 0 {
			uplink[routes[i].LinkIndex] = true
			for _, nh := range routes[i].MultiPath {
				uplink[nh.LinkIndex] = true
			}
		}
	}
	refuse := func(c netip.Prefix, what string, index int, command string) {
		if uplink[index] {
			command = ""
		}
		out = append(out, overlap{Problem: Problem{
			What:    fmt.Sprintf("cluster CIDR %v overlaps this host's %s", c.Masked(), what),
			Remedy:  "choose another --cluster-cidr, or remove it",
			Command: command,
		}})
	}
	inAddr := map[netip.Prefix]bool{} // the kernel's routes of addresses that are reported
	for _, c := range clusterCIDRs {
		for i := range d.all {
			a := &d.all[i]
			ip := addrOf(a.IP)
			if a.LinkIndex == tunIndex || !c.Contains(ip) || inOwn(netip.PrefixFrom(ip, ip.BitLen())) {
				continue
			}
			refuse(c, fmt.Sprintf("address %s on %s", addrText(a), d.name(a.LinkIndex)), a.LinkIndex, fmt.Sprintf("ip address del %s dev %s", addrText(a), d.name(a.LinkIndex)))
			ones, _ := a.Mask.Size()
			inAddr[netip.PrefixFrom(ip, ones).Masked()] = true
		}
	}
	for i := range routes {
		rt := &routes[i]
		p := prefixOf(rt.Dst)
		if !p.IsValid() || p.Bits() == 0 || ours(rt, tunIndex) || tunIndex != 0 && rt.LinkIndex == tunIndex || inOwn(p) {
			continue
		}
		if rt.Protocol == unix.RTPROT_KERNEL && inAddr[p] {
			continue
		}
		connected := rt.Gw == nil && rt.Via == nil && len(rt.MultiPath) == 0 && rt.Type == unix.RTN_UNICAST && !d.behind(rt)
		for _, c := range clusterCIDRs {
			switch {
			case rt.Protocol == Protocol && c.Overlaps(p):
				out = append(out, overlap{agent: true, Problem: Problem{
					What:   fmt.Sprintf("cluster CIDR %v overlaps this host's route %s, which an agent with --tun %s has made", c.Masked(), routeText(rt, d.name), d.name(rt.LinkIndex)),
					Remedy: fmt.Sprintf("stop that agent and run `tulle cleanup --tun %s`, or choose another --cluster-cidr", d.name(rt.LinkIndex)),
				}})
			case contains(c.Masked(), p) || connected && contains(p, c):
				command := ""
				if contains(c.Masked(), p) { // and not a network around it, where other hosts are
					command = routeDel(rt, d.name)
				}
				refuse(c, "route "+routeText(rt, d.name), rt.LinkIndex, command)
			}
		}
	}
	return out, nil
}

// behind reports whether a route leads to networks behind the other end of a point-to-point device, and is none of an address of the device.
func (d *detector) behind(rt *netlink.Route) bool {
	l := d.links[rt.LinkIndex]
	return rt.Protocol != unix.RTPROT_KERNEL && l != nil && l.Flags&net.FlagPointToPoint != 0
}

// covered reports whether prefixes contain all of p, one of them or several together.
func covered(prefixes []netip.Prefix, p netip.Prefix) bool {
	part := false
	for _, o := range prefixes {
		if contains(o.Masked(), p) {
			return true
		}
		part = part || contains(p, o)
	}
	if !part || p.IsSingleIP() {
		return false
	}
	low, high := halves(p)
	return covered(prefixes, low) && covered(prefixes, high)
}

// halves returns the two halves of p, which must have more than one address.
func halves(p netip.Prefix) (low, high netip.Prefix) {
	low = netip.PrefixFrom(p.Masked().Addr(), p.Bits()+1)
	b := low.Addr().AsSlice()
	b[p.Bits()/8] |= 0x80 >> (p.Bits() % 8)
	a, _ := netip.AddrFromSlice(b)
	return low, netip.PrefixFrom(a, low.Bits())
}

// CheckPods reports addresses in the pods' space, of other nodes (such as those of their TUN devices) and of this one (that no device of this host
// has), to which packets of this host leave by a routing table that is neither the main one nor ours, in the calling thread's network namespace: a policy
// rule of a VPN or of several uplinks comes first. Or that rule refuses them, or its table does. It asks for packets without a source, and for those from each address of from: to pods, the
// host answers from the address that they have called, and rules for several uplinks go by that. Rules for pods' packets to the outside go by
// pods' addresses.
func CheckPods(tun string, from, others, own []netip.Addr) ([]Problem, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("hostnet: open a route netlink socket: %w", err)
	}
	defer h.Close()
	rules, err := dump("rules", func() ([]netlink.Rule, error) { return h.RuleList(netlink.FAMILY_ALL) })
	if err != nil {
		return nil, err
	}
	return podsElsewhere(h, rules, tun, from, others, own), nil
}

// elsewhere reports whether a rule refuses some packets, or leads to a table in which CheckPods sees a problem. Without one there is nothing to ask for,
// and with a thousand nodes that is some thousand questions.
func elsewhere(rules []netlink.Rule) bool {
	return slices.ContainsFunc(rules, func(r netlink.Rule) bool {
		return refuses(&r) || foreignRule(r.Table) && r.Table != unix.RT_TABLE_MAIN && r.Table != unix.RT_TABLE_DEFAULT
	})
}

// refuses reports whether a rule leads to no table, and is about some packets only: that of VRFs (l3mdev), which leads to none either, is about all.
func refuses(r *netlink.Rule) bool {
	return r.Table == unix.RT_TABLE_UNSPEC && r.Goto < 0 && (r.Src != nil || r.Dst != nil || r.Mark != 0 || r.Mask != nil || r.Invert || r.IifName != "")
}

func podsElsewhere(h router, rules []netlink.Rule, tun string, from, others, own []netip.Addr) (out []Problem) {
	if !elsewhere(rules) {
		return nil
	}
	said := map[int]bool{} // tables, of which one address is enough
	refusals := refusals{}
	ask := func(src, a netip.Addr, whose string) {
		o, packets := &netlink.RouteGetOptions{}, "packets"
		if src.IsValid() {
			if src.Is4() != a.Is4() {
				return
			}
			o.SrcAddr, packets = src.AsSlice(), fmt.Sprintf("packets from %v", src)
		}
		routes, err := h.RouteGetWithOptions(a.AsSlice(), o)
		if err != nil && refusals.in(h, src, a, err) {
			out = append(out, Problem{
				What:   fmt.Sprintf("%s to %v, of %s pods, are refused: a policy rule in front of the main table does so, or the table to which it leads", packets, a, whose),
				Remedy: ruleForPods,
			})
		}
		if err != nil || len(routes) == 0 || said[routes[0].Table] {
			return
		}
		switch r := routes[0]; r.Table {
		case unix.RT_TABLE_MAIN, unix.RT_TABLE_LOCAL, unix.RT_TABLE_DEFAULT, HostsTable, DirectTable:
		default:
			name := fmt.Sprintf("if%d", r.LinkIndex)
			if l, err := h.LinkByIndex(r.LinkIndex); err == nil {
				name = l.Attrs().Name
			}
			if name == tun {
				return
			}
			said[r.Table] = true
			out = append(out, Problem{
				What:   fmt.Sprintf("%s to %v, of %s pods, leave by %s: a policy rule in front of the main table sends them to table %d", packets, a, whose, name, r.Table),
				Remedy: ruleForPods,
			})
		}
	}
	for _, src := range append([]netip.Addr{{}}, from...) {
		for _, a := range others {
			ask(src, a, "another node's")
		}
		for _, a := range own {
			ask(src, a, "this node's")
		}
	}
	return out
}

const ruleForPods = "give the pods' space a rule before that one (`ip rule` lists them), such as `ip rule add to CLUSTER_CIDR lookup main priority 100`, and make it permanent where that rule is made"

// refusals are the families (v4) of which a refusal was told: one address is enough.
type refusals map[bool]bool

// in reports whether an address, though the kernel refuses packets to it, has a way by the main table, and no other of its family was told. What the
// main table refuses has a reason of its own. A source that this host does not have is refused likewise.
func (r refusals) in(h router, src, a netip.Addr, err error) bool {
	refused := slices.ContainsFunc([]unix.Errno{unix.EACCES, unix.EINVAL, unix.ENETUNREACH, unix.EHOSTUNREACH}, func(e unix.Errno) bool { return errors.Is(err, e) })
	if !refused || r[a.Is4()] {
		return false
	}
	if src.IsValid() {
		routes, err := h.RouteGetWithOptions(src.AsSlice(), nil)
		if err != nil || len(routes) == 0 || routes[0].Table != unix.RT_TABLE_LOCAL {
			return false
		}
	}
	family := netlink.FAMILY_V6
	if a.Is4() {
		family = netlink.FAMILY_V4
	}
	routes, err := dump("routes", func() ([]netlink.Route, error) {
		return h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return false
	}
	var best *netlink.Route
	for i := range routes {
		rt := &routes[i]
		p := prefixOf(rt.Dst)
		if !p.Contains(a) || rt.Tos != 0 {
			continue
		}
		if best == nil || p.Bits() > prefixOf(best.Dst).Bits() || p.Bits() == prefixOf(best.Dst).Bits() && uint32(rt.Priority) < uint32(best.Priority) {
			best = rt
		}
	}
	r[a.Is4()] = best != nil && best.Type == unix.RTN_UNICAST
	return r[a.Is4()]
}

// router answers what way packets take.
type router interface {
	RouteListFiltered(int, *netlink.Route, uint64) ([]netlink.Route, error)
	RouteGetWithOptions(net.IP, *netlink.RouteGetOptions) ([]netlink.Route, error)
	LinkByIndex(int) (netlink.Link, error)
}

// CheckMembers reports underlay addresses of members that this host routes into the TUN device,
// in the calling thread's network namespace: the tunnel's own packets would loop through the
// tunnel. It does not report unreachable addresses.
func CheckMembers(tun string, members []netip.Addr) ([]Problem, error) {
	link, err := netlink.LinkByName(tun)
	if err != nil {
		return nil, fmt.Errorf("hostnet: TUN device %s: %w", tun, err)
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("hostnet: open a route netlink socket: %w", err)
	}
	defer h.Close()
	var out []Problem
	for _, a := range members {
		routes, err := h.RouteGet(a.Unmap().WithZone("").AsSlice())
		if err != nil || len(routes) == 0 || routes[0].LinkIndex != link.Attrs().Index {
			continue
		}
		out = append(out, Problem{
			What:   fmt.Sprintf("underlay address %v of a member is routed into %s, the tunnel itself", a, tun),
			Remedy: "remove that route, or give the cluster a --cluster-cidr that holds no host's address",
		})
	}
	return out, nil
}
