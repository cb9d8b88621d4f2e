package sys

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Poll asks done at once and then every so often, until it is true or fails, or ctx ends.
func Poll(ctx context.Context, every time.Duration, done func() (bool, error)) error {
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
	}
}

// OpenNetlink opens a handle whose sockets are in the namespace at path.
func OpenNetlink(path string) (*Netlink, error) {
	ns, err := OpenNetns(path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	h, err := NewNetlink(int(ns.Fd()))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return h, nil
}

// SetSysctls writes settings (name below /proc/sys/net, value) in the calling thread's network namespace. Missing files are
// skipped: a kernel without IPv6 or bridge filtering has nothing to set.
func SetSysctls(settings ...[2]string) error {
	for _, s := range settings {
		err := os.WriteFile(filepath.Join("/proc/sys/net", s[0]), []byte(s[1]), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("set %s = %s: %w", s[0], s[1], err)
		}
	}
	return nil
}

// NoDAD is the sysctl that makes an interface's link-local address usable at once: duplicate address detection would hold
// the first packets back for a second.
func NoDAD(dev string) [2]string { return [2]string{"ipv6/conf/" + dev + "/accept_dad", "0"} }

// LinkAttrs are the attributes of a new device with this name.
func LinkAttrs(name string) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name = name
	return a
}

// IPNet is a prefix as netlink takes it.
func IPNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// HostPrefix is the prefix that holds a alone: a /32 or a /128.
func HostPrefix(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// DefaultRoute is a family's default route over link, via an address that need not be on the link.
func DefaultRoute(link netlink.Link, via netip.Addr) *netlink.Route {
	zero := netip.IPv6Unspecified()
	if via.Is4() {
		zero = netip.IPv4Unspecified()
	}
	return &netlink.Route{
		LinkIndex: link.Attrs().Index, Protocol: unix.RTPROT_STATIC,
		Dst: IPNet(netip.PrefixFrom(zero, 0)), Gw: via.AsSlice(), Flags: int(netlink.FLAG_ONLINK),
	}
}

// PermanentNeighbour is a neighbour entry that needs no ARP and no neighbour discovery.
func PermanentNeighbour(link netlink.Link, a netip.Addr, mac net.HardwareAddr) *netlink.Neigh {
	n := &netlink.Neigh{LinkIndex: link.Attrs().Index, State: unix.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: mac, Family: unix.AF_INET}
	if a.Is6() {
		n.Family = unix.AF_INET6
	}
	return n
}

// AddAddress gives a link an address that is usable when it returns: no duplicate address detection, and the kernel, which
// takes in IPv6 addresses a moment later, does take packets to it.
func (n *Netlink) AddAddress(ctx context.Context, link netlink.Link, p netip.Prefix) error {
	a := &netlink.Addr{IPNet: IPNet(p)}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	if err := n.AddrAdd(link, a); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add address %v to %s: %w", p, link.Attrs().Name, err)
	}
	if p.Addr().Is4() || p.Addr().IsLinkLocalUnicast() { // the latter are local to many links, and route get picks one
		return nil
	}
	err := Poll(ctx, time.Millisecond, func() (bool, error) {
		routes, err := n.RouteGet(p.Addr().AsSlice())
		return err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL, nil
	})
	if err != nil {
		return fmt.Errorf("wait until %v on %s is taken in: %w", p, link.Attrs().Name, err)
	}
	return nil
}

// LinkUp sets a device up.
func (n *Netlink) LinkUp(name string) (netlink.Link, error) {
	link, err := n.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", name, err)
	}
	if err := n.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("set %s up: %w", name, err)
	}
	return link, nil
}

// WaitUp waits until links are operational. The kernel tells IPv6 about a link's carrier up to a second after it is there
// (it collects such news), and until then IPv6 neither answers nor asks for neighbours.
func (n *Netlink) WaitUp(ctx context.Context, names ...string) error {
	for _, name := range names {
		err := Poll(ctx, 2*time.Millisecond, func() (bool, error) {
			link, err := n.LinkByName(name)
			return err == nil && link.Attrs().OperState == netlink.OperUp, err
		})
		if err != nil {
			return fmt.Errorf("wait for link %s: %w", name, err)
		}
	}
	return nil
}
