package agent

import (
	"cmp"
	"net/netip"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/hostnet"
	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/mtu"
)

// A family that is answered stays. One that is not gives way to the other, with growing pauses while neither is answered.
func TestOuterFamily(t *testing.T) {
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	v4 := netip.MustParseAddr("10.0.1.12")
	f := outerFamily{}
	second := 0
	step := func(judged, answered bool) bool {
		second++
		return f.look(start.Add(time.Duration(second)*time.Second), judged, answered, [2]uint64{})
	}
	for range 100 {
		if step(true, true) || step(false, false) || f.why(v4) != "" {
			t.Fatalf("changed without a reason: %+v, %q", f, f.why(v4))
		}
	}
	changes := func(seconds int) (n int) {
		for range seconds {
			if step(true, false) {
				n++
			}
		}
		return n
	}
	if n := changes(2); n > 0 {
		t.Errorf("changed before its time: %+v", f)
	}
	if n := changes(1); n != 1 || !f.six {
		t.Errorf("%d changes after that: %+v", n, f)
	}
	if want := "over IPv6 now: neither IPv6 nor IPv4 is answered, so they are tried in turn"; f.why(v4) != want {
		t.Errorf("%q, want %q", f.why(v4), want)
	}
	if n := changes(3600); n < 150 || n > 200 {
		t.Errorf("%d changes in an hour", n)
	}
	for !f.six {
		changes(1)
	}
	if step(true, true) || f.why(v4) != "over IPv6, because IPv4 was not answered" {
		t.Errorf("answered by IPv6: %+v, %q", f, f.why(v4))
	}
	if changes(2) > 0 || changes(1) != 1 || f.six {
		t.Errorf("when IPv6 is no longer answered, IPv4 is tried soon: %+v", f)
	}
	if step(true, true) || f.why(v4) != "" {
		t.Errorf("answered by IPv4 again: %+v, %q", f, f.why(v4))
	}
}

// Two hosts meet at the family that works, whichever each of them begins with and how much later the second one begins to judge, though an
// answer needs both of them there.
func TestOuterFamiliesMeet(t *testing.T) {
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, works := range []bool{false, true} {
		for begin := range 4 {
			for late := range 30 {
				both := [2]outerFamily{{six: begin&1 != 0}, {six: begin&2 != 0}}
				var heard [2][2]uint64
				met := false
				second := 0
				for ; !met && second < 120; second++ {
					for i := range both {
						both[i].look(start.Add(time.Duration(second)*time.Second), i == 0 || second >= late, false, heard[i])
					}
					for i := range both {
						if both[i].six == works {
							heard[1-i][b2i(works)]++
						}
					}
					met = second >= late && both[0].six == works && both[1].six == works
				}
				if took := second - late; took > 6 {
					t.Errorf("IPv6 works: %v, they begin with %v, %v, the second one after %d s: they meet %d s later", works, begin&1 != 0, begin&2 != 0, late, took)
				}
			}
		}
	}
}

func TestFamiliesFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "families")
	if got := readFamilies(path); len(got) > 0 {
		t.Errorf("without a file: %v", got)
	}
	a, b := membership.NewNodeID(), membership.NewNodeID()
	if err := writeFamilies(path, map[membership.NodeID]*outerFamily{a: {six: true, pause: time.Minute}, b: {}}); err != nil {
		t.Fatal(err)
	}
	if got := readFamilies(path); len(got) != 2 || *got[a] != (outerFamily{six: true}) || *got[b] != (outerFamily{}) {
		t.Errorf("read %v", got)
	}
}

// A member that was asked answers for some seconds; it is asked once a second, and no more than some are asked at a time.
func TestAnswering(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var a answering
		id := membership.NewNodeID()
		asked, answers := 0, true
		lately := func() bool {
			return a.lately(time.Now(), id, func() bool { asked++; time.Sleep(10 * time.Millisecond); return answers })
		}
		for i := range 100 {
			if got := lately(); got != (i > 0) {
				t.Fatalf("look %d: %v", i, got)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if asked != 10 {
			t.Errorf("asked %d times in 10 s", asked)
		}
		answers = false
		for i := range 50 {
			if got := lately(); got && i > 25 || !got && i < 14 {
				t.Errorf("%d ms after it fell silent: %v", i*100, got)
			}
			time.Sleep(100 * time.Millisecond)
		}
		for range 1000 {
			a.lately(time.Now(), membership.NewNodeID(), func() bool { time.Sleep(time.Second); return true })
		}
		a.mu.Lock()
		busy := a.busy
		a.mu.Unlock()
		if busy != askAtOnce {
			t.Errorf("%d asked at a time", busy)
		}
		time.Sleep(2 * time.Minute)
		if a.forget(time.Now()); len(a.asked) > 0 {
			t.Errorf("%d members are not forgotten", len(a.asked))
		}
	})
}

// While the second family is answered the first one is tried seldom, and more seldom each time. It is used again once it has passed, and
// the pauses are short again when it has been answered for a while.
func TestFirstFamilyAgain(t *testing.T) {
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	f := outerFamily{six: true}
	var tries []int
	passes := false
	run := func(from, seconds int, answered bool) (back int) {
		for i := range seconds {
			now := start.Add(time.Duration(from+i) * time.Second)
			f.look(now, true, answered, [2]uint64{})
			if f.due(now, false) {
				tries = append(tries, from+i)
				f.trial = new(atomic.Bool)
				f.trial.Store(passes)
			}
			if f.returns(false) && back == 0 {
				back = from + i
			}
		}
		return back
	}
	if back := run(0, 7200, true); back > 0 {
		t.Errorf("returned after %d s without an answer", back)
	}
	if want := []int{20, 60, 140, 300, 620, 1260, 2460, 3660, 4860, 6060}; !slices.Equal(tries, want) {
		t.Errorf("tried at %v, want %v", tries, want)
	}
	passes = true
	if back := run(7200, 600, true); back != 7260 || f.six {
		t.Errorf("returned at %d, want 7260: %+v", back, f)
	}
	if f.back != familyBackMax {
		t.Errorf("a family that may come and go is tried again after %v", f.back)
	}
	if run(7800, 100, true); f.back != 0 {
		t.Errorf("after %v with answers the pause is %v", familyForgive, f.back)
	}
	f = outerFamily{six: true}
	tries = nil
	if back := run(0, 10, true) + run(10, 1, false); back > 0 || len(tries) > 0 {
		t.Errorf("tried at %v, returned %d", tries, back)
	}
	f.six = true
	f.trial = new(atomic.Bool)
	f.trial.Store(true)
	if run(20, 1, false); f.trial != nil {
		t.Error("a trial counts that the second family has outlived")
	}
}

// The family of a member that is gone from the view is forgotten, and no other one.
func TestForgetFamilies(t *testing.T) {
	there := testPeer(1, "a", api.PeerAlive, "192.0.2.1")
	gone := membership.NodeID{2}
	s := &session{families: map[membership.NodeID]*outerFamily{there.node: {six: true}, gone: {}}}
	s.forgetFamilies(&view{peers: []peerView{testPeer(3, "c", api.PeerAlive, "192.0.2.3"), there}})
	if len(s.families) != 1 || s.families[there.node] == nil {
		t.Errorf("left: %v", s.families)
	}
}

// Where IPv6 is the first family, its trial is no larger than what the link carries over IPv6: packets that pass over IPv4 may be
// larger by 20 bytes, and probes of their size would never leave this host.
func TestFamilyTrialFitsTheLink(t *testing.T) {
	s := &session{}
	s.sizes.Store(&sizes{link: 1500, tun: 1472})
	r, err := hostnet.New(hostnet.Options{})
	if err != nil {
		t.Skip(err)
	}
	defer r.Close()
	s.ways = r.NewWays(nil)
	for _, m := range []encap.Mode{encap.UDP, encap.IPIP, encap.VXLAN} {
		for _, text := range []string{"100::1", "240.0.0.1"} {
			to := netip.MustParseAddr(text)
			link := cmp.Or(mtu.Link(s.ways.To(to).MTU), 1500) // the host that runs the test may have a route there
			if got, want := s.limitAt(m, to), min(link.TUN(encap.Overhead(m, to.Is6())), 1472); got != want {
				t.Errorf("%s to %s by a link of %d bytes: %d bytes, want %d", m, to, link, got, want)
			}
		}
	}
}
