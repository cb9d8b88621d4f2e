package fastpath

import (
	"encoding/binary"
	"net/netip"
)

// Peer is another host, with an agent or without.
type Peer struct {
	ID       string         // identifies it across updates; its counters live as long as its ID is present
	Accept   []netip.Addr   // underlay addresses from which its packets come
	Prefixes []netip.Prefix // its pods' space, of both families
	Except   []netip.Addr   // addresses in Prefixes to which the agent sends
	Way      *Way           // nil: the agent sends everything
}

// Way is how packets to a peer leave.
type Way struct {
	From, To netip.Addr // outer addresses, of one family
	Link     string     // name of the device; one that is not Ethernet leaves sending to the agent
	MTU      int        // largest inner packet, in bytes
	Port     uint16     // of the peer, for udp over IPv4; 0: ipip
}

// State is what the kernel is to carry.
type State struct {
	TUN      string         // name of the device
	Links    []string       // devices on which packets from peers arrive; those that are not Ethernet are left out
	Underlay []netip.Addr   // this node's
	Port     uint16         // of udp, here; 0: the agent receives what comes by udp
	Own      []netip.Prefix // this node's pods' space
	Except   []netip.Addr   // addresses in Own whose packets the agent gets: its own
	Peers    []Peer
	Off      string // why nothing is to be carried; "" if something is
}

// The owners of addresses; the numbers are those of fastpath.bpf.c.
const (
	agent uint32 = iota
	own
	firstPeer
)

// tables are the contents of the programs' maps.
type tables struct {
	spaces   map[programsPrefix]uint32
	hosts    map[programsAddr]uint32
	ways     map[uint32]programsWay
	counters map[uint32]struct{}
}

// build makes the tables. number gives each peer's; link the index of an Ethernet device, else 0.
func build(s State, number func(id string) uint32, link func(name string) uint32) tables {
	t := tables{map[programsPrefix]uint32{}, map[programsAddr]uint32{}, map[uint32]programsWay{}, map[uint32]struct{}{}}
	for _, p := range s.Peers {
		n := number(p.ID)
		t.counters[n] = struct{}{}
		for _, a := range p.Accept {
			t.hosts[addrOf(a)] = n
		}
		for _, prefix := range p.Prefixes {
			t.spaces[prefixOf(prefix)] = n
		}
		if w := p.Way; w != nil && w.From.Is4() == w.To.Is4() && (w.Port == 0 || w.To.Is4()) {
			if i := link(w.Link); i != 0 {
				t.ways[n] = programsWay{From: addrOf(w.From), To: addrOf(w.To), Link: i, Mtu: uint32(w.MTU), Port: uint32(w.Port)}
			}
		}
	}
	// After all prefixes of peers: nobody can take these from this node.
	for _, p := range s.Peers {
		t.leave(p.Except)
	}
	for _, prefix := range s.Own {
		t.spaces[prefixOf(prefix)] = own
	}
	t.leave(s.Except)
	// A host's own address in the pods' space: the agent looks closer at what goes there.
	t.leave(s.Underlay)
	for _, p := range s.Peers {
		t.leave(p.Accept)
	}
	for _, a := range s.Underlay {
		t.hosts[addrOf(a)] = own
	}
	return t
}

// leave leaves packets from and to addresses to the agent.
func (t *tables) leave(addrs []netip.Addr) {
	for _, a := range addrs {
		t.spaces[prefixOf(netip.PrefixFrom(a, a.BitLen()))] = agent
	}
}

// addrOf is an address as the programs have it: IPv4 as ::ffff:a.b.c.d.
func addrOf(a netip.Addr) (out programsAddr) {
	b := a.As16()
	for i := range out.D {
		out.D[i] = binary.NativeEndian.Uint64(b[8*i:])
	}
	return out
}

func prefixOf(p netip.Prefix) programsPrefix {
	bits := p.Bits()
	if p.Addr().Is4() {
		bits += 96
	}
	out := programsPrefix{Bits: uint32(bits)}
	b := p.Masked().Addr().As16()
	for i := range out.Addr {
		out.Addr[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return out
}
