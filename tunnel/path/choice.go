package path

import (
	"fmt"
	"slices"
	"time"

	"github.com/tulle-net/tulle/tunnel/encap"
)

// The choice's figures.
const (
	failAfter  = 3  // unanswered probes in a row that the candidate in use may not have, while another one answers
	lossy      = 5  // likewise where it loses some all the time, but not most; more where the other one loses some, too
	trial      = 5  // answers in a row, one each Busy, before a better candidate is used that never failed in use
	trialMost  = 60 // to which the trial grows: it doubles with each failure in use
	clean      = 10 // answers in a row to small probes, until the candidate in use is left as large ones do not pass
	forgive    = 10 * time.Minute
	leaveAfter = 3 * time.Second // a candidate that is not in the order any more is left, answers or not
)

// choice is which of a peer's candidates carries its packets. A peer has one among the
// encapsulations, and one for each family between the direct path and these: while that
// one has chosen any encapsulation, packets go by what the first one has chosen.
//
//	                   fails, and another one answers:
//	                   the best of those that do
//	┌────────────────┐ ───────────────────────────────▶ ┌──────────────────┐
//	│ the best is    │                                  │ a lesser one is  │ ─┐ fails, and
//	│ in use         │ ◀─────────────────────────────── │ in use           │ ◀┘ another answers
//	└────────────────┘  a better one has passed its     └──────────────────┘
//	                    trial, and its path MTU is known
//	                    to be no worse; after a change of
//	                    the order: it has answered
//
// A candidate in use fails when failAfter of its probes in a row stay unanswered (one
// if it is down or has never answered, two if the whole peer was gone) while another candidate answers one that was
// sent no earlier than these, and has lost none that was, and the last of these was sent after that answer had come (unless one is enough): where something
// held up all answers, those of one come first. It takes more of them where probes are lost by chance: nothing is
// gained by another one that loses as much. So nothing fails when a host
// stands still, which holds up all answers, nor when the whole peer is gone, nor when
// the link of all flaps. Each loss of the candidate in use makes a probe of every other
// one due, so that what is known of those is fresh.
//
// It also fails if it does not take packets of the size that every path should carry,
// and another one takes these, or at least larger ones: small packets are not all that
// pods send.
//
// Hysteresis: a better candidate has to answer trial probes in a row, and the trial
// doubles each time that the candidate fails in use, up to trialMost. It is short again
// for one that has been up for as long as forgive.
//
// The direct path is used only once it is proven, also at the start, unless it was in
// use before: an earlier run of the agent had proven it.
type choice struct {
	order  []encap.Mode // best first
	active encap.Mode   // one of order, but for a moment after that has changed
	since  time.Time    // of active
	why    string       // active was chosen; empty if it is so from the start
	misses int          // of active, at the last look
	left   bool         // an earlier run had the direct path in use
	ends   bool         // of the encapsulations: none is in the order any more, and what is in use ends after leaveAfter

	reordered time.Time           // of the last change of order; zero after leaveAfter
	trials    [encap.NumModes]int // answers in a row that the candidate needs after it has failed in use; 0: it never did
}

// setOrder takes over the order of preference, and reports whether it is another one
// than before. The candidate in use stays in use until a better one has answered.
func (c *choice) setOrder(now time.Time, order []encap.Mode) bool {
	switch {
	case slices.Equal(order, c.order):
		return false
	case c.order == nil:
		c.active, c.since = start(order), now
	default:
		c.reordered = now
	}
	c.order = slices.Clone(order)
	return true
}

// start is what is used before anything is known: the best encapsulation.
func start(order []encap.Mode) encap.Mode {
	for _, m := range order {
		if !m.IsDirect() {
			return m
		}
	}
	return order[0]
}

// has reports that m is a candidate.
func (c *choice) has(m encap.Mode) bool { return slices.Contains(c.order, m) }

// rank is the place of m in the order; one that is not in it comes last.
func (c *choice) rank(m encap.Mode) int {
	if i := slices.Index(c.order, m); i >= 0 {
		return i
	}
	return len(c.order)
}

// climbs reports that m is better than what is in use, and is watched for that reason.
func (c *choice) climbs(m encap.Mode) bool { return c.rank(m) < c.rank(c.active) }

// decide looks at the candidates' states, and reports whether another one is used from
// now on.
func (c *choice) decide(now time.Time, paths *[encap.NumModes]*State) bool {
	if m, ok := c.better(now, paths); ok {
		why := "it has answered everything since " + clock(now, paths[m].since)
		if !c.reordered.IsZero() {
			why = "the order of preference has changed"
		}
		c.use(now, m, why)
		return true
	}
	if m, ok := c.roomier(now, paths); ok {
		old := c.active
		c.use(now, m, fmt.Sprintf("%s does not carry packets of %d bytes", old, paths[old].cfg.Base))
		c.trials[old] = min(2*c.need(now, old, paths[old]), trialMost)
		return true
	}
	for _, m := range c.order {
		if m == c.active || !c.outlives(paths[m], paths[c.active]) {
			continue
		}
		old := c.active
		c.use(now, m, fmt.Sprintf("%s does not answer", old))
		c.fail(now, old, paths[old])
		return true
	}
	if !c.reordered.IsZero() && now.Sub(c.reordered) >= leaveAfter {
		c.reordered = time.Time{}
		if c.rank(c.active) == len(c.order) {
			c.use(now, c.order[0], "the order of preference has changed")
			return true
		}
	}
	return false
}

// next is when decide has something to do though nothing happens.
func (c *choice) next() (time.Time, bool) { return c.reordered.Add(leaveAfter), !c.reordered.IsZero() }

// better finds the best candidate that is above what is in use and may take its place.
func (c *choice) better(now time.Time, paths *[encap.NumModes]*State) (encap.Mode, bool) {
	if c.ends { // the direct paths take over meanwhile
		return 0, false
	}
	for _, m := range c.order[:c.rank(c.active)] {
		st := paths[m]
		if !st.up || st.misses > 0 || !st.pmtu.settled() || c.smaller(m, paths) {
			continue
		}
		need := c.need(now, m, st)
		if !c.reordered.IsZero() && c.trials[m] == 0 && !st.answeredSent.Before(c.reordered) {
			need = 1
		}
		if st.passed(now, need) {
			return m, true
		}
	}
	return 0, false
}

// passed reports that the path has answered need probes in a row, one each Busy.
func (s *State) passed(now time.Time, need int) bool {
	return s.streak() >= need && now.Sub(s.since) >= time.Duration(need-1)*s.cfg.Busy
}

// smaller reports that m takes only smaller packets than another candidate, and less than every path should.
func (c *choice) smaller(m encap.Mode, paths *[encap.NumModes]*State) bool {
	return slices.ContainsFunc(c.order, func(o encap.Mode) bool { return paths[o].takesMore(paths[m]) })
}

// takesMore reports that packets are proven to pass by s, of the size that every path should carry or at least of some use, which do not by t.
func (s *State) takesMore(t *State) bool {
	return s.up && s.misses == 0 && s.pmtu.proven > 0 && t.pmtu.room() != untold && s.pmtu.room() > t.pmtu.room()
}

// roomier finds the best candidate below what is in use that takes packets which that does not. One that has failed in use has to
// pass its trial first. (For those above, better waits.)
func (c *choice) roomier(now time.Time, paths *[encap.NumModes]*State) (best encap.Mode, ok bool) {
	inUse := paths[c.active]
	if !inUse.up || inUse.streak() < clean || !c.has(c.active) {
		return 0, false
	}
	for _, m := range c.order[c.rank(c.active)+1:] {
		st := paths[m]
		if st.takesMore(inUse) && (!ok || st.takesMore(paths[best])) && (c.trials[m] == 0 || st.passed(now, c.need(now, m, st))) {
			best, ok = m, true
		}
	}
	return best, ok
}

// need is how many answers in a row m needs to be used.
func (c *choice) need(now time.Time, m encap.Mode, st *State) int {
	if c.trials[m] == 0 || st.up && now.Sub(st.since) >= forgive {
		return trial
	}
	return c.trials[m]
}

// outlives reports that in use fails while other answers.
func (c *choice) outlives(other, inUse *State) bool {
	n := failAfter
	switch back := other.upSent.After(inUse.since) && !inUse.lastAnswer.IsZero(); {
	case inUse.up:
	case back: // the peer was gone, and its first answers may be late
		n = 2
	default:
		n = 1
	}
	if !other.up || other.misses > 0 || inUse.misses < n {
		return false
	}
	if own := inUse.byChance(); inUse.up && (inUse.misses < other.byChance() || inUse.misses < min(own, lossy) && own < mostByChance) {
		return false
	}
	first := inUse.missSent[n-1] // of the probes that count
	if first.Before(other.upSent) || !first.After(other.lostSent) {
		return false
	}
	return slices.ContainsFunc(other.answers[:], func(a reply) bool {
		return !a.sent.Before(first) && (n == 1 || !inUse.missSent[0].Before(a.came))
	})
}

func (c *choice) use(now time.Time, m encap.Mode, why string) {
	c.active, c.since, c.why = m, now, why
}

// fail notes that m has failed in use.
func (c *choice) fail(now time.Time, m encap.Mode, st *State) {
	if !st.lastAnswer.IsZero() {
		c.trials[m] = min(2*c.need(now, m, st), trialMost)
	}
	if st.up {
		st.fail(now, fmt.Sprintf("%d probes unanswered, while %s answers", st.misses, c.active))
	}
}
