package path

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/tunnel/mtu"
)

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func newState(cfg Config) *State {
	if cfg.Max == 0 {
		cfg.Max = 1472
	}
	return New(cfg, epoch, rand.New(rand.NewPCG(1, 2)))
}

// network is the other end of a path: it answers after rtt what fits into mtu.
type network struct {
	s     *State
	now   time.Time
	alive bool
	mtu   int
	rtt   time.Duration
	lose  func() bool // nil: nothing

	flying []flight
	sent   []Probe
	proven int             // largest size ever answered
	heard  time.Time       // last answer
	check  func(*network)  // after every step
	answer func(p *flight) // may change an answer
}

type flight struct {
	at    time.Time
	nonce uint64
	size  int
}

func newNetwork(s *State) *network {
	return &network{s: s, now: epoch, alive: true, mtu: 65535, rtt: 10 * time.Millisecond}
}

// run lets time pass until end: everything that is due happens at its own time.
func (n *network) run(t interface{ Fatalf(string, ...any) }, end time.Time) {
	for {
		n.drain(t)
		next := n.s.Next()
		if !next.After(n.now) {
			t.Fatalf("Next %v is not after now %v though Due has nothing", next, n.now)
		}
		i := n.earliest()
		if i >= 0 && !n.flying[i].at.After(next) {
			next = n.flying[i].at
		} else {
			i = -1
		}
		if next.After(end) {
			n.now = end
			n.drain(t)
			return
		}
		n.now = next
		if i >= 0 {
			f := n.flying[i]
			n.flying = append(n.flying[:i], n.flying[i+1:]...)
			n.proven, n.heard = max(n.proven, f.size), n.now
			n.s.Answered(n.now, f.nonce, f.size)
			if !n.s.Snapshot().Up {
				t.Fatalf("down at the moment of an answer: %+v", n.s.Snapshot())
			}
		}
		if n.check != nil {
			n.check(n)
		}
	}
}

func (n *network) earliest() int {
	best := -1
	for i := range n.flying {
		if best < 0 || n.flying[i].at.Before(n.flying[best].at) {
			best = i
		}
	}
	return best
}

func (n *network) drain(t interface{ Fatalf(string, ...any) }) {
	for i := 0; ; i++ {
		p, ok := n.s.Due(n.now)
		if !ok {
			return
		}
		if i > 4 {
			t.Fatalf("Due does not end at %v", n.now)
		}
		n.sent = append(n.sent, p)
		if n.alive && p.Size <= n.mtu && (n.lose == nil || !n.lose()) {
			f := flight{n.now.Add(n.rtt), p.Nonce, p.Size}
			if n.answer != nil {
				n.answer(&f)
			}
			n.flying = append(n.flying, f)
		}
	}
}

func TestComesUpOnFirstAnswer(t *testing.T) {
	s := newState(Config{})
	if i := s.Snapshot(); i.Up || i.Reason != ReasonNew || !i.Since.Equal(epoch) || i.MTU != 0 {
		t.Fatalf("new path: %+v", i)
	}
	p, ok := s.Due(epoch)
	if !ok || p.Size != 64 {
		t.Fatalf("first probe: %+v, %v", p, ok)
	}
	if _, ok := s.Due(epoch); ok {
		t.Fatal("a second probe at once")
	}
	at := epoch.Add(20 * time.Millisecond)
	s.Answered(at, p.Nonce+1, p.Size)
	if s.Snapshot().Up {
		t.Fatal("a wrong nonce brings the path up")
	}
	s.Answered(at, p.Nonce, p.Size)
	if i := s.Snapshot(); !i.Up || i.Reason != ReasonAnswered || !i.Since.Equal(at) || i.RTT != 20*time.Millisecond {
		t.Fatalf("after the answer: %+v", i)
	}
}

func TestDownAfterLosses(t *testing.T) {
	s := newState(Config{})
	n := newNetwork(s)
	n.run(t, epoch.Add(5*time.Minute))
	n.alive = false
	died := n.now
	n.run(t, died.Add(2*time.Minute))
	i := s.Snapshot()
	if i.Up || !strings.Contains(i.Reason, "probes unanswered") {
		t.Fatalf("after death: %+v", i)
	}
	// Idle at most 36 s, three probes a second apart, each a second to time out.
	if d := i.Since.Sub(died); d > 36*time.Second+4*time.Second {
		t.Errorf("took %v to notice", d)
	}
	if i.Loss == 0 {
		t.Error("no loss shown")
	}
	n.alive = true
	n.run(t, n.now.Add(11*time.Second))
	if i := s.Snapshot(); !i.Up || i.Reason != ReasonAnswered {
		t.Errorf("not up again after MaxRetry: %+v", i)
	}
}

func TestBusyPathNoticesInSeconds(t *testing.T) {
	s := newState(Config{})
	n := newNetwork(s)
	n.run(t, epoch.Add(time.Minute))
	n.alive = false
	died := n.now
	for range 10 {
		s.Used(n.now)
		n.run(t, n.now.Add(500*time.Millisecond))
	}
	if i := s.Snapshot(); i.Up || i.Since.Sub(died) > 4*time.Second {
		t.Errorf("busy path: %+v, died at %v", i, died)
	}
}

func TestProbeRates(t *testing.T) {
	for _, tt := range []struct {
		name        string
		use         bool
		alive       bool
		least, most int // probes in ten minutes, after the first five
	}{
		{"idle", false, true, 16, 27},
		{"busy", true, true, 1500, 1700}, // one a second, and the size in use is confirmed each 600 ms
		{"dead", false, false, 55, 66},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newState(Config{})
			n := newNetwork(s)
			n.alive = tt.alive
			run := func(end time.Time) {
				for n.now.Before(end) {
					if tt.use {
						s.Used(n.now)
					}
					n.run(t, n.now.Add(time.Second))
				}
			}
			run(epoch.Add(5 * time.Minute))
			before := len(n.sent)
			run(epoch.Add(15 * time.Minute))
			if got := len(n.sent) - before; got < tt.least || got > tt.most {
				t.Errorf("%d probes in ten minutes, want %d–%d", got, tt.least, tt.most)
			}
			if s.Snapshot().Probed != len(n.sent) {
				t.Errorf("Probed = %d, sent %d", s.Snapshot().Probed, len(n.sent))
			}
		})
	}
}

func TestIdleProbesAreSpread(t *testing.T) {
	s := newState(Config{})
	seen := map[time.Duration]bool{}
	for range 100 {
		d := s.interval(epoch)
		s.up = true
		d = s.interval(epoch)
		if d < 24*time.Second || d > 36*time.Second {
			t.Fatalf("idle interval %v", d)
		}
		seen[d] = true
	}
	if len(seen) < 50 {
		t.Errorf("only %d different intervals of 100", len(seen))
	}
}

func TestLateAnswersCount(t *testing.T) {
	s := newState(Config{})
	n := newNetwork(s)
	n.rtt = 2500 * time.Millisecond // more than the first time-out
	n.run(t, epoch.Add(time.Minute))
	i := s.Snapshot()
	if !i.Up || i.Since.Sub(epoch) != n.rtt {
		t.Fatalf("slow path: %+v", i)
	}
	if i.Loss != 0 {
		t.Errorf("late answers left as losses: %v", i.Loss)
	}
	if i.MTU != 1472 {
		t.Errorf("MTU %d", i.MTU)
	}
}

func TestVeryLateAnswersDoNot(t *testing.T) {
	s := newState(Config{})
	p, _ := s.Due(epoch)
	s.Answered(epoch.Add(61*time.Second), p.Nonce, p.Size)
	if s.Snapshot().Up {
		t.Error("an answer after a minute brings the path up")
	}
}

// RFC 6298 §2.2 and §2.3 with its constants.
func TestRTT(t *testing.T) {
	s := newState(Config{})
	ms := time.Millisecond
	for _, step := range []struct{ sample, srtt, rttvar time.Duration }{
		{100 * ms, 100 * ms, 50 * ms},
		{200 * ms, 112500 * time.Microsecond, 62500 * time.Microsecond},
		{112500 * time.Microsecond, 112500 * time.Microsecond, 46875 * time.Microsecond},
	} {
		s.sample(step.sample)
		if s.srtt != step.srtt || s.rttvar != step.rttvar {
			t.Errorf("after %v: SRTT %v RTTVAR %v, want %v %v", step.sample, s.srtt, s.rttvar, step.srtt, step.rttvar)
		}
	}
	s.srtt, s.rttvar = ms, ms
	if s.timeout() != 250*ms {
		t.Errorf("time-out %v, want at least a quarter of a second", s.timeout())
	}
	s.srtt, s.rttvar = 2*time.Second, 500*ms
	if s.timeout() != 4*time.Second {
		t.Errorf("time-out %v, want SRTT + 4 RTTVAR", s.timeout())
	}
}

func TestLossOverWindow(t *testing.T) {
	s := newState(Config{})
	n := newNetwork(s)
	coin := rand.New(rand.NewPCG(5, 6))
	n.lose = func() bool { return coin.IntN(5) == 0 }
	for range 400 {
		s.Used(n.now)
		n.run(t, n.now.Add(time.Second))
	}
	i := s.Snapshot()
	if !i.Up || i.Loss < 0.1 || i.Loss > 0.4 {
		t.Errorf("one in five lost: %+v", i)
	}
	n.lose = nil
	for range 100 {
		s.Used(n.now)
		n.run(t, n.now.Add(time.Second))
	}
	if l := s.Snapshot().Loss; l != 0 {
		t.Errorf("loss %v after a clean window", l)
	}
}

// Probes to a peer that had not begun yet were not lost on the way.
func TestNoLossBeforeTheFirstAnswer(t *testing.T) {
	n := newNetwork(newState(Config{}))
	n.alive = false
	n.run(t, n.now.Add(20*time.Second))
	if got := n.s.Snapshot(); got.Up || got.Loss != 1 {
		t.Fatalf("up %v, loss %v of a peer that never answered, want down and 1", got.Up, got.Loss)
	}
	n.alive = true
	n.run(t, n.now.Add(20*time.Second))
	if got := n.s.Snapshot(); !got.Up || got.Loss != 0 {
		t.Fatalf("up %v, loss %v after the peer has begun, want up and 0", got.Up, got.Loss)
	}
}

// Nor is one that was under way when the peer began: its time ends only afterwards.
func TestNoLossOfProbesUnderWay(t *testing.T) {
	n := newNetwork(newState(Config{}))
	n.alive = false
	n.run(t, n.now.Add(100*time.Millisecond))
	n.alive = true
	n.s.Poke(n.now) // the peer's own probe has come
	n.run(t, n.now.Add(20*time.Second))
	if got := n.s.Snapshot(); !got.Up || got.Loss != 0 || n.now.Sub(got.Since) < 19*time.Second {
		t.Fatalf("%+v, want up since the peer began, and no loss", got)
	}
}

// An outage that is over is no loss of the present: the figure begins anew when the path comes up again.
func TestLossEndsWithTheOutage(t *testing.T) {
	n := newNetwork(newState(Config{}))
	n.run(t, n.now.Add(10*time.Minute))
	for range 8 { // with traffic, so that the outage is seen
		n.alive = false
		n.s.Used(n.now)
		n.run(t, n.now.Add(time.Second))
	}
	if got := n.s.Snapshot(); got.Up || got.Loss == 0 {
		t.Fatalf("after 8 s without answers: up %v, loss %v, want down and a loss", got.Up, got.Loss)
	}
	n.alive = true
	n.run(t, n.now.Add(15*time.Second))
	if got := n.s.Snapshot(); !got.Up || got.Loss != 0 {
		t.Errorf("after it: up %v, loss %v, want up and 0", got.Up, got.Loss)
	}
}

// Of an idle path, 64 probes are half an hour: the loss figure has those of the last two minutes.
func TestLossIsOfThePresent(t *testing.T) {
	n := newNetwork(newState(Config{}))
	n.run(t, n.now.Add(10*time.Minute))
	before := n.s.streak()
	losses := 2 // the path stays up
	n.lose = func() bool { losses--; return losses >= 0 }
	n.run(t, n.now.Add(time.Minute))
	if got := n.s.Snapshot(); !got.Up || !got.Since.Before(n.now.Add(-5*time.Minute)) || got.Loss == 0 {
		t.Fatalf("a minute after some losses: %+v, want up all the time and a loss", got)
	}
	n.run(t, n.now.Add(2*time.Minute))
	if got := n.s.Snapshot().Loss; got != 0 {
		t.Errorf("three minutes after some losses: %v, want 0", got)
	}
	n.run(t, n.now.Add(30*time.Minute))
	if got := n.s.streak(); got <= before {
		t.Errorf("%d answers in a row after half an hour, were %d: what the choice counts is not cut", got, before)
	}
}

// A probe that this host could not send was not lost on the way.
func TestNotSent(t *testing.T) {
	n := newNetwork(newState(Config{}))
	for range 20 { // no addresses yet
		if p, ok := n.s.Due(n.now); ok {
			n.s.NotSent(p.Nonce)
		}
		n.now = n.now.Add(time.Second)
	}
	if got := n.s.Snapshot(); got.Probed != 0 || got.Loss != 0 || n.s.misses != 0 {
		t.Fatalf("probed %d, loss %v, %d missed, want nothing of it", got.Probed, got.Loss, n.s.misses)
	}
	n.run(t, n.now.Add(3*time.Second))
	if got := n.s.Snapshot(); !got.Up || got.MTU != 1472 {
		t.Fatalf("not up after it was sent: %+v", got)
	}
}

func TestPoke(t *testing.T) {
	s := newState(Config{})
	n := newNetwork(s)
	n.alive = false
	n.run(t, epoch.Add(5*time.Minute))
	n.alive = true
	for range 1000 { // a flood of hints is one probe each tenth of a second
		s.Poke(n.now)
		n.drain(t)
	}
	before := len(n.sent)
	n.run(t, n.now.Add(150*time.Millisecond))
	if !s.Snapshot().Up {
		t.Errorf("not up after a poke: %+v", s.Snapshot())
	}
	if extra := len(n.sent) - before; extra > 5 {
		t.Errorf("%d probes after the pokes", extra)
	}
}

func TestMTUTypes(t *testing.T) {
	s := New(Config{Max: mtu.Ethernet.TUN(28)}, epoch, rand.New(rand.NewPCG(3, 4)))
	n := newNetwork(s)
	n.run(t, epoch.Add(time.Second))
	if got := s.Snapshot().MTU; got != 1472 {
		t.Errorf("MTU %d, want 1472", got)
	}
}

// A path that never answers keeps no more than a minute's probes in memory.
func TestLostProbesAreForgotten(t *testing.T) {
	now := time.Unix(1e9, 0)
	s := New(Config{Max: 1472}, now, rand.New(rand.NewPCG(1, 2)))
	for end := now.Add(time.Hour); now.Before(end); now = s.Next() {
		for _, ok := s.Due(now); ok; _, ok = s.Due(now) {
		}
	}
	if limit := int(maxRTO/s.cfg.MaxRetry) + 2; len(s.pending) > limit || len(s.pending) == 0 {
		t.Errorf("%d probes are remembered after an hour, want 1 to %d", len(s.pending), limit)
	}
}
