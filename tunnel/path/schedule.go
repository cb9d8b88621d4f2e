package path

import (
	"math/rand/v2"
	"slices"
	"time"

	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/mtu"
)

// Base is the packet size that every path should carry: IPv6 requires 1,280 bytes.
const Base = mtu.Min6

// lookAgain is the longest time between two looks at a peer without an event.
const lookAgain = 30 * time.Second

// eager is how long a peer that has stopped answering is probed four times a second. Then that goes on only while there is
// traffic for it: most of those that are gone come back after hours, or never, and half of a cluster may be gone at once.
const eager = 30 * time.Second

// Schedule has the paths of many peers: it returns the probes that are due, accepts their
// answers, chooses the encapsulation for each peer, and reports changes.
//
// Examining a peer costs time, and most of a thousand peers are idle. So each peer has a
// time at which [Schedule.Look] examines it next. An event (an answer, traffic, a hint)
// makes it due at once.
//
// Like [State] it does no I/O and reads no clock, and belongs to one goroutine at a
// time.
type Schedule struct {
	rand  *rand.Rand
	peers map[string]*peer

	origin time.Time // of the grid of direct paths' probes; zero before the first one
}

// peer is one peer's paths.
type peer struct {
	choice choice                 // among the encapsulations
	direct [2]choice              // of IPv4 and IPv6, between the direct path and those; without order where it is no candidate
	paths  [encap.NumModes]*State // nil where the encapsulation is no candidate
	wanted [encap.NumModes]Candidate
	heard  [encap.NumModes][2]time.Time // when the peer's own probes last arrived, IPv4 and IPv6
	seen   [encap.NumModes]Info         // what the last look found
	trains trains                       // toward it
	coming [encap.NumModes]coming       // trains of its own
	since  time.Time                    // it is known
	next   time.Time                    // of the next look; zero after an event
	tx, rx uint64                       // packets, at the last Traffic

	trainsChanged bool // since the last look
}

// NewSchedule has no peers. Nonces and jitter come from r, see [New].
func NewSchedule(r *rand.Rand) *Schedule {
	return &Schedule{rand: r, peers: make(map[string]*peer)}
}

// Candidate is a way to send packets to a peer: an encapsulation, or [encap.Direct].
type Candidate struct {
	Mode   encap.Mode
	Max    mtu.TUN // largest inner packet that this host's underlay allows, in bytes
	Outer6 bool    // the outer packets are IPv6; by the other family nothing is proven yet
	Needs  string  // what the network must let through, for messages: "UDP port 6080"
	// Inner is Needs by the inner family, IPv4 first, where these are two things and pods have both: a probe goes in both, and
	// is answered when both are. Else empty.
	Inner [2]string

	// Of the direct path only.
	Hop  string // next hop and device: by another one nothing is proven yet
	Left bool   // an earlier run had proven it, and its route is in use
}

// twice reports that each probe goes in both inner families.
func (c *Candidate) twice() bool { return c.Inner[0] != "" }

// Pace of the direct path's probes. The agent does not see the traffic of its route, and so always probes it like a busy
// path. It leaves the route within a second of failing: Busy + 3 × Fast. Where there are
// more than directMost of them, Busy and Confirm grow, so that this host sends no more
// probes than to so many: with a thousand it leaves a route within five seconds.
const (
	directBusy    = 400 * time.Millisecond
	directFast    = 200 * time.Millisecond
	directConfirm = 2 * time.Second
	directGrid    = 100 * time.Millisecond
	directMost    = 100
)

// config is the configuration of the candidate's path.
func (s *Schedule) config(c *Candidate, now time.Time) Config {
	cfg := Config{Max: c.Max, Base: Base, Likely: likely(*c), Twice: c.twice()}
	if c.Mode.IsDirect() {
		if s.origin.IsZero() {
			s.origin = now.Add(-time.Duration(s.rand.Int64N(int64(directGrid)))) // not that of all hosts
		}
		cfg.Busy, cfg.Fast, cfg.Confirm = directBusy, directFast, directConfirm
		cfg.Grid, cfg.Origin = directGrid, s.origin
	}
	return cfg
}

// paceDirect sets the time between probes of direct paths, by their number.
func (s *Schedule) paceDirect() {
	var paths []*State
	for _, p := range s.peers {
		for _, m := range directs {
			if st := p.paths[m]; st != nil {
				paths = append(paths, st)
			}
		}
	}
	times := time.Duration(max(len(paths), directMost))
	for _, st := range paths {
		st.setPace(directBusy*times/directMost, directConfirm*times/directMost)
	}
}

// SetPeers sets the peers to probe and their candidates, at least one, the preferred one
// first. Peers and candidates that remain keep their state; the state of others is removed.
func (s *Schedule) SetPeers(now time.Time, want map[string][]Candidate) {
	for id := range s.peers {
		if len(want[id]) == 0 {
			delete(s.peers, id)
		}
	}
	for id, candidates := range want {
		if len(candidates) == 0 {
			continue
		}
		p := s.peers[id]
		if p == nil {
			p = &peer{since: now}
			s.peers[id] = p
		}
		p.set(now, s, candidates)
	}
	s.paceDirect()
}

func (p *peer) set(now time.Time, s *Schedule, candidates []Candidate) {
	var order []encap.Mode
	for _, c := range candidates {
		order = append(order, c.Mode)
		was := p.wanted[c.Mode]
		p.wanted[c.Mode] = c
		switch st := p.paths[c.Mode]; {
		case st == nil || was.Hop != c.Hop || was.Outer6 != c.Outer6:
			p.paths[c.Mode], p.seen[c.Mode] = New(s.config(&c, now), now, s.rand), Info{}
			if f, ok := family(c.Mode); ok {
				p.direct[f] = choice{}
			}
			p.event()
		case st.want.Max != c.Max:
			st.SetMax(now, c.Max)
			p.event()
		}
		p.paths[c.Mode].setTwice(c.twice())
	}
	if p.setOrders(now, order) {
		p.poke(now)
	}
	p.forgetOthers()
}

// family is the index of a direct path's family, IPv4 first.
func family(m encap.Mode) (f int, ok bool) {
	switch m {
	case encap.Direct:
		return 0, true
	case encap.Direct6:
		return 1, true
	}
	return 0, false
}

// directs are the direct paths by family.
var directs = [2]encap.Mode{encap.Direct, encap.Direct6}

// setOrders tells each choice its part of the order, and reports whether one has changed.
func (p *peer) setOrders(now time.Time, order []encap.Mode) (changed bool) {
	without := func(drop ...encap.Mode) []encap.Mode {
		return slices.DeleteFunc(slices.Clone(order), func(m encap.Mode) bool { return slices.Contains(drop, m) })
	}
	tunnels := without(directs[:]...)
	if p.choice.ends = len(tunnels) == 0; p.choice.ends { // nothing is sent through the tunnel
		tunnels = order[:1]
	}
	changed = p.choice.setOrder(now, tunnels)
	for f, m := range directs {
		c := &p.direct[f]
		if !slices.Contains(order, m) {
			*c = choice{}
			continue
		}
		first := c.order == nil
		changed = c.setOrder(now, without(directs[1-f])) || changed
		if first && p.wanted[m].Left {
			c.active, c.left = m, true
		}
	}
	return changed
}

// forgetOthers drops what is neither a candidate nor in use.
func (p *peer) forgetOthers() {
	for i := range p.paths {
		m := encap.Mode(i)
		keep := p.choice.active == m || p.choice.has(m)
		for c := range p.choices {
			keep = keep || c.has(m) || c.order != nil && c.active == m
		}
		if !keep {
			p.paths[m], p.seen[m] = nil, Info{}
		}
	}
}

// choices yields those of the peer that have candidates.
func (p *peer) choices(yield func(*choice) bool) {
	for _, c := range []*choice{&p.choice, &p.direct[0], &p.direct[1]} {
		if c.order != nil && !yield(c) {
			return
		}
	}
}

// watched reports that m is better than what is in use, and may take its place, or is the direct path in use: it is watched like a busy path.
func (p *peer) watched(m encap.Mode) bool {
	c := p.choiceOf(m)
	return c.climbs(m) && !c.smaller(m, &p.paths) || m.IsDirect() && c != &p.choice && c.active == m
}

// likely are the packet sizes that pass where some link on the way has an MTU that many
// links have: of jumbo frames, Ethernet, and tunnels over Ethernet.
func likely(c Candidate) (sizes []mtu.TUN) {
	for _, link := range [...]mtu.Link{9000, 1500, 1492, 1460, 1450, 1400} {
		sizes = append(sizes, link.TUN(encap.Overhead(c.Mode, c.Outer6)))
	}
	return sizes
}

// event makes the next look due.
func (p *peer) event() { p.next = time.Time{} }

// each yields the paths.
func (p *peer) each(yield func(encap.Mode, *State) bool) {
	for m, st := range p.paths {
		if st != nil && !yield(encap.Mode(m), st) {
			return
		}
	}
}

// poke makes probes of all paths due.
func (p *peer) poke(now time.Time) {
	for _, st := range p.each {
		st.Poke(now)
	}
	p.event()
}

// Probed reports whether the peer is one of those of SetPeers.
func (s *Schedule) Probed(id string) bool { return s.peers[id] != nil }

// Peers returns the IDs of all peers, in no particular order.
func (s *Schedule) Peers(yield func(string) bool) {
	for id := range s.peers {
		if !yield(id) {
			return
		}
	}
}

// Poke probes the peer soon, because something else indicates a change of its state.
func (s *Schedule) Poke(now time.Time, id string) {
	if p := s.peers[id]; p != nil {
		for _, st := range p.each {
			st.Used(now)
		}
		p.poke(now)
	}
}

// TooBig handles a router's message that link is the largest outer packet toward the
// peer, of IPv6 if six. It can only lower the path MTU, see [State.TooBig]. Of IPv6 no
// link carries less than 1,280 bytes, so such a message is ignored (RFC 8201 §4).
func (s *Schedule) TooBig(now time.Time, id string, six bool, link mtu.Link) {
	p := s.peers[id]
	if p == nil || six && link < mtu.Min6 {
		return
	}
	for m, st := range p.each {
		if outer6 := p.wanted[m].Outer6; outer6 == six {
			st.TooBig(now, link.TUN(encap.Overhead(m, outer6)))
		}
	}
	p.event()
}

// Traffic reports the total number of packets exchanged with a peer. The path in use is
// probed more often while it has traffic.
func (s *Schedule) Traffic(now time.Time, id string, tx, rx uint64) {
	p := s.peers[id]
	if p == nil {
		return
	}
	if p.tx != tx || p.rx != rx {
		p.paths[p.choice.active].Used(now)
		p.event()
	}
	p.tx, p.rx = tx, rx
}

// Heard reports that a probe of the peer has arrived, in an inner packet of IPv4 or IPv6, and returns whether probes are due for
// that: a peer that has not answered is back. Probes that follow each other closely count as one: two hosts that hear but do not
// answer each other, as where one of two inner families is filtered, would have each other probe for ever.
func (s *Schedule) Heard(now time.Time, id string, m encap.Mode, six bool) bool {
	p := s.peers[id]
	if p == nil || int(m) >= len(p.heard) {
		return false
	}
	last := p.lastHeard(m)
	p.heard[m][b2i(six)] = now
	if p.answers() || p.paths[m] != nil && now.Sub(last) < p.paths[m].cfg.Retry {
		return false
	}
	p.poke(now)
	return true
}

// Answered handles an answer, see [State.Answered], and returns whether it counts.
func (s *Schedule) Answered(now time.Time, id string, m encap.Mode, nonce uint64, size int) bool {
	p := s.peers[id]
	if p == nil || int(m) >= len(p.paths) || p.paths[m] == nil {
		return false
	}
	st := p.paths[m]
	wasUp := st.up
	counts := st.Answered(now, nonce, size)
	if st.up && !wasUp { // the others may work again, too: the choice compares them
		p.poke(now)
	}
	p.event()
	return counts
}

// NotSent reports that this host could not send a probe, see [State.NotSent].
func (s *Schedule) NotSent(id string, m encap.Mode, nonce uint64) {
	if p := s.peers[id]; p != nil && int(m) < len(p.paths) && p.paths[m] != nil {
		p.paths[m].NotSent(nonce)
	}
}

// Due is a probe to send.
type Due struct {
	Peer string
	Mode encap.Mode
	Probe
	Six bool // the inner packet is IPv6: the second form of a probe that goes in both families. Else it is what both sides have
}

// Change is a change of a path since the last look.
type Change struct {
	Peer    string
	Mode    encap.Mode
	Was, Is Info
}

// Switch is a change of the encapsulation to a peer.
type Switch struct {
	Peer     string
	From, To encap.Mode
	Why      string
}

// Report is the result of a look.
type Report struct {
	Probes   []Due // probes to send
	Changes  []Change
	Switches []Switch
	Send     []Train // trains to send
	Asks     []Due   // questions to send: how many packets of the train with this nonce have arrived?
	Trains   []TrainChange
	Next     time.Time // time of the next look if no event happens before
}

// Look processes time-outs up to now.
func (s *Schedule) Look(now time.Time) Report {
	r := Report{Next: now.Add(lookAgain)}
	for id, p := range s.peers {
		if !p.next.After(now) {
			p.look(now, id, &r)
		}
		r.Next = earlier(r.Next, p.next)
	}
	return r
}

func (p *peer) look(now time.Time, id string, r *Report) {
	for _, st := range p.each {
		st.expire(now)
	}
	p.next = now.Add(lookAgain)
	for c := range p.choices {
		p.decide(now, id, c, r)
		if at, ok := c.next(); ok {
			p.next = earlier(p.next, at)
		}
	}
	if p.trainsChanged {
		p.trainsChanged = false
		r.Trains = append(r.Trains, TrainChange{id, p.trains.info})
	}
	if at, ok := p.trains.look(now, id, p.choice.active, p.paths[p.choice.active], r); ok {
		p.next = earlier(p.next, at)
	}
	for m, st := range p.each {
		if st.up && p.watched(m) {
			st.Used(now)
		}
		for pr, ok := st.Due(now); ok; pr, ok = st.Due(now) {
			r.Probes = append(r.Probes, Due{Peer: id, Mode: m, Probe: pr})
			if pr.Second != 0 {
				r.Probes = append(r.Probes, Due{Peer: id, Mode: m, Probe: Probe{Nonce: pr.Second, Size: pr.Size}, Six: true})
			}
		}
		p.next = earlier(p.next, st.Next())
		is, was := st.Snapshot(), p.seen[m]
		if is.Up != was.Up || is.MTU != was.MTU || is.Search != was.Search {
			r.Changes = append(r.Changes, Change{id, m, was, is})
		}
		p.seen[m] = is
	}
}

// decide lets one choice look at the paths.
func (p *peer) decide(now time.Time, id string, c *choice, r *Report) {
	inUse := p.paths[c.active]
	if inUse.misses > c.misses && inUse.eager(now) { // are the others better? Ask now
		p.poke(now)
	}
	c.misses = inUse.misses
	from := c.active
	if !c.decide(now, &p.paths) {
		return
	}
	to := c.active
	if c == &p.choice || from.IsDirect() || to.IsDirect() {
		r.Switches = append(r.Switches, Switch{id, from, to, c.why})
	}
	p.paths[to].lastUsed = later(p.paths[to].lastUsed, inUse.lastUsed)
	c.misses = p.paths[to].misses
	p.forgetOthers()
}

// eager reports that the path, which is in use, has answered of late, or would be used.
func (s *State) eager(now time.Time) bool {
	return s.up || s.busy(now) || now.Sub(s.since) < eager
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}
