package tunnel

import (
	"math"
	"testing"
	"time"
)

// A queue in which packets always wait too long has its first drop after the interval, and then more and more of them, by the square root
// of their number (RFC 8289 §4.3). One packet that waited less ends that.
func TestCodel(t *testing.T) {
	var c codel
	start := time.Unix(1000, 0)
	at := func(percent float64) time.Time {
		return start.Add(time.Duration(percent / 100 * float64(codelInterval)))
	}
	long, short := codelTarget, codelTarget-1

	// drops lets packets wait for d, a thousand in an interval, and returns the times of drops, in percent of an interval as all times here.
	drops := func(from, to float64, d time.Duration) (times []float64) {
		for now := from; now < to; now += 0.1 {
			c.waited(at(now), d)
			if c.drop(at(now)) {
				times = append(times, now)
			}
		}
		return times
	}
	close := func(got []float64, want ...float64) bool {
		if len(got) != len(want) {
			return false
		}
		for i := range got {
			if math.Abs(got[i]-want[i]) > 0.2 {
				return false
			}
		}
		return true
	}
	if got := drops(0, 1000, short); len(got) > 0 || !c.calm() {
		t.Errorf("packets that wait for less than the target: dropped at %v", got)
	}
	// After one interval, then 1, 1/√2, 1/√3, 1/√4 and 1/√5 of one.
	if got := drops(1000, 1450, long); !close(got, 1100, 1200, 1270.7, 1328.4, 1378.4, 1423.2) {
		t.Errorf("dropped at %v", got)
	}
	if got := drops(1450, 1450.1, short); len(got) > 0 || !c.calm() {
		t.Errorf("dropped at %v though a packet waited less", got)
	}
	// Soon after, it goes on at the rate of before: five drops were necessary after the first.
	if got := drops(1451, 1650, long); !close(got, 1551, 1551+100/math.Sqrt(5), 1551+100/math.Sqrt(5)+100/math.Sqrt(6)) {
		t.Errorf("dropped at %v when the queue was full again", got)
	}
	// Long after, it begins anew.
	drops(1650, 1650.1, short)
	if got := drops(5000, 5250, long); !close(got, 5100, 5200) {
		t.Errorf("dropped at %v when the queue was full again much later", got)
	}
}

// A burst that is gone before the interval is over costs nothing.
func TestCodelBurst(t *testing.T) {
	var c codel
	now := time.Unix(1000, 0)
	for range 100 {
		for range 9 {
			now = now.Add(codelInterval / 10)
			c.waited(now, time.Second)
			if c.drop(now) {
				t.Fatal("dropped within the interval")
			}
		}
		now = now.Add(codelInterval / 10)
		c.waited(now, 0)
	}
}
