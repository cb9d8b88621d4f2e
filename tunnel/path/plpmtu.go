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
// MaxProbes losses, while smaller packets pass, or by ICMP. proven, the PLPMTU, rises
// only by an answer.
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
	confirmed bool      // complete: false until proven since start or loss
}

// settled reports that the search is over: proven changes no more for the time being.
func (m *plpmtu) settled() bool { return m.state == complete || m.state == failing }

// start begins, or begins again, after the path has come up.
func (m *plpmtu) start(now time.Time) {
	m.epoch++
	m.hi = m.cfg.Max + 1
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
}

func (m *plpmtu) enterBase(now time.Time) {
	m.state = base
	m.test(now, min(m.cfg.Base, m.hi-1))
}

func (m *plpmtu) enterComplete(now time.Time) {
	m.state, m.known = complete, true
	m.confirmed = true
	m.test(now, m.proven)
	m.confirmAt = now.Add(m.cfg.Confirm)
	m.raiseAt = now.Add(m.cfg.Raise)
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
	if m.hi > m.cfg.Max {
		m.test(now, m.cfg.Max)
		return
	}
	m.test(now, m.between())
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
	if m.confirmed && !now.Before(m.raiseAt) && !now.Before(m.confirmAt) {
		m.confirmed, m.confirmAt = false, now // first see that what is in use still passes
	}
	if m.confirmed && !now.Before(m.raiseAt) {
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
	if m.confirms(busyUntil) && m.confirmAt.Before(m.raiseAt) {
		return m.confirmAt, true
	}
	return m.raiseAt, true
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
			m.refuteOnce(now)
			return
		}
	}
	if m.state == complete && size >= m.proven {
		m.confirmed, m.losses = true, 0
		m.confirmAt = now.Add(m.cfg.Confirm)
	}
	// After a black hole base and error test what is believed already.
	testing := m.state == base || m.state == failing
	if testing && size < m.size || !testing && size <= m.proven {
		return
	}
	m.proven = size
	if m.hi <= size { // it was refuted too early
		m.hi = m.cfg.Max + 1
	}
	m.narrow(now)
}

// lost: the probe with this nonce was given up. sizeIsToBlame is false where smaller
// packets may have been lost as well: then it is only sent again.
func (m *plpmtu) lost(now time.Time, nonce uint64, sizeIsToBlame bool) {
	if !m.waiting || nonce != m.nonce {
		return
	}
	m.waiting, m.probeAt = false, now
	if sizeIsToBlame {
		m.refuteOnce(now)
	} else if m.state == complete {
		m.confirmed, m.confirmAt = false, now
	}
}

// refuteOnce counts a loss of the size under test and draws the conclusion.
func (m *plpmtu) refuteOnce(now time.Time) {
	m.losses++
	if m.state == complete {
		m.confirmed, m.confirmAt = false, now // do not wait for traffic to try again
	}
	if m.losses < m.cfg.MaxProbes {
		return
	}
	m.known = true
	switch m.state {
	case searching:
		m.hi = m.size
		m.narrow(now)
	case complete: // black hole, RFC 8899 §4.3
		m.epoch++
		m.hi = m.size
		m.proven = min(m.proven, m.cfg.Base, m.hi-1)
		m.enterBase(now)
	case base:
		m.epoch++
		m.hi = m.size
		m.proven = min(m.proven, m.cfg.Min, m.hi-1)
		m.state = failing
		m.test(now, m.cfg.Min)
	case failing: // nothing but small packets passes: keep trying, slowly
		m.losses = 0
		m.proven = 0
		m.hi = m.cfg.Max + 1
		m.probeAt = now.Add(m.cfg.MaxRetry)
	}
}

// tooBig is RFC 8899 §4.6.2: below the minimum or above what is of interest it is
// ignored; else it refutes everything larger.
func (m *plpmtu) tooBig(now time.Time, limit mtu.TUN) {
	if limit < m.cfg.Min || limit >= m.cfg.Max || m.hi != 0 && limit >= m.hi-1 {
		return
	}
	m.lower(now, limit)
}

// lower caps everything at limit.
func (m *plpmtu) lower(now time.Time, limit mtu.TUN) {
	m.hi, m.known = limit+1, true
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
		m.test(now, limit) // what the router names is likely to be right
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
	m.hi = limit + 1
	if m.state == complete || m.state == searching {
		m.epoch++
		m.narrow(now)
	}
}
