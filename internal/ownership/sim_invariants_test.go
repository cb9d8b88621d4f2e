package ownership

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/membership"
)

// invariants is what must hold, and the bookkeeping to see whether it does. It looks at
// the hosts from outside: which pod has which address, what was answered, what is
// on which disk.
//
// The documented exception is a forget, forced or not, of which somebody cannot hear: whoever still uses space that was
// taken over (the node that was forgotten, or somebody whom it gave space to and the
// taker did not hear of) may collide with the taker, and with those who have the
// space from the taker. lineage says who has which space by way of which takeover; see excuse.
type invariants struct {
	w        *world
	holders  map[netip.Addr][]holder
	released map[netip.Addr]release
	facts    map[*host][]Entry // donations that a host has answered
	changes  map[*host][]Entry // all changes that a host made to its own space
	lineage  map[NodeID][]inherited
	taken    []netip.Prefix
	excused  int
	seen     map[string]int // how often what happened
}

// takeover is one forget that took something.
type takeover struct {
	forced bool
	at     time.Time
}

// inherited is space that a node has by way of a takeover: from whom it was taken, and at which version.
type inherited struct {
	prefix  netip.Prefix
	by      *takeover
	from    NodeID
	version uint64
}

type holder struct {
	h   *host
	key string
}

type release struct {
	h  *host
	at time.Time
}

func (l *invariants) init(w *world) {
	l.w = w
	l.holders = make(map[netip.Addr][]holder)
	l.released = make(map[netip.Addr]release)
	l.facts = make(map[*host][]Entry)
	l.changes = make(map[*host][]Entry)
	l.seen = make(map[string]int)
	l.lineage = make(map[NodeID][]inherited)
}

func tableOf(st *ipam.State) *membership.Table {
	if st == nil {
		return new(membership.Table)
	}
	entries, _, _ := membership.DecodeEntries(st.Table)
	return membership.NewTable(entries)
}

// excuse reports whether a collision over p falls under the exception: one of the two has p by a takeover of which the other
// one does not know. Two may have taken the same from the same node only by force: the promises of a majority exclude that.
// now are those of the two that take p into use at this moment.
func (l *invariants) excuse(a, b *host, p netip.Prefix, now ...*host) bool {
	x, y := l.takeovers(a, p), l.takeovers(b, p)
	return l.unheard(x, y, b, p, slices.Contains(now, b)) || l.unheard(y, x, a, p, slices.Contains(now, a))
}

// unheard reports whether some takeover explains that other, which has p by others or by none, uses p.
func (l *invariants) unheard(by, others []inherited, other *host, p netip.Prefix, now bool) bool {
	for _, t := range by {
		shared := slices.ContainsFunc(others, func(o inherited) bool { return o.by == t.by })
		twice := slices.ContainsFunc(others, func(o inherited) bool {
			return o.from == t.from && o.version == t.version && !o.by.forced && !t.by.forced
		})
		knows := now && slices.ContainsFunc(other.sp.table.Within(p), func(e Entry) bool { return e.Version > t.version && e.Owner != other.id })
		// Who was forgotten without force while it was down, and starts again, has asked somebody before it serves new pods.
		unasked := now && other.id == t.from && !t.by.forced && other.upAt.After(t.by.at) && !other.sp.confirm.done
		if !shared && !twice && !knows && !unasked {
			l.excused++
			return true
		}
	}
	return false
}

// takeovers returns by which takeovers a host has p.
func (l *invariants) takeovers(h *host, p netip.Prefix) (out []inherited) {
	for _, i := range l.lineage[h.id] {
		if ipam.Covers(i.prefix, p) {
			out = append(out, i)
		}
	}
	return out
}

// onSend notes what is answered.
func (l *invariants) onSend(h *host, to NodeID, msg []byte) {
	m, err := decode(msg)
	if err != nil {
		l.w.fail("%s sends what does not decode: %v", h.name, err)
		return
	}
	if m.kind == kindGrant && m.flags&flagLacking == 0 {
		l.seen["donation"]++
		l.facts[h] = append(l.facts[h], m.entries...)
	}
	if m.kind == kindFoundAck {
		if m.flags&flagFounder != 0 {
			l.seen["another founder heard of"]++
		}
		if m.flags&flagYes == 0 {
			l.seen["consent refused to a founder"]++
		}
	}
	if m.kind == kindGrant || m.kind == kindGive {
		for _, e := range m.entries {
			for _, i := range l.lineage[h.id] {
				if e.Owner != h.id && e.Prefix.Overlaps(i.prefix) {
					if ipam.Covers(i.prefix, e.Prefix) {
						i.prefix = e.Prefix
					}
					l.inherit(e.Owner, i)
				}
			}
		}
	}
}

func (l *invariants) inherit(id NodeID, i inherited) {
	if !slices.Contains(l.lineage[id], i) {
		l.lineage[id] = append(l.lineage[id], i)
	}
}

// onDisk is S3: a donation that was answered stays on the giver's disk.
func (l *invariants) onDisk(h *host) {
	if h.unsure {
		return
	}
	disk := tableOf(h.disk)
	for _, e := range l.facts[h] {
		if !knows(disk, e) {
			l.w.fail("S3: %s has answered with %v, its disk says %v", h.name, e, disk.Within(e.Prefix))
		}
	}
}

func (l *invariants) afterStep(h *host, sp *Machine, before *membership.Table) {
	changed := !sp.table.Equal(before)
	if changed {
		l.seeChanges(h, sp, before)
	}
	if h.victim != nil {
		l.seeForget(h, sp, before)
	}
	if h.sp == nil {
		l.onDisk(h)
		return
	}
	if h.unsure && sp.confirm.done {
		for _, e := range h.lostChange {
			if !knows(sp.table, e) {
				l.w.fail("%s is confirmed, but does not know of its own change %v", h.name, e)
			}
		}
		l.seen["confirmed after a rollback"]++
		if len(h.lostChange) > 0 {
			l.seen["lost change learned again"]++
		}
		h.unsure, h.lostChange = false, nil
	}
	if changed {
		l.seeTable(h, sp)
	}
	l.seeBlocks(h, sp)
	l.seeTun(h, sp)
}

// seeTun checks that the address of the TUN device stays while an agent runs, unless it loses space. A fixed block that
// begins elsewhere takes it over.
func (l *invariants) seeTun(h *host, sp *Machine) {
	for key := range sp.notes {
		if strings.HasPrefix(key, "lost ") {
			h.tun = [2]netip.Addr{}
			return
		}
	}
	for i, six := range []bool{false, true} {
		was := h.tun[i]
		h.tun[i], _ = sp.pool.TunAddr(six)
		if !was.IsValid() || was == h.tun[i] || sp.left {
			continue
		}
		e, _ := sp.table.Owner(was)
		if e.Owner == h.id && !ipam.Overlaps(h.cfg.PodCIDRs, netip.PrefixFrom(was, was.BitLen())) {
			l.w.fail("%s: the tun address %v becomes %v while it runs", h.name, was, h.tun[i])
		}
	}
}

// seeChanges notes what a host has done to its own space.
func (l *invariants) seeChanges(h *host, sp *Machine, before *membership.Table) {
	for _, e := range before.Owned(h.id) {
		for _, now := range sp.table.Within(e.Prefix) {
			if now.Version > e.Version {
				l.changes[h] = append(l.changes[h], now)
			}
		}
	}
}

// lost returns the changes that a host's present disk knows, or that it has
// answered with, and an older disk does not.
func (l *invariants) lost(h *host, old *membership.Table) (out []Entry) {
	disk := tableOf(h.disk)
	for _, e := range l.changes[h] {
		if knows(disk, e) && !knows(old, e) {
			out = append(out, e)
		}
	}
	for _, e := range l.facts[h] {
		if !knows(old, e) {
			out = append(out, e)
		}
	}
	return out
}

// seeForget notes what a takeover took, and looks at its guard.
func (l *invariants) seeForget(h *host, sp *Machine, before *membership.Table) {
	v := h.victim
	done := false
	if h.forgetting != nil {
		select {
		case <-h.forgetting.Done():
			done = true
		default:
		}
	}
	took := false
	// A takeover whose save failed may be on the disk all the same, and comes to
	// life with the next start.
	for _, e := range slices.Concat(sp.table.Entries(), tableOf(h.disk).Entries()) {
		if e.Owner != sp.cfg.ID {
			continue
		}
		for _, old := range before.Within(e.Prefix) {
			if old.Owner != sp.cfg.ID && old.Version < e.Version {
				p := old.Prefix
				l.taken = append(l.taken, p)
				l.inherit(sp.cfg.ID, inherited{p, h.takeover, old.Owner, old.Version})
				if took = true; h.takeover.at.IsZero() {
					h.takeover.at = l.w.now
				}
			}
		}
	}
	if took && h.sp != nil && h.forgetting == nil || took && done {
		stable := l.w.now.Sub(later(later(h.upAt, v.upAt), l.w.parted)) > 10*time.Second
		if h.sawVictim && stable {
			l.w.fail("%s forgot %s, which is alive and in reach", h.name, v.name)
		}
		l.seen["takeover"]++
		l.w.logf("%s took over from %s", h.name, v.name)
	}
	if done || h.sp == nil {
		h.victim, h.forgetting = nil, nil
	}
}

// seeTable checks that nothing of the cluster's space is missing, and that there
// is one cluster.
func (l *invariants) seeTable(h *host, sp *Machine) {
	var list []netip.Prefix
	for _, e := range sp.table.Entries() {
		list = append(list, e.Prefix)
	}
	for _, c := range l.w.params.cidrs {
		if rest := ipam.Subtract(c, list, c.Addr().BitLen()); len(rest) > 0 {
			l.w.fail("S2: %s knows no owner of %v", h.name, rest)
		}
	}
	for _, o := range l.w.hosts {
		if o.sp != nil && !o.sp.cluster.IsZero() && o.sp.cluster != sp.cluster {
			l.w.fail("%s and %s are in two clusters", h.name, o.name)
		}
	}
}

// serves reports whether a host may hand out addresses of its blocks.
func (h *host) serves() bool {
	return h.sp != nil && (h.sp.confirm.done || h.sp.cfg.Fresh)
}

// seeBlocks checks that no two hosts have opened the same space.
func (l *invariants) seeBlocks(h *host, sp *Machine) {
	blocks := sp.pool.Prefixes()
	if slices.Equal(blocks, h.blocks) || !h.serves() {
		return
	}
	if len(blocks) > len(l.w.params.cidrs) {
		l.seen["further block"]++
	}
	h.blocks = blocks
	for _, o := range l.w.hosts {
		if o == h || !o.serves() {
			continue
		}
		for _, p := range blocks {
			for _, q := range o.sp.pool.Prefixes() {
				if !p.Overlaps(q) {
					continue
				}
				both := p
				if ipam.Covers(p, q) {
					both = q
				}
				if !l.excuse(h, o, both, h, o) {
					l.w.fail("S1: %s has block %v, %s has %v", h.name, p, o.name, q)
				}
			}
		}
	}
}

// handedOut is S1: no address is handed out twice, and none before its rest is over.
func (l *invariants) handedOut(h *host, key string, a netip.Addr) {
	p := netip.PrefixFrom(a, a.BitLen())
	for _, o := range l.holders[a] {
		if o.h == h || !l.excuse(h, o.h, p, h) {
			l.w.fail("S1: %v is handed out to %s on %s, while %s on %s has it", a, key, h.name, o.key, o.h.name)
		}
	}
	if r, ok := l.released[a]; ok && l.w.now.Sub(r.at) < l.w.params.cooldown && !ipam.Overlaps(l.taken, p) {
		l.w.fail("S1: %v is handed out on %s only %v after %s released it", a, h.name, l.w.now.Sub(r.at), r.h.name)
	}
	l.seen["address handed out"]++
	if _, ok := l.released[a]; ok {
		l.seen["address used again"]++
	}
	l.holders[a] = append(l.holders[a], holder{h, key})
}

func (l *invariants) takenBack(h *host, key string, a netip.Addr, rests bool) {
	l.holders[a] = slices.DeleteFunc(l.holders[a], func(o holder) bool { return o.h == h && o.key == key })
	if rests {
		l.released[a] = release{h, l.w.now}
	} else {
		delete(l.released, a)
	}
}

// rolledBack takes out what a host cannot remember any more: it may not know of
// the rests of addresses that it has forgotten it ever gave, or was left.
func (l *invariants) rolledBack(h *host) {
	for _, c := range h.disk.Cooling {
		delete(l.released, c.Addr)
	}
	for a, r := range l.released {
		if r.h == h {
			delete(l.released, a)
		}
	}
}

// atRest is S2 and L1, checked when all is healed and has come to rest.
func (l *invariants) atRest() {
	w := l.w
	var first *host
	for _, h := range w.hosts {
		if h.sp == nil || h.unsure || h.sp.cluster.IsZero() {
			continue
		}
		if first == nil {
			first = h
		}
		if !h.sp.table.Equal(first.sp.table) {
			w.fail("S2: the tables of %s and %s differ after healing", first.name, h.name)
		}
		l.seeTable(h, h.sp)
		l.onDisk(h)
	}
	if first == nil {
		return
	}
	for _, h := range w.hosts {
		if h.sp == nil || h.unsure {
			continue
		}
		l.hasSpaceOrError(h)
		if n := len(h.sp.stranded()); n > 0 && len(h.sp.Status(w.now).Problems) == 0 {
			w.fail("%s has %d stranded pods and reports nothing", h.name, n)
		}
	}
}

func (l *invariants) hasSpaceOrError(h *host) {
	w, sp := l.w, h.sp
	switch sp.phase {
	case Ready:
		l.seen["ready at the end"]++
		for fam := range sp.params.Families {
			if p, fixed := sp.fixed(fam); fixed && slices.Contains(sp.pool.Prefixes(), p) {
				l.seen["fixed block"]++
				if h.changedCIDR {
					l.seen["fixed block after a change"]++
				}
			}
		}
	case Left:
		l.seen["left"]++
	case Joining:
		for fam := range sp.params.Families {
			f := sp.params.Families[fam]
			if slices.ContainsFunc(sp.pool.Prefixes(), f.CIDR.Overlaps) {
				continue
			}
			if p, fixed := sp.fixed(fam); fixed {
				if _, said := sp.notes["fixed "+p.String()]; !said {
					w.fail("L1: %s has no fixed block and no error: %s", h.name, sp.why)
				}
				l.seen["fixed block refused"]++
				continue
			}
			l.seen["exhausted at the end"]++
			if sp.asks[fam].full == "" {
				w.fail("L1: %s has no space of %v and no error: %s", h.name, f.CIDR, sp.why)
			}
			for _, o := range w.hosts {
				if o.sp != nil && o.serves() && o.sp.phase == Ready && len(o.sp.free(w.now, fam)) > 0 {
					w.fail("L1: %s finds the space exhausted, but %s has %v free", h.name, o.name, o.sp.free(w.now, fam))
				}
			}
		}
	default:
		w.fail("L1: %s is still %v: %s", h.name, sp.phase, sp.why)
	}
}
