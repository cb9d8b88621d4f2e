package path

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/tulle-net/tulle/tunnel/mtu"
)

func TestSearchFindsTheMTU(t *testing.T) {
	for _, size := range []int{576, 1000, 1199, 1200, 1201, 1280, 1392, 1430, 1471, 1472, 9000} {
		for _, limit := range []mtu.TUN{1452, 1472, 8972} {
			t.Run(fmt.Sprintf("path %d, link %d", size, limit), func(t *testing.T) {
				s := newState(Config{Max: limit})
				n := newNetwork(s)
				n.mtu = size
				n.run(t, epoch.Add(2*time.Minute))
				i := s.Snapshot()
				if want := min(mtu.TUN(size), limit); i.MTU != want || i.Search != "complete" {
					t.Errorf("MTU %d (%s), want %d", i.MTU, i.Search, want)
				}
				if !i.Up || i.Loss != 0 {
					t.Errorf("large probes lost count against the path: %+v", i)
				}
			})
		}
	}
}

func TestFullSizedPathIsFoundInTwoProbes(t *testing.T) {
	s := newState(Config{})
	n := newNetwork(s)
	n.run(t, epoch.Add(100*time.Millisecond))
	var sizes []int
	for _, p := range n.sent {
		sizes = append(sizes, p.Size)
	}
	if fmt.Sprint(sizes) != "[64 1200 1472]" {
		t.Errorf("probes of %v", sizes)
	}
}

func TestNothingPassesButSmallPackets(t *testing.T) {
	s := newState(Config{})
	n := newNetwork(s)
	n.mtu = 500
	n.run(t, epoch.Add(5*time.Minute))
	if i := s.Snapshot(); !i.Up || i.MTU != 0 || i.Search != "error" {
		t.Errorf("%+v", i)
	}
	n.mtu = 1472
	n.run(t, n.now.Add(time.Minute))
	if i := s.Snapshot(); i.MTU != 1472 {
		t.Errorf("after mending: %+v", i)
	}
}

func TestBlackHole(t *testing.T) {
	s := newState(Config{})
	n := newNetwork(s)
	n.run(t, epoch.Add(time.Minute))
	n.mtu = 1300 // silently, no ICMP
	for range 60 {
		s.Used(n.now)
		n.run(t, n.now.Add(time.Second))
	}
	if i := s.Snapshot(); i.MTU != 1300 || !i.Up {
		t.Errorf("black hole: %+v", i)
	}
	n.mtu = 1472
	n.run(t, n.now.Add(11*time.Minute))
	if i := s.Snapshot(); i.MTU != 1472 {
		t.Errorf("the raise timer did not raise: %+v", i)
	}
}

func TestIdlePathFindsBlackHoleWhenUsed(t *testing.T) {
	s := newState(Config{})
	n := newNetwork(s)
	n.run(t, epoch.Add(time.Minute))
	n.mtu = 1300
	n.run(t, n.now.Add(time.Minute))
	if got := s.Snapshot().MTU; got != 1472 {
		t.Fatalf("an idle path confirmed its size: %d", got)
	}
	s.Used(n.now)
	n.run(t, n.now.Add(4*time.Second))
	if got := s.Snapshot().MTU; got > 1300 {
		t.Errorf("MTU %d four seconds after use", got)
	}
}

func TestTooBig(t *testing.T) {
	up := func(t *testing.T, size int) (*State, *network) {
		s := newState(Config{})
		n := newNetwork(s)
		n.run(t, epoch.Add(time.Minute))
		n.mtu = size
		return s, n
	}
	t.Run("lowers at once", func(t *testing.T) {
		s, n := up(t, 1372)
		s.TooBig(n.now, 1372)
		if got := s.Snapshot().MTU; got != 1372 {
			t.Fatalf("MTU %d", got)
		}
		n.run(t, n.now.Add(9*time.Minute))
		if got := s.Snapshot().MTU; got != 1372 {
			t.Fatalf("MTU %d later", got)
		}
	})
	t.Run("a lie is undone in a round trip", func(t *testing.T) {
		for _, lie := range []mtu.TUN{1471, 1300, 1200, 1000, 576} {
			s, n := up(t, 1472)
			for range 3 { // more of them at once, too
				s.TooBig(n.now, lie)
				if got, want := s.Snapshot().MTU, max(lie, 1200); got != want {
					t.Fatalf("%d: MTU %d, want %d", lie, got, want)
				}
			}
			n.run(t, n.now.Add(2*n.rtt))
			if i := s.Snapshot(); i.MTU != 1472 || i.Search != "complete" {
				t.Errorf("%d: %+v two round trips later", lie, i)
			}
			for end := n.now.Add(8 * time.Second); n.now.Before(end); n.run(t, n.now.Add(100*time.Millisecond)) {
				s.TooBig(n.now, lie)
				if i := s.Snapshot(); i.MTU != 1472 || i.Loss > 0 {
					t.Fatalf("%d, said again and again: %+v", lie, i)
				}
			}
		}
	})
	t.Run("a lie, and a probe is lost by chance", func(t *testing.T) {
		for _, lie := range []mtu.TUN{1300, 600} {
			s, n := up(t, 1472)
			lost := 0
			n.lose = func() bool { lost++; return lost == 2 } // the small one goes first
			s.TooBig(n.now, lie)
			n.run(t, n.now.Add(400*time.Millisecond))
			if i := s.Snapshot(); i.MTU != 1472 || i.Search != "complete" || lost < 4 {
				t.Errorf("%d: %+v", lie, i)
			}
		}
	})
	t.Run("a lie and the truth", func(t *testing.T) {
		s, n := up(t, 1372)
		s.TooBig(n.now, 600)
		s.TooBig(n.now, 1372)
		n.run(t, n.now.Add(10*time.Second))
		if got := s.Snapshot().MTU; got != 1372 {
			t.Errorf("MTU %d", got)
		}
	})
	t.Run("true, and soon", func(t *testing.T) {
		for _, size := range []int{1471, 1372, 1280, 1199, 1100, 900, 576} {
			s, n := up(t, size)
			use := func(d time.Duration) {
				for end := n.now.Add(d); n.now.Before(end); n.run(t, n.now.Add(20*time.Millisecond)) {
					s.Used(n.now)
					s.TooBig(n.now, mtu.TUN(size)) // the router says it of each packet
				}
			}
			use(300 * time.Millisecond)
			if got := s.Snapshot().MTU; got != mtu.TUN(size) {
				t.Errorf("%d: MTU %d after 0.3 s", size, got)
			}
			use(3 * time.Second)
			if i := s.Snapshot(); i.MTU != mtu.TUN(size) || i.Search != "complete" {
				t.Errorf("%d: then %+v", size, i)
			}
			n.run(t, n.now.Add(9*time.Minute))
			if got := s.Snapshot().MTU; got != mtu.TUN(size) {
				t.Errorf("%d: MTU %d later", size, got)
			}
			n.mtu = 1472
			n.run(t, n.now.Add(2*time.Minute))
			if got := s.Snapshot().MTU; got != 1472 {
				t.Errorf("%d: MTU %d after the raise timer", size, got)
			}
		}
	})
	t.Run("not the whole truth", func(t *testing.T) {
		s, n := up(t, 1100) // a second router carries less, and says nothing
		s.TooBig(n.now, 1372)
		s.Used(n.now)
		n.run(t, n.now.Add(4*time.Second))
		if got := s.Snapshot().MTU; got > 1100 || got == 0 {
			t.Errorf("MTU %d", got)
		}
		n.run(t, n.now.Add(time.Minute))
		if got := s.Snapshot().MTU; got != 1100 {
			t.Errorf("MTU %d later", got)
		}
	})
	t.Run("never raises, never below the minimum", func(t *testing.T) {
		s, n := up(t, 1472)
		for _, limit := range []mtu.TUN{-1, 0, 68, 575, 1472, 1473, 9000, 65535} {
			s.TooBig(n.now, limit)
			if got := s.Snapshot().MTU; got != 1472 {
				t.Errorf("TooBig(%d): MTU %d", limit, got)
			}
		}
	})
	t.Run("guides a search", func(t *testing.T) {
		s := newState(Config{Max: 8972})
		n := newNetwork(s)
		n.mtu = 1400
		n.run(t, epoch.Add(100*time.Millisecond)) // 8972 is on its way
		s.TooBig(n.now, 1400)
		n.run(t, n.now.Add(100*time.Millisecond))
		if i := s.Snapshot(); i.MTU != 1400 {
			t.Errorf("%+v", i)
		}
		n.run(t, n.now.Add(time.Second))
		if i := s.Snapshot(); i.MTU != 1400 || i.Search != "complete" {
			t.Errorf("then %+v", i)
		}
	})
	t.Run("below base", func(t *testing.T) {
		s := newState(Config{})
		n := newNetwork(s)
		n.mtu = 900
		n.run(t, epoch.Add(100*time.Millisecond)) // 1200 is on its way
		s.TooBig(n.now, 900)
		n.run(t, n.now.Add(100*time.Millisecond))
		if i := s.Snapshot(); i.MTU != 900 {
			t.Errorf("%+v", i)
		}
	})
}

func TestAnswersFromBeforeDoNotRaise(t *testing.T) {
	s := newState(Config{})
	n := newNetwork(s)
	n.rtt = 300 * time.Millisecond
	n.run(t, epoch.Add(700*time.Millisecond)) // 1472 has been sent, not answered
	s.TooBig(n.now, 1300)
	n.mtu = 1300
	n.run(t, n.now.Add(time.Minute))
	if got := s.Snapshot().MTU; got != 1300 {
		t.Errorf("MTU %d", got)
	}
}

func TestCutProbesProveNothing(t *testing.T) {
	s := newState(Config{})
	n := newNetwork(s)
	n.answer = func(f *flight) { f.size = min(f.size, 1250) }
	n.run(t, epoch.Add(time.Minute))
	if i := s.Snapshot(); i.MTU != 1250 {
		t.Errorf("%+v", i)
	}
}

func TestFlapKeepsTheMTUUntilRefuted(t *testing.T) {
	for _, after := range []int{1472, 1350, 1100} {
		t.Run(fmt.Sprint(after), func(t *testing.T) {
			s := newState(Config{})
			n := newNetwork(s)
			n.mtu = 1400
			n.run(t, epoch.Add(time.Minute))
			n.alive = false
			n.run(t, n.now.Add(time.Minute))
			if i := s.Snapshot(); i.Up || i.Search != "disabled" || i.MTU != 1400 {
				t.Fatalf("down: %+v", i)
			}
			n.alive, n.mtu = true, after
			n.run(t, n.now.Add(2*time.Minute))
			if i := s.Snapshot(); !i.Up || i.MTU != mtu.TUN(after) {
				t.Errorf("%+v", i)
			}
		})
	}
}

func TestSetMax(t *testing.T) {
	s := newState(Config{})
	n := newNetwork(s)
	n.run(t, epoch.Add(time.Minute))
	for _, limit := range []mtu.TUN{1372, 8972, 1000, 1472} {
		s.SetMax(n.now, limit)
		if got := s.Snapshot().MTU; got > limit {
			t.Errorf("SetMax(%d): MTU %d", limit, got)
		}
		n.run(t, n.now.Add(time.Minute))
		if got := s.Snapshot().MTU; got != limit {
			t.Errorf("a minute after SetMax(%d): MTU %d", limit, got)
		}
	}
}

// Whatever the network does: an answered path is up, the MTU is never above what an
// answer has proven, work stays bounded; and once the network is quiet the truth is
// found.
func TestPathProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		cfg := Config{Max: mtu.TUN(rapid.IntRange(600, 9000).Draw(t, "max"))}
		limit := cfg.Max
		s := New(cfg, epoch, rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0)))
		n := newNetwork(s)
		coin := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "coin"), 1))
		losing := 0.0
		n.lose = func() bool { return coin.Float64() < losing }
		n.check = func(n *network) {
			i := s.Snapshot()
			if int(i.MTU) > n.proven || i.MTU > limit {
				t.Fatalf("MTU %d, proven %d, link %d", i.MTU, n.proven, limit)
			}
			if m := &s.pmtu; m.hi != 0 && m.proven >= m.hi {
				t.Fatalf("%d is both proven and refuted (%d)", m.proven, m.hi)
			}
			if i.Up && i.RTT <= 0 || i.Loss < 0 || i.Loss > 1 || len(s.pending) > maxPending {
				t.Fatalf("%+v, %d pending", i, len(s.pending))
			}
		}
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			switch rapid.IntRange(0, 7).Draw(t, "what") {
			case 0:
				n.alive = !n.alive
			case 1:
				n.mtu = rapid.IntRange(64, 9100).Draw(t, "mtu")
			case 2:
				n.rtt = time.Duration(rapid.Int64Range(1, 10e9).Draw(t, "rtt"))
			case 3:
				losing = rapid.Float64Range(0, 1).Draw(t, "loss")
			case 4:
				s.Used(n.now)
			case 5:
				s.TooBig(n.now, mtu.TUN(rapid.IntRange(0, 10000).Draw(t, "ptb")))
			case 6:
				limit = mtu.TUN(rapid.IntRange(600, 9000).Draw(t, "link"))
				s.SetMax(n.now, limit)
			case 7:
				s.Poke(n.now)
			}
			before := len(n.sent)
			d := time.Duration(rapid.Int64Range(0, 120e9).Draw(t, "time"))
			n.run(t, n.now.Add(d))
			// Not more than liveness each Fast where every other probe is lost, and a
			// search whose steps take as long, or a round trip each when answered.
			if sent := len(n.sent) - before; sent > 60+8*int(d/time.Second) {
				t.Fatalf("%d probes in %v", sent, d)
			}
		}
		n.alive, n.rtt, losing = true, time.Millisecond, 0
		n.mtu = max(n.mtu, 576)
		n.run(t, n.now.Add(25*time.Minute))
		i := s.Snapshot()
		if want := min(mtu.TUN(n.mtu), limit); !i.Up || i.MTU != want {
			t.Fatalf("after 25 quiet minutes: %+v, want MTU %d", i, want)
		}
	})
}

// A size whose black hole begins just below it: base and size in use are the same.
func TestBlackHoleAtBase(t *testing.T) {
	s := newState(Config{Max: 602})
	n := newNetwork(s)
	n.run(t, epoch.Add(time.Second))
	n.mtu = 601
	s.Used(n.now.Add(20 * time.Second))
	n.run(t, n.now.Add(time.Minute))
	if i := s.Snapshot(); i.MTU != 601 || i.Search != "complete" || i.Probed > 130 {
		t.Errorf("%+v", i)
	}
}

// The path goes down only when DownAfter probes in a row were given up without an
// answer in between.
func TestDownNeedsSilence(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := newState(Config{})
		n := newNetwork(s)
		n.rtt = time.Duration(rapid.Int64Range(1e6, 900e6).Draw(t, "rtt"))
		pattern := rapid.SliceOfN(rapid.Bool(), 1, 60).Draw(t, "lost")
		k := 0
		n.lose = func() bool { k++; return k <= len(pattern) && pattern[k-1] }
		wasUp := false
		n.check = func(n *network) {
			up := s.Snapshot().Up
			if wasUp && !up && n.now.Sub(n.heard) < 3*time.Second {
				t.Fatalf("down %v after an answer", n.now.Sub(n.heard))
			}
			wasUp = up
		}
		for i := 0; i < 100 || k <= len(pattern); i++ {
			s.Used(n.now)
			n.run(t, n.now.Add(time.Second))
		}
		n.run(t, n.now.Add(11*time.Second))
		if !s.Snapshot().Up {
			t.Fatalf("not up after the losses: %+v", s.Snapshot())
		}
	})
}

// Where traffic flows, a size that stops passing without a word is found in less than three seconds.
func TestBusyPathFindsBlackHoleInSeconds(t *testing.T) {
	for _, phase := range []int{0, 100, 400, 700, 990} { // milliseconds behind the last probe
		s := newState(Config{Likely: []mtu.TUN{8972, 1472, 1464, 1372}})
		n := newNetwork(s)
		use := func(d time.Duration) {
			for end := n.now.Add(d); n.now.Before(end); {
				s.Used(n.now)
				n.run(t, n.now.Add(50*time.Millisecond))
			}
		}
		use(20*time.Second + time.Duration(phase)*time.Millisecond)
		n.mtu = 1300
		use(1900 * time.Millisecond)
		if got := s.Snapshot().MTU; got > 1300 || got < 1200 {
			t.Errorf("phase %d: MTU %d after 1.9 s, want 1200 to 1300", phase, got)
		}
		use(10 * time.Second)
		if i := s.Snapshot(); i.MTU != 1300 || !i.Up || i.Loss > 0 {
			t.Errorf("phase %d: then %+v, want MTU 1300", phase, i)
		}
	}
}

// A peer that stands still for a while loses probes of every size: that is no black hole.
func TestStandstillIsNoBlackHole(t *testing.T) {
	s := newState(Config{})
	n := newNetwork(s)
	for range 40 {
		s.Used(n.now)
		n.run(t, n.now.Add(700*time.Millisecond))
		n.alive = false
		s.Used(n.now)
		n.run(t, n.now.Add(1200*time.Millisecond))
		if i := s.Snapshot(); i.MTU != 1472 || !i.Up {
			t.Fatalf("%+v", i)
		}
		n.alive = true
	}
}

// each is a loss of probes, there or back, of so many percent each way.
func each(percent int, r *rand.Rand) func() bool {
	return func() bool { return r.IntN(100) < percent || r.IntN(100) < percent }
}

// A path that loses packets of all sizes by chance is no black hole: its MTU stays. A black hole on such a path is found all the same.
func TestChanceIsNoBlackHole(t *testing.T) {
	for _, percent := range []int{2, 5, 10, 20, 30, 40} {
		falls, low := 0, 0
		var longest time.Duration
		for seed := range uint64(20) {
			s := newState(Config{Base: Base, Likely: []mtu.TUN{8972, 1472, 1464, 1372}})
			n := newNetwork(s)
			use := func(d time.Duration) {
				for end := n.now.Add(d); n.now.Before(end); {
					s.Used(n.now)
					n.run(t, n.now.Add(500*time.Millisecond))
				}
			}
			use(2 * time.Minute)
			n.lose = each(percent, rand.New(rand.NewPCG(seed, 9)))
			last := s.Snapshot().MTU
			for range 1200 {
				use(500 * time.Millisecond)
				if got := s.Snapshot().MTU; got < last {
					falls++
				}
				last = s.Snapshot().MTU
			}
			use(30 * time.Second)
			if s.Snapshot().MTU < 1472 {
				low++
			}
			n.mtu = 1300
			hole := n.now
			for ; s.Snapshot().MTU > 1300 && n.now.Sub(hole) < 2*time.Minute; use(500 * time.Millisecond) {
			}
			longest = max(longest, n.now.Sub(hole))
		}
		t.Logf("%d %% each way: in 200 minutes the MTU falls %d times, and is low at the end in %d of 20 runs; a black hole is found after %v at most", percent, falls, low, longest)
		if falls > 4 || low > 1 || longest >= 2*time.Minute {
			t.Errorf("%d %% each way: too often, or too late", percent)
		}
	}
}

// Jumbo frames here, and not there: the sizes that links usually have are tried first.
func TestLikelySizesAreFoundSoon(t *testing.T) {
	for _, size := range []int{1472, 1464, 1372, 8972} {
		s := newState(Config{Max: 8973, Likely: []mtu.TUN{8972, 1472, 1464, 1372}})
		n := newNetwork(s)
		n.mtu = size
		n.run(t, epoch.Add(8*time.Second)) // halving would take twelve steps of as many seconds
		if i := s.Snapshot(); i.MTU != mtu.TUN(size) || i.Search != "complete" {
			t.Errorf("%d: %+v", size, i)
		}
	}
}

// What a path carries is unknown until a search has ended or has refuted a size; then it stays known, whatever follows.
func TestFirstSearch(t *testing.T) {
	s := newState(Config{})
	if !s.Snapshot().First {
		t.Error("a new path is known")
	}
	n := newNetwork(s)
	n.mtu = 1300
	for n.run(t, epoch.Add(10*time.Millisecond)); s.Snapshot().First; n.run(t, n.now.Add(10*time.Millisecond)) {
		if n.now.Sub(epoch) > 10*time.Second {
			t.Fatal("a size that never passes is not refuted")
		}
	}
	if i := s.Snapshot(); i.MTU < 1200 || i.MTU > 1300 {
		t.Errorf("%+v", i)
	}
	t.Logf("refuted after %v", n.now.Sub(epoch))
	n.run(t, epoch.Add(time.Hour))
	if i := s.Snapshot(); i.First || i.MTU != 1300 {
		t.Errorf("after the raise timer: %+v", i)
	}
}
