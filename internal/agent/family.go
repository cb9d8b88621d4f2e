package agent

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/membership"
)

// Pace of the change between IPv4 and IPv6 as outer packets to a member.
const (
	familyPause    = 2 * time.Second  // until the other family is tried
	familyPauseMax = 20 * time.Second // it grows by half each time while neither is answered
	familyHeard    = time.Second      // until the other one is tried if the member's probes arrive by it
)

// outerFamily is the family of outer packets to a member that has both in common with this host. It starts with the first one in this
// node's order. While the member answers gossip and no encapsulation is answered, the other family is tried in turn, and soon if the
// member's own probes arrive by it: an answer needs both hosts at the same family. One that is answered is kept. See
// docs/decisions/0037-outer-family.md.
type outerFamily struct {
	six    bool      // in use
	since  time.Time // when it began to be unanswered; zero while it is answered, or not judged
	pause  time.Duration
	silent time.Time // since when neither is answered; zero if one is, or the other has not been tried
	heard  [2]uint64 // the member's probes when since began, by IPv4 and IPv6
}

// look takes what the probes say, and how many have arrived by each family. It reports whether the family has changed.
func (f *outerFamily) look(now time.Time, judged, answered bool, heard [2]uint64) (changed bool) {
	switch {
	case answered:
		*f = outerFamily{six: f.six}
		return false
	case !judged:
		f.since = time.Time{}
		return false
	case f.since.IsZero():
		f.since, f.pause, f.heard = now, max(f.pause, familyPause), heard
	}
	wait := f.pause
	if other := b2i(!f.six); heard[other] != f.heard[other] {
		wait = familyHeard
	}
	if now.Sub(f.since) < wait {
		return false
	}
	if f.silent.IsZero() {
		f.silent = f.since
	}
	f.six, f.since, f.pause = !f.six, time.Time{}, min(f.pause*3/2, familyPauseMax)
	return true
}

// why is what status says of it; first is the family that is first in this node's order. Empty if there is nothing to say.
func (f *outerFamily) why(first netip.Addr) string {
	is, other := familyName[b2i(f.six)], familyName[b2i(!f.six)]
	switch {
	case !f.silent.IsZero():
		return fmt.Sprintf("over %s now: neither %s nor %s is answered, so they are tried in turn", is, is, other)
	case f.six != first.Is6():
		return fmt.Sprintf("over %s, because %s was not answered", is, other)
	}
	return ""
}

// tunKnown is how long members may take to hear of new tun addresses of this node. Until then they ignore its probes, which says nothing about a family.
const tunKnown = 5 * time.Second

// chooseFamily sets the endpoint of a member that has both families in common with this host.
func (s *session) chooseFamily(now time.Time, p *peerView) {
	var other netip.Addr
	for _, a := range p.underlay {
		if a.Is4() != p.endpoint.Is4() {
			other = a
		}
	}
	if !p.endpoint.IsValid() || !other.IsValid() || len(s.link.Addrs) < 2 {
		return
	}
	first := p.endpoint
	f := s.families[p.node]
	if f == nil {
		f = &outerFamily{six: first.Is6()}
		s.families[p.node] = f
	}
	probed, answered := false, false
	for _, m := range s.prefer.Load().modes {
		if i, ok := s.probes.info(p.id, m); ok && !m.IsDirect() {
			probed, answered = true, answered || i.Up
		}
	}
	// A host that restarts, or a network that fails, takes both families away, and no family is to be left for that.
	judged := probed && !answered && p.state == api.PeerAlive && now.Sub(s.tunSince) >= tunKnown && s.answering.lately(now, p.node, func() bool { return s.gossip.Answers(p.node, first, other) })
	changed := f.look(now, judged, answered, s.engine.Heard(p.id))
	if f.six != first.Is6() {
		p.endpoint = other
	}
	p.why, p.silent = f.why(first), f.silent
	if changed {
		s.log.Warn("packets to a member go by the other family", "peer", p.name, "reason", p.why)
		if err := writeFamilies(runFile(s.cfg, "families"), s.families); err != nil {
			s.log.Debug("families not noted for the next start", "error", err)
		}
	}
}

// answering knows which members answer gossip, of those that were asked lately.
type answering struct {
	mu    sync.Mutex
	asked map[membership.NodeID]asked
	busy  int
}

type asked struct {
	at, answered time.Time // when last
	waits        bool      // for an answer
}

const (
	askAgain   = time.Second
	answerHold = 2500 * time.Millisecond // how long an answer counts: one lost one does not matter
	askAtOnce  = 64                      // members at most: a switch that fails takes many away
)

// lately reports whether a member has answered lately, and has it asked again in the background if it is time.
func (a *answering) lately(now time.Time, id membership.NodeID, ask func() bool) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	is := a.asked[id]
	if !is.waits && now.Sub(is.at) >= askAgain && a.busy < askAtOnce {
		if a.asked == nil {
			a.asked = map[membership.NodeID]asked{}
		}
		a.busy++
		a.asked[id] = asked{now, is.answered, true}
		go func() {
			ok := ask()
			a.mu.Lock()
			defer a.mu.Unlock()
			a.busy--
			is := a.asked[id]
			if is.waits = false; ok {
				is.answered = time.Now()
			}
			a.asked[id] = is
		}()
	}
	return !is.answered.IsZero() && now.Sub(is.answered) < answerHold
}

// forget removes the members that were not asked for a while.
func (a *answering) forget(now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	maps.DeleteFunc(a.asked, func(_ membership.NodeID, is asked) bool { return !is.waits && now.Sub(is.at) > time.Minute })
}

// readFamilies reads what writeFamilies wrote: after a restart, packets go by the family that was answered. Without it the choice is made
// afresh, so errors do not count.
func readFamilies(path string) map[membership.NodeID]*outerFamily {
	out := map[membership.NodeID]*outerFamily{}
	var six map[string]bool
	if b, err := os.ReadFile(path); err != nil || json.Unmarshal(b, &six) != nil {
		return out
	}
	for text, is := range six {
		if id, err := membership.ParseNodeID(text); err == nil {
			out[id] = &outerFamily{six: is}
		}
	}
	return out
}

func writeFamilies(path string, families map[membership.NodeID]*outerFamily) error {
	six := map[string]bool{}
	for id, f := range families {
		six[id.String()] = f.six
	}
	b, err := json.Marshal(six)
	if err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}
