package path

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/tunnel/encap"
)

// Status is what is known of one candidate, and what the choice makes of it.
type Status struct {
	Mode   encap.Mode
	Active bool // packets to the peer go this way
	Info
	Words string    // why it is in this state, and why it is or is not in use
	Heard time.Time // when a probe of the peer arrived last; zero if none did
}

// Direct reports whether the peer's packets of a family take the direct path: it is
// proven, or an earlier run has left it in use, and the choice is for it.
func (s *Schedule) Direct(id string, six bool) bool {
	p := s.peers[id]
	return p != nil && p.goesDirect(b2i(six))
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// goesDirect reports that packets of a family take the direct path.
func (p *peer) goesDirect(f int) bool {
	m := directs[f]
	c := &p.direct[f]
	return c.order != nil && c.active == m && (c.left || !p.paths[m].lastAnswer.IsZero())
}

// Chosen is the encapsulation of packets to a peer, as far as these do not take the
// direct path; ok is false for a peer that is not probed.
func (s *Schedule) Chosen(id string) (m encap.Mode, ok bool) {
	if p := s.peers[id]; p != nil {
		return p.choice.active, true
	}
	return 0, false
}

// Info is what is known of one path; ok is false for one that is not probed.
func (s *Schedule) Info(id string, m encap.Mode) (i Info, ok bool) {
	if p := s.peers[id]; p != nil && p.paths[m] != nil {
		return p.paths[m].Snapshot(), true
	}
	return Info{}, false
}

// Answering reports whether any path to the peer is up.
func (s *Schedule) Answering(id string) bool {
	p := s.peers[id]
	return p != nil && p.answers()
}

// answers reports whether any path is up.
func (p *peer) answers() bool {
	for _, st := range p.each {
		if st.up {
			return true
		}
	}
	return false
}

// Status is what is known of one candidate; ok is false for one that is not probed.
func (s *Schedule) Status(now time.Time, id string, m encap.Mode) (st Status, ok bool) {
	p := s.peers[id]
	if p == nil || p.paths[m] == nil {
		return Status{}, false
	}
	return Status{Mode: m, Active: m == p.choiceOf(m).active, Info: p.paths[m].Snapshot(), Words: p.words(now, m), Heard: p.lastHeard(m)}, true
}

// choiceOf is the choice that a candidate takes part in: of the encapsulations, the one among these.
func (p *peer) choiceOf(m encap.Mode) *choice {
	if f, ok := family(m); ok && p.direct[f].order != nil {
		return &p.direct[f]
	}
	return &p.choice
}

// answering are the encapsulations that are up, best first.
func (p *peer) answering() (up []encap.Mode) {
	for _, m := range p.choice.order {
		if p.paths[m].up {
			up = append(up, m)
		}
	}
	return up
}

// words explains a candidate.
func (p *peer) words(now time.Time, m encap.Mode) string {
	st, c := p.paths[m], p.choiceOf(m)
	active := c.active
	switch {
	case m != active && !st.up:
		return p.silent(now, m)
	case m != active && c.climbs(m):
		return p.onTrial(now, m)
	case m != active:
		return fmt.Sprintf("answers; %s is preferred", active)
	case !st.up:
		return p.silent(now, m)
	}
	text := []string{"answers"}
	if !m.IsDirect() {
		text = append(text, p.beside(now, m)...)
	}
	for _, better := range c.order[:c.rank(m)] {
		if p.paths[better].up {
			text = append(text, fmt.Sprintf("%s %s", better, p.onTrial(now, better)))
		} else {
			text = append(text, fmt.Sprintf("%s: %s", better, p.silent(now, better)))
		}
	}
	return strings.Join(text, "; ")
}

// beside says of the direct paths what concerns the encapsulation in use: that packets take them, or why not.
func (p *peer) beside(now time.Time, m encap.Mode) (text []string) {
	all := true
	for f, d := range directs {
		c := &p.direct[f]
		switch {
		case c.order == nil:
		case p.goesDirect(f):
			text = append(text, fmt.Sprintf("%s packets go %s", familyName[f], d))
			continue
		case c.rank(d) < c.rank(m) && !p.paths[d].up:
			text = append(text, fmt.Sprintf("%s: %s", d, p.silent(now, d)))
		case c.rank(d) < c.rank(m):
			text = append(text, fmt.Sprintf("%s %s", d, p.onTrial(now, d)))
		}
		all = false
	}
	if all {
		return []string{"packets go direct"}
	}
	return slices.Compact(text)
}

// onTrial explains a better candidate that answers and is not used yet.
func (p *peer) onTrial(now time.Time, m encap.Mode) string {
	st := p.paths[m]
	if p.choiceOf(m).smaller(m, &p.paths) {
		return fmt.Sprintf("answers, but does not carry packets of %d bytes", st.cfg.Base)
	}
	return fmt.Sprintf("answers since %s: it is used after %d answers in a row, now %d", clock(now, st.since), p.choiceOf(m).need(now, m, st), st.streak())
}

// silent explains a candidate that does not answer, by what the others do.
func (p *peer) silent(now time.Time, m encap.Mode) string {
	st := p.paths[m]
	text, needs := "no answer", p.wanted[m].Needs
	form, half := st.lostForm()
	if half {
		text += " to " + familyName[form] + " packets"
		needs = p.wanted[m].Inner[form]
	}
	if st.lastAnswer.IsZero() {
		text += " yet"
	} else {
		text += " since " + clock(now, st.lastAnswer)
	}
	up := p.answering()
	if len(up) == 0 {
		text += missed(st.misses)
		if half {
			text += fmt.Sprintf(", while those of %s are answered: %s is filtered on the way", familyName[1-form], needs)
		} else if p.oneWay(now, m) {
			text += ", but its own probes arrive: what is lost is on the way from here to there"
		} else if st.misses >= failAfter && now.Sub(later(p.lastHeard(m), p.since)) > st.quiet() {
			text += ", and none of its own probes arrives: what is lost is on the way from there to here, or both ways"
		}
		return text
	}
	works := up[0]
	if p.paths[p.choice.active].up {
		works = p.choice.active
	}
	text += fmt.Sprintf(", %s works", works)
	if st.misses < failAfter {
		return text
	}
	if m.IsDirect() {
		text += ": packets with pod addresses are dropped on the way"
	} else {
		text += fmt.Sprintf(": %s is filtered on the way", needs)
	}
	if p.oneWay(now, m) {
		text += " from here to there"
	}
	return text
}

// oneWay reports that the peer's own probes arrive by m, while ours or our answers to it do not: one has arrived lately that was sent
// since ours are lost.
func (p *peer) oneWay(now time.Time, m encap.Mode) bool {
	st, h := p.paths[m], p.lastHeard(m)
	if form, half := st.lostForm(); half {
		h = p.heard[m][form]
	}
	return st.misses >= failAfter && h.After(st.missedSince) && now.Sub(h) <= 2*st.cfg.MaxRetry
}

// quiet is the longest time between two probes of a peer that arrive, with one more that the network may lose: an idle path is probed seldom.
func (s *State) quiet() time.Duration {
	return time.Duration(float64(s.cfg.Idle)*(1+s.cfg.Jitter)) + s.cfg.MaxRetry
}

// missed says how many probes are unanswered.
func missed(n int) string {
	switch n {
	case 0:
		return ""
	case 1:
		return " (1 probe)"
	}
	return fmt.Sprintf(" (%d probes)", n)
}

// lastHeard is when the peer's own probes last arrived by m, in any family.
func (p *peer) lastHeard(m encap.Mode) time.Time { return later(p.heard[m][0], p.heard[m][1]) }

var familyName = [2]string{"IPv4", "IPv6"}

// clock is the time of day, with the date if that is not of the last 24 hours.
func clock(now, t time.Time) string {
	if now.Sub(t) < 24*time.Hour {
		return t.Format("15:04:05")
	}
	return t.Format("Jan 2 15:04")
}
