package hostnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Underlay is the address of this node for the other nodes, and the devices that carry its packets.
type Underlay struct {
	Iface string // the device with the first address; lo if the address belongs to no link, as with BGP on the host
	Index int
	// Uplinks are the devices by which packets leave; only Iface if that is not lo.
	Uplinks []string
	// MTU is the smallest MTU of Uplinks and of the default route, in bytes. Narrowest names the device or route with it.
	MTU       int
	Narrowest string
	// Addrs has at most one address per family. The first one is the requested address,
	// or the one that the kernel uses towards the seeds.
	Addrs []netip.Addr
	By    Basis  // basis of the choice
	Why   string // reason for the choice, for the log and for status
}

// ToHave says what to do so that this host has an address.
func ToHave(a netip.Addr) string {
	switch {
	case a.IsLoopback() && a.Is6():
		return "let lo have IPv6 (`sysctl -w net.ipv6.conf.lo.disable_ipv6=0 && ip link set lo up`)"
	case a.IsLoopback():
		return "bring lo up (`ip link set lo up`)"
	}
	return "give it to an interface"
}

// ErrNotYet is wrapped by the errors of DetectUnderlay that may go away with time: a device, an
// address or a route is missing, as early in the boot of a host. Other errors need an operator.
var ErrNotYet = errors.New("not yet")

// notYet marks an error without changing its text.
type notYet struct{ error }

func (e notYet) Is(target error) bool { return target == ErrNotYet }
func (e notYet) Unwrap() error        { return e.error }

// VRFError says that an address or a device is in a VRF.
type VRFError struct{ What, Device, VRF string }

// Error names the remedy.
func (e VRFError) Error() string {
	return fmt.Sprintf("%s is in the VRF %s, from where the agent's sockets and the pods' routes cannot use it: take %s out of the VRF (`ip link set %[3]s nomaster`), or %s", e.What, e.VRF, e.Device, pick)
}

// candidate is a possible underlay: a device and a source address on it.
type candidate struct {
	index int
	addr  netip.Addr
}

type detector struct {
	links map[int]*netlink.LinkAttrs
	kinds map[int]string // of the links
	addrs []netlink.Addr // usable ones, in the kernel's order
	all   []netlink.Addr
	last  []netip.Addr            // in use before: preferred as the second address too
	pods  func(netlink.Addr) bool // addresses that are never the underlay; nil: none
	lost  string                  // the device that had the addresses in use before; "": none
}

func newDetector() (*detector, error) {
	links, err := dump("devices", netlink.LinkList)
	if err != nil {
		return nil, err
	}
	d := &detector{links: make(map[int]*netlink.LinkAttrs, len(links)), kinds: make(map[int]string, len(links))}
	for _, l := range links {
		d.links[l.Attrs().Index], d.kinds[l.Attrs().Index] = l.Attrs(), l.Type()
	}
	d.all, err = dump("addresses", func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, err
	}
	d.sift()
	return d, nil
}

// sift fills addrs.
func (d *detector) sift() {
	d.addrs = nil
	for _, a := range d.all {
		if refuse(addrOf(a.IP)) == nil && a.Flags&unusable == 0 && a.Scope < unix.RT_SCOPE_LINK && d.vrf(a.LinkIndex) == "" {
			d.addrs = append(d.addrs, a)
		}
	}
	slices.SortStableFunc(d.addrs, func(a, b netlink.Addr) int { return d.rank(a) - d.rank(b) })
}

// vrf is the name of the VRF of which a device is a part, or which it is; "" if it is in none. The kernel lets no socket outside of a VRF have an address
// inside (Documentation/networking/vrf.rst), and pods' routes are in the main table.
func (d *detector) vrf(index int) string {
	if l := d.links[index]; l != nil && d.kinds[index] != "vrf" {
		index = l.MasterIndex
	}
	if d.kinds[index] != "vrf" {
		return ""
	}
	return d.name(index)
}

// hidden is the error for the first address that is in a VRF; nil if there is none.
func (d *detector) hidden() error {
	for _, a := range d.all {
		if v := d.vrf(a.LinkIndex); v != "" && refuse(addrOf(a.IP)) == nil {
			return inVRF(fmt.Sprintf("the address %v on %s", addrOf(a.IP), d.name(a.LinkIndex)), d.name(a.LinkIndex), v)
		}
	}
	return nil
}

// inVRF is the error for an address or a device in a VRF.
func inVRF(what, device, vrf string) error {
	return notYet{VRFError{what, device, vrf}}
}

// unusable are the flags of addresses that cannot be bound to.
const unusable = unix.IFA_F_DADFAILED | unix.IFA_F_TENTATIVE

// rank puts behind the others the addresses that are not meant to be a host's own for long, worst last: one of full length
// on a device that has an IPv4 subnet too, which may be a virtual one that moves between hosts (VRRP); temporary ones
// (RFC 8981), with whose flag the kernel also marks secondary IPv4 ones; deprecated ones (RFC 4862 §5.5.4).
func (d *detector) rank(a netlink.Addr) int {
	switch {
	case a.Flags&unix.IFA_F_DEPRECATED != 0:
		return 3
	case a.Flags&unix.IFA_F_SECONDARY != 0:
		return 2
	case addrOf(a.IP).Is4() && fullLength(a) && slices.ContainsFunc(d.all, func(h netlink.Addr) bool {
		return d.on(a.LinkIndex, h.LinkIndex) && addrOf(h.IP).Is4() && !fullLength(h) && refuse(addrOf(h.IP)) == nil
	}):
		return 1
	}
	return 0
}

// on reports whether a device is another one, or a macvlan on it: a virtual address of VRRP with a MAC address of its own is on one (use_vmac of
// keepalived).
func (d *detector) on(index, other int) bool {
	l := d.links[index]
	return index == other || l != nil && d.kinds[index] == "macvlan" && l.ParentIndex == other
}

const pick = "choose another with --underlay INTERFACE or --underlay ADDRESS"

// translators is the IPv4 Service Continuity Prefix (RFC 7335): addresses that hosts with IPv6 only give to the device of a translator (464XLAT,
// DS-Lite). IPv4 default routes lead there.
var translators = netip.MustParsePrefix("192.0.0.0/29")

// refuse tells why an address cannot be an underlay address.
func refuse(a netip.Addr) error {
	switch {
	case a.IsLoopback():
		return fmt.Errorf("underlay address %v is a loopback address that other hosts cannot reach: %s", a, pick)
	case a.IsLinkLocalUnicast():
		return fmt.Errorf("underlay address %v is link-local and not routed beyond its subnet: %s", a, pick)
	case translators.Contains(a):
		return fmt.Errorf("underlay address %v is that of a translator to IPv6 (CLAT), which other hosts have, too, and do not reach: %s", a, pick)
	case a.IsMulticast(), a.IsUnspecified(), !a.IsValid():
		return fmt.Errorf("underlay address %v is not a host's address: %s", a, pick)
	}
	return nil
}

// companion is an address of the other family on a candidate's device: the one that was in use before, or the first.
func (d *detector) companion(c candidate) netip.Addr {
	for _, h := range d.addrs {
		if a := addrOf(h.IP); h.LinkIndex == c.index && a.Is4() != c.addr.Is4() && slices.Contains(d.last, a) {
			return a
		}
	}
	return d.first(c.index, !c.addr.Is4(), netip.Addr{})
}

func (d *detector) name(index int) string {
	if l := d.links[index]; l != nil {
		return l.Name
	}
	return fmt.Sprintf("if%d", index)
}

// choose completes a candidate: the device's data, and an address of the other family.
func (d *detector) choose(c candidate) (Underlay, error) {
	if err := refuse(c.addr); err != nil {
		return Underlay{}, err
	}
	l := d.links[c.index]
	if l == nil {
		return Underlay{}, fmt.Errorf("underlay device if%d is gone: %s", c.index, pick)
	}
	if h := d.holder(c.addr); h != nil && h.Flags&unusable != 0 {
		return Underlay{}, notYet{fmt.Errorf("underlay address %v on %s cannot be used: the detection of duplicates (RFC 4862 §5.4) is not over, or has found one", c.addr, l.Name)}
	}
	u, err := d.carried(Underlay{Iface: l.Name, Index: l.Index, Addrs: []netip.Addr{c.addr}}, c)
	if err != nil {
		return u, err
	}
	if a := d.companion(c); a.IsValid() {
		u.Addrs = append(u.Addrs, a)
	}
	return u, nil
}

// byAddr takes addresses that the operator names. They are all that is used, and each of them has to be there.
func (d *detector) byAddr(addrs []netip.Addr) (Underlay, error) {
	var u Underlay
	for i, a := range addrs {
		if err := refuse(a); err != nil {
			return Underlay{}, err
		}
		h := d.holder(a)
		if h == nil {
			return Underlay{}, notYet{fmt.Errorf("underlay address %v is on none of this host's devices (they have %s): %s", a, d.list(d.candidates()), pick)}
		}
		if v := d.vrf(h.LinkIndex); v != "" {
			return Underlay{}, inVRF(fmt.Sprintf("underlay address %v on %s", a, d.name(h.LinkIndex)), d.name(h.LinkIndex), v)
		}
		if i > 0 {
			continue
		}
		var err error
		if u, err = d.because(candidate{h.LinkIndex, a}, ByOperator, "--underlay names it"); err != nil {
			return u, err
		}
	}
	u.Addrs = addrs
	return u, nil
}

func (d *detector) byName(name string, s Sought) (Underlay, error) {
	for index, l := range d.links {
		if l.Name != name && !slices.Contains(l.AltNames, name) {
			continue
		}
		if v := d.vrf(index); v != "" {
			return Underlay{}, inVRF("underlay device "+name, l.Name, v)
		}
		// Of several addresses, the one that the kernel uses towards the seeds, or the one that was used last.
		for _, c := range d.toward(s.Seeds) {
			if c.index == index {
				return d.because(c, BySeeds, fmt.Sprintf("--underlay names %s, and the route to the seeds its address", name))
			}
		}
		if c, ok := d.inUse(s); ok && c.index == index {
			return d.because(c, s.LastBy, fmt.Sprintf("--underlay names %s, and the address was in use before", name))
		}
		if a := d.firstOf(index); a.IsValid() {
			return d.because(candidate{index, a}, ByGuess, fmt.Sprintf("--underlay names %s, and this is its first address", name))
		}
		if c, ok := d.borrowed(index); ok {
			return d.because(c, ByGuess, fmt.Sprintf("--underlay names %s, and packets that leave by it have this address", name))
		}
		if l.Flags&net.FlagLoopback != 0 {
			return Underlay{}, fmt.Errorf("underlay device %s is the loopback device and has no address that other hosts could reach: %s", name, pick)
		}
		return Underlay{}, notYet{fmt.Errorf("underlay device %s has no usable address: give it one, or %s", name, pick)}
	}
	return Underlay{}, notYet{fmt.Errorf("underlay device %s does not exist (there are %s): %s", name, d.list(d.candidates()), pick)}
}

// routeTo asks the kernel by which device and source address it reaches a.
func (d *detector) routeTo(a netip.Addr) (candidate, error) {
	a = a.Unmap()
	routes, err := netlink.RouteGet(a.WithZone("").AsSlice())
	if err != nil {
		return candidate{}, notYet{fmt.Errorf("no route to %v: %w", a, err)}
	}
	if len(routes) == 0 {
		return candidate{}, notYet{fmt.Errorf("no route to %v", a)}
	}
	// An equal-cost route has another source for each destination, if it does not name one.
	whole, err := netlink.RouteGetWithOptions(a.WithZone("").AsSlice(), &netlink.RouteGetOptions{FIBMatch: true})
	if err == nil && len(whole) > 0 && len(hops(&whole[0])) > 1 {
		if c, ok := d.sourceOf(&whole[0], a.Is4()); ok {
			return c, nil
		}
	}
	leaves, named := routes[0].LinkIndex, err == nil && len(whole) > 0 && whole[0].Src != nil
	c := d.source(addrOf(routes[0].Src), leaves)
	if h := d.holder(c.addr); h != nil && (d.pods != nil && d.pods(*h) || !named && d.stopgap(h, leaves)) {
		return candidate{}, notYet{fmt.Errorf("packets to %v leave by %s, and %s has no address", a, d.name(leaves), d.name(leaves))}
	}
	return c, nil
}

// stopgap reports whether the kernel takes an address only because the device by which packets leave has lost its own: that of a container engine's
// bridge, say. No router knows it there. One on lo, or of full length, belongs to no link.
func (d *detector) stopgap(h *netlink.Addr, leaves int) bool {
	return d.lost != "" && h.LinkIndex != leaves && d.name(h.LinkIndex) != d.lost && !d.loopback(h.LinkIndex) && !fullLength(*h)
}

// byDefault goes by the default routes with the lowest metric; IPv4's first, since a
// host with both families on one device has both.
func (d *detector) byDefault() (Underlay, error) {
	var found []candidate
	for _, v4 := range []bool{true, false} {
		routes, err := wayOut(v4)
		if err != nil {
			return Underlay{}, err
		}
		routes = slices.DeleteFunc(routes, func(rt netlink.Route) bool { return !isDefault(&rt) })
		if len(found) > 0 && d.loopback(found[0].index) {
			break // an address that belongs to no link is the host's choice for all of them
		}
		for i := range routes {
			rt := &routes[i]
			if slices.ContainsFunc(routes, func(o netlink.Route) bool { return o.Priority < rt.Priority }) {
				continue
			}
			if c, ok := d.sourceOf(rt, v4); ok {
				found = append(found, c)
			}
		}
	}
	why, chosen := "the default route leads to more than one device", "the default route leads there"
	if len(found) == 0 {
		why, chosen = "no default route applies to all packets, and more than one device has an address", "no other device has an address"
		all := d.candidates()
		if lo := d.onLoopbacks(); len(lo) > 0 { // with BGP on the host, the session that is missing decides
			return Underlay{}, notYet{fmt.Errorf("no default route says whether others reach this host at an address of the loopback device (%s) or of a link (%s): add such a route, as a routing daemon does, or choose an address with --underlay", d.list(lo), d.list(all))}
		}
		found = slices.DeleteFunc(slices.Clone(all), func(c candidate) bool { return d.links[c.index].RawFlags&unix.IFF_RUNNING == 0 })
		if len(found) == 0 && len(all) > 0 {
			return Underlay{}, notYet{fmt.Errorf("no device with an address carries packets (they have %s, and no carrier): plug it in, or %s", d.list(all), pick)}
		}
		// A bridge of containers is the last resort, and of several none.
		switch outer := slices.DeleteFunc(slices.Clone(found), func(c candidate) bool { return d.containers(c.index) }); {
		case len(outer) > 0:
			found = outer
		case len(found) > 1:
			return Underlay{}, notYet{fmt.Errorf("only bridges of containers have addresses (%s), and no other host is behind one: give an address to a link, or %s", d.list(found), pick)}
		}
	}
	if len(found) == 0 {
		if err := d.hidden(); err != nil {
			return Underlay{}, err
		}
		return Underlay{}, notYet{fmt.Errorf("no device of this host has an address by which others could reach it: give it one, or %s", pick)}
	}
	u, err := d.only(found, why)
	return u.because(ByGuess, chosen), err
}

// first is the device's first usable address of the family, or prefer where that is set.
func (d *detector) first(index int, v4 bool, prefer netip.Addr) netip.Addr {
	if prefer.IsValid() {
		return prefer
	}
	for _, a := range d.addrs {
		if ip := addrOf(a.IP); a.LinkIndex == index && ip.Is4() == v4 {
			return ip
		}
	}
	return netip.Addr{}
}

// firstOf is the device's first usable address of either family.
func (d *detector) firstOf(index int) netip.Addr {
	for _, a := range d.addrs {
		if a.LinkIndex == index {
			return addrOf(a.IP)
		}
	}
	return netip.Addr{}
}

// candidates are the first usable address of each device.
func (d *detector) candidates() []candidate {
	var out []candidate
	for _, a := range d.addrs {
		l := d.links[a.LinkIndex]
		if l == nil || l.Flags&net.FlagLoopback != 0 || l.Flags&net.FlagUp == 0 || d.rank(a) > d.rank(d.addrs[0]) || slices.ContainsFunc(out, func(c candidate) bool { return c.index == a.LinkIndex }) {
			continue
		}
		out = append(out, candidate{a.LinkIndex, addrOf(a.IP)})
	}
	return out
}

// only gives the first candidate if all are on one device, or are one address on several.
func (d *detector) only(found []candidate, why string) (Underlay, error) {
	if slices.ContainsFunc(found, func(c candidate) bool { return c.index != found[0].index && c.addr != found[0].addr }) {
		return Underlay{}, fmt.Errorf("underlay is ambiguous: %s (%s): choose one with --underlay INTERFACE or --underlay ADDRESS", why, d.list(found))
	}
	return d.choose(found[0])
}

func (d *detector) list(cs []candidate) string {
	var out []string
	for _, c := range cs {
		if s := fmt.Sprintf("%s %v", d.name(c.index), c.addr); !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	if len(out) == 0 {
		return "none"
	}
	return strings.Join(out, ", ")
}

// line joins errors in one line.
func line(errs []error) error {
	out := errs[0]
	for _, e := range errs[1:] {
		out = fmt.Errorf("%w; %w", out, e)
	}
	return out
}
