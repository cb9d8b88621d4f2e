package agent

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/hostnet"
	"github.com/tulle-net/tulle/internal/ownership"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/membership/gossip"
	"github.com/tulle-net/tulle/tunnel"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
	"github.com/tulle-net/tulle/tunnel/mtu"
	"github.com/tulle-net/tulle/tunnel/path"
)

// view is a snapshot of all peers. It is rebuilt on every change and passed to the engine and the host. The control socket
// reads it. A view is never modified.
type view struct {
	self   string // this node's name
	status ownership.Status
	own    []netip.Prefix
	strays []netip.Addr // of this node's pods, that belong to other nodes now
	tun    []netip.Addr
	peers  []peerView // members by name, then external peers

	bench       []benchDetour // of the benchmarks in force
	benchChange uint64        // their number, for benches.done
}

// peerView is one member or external peer.
type peerView struct {
	id        string
	node      membership.NodeID // zero for an external peer
	name      string
	version   string // of its program; empty if it does not tell
	state     string // api.PeerAlive and so on
	since     time.Time
	underlay  []netip.Addr
	udpPort   uint16
	vxlanPort uint16     // 0: it accepts no vxlan
	vni       uint32     // of its vxlan; this node's if it does not tell
	mac       header.MAC // of its VTEP; zero: to be learned
	endpoint  netip.Addr // the underlay address in use; invalid if none fits ours
	tun       []netip.Addr
	probes    []netip.Addr // where direct probes to it go
	prefixes  []netip.Prefix
	mode      encap.Mode
	link      mtu.Link // largest outer packet that the links toward it carry
	leaves    []string // devices by which packets to it leave; nil without a route
	unrouted  bool     // no route of this host leads to it
	mtu       mtu.TUN
	path      path.Info
	probed    bool
	trains    path.TrainInfo
	direct    [2]directWay // for IPv4 and IPv6 packets
	bench     bool         // it understands requests for benchmarks
	fast      bool         // its kernel takes udp packets of the fast path
	bare      bool         // udp packets to it go by the fast path of this host, without UDP checksum
	host      bool         // it takes packets for its underlay addresses out of the tunnel
	gone      bool         // gossip and data path have both lost it: packets to it are answered with host unreachable
	replaced  bool         // its address is another node's, or no host's: packets for it are not sent there, and packets from there are not its own
	why       string       // reason for the endpoint or the state; may be empty
	otherKey  bool         // gossip with it fails as the two have different keys
	silent    time.Time    // since when it is answered by neither family, of the two in common; else zero
}

// holdDown is how long both gossip and the data path must have lost a node before packets to it are refused. It is long
// enough for a restart of the agent.
const holdDown = 5 * time.Second

// look builds the view. Only the session's loop calls it, which owns gone.
func (s *session) look(now time.Time) *view {
	v := &view{self: s.cfg.NodeName, status: s.ownership.Status(now), own: s.ownership.Prefixes(), strays: strays(s.ownership.Stranded()), tun: s.ownership.TunAddrs()}
	if last := s.view.Load(); last == nil || !slices.Equal(v.tun, last.tun) {
		s.tunSince = now
	}
	prefixes := map[membership.NodeID][]netip.Prefix{}
	external := map[netip.Addr]*peerView{}
	for p, r := range s.ownership.Routes() {
		switch {
		case r.External != nil:
			s.addExternal(now, v, external, p, r)
		case !r.Self:
			prefixes[r.Owner] = append(prefixes[r.Owner], p)
		}
	}
	members := slices.DeleteFunc(s.gossip.Members(), func(m gossip.Member) bool {
		return !m.Meta.Cluster.IsZero() && m.Meta.Cluster != v.status.Cluster
	})
	missing := s.memory.update(now, members, func(id membership.NodeID) bool { return len(prefixes[id]) > 0 })
	for _, m := range members {
		v.peers = append(v.peers, s.memberView(now, remembered{Member: m}, prefixes[m.ID]))
		delete(prefixes, m.ID)
	}
	for _, m := range missing {
		v.peers = append(v.peers, s.memberView(now, m, prefixes[m.ID]))
		delete(prefixes, m.ID)
	}
	s.addUnknown(now, v, prefixes)
	for _, p := range external {
		v.peers = append(v.peers, *p)
	}
	s.externals.keep(v, external)
	if now.Sub(s.started) > unseenFor {
		s.forgetFamilies(v)
	}
	s.answering.forget(now)
	v.yieldAddresses(s.link.Addrs)
	s.benchDetours(v)
	for i := range v.peers {
		s.findDirect(&v.peers[i])
	}
	slices.SortFunc(v.peers, func(a, b peerView) int {
		return cmp.Or(cmp.Compare(b2i(a.node.IsZero()), b2i(b.node.IsZero())), cmp.Compare(a.name, b.name), cmp.Compare(a.id, b.id))
	})
	return v
}

// strays are the addresses of pods that belong to other nodes now, without what is perhaps no pod.
func strays(list []ipam.Allocation) (out []netip.Addr) {
	for _, a := range list {
		if !strings.HasPrefix(a.Key, foundKey) {
			out = append(out, a.Addr)
		}
	}
	return out
}

// yieldAddresses ensures that each underlay address belongs to one peer, because packets from it can be validated against the
// space of only one peer. A host that has lost its disk returns as another node at the same address while gossip and the table
// still have the old one. And the endpoint of an external peer may become that of a member. The live node gets the address. A
// node that has nothing else left is not listed any more.
func (v *view) yieldAddresses(ours []netip.Addr) {
	for i := range v.peers {
		p := &v.peers[i]
		if p.lives() {
			continue
		}
		for _, a := range p.underlay {
			if by := v.livesAt(a, ours); by != "" {
				p.endpoint, p.replaced, p.gone, p.probed, p.path = netip.Addr{}, true, true, false, path.Info{}
				p.why = fmt.Sprintf("its address %v is that of %s now: packets to it are answered with host unreachable", a, by)
			}
		}
	}
	v.peers = slices.DeleteFunc(v.peers, func(p peerView) bool { return p.replaced && len(p.prefixes) == 0 })
}

// livesAt returns the name of the living member (or this node) with an underlay address; "" if there is none.
func (v *view) livesAt(a netip.Addr, ours []netip.Addr) string {
	if slices.Contains(ours, a) {
		return "this node, " + v.self
	}
	for i := range v.peers {
		if p := &v.peers[i]; p.lives() && slices.Contains(p.underlay, a) {
			return v.label(p)
		}
	}
	return ""
}

// nameOf returns the name of the peer with an ID, "" if it is not known.
func (s *session) nameOf(id string) string {
	if v := s.view.Load(); v != nil {
		for i := range v.peers {
			if v.peers[i].id == id {
				return v.peers[i].name
			}
		}
	}
	return ""
}

// addresses are those that session.members returns.
func (v *view) addresses() []netip.Addr {
	var living, known []netip.Addr
	for i := range v.peers {
		p := &v.peers[i]
		switch {
		case p.lives():
			living = append(living, p.underlay...)
		case p.state == api.PeerDead && !p.replaced:
			known = append(known, p.underlay...)
		}
	}
	if len(living) > 0 {
		return living
	}
	return known
}

// lives reports whether gossip considers the peer alive.
func (p *peerView) lives() bool { return p.state == api.PeerAlive || p.state == api.PeerSuspect }

// members counts the members of the cluster, all but those that have left, and how many of them are alive. This node is one until it has left.
func (v *view) members() (all, alive int) {
	if v.status.Phase != ownership.Left {
		all, alive = 1, 1
	}
	for i := range v.peers {
		switch p := &v.peers[i]; {
		case p.lives():
			all, alive = all+1, alive+1
		case p.state == api.PeerDead:
			all++
		}
	}
	return all, alive
}

// label names a peer: by its name, and by its ID too if others have the same name.
func (v *view) label(p *peerView) string {
	if v.unique(p) {
		return p.name
	}
	return fmt.Sprintf("%s (%s)", p.name, p.node.Short())
}

// argument returns a unique name of the peer for the command line.
func (v *view) argument(p *peerView) string {
	if v.unique(p) {
		return p.name
	}
	return p.node.Short()
}

func (v *view) unique(p *peerView) bool {
	n := 0
	for i := range v.peers {
		if v.peers[i].name == p.name {
			n++
		}
	}
	return n == 1 && p.name != v.self
}

// unseenFor is how long the route of an owner stays that gossip has not seen since this agent started: gossip may be blocked
// while the data path works.
const unseenFor = 30 * time.Second

const whyUnseen = "not heard of since this agent started"

// addUnknown adds the owners of which no more is known than the state file has: they died before this node joined, or an older
// version has last seen them. Their space must not look unowned.
func (s *session) addUnknown(now time.Time, v *view, prefixes map[membership.NodeID][]netip.Prefix) {
	if len(prefixes) == 0 {
		return
	}
	known := map[membership.NodeID]ipam.Peer{}
	for _, p := range s.ownership.Peers() {
		known[membership.NodeID(p.ID)] = p
	}
	for id, ps := range prefixes {
		k := known[id]
		p := peerView{
			id: id.String(), node: id, name: cmp.Or(k.Name, id.Short()), state: api.PeerDead, since: s.started,
			udpPort: s.cfg.UDPPort, vxlanPort: s.cfg.VXLANPort, vni: s.cfg.VNI, mac: vtepMAC(id), // as it has them unless it is told otherwise
			prefixes: ps, mode: s.prefer.Load().first(),
			why: whyUnseen,
		}
		if k.Addr.IsValid() {
			p.underlay = []netip.Addr{k.Addr.Addr()}
			p.endpoint, _ = s.endpoint(p.underlay)
		}
		s.findWay(&p)
		p.mtu = s.assumedMTU(&p, s.limit(p.mode, &p))
		p.gone = now.Sub(s.started) > unseenFor && s.traffic(p.id).RxPackets == 0
		v.peers = append(v.peers, p)
	}
}

// assumedMTU is the MTU of a peer's routes until the path MTU is known: what an earlier run of the agent left there, else
// all that the links carry. Less would be safe, but the kernels of pods remember for ten minutes (ip_forward.c and
// ip6_output.c answer for the route; mtu_expires) how little a path took in its first milliseconds.
func (s *session) assumedMTU(p *peerView, limit mtu.TUN) mtu.TUN {
	for _, prefix := range p.prefixes {
		if m := s.leftMTU[prefix]; m != 0 {
			limit = min(limit, mtu.TUN(m))
		}
	}
	return limit
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// memberView builds the view of one member.
func (s *session) memberView(now time.Time, m remembered, prefixes []netip.Prefix) peerView {
	id := m.ID.String()
	p := peerView{
		id: id, node: m.ID, name: m.Name, version: m.Meta.Version, state: m.State.String(), since: m.Since, underlay: m.Meta.Underlay,
		udpPort: m.Meta.UDPPort, vxlanPort: m.Meta.VXLANPort, vni: s.cfg.VNI, mac: m.Meta.VTEPMAC, tun: m.Meta.TunAddrs, probes: m.Meta.ProbeAddrs, prefixes: prefixes, mode: s.mode(id),
		host: m.Meta.Capabilities&membership.CapHostByTunnel != 0, bench: m.Meta.Capabilities&membership.CapBench != 0,
		fast: m.Meta.Capabilities&membership.CapFastPath != 0, otherKey: m.OtherKey || slices.ContainsFunc(m.Meta.Underlay, s.gossip.OtherKey),
	}
	if m.Meta.HasVNI {
		p.vni = m.Meta.VNI
	}
	p.endpoint, p.why = s.endpoint(m.Meta.Underlay)
	s.chooseFamily(now, &p)
	p.bare = p.fast && p.endpoint.Is4() && s.fastCapability() != 0
	// The last words of a node that left and was stopped at once may have been lost. The table has not lost them, and nobody misses a node without space.
	if m.State == gossip.StateDead && len(prefixes) == 0 {
		p.state = api.PeerLeft
	}
	s.findWay(&p)
	limit := s.limit(p.mode, &p)
	p.mtu = limit
	if p.state == api.PeerLeft && len(prefixes) == 0 {
		delete(s.gone, m.ID)
		p.why = "it has left the cluster"
		if m.State == gossip.StateDead {
			p.why = "it is gone and owns no addresses, as after tulle leave"
		}
		return p
	}
	if !p.endpoint.IsValid() {
		return p
	}
	var answers bool // by whatever way
	if p.path, p.probed = s.probes.info(id, p.mode); p.probed {
		answers = s.probes.answering(id)
		p.trains = s.probes.trains(id)
		switch {
		case p.path.First:
			p.mtu = max(s.assumedMTU(&p, limit), min(limit, p.path.MTU))
		case p.path.MTU > 0:
			p.mtu = min(limit, p.path.MTU)
		default:
			p.mtu = min(limit, path.Base)
		}
	}
	// A route is withdrawn only if both gossip and the data path have lost the node for a while: gossip may flap, and probes may be lost.
	dead := m.State == gossip.StateDead || m.State == gossip.StateLeft
	if !dead {
		delete(s.fast.heard, id)
	}
	if dead && !answers && s.fast.hears(now, id) {
		delete(s.gone, m.ID)
		p.why = "gossip has lost it and its agent does not answer, but its kernel carries packets: its routes stay"
		return p
	}
	if !dead || answers {
		delete(s.gone, m.ID)
		if m.State == gossip.StateDead && answers {
			p.why = "gossip has lost it, but it answers through the tunnel: its routes stay"
		}
		return p
	}
	since, ok := s.gone[m.ID]
	if !ok {
		since = now
		s.gone[m.ID] = now
	}
	if m.unseen {
		p.why = whyUnseen
	}
	if p.gone = now.Sub(since) >= holdDown && !(m.unseen && now.Sub(s.started) <= unseenFor); p.gone {
		p.why = fmt.Sprintf("gossip and data path both lost it %v ago: packets to it are answered with host unreachable", now.Sub(since).Round(time.Second))
	}
	return p
}

// mode is the encapsulation of packets to a member.
func (s *session) mode(id string) encap.Mode {
	if m, ok := s.probes.chosen(id); ok {
		return m
	}
	return s.prefer.Load().first()
}

// endpoint picks the peer's underlay address of a family that this node has too, in this node's order of preference.
func (s *session) endpoint(theirs []netip.Addr) (netip.Addr, string) {
	for _, mine := range s.link.Addrs {
		for _, a := range theirs {
			if a.Is4() == mine.Is4() {
				return a, ""
			}
		}
	}
	return netip.Addr{}, fmt.Sprintf("its underlay addresses %v and ours %v have no family in common", theirs, s.link.Addrs)
}

// findWay finds out how packets to a peer leave, by the host's routes.
func (s *session) findWay(p *peerView) {
	p.link = s.linkMTU()
	if p.endpoint.IsValid() {
		w := s.ways.To(p.endpoint)
		if w.MTU > 0 {
			p.link, p.leaves = mtu.Link(w.MTU), w.Devices
		}
		p.unrouted = len(w.Devices) == 0
	}
}

// limit returns the largest inner packet that the links toward a peer and the TUN's MTU allow.
func (s *session) limit(m encap.Mode, p *peerView) mtu.TUN {
	if w := p.directOf(m); w != nil && w.device != "" {
		return w.link.TUN(0)
	}
	return min(p.link.TUN(encap.Overhead(m, p.endpoint.Is6())), s.tunMTU())
}

// outerAddrs are the addresses with which a peer exchanges the tunnel's packets. An external peer that is replaced has none of its own.
func (p *peerView) outerAddrs() []netip.Addr {
	if p.replaced && p.node.IsZero() {
		return nil
	}
	return p.underlay
}

// tunnelPeers converts the view for the engine.
func (v *view) tunnelPeers() []tunnel.Peer {
	out := make([]tunnel.Peer, len(v.peers))
	for i, p := range v.peers {
		accept := p.underlay
		if p.replaced {
			accept = nil
		}
		out[i] = tunnel.Peer{
			ID: p.id, Endpoint: p.endpoint, Accept: accept, UDPPort: p.udpPort, VXLANPort: p.vxlanPort, VTEPMAC: p.mac, Prefixes: p.prefixes,
			TunAddrs: p.tun, Mode: p.mode, MTU: p.mtu, Kernel: p.state == api.PeerExternal || p.fast, Bare: p.bare, Unreachable: p.gone, Singles: p.trains.Off, Detours: v.detours(&p),
		}
	}
	return out
}

// probeTargets returns the peers to probe, and the largest packet to each.
func (s *session) probeTargets(v *view) map[string][]path.Candidate {
	out := make(map[string][]path.Candidate, len(v.peers))
	for _, p := range v.peers {
		if p.node.IsZero() || !p.endpoint.IsValid() || v.unprobed(&p) != "" {
			continue
		}
		six := p.endpoint.Is6()
		for _, m := range s.modes(v, &p) {
			if s.unfit(&p, m) != "" {
				continue
			}
			if m.IsDirect() {
				out[p.id] = append(out[p.id], s.directCandidate(&p, m))
			} else {
				c := path.Candidate{Mode: m, Max: s.limit(m, &p), Outer6: six, Needs: outerText(&p, m)}
				if v.byFamily(&p, m) {
					c.Inner = [2]string{"IP protocol 4", "IP protocol 41"}
				}
				out[p.id] = append(out[p.id], c)
			}
		}
	}
	return out
}

// unprobed says why no probes go to a member: they travel between the tun addresses of both nodes. "" if they do.
func (v *view) unprobed(p *peerView) string {
	common := func(a netip.Addr) bool {
		return slices.ContainsFunc(p.tun, func(b netip.Addr) bool { return a.Is4() == b.Is4() })
	}
	switch {
	case len(p.prefixes) == 0:
		return "it has no address space yet, so nothing to probe"
	case len(p.tun) == 0 && (p.state == api.PeerAlive || p.state == api.PeerSuspect):
		return "it has not announced its pod addresses yet, so nothing to probe"
	case len(p.tun) == 0:
		return "not probed: not heard of by gossip"
	case len(v.tun) == 0:
		return "this node has no pod addresses yet, so nothing is probed"
	case !slices.ContainsFunc(v.tun, common):
		return fmt.Sprintf("its pod addresses %v and this node's %v have no family in common, so nothing is probed", p.tun, v.tun)
	}
	return ""
}

// byFamily reports that IPv4 and IPv6 packets to the peer look different to the network, and that pods have both: one may be filtered and
// the other not.
func (v *view) byFamily(p *peerView, m encap.Mode) bool {
	both := func(addrs []netip.Addr) bool {
		return slices.ContainsFunc(addrs, netip.Addr.Is4) && slices.ContainsFunc(addrs, netip.Addr.Is6)
	}
	return m == encap.IPIP && both(v.tun) && both(p.tun)
}

// hostRoutes are the underlay addresses of a member that this node's pods reach through the tunnel: while gossip or the
// path says that it is there, and the path is not down. Otherwise they try the underlay, as they would without Tulle.
func (s *session) hostRoutes(p *peerView) (out []hostnet.HostRoute) {
	down := p.probed && !p.path.Up && p.path.Probed >= 3
	if p.host && !p.replaced {
		for f := range p.direct {
			if w := &p.direct[f]; w.on {
				out = append(out, hostnet.HostRoute{Addr: w.via, MTU: int(w.mtu), Device: w.device})
			}
		}
	}
	if !p.host || p.replaced || p.gone || down || !p.lives() && !p.path.Up {
		return out
	}
	for _, a := range p.underlay {
		m := int(p.mtu)
		if a.Is6() {
			m = max(m, mtu.Min6)
		}
		if w := &p.direct[family(a)]; !slices.Contains(s.link.Addrs, a) && !(w.on && w.via == a) {
			out = append(out, hostnet.HostRoute{Addr: a, MTU: m})
		}
	}
	return out
}

// unseenHosts are the host routes of an earlier run to members that gossip has not seen yet in this one: they stay as long
// as those members' other routes do.
func (s *session) unseenHosts(v *view) (out []hostnet.HostRoute) {
	if time.Since(s.started) > unseenFor {
		return nil
	}
	for _, h := range s.leftHosts {
		if v.livesAt(h.Addr, s.link.Addrs) == "" {
			out = append(out, h)
		}
	}
	return out
}

// hostState converts the view to the desired state of the host.
func (s *session) hostState(v *view) hostnet.State {
	m := s.masquerade.Load()
	h := hostnet.State{
		Tun: s.cfg.Tun, MTU: int(s.tunMTU()), TunAddrs: v.tun, Own: v.own, Strays: v.strays, Masquerade: m.on, NoMasquerade: m.except,
		Members:     slices.Clone(s.link.Addrs),
		Uplinks:     s.ways.Devices(s.sizes.Load().links...),
		TunnelPorts: []uint16{s.cfg.UDPPort, s.cfg.VXLANPort},
	}
	for _, f := range v.status.Params.Families {
		h.ClusterCIDRs = append(h.ClusterCIDRs, f.CIDR)
	}
	if time.Since(s.started) <= unseenFor { // gossip may not have told of all of them yet
		h.Members = append(h.Members, slices.DeleteFunc(slices.Clone(s.leftMembers), v.refused)...)
	}
	for _, p := range v.peers {
		h.Members = append(h.Members, p.outerAddrs()...)
		for _, prefix := range p.prefixes {
			h.Peers = append(h.Peers, p.peerRoute(prefix))
		}
		h.Hosts = append(h.Hosts, s.hostRoutes(&p)...)
	}
	for _, r := range s.unseenHosts(v) {
		if !slices.ContainsFunc(h.Hosts, func(o hostnet.HostRoute) bool { return o.Addr == r.Addr }) {
			h.Hosts = append(h.Hosts, r)
		}
	}
	s.directHost(v, &h)
	v.benchHost(&h)
	if s.no6(v.status.Params.Families).What != "" {
		return without6(h)
	}
	return h
}
