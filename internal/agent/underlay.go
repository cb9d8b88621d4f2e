package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/config"
	"github.com/tulle-net/tulle/internal/hostnet"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/membership/gossip"
	"github.com/tulle-net/tulle/membership/seed"
)

const (
	underlayRetry = 2 * time.Second // a host that boots gets its addresses one after the other
	// namesPatience is how long the choice waits for the other names after the first has an address.
	namesPatience = 2 * time.Second
	// lostPatience is how long an address may be gone, as while an interface is restarted, before another one is used.
	lostPatience = 5 * time.Second
	// replacedPatience is how long it may be gone when another one has come in its place: a manager of the network that makes an interface
	// again gives it one address after the other.
	replacedPatience = 300 * time.Millisecond
	// cutOffPatience is how long no path to any member may have been up, after the three seconds of silence in which a path fails, before the
	// node counts as alone. Gossip takes longer to find that out: about five seconds for each member.
	cutOffPatience = 2 * time.Second
	// renumberPatience is how long all addresses in use may be deprecated before the first host changes; a renewal may be late.
	renumberPatience = 20 * time.Second
	// renumberSlot is the time that each host has for its change, which takes two or three seconds.
	renumberSlot = 10 * time.Second
)

// awaitUnderlay finds the address that carries the tunnel, waiting for it as long as it takes.
func (a *agent) awaitUnderlay(ctx context.Context, s *session, state *ipam.State) error {
	s.podSpace = slices.Clone(a.cfg.ClusterCIDRs)
	if state != nil {
		for _, p := range state.Peers {
			s.peers = append(s.peers, p.Addr.Addr())
		}
		for _, f := range state.Families {
			s.podSpace = append(s.podSpace, f.CIDR)
		}
	}
	last := readLastUnderlay(runFile(a.cfg, "underlay"))
	var lines changeLog
	told := ""
	for began := time.Now(); ; {
		a.starting.beat()
		changed := a.seeds.Changed()
		seeds := a.seeds.All()
		link, err := hostnet.DetectUnderlay(s.sought(a.cfg, last))
		if err == nil && (link.By == hostnet.ByOperator || allTried(seeds) || time.Since(began) > namesPatience) {
			s.link = link
			own, err := hostnet.LocalAddrs()
			s.own.Store(&own)
			return err
		}
		if err != nil && !errors.Is(err, hostnet.ErrNotYet) {
			return err
		}
		if err != nil && time.Since(began) > namesPatience/4 {
			lines.log(a.log, slog.LevelWarn, err.Error(), "no underlay address yet, waiting for one", "reason", err)
			if err.Error() != told {
				told = err.Error()
				a.wait(waitingFor(err, seeds))
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		case <-time.After(underlayRetry / 4):
		}
	}
}

// waitingFor is what status says while there is no underlay address.
func waitingFor(err error, seeds []seed.Seed) api.Problem {
	p := api.Problem{What: "no underlay address yet: " + err.Error(), Remedy: "bring the interface up, or name it with --underlay"}
	if e, ok := errors.AsType[hostnet.VRFError](err); ok {
		p.Remedy = fmt.Sprintf("take %s out of the VRF %s, or name another interface with --underlay", e.Device, e.VRF)
	}
	for _, s := range seeds {
		if s.Unresolved() {
			p.Remedy = "correct --join, or the name server, or write addresses; or name the interface with --underlay. The names are looked up again and again"
		}
	}
	return p
}

func allTried(seeds []seed.Seed) bool {
	return !slices.ContainsFunc(seeds, func(s seed.Seed) bool { return !s.Tried })
}

// sought is what the choice of the underlay goes by.
func (u *underlay) sought(cfg config.Config, last lastUnderlay) hostnet.Sought {
	s := hostnet.Sought{
		Interface: cfg.Underlay.Interface, Addresses: cfg.Underlay.Addresses, Tun: cfg.Tun, Pods: u.podSpace,
		Peers: u.peers, Last: last.Addrs, LastBy: last.By, Device: last.Device,
	}
	s.Seeds, s.Unknown = seedAddrs(u.seeds.All())
	if cfg.ForceBootstrap {
		s.Unknown = "" // whoever forces a start says that these seeds are not there
	}
	return s
}

// seedAddrs are the addresses of each seed that has some, and in words the seeds that have none.
func seedAddrs(seeds []seed.Seed) (known [][]netip.Addr, unknown string) {
	var names []string
	for _, e := range seeds {
		if e.Unresolved() {
			text := fmt.Sprintf("seed %s (%s", e.Name, e.Why())
			if !e.Since.IsZero() {
				text += ", since " + e.Since.Format(time.TimeOnly)
			}
			names = append(names, text+")")
			continue
		}
		var addrs []netip.Addr
		for _, a := range e.Addrs {
			addrs = append(addrs, a.Addr())
		}
		known = append(known, addrs)
	}
	return known, strings.Join(names, ", ")
}

// lastUnderlay is what a run leaves for the next one: the same address is taken again while the host has it, though by then
// something else may look better.
type lastUnderlay struct {
	Addrs  []netip.Addr  `json:"addrs"`
	By     hostnet.Basis `json:"by"`
	Device string        `json:"device"` // that had them
}

// readLastUnderlay reads what writeLastUnderlay wrote. Without it the choice is made afresh, so errors do not count.
func readLastUnderlay(path string) lastUnderlay {
	var last lastUnderlay
	b, err := os.ReadFile(path)
	if err != nil || json.Unmarshal(b, &last) != nil {
		return lastUnderlay{}
	}
	return last
}

func writeLastUnderlay(path string, link hostnet.Underlay) error {
	b, err := json.Marshal(lastUnderlay{link.Addrs, link.By, link.Iface})
	if err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}

// An underlayChange ends a session: the address on which everything hangs is no longer the one to use.
type underlayChange struct{ why string }

// underlayMove is a change of the underlay address.
type underlayMove struct {
	at      time.Time
	addrs   []netip.Addr // before it
	why     string
	members []netip.Addr // the addresses of members before it
	both    bool         // this run has had addresses of both families at some time
}

func (e *underlayChange) Error() string { return "the underlay address changes: " + e.why }

// orLost turns the kernel's answer that an underlay address cannot be bound to into an underlayChange: the host has lost the
// address since it was chosen, perhaps for a moment only. Choosing anew mends that.
func (s *session) orLost(err error) error {
	if errors.Is(err, unix.EADDRNOTAVAIL) {
		return &underlayChange{fmt.Sprintf("%s went away before it was in use (%v)", listed(s.link.Addrs), err)}
	}
	return err
}

// checkUnderlay looks whether the underlay in use is still there. It ends the session for a reason, and not otherwise.
func (s *session) checkUnderlay(now time.Time) error {
	kept, err := hostnet.KeptUnderlay(s.current())
	if err != nil {
		s.log.Debug("underlay not looked at", "error", err)
		return nil
	}
	s.resize(kept.Underlay)
	s.own.Store(&kept.Host)
	s.sightings.look(kept.Host, now)
	s.listenBeside(kept)
	if was := s.kept.Swap(&kept); len(kept.Lost) == 0 {
		s.lostSince = time.Time{}
		if was != nil && len(was.Lost) > 0 {
			s.log.Info("the underlay address is back", "addrs", was.Lost)
		}
	} else if s.lostSince.IsZero() {
		s.lostSince = now
		s.log.Warn("this host has lost an underlay address, waiting for it to come back", "lost", kept.Lost)
	}
	last := lastUnderlay{By: s.link.By, Device: kept.Iface}
	for _, a := range s.link.Addrs {
		if !slices.Contains(kept.Lost, a) {
			last.Addrs = append(last.Addrs, a)
		}
	}
	sought := s.sought(s.cfg, last)
	sought.Pods = s.podsNow()
	if m := s.members(); len(m) > 0 {
		sought.Peers = m
	}
	next, err := hostnet.DetectUnderlay(sought)
	if err != nil {
		s.log.Debug("no other underlay", "error", err)
		return nil // there is nothing to change over to
	}
	lost := !s.lostSince.IsZero() && now.Sub(s.lostSince) >= lostPatience
	if at := s.sightings.replaced(s.lostSince, kept, next); !at.IsZero() && !lost {
		if lost = now.Sub(at) >= replacedPatience; !lost {
			time.AfterFunc(replacedPatience-now.Sub(at), func() { signal(s.disturbed) })
		}
	}
	alone := s.alone(now)
	if a := next.Addrs[0]; a != s.found {
		s.found = a
		if a != s.link.Addrs[0] && letGo(s.link, kept, next, false, true, false, false) != "" {
			s.askAll(now)
		}
	}
	if why := letGo(s.link, kept, next, lost, alone, kept.More.IsValid() && s.wants(kept.More), s.moved.both); why != "" {
		return &underlayChange{why}
	}
	if why := s.renumbered(now, kept, sought); why != "" {
		return &underlayChange{why}
	}
	return nil
}

// renumbered decides whether the underlay in use, all of which is deprecated, gives way to an address that is meant to last: it returns the
// reason, or "". All hosts of a network are renumbered at once, and lose the old addresses at once. If they kept them until then, none
// would know where another one is. So they change before, one after the other.
func (s *session) renumbered(now time.Time, kept hostnet.Kept, sought hostnet.Sought) string {
	if len(kept.Stale) < len(s.link.Addrs) {
		s.renumberAt = time.Time{}
		return ""
	}
	if s.renumberAt.IsZero() {
		s.renumberAt = now.Add(s.turn())
	}
	if now.Before(s.renumberAt) {
		return ""
	}
	s.renumberAt = now.Add(reconcileEvery)
	sought.Last, sought.Device = nil, kept.Iface
	next, err := hostnet.DetectUnderlay(sought)
	if err != nil || !replaces(kept, next.Addrs[0]) {
		return ""
	}
	if err := writeLastUnderlay(runFile(s.cfg, "underlay"), next); err != nil {
		s.log.Debug("the next underlay is not remembered", "error", err)
		return "" // the next session would choose the present one again
	}
	return fmt.Sprintf("%s will not last (deprecated); %s on %s takes over", listed(kept.Stale), listed(next.Addrs), next.Iface)
}

// replaces reports whether an address can take the place of those that are deprecated: it reaches as far.
func replaces(kept hostnet.Kept, a netip.Addr) bool {
	was := kept.Stale[0]
	return slices.Contains(kept.Fresh, a) && a.Is4() == was.Is4() && a.IsPrivate() == was.IsPrivate()
}

// turn is how long this node waits with a change that all hosts have to make: the order of the IDs is that of the hosts.
func (s *session) turn() time.Duration {
	const slots = 30 // of more hosts, enough stay where they are at any time
	before := 0
	if v := s.view.Load(); v != nil {
		for i := range v.peers {
			if !v.peers[i].node.IsZero() && v.peers[i].node.Compare(v.status.Node) < 0 {
				before++
			}
		}
	}
	return renumberPatience + time.Duration(before%slots)*renumberSlot
}

// alone reports whether this node reaches no other member: gossip says so, or no path is up that was.
func (s *session) alone(now time.Time) bool {
	since := s.cutOffSince()
	return s.gossip.Alive() == 0 || !since.IsZero() && now.Sub(since) >= cutOffPatience
}

// cutOffSince is since when no path to any peer is up; zero if one is, or none was in this session.
func (s *session) cutOffSince() (since time.Time) {
	v := s.view.Load()
	if v == nil {
		return since
	}
	for i := range v.peers {
		switch p := &v.peers[i]; {
		case !p.probed:
		case p.path.Up || s.probes.answering(p.id):
			return time.Time{}
		case p.path.RTT > 0 && p.path.Since.After(since):
			since = p.path.Since
		}
	}
	return since
}

// askAll probes all peers now, also those to which nothing flows: the route to them leads elsewhere than before, as when a link has failed.
func (s *session) askAll(now time.Time) {
	if v := s.view.Load(); v != nil {
		for i := range v.peers {
			if v.peers[i].probed {
				s.probes.poke(now, v.peers[i].id)
			}
		}
	}
}

// sightings are the times at which this host's addresses were first seen in a session; zero for those that were there when it began.
type sightings map[netip.Addr]time.Time

func (m *sightings) look(host []netip.Addr, now time.Time) {
	if *m == nil {
		*m, now = sightings{}, time.Time{}
	}
	for _, a := range host {
		if _, known := (*m)[a]; !known {
			(*m)[a] = now
		}
	}
}

// replaced returns when each lost address had another one in its place: a new one of the same subnet on the same interface, which came when the
// lost one went, or shortly before. One that was there all the time may be virtual, and takes over only after lostPatience. The result is zero if
// there is a lost address without a new one.
func (m sightings) replaced(since time.Time, k hostnet.Kept, next hostnet.Underlay) (at time.Time) {
	at = since
	for _, lost := range k.Lost {
		i := slices.IndexFunc(next.Addrs, func(a netip.Addr) bool {
			return a.Is4() == lost.Is4() && slices.Contains(k.Near, a) && since.Sub(m[a]) < lostPatience
		})
		if i < 0 {
			return time.Time{}
		}
		if seen := m[next.Addrs[i]]; seen.After(at) {
			at = seen
		}
	}
	return at
}

// podsNow is the cluster's address space as known now: a node that joins for the first time learns it from the others.
func (s *session) podsNow() []netip.Prefix {
	out := slices.Clone(s.podSpace)
	for _, f := range s.ownership.Params().Families {
		out = append(out, f.CIDR)
	}
	return out
}

// members are the underlay addresses of the members that have not left; of the living ones, if there are any.
func (s *session) members() []netip.Addr {
	if v := s.view.Load(); v != nil {
		return v.addresses()
	}
	return nil
}

// current is the underlay in use as the host has it now: its address may have moved to another device, and a device may have got
// another name.
func (s *session) current() hostnet.Underlay {
	if k := s.kept.Load(); k != nil {
		return k.Underlay
	}
	return s.link
}

// facing is this host's address of the family of a peer's address.
func (s *session) facing(peer netip.Addr) netip.Addr {
	for _, a := range s.link.Addrs {
		if a.Is4() == peer.Is4() {
			return a
		}
	}
	return s.link.Addrs[0]
}

// owns reports whether an address leads to this host, so that a seed which has it is this node.
func (s *session) owns(a netip.Addr) bool {
	own := s.own.Load()
	return a.IsLoopback() || a.IsUnspecified() || slices.Contains(s.link.Addrs, a) || own != nil && slices.Contains(*own, a)
}

// listenBeside lets gossip answer at the other addresses of the underlay interface as well: a virtual address is what others may
// have as their seed.
func (s *session) listenBeside(k hostnet.Kept) {
	pods := s.podsNow()
	inPods := func(a netip.Addr) bool {
		return slices.ContainsFunc(pods, func(p netip.Prefix) bool { return p.Contains(a) })
	}
	err := s.gossip.Listen(slices.DeleteFunc(k.Beside, inPods))
	s.besideKnown = !errors.Is(err, gossip.ErrNotRunning)
	if err != nil && s.besideKnown {
		s.log.Debug("gossip does not listen at each address of the interface", "error", err)
	}
}

// letGo decides whether an underlay in use gives way to the next one: it returns the reason, or "" to keep what works. lost says
// that addresses have been gone for long enough, alone that no other member is in sight, wanted that somebody can only be reached
// by the family that this host has got meanwhile, again that it had that family before.
func letGo(use hostnet.Underlay, kept hostnet.Kept, next hostnet.Underlay, lost, alone, wanted, again bool) string {
	switch {
	case len(kept.Lost) > 0:
		if !lost || slices.Equal(use.Addrs, next.Addrs) {
			return ""
		}
		return fmt.Sprintf("this host has lost %s; %s on %s takes over (%s)", listed(kept.Lost), listed(next.Addrs), next.Iface, next.Why)
	case alone && use.By != hostnet.ByOperator && (next.By == hostnet.BySeeds || next.By == hostnet.ByPeers) && next.Addrs[0] != use.Addrs[0]:
		return fmt.Sprintf("no other member is in sight from %s; %s on %s may be better: %s", listed(use.Addrs), listed(next.Addrs), next.Iface, next.Why)
	case alone && next.By == hostnet.ByRoute && next.Addrs[0] != use.Addrs[0]:
		return fmt.Sprintf("no member is known, and %s is on %s, a bridge of containers; %s on %s is better: %s", listed(use.Addrs), use.Iface, listed(next.Addrs), next.Iface, next.Why)
	case kept.More.IsValid() && wanted:
		return fmt.Sprintf("this host has got %v, and some member or seed can only be reached by that family", kept.More)
	case kept.More.IsValid() && again:
		return fmt.Sprintf("this host has got %v, and had an address of that family before", kept.More)
	case kept.More.IsValid() && alone:
		return fmt.Sprintf("this host has got %v, an address of the other family", kept.More)
	}
	return ""
}

// wants reports whether a seed or a member can only be reached by the family of an address that this host has got.
func (s *session) wants(more netip.Addr) bool {
	only := func(addrs []netip.Addr) bool {
		return len(addrs) > 0 && !slices.ContainsFunc(addrs, func(a netip.Addr) bool { return a.Is4() != more.Is4() })
	}
	for _, e := range s.seeds.All() {
		var addrs []netip.Addr
		for _, a := range e.Addrs {
			addrs = append(addrs, a.Addr())
		}
		if only(addrs) {
			return true
		}
	}
	v := s.view.Load()
	return v != nil && slices.ContainsFunc(v.peers, func(p peerView) bool { return p.lives() && only(p.underlay) })
}

// underlayReason says why this address is used, and what was before it.
func (s *session) underlayReason() string {
	why := s.link.Why
	if m := s.moved; m.why != "" {
		why += fmt.Sprintf("; until %s it was %s: %s", m.at.Format(time.DateTime), listed(m.addrs), m.why)
	}
	return why
}

// underlayProblems is what is wrong with the underlay in use.
func (s *session) underlayProblems() []api.Problem {
	k := s.kept.Load()
	if k == nil {
		return nil
	}
	var out []api.Problem
	if k.VRF != "" {
		out = append(out, api.Problem{What: fmt.Sprintf("underlay address %s is in the VRF %s, from where the agent's sockets and the pods' routes cannot use it", listed(k.Lost), k.VRF),
			Remedy: fmt.Sprintf("take %s out of the VRF; after %v another address takes over from which a route leads to the members or seeds, if there is one", k.Iface, lostPatience)})
	} else if len(k.Lost) > 0 {
		out = append(out, api.Problem{What: fmt.Sprintf("this host has lost its underlay address %s", listed(k.Lost)),
			Remedy: fmt.Sprintf("give it back to an interface; after %v another address of %s, or of the bridge or bond of which it has become a part, takes over, or one from which a route leads to the members or seeds, if there is one", lostPatience, k.Iface)})
	}
	if k.Down != "" {
		out = append(out, api.Problem{What: fmt.Sprintf("the underlay interface %s", k.Down), Remedy: "bring it up, or plug it in; the address stays in use"})
	}
	return out
}

// adrift reports whether the underlay in use has lost an address, or its device carries no packets.
func (s *session) adrift() bool {
	k := s.kept.Load()
	return k != nil && (len(k.Lost) > 0 || k.Down != "")
}

func listed(addrs []netip.Addr) string {
	var out []string
	for _, a := range addrs {
		out = append(out, a.String())
	}
	return strings.Join(out, ", ")
}
