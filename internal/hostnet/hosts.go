package hostnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// HostsTable is the number of the routing table, and the priority of the policy rules, by which pods' packets to other
// members' underlay addresses take the tunnel: a rule for each own prefix ("from PREFIX lookup 8484"), a route for each
// address. The underlay would carry those packets under pods' addresses, which fabrics and reverse path filters drop. The
// host's own packets, the tunnel's among them, have other sources and never meet the table.
const HostsTable = 8484

// HostRoute is a member's underlay address that pods reach through the tunnel, or directly.
type HostRoute struct {
	Addr   netip.Addr
	MTU    int    // largest packet in bytes; 0 is the device's MTU
	Device string // of the underlay, on whose link the address is, if pods reach it directly; empty: through the tunnel
}

// hostSpec is how an address is reached.
type hostSpec struct{ mtu, link int }

// reconcileHosts brings table and rules to the state. Where nothing is wanted there are neither.
func (p *pass) reconcileHosts() error {
	var errs []error
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		want, from := p.wantedHosts(family == netlink.FAMILY_V4)
		errs = append(errs, p.hostRoutes(family, want), p.hostRules(family, from))
	}
	return errors.Join(errs...)
}

// wantedHosts are a family's addresses that pods reach so, and the prefixes from which they do.
func (p *pass) wantedHosts(v4 bool) (want map[netip.Addr]hostSpec, from []netip.Prefix) {
	for _, o := range p.s.Own {
		if o.Addr().Is4() == v4 {
			from = append(from, o)
		}
	}
	want = map[netip.Addr]hostSpec{}
	for _, h := range p.s.Hosts {
		if h.Addr.Is4() != v4 || len(from) == 0 { // without pods of the family the device may have it switched off
			continue
		}
		m := h.MTU
		if l := p.device(h.Device); l != 0 {
			want[h.Addr] = hostSpec{min(m, maxRouteMTU), l}
			continue
		}
		if p.s.MTU != 0 && (m == 0 || m > p.s.MTU) {
			m = p.s.MTU
		}
		want[h.Addr] = hostSpec{min(m, maxRouteMTU), p.link}
	}
	if len(want) == 0 {
		from = nil
	}
	return want, from
}

// hostRoutes brings the table's routes to want. A route changes in one step.
func (p *pass) hostRoutes(family int, want map[netip.Addr]hostSpec) error {
	list, err := p.r.hostRouteList(family)
	if err != nil {
		return err
	}
	have := map[netip.Addr]*netlink.Route{}
	var errs []error
	for i := range list {
		rt := &list[i]
		dst := prefixOf(rt.Dst)
		if _, ok := want[dst.Addr()]; ok && dst.IsSingleIP() && have[dst.Addr()] == nil {
			have[dst.Addr()] = rt
			continue
		}
		if err := p.r.delRoute(rt); err != nil {
			errs = append(errs, err)
			continue
		}
		p.rep.Removed = append(p.rep.Removed, p.hostText(dst.Addr(), hostSpec{rt.MTU, rt.LinkIndex}))
	}
	for _, h := range p.s.Hosts {
		spec, ok := want[h.Addr]
		if !ok {
			continue
		}
		is, was := p.hostText(h.Addr, spec), ""
		if rt := have[h.Addr]; rt != nil {
			if (hostSpec{rt.MTU, rt.LinkIndex}) == spec {
				p.keep("host "+h.Addr.String(), is)
				continue
			}
			was = p.hostText(h.Addr, hostSpec{rt.MTU, rt.LinkIndex})
		}
		bits := h.Addr.BitLen()
		rt := &netlink.Route{Dst: &net.IPNet{IP: h.Addr.AsSlice(), Mask: net.CIDRMask(bits, bits)}, LinkIndex: spec.link, Table: HostsTable,
			Protocol: Protocol, MTU: spec.mtu, Type: unix.RTN_UNICAST}
		if h.Addr.Is4() {
			rt.Scope = netlink.SCOPE_LINK
		}
		if err := p.r.rt.RouteReplace(rt); err != nil {
			errs = append(errs, fmt.Errorf("hostnet: %s: %w", is, err))
			continue
		}
		p.put("host "+h.Addr.String(), was, is)
	}
	return errors.Join(errs...)
}

// hostRules brings the policy rules to those of the prefixes.
func (p *pass) hostRules(family int, from []netip.Prefix) error {
	list, err := p.r.hostRuleList(family)
	if err != nil {
		return err
	}
	want := map[netip.Prefix]bool{}
	for _, o := range from {
		want[o] = true
	}
	have := map[netip.Prefix]bool{}
	var errs []error
	for i := range list {
		src := prefixOf(list[i].Src)
		if want[src] && !have[src] {
			have[src] = true
			continue
		}
		if err := p.r.rt.RuleDel(&list[i]); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("hostnet: delete %s: %w", hostRuleText(src), err))
			continue
		}
		p.rep.Removed = append(p.rep.Removed, hostRuleText(src))
	}
	for _, o := range from {
		if have[o] {
			p.keep("rule "+o.String(), hostRuleText(o))
			continue
		}
		rule := netlink.NewRule()
		rule.Family, rule.Priority, rule.Table, rule.Protocol = family, HostsTable, HostsTable, uint8(Protocol)
		rule.Src = &net.IPNet{IP: o.Addr().AsSlice(), Mask: net.CIDRMask(o.Bits(), o.Addr().BitLen())}
		if err := p.r.rt.RuleAdd(rule); err != nil {
			errs = append(errs, fmt.Errorf("hostnet: %s: %w", hostRuleText(o), err))
			continue
		}
		p.put("rule "+o.String(), "", hostRuleText(o))
	}
	return errors.Join(errs...)
}

// removeHosts deletes table and rules.
func (r *Reconciler) removeHosts() error {
	var errs []error
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := r.hostRuleList(family)
		errs = append(errs, err)
		for i := range rules {
			if err := r.rt.RuleDel(&rules[i]); err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("hostnet: delete %s: %w", hostRuleText(prefixOf(rules[i].Src)), err))
			}
		}
		routes, err := r.hostRouteList(family)
		errs = append(errs, err)
		for i := range routes {
			errs = append(errs, r.delRoute(&routes[i]))
		}
	}
	return errors.Join(errs...)
}

// LeftHosts returns the addresses that pods reach through the TUN device or directly by what an earlier run left in the calling
// thread's network namespace, with the routes' MTUs. Without the device there are none.
func LeftHosts(tun string) (out []HostRoute, err error) {
	index, err := linkIndex(tun)
	if index == 0 || err != nil {
		return nil, err
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := dump("routes", func() ([]netlink.Route, error) {
			return netlink.RouteListFiltered(family, &netlink.Route{Table: HostsTable, Protocol: Protocol}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
		})
		if err != nil {
			return nil, err
		}
		for i := range list {
			p := prefixOf(list[i].Dst)
			if !p.IsSingleIP() {
				continue
			}
			h := HostRoute{Addr: p.Addr(), MTU: list[i].MTU}
			if list[i].LinkIndex != index {
				l, err := netlink.LinkByIndex(list[i].LinkIndex)
				if err != nil {
					continue // it has just gone
				}
				h.Device = l.Attrs().Name
			}
			out = append(out, h)
		}
	}
	return out, nil
}

// hostRouteList lists our routes in the table.
func (r *Reconciler) hostRouteList(family int) ([]netlink.Route, error) {
	return dump("routes", func() ([]netlink.Route, error) {
		return r.rt.RouteListFiltered(family, &netlink.Route{Table: HostsTable, Protocol: Protocol}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
	})
}

// hostRuleList lists our rules: nobody else has this priority with this table.
func (r *Reconciler) hostRuleList(family int) ([]netlink.Rule, error) {
	list, err := dump("rules", func() ([]netlink.Rule, error) {
		return r.rt.RuleListFiltered(family, &netlink.Rule{Table: HostsTable, Priority: HostsTable}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PRIORITY)
	})
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) { // a kernel without IPv6
		return nil, nil
	}
	return list, err
}

func (p *pass) hostText(a netip.Addr, spec hostSpec) string {
	device := p.s.Tun
	if spec.link != p.link {
		device = p.r.deviceName(spec.link)
	}
	s := fmt.Sprintf("route %v dev %s table %d", a, device, HostsTable)
	if spec.mtu != 0 {
		s += fmt.Sprintf(" mtu %d", spec.mtu)
	}
	return s
}

func hostRuleText(from netip.Prefix) string {
	return fmt.Sprintf("rule from %v lookup %d", from, HostsTable)
}
