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

// HostsTable is the number of the routing table by which pods' packets to other
// members' underlay addresses take the tunnel: a policy rule for each own prefix ("from PREFIX lookup 8484"), a route for each
// address. It is also the rules' priority, unless rules of others would come first (see ranks). The underlay would carry those packets under pods' addresses, which fabrics and reverse path filters drop. The
// host's own packets, the tunnel's among them, have other sources and never meet the table.
const HostsTable = 8484

// replyMark is the bit of the packet mark that keeps a packet of a pod out of HostsTable. The kernel has yet to give answers of a
// published port this host's address when it routes them: in the tunnel they would be the host's own packets, which do not belong there.
const replyMark = 1 << 26

// HostRoute is a member's underlay address that pods reach through the tunnel, or directly.
type HostRoute struct {
	Addr   netip.Addr
	MTU    int    // largest packet in bytes; 0 is the device's MTU
	Device string // of the underlay, on whose link the address is, if pods reach it directly; empty: through the tunnel
}

// hostSpec is how an address is reached.
type hostSpec struct{ mtu, link int }

// ranks are the priorities of our policy rules in one family.
type ranks struct{ hosts, direct int }

func (r ranks) of(table int) int {
	if table == DirectTable {
		return r.direct
	}
	return r.hosts
}

// ranksFor puts our rules in front of all rules of others that lead to a table: such a rule is for all packets, as a rule, and ours are for a few
// that belong nowhere else. VPNs have rules in front of 8484, and one that is made without a priority, as by wg-quick, comes before all that there
// are (net/core/fib_rules.c, fib_default_rule_pref).
func (r *Reconciler) ranksFor(family int) (ranks, error) {
	list, err := r.ruleList(family)
	if err != nil {
		return ranks{}, err
	}
	first := DirectTable + 1
	for i := range list {
		if n := list[i].Priority; foreignRule(list[i].Table) && n > 0 {
			first = min(first, n)
		}
	}
	if first > DirectTable {
		return ranks{HostsTable, DirectTable}, nil
	}
	n := max(1, first-1)
	return ranks{n, n}, nil
}

// foreignRule reports whether a rule leads to a routing table of others. The kernel's local table has no addresses of other hosts, and rules that lead
// to no table (0) refuse packets, which is their maker's will, or are those of VRFs.
func foreignRule(table int) bool {
	switch table {
	case unix.RT_TABLE_UNSPEC, unix.RT_TABLE_LOCAL, HostsTable, DirectTable:
		return false
	}
	return true
}

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

// hostRules brings the policy rules to those of the prefixes. A new one precedes the removal of one with another priority.
func (p *pass) hostRules(family int, from []netip.Prefix) error {
	list, err := p.r.tableRules(family, HostsTable)
	if err != nil {
		return err
	}
	rank := p.ranks[family].hosts
	found := map[netip.Prefix]string{} // rules of the prefixes wanted, as they are
	good := map[netip.Prefix]bool{}
	var stale []netlink.Rule
	for i := range list {
		src := prefixOf(list[i].Src)
		switch wanted := slices.Contains(from, src); {
		case wanted && list[i].Priority == rank && list[i].Mark == 0 && list[i].Mask != nil && *list[i].Mask == replyMark && !good[src]:
			good[src] = true
			continue
		case wanted:
			found[src] = hostRuleText(src, list[i].Priority)
		}
		stale = append(stale, list[i])
	}
	var errs []error
	for _, o := range from {
		is := hostRuleText(o, rank)
		if good[o] {
			p.keep("rule "+o.String(), is)
			continue
		}
		rule := netlink.NewRule()
		rule.Family, rule.Priority, rule.Table, rule.Protocol = family, rank, HostsTable, uint8(Protocol)
		rule.Mask = new(uint32(replyMark))
		rule.Src = &net.IPNet{IP: o.Addr().AsSlice(), Mask: net.CIDRMask(o.Bits(), o.Addr().BitLen())}
		if err := p.r.rt.RuleAdd(rule); err != nil {
			errs = append(errs, fmt.Errorf("hostnet: %s: %w", is, err))
			continue
		}
		p.put("rule "+o.String(), found[o], is)
	}
	for i := range stale {
		src := prefixOf(stale[i].Src)
		if err := p.r.delRule(&stale[i]); err != nil {
			errs = append(errs, err)
		} else if found[src] == "" {
			p.rep.Removed = append(p.rep.Removed, hostRuleText(src, stale[i].Priority))
		}
	}
	return errors.Join(errs...)
}

// removeTable deletes a table of ours, whose routes are those that list has, and the rules that lead there.
func (r *Reconciler) removeTable(table int, list func(family int) ([]netlink.Route, error)) error {
	var errs []error
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := r.tableRules(family, table)
		errs = append(errs, err)
		for i := range rules {
			errs = append(errs, r.delRule(&rules[i]))
		}
		routes, err := list(family)
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

// tableRules lists our rules: nobody else has one that leads to a table of ours.
func (r *Reconciler) tableRules(family, table int) ([]netlink.Rule, error) {
	list, err := r.ruleList(family)
	return slices.DeleteFunc(list, func(o netlink.Rule) bool { return o.Table != table }), err
}

func (r *Reconciler) ruleList(family int) ([]netlink.Rule, error) {
	list, err := dump("rules", func() ([]netlink.Rule, error) { return r.rt.RuleList(family) })
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) { // a kernel without IPv6
		return nil, nil
	}
	return list, err
}

func (r *Reconciler) delRule(o *netlink.Rule) error {
	if err := r.rt.RuleDel(o); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("hostnet: delete the rule of priority %d that leads to table %d: %w", o.Priority, o.Table, err)
	}
	return nil
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

func hostRuleText(from netip.Prefix, rank int) string {
	s := fmt.Sprintf("rule from %v lookup %d", from, HostsTable)
	if rank != HostsTable {
		s += fmt.Sprintf(" priority %d", rank)
	}
	return s
}
