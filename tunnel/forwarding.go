package tunnel

import (
	"iter"
	"net/netip"
	"slices"
	"sync/atomic"

	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
	"github.com/tulle-net/tulle/tunnel/mtu"
	"github.com/tulle-net/tulle/tunnel/route"
	"github.com/tulle-net/tulle/tunnel/underlay"
)

// Peer is what the engine knows of another node or an external peer. Engine.Update replaces all peers at once.
type Peer struct {
	ID          string         // identifies the peer across updates; its counters live as long as its ID is present
	Endpoint    netip.Addr     // where outer packets go
	Accept      []netip.Addr   // underlay addresses whose packets are the peer's; Endpoint is one of them
	UDPPort     uint16         // of its udp encapsulation
	VXLANPort   uint16         // of its vxlan encapsulation; 0: it has none
	VTEPMAC     header.MAC     // of its VTEP; zero: learned from what it sends
	Prefixes    []netip.Prefix // its space, of both families, its tun addresses included
	TunAddrs    []netip.Addr   // its own addresses inside Prefixes, at most one of each family: where probes go
	Mode        encap.Mode     // encapsulation of what is sent to it
	Singles     bool           // trains to it are lost though single packets arrive: send none
	MTU         mtu.TUN        // largest inner packet that the path to it takes
	Kernel      bool           // its kernel may send in place of an agent: such packets may come without their own checksums
	Bare        bool           // over IPv4, its udp packets go without UDP checksum, not by the engine: its probes by udp have none either
	Unreachable bool           // gossip and data path agree that it is gone: answer ICMP host unreachable
	Detours     []Detour       // addresses inside Prefixes to which another encapsulation is used: a benchmark compares them
}

// Detour is one address of a peer with an encapsulation of its own.
type Detour struct {
	Addr netip.Addr
	Mode encap.Mode
	MTU  mtu.TUN // largest inner packet by Mode
}

// Local is what the engine knows of its own node.
type Local struct {
	TunAddrs []netip.Addr   // at most one of each family; source of ICMP errors and of probes
	Prefixes []netip.Prefix // space that is this node's
	Underlay []netip.Addr   // this node's underlay addresses
	VTEPMAC  header.MAC     // of this node's VTEP
	Probes   []netip.Addr   // where direct probes to this node go: none comes out of the tunnel
}

// target is what a lookup ends in: a peer, ready to be sent to, or this node itself.
type target struct {
	local       bool
	unreachable bool
	kernel      bool // Peer.Kernel
	bare        bool // Peer.Bare
	six         bool // the endpoint is an IPv6 address
	mode        encap.Mode
	mtu         int
	id          string
	endpoint    netip.Addr
	udp         *underlay.Dest // endpoint and its udp port
	vxlan       *underlay.Dest // endpoint and its vxlan port; nil without one
	raw         *underlay.Dest // endpoint, for protocols 4 and 41
	mac         header.MAC     // of its VTEP, if that is told and not learned
	tunAddrs    [2]netip.Addr  // the peer's, where known: IPv4, IPv6
	underlay    []netip.Addr   // the peer's: it may send from them, too
	state       *peerState
}

// peerState is what outlives the tables of one peer: its totals, inner packets and bytes, and what was learned of its VTEP and
// of trains to it.
type peerState struct {
	txPackets, txBytes, rxPackets, rxBytes atomic.Uint64

	heard [2]atomic.Uint64 // probes that have arrived by outer IPv4 and IPv6

	mac       atomic.Pointer[header.MAC] // where its frames come from
	asked     atomic.Int64               // when it was last asked for its MAC, in nanoseconds of Unix time
	questions atomic.Int64               // how often it was asked

	translated atomic.Pointer[Translated]

	dests  [encap.NumModes]*underlay.Dest // the last ones; only for Engine.Update
	probes [encap.NumModes]turns          // guarded by the prober's lock
}

// dest returns the destination of an encapsulation at addr. As long as that is the same, what is known of trains to it stays.
func (s *peerState) dest(m encap.Mode, addr netip.AddrPort, singles bool) *underlay.Dest {
	if s.dests[m] == nil || s.dests[m].Addr() != addr {
		s.dests[m] = underlay.NewDest(addr)
	}
	s.dests[m] = s.dests[m].WithSingles(singles)
	return s.dests[m]
}

// forwarding is everything that the packet loops look up. It is never changed after newForwarding, only replaced.
type forwarding struct {
	table    *route.Table[*target]
	sources  map[netip.Addr]*target // by the underlay address of an outer source
	peers    map[string]*target
	own      []netip.Addr            // this node's underlay addresses
	probes   []netip.Addr            // Local.Probes
	underlay map[netip.Addr]struct{} // of members and of this node: where a nested tunnel packet would go
	tun      [2]netip.Addr           // our own addresses: IPv4, IPv6; invalid if there is none
	mac      header.MAC              // of our VTEP
	detours  []detour
}

// detour is a route to one address of a peer by another encapsulation: a target of its own with the peer's state.
type detour struct {
	prefix netip.Prefix
	to     *target
}

// same reports whether two lookups ended at the same peer, by whatever encapsulation; t may be nil, u not.
func (u *target) same(t *target) bool {
	return t == u || t != nil && t.state != nil && t.state == u.state
}

// newForwarding builds the tables. states finds or makes the state of a peer.
func newForwarding(local Local, peers []Peer, states func(id string) *peerState) *forwarding {
	f := &forwarding{
		mac:      local.VTEPMAC,
		own:      local.Underlay,
		probes:   local.Probes,
		sources:  make(map[netip.Addr]*target, len(peers)),
		peers:    make(map[string]*target, len(peers)),
		underlay: make(map[netip.Addr]struct{}, len(peers)+len(local.Underlay)),
	}
	for _, a := range local.Underlay {
		f.underlay[a] = struct{}{}
	}
	for _, a := range local.TunAddrs {
		f.tun[family(a)] = a
	}
	for _, p := range peers {
		t := &target{
			unreachable: p.Unreachable,
			kernel:      p.Kernel,
			bare:        p.Bare,
			six:         p.Endpoint.Is6(),
			mode:        p.Mode,
			mtu:         int(p.MTU),
			id:          p.ID,
			endpoint:    p.Endpoint,
			underlay:    p.Accept,
			mac:         p.VTEPMAC,
			state:       states(p.ID),
		}
		if p.Endpoint.IsValid() {
			t.udp = t.state.dest(encap.UDP, netip.AddrPortFrom(p.Endpoint, p.UDPPort), p.Singles)
			t.raw = t.state.dest(encap.IPIP, netip.AddrPortFrom(p.Endpoint, 0), false)
			if p.VXLANPort != 0 {
				t.vxlan = t.state.dest(encap.VXLAN, netip.AddrPortFrom(p.Endpoint, p.VXLANPort), p.Singles)
			}
		}
		for _, a := range p.TunAddrs {
			t.tunAddrs[family(a)] = a
		}
		for _, a := range p.Accept {
			f.sources[a] = t
			f.underlay[a] = struct{}{}
		}
		f.peers[p.ID] = t
		for _, d := range p.Detours {
			by := *t
			by.mode, by.mtu = d.Mode, int(d.MTU)
			f.detours = append(f.detours, detour{netip.PrefixFrom(d.Addr, d.Addr.BitLen()), &by})
		}
	}
	f.table = route.Build(f.routes(local, peers))
	return f
}

// routes yields every prefix with its target; this node's own space comes last, so that no peer can hold the same prefix.
func (f *forwarding) routes(local Local, peers []Peer) iter.Seq2[netip.Prefix, *target] {
	return func(yield func(netip.Prefix, *target) bool) {
		for _, p := range peers {
			for _, prefix := range p.Prefixes {
				if !yield(prefix, f.peers[p.ID]) {
					return
				}
			}
		}
		for _, d := range f.detours {
			if !yield(d.prefix, d.to) {
				return
			}
		}
		own := &target{local: true}
		for _, prefix := range local.Prefixes {
			if !yield(prefix, own) {
				return
			}
		}
		for _, a := range local.TunAddrs {
			if !yield(netip.PrefixFrom(a, a.BitLen()), own) {
				return
			}
		}
	}
}

// isTun reports whether a is one of this node's own tun addresses.
func (f *forwarding) isTun(a netip.Addr) bool { return slices.Contains(f.tun[:], a) }

// isOwn reports whether a is in this node's own space: a local pod's, or a tun address.
func (f *forwarding) isOwn(a netip.Addr) bool {
	t, ok := f.table.Lookup(a)
	return ok && t.local
}

// family is 0 for IPv4, 1 for IPv6: the index of per-family pairs.
func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}
