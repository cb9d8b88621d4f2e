package path

import (
	"math/rand/v2"
	"time"

	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/mtu"
)

// Base is the packet size that every path should carry: IPv6 requires 1,280 bytes.
const Base = mtu.Min6

// lookAgain is the longest time between two looks at a peer without an event.
const lookAgain = 30 * time.Second

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
}

// peer is one peer's paths.
type peer struct {
	choice choice
	paths  [encap.NumModes]*State // nil where the encapsulation is no candidate
	wanted [encap.NumModes]Candidate
	heard  [encap.NumModes]time.Time // when the peer's own probes last arrived
	seen   [encap.NumModes]Info      // what the last look found
	trains trains                    // toward it
	coming [encap.NumModes]coming    // trains of its own
	misses int                       // of the path in use, at the last look
	next   time.Time                 // of the next look; zero after an event
	tx, rx uint64                    // packets, at the last Traffic

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
	Outer6 bool    // the outer packets are IPv6
	Needs  string  // what the network must let through, for messages: "UDP port 6080"
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
			p = new(peer)
			s.peers[id] = p
		}
		p.set(now, s.rand, candidates)
	}
}

func (p *peer) set(now time.Time, r *rand.Rand, candidates []Candidate) {
	var order []encap.Mode
	for _, c := range candidates {
		order = append(order, c.Mode)
		p.wanted[c.Mode] = c
		switch st := p.paths[c.Mode]; {
		case st == nil:
			p.paths[c.Mode] = New(Config{Max: c.Max, Base: Base, Likely: likely(c)}, now, r)
			p.event()
		case st.want.Max != c.Max:
			st.SetMax(now, c.Max)
			p.event()
		}
	}
	if p.choice.setOrder(now, order) {
		p.poke(now)
	}
	p.forgetOthers()
}

// forgetOthers drops what is neither a candidate nor in use.
func (p *peer) forgetOthers() {
	for i := range p.paths {
		if m := encap.Mode(i); m != p.choice.active && !p.choice.has(m) {
			p.paths[m], p.seen[m] = nil, Info{}
		}
	}
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

// TooBig handles a router's message that link is the largest outer packet toward the peer.
// It can only lower the path MTU, see [State.TooBig].
func (s *Schedule) TooBig(now time.Time, id string, link mtu.Link) {
	if p := s.peers[id]; p != nil {
		for m, st := range p.each {
			st.TooBig(now, link.TUN(encap.Overhead(m, p.wanted[m].Outer6)))
		}
		p.event()
	}
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

// Heard reports that a probe of the peer has arrived.
func (s *Schedule) Heard(now time.Time, id string, m encap.Mode) {
	if p := s.peers[id]; p != nil && int(m) < len(p.heard) {
		p.heard[m] = now
	}
}

// Answered handles an answer, see [State.Answered].
func (s *Schedule) Answered(now time.Time, id string, m encap.Mode, nonce uint64, size int) {
	p := s.peers[id]
	if p == nil || int(m) >= len(p.paths) || p.paths[m] == nil {
		return
	}
	st := p.paths[m]
	wasUp := st.up
	st.Answered(now, nonce, size)
	if st.up && !wasUp { // the others may work again, too: the choice compares them
		p.poke(now)
	}
	p.event()
}

// Due is a probe to send.
type Due struct {
	Peer string
	Mode encap.Mode
	Probe
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
	inUse := p.paths[p.choice.active]
	if inUse.misses > p.misses { // are the others better? Ask now
		p.poke(now)
	}
	p.misses = inUse.misses
	if from := p.choice.active; p.choice.decide(now, &p.paths) {
		to := p.choice.active
		r.Switches = append(r.Switches, Switch{id, from, to, p.choice.why})
		p.paths[to].lastUsed = inUse.lastUsed
		p.misses = p.paths[to].misses
		p.forgetOthers()
	}
	p.next = now.Add(lookAgain)
	if at, ok := p.choice.next(); ok {
		p.next = earlier(p.next, at)
	}
	if p.trainsChanged {
		p.trainsChanged = false
		r.Trains = append(r.Trains, TrainChange{id, p.trains.info})
	}
	if at, ok := p.trains.look(now, id, p.choice.active, p.paths[p.choice.active], r); ok {
		p.next = earlier(p.next, at)
	}
	for m, st := range p.each {
		if st.up && p.choice.climbs(m) {
			st.Used(now)
		}
		for pr, ok := st.Due(now); ok; pr, ok = st.Due(now) {
			r.Probes = append(r.Probes, Due{id, m, pr})
		}
		p.next = earlier(p.next, st.Next())
		is, was := st.Snapshot(), p.seen[m]
		if is.Up != was.Up || is.MTU != was.MTU || is.Search != was.Search {
			r.Changes = append(r.Changes, Change{id, m, was, is})
		}
		p.seen[m] = is
	}
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}
