package hostnet

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// holder is the entry of an address that the host has; nil if it has it not. Where several devices have one address, as
// with unnumbered links, lo's counts: it stays when a link goes.
func (d *detector) holder(a netip.Addr) *netlink.Addr {
	var found *netlink.Addr
	for i := range d.all {
		if h := &d.all[i]; addrOf(h.IP) == a && (found == nil || d.loopback(h.LinkIndex)) {
			found = h
		}
	}
	return found
}

// source is what stands behind the kernel's choice of a source address for packets that leave by a device: the device that
// has the address, which may be another, and for an address that will not last a better one beside it, of the same subnet
// if there is one (the kernel prefers temporary addresses where use_tempaddr says so).
func (d *detector) source(a netip.Addr, leaves int) candidate {
	h := d.holder(a)
	switch {
	case h == nil:
		return candidate{leaves, a}
	case a.Is4(): // named by a route, or the first of its subnet
		return candidate{h.LinkIndex, a}
	}
	best, near := h, false
	ones, _ := h.Mask.Size()
	subnet := netip.PrefixFrom(a, ones).Masked()
	for i := range d.addrs {
		o := &d.addrs[i]
		ip := addrOf(o.IP)
		if o.LinkIndex != h.LinkIndex || ip.Is4() || d.rank(*o) >= d.rank(*h) {
			continue
		}
		if in := subnet.Contains(ip); d.rank(*o) < d.rank(*best) || in && !near && d.rank(*o) == d.rank(*best) {
			best, near = o, in
		}
	}
	return candidate{h.LinkIndex, addrOf(best.IP)}
}

// sourceOf is the source of packets that take a route: what the route says, or the address of its device. Equal-cost
// routes over several devices make these equals: then an address that is on lo is meant to be used, and without one the first
// device's by name.
func (d *detector) sourceOf(rt *netlink.Route, v4 bool) (candidate, bool) {
	if src := addrOf(rt.Src); src.IsValid() {
		return d.source(src, rt.LinkIndex), true
	}
	devices := hops(rt)
	if len(devices) != 1 {
		if c, ok := d.onLoopback(v4); ok {
			return c, true
		}
	}
	slices.SortFunc(devices, func(a, b int) int { return strings.Compare(d.name(a), d.name(b)) })
	for _, index := range devices {
		if a := d.first(index, v4, netip.Addr{}); a.IsValid() {
			return candidate{index, a}, true
		}
	}
	return d.onLoopback(v4)
}

// borrowed is the source of packets that leave by a device without an address, an unnumbered one: what its routes name, or
// the address that is on lo.
func (d *detector) borrowed(index int) (candidate, bool) {
	for _, v4 := range []bool{true, false} {
		routes, err := wayOut(v4)
		if err != nil {
			continue
		}
		for i := range routes {
			rt := &routes[i]
			if rt.Protocol == unix.RTPROT_KERNEL || !slices.Contains(hops(rt), index) { // the kernel's come with addresses
				continue
			}
			if c, ok := d.sourceOf(rt, v4); ok {
				return c, true
			}
		}
	}
	return candidate{}, false
}

// onLoopback is the address on lo that others can reach, if there is exactly one of the family.
func (d *detector) onLoopback(v4 bool) (candidate, bool) {
	found := slices.DeleteFunc(d.onLoopbacks(), func(c candidate) bool { return c.addr.Is4() != v4 })
	if len(found) != 1 {
		return candidate{}, false
	}
	return found[0], true
}

// onLoopbacks are the addresses on lo that others can reach.
func (d *detector) onLoopbacks() []candidate {
	var out []candidate
	for i := range d.addrs {
		if h := &d.addrs[i]; d.loopback(h.LinkIndex) {
			out = append(out, candidate{h.LinkIndex, addrOf(h.IP)})
		}
	}
	return out
}
