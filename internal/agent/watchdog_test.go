package agent

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// The watchdog is fed while all loops are alive, not while one is stuck, and again when it goes on. The stuck loop is named once.
func TestWatchdog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		var stuck atomic.Pointer[[]string]
		stuck.Store(new([]string))
		var fed atomic.Int64
		w := watchdog{
			log: slog.New(slog.NewTextHandler(&log, nil)), every: time.Second,
			stalled: func() []string { return *stuck.Load() }, feed: func() { fed.Add(1) },
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { w.run(ctx); close(done) }()
		after := func(d time.Duration, want int64, when string) {
			t.Helper()
			time.Sleep(d)
			synctest.Wait()
			if n := fed.Swap(0); n != want { // not before the sleep: the watchdog feeds as soon as it runs
				t.Errorf("%s: fed %d times in %v, want %d", when, n, d, want)
			}
		}
		after(time.Second/2, 1, "at the start, at once")
		after(10*time.Second, 10, "all alive")
		stuck.Store(&[]string{"prober", "receiver of udp on 192.0.2.1:6080"})
		after(10*time.Second, 0, "two stuck")
		stuck.Store(&[]string{"receiver of udp on 192.0.2.1:6080"})
		after(10*time.Second, 0, "one stuck")
		if n := strings.Count(log.String(), "receiver of udp on 192.0.2.1:6080"); n != 1 {
			t.Errorf("the stuck loop is named %d times, want once:\n%s", n, log.String())
		}
		stuck.Store(new([]string))
		after(10*time.Second, 10, "alive again")
		if n := strings.Count(log.String(), "again"); n != 1 {
			t.Errorf("it is told %d times that all are alive again, want once:\n%s", n, log.String())
		}
		stuck.Store(&[]string{"prober"})
		after(10*time.Second, 0, "another one stuck")
		stuck.Store(&[]string{"prober", "session"})
		after(10*time.Second, 0, "one more")
		if n := strings.Count(log.String(), "loops="); n != 3 {
			t.Errorf("%d lines about loops that are stuck, want 3:\n%s", n, log.String())
		}
		cancel()
		<-done
	})
}

// A loop is late when its last sign is too old, and not before it has begun.
func TestPulse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p pulse
		late := func() bool { return len(p.late(time.Now(), 15*time.Second, "it")) > 0 }
		time.Sleep(time.Hour)
		if late() {
			t.Error("a loop that has not begun is late")
		}
		p.beat()
		time.Sleep(15 * time.Second)
		if late() {
			t.Error("late after 15 s, which is just in time")
		}
		time.Sleep(1)
		if !late() {
			t.Error("not late after more than 15 s")
		}
		p.beat()
		if late() {
			t.Error("late right after a sign")
		}
	})
}

// The prober gives its sign of life every second although it has nobody to probe.
func TestIdleProberIsAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProber(slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { _ = p.run(ctx); close(done) }()
		for range 100 {
			time.Sleep(time.Minute)
			synctest.Wait() // for what happens at this very instant
			if got := p.pulse.late(time.Now(), 2*time.Second, "prober"); got != nil {
				t.Fatal("an idle prober is late")
			}
		}
		cancel()
		<-done
	})
}
