package agent

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/tulle-net/tulle/internal/hostnet"
	"github.com/tulle-net/tulle/tunnel/direct"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/mtu"
	"github.com/tulle-net/tulle/tunnel/path"
)

// directMode is the direct path of a family: 0 is IPv4, 1 is IPv6.
var directMode = [2]encap.Mode{encap.Direct, encap.Direct6}

var familyName = [2]string{"IPv4", "IPv6"}

// directWay is the direct path to a peer for one family of pods' packets.
type directWay struct {
	via    netip.Addr // the peer's underlay address of that family
	device string     // on whose link it is; empty: the path cannot be used
	why    string     // it cannot be used
	probe  netip.Addr // the peer's address for probes
	link   mtu.Link   // MTU of the device and its route
	on     bool       // packets take it
	left   bool       // an earlier run had it in use, and this one has not judged it yet
	mtu    mtu.TUN    // of the peer's routes, while it is on
}

// hop names the next hop.
func (w *directWay) hop() string { return fmt.Sprintf("%v dev %s", w.via, w.device) }

// family is the index of an address's family.
func family(a netip.Addr) int { return b2i(a.Is6()) }

// openDirect makes the device for probes of direct paths. Without it these are off and the encapsulations work.
func (s *session) openDirect() (err error) {
	probed := func(peer string, m encap.Mode, payload []byte, size int) {
		s.probes.received(peer, m, m == encap.Direct6, payload, size)
	}
	reopened := func() {
		s.log.Warn("somebody has removed the device for probes of direct paths, it is there again", "device", hostnet.DirectDevice)
		signal(s.disturbed) // for its routes
	}
	s.direct, s.noDirect = direct.Open(direct.Config{Name: hostnet.DirectDevice, Alias: "direct probes of tulle", Probed: probed, Reopened: reopened})
	if s.noDirect != nil {
		s.log.Warn("direct paths are off, the encapsulations work", "reason", s.noDirect)
	}
	s.nextHops.Store(&map[string]nextHop{})
	if s.neighbours, err = hostnet.OpenNeighbours(); err != nil {
		return err
	}
	list, err := hostnet.LeftDirect()
	s.leftDirect = make(map[netip.Prefix]hostnet.PeerRoute, len(list))
	for _, r := range list {
		s.leftDirect[r.Prefix] = r
	}
	return err
}

// probe sends a probe by whatever way, in an inner packet of IPv6 if six. The direct path of a family has that family only.
func (s *session) probe(peer string, m encap.Mode, six bool, payload []byte, size int) error {
	switch {
	case !m.IsDirect():
		return s.engine.Probe(peer, m, six, payload, size)
	case s.direct == nil:
		return s.noDirect
	}
	if hop, ok := (*s.nextHops.Load())[peer]; ok && hop.index > 0 && m == encap.Direct {
		_ = s.neighbours.Seek(hop.via, hop.index) // where it fails, the probe itself does what it can
	}
	return s.direct.Probe(peer, m, payload, size)
}

// nextHop is a peer's IPv4 underlay address, on the link of the device with an index.
type nextHop struct {
	via   netip.Addr
	index int
}

// probeAddrs are this node's addresses for direct probes.
func (s *session) probeAddrs() []netip.Addr {
	if s.direct == nil {
		return nil
	}
	return s.ownership.ProbeAddrs()
}

// findDirect finds the direct path to a peer for each family of the cluster, and whether packets take it.
func (s *session) findDirect(p *peerView) {
	for f := range p.direct {
		w := &p.direct[f]
		for _, a := range p.underlay {
			if family(a) == f && !w.via.IsValid() {
				w.via = a
			}
		}
		for _, a := range p.probes {
			if family(a) == f {
				w.probe = a
			}
		}
		if w.device, w.why = s.onLink(p, w, f); w.why != "" {
			s.keepUnseen(p, w, f)
			continue
		}
		w.link = mtu.Link(s.ways.To(w.via).MTU)
		if p.node.IsZero() {
			w.on, w.mtu = p.mode == directMode[f], w.link.TUN(0)
			continue
		}
		s.judgeDirect(p, w, f)
	}
}

// keepUnseen keeps the direct route that an earlier run left to a peer of which gossip has told nothing yet, not even where
// probes go: its agent may be starting, too, and its kernel forwards meanwhile.
func (s *session) keepUnseen(p *peerView, w *directWay, f int) {
	if p.replaced || p.node.IsZero() || len(p.tun) > 0 || !w.via.IsValid() {
		return
	}
	for _, prefix := range p.prefixes {
		left, ok := s.leftDirect[prefix]
		if device, _ := s.ways.OnLink(w.via); ok && family(prefix.Addr()) == f && left.Via == w.via && left.Device == device {
			w.on, w.device, w.mtu = true, device, mtu.TUN(left.MTU)
		}
	}
}

// onLink is the device by which a peer is reached without a router, or why it is not.
func (s *session) onLink(p *peerView, w *directWay, f int) (device, why string) {
	ours := slices.ContainsFunc(s.link.Addrs, func(a netip.Addr) bool { return family(a) == f })
	switch {
	case s.noDirect != nil:
		return "", s.noDirect.Error()
	case p.replaced:
		return "", p.why
	case !w.via.IsValid() || !ours:
		return "", "no " + familyName[f] + " underlay address on both sides"
	}
	if device, why = s.ways.OnLink(w.via); why != "" {
		return "", why
	}
	switch {
	case p.node.IsZero():
	case !slices.ContainsFunc(s.probeAddrs(), func(a netip.Addr) bool { return family(a) == f }):
		return "", "this node's block of addresses has none for direct probes"
	case !w.probe.IsValid():
		return "", "the peer has no " + familyName[f] + " address for direct probes: an older version, or a very small block"
	}
	return device, ""
}

// judgeDirect asks the probes whether the path is in use. What an earlier run had in use stays until they have judged it.
func (s *session) judgeDirect(p *peerView, w *directWay, f int) {
	info, judged := s.probes.info(p.id, directMode[f])
	w.mtu = w.link.TUN(0)
	if judged && !info.First {
		w.mtu = min(w.mtu, cmp.Or(info.MTU, path.Base))
	}
	for _, prefix := range p.prefixes {
		left, ok := s.leftDirect[prefix]
		switch {
		case family(prefix.Addr()) != f || !ok:
		case judged:
			delete(s.leftDirect, prefix)
		case left.Via == w.via && left.Device == w.device && slices.ContainsFunc(s.prefer.Load().modes, encap.Mode.IsDirect):
			w.left = true
			if left.MTU > 0 {
				w.mtu = min(w.mtu, mtu.TUN(left.MTU))
			}
		}
	}
	w.on = w.left || s.probes.direct(p.id, f == 1)
}

// directCandidate is the candidate for the schedule of probes.
func (s *session) directCandidate(p *peerView, m encap.Mode) path.Candidate {
	w := p.directOf(m)
	return path.Candidate{Mode: m, Max: w.link.TUN(0), Outer6: m == encap.Direct6, Hop: w.hop(), Left: w.left}
}

// directOf is the direct path that a mode names; nil if it names none.
func (p *peerView) directOf(m encap.Mode) *directWay {
	switch m {
	case encap.Direct:
		return &p.direct[0]
	case encap.Direct6:
		return &p.direct[1]
	}
	return nil
}

// goes is how packets to an address of the peer travel.
func (p *peerView) goes(f int) encap.Mode {
	if p.direct[f].on || p.mode.IsDirect() && !p.node.IsZero() { // nothing but direct paths is configured
		return directMode[f]
	}
	return p.mode
}

// families are those of the cluster's pods: the indexes.
func (v *view) families() (out []int) {
	for _, f := range v.status.Params.Families {
		if i := family(f.CIDR.Addr()); !slices.Contains(out, i) {
			out = append(out, i)
		}
	}
	slices.Sort(out)
	return out
}

// main is the path to show where one is shown: the direct one, if packets of some family take it.
func (p *peerView) main(v *view) encap.Mode {
	for _, f := range v.families() {
		if p.direct[f].on {
			return directMode[f]
		}
	}
	return p.mode
}

// active reports whether packets of some family that the peer has go by m.
func (p *peerView) active(v *view, m encap.Mode) bool {
	return slices.ContainsFunc(v.families(), func(f int) bool {
		has := len(p.prefixes) == 0 || slices.ContainsFunc(p.prefixes, func(x netip.Prefix) bool { return family(x.Addr()) == f })
		return has && p.goes(f) == m
	})
}

// modes are the ways to a peer in the configured order, with a direct one for each family. An external peer has one only.
func (s *session) modes(v *view, p *peerView) (out []encap.Mode) {
	if p.node.IsZero() && !p.replaced {
		return []encap.Mode{p.mode}
	}
	for _, m := range s.prefer.Load().modes {
		if !m.IsDirect() {
			out = append(out, m)
			continue
		}
		for _, f := range v.families() {
			out = append(out, directMode[f])
		}
	}
	return out
}

// updateDirect tells the prober of direct paths where to send, and from where to accept.
func (s *session) updateDirect(v *view) {
	if s.direct == nil {
		return
	}
	put := func(dst *[2]netip.Addr, addrs []netip.Addr) {
		for _, a := range addrs {
			dst[family(a)] = a
		}
	}
	var local direct.Peer
	put(&local.Tun, v.tun)
	put(&local.Probe, s.probeAddrs())
	peers, hops := make(map[string]direct.Peer, len(v.peers)), make(map[string]nextHop, len(v.peers))
	for i := range v.peers {
		p := &v.peers[i]
		var d direct.Peer
		put(&d.Tun, p.tun)
		for f := range p.direct {
			d.Probe[f] = p.direct[f].probe
		}
		if !p.node.IsZero() && !p.replaced {
			peers[p.id] = d
			if w := &p.direct[0]; w.device != "" {
				hops[p.id] = nextHop{w.via, s.ways.Index(w.device)}
			}
		}
	}
	s.nextHops.Store(&hops)
	s.direct.Update(local, peers)
}

// directHost completes the desired state of the host with what direct paths need. Probes of peers are answered whatever
// this node prefers.
func (s *session) directHost(v *view, h *hostnet.State) {
	if s.direct == nil {
		return
	}
	h.Direct, h.ProbeAddrs = s.direct.Device(), s.probeAddrs()
	for i := range v.peers {
		p := &v.peers[i]
		for f := range p.direct {
			if w := &p.direct[f]; w.device != "" && w.probe.IsValid() && !p.node.IsZero() {
				h.NextHops = append(h.NextHops, hostnet.NextHop{Probe: w.probe, Via: w.via, Device: w.device})
			}
		}
	}
}

// peerRoute is the route to a peer's prefix: the direct one, or into the tunnel.
func (p *peerView) peerRoute(prefix netip.Prefix) hostnet.PeerRoute {
	r := hostnet.PeerRoute{Prefix: prefix, MTU: int(p.mtu)}
	if w := &p.direct[family(prefix.Addr())]; w.on {
		r.MTU, r.Via, r.Device = int(w.mtu), w.via, w.device
	}
	if prefix.Addr().Is6() {
		r.MTU = max(r.MTU, mtu.Min6) // the kernel takes no less for IPv6 (RFC 8200 §5)
	}
	return r
}

// strictFilter says that this host itself drops what arrives directly: until the route is made, the way back to a peer's pods
// is the tunnel.
func (s *session) strictFilter(device string) string {
	if found, err := hostnet.ReversePathProblems([]string{device}); err != nil || len(found) == 0 {
		return ""
	}
	return fmt.Sprintf("; the reverse path filter of %s is strict, so this host drops what arrives directly", device)
}

// notDirect says why packets by an encapsulation do not take the direct path, where that is preferred and not possible.
func (s *session) notDirect(p *peerView, m encap.Mode) string {
	var out []string
	v := s.view.Load()
	for _, d := range s.modes(v, p) {
		if d == m {
			break
		}
		if w := p.directOf(d); w != nil && w.why != "" && p.goes(b2i(d == encap.Direct6)) == m {
			out = append(out, "; direct: "+w.why)
		}
	}
	return strings.Join(slices.Compact(out), "")
}

// noWay says why none of the configured ways can be used toward a peer; "" if one can.
func (s *session) noWay(v *view, p *peerView) string {
	var why []string
	for _, m := range s.modes(v, p) {
		u := s.unfit(p, m)
		if u == "" {
			return ""
		}
		why = append(why, m.String()+": "+u)
	}
	return strings.Join(slices.Compact(why), "; ")
}
