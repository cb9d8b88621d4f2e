package ownership

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/tulle-net/tulle/ipam"
)

var (
	simSeed = flag.Uint64("sim.seed", envUint("TULLE_SIM_SEED"), "run only the schedule of this seed, and print it")
	simRuns = flag.Int("sim.runs", int(envUint("TULLE_SIM_RUNS")), "how many schedules to run; 0: the default")
)

func envUint(name string) uint64 {
	v, _ := strconv.ParseUint(os.Getenv(name), 10, 64)
	return v
}

// TestSimulation runs random schedules and stops at the first that breaks an invariant.
func TestSimulation(t *testing.T) {
	if *simSeed != 0 {
		w := simulate(*simSeed, "")
		t.Log(w.report())
		if w.fault != "" {
			t.Fatal(w.fault)
		}
		return
	}
	runs := *simRuns
	if runs == 0 {
		if runs = 2000; testing.Short() || raceEnabled {
			runs = 200
		}
	}
	steps, largest := 0, 0
	seen := make(map[string]int)
	for i := range runs {
		w := simulate(uint64(i)+1, "")
		if w.fault != "" {
			t.Fatal(w.report())
		}
		steps += w.steps
		largest = max(largest, len(w.hosts))
		for what, n := range w.must.seen {
			seen[what] += n
		}
		seen["collision under the forget exception"] += w.must.excused
	}
	t.Logf("%d schedules, %d steps, up to %d hosts", runs, steps, largest)
	for _, what := range sortedStrings(seen) {
		t.Logf("%8d × %s", seen[what], what)
	}
	for _, what := range []string{
		"donation", "further block", "address handed out", "address used again", "takeover", "left",
		"ready at the end", "exhausted at the end", "confirmed after a rollback", "lost change learned again",
		"persist: crash before", "persist: crash after", "persist: fail", "persist: fail late", "crash after an answer",
	} {
		if seen[what] < runs/200 {
			t.Errorf("only %d × %s: the schedules do not test what they should", seen[what], what)
		}
	}
}

// TestSimulationFoundLater runs again what longer runs have found.
func TestSimulationFoundLater(t *testing.T) {
	for seed, what := range map[uint64]string{
		5620: "space in entries of several versions did not count as a block",
	} {
		if w := simulate(seed, ""); w.fault != "" {
			t.Errorf("%s:\n%s", what, w.report())
		}
	}
}

// TestSimulationCatches plants classic bugs and expects a violation of each soon.
func TestSimulationCatches(t *testing.T) {
	for _, bug := range []string{
		"merge takes the lower version",
		"answer before persist",
		"bootstrap with a live seed",
		"forget of a live node",
		"reuse without cool-down",
	} {
		t.Run(bug, func(t *testing.T) {
			const limit = 400
			for i := range limit {
				if w := simulate(uint64(i)+1, bug); w.fault != "" {
					t.Logf("seed %d: %s", w.seed, w.fault)
					return
				}
			}
			t.Fatalf("%d schedules did not notice it", limit)
		})
	}
}

// TestSimulationReplays: one seed is one run.
func TestSimulationReplays(t *testing.T) {
	for _, seed := range []uint64{3, 40, 77} {
		a, b := simulate(seed, ""), simulate(seed, "")
		if a.steps != b.steps || fmt.Sprint(a.trace) != fmt.Sprint(b.trace) {
			t.Errorf("seed %d: two runs differ (%d and %d steps)", seed, a.steps, b.steps)
		}
	}
}

// simulate runs one schedule: trouble first, then healing and rest.
func simulate(seed uint64, plant string) *world {
	w := &world{seed: seed, rng: rand.New(rand.NewPCG(seed, 0x7469)), now: simStart}
	w.must.init(w)
	w.draw(plant)
	for _, h := range w.hosts[:min(3, len(w.hosts))] { // the seeds: the first start needs them all
		h.start(false)
	}
	w.runFor(8 * time.Second)
	for range w.ops() {
		if w.fault != "" {
			return w
		}
		w.op()
		w.runFor(time.Duration(50+w.rng.IntN(2500)) * time.Millisecond)
		if w.rng.IntN(8) == 0 && slices.ContainsFunc(w.hosts, func(h *host) bool { return h.forgetting != nil }) {
			w.runFor(goneFor) // so that it comes to an end
		}
	}
	w.heal()
	return w
}

// draw chooses the size of everything. Most runs are small: that is where
// collisions are found; one in fifty is as large as the design asks for.
func (w *world) draw(plant string) {
	p := &w.params
	p.plant = plant
	p.cooldown = 60 * time.Second
	p.hosts = 3 + w.rng.IntN(4)
	switch w.rng.IntN(50) {
	case 0:
		p.hosts = 20 + w.rng.IntN(31)
	case 1, 2, 3, 4:
		p.hosts = 8 + w.rng.IntN(8)
	}
	bits := 2 + w.rng.IntN(5) // 4 to 64 blocks
	if p.hosts > 16 {
		bits = 5 + w.rng.IntN(3)
	}
	p.len4 = 27 + w.rng.IntN(2)
	v4 := netip.PrefixFrom(netip.MustParseAddr("10.0.0.0"), p.len4-bits).Masked()
	p.len6 = 122
	v6 := netip.PrefixFrom(netip.MustParseAddr("fd00::"), p.len6-bits)
	switch w.rng.IntN(6) {
	case 0:
		p.cidrs = []netip.Prefix{v4, v6}
	case 1:
		p.cidrs = []netip.Prefix{v6}
	default:
		p.cidrs = []netip.Prefix{v4}
	}
	for i := range p.hosts {
		h := &host{w: w, index: i, name: fmt.Sprintf("node-%d", i), pods: make(map[string][]netip.Addr)}
		h.id = w.newID()
		h.cfg = Config{Name: h.name, CIDRs: p.cidrs, BlockLen4: p.len4, BlockLen6: p.len6, Bootstrap: i == 0, Cooldown: p.cooldown}
		if w.rng.IntN(8) == 0 {
			h.cfg.PodCIDRs = w.someCIDR()
		}
		if plant == "reuse without cool-down" {
			h.cfg.Cooldown = time.Nanosecond
		}
		w.hosts = append(w.hosts, h)
	}
	w.calm(w.rng.IntN(3) == 0)
}

// someCIDR returns a fixed block, perhaps one that somebody uses.
func (w *world) someCIDR() []netip.Prefix {
	c := w.params.cidrs[w.rng.IntN(len(w.params.cidrs))]
	a := c.Addr()
	for range w.rng.IntN(1 << (a.BitLen() - c.Bits())) {
		a = a.Next()
	}
	return []netip.Prefix{netip.PrefixFrom(a, a.BitLen()-3-w.rng.IntN(4)).Masked()}
}

func (w *world) newID() (id NodeID) {
	for i := range id {
		id[i] = byte(w.rng.Uint32())
	}
	return id
}

func (w *world) calm(yes bool) {
	w.loss, w.dup, w.slow = 0, 0, 0
	if !yes {
		w.loss, w.dup, w.slow = w.rng.Float64()*0.4, w.rng.Float64()*0.3, w.rng.Float64()*0.2
	}
}

func (w *world) ops() int {
	if w.params.hosts > 16 {
		return 3 * w.params.hosts
	}
	return 30 + w.rng.IntN(40)
}

func (w *world) pick() *host { return w.hosts[w.rng.IntN(len(w.hosts))] }

// op does one random thing to the world.
func (w *world) op() {
	h := w.pick()
	switch n := w.rng.IntN(100); {
	case h.retired:
	case h.run == 0:
		h.start(false)
	case h.sp == nil && n < 12 && h.disk != nil:
		h.rollBack()
	case h.sp == nil && n < 20:
		w.forgetSomebody(h)
	case h.sp == nil && n < 26:
		h.wipe()
	case h.sp == nil && n < 30:
		h.retire()
	case h.sp == nil && n < 60:
		if w.rng.IntN(8) == 0 {
			if h.changedCIDR, h.cfg.PodCIDRs = true, nil; w.rng.IntN(4) > 0 {
				h.cfg.PodCIDRs = w.someCIDR()
			}
			w.logf("%s: --pod-cidr %v", h.name, h.cfg.PodCIDRs)
		}
		h.start(w.rng.IntN(2) == 0)
	case h.sp == nil:
	case n < 35:
		h.newPods(1 + w.rng.IntN(12))
	case n < 52:
		h.endPods()
	case n < 58:
		w.logf("%s is killed", h.name)
		h.stop()
	case n < 70:
		h.atPersist = []string{"crash before", "crash after", "crash after", "fail", "fail late"}[w.rng.IntN(5)]
		w.logf("%s: next persist: %s", h.name, h.atPersist)
		h.newPods(1)
	case n < 74:
		h.atSend = true
	case n < 79:
		w.partition()
	case n < 84:
		w.mend()
	case n < 87:
		w.calm(w.rng.IntN(2) == 0)
	case n < 90:
		h.leaveCluster()
	case n < 95:
		w.forgetSomebody(h)
	default:
		h.external()
	}
}

func (h *host) newPods(n int) {
	w := h.w
	for range n {
		h.podSeq++
		key := fmt.Sprintf("%s-%d", h.name, h.podSeq)
		w.step(h, "allocate", func(sp *Machine) {
			list, err := sp.Allocate(w.now, PodRequest{Key: key})
			if err != nil {
				return
			}
			for _, a := range list {
				w.must.handedOut(h, key, a.Addr)
				h.pods[key] = append(h.pods[key], a.Addr)
			}
		})
	}
}

func (h *host) endPods() {
	w := h.w
	all := w.rng.IntN(4) == 0
	for _, key := range sortedStrings(h.pods) {
		if !all && w.rng.IntN(2) == 0 {
			continue
		}
		w.step(h, "release", func(sp *Machine) {
			addrs := h.pods[key]
			// The pod is gone before its addresses are released.
			delete(h.pods, key)
			for _, a := range addrs {
				w.must.takenBack(h, key, a, true)
			}
			if _, err := sp.Release(w.now, key); err != nil {
				w.logf("%s: release of %s: %v", h.name, key, err)
			}
		})
	}
	w.sweep(h)
}

// sweep releases what a crash or a failed release leaked, as the agent does.
func (w *world) sweep(h *host) {
	var live []ipam.Allocation
	for key, list := range h.pods {
		for _, a := range list {
			live = append(live, ipam.Allocation{Addr: a, Key: key})
		}
	}
	w.step(h, "sweep", func(sp *Machine) { sp.ReleaseLeaked(w.now, live, 0) })
}

// rollBack puts an older disk into a host that is down, when the condition of
// the proof can be met: somebody else knows of every change that is lost.
func (h *host) rollBack() {
	w := h.w
	if len(h.older) == 0 {
		return
	}
	old := h.older[w.rng.IntN(len(h.older))]
	table := tableOf(old)
	if ClusterID(old.Cluster).IsZero() || len(old.Peers) == 0 && len(table.Owned(h.id)) == table.Len() {
		return // it would join anew, or be confirmed by itself
	}
	lost := slices.Concat(h.lostChange, w.must.lost(h, table))
	for _, e := range lost {
		known := false
		for _, o := range w.hosts {
			known = known || o != h && !o.retired && (knows(tableOf(o.disk), e) || o.sp != nil && knows(o.sp.table, e))
		}
		if !known {
			return
		}
	}
	w.logf("%s: the disk is rolled back to generation %d of %d, lost %v", h.name, old.Generation, h.disk.Generation, lost)
	w.must.rolledBack(h)
	h.disk, h.lostChange, h.unsure = old, lost, true
	h.start(true)
}

// wipe loses the disk and everything that ran on the host.
func (h *host) wipe() {
	w := h.w
	if w.starts == nil && !slices.ContainsFunc(w.hosts[:min(3, len(w.hosts))], func(o *host) bool {
		return o != h && o.disk != nil && !ClusterID(o.disk.Cluster).IsZero()
	}) {
		return // in this world members do not call the seeds; that is TestSimulationOfStarts'
	}
	w.must.seen["wiped"]++
	w.logf("%s (%s) is wiped", h.name, h.id.Short())
	h.endOfPods()
	h.disk, h.older, h.unsure, h.lostChange = nil, nil, false, nil
	h.victim, h.forgetting = nil, nil // a forget that was under way is lost with the disk
	delete(w.must.facts, h)
	delete(w.must.changes, h)
	h.id = w.newID()
	h.start(false)
}

func (h *host) endOfPods() {
	for _, key := range sortedStrings(h.pods) {
		for _, a := range h.pods[key] {
			h.w.must.takenBack(h, key, a, false)
		}
	}
	clear(h.pods)
}

// retire switches a host off for good.
func (h *host) retire() {
	if h.index < 3 {
		return // the seeds stay, or newcomers would find nobody
	}
	h.w.logf("%s is gone for good", h.name)
	h.endOfPods()
	h.retired = true
}

func (w *world) partition() {
	groups := 2 + w.rng.IntN(2)
	for _, h := range w.hosts {
		h.group = w.rng.IntN(groups)
	}
	w.parted, w.wasParts = w.now, true
	w.relink()
	w.logf("the network is split")
}

func (w *world) mend() {
	for _, h := range w.hosts {
		h.group = 0
	}
	w.parted = w.now
	w.relink()
	w.logf("the network is whole")
}

func (h *host) leaveCluster() {
	w := h.w
	if h.index == 0 || w.rng.IntN(2) == 0 {
		return
	}
	for range 2 {
		h.endPods()
	}
	w.step(h, "leave", func(sp *Machine) {
		_, err := sp.Leave(w.now)
		w.logf("%s leaves: %v", h.name, err)
	})
}

func (w *world) forgetSomebody(h *host) {
	if h.sp == nil || h.victim != nil || h.unsure {
		return // by a forced forget the operator vouches for the disk
	}
	id := w.pick().id
	if w.rng.IntN(3) == 0 { // somebody of the table, perhaps a wiped identity
		if entries := h.sp.table.Entries(); len(entries) > 0 {
			id = entries[w.rng.IntN(len(entries))].Owner
		}
	}
	if id == h.id {
		return
	}
	w.forget(h, id, w.rng.IntN(4) == 0)
}

func (w *world) forget(h *host, id NodeID, force bool) {
	h.takeover = &takeover{forced: force}
	h.victim, h.victimID = h, id // a wiped identity is nobody's
	for _, o := range w.hosts {
		if o.id == id {
			h.victim = o
		}
	}
	w.step(h, "forget", func(sp *Machine) {
		op, err := sp.Forget(w.now, id, force)
		w.logf("%s forgets %s, force %v: %v", h.name, id.Short(), force, err)
		if h.forgetting = op; err != nil {
			h.victim = nil
		}
	})
}

func (h *host) external() {
	w := h.w
	w.step(h, "external", func(sp *Machine) {
		if list := sp.table.Owned(h.id); len(list) > 0 {
			e := list[w.rng.IntN(len(list))]
			if e.External != nil {
				sp.RemoveExternal(w.now, e.Prefix)
				return
			}
			p := netip.PrefixFrom(ipam.Last(e.Prefix), e.Prefix.Addr().BitLen()-w.rng.IntN(4)).Masked()
			sp.AddExternal(w.now, p, External{Endpoint: netip.MustParseAddr("192.0.2.1"), Encap: "ipip"})
		}
	})
}

// heal ends all trouble, starts every host that still exists, and waits.
func (w *world) heal() {
	w.logf("healing")
	w.mend()
	w.calm(true)
	for _, h := range w.hosts {
		h.atPersist, h.atSend = "", false
		if h.sp == nil && !h.retired {
			h.start(false)
		}
	}
	w.runFor(90 * time.Second)
	w.operator()
	if w.fault != "" || w.over {
		return
	}
	w.must.atRest()
	for _, h := range w.hosts {
		h.newPods(2)
	}
}

// operator does what the problems ask for where a node finds nobody who can
// confirm its table: it forgets the owners that are gone for good, by force.
func (w *world) operator() {
	for _, h := range w.hosts {
		if h.sp == nil || h.unsure || h.sp.phase != Confirming || slices.ContainsFunc(w.hosts, func(o *host) bool { return o != h && o.sp != nil && !o.unsure && o.sp.joined }) {
			continue
		}
		var gone []NodeID
		for _, sh := range h.sp.Status(w.now).Shares {
			if !sh.Alive {
				gone = append(gone, sh.Node)
			}
		}
		for _, p := range h.sp.Peers() {
			if id := NodeID(p.ID); !h.sp.isAlive(id) && !slices.Contains(gone, id) {
				gone = append(gone, id)
			}
		}
		for _, id := range gone {
			w.forget(h, id, true)
			w.runFor(2 * time.Second)
		}
		w.runFor(30 * time.Second)
	}
}
