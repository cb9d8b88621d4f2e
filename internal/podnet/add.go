package podnet

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// Add wires a pod's interface. On an error nothing of it is left. It fails with an error that wraps fs.ErrExist where the host
// has a link of that name already, which then is left as it is.
//
// The order matters: the pod's link goes up when its source checks are there.
func (h *Host) Add(ctx context.Context, c Config) (Attachment, error) {
	c, err := c.validate()
	if err != nil {
		return Attachment{}, err
	}
	unlock, err := h.lockShared()
	if err != nil {
		return Attachment{}, err
	}
	defer unlock()
	if err := h.makeVeth(&c); err != nil {
		return Attachment{}, err
	}
	a, err := h.wire(ctx, &c)
	if err != nil {
		return Attachment{}, errors.Join(err, h.remove(c.HostInterface))
	}
	return a, nil
}

// makeVeth makes the pair, both ends down.
func (h *Host) makeVeth(c *Config) error {
	v := &netlink.Veth{LinkAttrs: sys.LinkAttrs(c.HostInterface), PeerName: peerName(c), PeerTxQLen: -1, PeerHardwareAddr: c.MAC}
	if v.MTU = c.MTU; c.Bridge == "" {
		v.HardwareAddr = HostMAC
	}
	v.GSOMaxSize, v.GSOMaxSegs, v.GSOIPv4MaxSize = uint32(c.GSOMaxSize), uint32(c.GSOMaxSegs), uint32(c.GSOMaxSize)
	if c.Netns != "" {
		ns, err := sys.OpenNetns(c.Netns)
		if err != nil {
			return fmt.Errorf("podnet: the pod's end: %w", err)
		}
		defer ns.Close()
		if err := h.otherNamespace(ns); err != nil {
			return err
		}
		v.PeerNamespace = netlink.NsFd(ns.Fd())
	}
	err := h.nl.LinkAdd(v)
	if errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("podnet: %s or, in the pod, %s is there already: %w", c.HostInterface, v.PeerName, fs.ErrExist)
	} else if err != nil {
		return fmt.Errorf("podnet: make veth %s with peer %s: %w", c.HostInterface, v.PeerName, err)
	}
	return nil
}

// ErrHostNamespace refuses a pod in the network namespace of the host.
var ErrHostNamespace = errors.New("it is the host's own network namespace: a pod needs one of its own")

// otherNamespace refuses a pod that would be the host itself.
func (h *Host) otherNamespace(pod *os.File) error {
	host, err := h.openNamespace()
	if err != nil {
		return err
	}
	defer host.Close()
	a, err := pod.Stat()
	b, herr := host.Stat()
	if err := errors.Join(err, herr); err != nil {
		return fmt.Errorf("podnet: %w", err)
	}
	if os.SameFile(a, b) {
		return fmt.Errorf("podnet: %s: %w", pod.Name(), ErrHostNamespace)
	}
	return nil
}

func peerName(c *Config) string {
	if c.Interface == "" {
		return handedOver(c.ID)
	}
	return c.Interface
}

// handedOver is the name of a pod's end in the host's namespace.
func handedOver(id string) string { return nameOf("tq", id) }

func (h *Host) wire(ctx context.Context, c *Config) (Attachment, error) {
	a := Attachment{
		ID: c.ID, HostInterface: c.HostInterface, PodInterface: peerName(c), MAC: c.MAC, HostMAC: HostMAC, Bridge: c.Bridge,
		Addresses: c.Addresses, MTU: c.MTU,
	}
	if err := h.installChecks(&a); err != nil {
		return a, err
	}
	link, err := h.nl.LinkByName(c.HostInterface)
	if err != nil {
		return Attachment{}, fmt.Errorf("podnet: find %s: %w", c.HostInterface, err)
	}
	if err := h.nl.LinkSetAlias(link, aliasOf(c)); err != nil {
		return Attachment{}, fmt.Errorf("podnet: mark %s: %w", c.HostInterface, err)
	}
	pod := h.nl
	if c.Netns != "" {
		if pod, err = sys.OpenNetlink(c.Netns); err != nil {
			return Attachment{}, fmt.Errorf("podnet: the pod's %w", err)
		}
		defer pod.Close()
	}
	peer, err := pod.LinkByName(peerName(c))
	if err != nil {
		return Attachment{}, fmt.Errorf("podnet: find the pod's end %s: %w", peerName(c), err)
	}
	if err := limitGSO(pod, peer, c); err != nil {
		return a, err
	}
	a.MAC, a.HostMAC = peer.Attrs().HardwareAddr, link.Attrs().HardwareAddr
	if err := h.hostSide(ctx, c, &a); err != nil {
		return a, fmt.Errorf("podnet: the host's end: %w", err)
	}
	if c.Netns == "" {
		return a, nil
	}
	if err := podSide(ctx, pod, c); err != nil {
		return a, fmt.Errorf("podnet: the pod's end: %w", err)
	}
	up := []string{c.HostInterface}
	if c.Bridge != "" {
		up = append(up, c.Bridge)
	}
	return a, errors.Join(pod.WaitUp(ctx, c.Interface), h.nl.WaitUp(ctx, up...))
}

// limitGSO bounds what the pod sends: the kernel gives the limits with which a pair is made to the host's end alone.
func limitGSO(pod *sys.Netlink, peer netlink.Link, c *Config) error {
	have := peer.Attrs()
	for _, limit := range []struct {
		what       string
		have, want int
		set        func(netlink.Link, int) error
	}{
		{"bytes", int(have.GSOMaxSize), c.GSOMaxSize, pod.LinkSetGSOMaxSize},
		{"bytes of IPv4", int(have.GSOIPv4MaxSize), c.GSOMaxSize, pod.LinkSetGSOIPv4MaxSize},
		{"segments", int(have.GSOMaxSegs), c.GSOMaxSegs, pod.LinkSetGSOMaxSegs},
	} {
		if limit.want == 0 || limit.have == 0 || limit.want == limit.have {
			continue // nothing is wanted, the kernel does not know the limit, or it is so already
		}
		if err := limit.set(peer, limit.want); err != nil {
			return fmt.Errorf("podnet: limit super-packets of the pod's end %s to %d %s: %w", have.Name, limit.want, limit.what, err)
		}
	}
	return nil
}

func (h *Host) hostSide(ctx context.Context, c *Config, a *Attachment) error {
	if c.Bridge != "" {
		if err := h.behindBridge(ctx, a); err != nil {
			return err
		}
		_, err := h.nl.LinkUp(c.HostInterface)
		return err
	}
	if err := h.do(func() error { return sys.SetSysctls(settingsOf(a)...) }); err != nil {
		return err
	}
	link, err := h.nl.LinkUp(c.HostInterface)
	if err != nil {
		return err
	}
	return h.hostAddresses(ctx, link, a)
}

// hostAddresses gives the host's end its addresses, neighbours and routes, and puts back those that are missing.
func (h *Host) hostAddresses(ctx context.Context, link netlink.Link, a *Attachment) error {
	// Below an MTU of 1,280 bytes, as of a pod that has IPv4 alone on a narrow underlay, there is no IPv6.
	if err := h.gatewayAddresses(ctx, link, hasSix(a)); err != nil {
		return err
	}
	return h.hostRoutes(link, a)
}

// hasSix reports whether the pod has IPv6.
func hasSix(a *Attachment) bool { return slices.ContainsFunc(a.Addresses, netip.Addr.Is6) }

// gatewayAddresses makes link the pods' next hop.
func (h *Host) gatewayAddresses(ctx context.Context, link netlink.Link, six bool) error {
	if six {
		if err := h.nl.AddAddress(ctx, link, netip.PrefixFrom(Gateway6, 64)); err != nil {
			return err
		}
	}
	// Of scope host, this address answers ARP and is never chosen as the source of a packet to the pod.
	v4 := &netlink.Addr{IPNet: sys.IPNet(sys.HostPrefix(Gateway4)), Scope: unix.RT_SCOPE_HOST}
	if err := h.nl.AddrAdd(link, v4); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add address %v: %w", Gateway4, err)
	}
	return nil
}

// hostRoutes leads to the pod by link: its own, or the bridge.
func (h *Host) hostRoutes(link netlink.Link, a *Attachment) error {
	for _, addr := range a.Addresses {
		if a.MAC != nil {
			if err := h.nl.NeighSet(sys.PermanentNeighbour(link, addr, a.MAC)); err != nil {
				return fmt.Errorf("neighbour %v: %w", addr, err)
			}
		}
		// Of scope universe: with scope link and route_localnet (which portmap sets), the kernel would take Gateway4 as the source.
		r := &netlink.Route{LinkIndex: link.Attrs().Index, Protocol: unix.RTPROT_STATIC, Dst: sys.IPNet(sys.HostPrefix(addr))}
		if err := h.nl.RouteReplace(r); err != nil {
			return fmt.Errorf("route to %v: %w", addr, err)
		}
	}
	return nil
}

func podSide(ctx context.Context, pod *sys.Netlink, c *Config) error {
	settings := [][2]string{sys.NoDAD(c.Interface), {"ipv6/conf/" + c.Interface + "/accept_ra", "0"}}
	if slices.ContainsFunc(c.Addresses, netip.Addr.Is6) {
		settings = append(settings, [2]string{"ipv6/conf/" + c.Interface + "/disable_ipv6", "0"}) // engines disable it by default
	}
	if c.Bridge != "" {
		settings = append(settings, [2]string{"ipv6/conf/" + c.Interface + "/addr_gen_mode", "0"}) // the one that the checks let pass
	}
	err := sys.WithNetns(c.Netns, func() error { return sys.SetSysctls(settings...) })
	if err != nil {
		return err
	}
	if _, err := pod.LinkUp("lo"); err != nil {
		return err
	}
	link, err := pod.LinkUp(c.Interface)
	if err != nil {
		return err
	}
	for _, p := range c.OnLink {
		if c.Bridge != "" && p.Addr().Is4() {
			r := &netlink.Route{LinkIndex: link.Attrs().Index, Protocol: unix.RTPROT_STATIC, Scope: netlink.SCOPE_LINK, Dst: sys.IPNet(p.Masked())}
			if err := pod.RouteReplace(r); err != nil {
				return fmt.Errorf("route to %v: %w", p, err)
			}
		}
	}
	for _, a := range c.Addresses {
		if err := pod.AddAddress(ctx, link, sys.HostPrefix(a)); err != nil {
			return err
		}
		gw := Gateway(a)
		if err := pod.NeighSet(sys.PermanentNeighbour(link, gw, HostMAC)); err != nil {
			return fmt.Errorf("neighbour %v: %w", gw, err)
		}
		if err := leadTo(pod, link, c, gw); err != nil {
			return err
		}
	}
	return nil
}

// leadTo gives the pod its routes by a next hop. Of IPv4, the next hop is on the link for others, too, who add routes by it, as VPNs do; of
// IPv6, it is so by its address.
func leadTo(pod *sys.Netlink, link netlink.Link, c *Config, gw netip.Addr) error {
	if gw.Is4() {
		r := &netlink.Route{LinkIndex: link.Attrs().Index, Protocol: unix.RTPROT_STATIC, Scope: netlink.SCOPE_LINK, Dst: sys.IPNet(sys.HostPrefix(gw))}
		if err := pod.RouteReplace(r); err != nil {
			return fmt.Errorf("route to %v: %w", gw, err)
		}
	}
	if err := leadOut(pod, sys.DefaultRoute(link, gw)); err != nil {
		return fmt.Errorf("default route via %v: %w", gw, err)
	}
	for _, p := range c.Space {
		if p.Addr().Is4() != gw.Is4() || c.Bridge != "" && gw.Is4() && slices.Contains(c.OnLink, p) {
			continue
		}
		r := sys.DefaultRoute(link, gw)
		r.Dst = sys.IPNet(p.Masked())
		if err := leadOut(pod, r); err != nil {
			return fmt.Errorf("route to %v via %v: %w", p, gw, err)
		}
	}
	return nil
}

// metric6 of the pod's routes is better than those that other networks of the container may have: the kernel's 1,024 and 256, netavark's 100.
const metric6 = 1

// leadOut gives the pod a route. One that the container has of another network stays behind it, and is used again when the
// pod's interface goes.
func leadOut(pod *sys.Netlink, r *netlink.Route) error {
	if r.Gw.To4() == nil {
		r.Priority = metric6
		return pod.RouteReplace(r)
	}
	// Of IPv4 routes of one metric, 0, the kernel uses the first one, and without NLM_F_APPEND a new one comes first.
	if err := pod.RouteAddEcmp(r); !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

// Remove takes a pod's interface away, by the name of the host's end, and its source checks. What is gone already is no error.
func (h *Host) Remove(hostInterface string) error {
	unlock, err := h.lockShared()
	if err != nil {
		return err
	}
	defer unlock()
	return h.remove(hostInterface)
}

func (h *Host) remove(hostInterface string) error {
	link, err := h.nl.LinkByName(hostInterface)
	routed := false // routes go with their link
	switch {
	case errors.As(err, &netlink.LinkNotFoundError{}):
	case err != nil:
		return fmt.Errorf("podnet: find %s: %w", hostInterface, err)
	default:
		// It goes with its peer, whose namespace may be going at this moment.
		if err := h.nl.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("podnet: remove %s: %w", hostInterface, err)
		}
		a, ours := attachmentOf(link)
		routed = ours && a.Bridge == ""
	}
	if !routed {
		if err := h.sweepBridges(); err != nil {
			return err
		}
	}
	return h.removeChecks(hostInterface)
}
