package agent

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/hostnet"
	"github.com/tulle-net/tulle/internal/ownership"
	"github.com/tulle-net/tulle/tunnel/encap"
)

// Status implements api.Backend. It also answers without a session: then Problems has the reason.
func (a *agent) Status(context.Context) (api.Status, error) {
	st := api.Status{Version: api.Version(), Started: a.started, Node: api.Node{Name: a.config().NodeName, Tun: api.Tun{Name: a.cfg.Tun}}}
	s, err := a.current()
	if err == nil && s.view.Load() == nil {
		err = api.Errorf(api.CodeUnhealthy, "the agent is starting").WithRemedy("try again in a moment")
	}
	if err != nil {
		p := api.Problem{What: err.Error()}
		if e, ok := errors.AsType[*api.Error](err); ok {
			p = api.Problem{What: e.Message, Remedy: e.Remedy}
		}
		st.Problems = append(st.Problems, p)
		return st, nil
	}
	s.fill(&st)
	return st, nil
}

// fill adds the data of a session.
func (s *session) fill(st *api.Status) {
	now := time.Now()
	v := s.view.Load()
	st.Ready = s.ready()
	st.Node.ID = v.status.Node.String()
	st.Node.Underlay, st.Node.Interface, st.Node.UnderlayReason = s.link.Addrs, s.current().Iface, s.underlayReason()
	st.Node.Links, st.Node.LinkMTU = s.sizes.Load().links, int(s.linkMTU())
	st.Node.Tun = api.Tun{Name: s.device.Name(), MTU: int(s.tunMTU()), Addresses: v.tun, Queues: len(s.device.Queues())}
	st.Node.UDPPort, st.Node.VXLANPort = s.cfg.UDPPort, s.cfg.VXLANPort
	st.Node.Prefixes, st.Node.Stranded = v.own, v.strays
	st.Node.Blocks = s.blocks(now)
	st.Cluster = s.clusterStatus(v)
	s.fillCounters(st)
	s.fillFast(st)
	direct, all := s.countDirect(v)
	c := &st.Counters
	c.DirectTxPackets, c.DirectTxBytes, c.DirectRxPackets, c.DirectRxBytes = all.TxPackets, all.TxBytes, all.RxPackets, all.RxBytes
	for i := range v.peers {
		st.Peers = append(st.Peers, s.peer(v, &v.peers[i], direct[v.peers[i].id]))
	}
	s.fillGossip(st)
	st.IPAM = s.ipamSummary(v, st.Node.Blocks)
	st.Problems = s.problems(v)
}

func (s *session) blocks(now time.Time) []api.Block {
	resting := s.ownership.Resting(now)
	var out []api.Block
	for _, b := range s.ownership.Blocks() {
		ab := api.Block{Prefix: b.Prefix, Used: b.Used, Size: min(b.Size, api.MaxCount)}
		for _, r := range resting {
			if b.Prefix.Contains(r.Addr) {
				ab.Cooling++
			}
		}
		out = append(out, ab)
	}
	return out
}

func (s *session) clusterStatus(v *view) api.Cluster {
	c := api.Cluster{Isolated: s.gossip.Isolated()}
	if c.Isolated {
		c.Since = s.gossip.AloneSince()
	}
	c.Members, c.Alive = v.members()
	if !v.status.Cluster.IsZero() {
		c.ID = v.status.Cluster.String()
	}
	for _, f := range v.status.Params.Families {
		c.CIDRs = append(c.CIDRs, f.CIDR)
	}
	digest := s.ownership.Digest()
	c.Table = api.Table{Entries: v.status.Entries, Digest: hex.EncodeToString(digest[:8]), Confirmed: v.status.Confirmed}
	return c
}

// peer is one line of `tulle peers`. direct is what was exchanged with it beside the tunnel.
func (s *session) peer(v *view, p *peerView, direct hostnet.Counts) api.Peer {
	count := s.traffic(p.id)
	var leaves []string
	if named := s.sizes.Load().links; slices.ContainsFunc(p.leaves, func(d string) bool { return !slices.Contains(named, d) }) {
		leaves = p.leaves
	}
	out := api.Peer{
		Name: p.name, ID: p.id, Version: p.version, ClockSkewMS: s.probes.skew(p.id).Milliseconds(), State: p.state, Since: p.since, Reason: p.why, Underlay: p.underlay, Leaves: leaves, Prefixes: p.prefixes,
		Path:      s.path(p, p.main(v)),
		TxPackets: count.TxPackets + direct.TxPackets, TxBytes: count.TxBytes + direct.TxBytes,
		RxPackets: count.RxPackets + direct.RxPackets, RxBytes: count.RxBytes + direct.RxBytes,
	}
	for _, m := range s.modes(v, p) {
		out.Candidates = append(out.Candidates, api.Candidate{Path: s.path(p, m), Active: p.active(v, m), Endpoint: s.outer(p, m)})
	}
	return out
}

// familyLabel names the families in JSON and metrics.
var familyLabel = [2]string{"ipv4", "ipv6"}

// path returns the state of one encapsulation to a peer.
func (s *session) path(p *peerView, m encap.Mode) api.Path {
	out := api.Path{Mode: m.String(), State: api.PathProbing, Since: p.since}
	if m.IsDirect() && len(s.view.Load().families()) > 1 {
		out.Family = familyLabel[b2i(m == encap.Direct6)]
	}
	switch {
	case p.state == api.PeerLeft && len(p.prefixes) == 0:
		out.State, out.Reason = api.PathOff, p.why
		return out
	case s.unfit(p, m) != "":
		out.State, out.Reason = api.PathOff, s.unfit(p, m)
		return out
	case p.node.IsZero() && !p.replaced:
		out.State, out.MTU, out.Reason = api.PathUp, int(p.mtu), "external peers are not probed"
		if w := p.directOf(m); w != nil {
			out.MTU = int(w.mtu)
		}
		if m == encap.VXLAN && m == p.mode {
			out.Reason = s.externalVTEP(p)
		}
		return out
	case !p.endpoint.IsValid():
		out.State, out.Reason = api.PathDown, p.why
		return out
	}
	i, ok := s.probes.status(p.id, m)
	if !ok {
		out.Reason = cmp.Or(s.view.Load().unprobed(p), "not probed yet")
		return out
	}
	out.RTTUS, out.Loss, out.MTU, out.Since, out.Reason = i.RTT.Microseconds(), i.Loss, int(i.MTU), i.Since, i.Words
	out.MTULimit, out.Heard = int(s.limit(m, p)), i.Heard
	if m == encap.Direct && !i.Up && i.Probed >= 3 {
		out.Reason += s.strictFilter(p.direct[0].device)
	}
	out.Reason += s.notDirect(p, m)
	switch {
	case i.Up:
		out.State = api.PathUp
	case i.Probed >= 3:
		out.State = api.PathDown
	}
	return out
}

func (s *session) fillCounters(st *api.Status) {
	e := s.engine.Stats()
	st.Drops, st.LastSendError = e.Drops, e.LastSendError
	if pods, err := s.pods.Drops(); err == nil {
		maps.Copy(st.Drops, pods)
	} else {
		s.log.Debug("source checks of pods not looked at", "error", err)
	}
	st.Counters = api.Counters{
		TxPackets: e.TxPackets, TxBytes: e.TxBytes, TxSends: e.TxSends,
		RxPackets: e.RxPackets, RxBytes: e.RxBytes, RxReceives: e.RxReceives, RxWrites: e.RxWrites,
		GSOFallbacks: e.GSOFallbacks, TunFallbacks: e.TunFallbacks, ICMPSent: e.ICMPSent, ICMPReceived: e.ICMPReceived, SocketOverflows: e.SocketOverflows, Probes: e.ProbesSent, ProbeReplies: s.probes.replies.Load(),
		QueueMarks: e.QueueMarks, QueueDelay: e.QueueDelay.Microseconds(),
	}
	if d, err := s.device.Stats(); err == nil {
		st.Counters.TunDrops = d.TxDropped
	}
	s.mu.Lock()
	st.Counters.Repairs = s.repairs
	s.mu.Unlock()
	o := s.device.Offloads()
	st.Offload = api.Offload{TunCSUM: o.CSUM, TunTSO: o.TSO, TunUSO: o.USO, UDPGSO: true, UDPGRO: true}
	if !o.USO {
		st.Offload.Reason = "the kernel takes no UDP super-packets on the TUN (Linux 6.2 does)"
	}
}

func (s *session) fillGossip(st *api.Status) {
	g := s.gossip.Stats()
	st.Gossip = api.Gossip{
		Bind: netip.AddrPortFrom(s.link.Addrs[0], s.cfg.GossipPort), Encrypted: s.cfg.GossipKeyFile != "",
		Undecrypted: g.Undecryptable, Rejected: g.Refused, Health: g.Health, Queued: g.Queue, LastSync: g.LastSync,
	}
	for _, a := range s.link.Addrs {
		st.Gossip.Listens = append(st.Gossip.Listens, netip.AddrPortFrom(a, s.cfg.GossipPort))
	}
	if s.keys != nil {
		st.Gossip.Keys = len(s.keys.Keys())
	}
}

func (s *session) ipamSummary(v *view, blocks []api.Block) api.IPAMSummary {
	var of [2]api.IPAMFamily
	for _, p := range v.own {
		n := api.MaxCount
		if bits := p.Addr().BitLen() - p.Bits(); bits < 62 {
			n = 1 << bits
		}
		f := &of[family(p.Addr())]
		f.Owned += min(n, api.MaxCount-f.Owned)
	}
	for _, b := range blocks {
		f := &of[family(b.Prefix.Addr())]
		f.Used += b.Used
		f.Cooling += b.Cooling
	}
	out := api.IPAMSummary{Used: of[0].Used + of[1].Used, Cooling: of[0].Cooling + of[1].Cooling}
	out.Owned = of[0].Owned + min(of[1].Owned, api.MaxCount-of[0].Owned)
	for _, f := range v.families() {
		of[f].Family = familyLabel[f]
		out.Families = append(out.Families, of[f])
	}
	if v.status.Phase != ownership.Ready {
		out.Waiting = v.status.Why
	}
	return out
}

// outerText names what a firewall sees of packets to a peer.
func outerText(p *peerView, m encap.Mode) string {
	switch m {
	case encap.UDP:
		text := fmt.Sprintf("UDP port %d", p.udpPort)
		if p.bare {
			text += " without UDP checksum (fast_path)"
		}
		return text
	case encap.VXLAN:
		return fmt.Sprintf("UDP port %d", p.vxlanPort)
	}
	return "IP protocol 4 or 41"
}

// routeToHost completes the answer about an address outside the cluster's space: this node's pods reach members' hosts in their own way.
func (s *session) routeToHost(v *view, out *api.RouteAnswer) {
	out.Why = "it is outside the cluster's address space: the host's own routes decide"
	for i := range v.peers {
		p := &v.peers[i]
		if p.node.IsZero() || !slices.Contains(p.underlay, out.Address) {
			continue
		}
		out.Owner = s.ref(p.node)
		why := fmt.Sprintf("it is an underlay address of %s: the host's own packets take the host's routes, and those of its pods", p.name)
		out.Why = why + ", too"
		for _, h := range s.hostRoutes(p) {
			switch {
			case h.Addr != out.Address:
				continue
			case h.Device != "":
				m := directMode[family(h.Addr)]
				out.Encapsulation, out.Why = m.String(), why+" go directly by "+h.Device
				out.Endpoint = s.outer(p, m)
			default:
				out.Encapsulation, out.Why = p.mode.String(), fmt.Sprintf("%s take the tunnel by %s", why, p.mode)
				out.Endpoint = s.outer(p, p.mode)
			}
			out.MTU = h.MTU
		}
		return
	}
}

// route answers `tulle route get`.
func (s *session) route(addr netip.Addr) api.RouteAnswer {
	out := api.RouteAnswer{Address: addr, Kind: api.RouteOutside}
	v := s.view.Load()
	inside := false
	if v != nil {
		for _, f := range v.status.Params.Families {
			inside = inside || f.CIDR.Contains(addr)
		}
	}
	if v == nil || len(v.status.Params.Families) == 0 {
		out.Kind, out.Why = api.RouteNone, "this node is in no cluster yet: see tulle status"
		return out
	}
	if !inside {
		s.routeToHost(v, &out)
		return out
	}
	e, ok := s.ownership.Owner(addr)
	if !ok {
		out.Kind, out.Why = api.RouteNone, "nobody owns it as far as this node knows: packets to it are answered with net unreachable"
		return out
	}
	out.Prefix, out.Version, out.Owner = e.Prefix, e.Version, s.ref(e.Owner)
	if e.Owner == s.ownership.Node() && e.External == nil {
		out.Kind, out.Reachable, out.Encapsulation, out.MTU = api.RouteLocal, true, "direct", int(s.tunMTU())
		out.Why = "this node owns it: a local pod, or unreachable if no pod has it"
		return out
	}
	out.Kind = api.RouteRemote
	if e.External != nil {
		out.Kind = api.RouteExternal
	}
	for i := range v.peers {
		p := &v.peers[i]
		if e.External == nil && p.node != e.Owner || e.External != nil && (!p.node.IsZero() || p.underlay[0] != e.External.Endpoint) {
			continue
		}
		m := p.goes(family(addr))
		path := s.path(p, m)
		out.Endpoint, out.Encapsulation, out.MTU = s.outer(p, m), m.String(), p.peerRoute(e.Prefix).MTU
		out.Reachable = p.endpoint.IsValid() && !p.gone && path.State != api.PathDown && path.State != api.PathOff
		if e.External != nil {
			out.Why = fmt.Sprintf("the external peer at %s has %v since version %d, by %s (%s)", p.name, e.Prefix, e.Version, m, path.Reason)
			return out
		}
		out.Why = fmt.Sprintf("%s owns %v since version %d; its path by %s is %s (%s)",
			v.label(p), e.Prefix, e.Version, m, path.State, path.Reason)
		if p.why != "" && p.why != path.Reason {
			out.Why += "; " + p.why
		}
		return out
	}
	out.Why = "its owner is not known to gossip yet"
	return out
}
