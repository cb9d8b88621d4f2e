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
	DropProtocol  = "pod_protocol"  // neither IPv4, IPv6 nor ARP
)

var reasons = []string{DropSource, DropNeighbour, DropProtocol}

// rule is one rule of a pod's chain. Its text, which is its comment, has all that it depends on: equal texts are equal rules.
type rule struct {
	text  string
	exprs []expr.Any
}

func (r *rule) comment() []byte { return userdata.AppendString(nil, userdata.TypeComment, r.text) }

// Offsets of the fields that are looked at, in bytes, and their values. IPv4: RFC 791; IPv6: RFC 8200; ARP: RFC 826 with
// Ethernet and IPv4 addresses; neighbour discovery: RFC 4861 §4.3, §4.4.
const (
	ip4Source, ip6Source, ip6Destination = 12, 8, 24
	arpFormat, arpOperation              = 0, 6 // htype, ptype, hlen, plen; then the operation
	arpSender, arpTarget                 = 14, 24
	icmp6Type, ndTarget                  = 0, 8

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

// inside matches an IPv6 address in a prefix of 8 or 10 bits.
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

var accept = match{&expr.Verdict{Kind: expr.VerdictAccept}}

// drop counts for the host by reason, and for the pod.
func drop(reason string) match {
	return match{&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: reason}, &expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}}
}

var silently = match{&expr.Verdict{Kind: expr.VerdictDrop}}

// podRules are what a pod with these addresses may send.
func podRules(addrs []netip.Addr) []rule {
	ip4, ip6, arp := protocol(unix.ETH_P_IP), protocol(unix.ETH_P_IPV6), protocol(unix.ETH_P_ARP)
	var out []rule
	add := func(text string, parts ...match) { out = append(out, rule{text, join(parts...)}) }
	for _, a := range addrs {
		own := a.AsSlice()
		if a.Is4() {
			from := slices.Concat(arp, network(arpFormat, arpEthernetIPv4...), network(arpSender, own...))
			add("from "+a.String(), ip4, network(ip4Source, own...), accept)
			add("arp reply for "+a.String(), from, network(arpOperation, 0, 2), accept)
			add("arp request from "+a.String()+" for the gateway", from, network(arpOperation, 0, 1), network(arpTarget, Gateway4.AsSlice()...), accept)
			add("arp announcement of "+a.String(), from, network(arpOperation, 0, 1), network(arpTarget, own...), accept)
			continue
		}
		from := slices.Concat(ip6, network(ip6Source, own...))
		add("advertisement of "+a.String(), from, icmp6(neighbourAdvertisement), transport(ndTarget, own...), accept)
		for _, kind := range []byte{routerAdvertisement, neighbourAdvertisement, redirect} {
			add("foreign neighbour discovery from "+a.String(), from, icmp6(kind), drop(DropNeighbour))
		}
		add("from "+a.String(), from, accept)
	}
	local := slices.Concat(ip6, linkLocal(expr.PayloadBaseNetworkHeader, ip6Source))
	gateway := Gateway6.AsSlice()
	add("as the gateway", ip6, network(ip6Source, gateway...), drop(DropSource))
	add("solicitation of the gateway", local, icmp6(neighbourSolicitation), transport(ndTarget, gateway...), accept)
	add("advertisement of the gateway", ip6, icmp6(neighbourAdvertisement), transport(ndTarget, gateway...), drop(DropNeighbour))
	add("advertisement of a link-local address", local, icmp6(neighbourAdvertisement), linkLocal(expr.PayloadBaseTransportHeader, ndTarget), accept)
	for _, kind := range []byte{routerAdvertisement, neighbourAdvertisement, redirect} {
		add("foreign neighbour discovery", ip6, icmp6(kind), drop(DropNeighbour))
	}
	// What every kernel says when an interface comes up: duplicate address detection, router solicitations, MLD reports.
	multicast := inside(expr.PayloadBaseNetworkHeader, ip6Destination, [2]byte{0xff, 0}, [2]byte{0xff, 0})
	add("link-local multicast", local, multicast, silently)
	add("multicast without a source", ip6, network(ip6Source, make([]byte, 16)...), multicast, silently)
	add("foreign source", ip4, drop(DropSource))
	add("foreign source", ip6, drop(DropSource))
	add("foreign arp", arp, drop(DropNeighbour))
	add("not ip", drop(DropProtocol))
	return out
}
