package path

import (
	"math/bits"
	"slices"
	"time"

	"github.com/tulle-net/tulle/tunnel/encap"
)

// Train is a number of probe packets for one message that the kernel or the network
// card cuts (UDP_SEGMENT); or, if Apart, for as many messages, to compare.
type Train struct {
	Peer  string
	Mode  encap.Mode
	Nonce uint64
	Sizes []int // of the inner packets, in bytes: equal, but that the last one may be smaller. At most MaxCars
	Apart bool
}

// MaxCars is how many packets a train has at most.
const MaxCars = 64

// TrainInfo is what is known of trains toward a peer.
type TrainInfo struct {
	Off         bool      // trains are lost where single packets arrive: none are sent
	Since       time.Time // of Off
	Arrived, Of int       // packets of the last train that was lost
}

// TrainChange says that trains toward a peer go on or off.
type TrainChange struct {
	Peer string
	TrainInfo
}

const (
	trainEvery  = time.Second           // between trains to a busy peer
	trainWait   = 50 * time.Millisecond // beside the round trip, until the peer is asked how many arrived
	trainAsks   = 4                     // questions until a train is given up without a verdict
	trainStrike = 6                     // trains that have to be lost while the same packets arrive one by one: where a path loses packets, some are by chance
	trainProof  = 3                     // trains that have to arrive for trains to go on again
	trainRetry  = time.Hour             // until that is tried
	trainBytes  = 60000                 // of the inner packets of one train, at most: with their outer headers it fits one message
)

// shape is the form of a train; sizes of 0 stand for the path's MTU.
type shape struct{ cars, size, tail int }

// shapes are tried in turn: what breaks trains may depend on equal lengths, on an odd
// tail, and on how many there are. The whole of them takes a busy peer six seconds
// and 100 KB.
var shapes = [...]shape{{2, 200, 200}, {MaxCars, 200, 200}, {3, 200, 101}, {2, 0, 0}, {17, 200, 101}, {32, 0, 300}}

// trains finds out whether trains toward a peer arrive, by its answers.
//
//	        every second, if       half of it or less has
//	        there is traffic       arrived, says the peer
//	┌──────┐ ─────────▶ ┌─────────┐ ─────────▶ ┌──────────────┐
//	│ rest │            │ a train │            │ the same one │
//	└──────┘ ◀───────── └─────────┘ ◀───────── │ by one       │
//	    ▲     more has       lost trains < 6   └──────────────┘
//	    │     arrived                           │   │ more has arrived,
//	    │                                       │   │ for the sixth time
//	    │ half or less: the path loses packets  │   ▼
//	    └───────────────────────────────────────┘  off: for an hour, and until three trains arrive
//
// Only udp and vxlan have trains. What is known is of the encapsulation in use, and is
// forgotten when another one is used.
type trains struct {
	mode encap.Mode
	info TrainInfo

	next    time.Time // of the next train
	shape   int
	apart   bool // the next one, or the one under way, goes packet by packet
	strikes int
	passed  int

	out   bool // one is under way
	nonce uint64
	cars  int
	asks  int
	askAt time.Time
}

// hasTrains reports that packets of the encapsulation go in trains.
func hasTrains(m encap.Mode) bool { return m == encap.UDP || m == encap.VXLAN }

// look adds what has to be sent at now to the report, and returns when to look again.
func (t *trains) look(now time.Time, id string, m encap.Mode, st *State, r *Report) (time.Time, bool) {
	if m != t.mode || !hasTrains(m) {
		if t.info.Off {
			r.Trains = append(r.Trains, TrainChange{Peer: id})
		}
		*t = trains{mode: m}
	}
	if !hasTrains(m) || !st.up || st.pmtu.proven == 0 {
		t.out = false
		return time.Time{}, false
	}
	if t.out && !now.Before(t.askAt) {
		if t.asks == trainAsks {
			t.rest(now.Add(trainEvery)) // an older version, or a path that loses much
		} else {
			t.asks++
			t.askAt = now.Add(st.timeout())
			r.Asks = append(r.Asks, Due{Peer: id, Mode: m, Probe: Probe{Nonce: t.nonce}})
		}
	}
	if t.out {
		return t.askAt, true
	}
	if !st.busy(now) {
		return time.Time{}, false
	}
	if !now.Before(t.next) {
		train := t.start(now, st)
		train.Peer, train.Mode = id, m
		r.Send = append(r.Send, train)
		return t.askAt, true
	}
	return t.next, true
}

// start makes the next train.
func (t *trains) start(now time.Time, st *State) Train {
	s := shapes[t.shape%len(shapes)]
	if s.size == 0 {
		s.size = min(int(st.pmtu.proven), trainBytes/2)
		s.cars = min(s.cars, trainBytes/s.size)
		if s.tail == 0 {
			s.tail = s.size
		}
	}
	sizes := append(slices.Repeat([]int{s.size}, s.cars-1), s.tail)
	t.out, t.nonce, t.cars, t.asks = true, st.rand.Uint64(), s.cars, 0
	t.askAt = now.Add(trainWait + st.srtt)
	return Train{Nonce: t.nonce, Sizes: sizes, Apart: t.apart}
}

// rest ends what is under way, without a verdict.
func (t *trains) rest(next time.Time) { t.out, t.apart, t.strikes, t.next = false, false, 0, next }

// answered takes the peer's word of how many packets have arrived, and reports whether
// trains go on or off.
func (t *trains) answered(now time.Time, nonce uint64, arrived int) bool {
	if !t.out || nonce != t.nonce {
		return false
	}
	t.out = false
	switch most := 2*arrived > t.cars; {
	case t.apart && most:
		return t.strike(now)
	case t.apart:
		t.rest(now.Add(trainEvery))
	case !most: // how about the same packets one by one?
		t.apart, t.next = true, now
		t.passed, t.info.Arrived, t.info.Of = 0, arrived, t.cars
	default:
		t.shape++
		t.passed++
		t.rest(now.Add(trainEvery))
		if t.info.Off && t.passed >= trainProof {
			t.info = TrainInfo{}
			return true
		}
	}
	return false
}

// strike counts a train that was lost while single packets arrive.
func (t *trains) strike(now time.Time) bool {
	t.strikes++
	t.apart, t.next = false, now
	if t.strikes < trainStrike {
		return false
	}
	was := t.info.Off
	t.rest(now.Add(trainRetry))
	t.info.Off = true
	if !was {
		t.info.Since = now
	}
	return !was
}

// coming is a train on its way to this host.
type coming struct {
	nonce uint64
	cars  uint64 // a bit for each packet that has arrived
}

// Car says that packet i of a peer's train has arrived whole.
func (s *Schedule) Car(id string, m encap.Mode, nonce uint64, i int) {
	p := s.peers[id]
	if p == nil || int(m) >= len(p.coming) || i < 0 || i >= MaxCars {
		return
	}
	c := &p.coming[m]
	if c.nonce != nonce {
		*c = coming{nonce: nonce}
	}
	c.cars |= 1 << i
}

// trainMemory is how long a peer has to be known until this node says of a train that
// nothing of it has arrived: it may have arrived before that, at an agent that has been
// restarted since. It is longer than a peer asks about one train.
const trainMemory = 5 * time.Second

// Arrived is how many packets of a peer's train have arrived; ok is false for a peer
// of whose trains nothing is noted, or not for long enough.
func (s *Schedule) Arrived(now time.Time, id string, m encap.Mode, nonce uint64) (n int, ok bool) {
	p := s.peers[id]
	if p == nil || int(m) >= len(p.coming) {
		return 0, false
	}
	if c := p.coming[m]; c.nonce == nonce {
		return bits.OnesCount64(c.cars), true
	}
	return 0, now.Sub(p.since) >= trainMemory
}

// TrainAnswered takes a peer's answer of how many packets of a train have arrived.
func (s *Schedule) TrainAnswered(now time.Time, id string, nonce uint64, arrived int) {
	if p := s.peers[id]; p != nil {
		if p.trains.answered(now, nonce, arrived) {
			p.trainsChanged = true
		}
		p.event()
	}
}

// Trains is what is known of trains toward a peer.
func (s *Schedule) Trains(id string) TrainInfo {
	if p := s.peers[id]; p != nil {
		return p.trains.info
	}
	return TrainInfo{}
}
