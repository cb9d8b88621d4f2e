package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/cni/conflist"
	"github.com/tulle-net/tulle/internal/hostnet"
	"github.com/tulle-net/tulle/internal/ownership"
	"github.com/tulle-net/tulle/tunnel/encap"
)

// checkOf maps what ownership and gossip name as the topics of their problems to the checks of the doctor.
var checkOf = map[string]string{
	"phase": api.CheckSpace, "full": api.CheckSpace, "fixed": api.CheckSpace, "tie": api.CheckSpace, "lost": api.CheckSpace,
	"twice": api.CheckSpace, "stranded": api.CheckSpace, "save": api.CheckState, "name": api.CheckIdentity,
	"block": api.CheckConfig, "params": api.CheckConfig, "founder": api.CheckCluster, "cluster": api.CheckCluster, "adopt": api.CheckVersions,
	"clone": api.CheckIdentity, "conflict": api.CheckIdentity, "foreign": api.CheckCluster,
	"undecryptable": api.CheckGossip, "udp": api.CheckGossip, "seed": api.CheckGossip, "alone": api.CheckGossip,
}

// hostWrong comes before what Reconcile could not do.
const hostWrong = "the host's network is not as it should be: "

// problems collects the problems of all parts.
func (s *session) problems(v *view) []api.Problem {
	out := of(api.CheckUnderlay, s.underlayProblems()...) // first: others follow from it
	for _, p := range v.status.Problems {
		out = append(out, api.Problem{What: p.What, Remedy: stateLostRemedy(p, s.stateLost, s.cfg.StateDir), Check: checkOf[p.Topic]})
	}
	if err := s.store.Check(); err != nil && !slices.ContainsFunc(v.status.Problems, func(p ownership.Problem) bool { return p.Topic == "save" }) {
		out = append(out, api.Problem{What: "the state cannot be saved: " + err.Error(),
			Remedy: "pods and packets go on; no pod gets an address, and no space is given, until it can be", Check: api.CheckState})
	}
	for _, p := range s.gossip.Problems() {
		out = append(out, api.Problem{What: p.What, Remedy: p.Remedy, Since: p.Since, Last: p.Last, Check: checkOf[p.Topic]})
	}
	for i := range v.peers {
		if p, found := s.peerProblem(v, &v.peers[i]); found {
			out = append(out, p)
		}
	}
	out = append(out, of(api.CheckTunnels, s.vxlanProblem()...)...)
	out = append(out, of(api.CheckFastPath, s.fastProblem()...)...)
	out = append(out, of(api.CheckTrains, s.trainProblems(v)...)...)
	s.mu.Lock()
	conflicts, hostErr, cniErr, again, full := s.conflicts, s.hostErr, s.cniErr, s.taken.problem(time.Now()), s.neighbourTables.problems(time.Now())
	s.mu.Unlock()
	out = append(out, found(api.CheckRoutes, conflicts)...)
	if hostErr != nil {
		out = append(out, api.Problem{What: hostWrong + hostErr.Error(),
			Remedy: "fix what it names; the agent tries again by itself", Check: api.CheckForwarding})
	}
	out = append(out, again...)
	out = append(out, full...)
	out = append(out, of(api.CheckMTU, s.sizeProblems(v.status.Params.Families)...)...)
	out = append(out, of(api.CheckMTU, s.pathsTooSmallFor6(v)...)...)
	if cniErr != nil {
		out = append(out, cniProblem(cniErr, s.cfg.CNIDir))
	}
	return append(out, s.hostProblems(v)...)
}

// stateLostRemedy is the remedy of a problem. Where this run began without a state, though pods were there, their addresses may come back with the
// state directory: pods need no restart then.
func stateLostRemedy(p ownership.Problem, lost bool, dir string) string {
	if p.Topic != "stranded" || !lost {
		return p.Remedy
	}
	return "this agent found no state in " + dir + " when it started, though these pods were there: if that directory was not mounted, or was moved, stop the agent, put it back and start the agent; if it is lost, " + p.Remedy
}

// cniProblem is why container engines do not see this network.
func cniProblem(err error, dir string) api.Problem {
	p := api.Problem{What: err.Error(), Remedy: "mend what it names (see docs/kubernetes.md; a package has docs/ in /usr/share/doc/tulle); the agent tries again by itself", Check: api.CheckCNI}
	switch {
	case errors.Is(err, conflist.ErrNoDir):
		p.Remedy, p.Command = "make it; under systemd restart the service then (systemctl restart tulle), as it can write only where a directory was at its start", "mkdir -p "+dir
	case errors.Is(err, unix.EROFS):
		p.Remedy = "under systemd restart the service (systemctl restart tulle) if the directory is newer, or let it write there: ReadWritePaths=" + dir + " (systemctl edit tulle)"
	}
	return p
}

// of says of problems which check of the doctor they belong to.
func of(check string, list ...api.Problem) []api.Problem {
	for i := range list {
		list[i].Check = check
	}
	return list
}

// found converts problems of the host.
func found(check string, list []hostnet.Problem) (out []api.Problem) {
	for _, p := range list {
		out = append(out, api.Problem{What: p.What, Remedy: p.Remedy, Command: p.Command, Check: check})
	}
	return out
}

// peerProblem is what is wrong with a peer or the path to it.
func (s *session) peerProblem(v *view, p *peerView) (api.Problem, bool) {
	switch m, since, silent := s.unanswered(v, p); {
	case p.unrouted && !p.replaced && !p.path.Up && !s.adrift():
		return api.Problem{
			What:   fmt.Sprintf("no route of this host leads to %s at %v", v.label(p), p.endpoint),
			Remedy: fmt.Sprintf("add a route; or name an address of %s with --underlay there that this host reaches", v.label(p)),
			Since:  p.since, Check: api.CheckUnderlay,
		}, true
	case p.state == api.PeerAlive && silent && !m.IsDirect() && s.translated(p).IsValid():
		return api.Problem{
			What:   fmt.Sprintf("packets of %s arrive from %v, which is none of its addresses, and are dropped: something on the way translates addresses (NAT)", v.label(p), s.translated(p)),
			Remedy: fmt.Sprintf("let packets between %v and %v pass as they are: Tulle does not work through NAT between hosts", s.facing(p.endpoint), p.endpoint),
			Since:  since, Check: api.CheckPaths,
		}, true
	case p.state == api.PeerAlive && silent:
		out := api.Problem{
			What:   fmt.Sprintf("%s is alive for gossip, but %s packets to it are not answered (%s)", v.label(p), m, s.path(p, m).Reason),
			Remedy: fmt.Sprintf("let %s%s pass between %v and %v in both directions", outerText(p, m), fromPorts(m), s.facing(p.endpoint), p.endpoint),
			Since:  since, Check: api.CheckPaths,
		}
		if w := p.directOf(m); w != nil {
			out.Remedy = fmt.Sprintf("let packets between %s addresses of pods pass from %v to %v and back, or add udp to --paths", familyName[b2i(m == encap.Direct6)], s.facing(w.via), w.via)
		}
		return out, true
	case p.state == api.PeerDead && p.probed && p.path.Up && p.otherKey:
		return api.Problem{
			What:   v.label(p) + " is lost for gossip, as the two hosts have different gossip keys, but answers through the tunnel: its routes stay",
			Remedy: "compare `tulle keys list` there and here: copy the key file of the one to the other that has missed a rotation, and restart its agent",
			Since:  p.since, Check: api.CheckGossip,
		}, true
	case p.state == api.PeerDead && p.probed && p.path.Up:
		return api.Problem{
			What:   v.label(p) + " is lost for gossip, but answers through the tunnel: its routes stay",
			Remedy: fmt.Sprintf("let TCP and UDP port %d pass between %v and %v in both directions", s.cfg.GossipPort, s.facing(p.endpoint), p.endpoint),
			Since:  p.since, Check: api.CheckGossip,
		}, true
	case p.lives() && len(p.prefixes) > 0 && !p.replaced && s.noWay(v, p) != "":
		return api.Problem{
			What:   fmt.Sprintf("packets to %s have no way: %s, and --paths names nothing else", v.label(p), s.noWay(v, p)),
			Remedy: "add udp to --paths", Check: api.CheckPaths,
		}, true
	case p.replaced && p.node.IsZero():
		return api.Problem{What: "external peer " + p.name + ": " + p.why, Remedy: s.removal(p), Check: api.CheckOwners}, true
	case p.replaced:
		return api.Problem{What: v.label(p) + " is gone, and its space with it: " + p.why,
			Remedy: "if its disk is lost: tulle forget " + v.argument(p) + "; if it has moved: start its agent", Since: p.since, Check: api.CheckOwners}, true
	case p.state == api.PeerDead && p.gone && s.adrift():
		return api.Problem{What: v.label(p) + " is gone: gossip and data path both lost it",
			Remedy: "mend this host's underlay first: nothing can be said about others", Since: p.since, Check: api.CheckOwners}, true
	case p.state == api.PeerDead && p.gone:
		return api.Problem{What: v.label(p) + " is gone: gossip and data path both lost it",
			Remedy: "start its agent; if it is gone for good: tulle forget " + v.argument(p), Since: p.since, Check: api.CheckOwners}, true
	case !p.endpoint.IsValid() && p.why != "" && (p.lives() || p.node.IsZero()):
		return api.Problem{What: v.label(p) + ": " + p.why, Remedy: "see --underlay", Check: api.CheckUnderlay}, true
	}
	return api.Problem{}, false
}

// unanswered is a way that packets to the peer take and that it does not answer, and since when; ok is false if there is none such.
func (s *session) unanswered(v *view, p *peerView) (m encap.Mode, since time.Time, ok bool) {
	if p.probed && !p.path.Up && (p.path.Probed >= 3 || !p.silent.IsZero()) {
		return p.mode, p.path.Since, true
	}
	for _, m := range directMode { // one family may be answered, the other not
		if i, probed := s.probes.info(p.id, m); probed && !i.Up && i.Probed >= 3 && p.active(v, m) {
			return m, i.Since, true
		}
	}
	return 0, time.Time{}, false
}

// translated is the address from which the peer's packets have come of late that is no member's; invalid if there is none.
func (s *session) translated(p *peerView) netip.Addr {
	const lately = 2 * time.Minute // a path that is down is probed more often
	if t := s.engine.Translated(p.id); time.Since(t.At) < lately {
		return t.From
	}
	return netip.Addr{}
}

// removal says where and how the entries of an external peer are removed.
func (s *session) removal(p *peerView) string {
	const most = 3
	var out []string
	for i, prefix := range p.prefixes {
		if i == most {
			out = append(out, fmt.Sprintf("and %d more: see tulle external list", len(p.prefixes)-most))
			break
		}
		e, _ := s.ownership.Owner(prefix.Addr())
		out = append(out, fmt.Sprintf("on %s: tulle external remove %v", s.ref(e.Owner).Name, prefix))
	}
	return strings.Join(out, "; ")
}

// fromPorts names the source ports of an encapsulation's packets; "" if it has none.
func fromPorts(m encap.Mode) string {
	if m == encap.UDP || m == encap.VXLAN {
		return fmt.Sprintf(" from source ports %d to %d", encap.FirstSourcePort, encap.LastSourcePort)
	}
	return ""
}

// hostProblems returns settings of the host that drop packets.
func (s *session) hostProblems(v *view) (out []api.Problem) {
	var cidrs []netip.Prefix
	for _, f := range v.status.Params.Families {
		cidrs = append(cidrs, f.CIDR)
	}
	add := func(check, what string, list []hostnet.Problem, err error) {
		if err != nil {
			s.log.Debug(what+" not looked at", "error", err)
		}
		out = append(out, found(check, list)...)
	}
	ours := slices.Concat(v.own, s.cfg.PodCIDRs)
	for _, a := range v.strays {
		ours = append(ours, netip.PrefixFrom(a, a.BitLen()))
	}
	list, err := hostnet.OverlapProblems(s.cfg.Tun, cidrs, ours)
	add(api.CheckRoutes, "overlaps of the cluster's space", s.notTold(list), err)
	list, err = hostnet.ForwardProblems(s.cfg.Tun, cidrs)
	add(api.CheckFirewall, "firewall", list, err)
	list, err = hostnet.TranslationProblems(s.cfg.Tun, cidrs)
	add(api.CheckFirewall, "rules of NAT", list, err)
	add(api.CheckConntrack, "connection tracking", hostnet.ConntrackProblems(), nil)
	var members, pods []netip.Addr
	for i := range v.peers {
		members, pods = append(members, v.peers[i].outerAddrs()...), append(pods, v.peers[i].tun...)
	}
	list, err = hostnet.CheckMembers(s.cfg.Tun, members)
	add(api.CheckRoutes, "routes to members", list, err)
	// This node's own address in the pods' space stands for its pods: a rule may name them as sources.
	list, err = hostnet.CheckPods(s.cfg.Tun, slices.Concat(s.link.Addrs, v.tun), pods, s.ownership.ProbeAddrs())
	add(api.CheckRoutes, "routes to pods", list, err)
	if slices.ContainsFunc(s.link.Addrs, netip.Addr.Is4) {
		list, err = hostnet.ReversePathProblems(s.asymmetric(v))
		add(api.CheckRPFilter, "reverse path filter", list, err)
	}
	return out
}

// notTold leaves out the overlaps with routes that Reconcile has found in the way of its own.
func (s *session) notTold(list []hostnet.Problem) []hostnet.Problem {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(list, func(p hostnet.Problem) bool {
		_, what, _ := strings.Cut(p.What, "overlaps this host's ")
		return slices.ContainsFunc(s.conflicts, func(c hostnet.Problem) bool { return strings.HasPrefix(c.What, what+" ") })
	})
}

// asymmetric are the devices by which packets may arrive to whose senders packets leave by another one: the underlay
// address's own device, if packets to a living member leave elsewhere; and all devices toward the members, if IPv4 pods of one of
// them (an agent of an older version) reach this host by the bare underlay. IPv6 has no such filter.
func (s *session) asymmetric(v *view) (out []string) {
	for i := range v.peers {
		p := &v.peers[i]
		if !p.lives() {
			continue
		}
		if !p.host && slices.ContainsFunc(v.tun, netip.Addr.Is4) {
			out = append(append(out, s.sizes.Load().links...), p.leaves...)
		}
		if own := s.current().Iface; len(p.leaves) > 0 && !slices.Contains(p.leaves, own) {
			out = append(out, own)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
