package path

import (
	"time"

	"github.com/tulle-net/tulle/tunnel/mtu"
)

// search is the state of the machine below.
type search uint8

const (
	disabled search = iota
	base
	searching
	complete
	failing
)

func (s search) String() string {
	switch s {
	case base:
		return "base"
	case searching:
		return "search"
	case complete:
		return "complete"
	case failing:
		return "error"
	}
	return "disabled"
}

// plpmtu finds the largest packet that passes (RFC 8899 §5.2), one probe at a time:
//
//	              path up (again)               base answered
//	┌──────────┐ ─────────────────▶ ┌──────┐ ─────────────────▶ ┌───────────┐
//	│ disabled │                    │ base │                    │ searching │ ◀─┐
//	└──────────┘ ◀───────────────── └──────┘ ◀───────────────┐  └───────────┘   │ Raise timer,
//	              path down          │    ▲    MaxProbes of  │         │        │ link MTU larger
//	              (from anywhere)    │    │    the size in   │         │ nothing│
//	              MaxProbes of base  │    │    use are lost: │         │ between│
//	              lost               ▼    │    a black hole  │         ▼ left   │
//	                            ┌───────┐ │                  └──── ┌──────────┐ │
//	                            │ error │ │ (to searching, below   │ complete │─┘
//	                            └───────┘─┘  base)                 └──────────┘
//	                                 min answered
//
// A search tries the maximum first, since most paths carry it, then the sizes that are
// likely (of links that others have), and then halves the interval between what is
// proven and what is refuted. A size is refuted by
// MaxProbes losses, while smaller packets pass (more where these are lost by chance). proven, the PLPMTU, rises
// only by an answer.
//
// What a router says by ICMP is a hint, as anybody may say it. It lowers proven at once,
// because a true one comes while packets are lost, but not below base. Then the size
// before is tested again (searching): its answer undoes the hint. If it is lost, the
// size that the router named is tested (base), and if it passes, the next larger one:
// the search is over if that is refuted, else it goes on as if there had been no hint.
//
// A path that comes up again keeps its size but has to prove it first.
type plpmtu struct {
	cfg    *Config
	state  search
	epoch  uint32  // answers to probes of an older epoch prove nothing
	proven mtu.TUN // the PLPMTU; 0: nothing proven
	hi     mtu.TUN // smallest size that is refuted; Max+1 when none is
	known  bool    // a search has ended, or a size was refuted: proven is all that passes for certain

	size    mtu.TUN // under test
	losses  int     // of size
	waiting bool    // for the answer to nonce
	nonce   uint64

	probeAt   time.Time // of the next probe, unless complete
	confirmAt time.Time // complete: proof of the size in use, if busy
	raiseAt   time.Time // complete: next search
	againAt   time.Time // complete: likewise, see searchAt

	named     mtu.TUN   // the size of the last hint of a router, until the search is over; 0: none
	doubted   bool      // proven was lowered by that hint, and the size before is under test
	deaf      time.Time // until then hints lower nothing: one has been undone
	confirmed bool      // complete: false until proven since start or loss
	short     int       // how often base was refuted since it last passed
}

// settled reports that the search is over: proven changes no more for the time being.
func (m *plpmtu) settled() bool {
	return (m.state == complete || m.state == failing) && m.room() != untold
}

// room is what a path takes.
type room uint8

const (
	untold  room = iota
	nothing      // no packet but the smallest
	little       // less than base
	enough       // base or more
)

// shortAfter is how often base has to be refuted in a row until the path is known to take less: one refutation may be chance where it loses much.
const shortAfter = 4

func (m *plpmtu) room() room {
	switch {
	case m.proven >= m.cfg.Base:
		return enough
	case m.short < shortAfter:
		return untold
	case m.proven > 0:
		return little
	}
	return nothing
}

// start begins, or begins again, after the path has come up.
func (m *plpmtu) start(now time.Time) {
	m.epoch++
	m.hi, m.short = m.cfg.Max+1, 0
	if m.proven > m.cfg.Base {
		m.enterComplete(now)
		m.confirmed, m.confirmAt = false, now
		m.raiseAt = now // once confirmed, look whether more has become possible
		return
	}
	m.enterBase(now)
}

// stop ends all probing until start.
func (m *plpmtu) stop() {
	m.epoch++
	m.state, m.waiting = disabled, false
	m.named, m.doubted = 0, false
}

func (m *plpmtu) enterBase(now time.Time) {
	m.state, m.doubted = base, false
	m.test(now, min(m.cfg.Base, m.hi-1))
}

func (m *plpmtu) enterComplete(now time.Time) {
	m.state, m.known = complete, true
	m.confirmed, m.named, m.doubted = true, 0, false
	m.test(now, m.proven)
	m.confirmAt = now.Add(m.cfg.Confirm)
	m.raiseAt = now.Add(m.cfg.Raise)
	m.againAt = now.Add(m.again())
}

// searchAt is the time of the next search. A busy path that takes less than base is tried with base sooner.
func (m *plpmtu) searchAt(busyUntil time.Time) time.Time {
	if m.proven < m.cfg.Base && m.againAt.Before(busyUntil) {
		return earlier(m.raiseAt, m.againAt)
	}
	return m.raiseAt
}

// again is the time until such a try.
func (m *plpmtu) again() time.Duration {
	if m.short < shortAfter {
		return m.cfg.Retry
	}
	return m.cfg.MaxRetry
}

// test makes size the one under test.
func (m *plpmtu) test(now time.Time, size mtu.TUN) {
	m.size, m.losses, m.waiting, m.probeAt = size, 0, false, now
}

// narrow picks the next size between proven and hi, or completes.
func (m *plpmtu) narrow(now time.Time) {
	if m.hi-m.proven <= 1 {
		m.enterComplete(now)
		return
	}
	m.state = searching
	switch {
	case m.proven < m.cfg.Base && m.hi > m.cfg.Base && m.named == 0:
		m.test(now, m.cfg.Base)
	case m.named != 0 && m.named == m.proven: // what a router names is likely to be all
		m.test(now, m.named+1)
	case m.named > m.proven && m.named < m.hi:
		m.test(now, m.named)
	case m.hi > m.cfg.Max:
		m.test(now, m.cfg.Max)
	default:
		m.test(now, m.between())
	}
}

// between is a size above what is proven and below what is refuted: the largest likely
// one, or, when that one is what is proven, the next byte; else the middle.
func (m *plpmtu) between() mtu.TUN {
	for _, size := range m.cfg.Likely { // largest first
		switch {
		case size == m.proven:
			return size + 1
		case size > m.proven && size < m.hi:
			return size
		}
	}
	return m.proven + (m.hi-m.proven)/2
}

// due is the size of the probe that has to go out at now, if any.
func (m *plpmtu) due(now, busyUntil time.Time) (mtu.TUN, bool) {
	if m.state == disabled || m.waiting {
		return 0, false
	}
	if m.state != complete {
		return m.size, !now.Before(m.probeAt)
	}
	if m.confirmed && !now.Before(m.searchAt(busyUntil)) && !now.Before(m.confirmAt) {
		m.confirmed, m.confirmAt = false, now // first see that what is in use still passes
	}
	if m.confirmed && !now.Before(m.searchAt(busyUntil)) {
		m.hi = m.cfg.Max + 1
		m.narrow(now)
		if m.state == searching {
			return m.size, true
		}
	}
	return m.size, m.confirms(busyUntil) && !now.Before(m.confirmAt)
}

// confirms reports that the size in use has to be proven at confirmAt: an idle path
// is left alone, one that may be a black hole is not.
func (m *plpmtu) confirms(busyUntil time.Time) bool {
	return !m.confirmed || m.confirmAt.Before(busyUntil)
}

// next is when due has to be asked again; false: only after an event.
func (m *plpmtu) next(busyUntil time.Time) (time.Time, bool) {
	switch {
	case m.state == disabled || m.waiting: // the time-out wakes the owner
		return time.Time{}, false
	case m.state != complete:
		return m.probeAt, true
	case !m.confirmed:
		return m.confirmAt, true
	}
	at := m.searchAt(busyUntil)
	if m.confirms(busyUntil) && m.confirmAt.Before(at) {
		return m.confirmAt, true
	}
	return at, true
}

// sent notes the probe that due asked for.
func (m *plpmtu) sent(nonce uint64, deadline time.Time) {
	m.waiting, m.nonce, m.probeAt = true, nonce, deadline
}

// answered: a packet of size bytes has passed, in this epoch.
func (m *plpmtu) answered(now time.Time, nonce uint64, size mtu.TUN) {
	if m.state == disabled {
		return
	}
	if m.waiting && nonce == m.nonce {
		m.waiting = false
		if size < m.size { // cut on its way: as good as lost
			m.probeAt = now
			m.refuteOnce(now, m.cfg.MaxProbes)
			return
		}
	}
	if m.state == complete && size >= m.proven {
		m.confirmed, m.losses = true, 0
		m.confirmAt = now.Add(m.cfg.Confirm)
	}
	// After a black hole base and error test what is believed already.
	testing := m.state == base || m.state == failing
	undone := m.doubted && size >= m.size // also where the hint has not lowered what is proven, which was base or less
	if testing && size < m.size || !testing && size <= m.proven && !undone {
		return
	}
	if m.named != 0 && size > m.named { // the hint was untrue
		m.named, m.doubted, m.deaf = 0, false, now.Add(deafFor)
	}
	m.proven = size
	if size >= m.cfg.Base {
		m.short = 0
	}
	if m.hi <= size { // it was refuted too early
		m.hi = m.cfg.Max + 1
	}
	m.narrow(now)
}

// lost: the probe with this nonce was given up. sizeIsToBlame is false where smaller
// packets may have been lost as well: then it is only sent again. A size is refuted by refute losses in a row.
func (m *plpmtu) lost(now time.Time, nonce uint64, sizeIsToBlame bool, refute int) {
	if !m.waiting || nonce != m.nonce {
		return
	}
	m.waiting, m.probeAt = false, now
	if sizeIsToBlame {
		m.refuteOnce(now, refute)
	} else if m.state == complete {
		m.confirmed, m.confirmAt = false, now
	}
}

// refuteOnce counts a loss of the size under test and draws the conclusion.
func (m *plpmtu) refuteOnce(now time.Time, refute int) {
	m.losses++
	if m.state == complete {
		m.confirmed, m.confirmAt = false, now // do not wait for traffic to try again
	}
	if m.doubted { // the hint may be true. Does what it names pass, and no more?
		m.doubted, m.state = false, base
		m.test(now, m.named)
		return
	}
	if m.losses < refute {
		return
	}
	m.known = true
	switch m.state {
	case searching:
		m.hi = m.size
		if m.size == m.cfg.Base { // as before: is what passes all?
			m.short++
			m.named = m.proven
		}
		m.narrow(now)
	case complete: // black hole, RFC 8899 §4.3
		m.epoch++
		m.hi = m.size
		m.proven = min(m.proven, m.cfg.Base, m.hi-1)
		m.enterBase(now)
	case base:
		if m.size > m.cfg.Base { // it was a hint's
			m.hi = m.size
			m.proven = min(m.proven, m.cfg.Base)
			m.enterBase(now)
			return
		}
		m.epoch++
		m.short++
		m.hi = m.size
		m.proven = min(m.proven, m.cfg.Min, m.hi-1)
		m.state = failing
		m.test(now, m.cfg.Min)
	case failing: // nothing but small packets passes: keep trying, slowly
		m.losses = 0
		m.short++
		m.proven = 0
		m.hi = m.cfg.Max + 1
		m.probeAt = now.Add(m.again())
	}
}

// deafFor is how long hints lower nothing after one that was undone: probes find a true one meanwhile, as where no router says anything.
const deafFor = 10 * time.Second

// tooBig is a hint of a router, RFC 8899 §4.6.2: below the minimum or above what is of interest it is ignored.
func (m *plpmtu) tooBig(now time.Time, limit mtu.TUN) {
	if m.state == disabled || limit < m.cfg.Min || limit >= min(m.cfg.Max, m.hi-1) || m.named != 0 && limit >= m.named {
		return
	}
	lowers := limit < m.proven && (m.state == complete || m.state == searching)
	if lowers && now.Before(m.deaf) {
		return
	}
	m.named, m.known = limit, true
	before := m.proven
	if lowers {
		m.proven = min(m.proven, max(limit, m.cfg.Base))
	}
	switch {
	case lowers && m.doubted: // the size before these hints is under test
	case lowers:
		m.epoch++
		m.state, m.doubted = searching, true
		m.test(now, before)
	case m.state == complete || m.state == searching:
		m.epoch++
		m.narrow(now)
	case m.size > limit: // in base
		m.epoch++
		m.state = base
		m.test(now, limit)
	}
}

// lower caps everything at limit.
func (m *plpmtu) lower(now time.Time, limit mtu.TUN) {
	m.hi, m.known, m.named, m.doubted = limit+1, true, 0, false
	shrunk := m.proven > limit
	m.proven = min(m.proven, limit)
	switch {
	case m.state == disabled:
	case m.state == complete || m.state == searching:
		m.epoch++
		if m.proven == limit {
			m.enterComplete(now)
			if shrunk {
				m.confirmed, m.confirmAt = false, now
			}
			return
		}
		m.state = searching
		m.test(now, limit)
	case m.size > limit:
		m.epoch++
		m.enterBase(now)
	}
}

// setMax takes over a changed Config.Max.
func (m *plpmtu) setMax(now time.Time) {
	limit := m.cfg.Max
	if m.proven > limit || m.size > limit {
		m.lower(now, limit)
		return
	}
	m.hi, m.named, m.doubted = limit+1, 0, false
	if m.state == complete || m.state == searching {
		m.epoch++
		m.narrow(now)
	}
}
