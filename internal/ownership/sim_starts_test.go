package ownership

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// starts is the part of a world that is about how hosts find each other: names, resolvers, addresses, seeds. In a world
// without it everybody knows everybody.
//
// All hosts have one configuration: `bootstrap` is a name, which one to three of them have, and the seeds are the
// first hosts, by a name each or by one name for all of them. Hosts that have met, directly or through others,
// are of one circle.
type starts struct {
	names   [][]int // the hosts behind each seed name
	seeds   int     // how many
	circles int     // numbers given
	oneName bool
	plant   string
	links   map[[2]int]time.Time // see relink
}

// gossipLag is how long it takes in a world of starts until others see in a node's metadata that it is in a cluster.
const gossipLag = 1500 * time.Millisecond

// A resolver may lie for a while.
type resolver int

const (
	truthful resolver = iota
	silent            // no name resolves
	outdated          // names have the addresses of the beginning
	loopback          // this host's own name, and one that it is part of, has 127.0.1.1 as well
	selfish           // a name that this host is part of leads to nobody else
)

func (r resolver) String() string {
	return [...]string{"truthful", "silent", "outdated", "loopback", "selfish"}[r]
}

// simulateStarts runs one schedule of starts: hosts come and go, are wiped, move and swap addresses, with several hosts that have
// the bootstrap node's name, seed lists with oneself in them, and resolvers that lie.
func simulateStarts(seed uint64, plant string) *world {
	w := &world{seed: seed, rng: rand.New(rand.NewPCG(seed, 0x737461)), now: simStart}
	w.must.init(w)
	w.starts = &starts{plant: plant, links: make(map[[2]int]time.Time), oneName: w.rng.IntN(2) == 0}
	w.params = simParams{hosts: 3 + w.rng.IntN(4), cidrs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/23")}, len4: 28, len6: 122, cooldown: time.Minute, plant: plant}
	w.starts.seeds = 1 + w.rng.IntN(3)
	for i := range w.starts.seeds {
		if w.starts.oneName && i > 0 {
			w.starts.names[0] = append(w.starts.names[0], i)
		} else {
			w.starts.names = append(w.starts.names, []int{i})
		}
	}
	founders := 1 + w.rng.IntN(3)
	for i := range w.params.hosts {
		h := &host{w: w, index: i, name: fmt.Sprintf("node-%d", i), pods: make(map[string][]netip.Addr), addr: i + 1}
		if i < founders || w.rng.IntN(6) == 0 {
			h.name = "first"
		}
		h.id = w.newID()
		h.cfg = Config{Name: h.name, CIDRs: w.params.cidrs, BlockLen4: w.params.len4, Bootstrap: h.name == "first", Bootstrapper: "first", Cooldown: w.params.cooldown}
		w.hosts = append(w.hosts, h)
	}
	w.calm(w.rng.IntN(3) == 0)
	if w.rng.IntN(2) == 0 { // trouble finds a cluster
		for _, h := range w.hosts {
			h.start(false)
			w.runFor(time.Duration(w.rng.IntN(2000)) * time.Millisecond)
		}
		w.runFor(25 * time.Second)
	}
	for range 15 + w.rng.IntN(25) {
		if w.fault != "" || w.over {
			return w
		}
		w.startsOp()
		w.runFor(time.Duration(w.rng.IntN(4000)) * time.Millisecond)
	}
	for _, h := range w.hosts {
		h.resolver = truthful
	}
	w.relink()
	w.heal()
	if w.fault == "" && !w.over {
		w.must.oneCluster()
	}
	return w
}

// startsOp does one thing to the hosts, all of them common in a machine room.
func (w *world) startsOp() {
	h := w.pick()
	switch n := w.rng.IntN(100); {
	case n < 12:
		h.resolver = resolver(w.rng.IntN(5))
		w.relink()
		w.must.seen["resolver: "+h.resolver.String()]++
		w.logf("the resolver of host %d is %v", h.index, h.resolver)
	case n == 12:
		w.wipeSeeds()
	case n < 18:
		w.partition()
	case n < 26:
		w.mend()
	case n < 30:
		w.calm(w.rng.IntN(2) == 0)
	case h.run == 0:
		h.start(false)
	case h.sp == nil && n < 45:
		h.move()
	case h.sp == nil && n < 55:
		h.wipe()
	case h.sp == nil:
		h.start(w.rng.IntN(2) == 0)
	case n < 60:
		w.logf("host %d is killed", h.index)
		h.stop()
	case n < 66:
		h.atPersist = []string{"crash before", "crash after", "fail"}[w.rng.IntN(3)]
	default:
		h.newPods(1)
	}
}

// wipeSeeds loses the disks of all seeds at once: only other members know of the cluster then.
func (w *world) wipeSeeds() {
	w.must.seen["all seeds wiped"]++
	for _, h := range w.hosts[:w.starts.seeds] {
		h.stop()
		w.after(10*time.Second, func() {
			if h.sp == nil {
				h.wipe()
			}
		})
	}
}

// move gives a host that is down another address: a new one, or that of another host that is down.
func (h *host) move() {
	w := h.w
	for _, o := range w.hosts {
		if o != h && o.sp == nil && w.rng.IntN(2) == 0 {
			h.addr, o.addr = o.addr, h.addr
			w.must.seen["addresses swapped"]++
			w.logf("hosts %d and %d have swapped addresses", h.index, o.index)
			return
		}
	}
	h.addr = 100 + w.rng.IntN(1000)
	w.must.seen["address changed"]++
	w.logf("host %d has address %d now", h.index, h.addr)
}

// resolve returns the addresses behind a seed name as this host sees them; 0 is loopback.
func (h *host) resolve(name []int) (addrs []int, ok bool) {
	switch h.resolver {
	case silent:
		return nil, false
	case loopback:
		if slices.Contains(name, h.index) {
			addrs = append(addrs, 0)
		}
	}
	if h.resolver == selfish && slices.Contains(name, h.index) {
		return []int{h.addr}, true
	}
	for _, i := range name {
		if a := h.w.hosts[i].addr; h.resolver == outdated {
			addrs = append(addrs, i+1)
		} else {
			addrs = append(addrs, a)
		}
	}
	return addrs, true
}

// knock tries the seeds every two seconds or so, and the last known members less often, as gossip does, and merges circles with
// whoever answers. n counts the rounds.
func (h *host) knock(run, n int) {
	if h.run != run || h.sp == nil {
		return
	}
	w := h.w
	w.after(time.Duration(1500+w.rng.IntN(1000))*time.Millisecond, func() { h.knock(run, n+1) })
	seldom := n < 3 || n%7 == 0
	var addrs []int
	if seldom || w.starts.plant != "members call no seeds" || h.sp.cluster.IsZero() {
		addrs = h.seedAddrs()
	}
	if seldom {
		for _, p := range h.sp.Peers() {
			addrs = append(addrs, int(p.Addr.Port()))
		}
	}
	for _, o := range w.hosts {
		if o == h || !slices.Contains(addrs, o.addr) || !h.answeredBy(o) || o.circle == h.circle {
			continue
		}
		if c, d := h.sp.cluster, o.sp.cluster; !c.IsZero() && !d.IsZero() && c != d {
			continue // gossip's guard
		}
		old := o.circle
		for _, m := range w.hosts {
			if m.circle == old {
				m.circle = h.circle
			}
		}
	}
}

// seedAddrs are the addresses behind all seed names as this host sees them.
func (h *host) seedAddrs() (addrs []int) {
	for _, name := range h.w.starts.names {
		list, _ := h.resolve(name)
		addrs = append(addrs, list...)
	}
	return addrs
}

// answeredBy reports whether an exchange with o works, both having had the time to start.
func (h *host) answeredBy(o *host) bool {
	return h.reaches(o) && h.w.now.Sub(later(h.upAt, o.upAt)) >= 300*time.Millisecond
}

// seeds judges each address behind each seed name by itself: this host's own ones do not count, and a name that does not resolve
// may be anybody.
func (h *host) seeds() Seeds {
	w := h.w
	s := Seeds{Configured: len(w.starts.names), Names: len(w.starts.names), Tried: w.now.Sub(h.upAt) > time.Second}
	for _, name := range w.starts.names {
		addrs, ok := h.resolve(name)
		if !ok {
			s.Others++
			continue
		}
		own := func(a int) bool { return a == 0 || a == h.addr }
		if w.starts.plant == "a seed name with an own address is oneself" && slices.ContainsFunc(addrs, own) {
			continue
		}
		for _, a := range addrs {
			if own(a) {
				continue
			}
			s.Others++
			h.told[a] = w.now
			for _, o := range w.hosts {
				if o != h && o.addr == a && h.met(o) && h.answeredBy(o) { // a live member now, not once
					s.Answered++
				}
			}
		}
	}
	return s
}

// TestSimulationOfStarts runs random schedules of starts.
func TestSimulationOfStarts(t *testing.T) {
	if *simSeed != 0 {
		w := simulateStarts(*simSeed, "")
		t.Log(w.report())
		if w.fault != "" {
			t.Fatal(w.fault)
		}
		return
	}
	runs := *simRuns
	if runs == 0 {
		if runs = 3000; testing.Short() || raceEnabled {
			runs = 200
		}
	}
	seen := make(map[string]int)
	steps := 0
	for i := range runs {
		w := simulateStarts(uint64(i)+1, "")
		if w.fault != "" {
			t.Fatal(w.report())
		}
		steps += w.steps
		for what, n := range w.must.seen {
			seen[what] += n
		}
	}
	t.Logf("%d schedules, %d steps", runs, steps)
	for _, what := range sortedStrings(seen) {
		t.Logf("%8d × %s", seen[what], what)
	}
	for _, what := range []string{
		"cluster begun", "another founder heard of", "consent refused to a founder", "wiped", "address changed", "addresses swapped", "shared name reported",
		"resolver: silent", "resolver: outdated", "resolver: loopback", "resolver: selfish", "all seeds wiped",
	} {
		if seen[what] < runs/50 {
			t.Errorf("only %d × %s: the schedules do not test what they should", seen[what], what)
		}
	}
}

// TestSimulationOfStartsCatches plants the rules that would start a second cluster.
func TestSimulationOfStartsCatches(t *testing.T) {
	for _, bug := range []string{
		"newcomers do not ask each other",
		"a seed name with an own address is oneself",
		"no wait for members that call",
		"members call no seeds",
	} {
		t.Run(bug, func(t *testing.T) {
			const limit = 400
			for i := range limit {
				if w := simulateStarts(uint64(i)+1, bug); w.fault != "" {
					t.Logf("seed %d: %s", w.seed, w.fault)
					return
				}
			}
			t.Fatalf("%d schedules did not notice it", limit)
		})
	}
}
