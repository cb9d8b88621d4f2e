package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/mtu"
)

// Pace of the change between IPv4 and IPv6 as outer packets to a member.
const (
	familyPause    = 2 * time.Second  // until the other family is tried
	familyPauseMax = 20 * time.Second // it grows by half each time while neither is answered
	familyHeard    = time.Second      // until the other one is tried if the member's probes arrive by it

	familyBack    = 20 * time.Second // until the first family is asked whether it is answered again, while the second one is
	familyBackMax = 20 * time.Minute // it doubles each time
	familyForgive = 10 * time.Minute // until it is short again, while the first family is answered
	familyTrial   = 5                // large probes in a row that have to be answered
)

// outerFamily is the family of outer packets to a member that has both in common with this host. It starts with the first one in this
// node's order. While the member answers gossip and no encapsulation is answered, the other family is tried in turn, and soon if the
// member's own probes arrive by it: an answer needs both hosts at the same family. One that is answered is kept, until large probes
// by the first one, which go beside, are answered again. See docs/decisions/0037-outer-family.md.
type outerFamily struct {
	six    bool      // in use
	since  time.Time // when it began to be unanswered; zero while it is answered, or not judged
	pause  time.Duration
	silent time.Time // since when neither is answered; zero if one is, or the other has not been tried
	heard  [2]uint64 // the member's probes when since began, by IPv4 and IPv6

	answered time.Time     // since when it is; zero while it is not
	tried    time.Time     // when the first family was asked last
	back     time.Duration // between two of these trials
	trial    *atomic.Bool  // of the last one: it has succeeded
}

// look takes what the probes say, and how many have arrived by each family. It reports whether the family has changed.
func (f *outerFamily) look(now time.Time, judged, answered bool, heard [2]uint64) (changed bool) {
	if !answered {
		f.answered, f.trial = time.Time{}, nil
	}
	switch {
	case answered:
		if f.answered.IsZero() {
			f.answered = now
		}
		*f = outerFamily{six: f.six, answered: f.answered, tried: f.tried, back: f.back, trial: f.trial}
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

// due reports that it is time to try whether the first family is answered again. Then the caller sets trial.
func (f *outerFamily) due(now time.Time, first bool) bool {
	switch {
	case f.answered.IsZero():
		return false
	case f.six == first:
		if now.Sub(f.answered) >= familyForgive {
			f.back = 0
		}
		return false
	}
	last, wait := f.answered, max(f.back, familyBack)
	if f.tried.After(last) {
		last = f.tried
	}
	if now.Sub(last) < wait {
		return false
	}
	f.tried, f.back = now, min(2*wait, familyBackMax)
	return true
}

// returns goes back to the first family if that has passed its trial, and reports whether it does.
func (f *outerFamily) returns(first bool) bool {
	if f.six == first || f.trial == nil || !f.trial.Load() {
		return false
	}
	*f = outerFamily{six: first, tried: f.tried, back: f.back}
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

// forgetFamilies forgets those of members that are not in the view.
func (s *session) forgetFamilies(v *view) {
	there := make(map[membership.NodeID]bool, len(v.peers)) // made once: a search for each of a thousand members takes ten milliseconds, in each look
	for i := range v.peers {
		there[v.peers[i].node] = true
	}
	maps.DeleteFunc(s.families, func(id membership.NodeID, _ *outerFamily) bool { return !there[id] })
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
	if f.due(now, first.Is6()) {
		f.trial = s.tryFamily(p.id, first)
	}
	back := f.returns(first.Is6())
	if f.six != first.Is6() {
		p.endpoint = other
	}
	p.why, p.silent = f.why(first), f.silent
	switch {
	case back:
		s.log.Info("packets to a member go by the first family again", "peer", p.name, "reason", "it is answered by "+familyName[b2i(f.six)])
	case changed:
		s.log.Warn("packets to a member go by the other family", "peer", p.name, "reason", p.why)
	}
	if changed || back {
		if err := writeFamilies(runFile(s.cfg, "families"), s.families); err != nil {
			s.log.Debug("families not noted for the next start", "error", err)
		}
	}
}

// tryFamily sends large probes to a member's address of the other family, in the background, by the encapsulation in use: what is
// true in the end if all are answered. The answers come by whatever family the member uses.
//
// They are as large as the packets that pass now, or as that family can carry: over IPv6 these are smaller by 20 bytes than over IPv4.
func (s *session) tryFamily(id string, to netip.Addr) *atomic.Bool {
	passed := new(atomic.Bool)
	m, ok := s.probes.chosen(id)
	in, known := s.probes.info(id, m)
	if !ok || !known || m.IsDirect() || in.MTU == 0 {
		return passed
	}
	size := int(min(in.MTU, s.limitAt(m, to)))
	inner := []bool{false}
	if v := s.view.Load(); v != nil {
		if i := slices.IndexFunc(v.peers, func(p peerView) bool { return p.id == id }); i >= 0 && v.byFamily(&v.peers[i], m) {
			inner = append(inner, true)
		}
	}
	go func() {
		for range familyTrial {
			for _, six := range inner {
				_, got, err := s.probes.ask(context.Background(), pingWait, func(probe []byte) error {
					return s.engine.ProbeAt(id, to, m, six, probe, size)
				})
				if err != nil || got != size {
					return
				}
			}
		}
		passed.Store(true)
	}()
	return passed
}

// limitAt is the largest inner packet that the links toward an address carry by an encapsulation.
func (s *session) limitAt(m encap.Mode, to netip.Addr) mtu.TUN {
	p := peerView{endpoint: to}
	s.findWay(&p)
	return s.limit(m, &p)
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
