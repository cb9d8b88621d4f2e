// Package stall measures how long the machine let this process stand still, so that limits of tests can leave that out: on
// a busy machine, or a virtual one whose host is busy, nothing runs for a second now and then. And it measures for how long
// processes had to wait for a CPU, since what a test waits for is mostly done by others.
package stall

import (
	"bytes"
	"os"
	"strconv"
	"sync"
	"time"
)

const (
	tick = 10 * time.Millisecond
	// late is by how much more a sleep may take before it counts: what a scheduler does all the time is no stall.
	late = 50 * time.Millisecond
)

// counter adds up by how much the sleeps of one goroutine took longer than they should.
type counter struct {
	mu    sync.Mutex
	woke  time.Time
	total time.Duration
}

// stalled is the sum at a time, with the sleep that goes on.
func (c *counter) stalled(now time.Time) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.total + over(now.Sub(c.woke))
}

// wake ends a sleep, and begins the next one.
func (c *counter) wake(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.total += over(now.Sub(c.woke))
	c.woke = now
}

// over is by how much a sleep was too long.
func over(slept time.Duration) time.Duration {
	if slept < tick+late {
		return 0
	}
	return slept - tick
}

// running is the counter of this process.
var running = sync.OnceValue(func() *counter {
	c := &counter{woke: time.Now()}
	go func() {
		for {
			time.Sleep(tick)
			c.wake(time.Now())
		}
	}()
	return c
})

// Meter measures from Begin on.
type Meter struct{ before, pressed time.Duration }

// Begin begins to measure. Not for tests with virtual time.
func Begin() Meter { return Meter{running().stalled(time.Now()), pressed()} }

// Stalled is how long this process has stood still since Begin.
func (m Meter) Stalled() time.Duration { return running().stalled(time.Now()) - m.before }

// Short is for how long since Begin the machine was short of CPUs: this process stood still, or any one had to wait for a CPU.
func (m Meter) Short() time.Duration { return max(m.Stalled(), pressed()-m.pressed) }

// pressed is for how long, since the machine was started, some process that could run had to wait for a CPU
// (Documentation/accounting/psi.rst). It is 0 where the kernel does not count that.
func pressed() time.Duration {
	b, err := os.ReadFile("/proc/pressure/cpu")
	if err != nil {
		return 0
	}
	return parsePressure(b)
}

// parsePressure reads the total of "some", in microseconds.
func parsePressure(b []byte) time.Duration {
	line, _, _ := bytes.Cut(b, []byte("\n"))
	_, total, _ := bytes.Cut(line, []byte(" total="))
	us, err := strconv.ParseInt(string(total), 10, 64)
	if err != nil || !bytes.HasPrefix(line, []byte("some ")) {
		return 0
	}
	return time.Duration(us) * time.Microsecond
}
