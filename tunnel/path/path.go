// Package path keeps the state of paths, from probes. A [State] is the path to one peer
// through one encapsulation: whether it is up, since when and why, its round-trip time
// (RFC 6298), its loss, and its proven path MTU (RFC 8899). A [Schedule] has the paths
// of many peers.
//
// The package does no I/O and reads no clock: the owner calls [State.Due] at
// [State.Next] to learn what to send, and reports answers. A State belongs to one
// goroutine.
//
// Sizes are those of the inner packet, in bytes: a probe is an inner UDP packet that
// travels like any other.
//
// Sources: RFC 6298 (RTT), RFC 8899 (packetization layer path MTU discovery), RFC 1191
// §6.3 and 8201 §4 (how long to believe ICMP).
package path

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/tulle-net/tulle/tunnel/mtu"
)

// Config of a path. Zero values stand for the defaults that are named.
type Config struct {
	Max  mtu.TUN // largest packet worth probing: underlay MTU − overhead. Required
	Base mtu.TUN // size that is expected to pass nearly everywhere: 1200 (RFC 8899 §5.1.2)
	Min  mtu.TUN // smallest size that is of any use: 576
	// Small is the size of a liveness probe: 64.
	Small mtu.TUN

	Busy      time.Duration // between probes of a path that carries traffic: 1 s
	Idle      time.Duration // between probes of one that does not: 30 s
	Jitter    float64       // fraction of Idle by which it varies either way: 0.2
	Fast      time.Duration // between probes of a path that is up, after an unanswered one; its least time-out: 250 ms
	Retry     time.Duration // between probes of a path that is down, and time-out before the first answer: 1 s
	MaxRetry  time.Duration // to which Retry grows, by doubling: 10 s
	BusyFor   time.Duration // a path counts as busy so long after Used: 5 s
	DownAfter int           // unanswered probes in a row that may bring the path down: 3
	Silence   time.Duration // without any answer, before they do: 3 s

	// Grid brings liveness probes of an answering path to multiples of it since Origin, a little early, so that probes of many paths
	// wake this host together: none.
	Grid   time.Duration
	Origin time.Time

	// Twice sends each probe in two forms, which are answered apart: the probe is when both are.
	Twice bool

	Likely    []mtu.TUN     // sizes that a search tries before it halves, largest first: none
	MaxProbes int           // losses of one size that refute it: 3 (RFC 8899 §5.1.2); more where small probes are lost, see byChance
	Raise     time.Duration // until a larger size is tried again: 600 s (RFC 8899 §5.1.1)
	Confirm   time.Duration // between proofs of the size in use, on a busy path: 600 ms
}

func (c *Config) setDefaults() {
	def(&c.Base, 1200)
	def(&c.Min, mtu.Min4)
	def(&c.Small, 64)
	def(&c.Busy, time.Second)
	def(&c.Idle, 30*time.Second)
	def(&c.Jitter, 0.2)
	def(&c.Fast, 250*time.Millisecond)
	def(&c.Retry, time.Second)
	def(&c.MaxRetry, 10*time.Second)
	def(&c.BusyFor, 5*time.Second)
	def(&c.DownAfter, 3)
	def(&c.Silence, 3*time.Second)
	def(&c.MaxProbes, 3)
	def(&c.Raise, 600*time.Second)
	def(&c.Confirm, 600*time.Millisecond)
}

// limited is c with Max, and with the smaller sizes no larger than that.
func (c Config) limited(limit mtu.TUN) Config {
	c.Max = max(limit, c.Small)
	c.Base = min(c.Base, c.Max)
	c.Min = min(c.Min, c.Base)
	return c
}

func def[T int | mtu.TUN | time.Duration | float64](p *T, v T) {
	if *p <= 0 {
		*p = v
	}
}

// Probe is a packet to send now.
type Probe struct {
	Nonce  uint64
	Second uint64 // the nonce of its second form; 0: it has one form only
	Size   int    // of the whole inner packet, in bytes
}

// Info is what a path is known to be.
type Info struct {
	Up     bool
	Since  time.Time     // of the last change of Up
	Reason string        // of that change
	RTT    time.Duration // smoothed; 0 before the first answer
	RTTVar time.Duration // its variation
	Loss   float64       // 0–1, of the last 64 liveness probes that were answered or given up, since the path is up and within 2 min
	MTU    mtu.TUN       // largest inner packet proven to pass; 0 before the first proof
	First  bool          // the first search for the MTU has neither ended nor refuted a size: larger packets may well pass
	Probed int           // probes sent, of both kinds
	Search string        // what the search for the MTU does: disabled, base, search, complete, error
}

// Reasons in Info, beside "N probes unanswered".
const (
	ReasonNew      = "not answered yet"
	ReasonAnswered = "probe answered"
)

const (
	window     = 64               // liveness probes in the loss figure, at most
	lossAge    = 2 * time.Minute  // of the loss figure, up to the latest probe
	maxPending = 64               // probes remembered, so that a late answer is understood
	maxRTO     = 60 * time.Second // RFC 6298 §2.5
)

// pending is a probe that was sent. It stays after its time-out, for a late answer.
type pending struct {
	nonce    uint64  // of its first form
	second   uint64  // of its second one; 0: it has none
	got      [2]bool // these forms are answered
	seq      uint64  // of liveness probes: index into the window
	sent     time.Time
	deadline time.Time
	size     mtu.TUN
	epoch    uint32 // of the MTU search
	forMTU   bool
	lost     bool
}

// reply is when a probe was sent and when its answer came.
type reply struct{ sent, came time.Time }

type outcome uint8

const (
	unknown outcome = iota
	answered
	lost
)

// State is one path. Use [New].
//
//	          any answer                          any answer
//	┌──────┐ ───────────▶ ┌──────┐ ◀──────────────────────── ┌────────┐
//	│ new  │              │  up  │                           │  down  │
//	└──────┘              └──────┘ ────────────────────────▶ └────────┘
//	 probe each Retry      probe each Busy or Idle,            probe each Retry,
//	                       after a loss each Fast              doubling to MaxRetry
//	                         DownAfter losses in a row, no answer for Silence,
//	                         or another way answered meanwhile (see choice)
type State struct {
	want Config // with defaults
	cfg  Config // want, limited by its Max
	rand *rand.Rand
	pmtu plpmtu

	up     bool
	since  time.Time
	reason string

	srtt, rttvar time.Duration
	lastAnswer   time.Time    // when the last answer came
	formAnswered [2]time.Time // when each form of a probe was answered last
	answeredSent time.Time    // when the latest probe was sent that is answered
	answers      [4]reply     // latest first, to probes that were sent at least half of Fast apart
	upSent       time.Time    // when the probe was sent whose answer brought the path up
	misses       int          // liveness probes sent and given up since lastAnswer
	missedSince  time.Time    // when the first of these was sent
	missSent     [3]time.Time // when the last of these were sent, latest first
	lostSent     time.Time    // when the latest liveness probe was sent that was given up, and not answered late
	nextLive     time.Time
	lastLive     time.Time // when the last liveness probe was sent
	lastUsed     time.Time

	pending  []pending // oldest first
	outcomes [window]outcome
	sent     [window]time.Duration // of the probes in outcomes, since began
	began    time.Time
	seq      uint64
	probed   int
}

// New returns a path that is down because nothing is known of it; its first probe is
// due at once. Nonces and jitter come from r: seed it so that a stranger cannot
// guess the nonces.
func New(cfg Config, now time.Time, r *rand.Rand) *State {
	cfg.setDefaults()
	s := &State{
		want: cfg, cfg: cfg.limited(cfg.Max), rand: r, since: now, reason: ReasonNew, nextLive: now, began: now,
	}
	s.pmtu = plpmtu{cfg: &s.cfg}
	return s
}

// Due accounts for time-outs up to now and returns the next probe to send, if one is
// due. Call it until it says no.
func (s *State) Due(now time.Time) (Probe, bool) {
	s.expire(now)
	if !now.Before(s.nextLive) {
		s.lastLive = now
		s.nextLive = s.aligned(now, s.interval(now))
		s.seq++
		s.outcomes[s.seq%window], s.sent[s.seq%window] = unknown, now.Sub(s.began)
		return s.send(now, pending{size: s.cfg.Small, seq: s.seq}), true
	}
	if size, ok := s.pmtu.due(now, s.lastUsed.Add(s.cfg.BusyFor)); ok {
		p := s.send(now, pending{size: size, epoch: s.pmtu.epoch, forMTU: true})
		s.pmtu.sent(p.Nonce, now.Add(s.timeout()))
		return p, true
	}
	return Probe{}, false
}

func (s *State) send(now time.Time, p pending) Probe {
	p.nonce, p.sent, p.deadline = s.rand.Uint64(), now, now.Add(s.timeout())
	if s.cfg.Twice {
		p.second = s.rand.Uint64()
	}
	old := 0 // answers to these would not count any more
	for old < len(s.pending) && s.pending[old].lost && now.Sub(s.pending[old].sent) > maxRTO {
		old++
	}
	if len(s.pending)-old == maxPending { // the oldest is flooded out
		s.giveUp(now, &s.pending[old])
		old++
	}
	s.pending = append(slices.Delete(s.pending, 0, old), p)
	s.probed++
	return Probe{Nonce: p.nonce, Second: p.second, Size: int(p.size)}
}

// aligned is the time of the liveness probe after d, on the grid.
func (s *State) aligned(now time.Time, d time.Duration) time.Time {
	if g := s.cfg.Grid; g > 0 && s.up && s.misses == 0 && d > g {
		return s.cfg.Origin.Add((now.Add(d).Sub(s.cfg.Origin) / g) * g)
	}
	return now.Add(d)
}

// setPace changes how often the path is probed while it answers.
func (s *State) setPace(busy, confirm time.Duration) {
	s.want.Busy, s.want.Confirm = busy, confirm
	s.cfg.Busy, s.cfg.Confirm = busy, confirm
}

// interval is the time to the liveness probe after the one that is sent at now.
func (s *State) interval(now time.Time) time.Duration {
	switch {
	case !s.up:
		over := min(max(s.misses-s.cfg.DownAfter, 0), 16)
		return min(s.cfg.Retry<<over, max(s.cfg.MaxRetry, s.cfg.Retry))
	case s.misses > 0:
		return s.cfg.Fast
	case s.busy(now):
		return s.cfg.Busy
	}
	f := 1 + s.cfg.Jitter*(2*s.rand.Float64()-1)
	return time.Duration(float64(s.cfg.Idle) * f)
}

// timeout is RFC 6298's RTO without its back-off: nonces tell answers apart.
func (s *State) timeout() time.Duration {
	if s.srtt == 0 {
		return s.cfg.Retry
	}
	return min(max(s.srtt+4*s.rttvar, s.cfg.Fast), maxRTO)
}

func (s *State) busy(now time.Time) bool {
	return now.Before(s.lastUsed.Add(s.cfg.BusyFor))
}

// expire gives up the probes whose time is over.
func (s *State) expire(now time.Time) {
	for i := range s.pending {
		if p := &s.pending[i]; !p.lost && !now.Before(p.deadline) {
			s.giveUp(now, p)
		}
	}
}

func (s *State) giveUp(now time.Time, p *pending) {
	if p.lost {
		return
	}
	p.lost = true
	if p.forMTU {
		// Its size is to blame only if something has passed since it was sent.
		// The next one goes together with a small one.
		s.pmtu.lost(now, p.nonce, s.lastAnswer.After(p.sent), max(s.cfg.MaxProbes, s.byChance()))
		s.soon(s.cfg.Fast)
		return
	}
	if !s.up || !p.sent.Before(s.upSent) { // else it went out before the path came up (see Answered)
		s.setOutcome(p.seq, lost)
	}
	if p.sent.After(s.lostSent) {
		s.lostSent = p.sent
	}
	if !p.sent.Before(s.lastAnswer) { // an answer since then says more than this loss
		if s.misses++; s.misses == 1 {
			s.missedSince = p.sent
		}
		s.missSent = [3]time.Time{p.sent, s.missSent[0], s.missSent[1]}
	}
	if s.up {
		s.soon(s.cfg.Fast)
	}
	if s.up && s.misses >= s.cfg.DownAfter && now.Sub(s.lastAnswer) >= s.cfg.Silence {
		s.fail(now, fmt.Sprintf("%d probes unanswered", s.misses))
	}
}

// fail takes the path down.
func (s *State) fail(now time.Time, reason string) {
	s.change(now, false, reason)
	s.pmtu.stop()
}

// soon draws the next liveness probe to d after the last.
func (s *State) soon(d time.Duration) {
	if at := s.lastLive.Add(d); at.Before(s.nextLive) {
		s.nextLive = at
	}
}

func (s *State) setOutcome(seq uint64, o outcome) {
	if s.seq-seq < window {
		s.outcomes[seq%window] = o
	}
}

func (s *State) change(now time.Time, up bool, reason string) {
	s.up, s.since, s.reason = up, now, reason
}

// Answered reports that the peer answered the probe with this nonce and saw size
// bytes of it, and returns whether that counts. Answers that come late do as well, up
// to a minute; unknown nonces and repeated answers do nothing.
func (s *State) Answered(now time.Time, nonce uint64, size int) bool {
	i, form := s.find(nonce)
	if i < 0 {
		return false
	}
	if now.Sub(s.pending[i].sent) > maxRTO {
		s.pending = slices.Delete(s.pending, i, i+1)
		return false // says nothing about the present
	}
	s.formAnswered[form] = now
	s.pending[i].got[form] = true
	s.pending[i].size = min(s.pending[i].size, mtu.TUN(size))
	p := s.pending[i]
	if p.second != 0 && !p.got[1-form] {
		return true // half of it
	}
	s.pending = slices.Delete(s.pending, i, i+1)
	if !s.up { // the outage is over: what was lost in it says nothing about the present
		s.outcomes = [window]outcome{}
	}
	s.sample(now.Sub(p.sent))
	s.lastAnswer, s.misses = now, 0
	if p.lost && !p.forMTU { // it was late, not lost
		s.lostSent = s.lastLost()
	}
	if p.sent.After(s.answeredSent) {
		s.answeredSent = p.sent
	}
	if p.sent.Sub(s.answers[0].sent) >= s.cfg.Fast/2 {
		copy(s.answers[1:], s.answers[:])
		s.answers[0] = reply{p.sent, now}
	}
	if !p.forMTU {
		s.setOutcome(p.seq, answered)
	}
	if !s.up {
		s.change(now, true, ReasonAnswered)
		s.upSent = p.sent
		s.pmtu.start(now)
		s.nextLive = s.aligned(now, s.interval(now))
	}
	if p.forMTU && p.epoch == s.pmtu.epoch {
		s.pmtu.answered(now, p.nonce, p.size)
	}
	return true
}

// NotSent reports that this host could not send the liveness probe with this nonce: nothing is lost on the way. (One for the MTU
// counts only if smaller ones are answered.)
func (s *State) NotSent(nonce uint64) {
	if i, _ := s.find(nonce); i >= 0 && !s.pending[i].forMTU {
		s.pending = slices.Delete(s.pending, i, i+1)
		s.probed--
	}
}

// lastLost is when the latest liveness probe was sent that is given up and remembered.
func (s *State) lastLost() time.Time {
	for _, p := range slices.Backward(s.pending) {
		if p.lost && !p.forMTU {
			return p.sent
		}
	}
	return time.Time{}
}

// find is the probe with an unanswered form of this nonce, and which one; -1 if there is none.
func (s *State) find(nonce uint64) (i, form int) {
	for i := range s.pending {
		switch p := &s.pending[i]; {
		case p.nonce == nonce && !p.got[0]:
			return i, 0
		case p.second == nonce && p.second != 0 && !p.got[1]:
			return i, 1
		}
	}
	return -1, 0
}

// lostForm is the form of probes of which none is answered while the other one is; ok is false if there is none such.
func (s *State) lostForm() (form int, ok bool) {
	if !s.cfg.Twice || s.misses < failAfter {
		return 0, false
	}
	first := s.missSent[failAfter-1]
	for form := range s.formAnswered {
		if s.formAnswered[1-form].After(first) && !s.formAnswered[form].After(first) {
			return form, true
		}
	}
	return 0, false
}

// setTwice takes over a changed Config.Twice.
func (s *State) setTwice(twice bool) { s.want.Twice, s.cfg.Twice = twice, twice }

// sample is RFC 6298 §2.2 and §2.3.
func (s *State) sample(r time.Duration) {
	r = max(r, 1)
	if s.srtt == 0 {
		s.srtt, s.rttvar = r, r/2
		return
	}
	s.rttvar += (max(s.srtt-r, r-s.srtt) - s.rttvar) / 4
	s.srtt = max(s.srtt+(r-s.srtt)/8, 1)
}

// Used says that the path carries traffic: it is probed each Busy for a while.
func (s *State) Used(now time.Time) {
	s.lastUsed = now
	if s.up && s.misses == 0 {
		s.soon(s.cfg.Busy)
	}
}

// Poke makes a liveness probe due at once, for instance because the peer has been
// heard of again. It cannot make probes come closer together than Retry/10.
func (s *State) Poke(now time.Time) {
	s.soon(s.cfg.Retry / 10)
}

// TooBig says that a router on the way (ICMP that quotes a packet of ours) or the
// local kernel (EMSGSIZE) takes inner packets of at most limit bytes. It only lowers,
// not below Config.Base, and for a round trip unless probes agree.
func (s *State) TooBig(now time.Time, limit mtu.TUN) {
	s.pmtu.tooBig(now, limit)
	if s.pmtu.doubted {
		s.Poke(now) // a large probe's loss counts if a small one is answered
	}
}

// SetMax says that the underlay's MTU has changed.
func (s *State) SetMax(now time.Time, limit mtu.TUN) {
	s.want.Max = limit
	s.cfg = s.want.limited(limit)
	s.pmtu.setMax(now)
}

// Next is when Due has to be called again. It is never zero.
func (s *State) Next() time.Time {
	next := s.nextLive
	for i := range s.pending {
		if p := &s.pending[i]; !p.lost && p.deadline.Before(next) {
			next = p.deadline
		}
	}
	if at, ok := s.pmtu.next(s.lastUsed.Add(s.cfg.BusyFor)); ok && at.Before(next) {
		next = at
	}
	return next
}

// Snapshot is what is known now.
func (s *State) Snapshot() Info {
	return Info{
		Up: s.up, Since: s.since, Reason: s.reason,
		RTT: s.srtt, RTTVar: s.rttvar, Loss: s.loss(),
		MTU: s.pmtu.proven, First: !s.pmtu.known, Probed: s.probed, Search: s.pmtu.state.String(),
	}
}

// streak is how many of the last liveness probes were answered, the latest lost one
// excluded and those under way left out; at most 64.
func (s *State) streak() (n int) {
	seq := s.seq
	for seq > 0 && s.seq-seq < window && s.outcomes[seq%window] == unknown {
		seq--
	}
	for seq > 0 && s.seq-seq < window && s.outcomes[seq%window] == answered {
		seq--
		n++
	}
	return n
}

// loss is the part of the last liveness probes that are lost.
func (s *State) loss() float64 { return s.lossBefore(s.seq, window) }

// lossBefore is that of the last most of them up to seq that are answered or given up.
func (s *State) lossBefore(seq uint64, most int) float64 {
	var n, all int
	oldest := s.lastLive.Sub(s.began) - lossAge
	for ; seq > 0 && s.seq-seq < window && all < most; seq-- {
		i := seq % window
		if s.sent[i] < oldest || s.outcomes[i] == unknown {
			continue
		}
		all++
		if s.outcomes[i] == lost {
			n++
		}
	}
	if all == 0 {
		return 0
	}
	return float64(n) / float64(all)
}

// Losses in a row that come about by chance less often than rare mean something; so do mostByChance in any case.
const (
	rare         = 1e-4
	mostByChance = 20
	recent       = 16 // probes that show a loss which has just begun
)

// byChance is how many probes in a row may be lost by chance, as the path lost liveness probes of late, up to its last answer; at least one.
func (s *State) byChance() int {
	seq := s.seq
	for seq > 0 && s.seq-seq < window && s.outcomes[seq%window] != answered {
		seq--
	}
	loss := max(s.lossBefore(seq, window), s.lossBefore(seq, recent))
	if loss == 0 {
		return 1
	}
	return min(int(math.Ceil(math.Log(rare)/math.Log(loss))), mostByChance)
}
