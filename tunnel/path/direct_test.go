package path

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/tulle-net/tulle/tunnel/encap"
)

// TestDirectProvenFirst: nothing goes the direct way before it has answered for its trial, and each family is judged alone.
func TestDirectProvenFirst(t *testing.T) {
	f := newFabric(1, encap.Direct, encap.Direct6, encap.UDP)
	f.blocks[encap.Direct6] = true
	f.run(time.Second)
	if f.s.Direct(far, false) {
		t.Errorf("direct after a second: %s", f.words(encap.Direct))
	}
	f.run(3 * time.Second)
	if !f.s.Direct(far, false) || f.s.Direct(far, true) || f.inUse() != encap.UDP {
		t.Errorf("IPv4 direct %v, IPv6 direct %v, else %v: %s", f.s.Direct(far, false), f.s.Direct(far, true), f.inUse(), f.words(encap.Direct))
	}
	for m, want := range map[encap.Mode]string{
		encap.Direct:  "answers",
		encap.Direct6: "no answer yet, udp works: packets with pod addresses are dropped on the way",
		encap.UDP:     "answers; IPv4 packets go direct; direct: no answer yet, udp works",
	} {
		if got := f.words(m); !strings.HasPrefix(got, want) {
			t.Errorf("%d: %q, want %q", m, got, want)
		}
	}
}

// TestDirectFails: it is left within a second while nothing else is used, and comes back after its trial.
func TestDirectFails(t *testing.T) {
	for _, order := range [][]encap.Mode{{encap.Direct, encap.UDP, encap.IPIP}, {encap.Direct, encap.VXLAN}} {
		f := newFabric(2, order...)
		f.busy = false // the agent sees nothing of what goes direct
		f.run(5 * time.Minute)
		if !f.s.Direct(far, false) || len(f.switches) != 1 {
			t.Fatalf("%v: %+v", order, f.switches)
		}
		for range 5 {
			f.blocks[encap.Direct] = true
			began, n := f.now, len(f.switches)
			f.run(1100 * time.Millisecond)
			if f.s.Direct(far, false) || len(f.switches) != n+1 {
				t.Fatalf("%v: still direct %v after it has failed: %s", order, f.now.Sub(began), f.words(encap.Direct))
			}
			f.blocks[encap.Direct] = false
			f.run(5 * time.Minute)
			if !f.s.Direct(far, false) {
				t.Fatalf("not direct again: %s", f.words(encap.Direct))
			}
		}
	}
}

// TestDirectTakesLittle: it is not used where it takes small packets only, and left when it does.
func TestDirectTakesLittle(t *testing.T) {
	for _, most := range []int{100, 500, 1200} {
		f := newFabric(1, encap.Direct, encap.UDP)
		f.least = map[encap.Mode]int{encap.Direct: most}
		for range 120 {
			f.run(time.Second)
			if f.s.Direct(far, false) {
				t.Fatalf("%d: direct after %v", most, f.now.Sub(epoch))
			}
		}
		if got := f.words(encap.UDP); !strings.Contains(got, "direct answers, but does not carry packets of 1280 bytes") {
			t.Errorf("%d: %q", most, got)
		}
		f.least = nil
		f.run(15 * time.Minute)
		if !f.s.Direct(far, false) {
			t.Fatalf("%d: not direct, which passes all now: %s", most, f.words(encap.Direct))
		}
		f.least = map[encap.Mode]int{encap.Direct: most}
		f.run(15 * time.Second)
		if f.s.Direct(far, false) {
			t.Errorf("%d: still direct: %s", most, f.words(encap.Direct))
		}
	}
}

// TestDirectWithoutAgent: the peer's agent does not answer at all. Its kernel forwards what arrives directly, so the direct
// path stays.
func TestDirectWithoutAgent(t *testing.T) {
	f := newFabric(3, encap.Direct, encap.UDP)
	f.run(10 * time.Second)
	f.blocks[encap.Direct], f.blocks[encap.UDP] = true, true
	f.run(2 * time.Minute)
	if !f.s.Direct(far, false) || f.s.Answering(far) {
		t.Errorf("direct %v, answering %v", f.s.Direct(far, false), f.s.Answering(far))
	}
	f.blocks[encap.Direct], f.blocks[encap.UDP] = false, false // both come back, the tunnel perhaps first
	f.run(time.Minute)
	if !f.s.Direct(far, false) {
		t.Error("not direct after the agent is back")
	}
}

// TestDirectLeft: what an earlier run has left is kept until it fails.
func TestDirectLeft(t *testing.T) {
	for _, works := range []bool{true, false} {
		f := &fabric{s: NewSchedule(rand.New(rand.NewPCG(4, 1))), now: epoch, traffic: epoch, rtt: time.Millisecond}
		f.blocks[encap.Direct] = !works
		want := map[string][]Candidate{far: {{Mode: encap.Direct, Max: 1500, Left: true, Hop: "1"}, {Mode: encap.UDP, Max: 1472}}}
		f.s.SetPeers(f.now, want)
		if !f.s.Direct(far, false) {
			t.Error("not kept at the start")
		}
		f.run(3 * time.Second)
		if f.s.Direct(far, false) != works {
			t.Errorf("works %v: direct %v", works, f.s.Direct(far, false))
		}
		if i, _ := f.s.Info(far, encap.Direct); works && i.MTU != 1500 {
			t.Errorf("path MTU %d", i.MTU)
		}
		want[far][0].Hop, want[far][0].Left = "2", false // the peer has moved: nothing is proven of the new hop
		f.s.SetPeers(f.now, want)
		if f.s.Direct(far, false) {
			t.Error("direct by a hop of which nothing is known")
		}
		want[far] = want[far][1:]
		f.s.SetPeers(f.now, want)
		f.run(time.Minute)
		if _, ok := f.s.Info(far, encap.Direct); ok || f.s.Direct(far, false) {
			t.Error("direct without being a candidate")
		}
	}
}

// TestDirectAlone: without any encapsulation it is used as soon as it has answered, and stays.
func TestDirectAlone(t *testing.T) {
	f := newFabric(5, encap.Direct)
	f.blocks[encap.Direct] = true
	f.run(time.Minute)
	if f.s.Direct(far, false) || f.inUse() != encap.Direct {
		t.Error("direct without an answer")
	}
	f.blocks[encap.Direct] = false
	f.run(time.Minute)
	if !f.s.Direct(far, false) {
		t.Errorf("not direct: %s", f.words(encap.Direct))
	}
}

// TestDirectOrder: another order of preference switches without a gap, as soon as the better one has answered.
func TestDirectOrder(t *testing.T) {
	f := newFabric(6, encap.Direct, encap.UDP)
	f.run(10 * time.Second)
	for i, order := range [][]encap.Mode{{encap.UDP, encap.Direct}, {encap.Direct, encap.UDP}, {encap.UDP}, {encap.Direct, encap.IPIP}} {
		f.order(order...)
		f.run(10 * time.Second)
		if f.s.Direct(far, false) != order[0].IsDirect() {
			t.Errorf("%d: direct %v: %s", i, f.s.Direct(far, false), f.words(encap.Direct))
		}
	}
	f.order(encap.UDP, encap.Direct)
	f.blocks[encap.UDP] = true
	f.run(10 * time.Second)
	if !f.s.Direct(far, false) {
		t.Errorf("udp fails, direct is second and not used: %s", f.words(encap.Direct))
	}
}

// TestDirectChoice: with any pattern of what passes, what is used works again within two seconds if anything does, and no
// loss below the threshold moves it.
func TestDirectChoice(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := newFabric(rapid.Uint64().Draw(t, "seed"), encap.Direct, encap.Direct6, encap.UDP, encap.IPIP)
		f.run(20 * time.Second)
		misses := map[encap.Mode]int{}
		for range rapid.IntRange(1, 4).Draw(t, "phases") {
			for _, m := range []encap.Mode{encap.Direct, encap.Direct6, encap.UDP, encap.IPIP} {
				f.blocks[m] = rapid.Bool().Draw(t, "blocked")
			}
			f.run(rapid.SampledFrom([]time.Duration{300 * time.Millisecond, 3 * time.Second, 20 * time.Second}).Draw(t, "first"))
			f.run(12 * time.Second)
			for i, m := range directs {
				tunnel := !f.blocks[encap.UDP] || !f.blocks[encap.IPIP]
				if f.s.Direct(far, i == 1) && f.blocks[m] && tunnel {
					t.Fatalf("%v is used and does not work, the tunnel does", m)
				}
			}
			if m := f.inUse(); f.blocks[m] && (!f.blocks[encap.UDP] || !f.blocks[encap.IPIP]) {
				t.Fatalf("%v is used and does not work", m)
			}
		}
		f.blocks = [encap.NumModes]bool{}
		f.run(time.Minute)
		if !f.s.Direct(far, false) || !f.s.Direct(far, true) {
			t.Fatalf("all works: %s / %s", f.words(encap.Direct), f.words(encap.Direct6))
		}
		n := len(f.switches)
		coin := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "coin"), 1))
		f.lose = func(m encap.Mode) bool { // never more than one in a row, nor those of one size alone
			misses[m] = b2i(misses[m] == 0 && coin.IntN(10) < 3)
			return misses[m] == 1
		}
		f.run(time.Minute)
		if len(f.switches) != n {
			t.Fatalf("it flaps: %+v", f.switches[n:])
		}
	})
}

// TestDirectManyPeers: the number of direct probes that a host sends is bounded, and so is the time that a route is kept which has
// failed.
func TestDirectManyPeers(t *testing.T) {
	for _, tc := range []struct {
		peers  int
		most   float64       // probes a second
		leaves time.Duration // a path that has failed
	}{{10, 10 * 3.5, time.Second}, {100, 350, time.Second}, {1000, 350, 5 * time.Second}} {
		s := NewSchedule(rand.New(rand.NewPCG(1, 1)))
		want := map[string][]Candidate{}
		for i := range tc.peers {
			want[fmt.Sprint("peer ", i)] = []Candidate{{Mode: encap.Direct, Max: 1500, Hop: "1"}, {Mode: encap.UDP, Max: 1472}}
		}
		now := epoch
		s.SetPeers(now, want)
		sent, wakes, dead := 0, 0, false
		run := func(d time.Duration) {
			for end := now.Add(d); now.Before(end); {
				r := s.Look(now)
				wakes++
				for _, p := range r.Probes {
					if p.Mode == encap.Direct {
						sent++
					}
					if p.Mode != encap.Direct || !dead {
						s.Answered(now, p.Peer, p.Mode, p.Nonce, p.Size)
					}
				}
				now = later(r.Next, now.Add(time.Millisecond))
			}
		}
		run(time.Minute)
		for id := range want {
			if !s.Direct(id, false) {
				t.Fatalf("%d peers: not direct after a minute", tc.peers)
			}
		}
		sent, wakes = 0, 0
		run(20 * time.Second)
		if rate := float64(sent) / 20; rate > tc.most || rate < tc.most/3 {
			t.Errorf("%d peers: %.0f direct probes a second, want at most %.0f", tc.peers, rate, tc.most)
		}
		if rate := wakes / 20; tc.peers == 10 && rate > 40 { // of each path there are a probe and its deadline, and those of its size
			t.Errorf("%d peers: %d looks a second", tc.peers, rate)
		}
		dead = true
		run(tc.leaves)
		for id := range want {
			if s.Direct(id, false) {
				t.Fatalf("%d peers: a direct path is in use %v after it has failed", tc.peers, tc.leaves)
			}
		}
	}
}
