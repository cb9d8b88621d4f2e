package path

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/mtu"
)

// fabric is the network between this host and one peer, as a Schedule meets it: each encapsulation passes or does not.
type fabric struct {
	s      *Schedule
	now    time.Time
	blocks [encap.NumModes]bool
	no     [2]bool                       // of ipip, packets of IPv4 or IPv6 do not pass
	lose   func(encap.Mode) bool         // nil: nothing
	least  map[encap.Mode]int            // the largest packet that passes, where not all do
	held   time.Time                     // answers arrive no earlier: one of the hosts stands still
	behind [encap.NumModes]time.Duration // how much later than held the answers by this encapsulation arrive
	both   bool                          // pods have both families
	busy   bool                          // packets are exchanged all the time
	rtt    time.Duration

	train   func(Train) int // how many of a train's packets arrive; nil: all
	mute    func() bool     // questions about trains that stay unanswered; nil: none
	arrived map[uint64]int
	trains  []TrainChange
	sent    []Train

	flying   []answer
	packets  uint64
	traffic  time.Time // when Traffic is told next
	switches []Switch
	at       []time.Time // of the switches
}

type answer struct {
	at    time.Time
	m     encap.Mode
	nonce uint64
	size  int // or how many packets of a train have arrived
	train bool
}

const far = "far" // the peer

func newFabric(seed uint64, order ...encap.Mode) *fabric {
	f := &fabric{s: NewSchedule(rand.New(rand.NewPCG(seed, 1))), now: epoch, traffic: epoch, busy: true, rtt: 10 * time.Millisecond}
	f.order(order...)
	return f
}

// order hands the order of preference over.
func (f *fabric) order(order ...encap.Mode) {
	var list []Candidate
	for _, m := range order {
		c := Candidate{Mode: m, Max: 1472, Needs: "the port of " + m.String()}
		if m == encap.IPIP && f.both {
			c.Inner = [2]string{"protocol 4", "protocol 41"}
		}
		list = append(list, c)
	}
	f.s.SetPeers(f.now, map[string][]Candidate{far: list})
}

func (f *fabric) run(d time.Duration) {
	for end := f.now.Add(d); ; {
		r := f.s.Look(f.now)
		for _, p := range r.Probes {
			if !f.blocks[p.Mode] && !(p.Mode == encap.IPIP && f.no[b2i(p.Six)]) && (f.lose == nil || !f.lose(p.Mode)) && f.passes(p.Mode, p.Size) {
				f.flying = append(f.flying, answer{f.now.Add(f.rtt), p.Mode, p.Nonce, p.Size, false})
			}
		}
		f.carry(&r)
		for _, sw := range r.Switches {
			f.switches, f.at = append(f.switches, sw), append(f.at, f.now)
		}
		next, arrives := earlier(r.Next, f.traffic), -1
		for i, a := range f.flying {
			if at := later(a.at, f.held.Add(f.behind[a.m])); !next.Before(at) {
				next, arrives = at, i
			}
		}
		if next.After(end) {
			f.now = end
			return
		}
		f.now = later(next, f.now)
		switch {
		case arrives >= 0:
			a := f.flying[arrives]
			f.flying = append(f.flying[:arrives], f.flying[arrives+1:]...)
			if a.train {
				f.s.TrainAnswered(f.now, far, a.nonce, a.size)
			} else {
				f.s.Answered(f.now, far, a.m, a.nonce, a.size)
			}
		case !f.now.Before(f.traffic):
			f.traffic = f.now.Add(time.Second)
			if f.busy {
				f.packets++
			}
			f.s.Traffic(f.now, far, f.packets, f.packets)
		}
	}
}

func (f *fabric) passes(m encap.Mode, size int) bool {
	most, limited := f.least[m]
	return !limited || size <= most
}

// carry takes trains, and questions about them, to the peer.
func (f *fabric) carry(r *Report) {
	f.trains, f.sent = append(f.trains, r.Trains...), append(f.sent, r.Send...)
	for _, t := range r.Send {
		n := len(t.Sizes)
		if f.train != nil && !f.blocks[t.Mode] {
			n = f.train(t)
		}
		if f.arrived == nil {
			f.arrived = map[uint64]int{}
		}
		f.arrived[t.Nonce] = n
	}
	for _, q := range r.Asks {
		if !f.blocks[q.Mode] && (f.mute == nil || !f.mute()) {
			f.flying = append(f.flying, answer{f.now.Add(f.rtt), q.Mode, q.Nonce, f.arrived[q.Nonce], true})
		}
	}
}

func (f *fabric) inUse() encap.Mode {
	m, _ := f.s.Chosen(far)
	return m
}

func (f *fabric) words(m encap.Mode) string {
	st, _ := f.s.Status(f.now, far, m)
	return st.Words
}

// within lets time pass until m is used, and returns how long that took; more than limit fails the test.
func (f *fabric) within(t interface {
	Helper()
	Fatalf(string, ...any)
}, limit time.Duration, m encap.Mode) time.Duration {
	t.Helper()
	start := f.now
	for f.inUse() != m {
		if f.now.Sub(start) > limit {
			t.Fatalf("%s is in use after %v, want %s", f.inUse(), limit, m)
		}
		f.run(10 * time.Millisecond)
	}
	return f.now.Sub(start)
}

// detection is how long a busy path may take to be left: a second to the next probe, and three at the fast rate.
const detection = time.Second + 3*250*time.Millisecond + 100*time.Millisecond

func TestFirstInOrderIsUsed(t *testing.T) {
	f := newFabric(1, encap.VXLAN, encap.UDP, encap.IPIP)
	f.run(time.Hour)
	if f.inUse() != encap.VXLAN || len(f.switches) > 0 {
		t.Errorf("in use %s, switches %v", f.inUse(), f.switches)
	}
	if got := f.words(encap.VXLAN); got != "answers" {
		t.Errorf("in use: %q", got)
	}
	if got := f.words(encap.UDP); got != "answers; vxlan is preferred" {
		t.Errorf("not in use: %q", got)
	}
}

func TestFilteredFromTheStart(t *testing.T) {
	f := newFabric(1, encap.IPIP, encap.UDP)
	f.blocks[encap.IPIP] = true
	f.within(t, 1100*time.Millisecond, encap.UDP)
	f.run(10 * time.Second)
	want := "no answer yet, udp works: the port of ipip is filtered on the way"
	if got := f.words(encap.IPIP); got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got := f.words(encap.UDP); got != "answers; ipip: "+want {
		t.Errorf("in use: %q", got)
	}
}

func TestFailsOverAndClimbsBack(t *testing.T) {
	f := newFabric(1, encap.IPIP, encap.UDP)
	f.run(time.Minute)
	f.blocks[encap.IPIP] = true
	f.within(t, detection, encap.UDP)
	f.run(30 * time.Second)
	f.s.Heard(f.now, far, encap.IPIP, false)
	want := "no answer since 00:00:59, udp works: the port of ipip is filtered on the way from here to there"
	if got := f.words(encap.IPIP); got != want {
		t.Errorf("%q, want %q", got, want)
	}
	f.blocks[encap.IPIP] = false
	f.run(11 * time.Second) // the probe that finds it
	if f.inUse() != encap.UDP || !strings.Contains(f.words(encap.IPIP), "it is used after 10 answers in a row") {
		t.Errorf("in use %s, ipip %q", f.inUse(), f.words(encap.IPIP))
	}
	f.within(t, 11*time.Second, encap.IPIP)
	if len(f.switches) != 2 {
		t.Errorf("switches: %v", f.switches)
	}
}

// What a host says about the direction of a block is true from the start: an idle peer probes no more often than each 36 s, so that none of
// its probes has arrived lately means nothing, and that one arrived before the block does not either.
func TestDirectionOfABlock(t *testing.T) {
	for _, way := range []string{"there", "back", "both"} {
		for seed := range uint64(30) {
			near, distant := newFabric(seed, encap.UDP), newFabric(seed+100, encap.UDP)
			near.busy, distant.busy = false, false
			blocked := func(f *fabric) bool { return way == "both" || (way == "there") == (f == near) }
			run := func(d time.Duration) { // both, in steps that are shorter than anything that counts
				for end := near.now.Add(d); near.now.Before(end); {
					near.run(10 * time.Millisecond)
					distant.run(10 * time.Millisecond)
				}
			}
			cut, sent := false, 0
			heardBy := func(f, by *fabric) {
				f.lose = func(encap.Mode) bool {
					if !cut || !blocked(f) {
						by.s.Heard(f.now, far, encap.UDP, false)
					}
					if cut && f == near {
						sent++
					}
					return cut // one way or the other, no answer comes back
				}
			}
			heardBy(near, distant)
			heardBy(distant, near)
			run(5 * time.Minute)
			cut = true
			var arrives, none bool
			misses := 0
			for range 120 {
				run(time.Second)
				got := near.words(encap.UDP)
				if i, _ := near.s.Info(far, encap.UDP); i.Up {
					continue
				}
				arrives, none = strings.Contains(got, "but its own probes arrive"), strings.Contains(got, "none of its own probes arrives")
				if arrives && way != "there" || none && way == "there" {
					t.Fatalf("blocked %s, seed %d: %s after the cut: %q", way, seed, near.now.Sub(epoch)-5*time.Minute, got)
				}
				var n int
				if _, rest, ok := strings.Cut(got, "("); !ok {
					t.Fatalf("%q", got)
				} else if _, err := fmt.Sscanf(rest, "%d probe", &n); err != nil || n < misses || n > sent {
					t.Fatalf("%q after %d, want how many of the %d probes of the outage are unanswered", got, misses, sent)
				}
				misses = n
			}
			if arrives != (way == "there") || none != (way != "there") {
				t.Fatalf("blocked %s, seed %d: two minutes after the cut: %q", way, seed, near.words(encap.UDP))
			}
		}
	}
}

// Where pods have both families, ipip works only if both of its protocols pass: whichever is filtered, from the start or later, the next
// encapsulation is used, and what is filtered is named.
func TestOneInnerFamilyIsFiltered(t *testing.T) {
	for form, family := range familyName {
		f := newFabric(1, encap.IPIP, encap.UDP)
		f.both = true
		f.order(encap.IPIP, encap.UDP)
		f.run(10 * time.Second)
		if i, _ := f.s.Info(far, encap.IPIP); f.inUse() != encap.IPIP || i.MTU != 1472 || i.Loss != 0 || i.RTT != f.rtt {
			t.Fatalf("%s is in use: %+v", f.inUse(), i)
		}
		f.no[form] = true
		f.within(t, detection, encap.UDP)
		f.run(10 * time.Second)
		f.s.Heard(f.now, far, encap.IPIP, form == 0) // the other family's probes arrive: that says nothing about this one
		want := fmt.Sprintf("no answer to %s packets since 00:00:09, udp works: protocol %d is filtered on the way", family, [2]int{4, 41}[form])
		if got := f.words(encap.IPIP); got != want {
			t.Errorf("%q, want %q", got, want)
		}
		f.s.Heard(f.now, far, encap.IPIP, form == 1)
		if got := f.words(encap.IPIP); got != want+" from here to there" {
			t.Errorf("%q, and its own arrive", got)
		}
		f.no[form] = false
		f.within(t, 25*time.Second, encap.IPIP)

		pinned := newFabric(1, encap.IPIP)
		pinned.both, pinned.no[form] = true, true
		pinned.order(encap.IPIP, encap.UDP)
		pinned.order(encap.IPIP)
		pinned.run(20 * time.Second)
		if got := pinned.words(encap.IPIP); pinned.s.Answering(far) || !strings.Contains(got, fmt.Sprintf("protocol %d is filtered on the way", [2]int{4, 41}[form])) {
			t.Errorf("pinned: answering %v, %q", pinned.s.Answering(far), got)
		}
	}
}

// A peer that gets its second family later is probed in both from then on.
func TestSecondFamilyComesLater(t *testing.T) {
	f := newFabric(1, encap.IPIP, encap.UDP)
	f.no[1] = true
	f.run(10 * time.Second)
	if f.inUse() != encap.IPIP {
		t.Fatalf("%s is in use where pods have IPv4 alone", f.inUse())
	}
	f.both = true
	f.order(encap.IPIP, encap.UDP)
	f.within(t, detection, encap.UDP)
}

func TestIdlePeerFailsOver(t *testing.T) {
	f := newFabric(1, encap.IPIP, encap.UDP)
	f.busy = false
	f.run(5 * time.Minute)
	f.blocks[encap.IPIP] = true
	f.within(t, 36*time.Second+detection, encap.UDP)
}

// A host that stands still, or a peer that is gone, is no reason to go another way.
func TestOnlyComparisonFails(t *testing.T) {
	f := newFabric(1, encap.IPIP, encap.UDP)
	f.run(time.Minute)
	f.held = f.now.Add(2500 * time.Millisecond)
	f.run(time.Minute)
	f.blocks[encap.IPIP], f.blocks[encap.UDP] = true, true
	f.run(time.Minute)
	if len(f.switches) > 0 || f.s.Answering(far) {
		t.Fatalf("switches %v", f.switches)
	}
	f.blocks[encap.UDP] = false // and comes back changed
	f.within(t, 12*time.Second, encap.UDP)
}

// A peer that is gone is probed eagerly for a while, and then seldom, unless there is traffic for it. It is back within ten seconds,
// and at once where there is traffic, or one of its own probes arrives.
func TestDeadPeer(t *testing.T) {
	for _, tt := range []struct {
		name        string
		busy, heard bool
		least, most int           // probes of three paths in ten minutes
		back        time.Duration // at the latest
	}{
		{name: "idle", least: 3 * 50, most: 3 * 66, back: 11 * time.Second},
		{name: "its probes arrive", heard: true, least: 3 * 50, most: 3 * 66, back: 200 * time.Millisecond},
		{name: "traffic", busy: true, least: 3 * 2000, most: 3 * 2600, back: 300 * time.Millisecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for seed := range uint64(20) {
				f := newFabric(seed, encap.UDP, encap.VXLAN, encap.IPIP)
				f.busy = tt.busy
				f.run(5 * time.Minute)
				dead, sent := true, 0
				f.lose = func(encap.Mode) bool { sent++; return dead }
				f.run(40 * time.Second) // of which an idle path takes 36 to be probed
				f.run(eager)
				sent = 0
				f.run(10 * time.Minute)
				if f.s.Answering(far) {
					t.Fatal("a dead peer answers")
				}
				if sent < tt.least || sent > tt.most {
					t.Errorf("seed %d: %d probes in ten minutes, want %d to %d", seed, sent, tt.least, tt.most)
				}
				dead = false
				if tt.heard {
					f.run(time.Duration(seed) * 10 * time.Millisecond)
					if !f.s.Answering(far) && !f.s.Heard(f.now, far, encap.VXLAN, false) {
						t.Fatal("no probes are due though the peer's own arrive")
					}
				}
				f.run(tt.back)
				for _, m := range []encap.Mode{encap.UDP, encap.VXLAN, encap.IPIP} {
					if i, _ := f.s.Info(far, m); !i.Up {
						t.Errorf("seed %d: %s is down %v after the peer is back", seed, m, tt.back)
					}
				}
				if f.s.Heard(f.now, far, encap.UDP, false) {
					t.Error("probes are due because of one from a peer that answers")
				}
			}
		})
	}
}

// A host that is back may answer its first probes late, and those of one encapsulation later than those of another: that is no reason
// to go another way, of which the kernels of pods would remember the smaller MTU.
func TestLateAnswerOfOneThatIsBack(t *testing.T) {
	for seed := range uint64(50) {
		f := newFabric(seed, encap.UDP, encap.VXLAN)
		f.run(time.Minute)
		f.blocks[encap.UDP], f.blocks[encap.VXLAN] = true, true
		f.run(20 * time.Second)
		f.blocks = [encap.NumModes]bool{}
		f.rtt = 240 * time.Millisecond
		back := f.now
		first := true
		f.lose = func(m encap.Mode) bool { // the first answer by udp takes longer than the time-out
			if m != encap.UDP || !first {
				return false
			}
			first = f.now.Sub(back) < 150*time.Millisecond
			return first
		}
		f.run(time.Second)
		f.rtt, f.lose = 10*time.Millisecond, nil
		f.run(time.Minute)
		if len(f.switches) > 0 {
			t.Fatalf("seed %d: %v", seed, f.switches)
		}
	}
}

// A preferred path that comes and goes is used less and less.
func TestFlapping(t *testing.T) {
	f := newFabric(1, encap.IPIP, encap.UDP)
	for range 45 {
		f.run(50 * time.Second)
		f.blocks[encap.IPIP] = true
		f.run(30 * time.Second)
		f.blocks[encap.IPIP] = false
	}
	if n := len(f.switches); n < 2 || n > 8 { // trials of 5, 10, 20 and 40 fit between two failures, 60 does not
		t.Errorf("%d switches in an hour", n)
	}
	f.blocks[encap.IPIP] = false
	f.within(t, 2*time.Minute, encap.IPIP)
}

// A link that flaps loses the probes of all candidates alike. That one of them happens to be probed in the short time that
// the link is up, and the one in use is not, says nothing against that one.
func TestFlappingLinkOfAll(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := newFabric(rapid.Uint64().Draw(t, "seed"), encap.UDP, encap.VXLAN, encap.IPIP)
		f.rtt = time.Duration(rapid.Int64Range(1, 20e6).Draw(t, "rtt"))
		f.run(10 * time.Second)
		for i := range 20 {
			f.blocks = [encap.NumModes]bool{encap.UDP: true, encap.VXLAN: true, encap.IPIP: true}
			f.run(time.Duration(rapid.Int64Range(300, 600).Draw(t, fmt.Sprint("down ", i))) * time.Millisecond)
			f.blocks = [encap.NumModes]bool{}
			f.run(time.Duration(rapid.Int64Range(50, 500).Draw(t, fmt.Sprint("up ", i))) * time.Millisecond)
		}
		f.run(10 * time.Second)
		if len(f.switches) > 0 {
			t.Fatalf("switches: %v", f.switches)
		}
	})
}

// Answers that come late, after their probes were given up, are no losses: when a host has stood still and the answers
// come at once, the one in use is left no later than after two more probes.
func TestLateAnswersAreNoLosses(t *testing.T) {
	const still = 1250 * time.Millisecond
	for phase := range 20 {
		f := newFabric(1, encap.UDP, encap.IPIP)
		f.run(time.Minute + time.Duration(phase)*50*time.Millisecond + 2*f.rtt)
		f.blocks[encap.UDP] = true
		f.held = f.now.Add(still)
		f.run(still - time.Millisecond)
		if f.inUse() != encap.UDP {
			t.Fatal("udp is left while nothing answers")
		}
		f.within(t, 500*time.Millisecond, encap.IPIP)
	}
}

// When answers to all candidates were held up, those of one come first. That says nothing against the one in use, whose
// answers are on the way. (After Silence it does: the one in use is down, and the other answers.)
func TestOthersLateAnswersComeFirst(t *testing.T) {
	for held := time.Duration(0); held < 2500*time.Millisecond; held += 10 * time.Millisecond {
		f := newFabric(1, encap.UDP, encap.IPIP)
		f.rtt = 2 * time.Millisecond
		f.behind[encap.UDP] = 20 * time.Millisecond
		f.run(time.Minute)
		f.held = f.now.Add(held)
		f.run(20 * time.Second)
		if len(f.switches) > 0 {
			t.Errorf("answers held up for %v: switches %v", held, f.switches)
		}
	}
}

// Where the other candidate loses packets, too, the one that has ceased to work is left within four seconds.
func TestTheOtherLosesSome(t *testing.T) {
	for seed := range uint64(300) {
		f := newFabric(seed, encap.UDP, encap.IPIP)
		coin := rand.New(rand.NewPCG(seed, 2))
		f.lose = func(m encap.Mode) bool { return m == encap.IPIP && coin.Float64() < 0.3 }
		f.run(time.Minute + time.Duration(seed)*time.Millisecond)
		f.blocks[encap.UDP] = true
		f.within(t, 4*time.Second, encap.IPIP)
	}
}

// Where the network loses some of what all encapsulations send, nothing is gained by another one. One that fails altogether is left all the same.
func TestAllLoseSome(t *testing.T) {
	for _, percent := range []int{2, 5, 10, 20, 30, 40} {
		switches, direct := 0, 0
		var longest time.Duration
		for seed := range uint64(20) {
			f := newFabric(seed, encap.UDP, encap.VXLAN, encap.IPIP)
			lose := each(percent, rand.New(rand.NewPCG(seed, 9)))
			f.run(2 * time.Minute)
			f.lose = func(encap.Mode) bool { return lose() }
			f.run(10 * time.Minute)
			switches += len(f.switches)
			dead, since := f.inUse(), f.now
			f.blocks[dead] = true
			for ; f.inUse() == dead && f.now.Sub(since) < time.Minute; f.run(100 * time.Millisecond) {
			}
			longest = max(longest, f.now.Sub(since))
		}
		for seed := range uint64(10) { // a host's route, whose probes are many; the others get few
			f := newFabric(seed, encap.Direct, encap.UDP, encap.VXLAN, encap.IPIP)
			lose := each(percent, rand.New(rand.NewPCG(seed, 9)))
			f.run(2 * time.Minute)
			f.lose = func(encap.Mode) bool { return lose() }
			f.switches = nil
			f.run(10 * time.Minute)
			direct += len(f.switches)
		}
		t.Logf("%d %% each way: %d switches in 200 minutes, %d from and to the host's route in 100; one that fails is left after %v at most", percent, switches, direct, longest)
		if switches > 20 || direct > 10 || longest > 20*time.Second {
			t.Errorf("%d %% each way: too often, or too late", percent)
		}
	}
}

// Probes go by sixteen ports in turn, and so do their answers. Where a network loses those of one port in each direction, for instance as one of sixteen
// equal links is dead, nothing moves, and the path MTU stays; where it loses three quarters of them, the other encapsulation is used, and stays so.
func TestSomePortsAreLost(t *testing.T) {
	const ports = 16
	for seed := range uint64(50) {
		f := newFabric(seed, encap.UDP, encap.IPIP)
		coin := rand.New(rand.NewPCG(seed, 3))
		there, back, turn := coin.IntN(ports), coin.IntN(ports), 0
		f.lose = func(m encap.Mode) bool {
			if m != encap.UDP {
				return false
			}
			turn++
			return turn%ports == there || (turn+turn/ports)%ports == back
		}
		f.run(10 * time.Minute)
		if i, _ := f.s.Info(far, encap.UDP); len(f.switches) > 0 || i.MTU != 1472 || i.Loss == 0 {
			t.Fatalf("seed %d: switches %v, %+v", seed, f.switches, i)
		}
		dead := coin.Perm(ports)[:ports*3/4]
		f.lose = func(m encap.Mode) bool {
			turn++
			return m == encap.UDP && slices.Contains(dead, (turn+turn/ports*3)%ports)
		}
		f.run(10 * time.Minute)
		if n := len(f.switches); f.inUse() != encap.IPIP || n > 5 {
			t.Fatalf("seed %d: the ports %v are lost, %s is in use after %d switches", seed, dead, f.inUse(), n)
		}
	}
}

// A router's word is about paths of its own family. Of IPv6 no link carries less than 1,280 bytes.
func TestTooBigByFamily(t *testing.T) {
	f := newFabric(1)
	modes := []encap.Mode{encap.UDP, encap.Direct6, encap.Direct}
	f.s.SetPeers(f.now, map[string][]Candidate{far: {{Mode: encap.UDP, Max: 1452, Outer6: true}, {Mode: encap.Direct6, Max: 1500, Outer6: true}, {Mode: encap.Direct, Max: 1500}}})
	f.run(10 * time.Second)
	sizes := func() (out [3]int) {
		for i, m := range modes {
			info, _ := f.s.Info(far, m)
			out[i] = int(info.MTU)
		}
		return out
	}
	for _, tt := range []struct {
		six  bool
		link mtu.Link
		want [3]int
	}{
		{true, 700, [3]int{1452, 1500, 1500}},
		{true, 1279, [3]int{1452, 1500, 1500}},
		{true, 1400, [3]int{1352, 1400, 1500}},
		{false, 700, [3]int{1452, 1500, Base}},
	} {
		f.s.TooBig(f.now, far, tt.six, tt.link)
		if got := sizes(); got != tt.want {
			t.Errorf("link %d, IPv6 %v: MTUs %d, want %d", tt.link, tt.six, got, tt.want)
		}
		f.run(20 * time.Second) // all of it was untrue
		if got := sizes(); got != [3]int{1452, 1500, 1500} {
			t.Errorf("link %d, IPv6 %v: then MTUs %d", tt.link, tt.six, got)
		}
	}
}

// Small packets are not all that pods send: of two that answer, the one is used that takes packets of the size that every path should carry, and the
// preferred one again when it does.
func TestOnlySmallPacketsPass(t *testing.T) {
	for _, most := range []int{100, 500, 700, 1279} {
		f := newFabric(1, encap.UDP, encap.IPIP, encap.VXLAN)
		f.least = map[encap.Mode]int{encap.UDP: most, encap.VXLAN: most}
		f.within(t, 15*time.Second, encap.IPIP)
		f.run(30 * time.Minute)
		if n := len(f.switches); f.inUse() != encap.IPIP || n != 1 || f.switches[0].Why != "udp does not carry packets of 1280 bytes" {
			t.Fatalf("%d: %s is in use: %v", most, f.inUse(), f.switches)
		}
		if got := f.words(encap.UDP); got != "answers, but does not carry packets of 1280 bytes" {
			t.Errorf("%d: %q", most, got)
		}
		f.blocks[encap.IPIP] = true // small packets are better than none
		f.within(t, detection, encap.UDP)
		f.blocks[encap.IPIP] = false
		f.within(t, 30*time.Second, encap.IPIP)
		f.least = nil
		f.within(t, 15*time.Minute, encap.UDP)

		f.least = map[encap.Mode]int{encap.UDP: most} // later, and without a word
		f.within(t, 15*time.Second, encap.IPIP)
	}
}

// Where none takes larger packets, the preferred one is used.
func TestSmallPathsAlike(t *testing.T) {
	for _, most := range []map[encap.Mode]int{{encap.UDP: 700, encap.IPIP: 900}, {encap.UDP: 100, encap.IPIP: 100}, {encap.UDP: 1280, encap.IPIP: 1400}} {
		f := newFabric(1, encap.UDP, encap.IPIP)
		f.least = most
		f.run(30 * time.Minute)
		if f.inUse() != encap.UDP || len(f.switches) > 0 {
			t.Errorf("%v: %s is in use: %v", most, f.inUse(), f.switches)
		}
		f.order(encap.IPIP, encap.UDP)
		f.run(10 * time.Second)
		if f.inUse() != encap.IPIP {
			t.Errorf("%v: %s is in use after a change of the order", most, f.inUse())
		}
	}
}

func TestReorder(t *testing.T) {
	f := newFabric(1, encap.UDP, encap.IPIP)
	f.run(time.Minute)
	f.order(encap.IPIP, encap.UDP)
	f.within(t, 200*time.Millisecond, encap.IPIP)
	f.order(encap.VXLAN) // which nobody has tried yet
	if f.inUse() != encap.IPIP {
		t.Fatal("ipip is left before vxlan has answered")
	}
	f.within(t, 200*time.Millisecond, encap.VXLAN)
	if _, ok := f.s.Info(far, encap.IPIP); ok {
		t.Error("ipip is still probed")
	}
	f.blocks[encap.UDP] = true
	f.order(encap.UDP, encap.VXLAN)
	f.run(10 * time.Second)
	if f.inUse() != encap.VXLAN {
		t.Errorf("%s is used, which does not answer", f.inUse())
	}
	f.order(encap.UDP) // pinned, whether it works or not
	f.within(t, 3100*time.Millisecond, encap.UDP)
}

// Losses of no more than two probes in a row, of all candidates in any pattern, do not make the choice flap.
func TestBelowTheThresholdNothingMoves(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := newFabric(rapid.Uint64().Draw(t, "seed"), encap.UDP, encap.VXLAN, encap.IPIP)
		f.busy = rapid.Bool().Draw(t, "busy")
		f.rtt = time.Duration(rapid.Int64Range(1, 200e6).Draw(t, "rtt"))
		f.run(10 * time.Second)
		coin := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "coin"), 1))
		share := rapid.Float64Range(0, 1).Draw(t, "share")
		var row [encap.NumModes]int
		f.lose = func(m encap.Mode) bool {
			if row[m] < failAfter-1 && coin.Float64() < share {
				row[m]++
				return true
			}
			row[m] = 0
			return false
		}
		f.run(5 * time.Minute)
		if len(f.switches) > 0 {
			t.Fatalf("switches: %v", f.switches)
		}
	})
}

// While some candidate answers all the time, one that answers is used: within the time of detection if one that was up
// before does, else within the time between two probes of a path that is down. Where nothing changes, nothing moves.
func TestAWorkingCandidateIsUsed(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		modes := []encap.Mode{encap.UDP, encap.VXLAN, encap.IPIP}
		order := rapid.Permutation(modes).Draw(t, "order")
		f := newFabric(rapid.Uint64().Draw(t, "seed"), order...)
		f.rtt = time.Duration(rapid.Int64Range(1, 50e6).Draw(t, "rtt"))
		f.run(time.Minute)
		for i := range rapid.IntRange(1, 12).Draw(t, "changes") {
			works := rapid.SampledFrom(modes).Draw(t, fmt.Sprint("works ", i))
			limit := 12 * time.Second
			if was, _ := f.s.Info(far, works); was.Up && !f.blocks[works] {
				limit = detection + 2*f.rtt
			}
			for _, m := range modes {
				f.blocks[m] = m != works && rapid.Bool().Draw(t, m.String())
			}
			f.run(limit)
			if f.blocks[f.inUse()] {
				t.Fatalf("%s is used after %v, and does not work; %s works: %s", f.inUse(), limit, works, f.words(works))
			}
			f.run(4 * time.Minute) // longer than the longest trial
			before := len(f.switches)
			f.run(time.Minute)
			for _, m := range order {
				if !f.blocks[m] {
					if f.inUse() != m {
						t.Fatalf("%s is used, %s works and is better: %s", f.inUse(), m, f.words(m))
					}
					break
				}
			}
			if len(f.switches) != before {
				t.Fatalf("moves though nothing changes: %v", f.switches[before:])
			}
		}
	})
}

// What answers by outer IPv4 proves nothing of IPv6.
func TestOtherOuterFamily(t *testing.T) {
	f := newFabric(3, encap.UDP)
	f.run(5 * time.Second)
	if i, _ := f.s.Info(far, encap.UDP); !i.Up {
		t.Fatalf("%+v", i)
	}
	want := map[string][]Candidate{far: {{Mode: encap.UDP, Max: 1452, Outer6: true}}}
	f.s.SetPeers(f.now, want)
	if i, _ := f.s.Info(far, encap.UDP); i.Up || i.Probed > 0 {
		t.Errorf("by IPv6, before any probe: %+v", i)
	}
	f.run(time.Second)
	f.s.SetPeers(f.now, want)
	if i, _ := f.s.Info(far, encap.UDP); !i.Up {
		t.Errorf("by IPv6, after a second: %+v", i)
	}
}
