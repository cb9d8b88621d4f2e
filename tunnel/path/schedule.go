package path

import (
	"math/rand/v2"
	"time"

	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/mtu"
)

// Base is the packet size that every path is expected to take: IPv6 asks for 1,280 bytes.
const Base = mtu.Min6

// lookAgain is how long a peer may go without a look when nothing happens.
const lookAgain = 30 * time.Second

// Schedule holds the paths of many peers: it says which probes are due, takes their
// answers and tells what has changed.
//
// A look at a peer costs time and a thousand of them are mostly idle, so each has the
// time of its next look. An event (an answer, traffic, a hint) makes that time now.
//
// Like [State] it does no I/O and reads no clock, and belongs to one goroutine at a
// time.
type Schedule struct {
	rand  *rand.Rand
	peers map[string]*peer
}

// peer is one peer's paths.
type peer struct {
	paths  [encap.NumModes]*State // nil where the encapsulation is no candidate
	seen   [encap.NumModes]Info   // what the last look found
	next   time.Time              // of the next look; zero after an event
	tx, rx uint64                 // packets, at the last Traffic
}

// NewSchedule has no peers. Nonces and jitter come from r, see [New].
func NewSchedule(r *rand.Rand) *Schedule {
	return &Schedule{rand: r, peers: make(map[string]*peer)}
}

// Candidate is an encapsulation that may carry packets to a peer.
type Candidate struct {
	Mode encap.Mode
	Max  mtu.TUN // largest inner packet that this host's underlay allows, in bytes
}

// SetPeers says which peers to probe and by which encapsulations. What is known of
// peers and encapsulations that stay is kept, of others it is forgotten.
func (s *Schedule) SetPeers(now time.Time, want map[string][]Candidate) {
	for id := range s.peers {
		if want[id] == nil {
			delete(s.peers, id)
		}
	}
	for id, candidates := range want {
		p := s.peers[id]
		if p == nil {
			p = new(peer)
			s.peers[id] = p
		}
		p.set(now, s.rand, candidates)
	}
}

func (p *peer) set(now time.Time, r *rand.Rand, candidates []Candidate) {
	var keep [encap.NumModes]bool
	for _, c := range candidates {
		keep[c.Mode] = true
		switch st := p.paths[c.Mode]; {
		case st == nil:
			p.paths[c.Mode] = New(Config{Max: c.Max, Base: Base}, now, r)
			p.event()
		case st.want.Max != c.Max:
			st.SetMax(now, c.Max)
			p.event()
		}
	}
	for m := range keep {
		if !keep[m] {
			p.paths[m], p.seen[m] = nil, Info{}
		}
	}
}

// event makes the next look due.
func (p *peer) event() { p.next = time.Time{} }

// each calls fn for every path of a peer, and makes a look due. It does nothing for an
// unknown peer.
func (s *Schedule) each(id string, fn func(encap.Mode, *State)) {
	p := s.peers[id]
	if p == nil {
		return
	}
	for m, st := range p.paths {
		if st != nil {
			fn(encap.Mode(m), st)
		}
	}
	p.event()
}

// Peers are the IDs of all peers, in no order.
func (s *Schedule) Peers(yield func(string) bool) {
	for id := range s.peers {
		if !yield(id) {
			return
		}
	}
}

// Poke asks for a verdict soon, because there is other news of the peer.
func (s *Schedule) Poke(now time.Time, id string) {
	s.each(id, func(_ encap.Mode, st *State) {
		st.Used(now)
		st.Poke(now)
	})
}

// TooBig takes a router's word that link is the largest outer packet toward the peer
// (over IPv6 if six). Only lowering is believed, see [State.TooBig].
func (s *Schedule) TooBig(now time.Time, id string, link mtu.Link, six bool) {
	s.each(id, func(m encap.Mode, st *State) { st.TooBig(now, link.TUN(encap.Overhead(m, six))) })
}

// Traffic tells how many packets were exchanged with a peer in all. The paths of one
// with which packets are exchanged are probed more often.
func (s *Schedule) Traffic(now time.Time, id string, tx, rx uint64) {
	p := s.peers[id]
	if p == nil {
		return
	}
	if p.tx != tx || p.rx != rx {
		s.each(id, func(_ encap.Mode, st *State) { st.Used(now) })
	}
	p.tx, p.rx = tx, rx
}

// Answered takes an answer, see [State.Answered].
func (s *Schedule) Answered(now time.Time, id string, m encap.Mode, nonce uint64, size int) {
	if p := s.peers[id]; p != nil && int(m) < len(p.paths) && p.paths[m] != nil {
		p.paths[m].Answered(now, nonce, size)
		p.event()
	}
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
	up := false
	if p := s.peers[id]; p != nil {
		for _, st := range p.paths {
			up = up || st != nil && st.up
		}
	}
	return up
}

// Due is a probe to send.
type Due struct {
	Peer string
	Mode encap.Mode
	Probe
}

// Change is what has become of a path since the last look.
type Change struct {
	Peer    string
	Mode    encap.Mode
	Was, Is Info
}

// Look accounts for time-outs up to now, and returns the probes that have to be sent,
// what has changed, and when to look again unless something happens before.
func (s *Schedule) Look(now time.Time) (probes []Due, changes []Change, next time.Time) {
	next = now.Add(lookAgain)
	for id, p := range s.peers {
		if !p.next.After(now) {
			p.next = now.Add(lookAgain)
			for i, st := range p.paths {
				if st == nil {
					continue
				}
				m := encap.Mode(i)
				for pr, ok := st.Due(now); ok; pr, ok = st.Due(now) {
					probes = append(probes, Due{id, m, pr})
				}
				p.next = earlier(p.next, st.Next())
				is, was := st.Snapshot(), p.seen[i]
				if is.Up != was.Up || is.MTU != was.MTU || is.Search != was.Search {
					changes = append(changes, Change{id, m, was, is})
				}
				p.seen[i] = is
			}
		}
		next = earlier(next, p.next)
	}
	return probes, changes, next
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}
