package podnet

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// Check compares a pod's interface with what Add has made of the same Config, and names everything that differs: links, addresses,
// routes, sysctls and source checks. The MTU may be left out.
func (h *Host) Check(c Config) error {
	c.MTU = cmp.Or(c.MTU, maxMTU)
	c, err := c.validate()
	if err != nil {
		return err
	}
	var errs []error
	miss := func(format string, args ...any) { errs = append(errs, fmt.Errorf("podnet: "+format, args...)) }
	link, err := h.nl.LinkByName(c.HostInterface)
	if err != nil {
		return fmt.Errorf("podnet: the host's end %s: %w", c.HostInterface, err)
	}
	a, ours := attachmentOf(link)
	if !ours || !slices.Equal(a.Addresses, c.Addresses) || a.Bridge != c.Bridge {
		miss("the host's end %s is that of %v %s, not of %v %s", c.HostInterface, a.Addresses, a.Bridge, c.Addresses, c.Bridge)
	}
	if link, err = h.behind(link, &a); err != nil {
		return err
	}
	bad, err := h.wrongSettings(&a)
	if err != nil {
		return err
	}
	for _, w := range bad {
		miss("sysctl net/%s is %s, not %s", w.name, w.is, w.want)
	}
	conn, err := h.nft()
	if err != nil {
		return err
	}
	have, err := chains(conn)
	if err != nil {
		return err
	}
	ok := false
	if chain := have[c.HostInterface]; chain != nil {
		rules, err := h.readRules(c.HostInterface)
		errs = append(errs, err)
		ok, _ = checked(chain, rules[c.HostInterface], &a)
	}
	if !ok {
		miss("the source checks of %s are not as they should be", c.HostInterface)
	}
	for _, addr := range c.Addresses {
		if yes, err := hasRoute(h.nl, link, sys.HostPrefix(addr).String()); err != nil {
			errs = append(errs, err)
		} else if !yes {
			miss("the host has no route to %v over %s", addr, link.Attrs().Name)
		}
	}
	if c.Netns != "" {
		known, err := h.knownMACs(link)
		errs = append(errs, err, checkPod(&c, known))
	}
	return errors.Join(errs...)
}

// knownMACs are those to which the host sends packets for an address by a link, as Add noted them.
func (h *Host) knownMACs(link netlink.Link) (map[netip.Addr]net.HardwareAddr, error) {
	list, err := h.nl.NeighList(link.Attrs().Index, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("podnet: neighbours over %s: %w", link.Attrs().Name, err)
	}
	out := map[netip.Addr]net.HardwareAddr{}
	for _, n := range list {
		if a, ok := netip.AddrFromSlice(n.IP); ok && n.State == unix.NUD_PERMANENT {
			out[a.Unmap()] = n.HardwareAddr
		}
	}
	return out, nil
}

func checkPod(c *Config, known map[netip.Addr]net.HardwareAddr) error {
	pod, err := sys.OpenNetlink(c.Netns)
	if err != nil {
		return fmt.Errorf("podnet: the pod's %w", err)
	}
	defer pod.Close()
	link, err := pod.LinkByName(c.Interface)
	if err != nil {
		return fmt.Errorf("podnet: %s in the pod: %w", c.Interface, err)
	}
	list, err := pod.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("podnet: addresses of %s in the pod: %w", c.Interface, err)
	}
	var errs []error
	for _, addr := range c.Addresses {
		if mac, is := known[addr], link.Attrs().HardwareAddr; mac != nil && !slices.Equal(mac, is) {
			errs = append(errs, fmt.Errorf("podnet: %s in the pod has got the MAC %v, and the host sends to %v at %v", c.Interface, is, addr, mac))
		}
		if !slices.ContainsFunc(list, func(a netlink.Addr) bool { return a.IPNet.String() == sys.HostPrefix(addr).String() }) {
			errs = append(errs, fmt.Errorf("podnet: %s in the pod has no address %v", c.Interface, addr))
		}
		dst := sys.DefaultRoute(link, Gateway(addr)).Dst.String()
		if yes, err := hasRoute(pod, link, dst); err != nil || !yes {
			errs = append(errs, errors.Join(err, fmt.Errorf("podnet: the pod has no route %s over %s", dst, c.Interface)))
		}
	}
	return errors.Join(errs...)
}

func hasRoute(n *sys.Netlink, link netlink.Link, dst string) (bool, error) {
	routes, err := n.RouteList(link, netlink.FAMILY_ALL)
	if err != nil {
		return false, fmt.Errorf("podnet: routes over %s: %w", link.Attrs().Name, err)
	}
	return slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.Dst != nil && r.Dst.String() == dst }), nil
}
