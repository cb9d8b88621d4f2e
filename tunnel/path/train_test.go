package path

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/mtu"
)

// firstOnly is what a wrong driver does to trains.
func firstOnly(t Train) int {
	if t.Apart {
		return len(t.Sizes)
	}
	return 1
}

func TestTrainsThatArriveStayOn(t *testing.T) {
	f := newFabric(1, encap.UDP, encap.IPIP)
	f.run(time.Minute)
	seen := map[[3]int]bool{}
	for _, tr := range f.sent {
		n := len(tr.Sizes)
		seen[[3]int{n, tr.Sizes[0], tr.Sizes[n-1]}] = true
		if tr.Apart || n < 2 || n > MaxCars || tr.Sizes[n-1] > tr.Sizes[0] {
			t.Fatalf("%+v", tr)
		}
	}
	if len(seen) != len(shapes) || len(f.sent) < 40 || len(f.trains) > 0 || f.s.Trains(far).Off {
		t.Errorf("%d shapes in %d trains, changes %v", len(seen), len(f.sent), f.trains)
	}
	f.busy = false
	f.run(10 * time.Second)
	before := len(f.sent)
	f.run(time.Minute)
	if n := len(f.sent) - before; n > 0 {
		t.Errorf("%d trains to an idle peer", n)
	}
}

func TestBrokenTrainsGoOff(t *testing.T) {
	f := newFabric(1, encap.UDP, encap.IPIP)
	f.run(20*time.Second + 300*time.Millisecond)
	f.train = firstOnly
	f.run(2 * time.Second)
	i := f.s.Trains(far)
	if !i.Off || i.Arrived != 1 || i.Of < 2 || len(f.trains) != 1 || len(f.switches) > 0 {
		t.Fatalf("after two seconds: %+v, changes %v, switches %v", i, f.trains, f.switches)
	}
	before := len(f.sent)
	f.run(59 * time.Minute)
	if n := len(f.sent) - before; n > 0 {
		t.Errorf("%d trains within the hour", n)
	}
	f.run(2 * time.Minute) // tried again, and still broken
	if now := f.s.Trains(far); !now.Off || !now.Since.Equal(i.Since) || len(f.sent) == before || len(f.trains) != 1 {
		t.Errorf("after an hour: %+v, changes %v", now, f.trains)
	}
	f.train = nil
	f.run(62 * time.Minute)
	if f.s.Trains(far).Off || len(f.trains) != 2 {
		t.Errorf("mended, and an hour later: %+v, changes %v", f.s.Trains(far), f.trains)
	}
}

// What also happens to single packets is not the trains' fault, nor is an older peer that does not answer.
func TestLossIsNoReasonAgainstTrains(t *testing.T) {
	coin := rand.New(rand.NewPCG(1, 2))
	for name, set := range map[string]func(*fabric){
		"everything is lost":  func(f *fabric) { f.train = func(Train) int { return 0 } },
		"a third is lost":     func(f *fabric) { f.train = func(t Train) int { return len(t.Sizes) - coin.IntN(len(t.Sizes)/3+1) } },
		"an older peer":       func(f *fabric) { f.mute = func() bool { return true } },
		"ipip has no trains":  func(f *fabric) { f.order(encap.IPIP); f.train = firstOnly },
		"the peer is gone":    func(f *fabric) { f.blocks[encap.UDP], f.blocks[encap.IPIP] = true, true },
		"questions are lost":  func(f *fabric) { f.mute = func() bool { return coin.IntN(2) == 0 } },
		"another way is used": func(f *fabric) { f.blocks[encap.UDP] = true; f.train = firstOnly },
	} {
		f := newFabric(1, encap.UDP, encap.IPIP)
		f.run(10 * time.Second)
		set(f)
		f.run(3 * time.Minute)
		if i := f.s.Trains(far); i.Off || len(f.trains) > 0 {
			t.Errorf("%s: %+v", name, i)
		}
	}
}

// A train of two loses one packet as easily as two single packets do, and half of it is then what a wrong driver leaves: a path that
// loses one packet in thirty, ten or three, each by chance, is none.
func TestChanceIsNoReasonAgainstTrains(t *testing.T) {
	for _, one := range []int{30, 10, 3} {
		coin := rand.New(rand.NewPCG(3, uint64(one)))
		f := newFabric(1, encap.UDP, encap.IPIP)
		f.train = func(t Train) (n int) {
			for range t.Sizes {
				n += b2i(coin.IntN(one) > 0)
			}
			return n
		}
		f.run(20 * time.Minute)
		if i := f.s.Trains(far); i.Off || len(f.trains) > 0 {
			t.Errorf("one packet in %d is lost: %+v, changes %v", one, i, f.trains)
		}
	}
}

// Whatever the path's MTU, a train has two packets at least and fits one message.
func TestTrainsOfAllSizes(t *testing.T) {
	for _, size := range []mtu.TUN{576, 1252, 1472, 8972, 30001, 65507} {
		f := newFabric(1, encap.UDP)
		f.s.SetPeers(f.now, map[string][]Candidate{far: {{Mode: encap.UDP, Max: size}}})
		f.run(30 * time.Second)
		for _, tr := range f.sent {
			sum := 0
			for _, n := range tr.Sizes {
				sum += n
			}
			if len(tr.Sizes) < 2 || sum > trainBytes || tr.Sizes[0] > int(size) {
				t.Errorf("MTU %d: %+v", size, tr)
			}
		}
		if len(f.sent) < len(shapes) {
			t.Errorf("MTU %d: %d trains", size, len(f.sent))
		}
	}
}

// A peer counts the packets of one train of each encapsulation.
func TestArrived(t *testing.T) {
	f := newFabric(1, encap.UDP)
	for _, i := range []int{0, 1, 1, 63, -1, 64, 7} {
		f.s.Car(far, encap.UDP, 5, i)
	}
	f.s.Car("nobody", encap.UDP, 5, 2)
	for _, tc := range []struct {
		id    string
		m     encap.Mode
		nonce uint64
		n     int
		ok    bool
	}{{far, encap.UDP, 5, 4, true}, {far, encap.UDP, 6, 0, true}, {far, encap.VXLAN, 5, 0, true}, {"nobody", encap.UDP, 5, 0, false}, {far, 200, 5, 0, false}} {
		if n, ok := f.s.Arrived(f.now.Add(trainMemory), tc.id, tc.m, tc.nonce); n != tc.n || ok != tc.ok {
			t.Errorf("%+v: %d, %v", tc, n, ok)
		}
	}
	// The train may have reached this agent before it was restarted.
	if _, ok := f.s.Arrived(f.now.Add(trainMemory-1), far, encap.UDP, 6); ok {
		t.Error("an agent that has just begun says that nothing of a train has arrived")
	}
	if n, ok := f.s.Arrived(f.now.Add(trainMemory-1), far, encap.UDP, 5); n != 4 || !ok {
		t.Errorf("of a train that it has seen: %d, %v", n, ok)
	}
	f.s.Car(far, encap.UDP, 6, 0)
	if n, _ := f.s.Arrived(f.now, far, encap.UDP, 5); n != 0 {
		t.Errorf("%d packets of an older train", n)
	}
}
