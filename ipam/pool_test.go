package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

var t0 = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func prefixes(s string) (out []netip.Prefix) {
	for f := range strings.FieldsSeq(s) {
		out = append(out, netip.MustParsePrefix(f))
	}
	return out
}

func TestPoolOrderAndReservedAddresses(t *testing.T) {
	for _, tc := range []struct {
		blocks, tun, first string
		size               uint64
	}{
		{"10.244.3.0/24", "10.244.3.0", "10.244.3.1", 254},
		{"10.244.3.0/30", "10.244.3.0", "10.244.3.1", 2},
		{"10.244.3.0/31", "10.244.3.0", "10.244.3.1", 1},
		{"fd00:1::/64", "fd00:1::", "fd00:1::1", 1 << 63},
		{"fd00:1::/126", "fd00:1::", "fd00:1::1", 3},
	} {
		p := NewPool(time.Minute)
		b := netip.MustParsePrefix(tc.blocks)
		six := b.Addr().Is6()
		p.Open(b)
		tun, _ := p.TunAddr(six)
		a, err := p.Allocate(t0, Allocation{Key: "a"}, six)
		if err != nil || tun.String() != tc.tun || a.Addr.String() != tc.first || p.Blocks()[0].Size != tc.size {
			t.Errorf("%v: tun %v, first %v, size %d, %v", b, tun, a.Addr, p.Blocks()[0].Size, err)
		}
		if _, err := p.Allocate(t0, Allocation{Key: "tun", Addr: tun}, six); !errors.Is(err, ErrUnavailable) {
			t.Errorf("%v: the tun address is given to a pod: %v", b, err)
		}
	}
}

// TestPoolFills: every address that a block has is given exactly once, and no more.
func TestPoolFills(t *testing.T) {
	p := NewPool(time.Minute)
	p.Open(netip.MustParsePrefix("10.0.0.0/28"))
	p.Open(netip.MustParsePrefix("10.0.0.32/28"))
	seen := make(map[netip.Addr]bool)
	for i := range 28 { // 14 in each: the first and the last are skipped in both
		a, err := p.Allocate(t0, Allocation{Key: fmt.Sprint(i)}, false)
		if err != nil || seen[a.Addr] {
			t.Fatalf("%d: %v %v", i, a, err)
		}
		seen[a.Addr] = true
	}
	if _, err := p.Allocate(t0, Allocation{Key: "more"}, false); !errors.Is(err, ErrFull) {
		t.Errorf("after the last address: %v", err)
	}
	for _, s := range []string{"10.0.0.0", "10.0.0.15", "10.0.0.32", "10.0.0.47"} {
		if seen[netip.MustParseAddr(s)] {
			t.Errorf("%s was handed out", s)
		}
	}
	if n := p.Spare(t0, false, 100); n != 0 {
		t.Errorf("spare %d", n)
	}
}

func TestPoolIsIdempotentByKey(t *testing.T) {
	p := NewPool(time.Minute)
	p.Open(netip.MustParsePrefix("10.0.0.0/24"))
	p.Open(netip.MustParsePrefix("fd00::/64"))
	a, _ := p.Allocate(t0, Allocation{Key: "x"}, false)
	six, _ := p.Allocate(t0, Allocation{Key: "x"}, true)
	again, err := p.Allocate(t0.Add(time.Hour), Allocation{Key: "x"}, false)
	if err != nil || again != a || !six.Addr.Is6() {
		t.Errorf("%v then %v, %v; %v", a, again, err, six)
	}
	if got := p.Release(t0, "x"); len(got) != 2 {
		t.Errorf("released %v", got)
	}
	if got := p.Release(t0, "x"); got != nil {
		t.Errorf("released twice: %v", got)
	}
}

func TestPoolCooldown(t *testing.T) {
	p := NewPool(time.Minute)
	p.Open(netip.MustParsePrefix("10.0.0.0/29"))
	first, _ := p.Allocate(t0, Allocation{Key: "a"}, false)
	p.Release(t0, "a")
	if b, _ := p.Allocate(t0, Allocation{Key: "b"}, false); b.Addr == first.Addr {
		t.Error("reused at once")
	}
	if _, err := p.Allocate(t0.Add(59*time.Second), Allocation{Key: "c", Addr: first.Addr}, false); !errors.Is(err, ErrUnavailable) {
		t.Errorf("given on request while it rests: %v", err)
	}
	if a, err := p.Allocate(t0, Allocation{Key: "a"}, false); err != nil || a.Addr == first.Addr {
		t.Errorf("a, which has not asked for its old address, gets %v, %v", a, err)
	}
	p.Release(t0, "a")
	if a, err := p.Allocate(t0, Allocation{Key: "a", Addr: first.Addr}, false); err != nil || a.Addr != first.Addr {
		t.Errorf("a, which had it last and asks for it again: %v, %v", a, err)
	}
	p.Release(t0, "a")
	if c, err := p.Allocate(t0.Add(time.Minute), Allocation{Key: "c"}, false); err != nil || c.Addr != first.Addr {
		t.Errorf("after its rest the lowest address is %v, %v", c, err)
	}
}

// A cool-down goes on in the pool of the next run, for whom it was and against all others.
func TestPoolRest(t *testing.T) {
	before, after := NewPool(time.Minute), NewPool(time.Minute)
	for _, p := range []*Pool{before, after} {
		p.Open(netip.MustParsePrefix("10.0.0.0/29"))
	}
	box, _ := before.Allocate(t0, Allocation{Key: "box"}, false)
	before.Release(t0, "box")
	for _, c := range before.Cooling(t0) {
		after.Rest(t0, c, time.Minute)
	}
	if _, err := after.Allocate(t0, Allocation{Key: "other", Addr: box.Addr}, false); !errors.Is(err, ErrUnavailable) {
		t.Errorf("another one gets it: %v", err)
	}
	if a, err := after.Allocate(t0, Allocation{Key: "box", Addr: box.Addr}, false); err != nil || a.Addr != box.Addr {
		t.Errorf("the one that had it gets %v, %v", a, err)
	}
}

func TestPoolRequestedAddress(t *testing.T) {
	p := NewPool(time.Minute)
	p.Open(netip.MustParsePrefix("10.0.0.0/24"))
	want := netip.MustParseAddr("10.0.0.77")
	if a, err := p.Allocate(t0, Allocation{Key: "a", Addr: want}, false); err != nil || a.Addr != want {
		t.Fatal(a, err)
	}
	for _, a := range []Allocation{
		{Key: "b", Addr: want},
		{Key: "b", Addr: netip.MustParseAddr("10.0.1.1")},
		{Key: "b", Addr: netip.MustParseAddr("10.0.0.255")},
		{Key: "a", Addr: netip.MustParseAddr("10.0.0.78")},
	} {
		if got, err := p.Allocate(t0, a, false); !errors.Is(err, ErrUnavailable) {
			t.Errorf("%v: %v, %v", a, got, err)
		}
	}
	// Who asks for an address of another node is told which ones there are.
	for addr, want := range map[string]string{"10.0.1.1": "ask for a free address of 10.0.0.0/24", "fd00::1": "of the other family"} {
		if _, err := p.Allocate(t0, Allocation{Key: "b", Addr: netip.MustParseAddr(addr)}, netip.MustParseAddr(addr).Is6()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want an error with %q", addr, err, want)
		}
	}
}

// TestPoolPass: addresses pass to another key without a rest, except where others are wanted, and come back on Restore.
func TestPoolPass(t *testing.T) {
	p := NewPool(time.Minute)
	p.Open(netip.MustParsePrefix("10.0.0.0/24"))
	p.Open(netip.MustParsePrefix("fd00::/120"))
	get := func(key string) (four, six netip.Addr) {
		for _, v6 := range []bool{false, true} {
			a, err := p.Allocate(t0, Allocation{Key: key}, v6)
			if err != nil {
				t.Fatal(err)
			}
			if v6 {
				six = a.Addr
			} else {
				four = a.Addr
			}
		}
		return four, six
	}
	check := func(what, key string, want ...netip.Addr) {
		t.Helper()
		var got []netip.Addr
		for _, v6 := range []bool{false, true} {
			if a, ok := p.Lookup(key, v6); ok {
				got = append(got, a.Addr)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %s has %v, want %v", what, key, got, want)
		}
	}
	a4, a6 := get("a")
	was := p.Pass(t0, "a", Allocation{Key: "b", Pod: "web"}, nil)
	check("passed", "b", a4, a6)
	check("passed", "a")
	if b, _ := p.At(a4); b.Pod != "web" || b.Since != t0 {
		t.Errorf("%+v", b)
	}
	p.Restore(was)
	check("restored", "a", a4, a6)
	check("restored", "b")

	// Another address is wanted, by the key itself: the old one rests.
	other := netip.MustParseAddr("10.0.0.99")
	p.Pass(t0, "a", Allocation{Key: "a"}, []netip.Addr{other})
	check("another is wanted", "a", a6)
	if len(p.Cooling(t0)) != 1 {
		t.Errorf("resting: %v", p.Cooling(t0))
	}
	p.Restore(was)
	check("restored", "a", a4, a6)

	// The new key has addresses: it keeps them, except where one of the old key's is wanted.
	c4, c6 := get("c")
	was = p.Pass(t0, "a", Allocation{Key: "c"}, []netip.Addr{a6})
	check("one is wanted", "c", c4, a6)
	check("one is wanted", "a", a4)
	p.Restore(was)
	check("restored", "c", c4, c6)
	check("restored", "a", a4, a6)
	if len(p.Cooling(t0)) != 0 {
		t.Errorf("resting: %v", p.Cooling(t0))
	}
}

// TestPoolAdopted: addresses of pods whose space is lost are never handed out, in
// whichever order blocks come and go.
func TestPoolAdopted(t *testing.T) {
	p := NewPool(time.Minute)
	lost := netip.MustParseAddr("10.0.9.1")
	if !p.Adopt(Allocation{Key: "old", Addr: lost}) || p.Adopt(Allocation{Key: "other", Addr: lost}) {
		t.Fatal("adoption")
	}
	p.Open(netip.MustParsePrefix("10.0.9.0/24"))
	if b := p.Blocks()[0]; b.Used != 1 {
		t.Errorf("%v", b)
	}
	if a, _ := p.Allocate(t0, Allocation{Key: "new"}, false); a.Addr != lost.Next() {
		t.Errorf("%v", a)
	}
}

// TestPoolRandom holds the pool against a map.
func TestPoolRandom(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := NewPool(10 * time.Second)
		p.Open(netip.MustParsePrefix("10.0.0.0/28"))
		now := t0
		has := make(map[string]netip.Addr)
		freed := make(map[netip.Addr]time.Time)
		for range rapid.IntRange(1, 120).Draw(t, "steps") {
			now = now.Add(time.Duration(rapid.IntRange(0, 4).Draw(t, "wait")) * time.Second)
			key := fmt.Sprint(rapid.IntRange(0, 19).Draw(t, "key"))
			if rapid.Bool().Draw(t, "release") {
				p.Release(now, key)
				if a, ok := has[key]; ok {
					freed[a] = now
					delete(has, key)
				}
				continue
			}
			a, err := p.Allocate(now, Allocation{Key: key}, false)
			old, had := has[key]
			if err != nil {
				resting := 0
				for _, at := range freed {
					if now.Sub(at) < 10*time.Second {
						resting++
					}
				}
				if had || len(has)+resting < 14 {
					t.Fatalf("%v with %d of 14 in use and %d resting", err, len(has), resting)
				}
				continue
			}
			if had {
				if old != a.Addr {
					t.Fatalf("%s had %v, gets %v", key, old, a.Addr)
				}
				continue
			}
			for k, b := range has {
				if b == a.Addr {
					t.Fatalf("%v given to %s and %s", b, k, key)
				}
			}
			if at, ok := freed[a.Addr]; ok && now.Sub(at) < 10*time.Second {
				t.Fatalf("%v given %v after its release", a.Addr, now.Sub(at))
			}
			for b := netip.MustParseAddr("10.0.0.1"); b != a.Addr; b = b.Next() {
				_, rests := freed[b]
				used := slices.Contains(slices.Collect(values(has)), b)
				if !used && !(rests && now.Sub(freed[b]) < 10*time.Second) {
					t.Fatalf("%v given, %v is lower and free", a.Addr, b)
				}
			}
			has[key] = a.Addr
			delete(freed, a.Addr)
		}
	})
}

func values(m map[string]netip.Addr) func(func(netip.Addr) bool) {
	return func(yield func(netip.Addr) bool) {
		for _, v := range m {
			if !yield(v) {
				return
			}
		}
	}
}

func TestSubtractAndAggregateAreInverse(t *testing.T) {
	whole := netip.MustParsePrefix("10.0.0.0/24")
	rapid.Check(t, func(t *rapid.T) {
		var minus []netip.Prefix
		for range rapid.IntRange(0, 8).Draw(t, "n") {
			a := netip.AddrFrom4([4]byte{10, 0, 0, rapid.Byte().Draw(t, "a")})
			minus = append(minus, netip.PrefixFrom(a, rapid.IntRange(24, 32).Draw(t, "bits")).Masked())
		}
		rest := Subtract(whole, minus, 32)
		for i := range 256 {
			a := netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})
			p := netip.PrefixFrom(a, 32)
			if Overlaps(rest, p) == Overlaps(minus, p) {
				t.Fatalf("%v - %v = %v is wrong at %v", whole, minus, rest, a)
			}
		}
		if got := Aggregate(slices.Concat(rest, minus)); len(got) != 1 || got[0] != whole {
			t.Fatalf("%v + %v = %v", rest, minus, got)
		}
	})
}

// The host's clock was ahead when the cool-down was saved, and is right again.
func TestPoolRestAfterClockWasAhead(t *testing.T) {
	p := NewPool(time.Minute)
	a := netip.MustParseAddr("10.0.0.7")
	p.Rest(t0, Cooling{Addr: a, Until: t0.Add(5 * time.Hour)}, time.Minute)
	if got := p.Cooling(t0); len(got) != 1 || got[0].Until.After(t0.Add(time.Minute)) {
		t.Errorf("%+v, want a minute", got)
	}
	if got := p.Cooling(t0.Add(time.Minute)); len(got) != 0 {
		t.Errorf("after a minute: %+v", got)
	}
}

// A block that is replaced by parts of itself keeps its place, so the address of the TUN device stays.
func TestPoolReplace(t *testing.T) {
	p := NewPool(time.Minute)
	first, second := netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("10.0.7.0/24")
	p.Open(first)
	p.Open(second)
	pod, err := p.Allocate(t0, Allocation{Key: "pod"}, false)
	if err != nil {
		t.Fatal(err)
	}
	lo, hi := Halves(first)
	p.Replace(first, lo, hi)
	if got := p.Prefixes(); !slices.Equal(got, []netip.Prefix{lo, hi, second}) {
		t.Errorf("blocks %v", got)
	}
	if b := p.Blocks(); b[0].Used != 1 || b[0].Size != 126 || b[1].Used != 0 || b[1].Size != 126 {
		t.Errorf("%+v", b)
	}
	p.Drop(pod.Addr)
	p.Close(hi)
	p.Replace(lo, netip.PrefixFrom(lo.Addr(), 32))
	if tun, _ := p.TunAddr(false); tun != first.Addr() || p.Blocks()[0].Size != 0 {
		t.Errorf("TUN %v, blocks %+v", tun, p.Blocks())
	}
	if probe, ok := p.ProbeAddr(false); !ok || probe != Last(second) {
		t.Errorf("probes go to %v, %v", probe, ok)
	}
	if a, err := p.Allocate(t0, Allocation{Key: "next"}, false); err != nil || !second.Contains(a.Addr) {
		t.Errorf("%v, %v", a, err)
	}
}

// Preferred blocks are used first, and leave the address of the TUN device alone.
func TestPoolPrefer(t *testing.T) {
	p := NewPool(time.Minute)
	first, fixed := netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("10.0.7.0/29")
	p.Prefer([]netip.Prefix{fixed})
	p.Open(first)
	p.Open(fixed)
	for i := range 8 {
		a, err := p.Allocate(t0, Allocation{Key: fmt.Sprint(i)}, false)
		if err != nil || fixed.Contains(a.Addr) != (i < 6) {
			t.Errorf("pod %d gets %v, %v", i, a.Addr, err)
		}
	}
	if tun, _ := p.TunAddr(false); tun != first.Addr() {
		t.Errorf("TUN %v", tun)
	}
}
