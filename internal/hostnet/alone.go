package hostnet

import (
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Alias is the alias (ip link set … alias) of the agent's TUN device. It identifies the device to a second agent in the same
// network namespace, independent of the device's name.
const Alias = "tulle"

// CheckAlone returns an error if another agent runs in the calling thread's network namespace: a TUN device other than tun
// has [Alias], and a process uses it. Two agents would share one routing table, nftables table and set of unreachable routes.
// Call it again after the own device is open and has its alias: of two agents that start at the same time, at least one then
// finds the other.
func CheckAlone(tun string) error {
	links, err := dump("devices", netlink.LinkList)
	if err != nil {
		return err
	}
	for _, l := range links {
		if a := l.Attrs(); a.Name != tun && a.Alias == Alias && a.RawFlags&unix.IFF_LOWER_UP != 0 {
			return fmt.Errorf("another agent runs on this host, with --tun %s: two would undo each other's routes and nftables table; stop it and run `tulle cleanup --tun %[1]s`, or run each in a network namespace of its own", a.Name)
		}
	}
	return nil
}

// CheckTun returns an error if the name tun, in the calling thread's network namespace, is that of a TUN device that no process
// uses and that is not the agent's: a persistent one of a VPN that does not run at the moment. The agent's has [Alias]; that of
// an early version has none, but routes with our mark lead to it or to its addresses. A device with neither alias, addresses nor routes is nobody's, so the
// agent may take it. Devices that a process uses, and those of other types, are left to whoever opens the device.
func CheckTun(tun string) error {
	link, err := netlink.LinkByName(tun)
	if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing {
		return nil
	}
	if err != nil {
		return fmt.Errorf("hostnet: device %s: %w", tun, err)
	}
	t, ok := link.(*netlink.Tuntap)
	// The kernel counts the queues of a device with several only; one that is up has a carrier while a process uses it.
	if !ok || t.Mode != netlink.TUNTAP_MODE_TUN || t.Queues > 0 || t.RawFlags&unix.IFF_LOWER_UP != 0 || t.Alias == Alias {
		return nil
	}
	addrs, err := dump("addresses of "+tun, func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return err
	}
	addrs = slices.DeleteFunc(addrs, func(a netlink.Addr) bool { return a.IP.To4() == nil && a.IP.IsLinkLocalUnicast() }) // the kernel's doing
	routes, err := dump("routes", func() ([]netlink.Route, error) {
		all := &netlink.Route{Table: unix.RT_TABLE_UNSPEC}
		return netlink.RouteListFiltered(netlink.FAMILY_ALL, all, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return err
	}
	what := ""
	switch {
	case t.Alias != "":
		what = fmt.Sprintf("the alias %q", t.Alias)
	case len(addrs) > 0:
		what = "the address " + addrText(&addrs[0])
	}
	for i := range routes {
		rt := &routes[i]
		into := slices.Contains(hops(rt), t.Index)
		// Before a node has peers, no route leads into its device, but its own space has one.
		inside := func(a netlink.Addr) bool { return prefixOf(rt.Dst).Contains(addrOf(a.IP)) }
		switch {
		case t.Alias == "" && rt.Protocol == Protocol && (into || rt.Type == unix.RTN_UNREACHABLE && slices.ContainsFunc(addrs, inside)):
			return nil
		case what == "" && into && rt.Protocol != unix.RTPROT_KERNEL:
			what = "the route " + routeText(rt, func(int) string { return tun })
		}
	}
	if what == "" {
		return nil
	}
	return fmt.Errorf("TUN device %s is not Tulle's: it has %s. Choose another name with --tun, or remove it if nothing needs it (`ip link del %[1]s`)", tun, what)
}
