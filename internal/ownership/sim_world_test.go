package ownership

import (
	"container/heap"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/membership"
)

// A world is one run of the simulation: hosts with disks and pods, a network
// between them, a clock that jumps from event to event, and everything drawn
// from one seed.
type world struct {
	seed  uint64
	rng   *rand.Rand
	now   time.Time
	queue events
	next  uint64 // event number, orders events of one moment

	hosts    []*host
	params   simParams
	loss     float64
	dup      float64
	slow     float64 // share of messages that take seconds
	parted   time.Time
	wasParts bool

	starts *starts // nil: everybody knows everybody

	must  invariants
	trace []string
	steps int
	fault string // the first violation
	over  bool   // nothing more can be learned from this schedule
}

type simParams struct {
	hosts    int
	cidrs    []netip.Prefix
	len4     int
	len6     int
	cooldown time.Duration
	plant    string // a planted bug's name, or ""
}

// A host survives its agent: pods and disk stay when the process is gone.
type host struct {
	w     *world
	index int
	name  string
	id    NodeID
	cfg   Config

	sp         *Machine // nil: the agent does not run
	run        int      // counts starts
	upAt       time.Time
	downAt     time.Time
	wrote      bool      // has saved its state in this run
	aliveAt    time.Time // when it was last alive, as ipam.Store.Alive notes it
	group      int       // hosts of one group reach each other
	retired    bool
	disk       *ipam.State
	older      []*ipam.State
	witness    *ipam.State // what was saved last, as ipam.Store.Fresh finds out
	pods       map[string][]netip.Addr
	podSeq     int
	lostChange []Entry // what a rolled back disk does not know of, until confirmed
	unsure     bool    // runs from a rolled back disk and is not confirmed yet

	addr     int // in a world of starts: its address, its circle of acquaintances, its name server
	circle   int
	resolver resolver
	told     map[int]time.Time // when its resolver last gave an address for a seed, in this run
	joinedAt time.Time         // when it got into its cluster in this run

	// armed faults, used up by the next persist or send
	atPersist  string // "", "crash before", "crash after", "fail", "fail late"
	atSend     bool
	unwritten  *ipam.State // planted: told to be on disk, but is not yet
	forgetting *Op
	victim     *host
	victimID   NodeID
	takeover   *takeover
	sawVictim  bool           // the victim was in reach before this step
	blocks     []netip.Prefix // open, as last looked at
	tun        [2]netip.Addr  // of this run, by family

	changedCIDR bool // its --pod-cidr was set, changed or removed between two runs
}

type event struct {
	at  time.Time
	num uint64
	do  func()
}

type events []event

func (q events) Len() int { return len(q) }
func (q events) Less(i, j int) bool {
	if !q[i].at.Equal(q[j].at) {
		return q[i].at.Before(q[j].at)
	}
	return q[i].num < q[j].num
}
func (q events) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *events) Push(x any)   { *q = append(*q, x.(event)) }
func (q *events) Pop() any {
	old := *q
	x := old[len(old)-1]
	*q = old[:len(old)-1]
	return x
}

func (w *world) after(d time.Duration, do func()) {
	w.next++
	heap.Push(&w.queue, event{w.now.Add(d), w.next, do})
}

// runFor lets virtual time pass.
func (w *world) runFor(d time.Duration) {
	end := w.now.Add(d)
	for w.fault == "" && !w.over && len(w.queue) > 0 && !w.queue[0].at.After(end) {
		e := heap.Pop(&w.queue).(event)
		w.now = e.at
		e.do()
	}
	w.now = end
}

func (w *world) logf(format string, args ...any) {
	line := fmt.Sprintf("%8.3fs ", w.now.Sub(simStart).Seconds()) + fmt.Sprintf(format, args...)
	w.trace = append(w.trace, line)
	if len(w.trace) > 2000 {
		w.trace = slices.Delete(w.trace, 0, 1000)
	}
}

func (w *world) fail(format string, args ...any) {
	if w.fault == "" {
		w.fault = fmt.Sprintf(format, args...)
		w.logf("VIOLATION %s", w.fault)
	}
}

var simStart = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

var errCrash = errors.New("simulated crash")

// step runs one call into a host's machine: it may crash halfway, and the invariants
// are checked when it has returned.
func (w *world) step(h *host, what string, do func(sp *Machine)) {
	if h.sp == nil || w.fault != "" || w.over {
		return
	}
	w.steps++
	before, was := h.sp.table.Clone(), h.sp.cluster
	sp := h.sp
	h.sawVictim = h.victim != nil && h.victim != h && h.victim.id == h.victimID && h.reaches(h.victim)
	func() {
		defer func() {
			if p := recover(); p != nil {
				if p != errCrash {
					panic(p)
				}
				w.logf("%s crashes in %s", h.name, what)
				h.stop()
			}
		}()
		do(sp)
	}()
	if h.unwritten != nil && h.sp != nil {
		h.write(h.unwritten)
	}
	h.unwritten = nil
	if was.IsZero() && !sp.cluster.IsZero() && w.starts != nil {
		h.joinedAt = w.now
		w.must.began(h, sp)
	}
	if !w.over {
		w.must.afterStep(h, sp, before)
	}
}

// stop ends the agent; disk and pods stay.
func (h *host) stop() {
	if h.sp != nil && (h.cfg.Fresh || h.wrote) {
		h.aliveAt = h.w.now
	}
	h.sp, h.downAt = nil, h.w.now
	h.w.relink()
	h.atPersist, h.atSend = "", false
	h.forgetting, h.blocks = nil, nil
}

// start runs the agent from the disk.
func (h *host) start(fresh bool) {
	w := h.w
	h.run++
	h.upAt, h.tun = w.now, [2]netip.Addr{}
	h.cfg.ID, h.wrote = h.id, false
	h.cfg.Fresh = fresh && h.disk != nil && h.disk == h.witness && w.now.Sub(h.aliveAt) <= ipam.FreshFor
	h.cfg.Rand = rand.New(rand.NewPCG(w.rng.Uint64(), 1))
	sp, err := New(w.now, h.cfg, h.disk, simEnv{h})
	if err != nil {
		w.fail("%s does not start: %v", h.name, err)
		return
	}
	sp.plant = w.planted()
	h.sp = sp
	if w.starts != nil {
		w.starts.circles++
		h.circle, h.joinedAt, h.told = w.starts.circles, time.Time{}, make(map[int]time.Time)
		w.relink()
	}
	w.logf("%s starts (%s), phase %v, fresh %v", h.name, h.id.Short(), sp.phase, h.cfg.Fresh)
	var live []ipam.Allocation
	for _, key := range sortedStrings(h.pods) {
		for _, a := range h.pods[key] {
			live = append(live, ipam.Allocation{Addr: a, Key: key})
		}
	}
	w.step(h, "adopt", func(sp *Machine) { sp.Adopt(w.now, live) })
	run := h.run
	if w.starts != nil {
		w.after(0, func() { h.knock(run, 0) })
	}
	h.tick(run)
	w.after(time.Duration(w.rng.IntN(1000))*time.Millisecond, func() { h.pushPull(run) })
}

func sortedStrings[V any](m map[string]V) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

func (h *host) tick(run int) {
	if h.run != run || h.sp == nil {
		return
	}
	w := h.w
	next := w.now.Add(time.Second)
	w.step(h, "tick", func(sp *Machine) { next = sp.Tick(w.now) })
	w.after(max(next.Sub(w.now), 100*time.Millisecond)+time.Duration(w.rng.IntN(200))*time.Millisecond, func() { h.tick(run) })
}

// pushPull exchanges the whole state with one other member, as gossip does.
func (h *host) pushPull(run int) {
	if h.run != run || h.sp == nil {
		return
	}
	w := h.w
	w.after(4*time.Second+time.Duration(w.rng.IntN(3000))*time.Millisecond, func() { h.pushPull(run) })
	var others []*host
	for _, o := range w.hosts {
		if o != h && h.reaches(o) && h.met(o) {
			others = append(others, o)
		}
	}
	if len(others) == 0 {
		return
	}
	o := others[w.rng.IntN(len(others))]
	if c, d := h.sp.cluster, o.sp.cluster; !c.IsZero() && !d.IsZero() && c != d {
		return // gossip's guard
	}
	mine, theirs := h.sp.LocalState(w.now, false), o.sp.LocalState(w.now, false)
	if w.rng.Float64() >= w.loss {
		w.step(o, "push/pull", func(sp *Machine) { sp.MergeState(w.now, mine, false) })
	}
	if w.rng.Float64() >= w.loss {
		w.step(h, "push/pull", func(sp *Machine) { sp.MergeState(w.now, theirs, false) })
	}
}

// reaches reports whether packets from h get to o now. A host that runs from a
// rolled back disk is cut off unless the condition of the proof holds: every change
// that its disk has lost is known to somebody whom it reaches (see confirmation).
func (h *host) reaches(o *host) bool {
	if h.sp == nil || o.sp == nil || h.group != o.group {
		return false
	}
	return !(h.unsure && !h.witnessed()) && !(o.unsure && !o.witnessed())
}

func (h *host) witnessed() bool {
	for _, e := range h.lostChange {
		known := false
		for _, o := range h.w.hosts {
			// A witness that is itself unsure may be cut off; one that has just
			// started is not seen by gossip yet, and would not be asked.
			if o != h && o.sp != nil && !o.unsure && h.w.now.Sub(o.upAt) > time.Second && o.group == h.group && o.sp.joined && knows(o.sp.table, e) {
				known = true
				break
			}
		}
		if !known {
			return false
		}
	}
	return true
}

// knows reports whether the table is at e's version, or beyond, all over e.
func knows(t *membership.Table, e Entry) bool {
	cut := t.Within(e.Prefix)
	for _, c := range cut {
		if c.Version < e.Version {
			return false
		}
	}
	return len(cut) > 0
}

func (w *world) deliver(to *host, delay time.Duration, do func(sp *Machine)) {
	w.after(delay, func() { w.step(to, "message", do) })
}

// carry sends bytes from one host to another through the bad network.
func (w *world) carry(from, to *host, do func(sp *Machine)) {
	for copies := 1; copies > 0; copies-- {
		if w.rng.Float64() < w.dup {
			copies++
		}
		if w.rng.Float64() < w.loss {
			continue
		}
		delay := time.Duration(1+w.rng.IntN(60)) * time.Millisecond
		if w.rng.Float64() < w.slow {
			delay = time.Duration(w.rng.IntN(8000)) * time.Millisecond
		}
		sender := from.id
		w.after(delay, func() {
			if to.sp != nil && from.id == sender && from.group == to.group &&
				(from.sp == nil && !to.unsure || from.reaches(to)) {
				w.step(to, "message", do)
			}
		})
	}
}

func (w *world) planted() (p plants) {
	switch w.params.plant {
	case "merge takes the lower version":
		p.merge = mergeLower
	case "bootstrap with a live seed":
		p.bootstrapLive = true
	case "newcomers do not ask each other":
		p.foundAlone = true
	case "no wait for members that call":
		p.foundAtOnce = true
	case "forget of a live node":
		p.forgetLive = true
	}
	return p
}

// mergeLower is the planted bug: where both sides know a version, the lower wins.
func mergeLower(t *membership.Table, in []Entry) ([]Entry, []membership.Conflict) {
	var list []Entry
	for _, e := range in {
		for _, old := range t.Within(e.Prefix) {
			if old.Version < e.Version {
				list = append(list, old)
			} else {
				e := e
				if ipam.Covers(e.Prefix, old.Prefix) {
					e.Prefix = old.Prefix
				}
				list = append(list, e)
			}
		}
		if len(t.Overlapping(e.Prefix)) == 0 {
			list = append(list, e)
		}
	}
	var minus []netip.Prefix
	for _, e := range list {
		minus = append(minus, e.Prefix)
	}
	before := t.Clone()
	for _, e := range before.Entries() {
		for _, p := range ipam.Subtract(e.Prefix, minus, e.Prefix.Addr().BitLen()) {
			rest := e
			rest.Prefix = p
			list = append(list, rest)
		}
	}
	*t = *membership.NewTable(list)
	var changed []Entry
	for _, e := range t.Entries() {
		if old := before.Within(e.Prefix); len(old) != 1 || !old[0].Equal(e) {
			changed = append(changed, e)
		}
	}
	return changed, nil
}

func (w *world) report() string {
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d: %s\nhosts %d, cidrs %v, blocks /%d /%d, %d steps\n", w.seed, w.fault, w.params.hosts, w.params.cidrs, w.params.len4, w.params.len6, w.steps)
	test := "TestSimulation$"
	if w.starts != nil {
		test = "TestSimulationOfStarts$"
	}
	fmt.Fprintf(&b, "replay: go test ./internal/ownership -run %s -sim.seed=%d\n", test, w.seed)
	from := max(0, len(w.trace)-120)
	for _, line := range w.trace[from:] {
		b.WriteString(line + "\n")
	}
	for _, h := range w.hosts {
		if h.sp == nil {
			fmt.Fprintf(&b, "%s %s down\n", h.name, h.id.Short())
			continue
		}
		fmt.Fprintf(&b, "%s %s %v confirmed=%v blocks %v why %q\n   table %v\n", h.name, h.id.Short(), h.sp.phase, h.sp.confirm.done, h.sp.pool.Prefixes(), h.sp.why, h.sp.table.Entries())
	}
	return b.String()
}
