package hostnet

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// nftRule is a rule with its comment (user data, see comment).
type nftRule struct {
	comment []byte
	exprs   []expr.Any
}

// The table's sets. Both families' are always there: only elements change with the cluster.
const (
	setOwn      = "own"
	setCluster  = "cluster"
	setMembers  = "members"
	setKept     = "no_masquerade"
	setPorts    = "tunnel_ports"
	setDirectTx = "direct_tx"
	setDirectRx = "direct_rx"
	chainIn     = "input"
	chainFwd    = "forward"
	chainPre    = "prerouting"
	chainReply  = "published"
	chainOut    = "output"
	chainRawOut = "output_raw"
	chainPost   = "postrouting"
)

// family is what the rules of one address family differ in.
type family struct {
	v4               bool
	suffix           string
	proto            byte
	key              nftables.SetDatatype
	src, dst, length uint32 // of the addresses in the IP header, bytes
	multicast        []byte // address and mask of the multicast range
	multicastMask    []byte
	icmp             byte
	redirect         byte
	// unreachable are the ICMP errors that a kernel makes of an inner packet that no
	// kernel tunnel wants, by type and codes.
	unreachable []icmpError
	// quoted is the offset in bytes of the quoted header's protocol from the start of ICMP.
	quoted uint32
}

type icmpError struct{ kind, code byte }

var families = []family{
	{
		v4: true, suffix: "4", proto: unix.NFPROTO_IPV4, key: nftables.TypeIPAddr,
		src: 12, dst: 16, length: 4,
		multicast: []byte{224, 0, 0, 0}, multicastMask: []byte{240, 0, 0, 0},
		icmp: unix.IPPROTO_ICMP, redirect: 5,
		// RFC 792: protocol unreachable; and what Linux's tunnel4 answers, port unreachable.
		unreachable: []icmpError{{3, 2}, {3, 3}},
		quoted:      8 + 9,
	},
	{
		v4: false, suffix: "6", proto: unix.NFPROTO_IPV6, key: nftables.TypeIP6Addr,
		src: 8, dst: 24, length: 16,
		multicast: append([]byte{0xff}, make([]byte, 15)...), multicastMask: append([]byte{0xff}, make([]byte, 15)...),
		icmp: unix.IPPROTO_ICMPV6, redirect: 137,
		// RFC 4443: unrecognized next header; and what Linux's tunnel6 answers, port unreachable.
		unreachable: []icmpError{{4, 1}, {1, 4}},
		quoted:      8 + 6,
	},
}

// Inner protocols of the ipip encapsulation: RFC 2003 and RFC 4213.
var ipipProtocols = []byte{unix.IPPROTO_IPIP, unix.IPPROTO_IPV6}

// buildTable is the table for a state:
//
//   - prerouting, output_raw (priority raw): the tunnel's outer packets are not tracked;
//     they would fill the connection table with one entry a source port. And no ICMP error
//     goes out about protocols 4 and 41, which our raw sockets serve beside the kernel, and
//     no redirect into the tunnel;
//   - published (after dstnat), where pods reach members by table 8484: answers to members that called a port of this host
//     that leads to a pod (hostPort, DNAT) get replyMark, so that they leave as what the kernel makes of them, a host's packets;
//   - postrouting (srcnat), with Masquerade only: from own pods to the outside, but for NoMasquerade, as the host's address: that
//     of the device, or where routes by a device name another one, in named, that one;
//   - input, forward, output (priority filter and above), only where packets can go directly (countsDirect): the sets direct_tx and
//     direct_rx count what goes to and comes from each peer's prefix beside the tunnel. The rules decide nothing.
//
// Every packet of a pod passes several of these chains, and every packet of the tunnel does; a chain costs something even without
// rules. So there is none without need, each first returns for packets that it has nothing to do with, and a rule tests what is
// cheap, and fails most often, first.
func buildTable(s *State, named []namedSource) (*nftTable, error) {
	pre := nftChain{name: chainPre, kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityRaw}
	rawOut := nftChain{name: chainRawOut, kind: nftables.ChainTypeFilter, hook: nftables.ChainHookOutput, priority: nftables.ChainPriorityRaw}
	out := nftChain{name: chainOut, kind: nftables.ChainTypeFilter, hook: nftables.ChainHookOutput, priority: nftables.ChainPriorityFilter}
	// What other chains drop is not counted.
	late := new(*nftables.ChainPriorityFilter + 10)
	fwd := nftChain{name: chainFwd, kind: nftables.ChainTypeFilter, hook: nftables.ChainHookForward, priority: late}
	input := nftChain{name: chainIn, kind: nftables.ChainTypeFilter, hook: nftables.ChainHookInput, priority: late}
	reply := nftChain{name: chainReply, kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPrerouting, priority: new(*nftables.ChainPriorityNATDest + 10)}
	post := nftChain{name: chainPost, kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPostrouting, priority: nftables.ChainPriorityNATSource}

	t := &nftTable{}
	ports := nftSet{name: setPorts, key: nftables.TypeInetService}
	for _, p := range s.TunnelPorts {
		ports.elements = append(ports.elements, nftables.SetElement{Key: binaryutil.BigEndian.PutUint16(p)})
	}
	t.sets = append(t.sets, ports)
	var errs error
	add := func(c *nftChain, text string, parts ...[]expr.Any) {
		exprs := slices.Concat(parts...)
		content := fmt.Appendf(nil, "%s %s\n", c.name, text)
		for _, e := range exprs {
			b, err := expr.Marshal(byte(nftables.TableFamilyINet), e)
			if err != nil && errs == nil {
				errs = fmt.Errorf("hostnet: encode nftables rule %q: %w", text, err)
			}
			content = append(content, b...)
		}
		c.rules = append(c.rules, nftRule{comment: comment(text, content), exprs: exprs})
	}
	for _, c := range []*nftChain{&pre, &rawOut} {
		add(c, "UDP to other ports", equal(l4proto, unix.IPPROTO_UDP), notIn(transport(2, 2), setPorts), done)
	}
	tunnels := append([]byte{unix.IPPROTO_UDP}, ipipProtocols...)
	add(&pre, "neither UDP nor an inner protocol of ipip", noneOf(l4proto, tunnels...), done)
	add(&rawOut, "neither UDP, nor an inner protocol of ipip, nor ICMP", noneOf(l4proto, append(tunnels, unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6)...), done)
	add(&fwd, "out of the tunnel", device(expr.MetaKeyIIFNAME, s.Tun), done)
	add(&fwd, "into the tunnel", device(expr.MetaKeyOIFNAME, s.Tun), done)
	icmp := nftChain{name: chainRawOut} // the rules of rawOut that come last
	for i := range families {
		f := &families[i]
		t.sets = append(t.sets,
			nftSet{name: setOwn + f.suffix, key: f.key, interval: true, elements: intervals(s.Own, f.v4)},
			nftSet{name: setCluster + f.suffix, key: f.key, interval: true, elements: intervals(s.ClusterCIDRs, f.v4)},
			nftSet{name: setKept + f.suffix, key: f.key, interval: true, elements: intervals(s.NoMasquerade, f.v4)},
			nftSet{name: setMembers + f.suffix, key: f.key, elements: hosts(s.Members, f.v4)},
			nftSet{name: setDirectTx + f.suffix, key: f.key, interval: true, counted: true, elements: counted(s, f.v4)},
			nftSet{name: setDirectRx + f.suffix, key: f.key, interval: true, counted: true, elements: counted(s, f.v4)})
		isFamily := equal(&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, f.proto)
		isICMP := equal(l4proto, f.icmp)
		version := "IPv" + f.suffix

		// What gets this far belongs to a tunnel, or is ICMP on the way out.
		add(&pre, "untracked tunnel from members, "+version, isFamily, in(f.address(f.src), setMembers+f.suffix), notrack, done)
		add(&rawOut, "untracked tunnel to members, "+version, isFamily, notEqual(l4proto, f.icmp), in(f.address(f.dst), setMembers+f.suffix), notrack, done)
		for _, e := range f.unreachable {
			for _, proto := range ipipProtocols {
				add(&icmp, fmt.Sprintf("no ICMP type %d code %d about protocol %d, %s", e.kind, e.code, proto, version), isFamily, isICMP,
					equal(transport(0, 2), e.kind, e.code), equal(transport(f.quoted, 1), proto), drop)
			}
		}
		add(&icmp, "no redirects into the tunnel, "+version, isFamily, isICMP, device(expr.MetaKeyOIFNAME, s.Tun), equal(transport(0, 1), f.redirect), drop)
		add(&reply, "answers of published ports to members, "+version, published, isFamily,
			in(f.address(f.dst), setMembers+f.suffix), in(f.address(f.src), setOwn+f.suffix), markReply)
		if s.countsDirect() {
			to, from := in(f.address(f.dst), setDirectTx+f.suffix), in(f.address(f.src), setDirectRx+f.suffix)
			add(&fwd, "count what goes directly, "+version, isFamily, notDevice(expr.MetaKeyIIFNAME, s.Direct), to)
			add(&fwd, "count what comes directly, "+version, isFamily, notDevice(expr.MetaKeyOIFNAME, s.Direct), from)
			add(&out, "count what this host sends directly, "+version, isFamily, notDevice(expr.MetaKeyOIFNAME, s.Tun), to)
			add(&input, "count what comes directly for this host, "+version, isFamily, notDevice(expr.MetaKeyIIFNAME, s.Tun), from)
		}
		if s.Masquerade {
			outside := slices.Concat(isFamily,
				in(f.address(f.src), setOwn+f.suffix),
				notIn(f.address(f.dst), setCluster+f.suffix),
				notIn(f.address(f.dst), setMembers+f.suffix),
				notIn(f.address(f.dst), setKept+f.suffix),
				f.notMulticast())
			for _, n := range named {
				if n.addr.Is4() == f.v4 {
					add(&post, fmt.Sprintf("own pods to the outside by %s as %v", n.device, n.addr), outside, f.behind(n),
						[]expr.Any{&expr.Counter{}, &expr.Immediate{Register: 1, Data: n.addr.AsSlice()},
							&expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(f.proto), RegAddrMin: 1, FullyRandom: true}})
				}
			}
			add(&post, "masquerade own pods to the outside, "+version, outside,
				notDevice(expr.MetaKeyOIFNAME, s.Tun),
				[]expr.Any{&expr.Counter{}, &expr.Masq{FullyRandom: true}})
		}
	}
	rawOut.rules = append(rawOut.rules, icmp.rules...)
	t.chains = append(t.chains, pre, rawOut)
	if len(s.Hosts) != 0 {
		t.chains = append(t.chains, reply)
	}
	if s.countsDirect() {
		t.chains = append(t.chains, fwd, input, out)
	}
	if s.Masquerade {
		t.chains = append(t.chains, post)
	}
	t.sort()
	return t, errs
}

func hosts(addrs []netip.Addr, v4 bool) []nftables.SetElement {
	var out []nftables.SetElement
	for _, a := range addrs {
		if a.Is4() == v4 {
			out = append(out, nftables.SetElement{Key: a.AsSlice()})
		}
	}
	return out
}

// The parts of a rule. Each but the verdicts loads into register 1 and tests it; a rule goes on with the next if the test holds.

var (
	l4proto = &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}

	notrack = []expr.Any{&expr.Counter{}, &expr.Notrack{}}
	drop    = []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}}
	done    = []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}} // the rest of the chain does not concern the packet
)

// published tests for an answer of a connection whose destination was translated (linux/netfilter/nf_conntrack_common.h:
// IPS_DST_NAT, IP_CT_DIR_REPLY); markReply sets replyMark beside the other bits of the mark.
var (
	published = slices.Concat(
		[]expr.Any{&expr.Ct{Key: expr.CtKeySTATUS, Register: 1},
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(1 << 5), Xor: make([]byte, 4)},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)}},
		equal(&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1}, 1))
	markReply = []expr.Any{&expr.Counter{}, &expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(^uint32(replyMark)), Xor: binaryutil.NativeEndian.PutUint32(replyMark)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1}}
)

func equal(load expr.Any, data ...byte) []expr.Any {
	return []expr.Any{load, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data}}
}

func notEqual(load expr.Any, data ...byte) []expr.Any {
	return []expr.Any{load, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: data}}
}

// noneOf tests that one loaded byte is none of these.
func noneOf(load expr.Any, bytes ...byte) []expr.Any {
	out := []expr.Any{load}
	for _, b := range bytes {
		out = append(out, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{b}})
	}
	return out
}

// device tests the name of the device that a packet came from or leaves by; notDevice tests that it is another one.
func device(key expr.MetaKey, name string) []expr.Any {
	return equal(&expr.Meta{Key: key, Register: 1}, ifname(name)...)
}

func notDevice(key expr.MetaKey, name string) []expr.Any {
	return notEqual(&expr.Meta{Key: key, Register: 1}, ifname(name)...)
}

func in(load expr.Any, set string) []expr.Any {
	return []expr.Any{load, &expr.Lookup{SourceRegister: 1, SetName: set}}
}

func notIn(load expr.Any, set string) []expr.Any {
	return []expr.Any{load, &expr.Lookup{SourceRegister: 1, SetName: set, Invert: true}}
}

func transport(offset, length uint32) expr.Any {
	return &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: length}
}

func (f *family) address(offset uint32) expr.Any {
	return &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: f.length}
}

// behind matches what leaves by a device and goes to none of its own networks.
func (f *family) behind(n namedSource) []expr.Any {
	out := device(expr.MetaKeyOIFNAME, n.device)
	for _, p := range n.link {
		out = append(out, f.address(f.dst),
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: f.length, Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen()), Xor: make([]byte, f.length)},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: p.Addr().AsSlice()})
	}
	return out
}

func (f *family) notMulticast() []expr.Any {
	return []expr.Any{f.address(f.dst),
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: f.length, Mask: f.multicastMask, Xor: make([]byte, f.length)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: f.multicast}}
}

// ifname is a device name as nf_tables compares it: 16 bytes, zero-filled (IFNAMSIZ).
func ifname(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}
