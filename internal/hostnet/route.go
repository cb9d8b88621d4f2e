package hostnet

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"
	"sort"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// metricLast is the highest metric there is. Among routes to one prefix the
	// lowest metric wins, so any other route beats it, in both families.
	metricLast uint32 = math.MaxUint32
	// metric6 is what the kernel makes of an IPv6 route without a metric
	// (IP6_RT_PRIO_USER); IPv4 has 0 for that.
	metric6 uint32 = 1024
	// maxRouteMTU is the largest MTU metric that the kernel keeps
	// (net/ipv4/metrics.c, ip_metrics_convert).
	maxRouteMTU = 65535 - 15
)

// routeKey is what makes a route one route to the kernel, in the main table and
// with TOS 0, which is where all of ours are.
type routeKey struct {
	prefix netip.Prefix
	metric uint32
}

// routeSpec is the rest of a route of ours. link is 0 for an unreachable one.
type routeSpec struct {
	unreachable bool
	link        int
	mtu         int
	src         netip.Addr
	via         netip.Addr // invalid: on the link
}

func compareKeys(a, b routeKey) int {
	return cmp.Or(a.prefix.Compare(b.prefix), cmp.Compare(a.metric, b.metric))
}

func metricOf(v4, unreachable bool) uint32 {
	switch {
	case unreachable:
		return metricLast
	case v4:
		return 0
	default:
		return metric6
	}
}

// routes are the routes of the state, and the prefixes that must not be routed
// because a member's underlay address lies inside: the tunnel's own packets would
// enter the tunnel.
func (s *State) routes(link int, index func(device string) int) (map[routeKey]routeSpec, []Problem) {
	out := make(map[routeKey]routeSpec, len(s.Peers)+len(s.ClusterCIDRs)+len(s.Own))
	var problems []Problem
	tunnel := func(what string, p netip.Prefix, mtu int, direct PeerRoute) {
		if a, ok := firstInside(s.Members, p); ok {
			problems = append(problems, inTunnel(what, p, a, s.Tun))
			return
		}
		v4 := p.Addr().Is4()
		if direct.Via.IsValid() {
			if l := index(direct.Device); l != 0 {
				out[routeKey{p, metricOf(v4, false)}] = routeSpec{link: l, mtu: min(mtu, maxRouteMTU), src: s.tunAddr(v4), via: direct.Via}
				return
			}
		}
		if s.MTU != 0 && (mtu == 0 || mtu > s.MTU) {
			mtu = s.MTU
		}
		out[routeKey{p, metricOf(v4, false)}] = routeSpec{link: link, mtu: min(mtu, maxRouteMTU), src: s.tunAddr(v4)}
	}
	for _, c := range s.ClusterCIDRs {
		// Where the whole of it is ours, nothing is left for the tunnel, and our
		// space must answer unreachable.
		if !slices.ContainsFunc(s.Own, func(o netip.Prefix) bool { return contains(o, c) }) {
			tunnel("cluster CIDR", c, 0, PeerRoute{})
		}
	}
	for _, p := range s.Peers {
		tunnel("peer prefix", p.Prefix, p.MTU, p)
		// The kernel sends no ICMPv6 error to the first address of a prefix that is on the link, as it takes it for its routers'
		// anycast address (ip6_route.h, ipv6_anycast_destination). The peer's TUN address is such a one, and its own processes' source.
		if a := p.Prefix.Addr(); a.Is6() && p.Prefix.Bits() < 127 {
			if spec, ok := out[routeKey{p.Prefix, metric6}]; ok && !spec.via.IsValid() {
				out[routeKey{netip.PrefixFrom(a, 128), metric6}] = spec
			}
		}
	}
	if l := index(s.Direct); l != 0 {
		for _, a := range s.ProbeAddrs {
			out[routeKey{netip.PrefixFrom(a, a.BitLen()), metricOf(a.Is4(), false)}] = routeSpec{link: l}
		}
	}
	for _, o := range s.Own {
		out[routeKey{o, metricOf(o.Addr().Is4(), true)}] = routeSpec{unreachable: true}
	}
	return out, problems
}

func inTunnel(what string, p netip.Prefix, a netip.Addr, tun string) Problem {
	return Problem{
		What:   fmt.Sprintf("underlay address %v of a member lies inside the %s %v, which is therefore not routed into %s", a, what, p, tun),
		Remedy: "give the cluster a --cluster-cidr that holds no host's address",
	}
}

// firstInside finds an address inside p; addrs is sorted.
func firstInside(addrs []netip.Addr, p netip.Prefix) (netip.Addr, bool) {
	i := sort.Search(len(addrs), func(i int) bool { return !addrs[i].Less(p.Addr()) })
	if i < len(addrs) && p.Contains(addrs[i]) {
		return addrs[i], true
	}
	return netip.Addr{}, false
}

// contains reports whether all of b is in a.
func contains(a, b netip.Prefix) bool { return a.Bits() <= b.Bits() && a.Contains(b.Addr()) }

// ours reports whether a route of the main table carries our mark: into one of our
// devices, over a gateway with a preferred source (the direct path), or unreachable. From
// an IPv6 route the kernel takes that source when the address goes (net/ipv6/route.c, rt6_remove_prefsrc).
func ours(rt *netlink.Route, links ...int) bool {
	if rt.Protocol != Protocol || rt.Tos != 0 {
		return false
	}
	switch rt.Type {
	case unix.RTN_UNREACHABLE:
		return true
	case unix.RTN_UNICAST:
		return len(rt.MultiPath) == 0 && rt.Via == nil && rt.LinkIndex != 0 &&
			(rt.Gw != nil && (rt.Src != nil || rt.Gw.To4() == nil) || rt.Gw == nil && slices.Contains(links, rt.LinkIndex))
	}
	return false
}

func keyOf(rt *netlink.Route) routeKey {
	return routeKey{prefixOf(rt.Dst), uint32(rt.Priority)}
}

func prefixOf(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(addrOf(n.IP), ones)
}

func specOf(rt *netlink.Route) routeSpec {
	if rt.Type == unix.RTN_UNREACHABLE {
		return routeSpec{unreachable: true} // IPv6 shows lo as its device
	}
	return routeSpec{link: rt.LinkIndex, mtu: rt.MTU, src: addrOf(rt.Src), via: addrOf(rt.Gw)}
}

func (k routeKey) route(spec routeSpec) *netlink.Route {
	ip := k.prefix.Addr()
	rt := &netlink.Route{
		Dst:      &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(k.prefix.Bits(), ip.BitLen())},
		Table:    unix.RT_TABLE_MAIN,
		Protocol: Protocol,
		Priority: int(k.metric),
		Type:     unix.RTN_UNICAST,
	}
	if spec.unreachable {
		rt.Type = unix.RTN_UNREACHABLE
		return rt
	}
	rt.LinkIndex, rt.MTU = spec.link, spec.mtu
	if spec.via.IsValid() {
		rt.Gw = spec.via.AsSlice()
	} else if ip.Is4() {
		rt.Scope = netlink.SCOPE_LINK
	}
	if spec.src.IsValid() {
		rt.Src = spec.src.AsSlice()
	}
	return rt
}

func (k routeKey) text(spec routeSpec, device string) string {
	if spec.unreachable {
		return fmt.Sprintf("route unreachable %v metric %d", k.prefix, k.metric)
	}
	s := fmt.Sprintf("route %v", k.prefix)
	if spec.via.IsValid() {
		s += " via " + spec.via.String()
	}
	s += " dev " + device
	if spec.src.IsValid() {
		s += " src " + spec.src.String()
	}
	if spec.mtu != 0 {
		s += fmt.Sprintf(" mtu %d", spec.mtu)
	}
	return s
}

// mainRoutes lists the main table, both families.
func (r *Reconciler) mainRoutes() ([]netlink.Route, error) {
	var all []netlink.Route
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := dump("routes", func() ([]netlink.Route, error) {
			return r.rt.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return nil, err
		}
		all = append(all, list...)
	}
	return all, nil
}

// maxErrors bounds how many of a pass's errors about routes are told one by one: a
// missing source address would otherwise give thousands of equal lines.
const maxErrors = 5

// reconcileRoutes compares the main table with the wanted routes. New ones are
// added so that they cannot displace another (NLM_F_EXCL), wrong ones of ours
// are replaced in one step (NLM_F_REPLACE), stale ones removed at the end.
func (p *pass) reconcileRoutes(ctx context.Context, link int, want map[routeKey]routeSpec) error {
	all, err := p.r.mainRoutes()
	if err != nil {
		return err
	}
	have := make(map[routeKey]*netlink.Route, len(want))
	foreign := make(map[netip.Prefix][]*netlink.Route)
	var stale []*netlink.Route
	for i := range all {
		rt := &all[i]
		switch k := keyOf(rt); {
		case !ours(rt, link, p.probe):
			foreign[k.prefix] = append(foreign[k.prefix], rt)
		case have[k] != nil && want[k] == specOf(rt):
			stale = append(stale, have[k])
			have[k] = rt
		case have[k] != nil:
			stale = append(stale, rt) // IPv4 can hold two with one key
		default:
			have[k] = rt
		}
	}
	p.foreignInside(foreign, want, link)

	keys := make([]routeKey, 0, len(want))
	for k := range want {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, compareKeys)
	var errs []error
	failed := 0
	fail := func(err error) {
		if failed++; failed <= maxErrors {
			errs = append(errs, err)
		}
	}
	for _, k := range keys {
		if err := ctx.Err(); err != nil {
			return errors.Join(append(errs, err)...)
		}
		if err := p.putRoute(k, want[k], have[k], foreign[k.prefix]); err != nil {
			fail(err)
		}
	}
	for k, rt := range have {
		if _, ok := want[k]; !ok {
			stale = append(stale, rt)
		}
	}
	slices.SortFunc(stale, func(a, b *netlink.Route) int { return compareKeys(keyOf(a), keyOf(b)) })
	for _, rt := range stale {
		if err := p.r.delRoute(rt); err != nil {
			fail(err)
			continue
		}
		p.rep.Removed = append(p.rep.Removed, p.text(keyOf(rt), specOf(rt)))
	}
	if failed > maxErrors {
		errs = append(errs, fmt.Errorf("hostnet: and %d more routes failed", failed-maxErrors))
	}
	return errors.Join(errs...)
}

// putRoute brings one route to what is wanted. have is ours with its key, if any.
func (p *pass) putRoute(k routeKey, want routeSpec, have *netlink.Route, foreign []*netlink.Route) error {
	object := "route " + k.prefix.String()
	if want.unreachable {
		object = "unreachable " + k.prefix.String()
	}
	is := p.text(k, want)
	blocked := false
	for _, f := range foreign {
		if f.Tos != 0 {
			continue
		}
		m := uint32(f.Priority)
		if m == k.metric {
			blocked = true
		}
		if !want.unreachable && m <= k.metric {
			p.conflict(fmt.Sprintf("route %s stands where %s belongs", p.r.routeText(f), is), f)
		}
	}
	if have != nil && specOf(have) == want {
		p.keep(object, is)
		return nil
	}
	if blocked {
		return nil
	}
	was := ""
	var err error
	if have == nil {
		err = p.r.rt.RouteAdd(k.route(want))
		if errors.Is(err, unix.EEXIST) { // between our dump and now
			p.conflict(fmt.Sprintf("another route to %v metric %d stands where %s belongs", k.prefix, k.metric, is), nil)
			return nil
		}
	} else {
		was = p.text(k, specOf(have))
		err = p.r.rt.RouteReplace(k.route(want))
	}
	if err != nil && want.via.IsValid() { // the link is down, say; its probes will tell
		p.notDirect(k, have)
		return nil
	}
	if err != nil {
		return fmt.Errorf("hostnet: %s: %w", is, err)
	}
	p.put(object, was, is)
	return nil
}

// notDirect routes into the tunnel what cannot be routed directly.
func (p *pass) notDirect(k routeKey, have *netlink.Route) {
	tunnel := routeSpec{link: p.link, src: p.s.tunAddr(k.prefix.Addr().Is4()), mtu: min(p.s.MTU, maxRouteMTU)}
	if have != nil && have.LinkIndex == p.link || p.r.rt.RouteReplace(k.route(tunnel)) == nil {
		p.keep("route "+k.prefix.String(), p.text(k, tunnel))
	}
}

// text is a route as messages have it.
func (p *pass) text(k routeKey, spec routeSpec) string {
	switch spec.link {
	case 0, p.link:
		return k.text(spec, p.s.Tun)
	case p.probe:
		return k.text(spec, p.s.Direct)
	}
	return k.text(spec, p.r.deviceName(spec.link))
}

// deviceName is the name of a device, or its number if it is gone.
func (r *Reconciler) deviceName(index int) string {
	if l, err := r.rt.LinkByIndex(index); err == nil {
		return l.Attrs().Name
	}
	return fmt.Sprintf("if%d", index)
}

// deviceIndex is the number of a device; 0 if there is none of that name.
func (r *Reconciler) deviceIndex(name string) int {
	if name == "" {
		return 0
	}
	if l, err := r.rt.LinkByName(name); err == nil {
		return l.Attrs().Index
	}
	return 0
}

// daemons are the protocols of routes that routing daemons make (include/uapi/linux/rtnetlink.h).
var daemons = []int{unix.RTPROT_GATED, unix.RTPROT_ZEBRA, unix.RTPROT_BIRD, unix.RTPROT_XORP, unix.RTPROT_BABEL, unix.RTPROT_OPENR,
	unix.RTPROT_BGP, unix.RTPROT_ISIS, unix.RTPROT_OSPF, unix.RTPROT_RIP, unix.RTPROT_EIGRP}

// conflict reports somebody else's route; rt is nil if it is not known in full.
func (p *pass) conflict(what string, rt *netlink.Route) {
	c := Problem{What: what + "; it is not Tulle's and was left alone", Remedy: "delete it, or choose another --cluster-cidr"}
	switch {
	case rt != nil && slices.Contains(daemons, int(rt.Protocol)):
		c.Remedy = "a routing daemon has made it, and would make it again: keep the pods' space out of what it takes and gives (the filters of its import and export), or choose another --cluster-cidr"
	case rt != nil:
		c.Command = routeDel(rt, p.r.linkName)
	}
	p.rep.Conflicts = append(p.rep.Conflicts, c)
}

// foreignInside reports other people's routes that take a part of the cluster's space
// away from the tunnel. Those inside our own space are the pods', and so are those to strays.
func (p *pass) foreignInside(foreign map[netip.Prefix][]*netlink.Route, want map[routeKey]routeSpec, tun int) {
	var found []*netlink.Route
	for prefix, routes := range foreign {
		inside := func(q netip.Prefix) bool { return contains(q, prefix) }
		strictly := func(q netip.Prefix) bool { return q.Bits() < prefix.Bits() && q.Contains(prefix.Addr()) }
		if !slices.ContainsFunc(p.s.ClusterCIDRs, strictly) || slices.ContainsFunc(p.s.Own, inside) ||
			prefix.IsSingleIP() && slices.Contains(p.s.Strays, prefix.Addr()) {
			continue
		}
		for _, rt := range routes {
			if rt.LinkIndex != tun {
				found = append(found, rt)
			}
		}
	}
	slices.SortFunc(found, func(a, b *netlink.Route) int { return compareKeys(keyOf(a), keyOf(b)) })
	for _, rt := range found {
		// An exact rival of a peer's route is told by putRoute, if it wins.
		prefix := prefixOf(rt.Dst)
		if _, ok := want[routeKey{prefix, metricOf(prefix.Addr().Is4(), false)}]; !ok {
			p.conflict(fmt.Sprintf("route %s lies inside the cluster CIDR", p.r.routeText(rt)), rt)
		}
	}
}

func (r *Reconciler) delRoute(rt *netlink.Route) error {
	if err := r.rt.RouteDel(rt); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("hostnet: delete route %v metric %d: %w", prefixOf(rt.Dst), uint32(rt.Priority), err)
	}
	return nil
}

// removeRoutes deletes all routes of ours; tun is the TUN device's index, 0 when it is gone
// and its routes with it.
func (r *Reconciler) removeRoutes(ctx context.Context, tun int) error {
	all, err := r.mainRoutes()
	if err != nil {
		return err
	}
	var errs []error
	probe := r.deviceIndex(DirectDevice)
	for i := range all {
		if !ours(&all[i], tun, probe) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return errors.Join(append(errs, err)...)
		}
		if err := r.delRoute(&all[i]); err != nil && len(errs) < maxErrors {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (r *Reconciler) routeText(rt *netlink.Route) string { return routeText(rt, r.linkName) }

// linkName is a device's name; empty if it is gone.
func (r *Reconciler) linkName(index int) string {
	if l, err := r.rt.LinkByIndex(index); err == nil {
		return l.Attrs().Name
	}
	return ""
}

// routeDel is the command that deletes a route.
func routeDel(rt *netlink.Route, name func(index int) string) string {
	if prefixOf(rt.Dst).Addr().Is6() {
		return "ip -6 route del " + routeText(rt, name)
	}
	return "ip route del " + routeText(rt, name)
}

// routeText writes a route as `ip route` does.
func routeText(rt *netlink.Route, name func(index int) string) string {
	s := prefixOf(rt.Dst).String()
	if p := prefixOf(rt.Dst); !p.IsValid() || p.Bits() == 0 {
		s = "default"
	}
	if rt.Type != unix.RTN_UNICAST {
		if t, ok := map[int]string{unix.RTN_UNREACHABLE: "unreachable", unix.RTN_BLACKHOLE: "blackhole", unix.RTN_PROHIBIT: "prohibit", unix.RTN_THROW: "throw", unix.RTN_LOCAL: "local", unix.RTN_BROADCAST: "broadcast"}[rt.Type]; ok {
			s = t + " " + s
		}
	}
	hop := func(gw net.IP, index int) string {
		t := ""
		if gw != nil {
			t += " via " + gw.String()
		}
		if index != 0 {
			t += " dev " + cmp.Or(name(index), fmt.Sprintf("if%d", index))
		}
		return t
	}
	s += hop(rt.Gw, rt.LinkIndex)
	if rt.Protocol != 0 {
		s += " proto " + rt.Protocol.String()
	}
	if rt.Priority != 0 {
		s += fmt.Sprintf(" metric %d", uint32(rt.Priority))
	}
	for _, nh := range rt.MultiPath { // they come last, or ip refuses them
		s += " nexthop" + hop(nh.Gw, nh.LinkIndex)
	}
	return s
}
