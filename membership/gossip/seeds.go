package gossip

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/membership/seed"
)

// attempt is what the last attempt on one address of a seed came to. Under Gossip.mu.
type attempt struct {
	busy   bool // one is under way
	ended  bool // one has ended
	self   bool // this node itself answered there
	reason string
	remedy string
	since  time.Time // of the reason
}

// parallelAttempts bounds how many addresses of seeds are tried at once. A silent one takes seconds, and must not hold up the others.
const parallelAttempts = 16

var errNoFamily = errors.New("no address of its family")

// joinRound starts an attempt on every address of every seed, and on some of the last known peers if that was not enough the
// round before. It does not wait: whoever answers first lets the node in.
func (g *Gossip) joinRound(ctx context.Context, again bool) {
	tried := 0
	for _, s := range g.Seeds() {
		for _, a := range s.Addrs {
			if !a.Self && a.reachable {
				tried++
				if !g.isLive(a.Addr) {
					g.try(ctx, a.Addr)
				}
			}
		}
	}
	if again || tried == 0 {
		for _, a := range g.missingPeers(isolatedSample) {
			g.try(ctx, a)
		}
	}
}

// healRound tries a few of those that are not alive, and an address of a seed: all of
// those that were never tried, because another member was faster.
func (g *Gossip) healRound(ctx context.Context) {
	if missing := g.missingPeers(healSample); len(missing) > 0 {
		g.joinAll(ctx, missing)
	}
	for _, a := range g.seedAddrsToTry() {
		if g.isLive(a) {
			g.ended(a, false, nil)
			continue
		}
		g.try(ctx, a)
	}
}

func (g *Gossip) seedAddrsToTry() []netip.AddrPort {
	var never, all []netip.AddrPort
	for _, s := range g.Seeds() {
		for _, a := range s.Addrs {
			if a.Self || !a.reachable {
				continue
			}
			if all = append(all, a.Addr); !a.Tried {
				never = append(never, a.Addr)
			}
		}
	}
	if len(never) == 0 && len(all) > 0 {
		return []netip.AddrPort{all[rand.IntN(len(all))]}
	}
	return never
}

// callSeeds makes a member of a cluster try the seeds that are silent every few seconds. They may come back without their disks, all of
// them, and with the configuration to start a cluster: then only the members know that there is one, and a seed has
// no other way to hear of them. So a new node waits for these calls before it starts a cluster; see package ownership.
func (g *Gossip) callSeeds(ctx context.Context) {
	p := g.cfg.pace.seeds
	for pause(ctx, p*3/4+rand.N(p/2+1)) {
		// In a large cluster not every member must try each time.
		if g.Cluster() == (membership.ClusterID{}) || rand.Int64N(g.alive.Load()+1) >= healersPerRound {
			continue
		}
		for _, a := range g.silentSeeds() {
			g.try(ctx, a)
		}
	}
}

// silentSeeds are the addresses of other hosts' seeds at which nobody has answered the last attempt, and no live member is. Whoever
// answers and refuses, as a member of another cluster, is not called so often. A suspected member is no reason not to call: it may
// be another node by now.
func (g *Gossip) silentSeeds() (list []netip.AddrPort) {
	for _, s := range g.Seeds() {
		for _, a := range s.Addrs {
			if a.Self || !a.reachable {
				continue
			}
			if alive, suspect := g.stateAt(a.Addr); suspect || !alive && (!a.Tried || a.Answered || isSilence(a.Reason)) {
				list = append(list, a.Addr)
			}
		}
	}
	return list
}

// stateAt reports whether a member is alive, or only suspected, at an address.
func (g *Gossip) stateAt(a netip.AddrPort) (alive, suspect bool) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	for _, p := range g.peers {
		if p.Addr == a || p.Addr.Port() == a.Port() && slices.Contains(p.Meta.Underlay, a.Addr()) {
			alive, suspect = alive || p.State == StateAlive, suspect || p.State == StateSuspect
		}
	}
	return alive, suspect && !alive
}

// try starts an attempt on one address, unless one is under way. It ends with the context, or when the sockets close; Run
// waits for it.
func (g *Gossip) try(ctx context.Context, a netip.AddrPort) {
	g.mu.Lock()
	t := g.tries[a]
	if t == nil {
		t = &attempt{}
		g.tries[a] = t
	}
	busy := t.busy
	t.busy = true
	g.mu.Unlock()
	if busy {
		return
	}
	g.attempts.Go(func() {
		select {
		case <-ctx.Done():
			return
		case g.slots <- struct{}{}:
		}
		defer func() { <-g.slots }()
		err := g.pushPull(a)
		self := err == nil && g.answersItself(a)
		if ctx.Err() == nil {
			g.ended(a, self, err)
		}
	})
}

// answersItself reports whether it is this node that answers at an address: one that leads back here, as by a translation of
// addresses on the way.
func (g *Gossip) answersItself(a netip.AddrPort) bool {
	if g.isLive(a) {
		return false
	}
	for range 2 { // UDP may be lost
		if _, err := g.ping(g.cfg.ID, exactly(a)); err == nil {
			return true
		}
	}
	return false
}

// ended notes what an attempt came to, and logs a change of it.
func (g *Gossip) ended(a netip.AddrPort, self bool, err error) {
	reason, remedy := explainJoin(err, g.cfg.Keyring != nil)
	all := g.cfg.Seeds.All()
	at := slices.IndexFunc(all, func(s seed.Seed) bool { return slices.Contains(s.Addrs, a) })
	g.mu.Lock()
	if at < 0 { // one of the last known peers
		delete(g.tries, a)
		g.mu.Unlock()
		return
	}
	name := all[at].Name
	old := g.tries[a]
	now := time.Now()
	next := &attempt{ended: true, self: self, reason: reason, remedy: remedy, since: now}
	first := old == nil || !old.ended
	changed := first && err != nil || !first && !sameSilence(old.reason, reason)
	if !first && !changed {
		next.since = old.since
	}
	g.tries[a] = next
	g.mu.Unlock()
	switch {
	case changed && err != nil:
		g.log.Warn("gossip: seed does not let this node in", "seed", name, "addr", a, "reason", reason, "remedy", remedy)
	case changed:
		g.log.Info("gossip: seed answers", "seed", name, "addr", a)
	}
	if err == nil && (first || changed) {
		g.wake()
		g.inbox.membersChanged() // the number of seeds that have answered
	}
}

// Seed is one configured seed: the addresses of its name, and what the last attempts on them came to.
type Seed struct {
	Name  string // as configured
	Addrs []SeedAddr
	// Others is how many other hosts stand behind it at least, and Answered how many of these have answered. A name without
	// an address may be anybody: it counts as one that has not.
	Others, Answered int
	Tried            bool // its name was looked up, and every address of another host that can be reached was tried
	Reason, Remedy   string
	Since            time.Time // of Reason
}

// Self reports whether the seed is nobody but this node.
func (s Seed) Self() bool { return s.Others == 0 }

// SeedAddr is one address of a seed.
type SeedAddr struct {
	Addr     netip.AddrPort
	Self     bool // it is this node's
	Tried    bool
	Answered bool // a member is there, or answered the last attempt
	Reason   string
	Remedy   string
	Since    time.Time // of Reason

	reachable bool // this host has an address of its family
}

// Seeds returns what is known of each seed now. An address that did not answer and is that of a live member now has answered: it
// may have come by another way, and is not tried again while it lives.
func (g *Gossip) Seeds() []Seed {
	all := g.cfg.Seeds.All()
	own := make([][]bool, len(all))
	for i, s := range all {
		for _, a := range s.Addrs {
			own[i] = append(own[i], g.owns(a))
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.forgetTriesLocked(all)
	list := make([]Seed, len(all))
	for i, s := range all {
		list[i] = Seed{Name: s.Name, Tried: s.Tried}
		for j, a := range s.Addrs {
			list[i].Addrs = append(list[i].Addrs, g.seedAddrLocked(a, own[i][j]))
		}
		list[i].judge(s)
	}
	return list
}

// owns reports whether a seed's address is this node's own.
func (g *Gossip) owns(a netip.AddrPort) bool {
	if int(a.Port()) != g.cfg.Port {
		return false
	}
	g.mu.RLock()
	self := g.bind
	g.mu.RUnlock()
	return a == self || slices.Contains(g.cfg.Also, a.Addr()) || g.cfg.Own != nil && g.cfg.Own(a.Addr())
}

// reaches reports whether this host has an address of the family.
func (g *Gossip) reaches(a netip.Addr) bool {
	return a.Is4() == g.cfg.Bind.Unmap().Is4() || slices.ContainsFunc(g.cfg.Also, func(b netip.Addr) bool { return a.Is4() == b.Unmap().Is4() })
}

func (g *Gossip) seedAddrLocked(a netip.AddrPort, own bool) SeedAddr {
	s := SeedAddr{Addr: a, Self: own, reachable: g.reaches(a.Addr())}
	if t := g.tries[a]; t != nil && t.ended {
		s.Self = own || t.self
		s.Tried, s.Answered, s.Reason, s.Remedy, s.Since = true, t.reason == "", t.reason, t.remedy, t.since
	}
	switch {
	case s.Self:
		s.Reason, s.Remedy = "", ""
	case g.liveLockedAt(a):
		s.Answered, s.Reason, s.Remedy = true, "", ""
	case !s.reachable:
		s.Reason, s.Remedy = explainJoin(fmt.Errorf("this host has %w", errNoFamily), false)
	}
	return s
}

// judge draws the sum of a seed's addresses.
func (s *Seed) judge(known seed.Seed) {
	s.Others, s.Answered = countHosts(s.Addrs)
	for _, a := range s.Addrs {
		s.Tried = s.Tried && (a.Self || a.Tried || a.Answered || !a.reachable)
	}
	if known.Unresolved() {
		s.Others, s.Reason, s.Since = 1, known.Why(), known.Since
		s.Remedy = "correct --join, or the name server, or write the address"
		return
	}
	for _, a := range s.Addrs {
		if s.Others > s.Answered && a.Reason != "" && !a.Self && (s.Reason == "" || a.reachable) {
			s.Reason, s.Remedy, s.Since = a.Reason, a.Remedy, a.Since
		}
	}
}

// countHosts counts the hosts behind the addresses of one name, without this one, and those that have answered. Several addresses of one
// family are several hosts; one of each family may be one host, so the family with more of them counts. A family that this
// host cannot reach counts only if there is no other.
func countHosts(addrs []SeedAddr) (others, answered int) {
	type count struct{ others, answered int }
	var reached, rest [2]count
	for _, a := range addrs {
		if a.Self {
			continue
		}
		in := &rest
		if a.reachable {
			in = &reached
		}
		c := &in[0]
		if a.Addr.Addr().Is6() {
			c = &in[1]
		}
		c.others++
		if a.Answered {
			c.answered++
		}
	}
	if reached == ([2]count{}) && !slices.ContainsFunc(addrs, func(a SeedAddr) bool { return a.Self }) {
		reached = rest
	}
	for _, c := range reached {
		if c.others > others || c.others == others && c.answered > answered {
			others, answered = c.others, c.answered
		}
	}
	return others, answered
}

// forgetTriesLocked drops what is known of addresses that no seed has any more.
func (g *Gossip) forgetTriesLocked(all []seed.Seed) {
	for a, t := range g.tries {
		if !t.busy && !slices.ContainsFunc(all, func(s seed.Seed) bool { return slices.Contains(s.Addrs, a) }) {
			delete(g.tries, a)
		}
	}
}

// maxSeedProblems bounds the lines about addresses of one seed.
const maxSeedProblems = 5

// seedProblems lists what keeps an isolated node out: each name without an address, and each address that does not let it in.
func (g *Gossip) seedProblems() []Problem {
	list := []Problem{}
	for _, s := range g.Seeds() {
		if len(s.Addrs) == 0 {
			list = append(list, Problem{What: fmt.Sprintf("seed %s: %s", s.Name, s.Reason), Remedy: s.Remedy, Since: s.Since, Topic: "seed"})
		}
		n := 0
		for _, a := range s.Addrs {
			if a.Reason == "" || n >= maxSeedProblems {
				continue
			}
			n++
			name := s.Name
			if len(s.Addrs) > 1 {
				name += " at " + a.Addr.String()
			}
			list = append(list, Problem{What: fmt.Sprintf("seed %s: %s", name, a.Reason), Remedy: a.Remedy, Since: a.Since, Topic: "seed"})
		}
	}
	g.mu.RLock()
	defer g.mu.RUnlock()
	if len(list) == 0 && len(g.known) > 0 {
		list = append(list, Problem{
			What:   fmt.Sprintf("none of the %d last known members answers", len(g.known)),
			Remedy: "check this host's underlay network; the node keeps trying", Since: g.lastDeath, Topic: "alone",
		})
	}
	return list
}
