package gossip

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// seedState is the result of the last attempt to join through one seed.
type seedState struct {
	self   bool // it is this node
	at     time.Time
	addrs  []netip.AddrPort // that its name had
	reason string           // "" after success
	remedy string
	since  time.Time // of the reason
}

// Limits of one round of attempts.
const (
	parallelJoins   = 8
	isolatedSample  = 16 // last known peers tried in a round while alone
	healSample      = 2  // missing peers tried in a round otherwise
	healersPerRound = 32 // members that try in a round, on average
	returnSample    = 16 // members told of a new address in a round
	recentDeath     = 10 * time.Minute
)

// rejoin joins the cluster, and joins it again after a partition. memberlist gives up on
// members half a minute after it has declared them dead, so a longer partition never
// heals by itself (memberlist #222). This loop tries forever: all known addresses with
// backoff while the node is alone, otherwise a few missing members, which costs almost
// nothing.
func (g *Gossip) rejoin(ctx context.Context) {
	p := g.cfg.pace
	backoff := p.rejoinMin
	for ctx.Err() == nil {
		if !g.resolveIdentity(ctx) {
			return
		}
		var wait time.Duration
		switch returning := g.isReturning(); {
		case g.alive.Load() == 0:
			g.joinRound(ctx)
			if g.alive.Load() > 0 {
				backoff = p.rejoinMin
				continue
			}
			wait = backoff
			backoff = min(2*backoff, p.rejoinMax)
		case returning:
			g.returnRound(ctx)
			wait = p.returning
		default:
			backoff = p.rejoinMin
			// One connection heals a partition: in a large cluster not every member
			// must try each time.
			if rand.Int64N(g.alive.Load()+1) < healersPerRound {
				g.healRound(ctx)
			}
			if wait = p.heal; g.lostFor() > recentDeath {
				wait = p.healSlow
			}
		}
		// Jitter prevents that both halves of a cluster try at the same moments.
		wait = wait*3/4 + rand.N(wait/2+1)
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-t.C:
		case <-g.kick:
			// Events arrive in bursts: wait until they settle, and never spin.
			select {
			case <-ctx.Done():
			case <-time.After(p.rejoinMin / 4):
			}
		}
		t.Stop()
	}
}

func (g *Gossip) isReturning() bool {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.guard.returning
}

// lostFor returns how long ago the last member died.
func (g *Gossip) lostFor() time.Duration {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return time.Since(g.lastDeath)
}

// joinRound tries every seed, and some of the last known peers.
func (g *Gossip) joinRound(ctx context.Context) {
	var wg sync.WaitGroup
	slots := make(chan struct{}, parallelJoins)
	for _, seed := range g.cfg.Seeds {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			g.trySeed(ctx, seed)
		})
	}
	wg.Wait()
	if g.alive.Load() == 0 {
		g.joinAll(ctx, g.missingPeers(isolatedSample))
	}
}

// healRound tries a few members that are not alive, one of the seeds, and all seeds that
// were never tried because another member answered first.
func (g *Gossip) healRound(ctx context.Context) {
	if missing := g.missingPeers(healSample); len(missing) > 0 {
		g.joinAll(ctx, missing)
	}
	for _, seed := range g.seedsToTry() {
		addrs, err := g.resolveSeed(ctx, seed)
		if err == nil && slices.ContainsFunc(addrs, g.isLive) {
			g.seedResult(seed, addrs, nil)
			continue
		}
		g.trySeed(ctx, seed)
	}
}

func (g *Gossip) seedsToTry() []string {
	g.mu.RLock()
	defer g.mu.RUnlock()
	var never []string
	for _, seed := range g.cfg.Seeds {
		if g.seeds[seed] == nil {
			never = append(never, seed)
		}
	}
	if n := len(g.cfg.Seeds); len(never) == 0 && n > 0 {
		return []string{g.cfg.Seeds[rand.IntN(n)]}
	}
	return never
}

// returnRound announces a new address to members until none of them has the old one.
func (g *Gossip) returnRound(ctx context.Context) {
	g.mu.Lock()
	g.guard.stale = 0
	g.mu.Unlock()
	n, _ := g.joinAll(ctx, g.liveAddrs(returnSample))
	g.mu.Lock()
	if n > 0 && g.guard.stale == 0 {
		g.guard.returning = false
		g.problems.drop("clone " + g.cfg.ID.String())
	}
	g.mu.Unlock()
}

// missingPeers returns up to n random addresses without a live member.
func (g *Gossip) missingPeers(n int) []netip.AddrPort {
	g.mu.RLock()
	live := map[netip.AddrPort]bool{g.bind: true}
	for _, p := range g.peers {
		if p.State <= StateSuspect {
			live[p.Addr] = true
		}
	}
	var list []netip.AddrPort
	for a := range g.known {
		if !live[a] {
			list = append(list, a)
		}
	}
	g.mu.RUnlock()
	rand.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	return list[:min(n, len(list))]
}

func (g *Gossip) isLive(a netip.AddrPort) bool {
	g.mu.RLock()
	defer g.mu.RUnlock()
	if a == g.bind {
		return false
	}
	for _, p := range g.peers {
		if p.Addr == a && p.State <= StateSuspect {
			return true
		}
	}
	return false
}

// joinAll does a push/pull with all addresses, a few at a time. It returns the number of
// successful ones and the first error.
func (g *Gossip) joinAll(ctx context.Context, addrs []netip.AddrPort) (int, error) {
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		n     int
		first error
		slots = make(chan struct{}, parallelJoins)
	)
	for _, a := range addrs {
		if ctx.Err() != nil {
			break
		}
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			err := g.pushPull(a)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				n++
			} else if first == nil {
				first = fmt.Errorf("gossip: push/pull with %v: %w", a, err)
			}
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		first = ctx.Err()
	}
	return n, first
}

// trySeed joins through one seed, at the first of its addresses that answers.
func (g *Gossip) trySeed(ctx context.Context, seed string) {
	addrs, err := g.resolveSeed(ctx, seed)
	if err != nil {
		g.seedResult(seed, nil, err)
		return
	}
	g.mu.RLock()
	self := g.bind
	g.mu.RUnlock()
	if slices.Contains(addrs, self) {
		g.mu.Lock()
		g.seeds[seed] = &seedState{self: true, at: time.Now()}
		g.mu.Unlock()
		return
	}
	for _, a := range addrs {
		if err = g.pushPull(a); err == nil || ctx.Err() != nil {
			break
		}
	}
	if ctx.Err() == nil {
		g.seedResult(seed, addrs, err)
	}
}

// resolveSeed resolves HOST[:PORT]. An IPv6 address without port needs no brackets.
func (g *Gossip) resolveSeed(ctx context.Context, seed string) ([]netip.AddrPort, error) {
	port := uint16(g.cfg.Port)
	if a, err := netip.ParseAddr(strings.Trim(seed, "[]")); err == nil {
		return []netip.AddrPort{netip.AddrPortFrom(a.Unmap(), port)}, nil
	}
	if ap, err := netip.ParseAddrPort(seed); err == nil {
		return []netip.AddrPort{unmapPort(ap)}, nil
	}
	host := seed
	if h, p, err := net.SplitHostPort(seed); err == nil {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil || n == 0 {
			return nil, fmt.Errorf("%w: port %q", errSeedSyntax, p)
		}
		host, port = h, uint16(n)
	}
	ctx, cancel := context.WithTimeout(ctx, g.cfg.pace.stream)
	defer cancel()
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	var list []netip.AddrPort
	for _, ip := range ips[:min(len(ips), 16)] {
		// Of two families, only the one that the node is bound to can be reached.
		if ip = ip.Unmap(); ip.Is4() == g.cfg.Bind.Unmap().Is4() {
			list = append(list, netip.AddrPortFrom(ip, port))
		}
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("%w: %s has no address of the family of %v", errSeedSyntax, host, g.cfg.Bind)
	}
	return list, nil
}

var errSeedSyntax = errors.New("unusable seed")

// seedResult records the result of an attempt, and logs a change of it.
func (g *Gossip) seedResult(seed string, addrs []netip.AddrPort, err error) {
	reason, remedy := explainJoin(err, g.cfg.Keyring != nil)
	g.mu.Lock()
	old := g.seeds[seed]
	now := time.Now()
	st := &seedState{at: now, addrs: addrs, reason: reason, remedy: remedy, since: now}
	changed := old == nil && err != nil || old != nil && old.reason != reason
	if old != nil && !changed {
		st.since = old.since
	}
	g.seeds[seed] = st
	g.mu.Unlock()
	switch {
	case changed && err != nil:
		g.log.Warn("gossip: seed does not let this node in", "seed", seed, "reason", reason, "remedy", remedy)
	case changed:
		g.log.Info("gossip: seed answers", "seed", seed)
	}
}

// explainJoin turns the error of a join into a reason and a remedy. memberlist wraps some
// errors as text only, so it searches the text.
func explainJoin(err error, keyed bool) (reason, remedy string) {
	if err == nil {
		return "", ""
	}
	var dns *net.DNSError
	text := strings.TrimSpace(err.Error())
	if i := strings.LastIndex(text, "failed to join "); i >= 0 {
		if _, after, ok := strings.Cut(text[i:], ": "); ok {
			text = strings.TrimSpace(after)
		}
	}
	has := func(s string) bool { return strings.Contains(strings.ToLower(text), s) }
	switch {
	case errors.As(err, &dns):
		return "its name does not resolve: " + dns.Err, "correct --join, or the name server, or write the address"
	case errors.Is(err, errSeedSyntax):
		return text, "correct --join: HOST[:PORT]"
	case has("no installed keys could decrypt"):
		return "it uses another gossip key", "give both the same --gossip-key-file"
	case has("remote error: remote state is encrypted"), has("but remote state is not encrypted"):
		return "it runs without a gossip key, this node with one", "give it the same --gossip-key-file"
	case has("remote state is encrypted"), has("encryption is configured"):
		return "it asks for a gossip key, this node has none", "copy its key file here and name it with --gossip-key-file"
	case has("belongs to cluster"):
		return text, foreignRemedy
	case has("identity is listed at another address"):
		return text, "wait: the address is asked; if this host has moved, it is let in as soon as nobody has answered there"
	case has("incompatible"):
		return text, "run agents of compatible versions"
	case has(syscall.ECONNREFUSED.Error()):
		return "nothing listens there", "start the agent there, and see that it uses this --gossip-port"
	case has("timeout"), has("deadline exceeded"):
		return "no answer", "is the host up, and does a firewall let TCP and UDP of the gossip port through?"
	case has(syscall.EHOSTUNREACH.Error()), has(syscall.ENETUNREACH.Error()):
		return "no route: " + text, "check the route to it, and its link"
	case keyed && has("eof"), has("connection reset"):
		return "it closed the connection", "read its log: it may use another gossip key, or be no Tulle agent"
	}
	return text, "read the seed's log"
}

// seedProblemsLocked lists the seeds that do not answer an isolated node.
func (g *Gossip) seedProblemsLocked() []Problem {
	list := []Problem{}
	for _, seed := range g.cfg.Seeds {
		if st := g.seeds[seed]; st != nil && st.reason != "" {
			list = append(list, Problem{What: fmt.Sprintf("seed %s: %s", seed, st.reason), Remedy: st.remedy, Since: st.since})
		}
	}
	if len(list) == 0 && len(g.known) > 0 {
		list = append(list, Problem{
			What:   fmt.Sprintf("none of the %d last known members answers", len(g.known)),
			Remedy: "check this host's underlay network; the node keeps trying", Since: g.lastDeath,
		})
	}
	return list
}

// Seed is the state of one seed.
type Seed struct {
	Address string    `json:"address"` // as configured
	Self    bool      `json:"self"`
	Tried   time.Time `json:"tried"` // zero: not yet
	Reason  string    `json:"reason"`
	Remedy  string    `json:"remedy"`
}

// Seeds returns the result of the last attempt for each seed. A seed that did not answer
// then but is a live member now counts as answered: it has joined in another way, and is
// not tried again while it is alive.
func (g *Gossip) Seeds() []Seed {
	g.mu.RLock()
	defer g.mu.RUnlock()
	live := map[netip.AddrPort]bool{}
	for _, p := range g.peers {
		live[p.Addr] = p.State <= StateSuspect
	}
	list := make([]Seed, 0, len(g.cfg.Seeds))
	for _, s := range g.cfg.Seeds {
		seed := Seed{Address: s}
		if st := g.seeds[s]; st != nil {
			seed = Seed{s, st.self, st.at, st.reason, st.remedy}
			if slices.ContainsFunc(st.addrs, func(a netip.AddrPort) bool { return live[a] }) {
				seed.Reason, seed.Remedy = "", ""
			}
		}
		list = append(list, seed)
	}
	return list
}
