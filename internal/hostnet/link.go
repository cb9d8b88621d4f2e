package hostnet

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// dump is sys.RetryDump with what is listed in its error.
func dump[T any](what string, list func() (T, error)) (T, error) {
	v, err := sys.RetryDump(list)
	if err != nil {
		return v, fmt.Errorf("hostnet: list %s: %w", what, err)
	}
	return v, nil
}

// tunLink finds the TUN device. One that was renamed since the last Reconcile gets its name back.
func (r *Reconciler) tunLink(name string, rep *Report) (netlink.Link, error) {
	link, err := r.rt.LinkByName(name)
	if _, missing := errors.AsType[netlink.LinkNotFoundError](err); !missing {
		return link, err
	}
	r.wantMu.Lock()
	index := r.want.index
	r.wantMu.Unlock()
	renamed, _ := r.rt.LinkByIndex(index)
	if tun, ok := renamed.(*netlink.Tuntap); !ok || tun.Alias != Alias {
		return nil, err
	}
	old := renamed.Attrs().Name
	err = r.rt.LinkSetName(renamed, name)
	if errors.Is(err, unix.EBUSY) { // a kernel before 6.2 renames no device that is up
		if err = r.rt.LinkSetDown(renamed); err == nil {
			err = r.rt.LinkSetName(renamed, name)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("it was renamed to %s, and does not get its name back: %w", old, err)
	}
	rep.Repaired = append(rep.Repaired, fmt.Sprintf("device %s (was: %s)", name, old))
	return r.rt.LinkByName(name)
}

// reconcileMTU gives the TUN device its MTU.
func (p *pass) reconcileMTU(link netlink.Link) error {
	if p.s.MTU == 0 {
		return nil
	}
	is := fmt.Sprintf("device %s mtu %d", p.s.Tun, p.s.MTU)
	if link.Attrs().MTU == p.s.MTU {
		p.keep("link mtu", is)
		return nil
	}
	if err := p.r.rt.LinkSetMTU(link, p.s.MTU); err != nil {
		return fmt.Errorf("hostnet: set the MTU of %s to %d: %w", p.s.Tun, p.s.MTU, err)
	}
	p.putLink("mtu", is)
	return nil
}

// reconcileUp brings the TUN device up.
func (p *pass) reconcileUp(link netlink.Link) error {
	is := fmt.Sprintf("device %s up", p.s.Tun)
	if link.Attrs().Flags&net.FlagUp != 0 {
		p.keep("link up", is)
		return nil
	}
	if err := p.r.rt.LinkSetUp(link); err != nil {
		return fmt.Errorf("hostnet: set %s up: %w", p.s.Tun, err)
	}
	p.putLink("up", is)
	return nil
}

// putLink is put for the device's attributes, which always have some value: a fresh device's
// are not somebody's doing.
func (p *pass) putLink(attr, is string) { p.put("link "+attr, "", is) }

// Address flags that the library does not name (linux/if_addr.h).
const (
	addrNoDAD         = unix.IFA_F_NODAD
	addrDADFailed     = unix.IFA_F_DADFAILED
	addrTentative     = unix.IFA_F_TENTATIVE
	addrPermanent     = unix.IFA_F_PERMANENT
	addrNoPrefixRoute = unix.IFA_F_NOPREFIXROUTE
	addrDeprecated    = unix.IFA_F_DEPRECATED
)

// validForever is the lifetime of an address without an end.
const validForever = math.MaxUint32

func (r *Reconciler) addrs(link netlink.Link) ([]netlink.Addr, error) {
	return dump("addresses of "+link.Attrs().Name, func() ([]netlink.Addr, error) {
		return r.rt.AddrList(link, netlink.FAMILY_ALL)
	})
}

// addAddrs puts the TUN addresses on the device and mends those that are there with a
// wrong prefix length, a lifetime, or a failed duplicate address detection. What can stay is changed in place, because routes go with
// the address that is their source.
func (p *pass) addAddrs(link netlink.Link) error {
	have, err := p.r.addrs(link)
	if err != nil {
		return err
	}
	var errs []error
	for _, want := range p.s.deviceAddrs() {
		object := "address " + want.String()
		is := fmt.Sprintf("address %s dev %s", netip.PrefixFrom(want, want.BitLen()), p.s.Tun)
		was, good := "", false
		for i := range have {
			h := &have[i]
			if addrOf(h.IP) != want {
				continue
			}
			ones, _ := h.Mask.Size()
			if ones == want.BitLen() && h.Flags&addrPermanent != 0 && h.Flags&(addrTentative|addrDADFailed) == 0 {
				good = want.Is4() || h.Flags&addrDeprecated != 0
				was = addrText(h)
				continue
			}
			// IPv6 has one entry an address: the wrong one goes first.
			was = addrText(h)
			if err := p.r.rt.AddrDel(link, h); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
				errs = append(errs, fmt.Errorf("hostnet: remove address %s from %s: %w", was, p.s.Tun, err))
			}
		}
		if good {
			p.keep(object, is)
			continue
		}
		n := &netlink.Addr{IPNet: &net.IPNet{IP: want.AsSlice(), Mask: net.CIDRMask(want.BitLen(), want.BitLen())}}
		if want.Is6() {
			// Nobody is on the device to detect duplicates with; without the
			// prefix route the kernel adds none of its own to the main table.
			n.Flags = addrNoDAD | addrNoPrefixRoute
			// Deprecated: our routes name it as their source, and nobody else takes it. Unlike IPv4, IPv6 looks for a source on all
			// devices, and this one would be better than a deprecated one of the device by which packets leave (RFC 6724 §5, rule 3).
			n.PreferedLft, n.ValidLft = 0, validForever
		}
		if err := p.r.rt.AddrReplace(link, n); err != nil {
			errs = append(errs, fmt.Errorf("hostnet: add %s: %w", is, err))
			continue
		}
		p.put(object, was, is)
	}
	return errors.Join(errs...)
}

// removeStaleAddrs removes every other address of the device, which is ours alone; the
// kernel's own link-local address too.
func (p *pass) removeStaleAddrs(link netlink.Link) error {
	have, err := p.r.addrs(link)
	if err != nil {
		return err
	}
	var errs []error
	for i := range have {
		h := &have[i]
		if slices.Contains(p.s.deviceAddrs(), addrOf(h.IP)) {
			continue
		}
		err := p.r.rt.AddrDel(link, h)
		if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			errs = append(errs, fmt.Errorf("hostnet: remove address %s from %s: %w", addrText(h), p.s.Tun, err))
			continue
		}
		p.rep.Removed = append(p.rep.Removed, fmt.Sprintf("address %s dev %s", addrText(h), p.s.Tun))
		p.last4 = p.last4 || addrOf(h.IP).Is4() && !slices.ContainsFunc(p.s.deviceAddrs(), netip.Addr.Is4)
	}
	return errors.Join(errs...)
}

// afterLastAddr puts routes back. With a device's last IPv4 address, the kernel removes all its IPv4 routes, whatever their source (fib_frontend.c,
// fib_inetaddr_event). That is our own doing, and no repair.
func (p *pass) afterLastAddr(ctx context.Context, link int, routes map[routeKey]routeSpec) error {
	if !p.last4 {
		return nil
	}
	rep := *p.rep
	err := errors.Join(p.reconcileRoutes(ctx, link, routes), p.reconcileHosts())
	p.rep.Repaired, p.rep.Changed, p.rep.Conflicts = rep.Repaired, rep.Changed, rep.Conflicts
	return err
}

func (r *Reconciler) removeAddrs(link netlink.Link) error {
	have, err := r.addrs(link)
	if err != nil {
		return err
	}
	var errs []error
	for i := range have {
		if err := r.rt.AddrDel(link, &have[i]); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			errs = append(errs, fmt.Errorf("hostnet: remove address %s: %w", addrText(&have[i]), err))
		}
	}
	return errors.Join(errs...)
}

func addrText(a *netlink.Addr) string {
	ones, _ := a.Mask.Size()
	return netip.PrefixFrom(addrOf(a.IP), ones).String()
}

// addrOf is the netip form of an address of the netlink library; the zero Addr for none.
func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
