package podnet

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// Reasons of the source checks: the names of the counters in Table, and of the drops in `tulle status`.
const (
	DropSource    = "pod_source"    // an IPv4 or IPv6 packet whose source is not the pod's
	DropNeighbour = "pod_neighbour" // ARP or neighbour discovery that speaks for another address
	DropDHCP      = "pod_dhcp"      // an answer to a DHCP client
	DropProtocol  = "pod_protocol"  // neither IPv4, IPv6 nor ARP
	DropMulticast = "pod_multicast" // multicast or broadcast of a pod with a link of its own: it reaches no other pod
)

var reasons = []string{DropSource, DropNeighbour, DropDHCP, DropProtocol, DropMulticast}

// rule is one rule of a pod's chain. Its text, which is its comment, has all that it depends on: equal texts are equal rules.
type rule struct {
	text  string
	exprs []expr.Any
}

func (r *rule) comment() []byte { return userdata.AppendString(nil, userdata.TypeComment, r.text) }

// Offsets of the fields that are looked at, in bytes, and their values. IPv4: RFC 791; IPv6: RFC 8200; ARP: RFC 826 with
// Ethernet and IPv4 addresses; neighbour discovery: RFC 4861 §4.3, §4.4.
const (
	etherSource                        = 6
	ip4Source, ip4Destination          = 12, 16
	ip6Source, ip6Destination          = 8, 24
	arpFormat, arpOperation            = 0, 6 // htype, ptype, hlen, plen; then the operation
	arpSenderMAC, arpSender, arpTarget = 8, 14, 24
	icmp6Type, ndTarget                = 0, 8
	udpDestination                     = 2

	routerAdvertisement    = 134
	neighbourSolicitation  = 135
	neighbourAdvertisement = 136
	redirect               = 137
)

var arpEthernetIPv4 = []byte{0, 1, 8, 0, 6, 4}

// match is a piece of a rule.
type match []expr.Any

func join(parts ...match) []expr.Any { return slices.Concat(parts...) }

func field(base expr.PayloadBase, offset uint32, op expr.CmpOp, value ...byte) match {
	return match{
		&expr.Payload{DestRegister: 1, Base: base, Offset: offset, Len: uint32(len(value))},
		&expr.Cmp{Op: op, Register: 1, Data: value},
	}
}

func network(offset uint32, value ...byte) match {
	return field(expr.PayloadBaseNetworkHeader, offset, expr.CmpOpEq, value...)
}

func transport(offset uint32, value ...byte) match {
	return field(expr.PayloadBaseTransportHeader, offset, expr.CmpOpEq, value...)
}

// inside matches an address in a prefix of up to 16 bits.
func inside(base expr.PayloadBase, offset uint32, value, mask [2]byte) match {
	return match{
		&expr.Payload{DestRegister: 1, Base: base, Offset: offset, Len: 2},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 2, Mask: mask[:], Xor: make([]byte, 2)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: value[:]},
	}
}

func linkLocal(base expr.PayloadBase, offset uint32) match {
	return inside(base, offset, [2]byte{0xfe, 0x80}, [2]byte{0xff, 0xc0})
}

func protocol(ethertype uint16) match {
	return match{
		&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, ethertype)},
	}
}

// icmp6 matches a type also behind extension headers.
func icmp6(kind byte) match {
	return slices.Concat(match{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_ICMPV6}},
	}, transport(icmp6Type, kind))
}

// dhcpClient matches what DHCP clients read: UDP to port 68 (RFC 2131 §4.1), of IPv6 546 (RFC 8415 §7.2).
func dhcpClient(family match, port uint16) match {
	return slices.Concat(match{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
	}, family, transport(udpDestination, binary.BigEndian.AppendUint16(nil, port)...))
}

var accept = match{&expr.Verdict{Kind: expr.VerdictAccept}}

// drop counts for the host by reason, and for the pod.
func drop(reason string) match {
	return match{&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: reason}, &expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}}
}

// count counts like drop, and leaves it to the host's kernel, which forwards no such packet unless somebody makes it.
func count(reason string) match {
	return match{&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: reason}, &expr.Counter{}}
}

// notOf matches all protocols but one.
func notOf(proto byte) match {
	return match{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{proto}}}
}

// Multicast and broadcast, but for what kernels say by themselves about groups (IGMP, and MLD of ICMPv6) and in neighbour discovery.
var (
	multicast4 = slices.Concat(inside(expr.PayloadBaseNetworkHeader, ip4Destination, [2]byte{0xe0, 0}, [2]byte{0xf0, 0}), notOf(unix.IPPROTO_IGMP))
	broadcast4 = network(ip4Destination, 255, 255, 255, 255)
	multicast6 = slices.Concat(anyMulticast6, notOf(unix.IPPROTO_ICMPV6))

	anyMulticast6 = inside(expr.PayloadBaseNetworkHeader, ip6Destination, [2]byte{0xff, 0}, [2]byte{0xff, 0})
)

var silently = match{&expr.Verdict{Kind: expr.VerdictDrop}}

// podRules are what a pod may send.
func podRules(a *Attachment) []rule {
	var r rules
	if a.Bridge != "" {
		r.add("not from "+a.MAC.String(), field(expr.PayloadBaseLLHeader, etherSource, expr.CmpOpNeq, a.MAC...), drop(DropSource))
	}
	// A host may ask for its addresses on every device that it has: no pod tells it its default route.
	r.add("dhcp answer", dhcpClient(isIP4, 68), drop(DropDHCP))
	r.add("dhcpv6 answer", dhcpClient(isIP6, 546), drop(DropDHCP))
	for _, addr := range a.Addresses {
		if addr.Is4() {
			r.own4(addr, a)
		} else {
			r.own6(addr, a)
		}
	}
	r.linkLocal6(a)
	for _, kind := range []byte{routerAdvertisement, neighbourAdvertisement, redirect} {
		r.add("foreign neighbour discovery", isIP6, icmp6(kind), drop(DropNeighbour))
	}
	// What every kernel says when an interface comes up: duplicate address detection, router solicitations, MLD reports.
	if a.Bridge == "" {
		r.add("multicast of a program", fromLinkLocal, multicast6, drop(DropMulticast))
		r.add("link-local multicast", fromLinkLocal, anyMulticast6, silently)
	} else {
		own := linkLocalOf(a.MAC)
		from := slices.Concat(isIP6, network(ip6Source, own.AsSlice()...))
		r.add("from "+own.String()+" to the host", from, field(expr.PayloadBaseLLHeader, 0, expr.CmpOpEq, HostMAC...), drop(DropSource))
		r.add("from "+own.String(), from, accept)
	}
	r.add("multicast without a source", isIP6, network(ip6Source, make([]byte, 16)...), anyMulticast6, silently)
	r.add("foreign source", isIP4, drop(DropSource))
	r.add("foreign source", isIP6, drop(DropSource))
	r.add("foreign arp", isARP, drop(DropNeighbour))
	r.add("not ip", drop(DropProtocol))
	return r
}

type rules []rule

func (r *rules) add(text string, parts ...match) { *r = append(*r, rule{text, join(parts...)}) }

var (
	isIP4, isIP6, isARP = protocol(unix.ETH_P_IP), protocol(unix.ETH_P_IPV6), protocol(unix.ETH_P_ARP)
	fromLinkLocal       = slices.Concat(isIP6, linkLocal(expr.PayloadBaseNetworkHeader, ip6Source))
)

// own4 is what a pod may say as one of its IPv4 addresses. Behind a bridge it may ask for its neighbours, too.
func (r *rules) own4(a netip.Addr, pod *Attachment) {
	own := a.AsSlice()
	if pod.Bridge == "" {
		r.add("multicast from "+a.String(), isIP4, network(ip4Source, own...), multicast4, count(DropMulticast))
		r.add("broadcast from "+a.String(), isIP4, network(ip4Source, own...), broadcast4, count(DropMulticast))
	}
	r.add("from "+a.String(), isIP4, network(ip4Source, own...), accept)
	from := slices.Concat(isARP, network(arpFormat, arpEthernetIPv4...), network(arpSender, own...))
	if pod.Bridge != "" {
		from = slices.Concat(from, network(arpSenderMAC, pod.MAC...))
	}
	r.add("arp reply for "+a.String(), from, network(arpOperation, 0, 2), accept)
	if pod.Bridge != "" {
		r.add("arp request from "+a.String(), from, network(arpOperation, 0, 1), accept)
		return
	}
	r.add("arp request from "+a.String()+" for the gateway", from, network(arpOperation, 0, 1), network(arpTarget, Gateway4.AsSlice()...), accept)
	r.add("arp announcement of "+a.String(), from, network(arpOperation, 0, 1), network(arpTarget, own...), accept)
}

// own6 is what a pod may say as one of its IPv6 addresses.
func (r *rules) own6(a netip.Addr, pod *Attachment) {
	own := a.AsSlice()
	from := slices.Concat(isIP6, network(ip6Source, own...))
	r.add("advertisement of "+a.String(), from, icmp6(neighbourAdvertisement), transport(ndTarget, own...), accept)
	for _, kind := range []byte{routerAdvertisement, neighbourAdvertisement, redirect} {
		r.add("foreign neighbour discovery from "+a.String(), from, icmp6(kind), drop(DropNeighbour))
	}
	if pod.Bridge == "" {
		r.add("multicast from "+a.String(), from, multicast6, count(DropMulticast))
	}
	r.add("from "+a.String(), from, accept)
}

// linkLocal6 is neighbour discovery between link-local addresses. With a link of its own the pod may have any of them but the
// gateway's; behind a bridge, the one that follows from its MAC.
func (r *rules) linkLocal6(pod *Attachment) {
	gateway := Gateway6.AsSlice()
	r.add("as the gateway", isIP6, network(ip6Source, gateway...), drop(DropSource))
	if pod.Bridge != "" {
		own := linkLocalOf(pod.MAC)
		from := slices.Concat(isIP6, network(ip6Source, own.AsSlice()...))
		r.add("solicitation from "+own.String(), from, icmp6(neighbourSolicitation), accept)
		r.add("advertisement of "+own.String(), from, icmp6(neighbourAdvertisement), transport(ndTarget, own.AsSlice()...), accept)
		return
	}
	r.add("solicitation of the gateway", fromLinkLocal, icmp6(neighbourSolicitation), transport(ndTarget, gateway...), accept)
	r.add("advertisement of the gateway", isIP6, icmp6(neighbourAdvertisement), transport(ndTarget, gateway...), drop(DropNeighbour))
	r.add("advertisement of a link-local address", fromLinkLocal, icmp6(neighbourAdvertisement), linkLocal(expr.PayloadBaseTransportHeader, ndTarget), accept)
}
