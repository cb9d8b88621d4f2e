package hostnet

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Sought is the input of DetectUnderlay, in addition to the host's own state.
type Sought struct {
	Interface string       // --underlay INTERFACE
	Addresses []netip.Addr // --underlay ADDRESS, at most one per family; if set, no other address is used

	// Tun and Pods are never the underlay: the TUN device, and addresses in the pods' space, such as those of bridges.
	Tun  string
	Pods []netip.Prefix

	// Seeds has the addresses of each seed whose name resolves, including those of this host.
	Seeds [][]netip.Addr
	// Unknown describes the seeds that have no address yet, and why; "" if there are none. While it is set, nothing is guessed.
	Unknown string
	// Peers are the last known addresses of other members.
	Peers []netip.Addr
	// Device is the name of the device that had the addresses in Last, or "". While none of them is there, no other device is guessed.
	Device string
	// Last are the addresses in use before the agent's restart, and LastBy is the basis of that choice.
	Last   []netip.Addr
	LastBy Basis
}

// Basis is the basis on which an underlay address was chosen.
type Basis string

const (
	ByOperator Basis = "operator" // named with --underlay ADDRESS
	BySeeds    Basis = "seeds"    // the source address of the route to them, or an address of this host that is in their list
	ByPeers    Basis = "peers"    // the same, with the members that were there before
	ByGuess    Basis = "guess"    // the default route, or the only device with an address
	ByRoute    Basis = "route"    // the same, after a guess at a bridge of containers
)

// DetectUnderlay finds the underlay in the calling thread's network namespace. It uses the first of these:
//
//  1. the address or interface that the operator names;
//  2. the source address of the route to the seeds, or, while their names do not resolve, to the members known from before;
//  3. an address of this host that is in the list of seeds;
//  4. an address that was in use before, unless it was guessed, is that of a bridge of containers, no member is known, and there is
//     a better guess now;
//  5. another address of the device whose address is lost, or of the bridge or bond that it has become a part of;
//  6. if there are no seeds to wait for, and no device's address is lost: the address of the default route, or of the only device
//     that has an address, unless lo has one, too.
//
// If two devices are possible, the error names them. Errors that may go away with time wrap ErrNotYet.
func DetectUnderlay(s Sought) (Underlay, error) {
	d, err := newDetector()
	if err != nil {
		return Underlay{}, err
	}
	return d.detect(s)
}

func (d *detector) detect(s Sought) (Underlay, error) {
	d.pods = func(h netlink.Addr) bool {
		return s.Tun != "" && d.name(h.LinkIndex) == s.Tun || slices.ContainsFunc(s.Pods, func(p netip.Prefix) bool { return p.Contains(addrOf(h.IP)) })
	}
	d.addrs = slices.DeleteFunc(d.addrs, d.pods)
	d.last, d.lost = s.Last, s.Device
	switch {
	case len(s.Addresses) > 0:
		return d.byAddr(s.Addresses)
	case s.Interface != "":
		return d.byName(s.Interface, s)
	}
	last, lasts := d.inUse(s)
	others := d.others(s.Seeds)
	switch {
	case len(d.toward(others)) > 0:
		return d.bySeeds(others, last, s.LastBy)
	case len(d.toward([][]netip.Addr{s.Peers})) > 0:
		return d.byPeers(s.Peers, last)
	}
	if c, ok := d.listed(s.Seeds); ok {
		return d.because(c, BySeeds, "the seeds list it, and it is this host's")
	}
	if lasts {
		if u, ok := d.outward(last, s); ok {
			return u, nil
		}
		return d.because(last, s.LastBy, "it was in use before, and is still this host's")
	}
	if c, ok := d.beside(s.Device); ok {
		if name := d.name(c.index); name != s.Device {
			return d.because(c, ByGuess, fmt.Sprintf("it is on %s, of which %s, which had the lost address, is a part now", name, s.Device))
		}
		return d.because(c, ByGuess, fmt.Sprintf("it is on %s, as the lost address was", s.Device))
	}
	if len(others) > 0 {
		return Underlay{}, notYet{fmt.Errorf("no underlay leads to any seed: %w", d.noRoute(others))}
	}
	if s.Unknown != "" {
		return Underlay{}, notYet{fmt.Errorf("it is the source address of the route to the seeds, and none of them has a known address: %s", s.Unknown)}
	}
	if s.Device != "" {
		return Underlay{}, notYet{fmt.Errorf("%s has no other address, and no route leads to another member", s.Device)}
	}
	return d.byDefault()
}

// own reports whether an address belongs to this host: an address of any device, or loopback.
func (d *detector) own(a netip.Addr) bool {
	return a.IsLoopback() || a.IsUnspecified() || slices.ContainsFunc(d.all, func(h netlink.Addr) bool { return addrOf(h.IP) == a })
}

// others are the seeds' addresses without this host's own; seeds of which nothing remains are left out.
func (d *detector) others(seeds [][]netip.Addr) [][]netip.Addr {
	var out [][]netip.Addr
	for _, addrs := range seeds {
		if foreign := slices.DeleteFunc(slices.Clone(addrs), func(a netip.Addr) bool { return d.own(a.Unmap()) }); len(foreign) > 0 {
			out = append(out, foreign)
		}
	}
	return out
}

// toward gives a candidate for each seed's address to which there is a route, IPv4 first, so that hosts with both families see the
// same order whatever their name servers say first.
func (d *detector) toward(seeds [][]netip.Addr) []candidate {
	var out []candidate
	for _, v4 := range []bool{true, false} {
		for _, addrs := range d.others(seeds) {
			for _, a := range addrs {
				if a = a.Unmap(); a.Is4() != v4 || a.IsLinkLocalUnicast() { // no member is there, whatever source the kernel has
					continue
				}
				if c, err := d.routeTo(a); err == nil && refuse(c.addr) == nil {
					out = append(out, c)
				}
			}
		}
	}
	return out
}

// bySeeds finds the device that leads to every seed to which there is a route, by whichever of its addresses.
func (d *detector) bySeeds(seeds [][]netip.Addr, last candidate, lastBy Basis) (Underlay, error) {
	all := d.toward(seeds)
	found := all
	for _, s := range seeds {
		reach := d.toward([][]netip.Addr{s})
		if len(reach) > 0 {
			found = slices.DeleteFunc(slices.Clone(found), func(c candidate) bool { return !onDevice(reach, c.index) })
		}
	}
	if onDevice(found, last.index) {
		if lastBy == BySeeds {
			return d.because(last, BySeeds, fmt.Sprintf("the seeds are reached by %s, and the address was in use before", d.name(last.index)))
		}
		found = slices.DeleteFunc(slices.Clone(found), func(c candidate) bool { return c.index != last.index })
	}
	// Names that lead to one device by IPv4 and to another by IPv6: the same choice on all hosts.
	if v4 := slices.DeleteFunc(slices.Clone(found), func(c candidate) bool { return !c.addr.Is4() }); len(v4) > 0 {
		found = v4
	}
	const two = "the seeds are reached by more than one device"
	if len(found) == 0 {
		return d.only(all, two)
	}
	u, err := d.only(found, two)
	return u.because(BySeeds, "it is the source address of the route to the seeds"), err
}

// noRoute says for each seed why no device leads to it.
func (d *detector) noRoute(seeds [][]netip.Addr) error {
	var errs []error
	for _, s := range seeds {
		for _, a := range s {
			c, err := d.routeTo(a)
			if e := refuse(c.addr); err == nil && e != nil {
				err = fmt.Errorf("seed %v: %w", a, e)
			}
			if a.IsLinkLocalUnicast() {
				err = fmt.Errorf("seed %v is link-local, and no member is reached at such an address: give another one of that host, or its name", a)
			}
			if err != nil {
				errs = append(errs, err)
			}
		}
	}
	if err := d.hidden(); err != nil {
		errs = append(errs, err)
	}
	return line(errs)
}

// byPeers takes the device by which most of the members known from before are reached: one of them may have moved.
func (d *detector) byPeers(peers []netip.Addr, last candidate) (Underlay, error) {
	found := d.toward([][]netip.Addr{peers})
	count := map[int]int{}
	best := found[0]
	for _, c := range found {
		count[c.index]++
	}
	for _, c := range found {
		if count[c.index] > count[best.index] {
			best = c
		}
	}
	if onDevice(found, last.index) {
		best = last
	}
	return d.because(best, ByPeers, "it is the source address of the route to the members known from before")
}

// listed finds an address of this host in the seeds' lists: as the operator named this host there, others reach it. A virtual
// address stands for the device that has it now, not for itself.
func (d *detector) listed(seeds [][]netip.Addr) (candidate, bool) {
	for _, a := range slices.Concat(seeds...) {
		for _, h := range d.addrs {
			if addrOf(h.IP) != a.Unmap() {
				continue
			}
			for _, o := range d.addrs { // the best of them first
				if addrOf(o.IP).Is4() == a.Unmap().Is4() && d.rank(o) < d.rank(h) && d.on(h.LinkIndex, o.LinkIndex) {
					return candidate{o.LinkIndex, addrOf(o.IP)}, true
				}
			}
			return candidate{h.LinkIndex, a.Unmap()}, true
		}
	}
	return candidate{}, false
}

// inUse finds the first address that was in use before, and is there and usable.
func (d *detector) inUse(s Sought) (candidate, bool) {
	for _, a := range s.Last {
		if h := d.holder(a); h != nil && h.Flags&unusable == 0 && refuse(a) == nil && d.vrf(h.LinkIndex) == "" {
			return candidate{h.LinkIndex, a}, true
		}
	}
	return candidate{}, false
}

// outward finds a better guess than a bridge of containers, which was all that the host had, as when DHCP is late. Nobody has reached this node
// there while it knows no other member.
func (d *detector) outward(last candidate, s Sought) (Underlay, bool) {
	if s.LastBy != ByGuess || len(s.Peers) > 0 || !d.containers(last.index) {
		return Underlay{}, false
	}
	u, err := d.byDefault()
	return u.because(ByRoute, u.Why), err == nil && !d.containers(u.Index)
}

// containers reports whether a device is a bridge whose ports are all of containers and virtual machines, such as docker0: no other host is
// behind it.
func (d *detector) containers(index int) bool {
	for i, l := range d.links {
		if l.MasterIndex == index && d.kinds[i] != "veth" && d.kinds[i] != "tuntap" {
			return false
		}
	}
	return d.kinds[index] == "bridge"
}

// beside finds an address of a device that has lost the one in use, or of the bridge or bond of which it has become a part. A single IPv4 address on a link without a default route may be a
// virtual one, and would not stay.
func (d *detector) beside(device string) (candidate, bool) {
	for _, h := range d.addrs {
		if d.name(h.LinkIndex) != device && !d.part(device, h.LinkIndex) {
			continue
		}
		a := addrOf(h.IP)
		if !a.Is4() || !fullLength(h) || d.loopback(h.LinkIndex) || d.leadsOut(h.LinkIndex) {
			return candidate{h.LinkIndex, a}, true
		}
	}
	return candidate{}, false
}

// near finds the addresses that may have replaced a lost one, as where DHCP gives another one of the same subnet.
func (d *detector) near(k Kept) (out []netip.Addr) {
	for _, h := range d.addrs {
		if d.rank(h) == 0 && (d.name(h.LinkIndex) == k.Iface || d.part(k.Iface, h.LinkIndex)) && slices.ContainsFunc(k.Lost, func(a netip.Addr) bool { return h.IPNet.Contains(a.AsSlice()) }) {
			out = append(out, addrOf(h.IP))
		}
	}
	return out
}

// part reports whether a device is a port of a bridge, or of a bond.
func (d *detector) part(device string, of int) bool {
	for _, l := range d.links {
		if l.Name == device && l.MasterIndex == of {
			return true
		}
	}
	return false
}

// leadsOut reports whether an IPv4 default route leaves by a device.
func (d *detector) leadsOut(index int) bool {
	routes, err := wayOut(true)
	return err == nil && slices.ContainsFunc(routes, func(rt netlink.Route) bool { return isDefault(&rt) && slices.Contains(hops(&rt), index) })
}

func onDevice(cs []candidate, index int) bool {
	return slices.ContainsFunc(cs, func(c candidate) bool { return c.index == index })
}

// because completes a candidate, with the reason for it.
func (d *detector) because(c candidate, by Basis, why string) (Underlay, error) {
	u, err := d.choose(c)
	return u.because(by, why), err
}

func (u Underlay) because(by Basis, why string) Underlay {
	u.By, u.Why = by, why
	return u
}

// LocalAddrs returns the addresses of all devices of the host, in the calling thread's network namespace.
func LocalAddrs() ([]netip.Addr, error) {
	d, err := newDetector()
	if err != nil {
		return nil, err
	}
	return d.allAddrs(), nil
}

func (d *detector) allAddrs() []netip.Addr {
	out := make([]netip.Addr, 0, len(d.all))
	for _, a := range d.all {
		out = append(out, addrOf(a.IP))
	}
	return out
}

// Kept is the current state of an underlay in use.
type Kept struct {
	Underlay              // with the device that has its first address now
	Lost     []netip.Addr // those of its addresses that the host has lost or cannot use
	More     netip.Addr   // a new address of the other family; invalid if there is none
	Beside   []netip.Addr // other usable addresses of the device, of macvlans on it, and of lo
	Stale    []netip.Addr // those of its addresses that are deprecated (RFC 4862 §5.5.4), as before a prefix is withdrawn
	Fresh    []netip.Addr // addresses of its device that are meant to last
	Near     []netip.Addr // addresses of its device, or of what that is a part of, in whose subnets those in Lost were
	Host     []netip.Addr // the addresses of all devices
	Down     string       // why its device carries no packets; "" if it does
	VRF      string       // the VRF that has a device with an address in Lost; "" if there is none
}

// KeptUnderlay checks whether the host still has the addresses of an underlay in use, by which the other hosts know it.
func KeptUnderlay(u Underlay) (Kept, error) {
	d, err := newDetector()
	if err != nil {
		return Kept{}, err
	}
	return d.kept(u), nil
}

func (d *detector) kept(u Underlay) Kept {
	k := Kept{Underlay: u}
	for i, a := range u.Addrs {
		h := d.holder(a)
		if h != nil && d.vrf(h.LinkIndex) != "" {
			k.VRF = d.vrf(h.LinkIndex)
			k.Lost = append(k.Lost, a)
		} else if h == nil || h.Flags&unusable != 0 {
			k.Lost = append(k.Lost, a)
		} else if h.Flags&unix.IFA_F_DEPRECATED != 0 || h.PreferedLft == 0 && h.ValidLft > 0 { // each advertisement clears the flag for some seconds
			k.Stale = append(k.Stale, a)
		}
		if h == nil || slices.Contains(k.Lost, a) {
			continue
		}
		if l := d.links[h.LinkIndex]; i == 0 && l != nil {
			// Without a route the device and its MTU stay as they were.
			if now, err := d.carried(Underlay{Iface: l.Name, Index: l.Index, Addrs: u.Addrs, By: u.By, Why: u.Why}, candidate{l.Index, a}); err == nil {
				k.Underlay = now
			}
			if l.RawFlags&unix.IFF_UP == 0 {
				k.Down = l.Name + " is down"
			} else if l.RawFlags&unix.IFF_RUNNING == 0 {
				k.Down = l.Name + " has no carrier"
			}
		}
	}
	k.Host, k.Near = d.allAddrs(), d.near(k)
	for _, h := range d.addrs {
		if a := addrOf(h.IP); (d.on(h.LinkIndex, k.Index) || d.loopback(h.LinkIndex)) && !slices.Contains(u.Addrs, a) {
			k.Beside = append(k.Beside, a)
		}
		if h.LinkIndex == k.Index && d.rank(h) == 0 {
			k.Fresh = append(k.Fresh, addrOf(h.IP))
		}
	}
	if len(u.Addrs) == 1 && len(k.Lost) == 0 && u.By != ByOperator {
		k.More = d.first(k.Index, !u.Addrs[0].Is4(), netip.Addr{})
	}
	return k
}
