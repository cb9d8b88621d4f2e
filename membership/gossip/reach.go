package gossip

import (
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/membership"
)

// reach finds the addresses to try for a member: the one that it announces, then those of the other family in its metadata; those
// that this host has no address for are left out. So two hosts of which one announces IPv4 and the other IPv6 reach each other if
// they have one family in common, and no host has to choose the same as the others.
func (g *Gossip) reach(tr *transport) func(string, netip.AddrPort) []netip.AddrPort {
	return func(name string, to netip.AddrPort) []netip.AddrPort {
		g.mu.RLock()
		defer g.mu.RUnlock()
		list := []netip.AddrPort{to}
		if id, err := membership.ParseNodeID(name); err == nil && g.peers[id] != nil && g.peers[id].Addr == to {
			list = addrsOf(g.peers[id], to)
		} else if name == "" {
			for _, p := range g.peers {
				if p.Addr == to {
					list = addrsOf(p, to)
				}
			}
		}
		usable := slices.DeleteFunc(slices.Clone(list), func(a netip.AddrPort) bool { return tr.sockFor(a.Addr()) == nil })
		if len(usable) == 0 {
			return list[:1]
		}
		return usable
	}
}

// doubtFor is how long a member gets datagrams by both families after a probe of it has failed: a firewall may drop those of one, and
// nothing tells. Where it still does after that, one more probe fails, and the member is suspect for a moment.
const doubtFor = 10 * time.Minute

// doubt records that datagrams to or from a member are lost.
func (g *Gossip) doubt(name string) {
	id, err := membership.ParseNodeID(name)
	if err != nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if p := g.peers[id]; p != nil {
		p.doubted = time.Now()
	}
}

// doubts reports whether a member gets datagrams at all its addresses.
func (g *Gossip) doubts(name string) bool {
	id, err := membership.ParseNodeID(name)
	if err != nil {
		return false
	}
	g.mu.RLock()
	defer g.mu.RUnlock()
	p := g.peers[id]
	return p != nil && !p.doubted.IsZero() && time.Since(p.doubted) < doubtFor
}

// addrsOf are a member's announced address and those of the other family at the same port.
func addrsOf(p *peer, to netip.AddrPort) []netip.AddrPort {
	list := []netip.AddrPort{to}
	for _, a := range p.Meta.Underlay {
		if a.Is4() != to.Addr().Is4() {
			list = append(list, netip.AddrPortFrom(a, to.Port()))
		}
	}
	return list
}

// near is the gossip address of a member that this node uses: the one that it announces, if this host has an address of that
// family, or else its other one.
func (g *Gossip) near(p *peer) netip.AddrPort {
	if !p.Addr.IsValid() || g.reaches(p.Addr.Addr()) {
		return p.Addr
	}
	for _, a := range addrsOf(p, p.Addr) {
		if g.reaches(a.Addr()) {
			return a
		}
	}
	return p.Addr
}

// nearOf is that address of a member of which memberlist has told.
func (g *Gossip) nearOf(s sighting) netip.AddrPort {
	meta, err := membership.DecodeMeta(s.meta)
	if err != nil {
		return s.addr
	}
	return g.near(&peer{Member: Member{Addr: s.addr, Meta: meta}})
}

// asSeen is a member as this node sees it.
func (g *Gossip) asSeen(p *peer) Member {
	m := p.Member
	m.Addr = g.near(p)
	m.OtherKey = !p.otherKey.IsZero() && time.Since(p.otherKey) < problemExpiry
	return m
}
