package trace

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// work runs batches of one worker until stop. In each, the stages have a known order and size: Send is n system calls, and
// Lookup is nothing.
func work(t *Tracer, stop <-chan struct{}, batch func(s *Span)) (batches int) {
	var s Span
	for {
		select {
		case <-stop:
			return batches
		default:
		}
		s.Begin(t)
		batch(&s)
		s.End()
		batches++
		runtime.Gosched()
	}
}

// traced runs batches while a trace is at work, and returns what it found. A trace in which the worker had hardly any CPU, so that it did not do the
// least number of batches, is repeated: the mean of a few is that of what disturbed them.
func traced(t *testing.T, every uint32, least uint64, batch func(s *Span)) (got Totals, batches int) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); got.Batches < least && time.Now().Before(deadline); {
		var tr Tracer
		stop := make(chan struct{})
		var w sync.WaitGroup
		w.Go(func() { batches = work(&tr, stop, batch) })
		var err error
		got, err = tr.Run(t.Context(), every, 50*time.Millisecond)
		close(stop)
		w.Wait()
		if err != nil {
			t.Fatal(err)
		}
	}
	return got, batches
}

// Each stage gets its own time and no other's, and packets are counted by direction.
func TestStages(t *testing.T) {
	got, _ := traced(t, 1, 100, func(s *Span) {
		s.To(Read)
		if s.on {
			work := threadCPU()
			for threadCPU()-work < 20_000 { // by the clock that counts: what other threads take of the CPU meanwhile is no work of this one
			}
		}
		s.To(Lookup)
		s.To(Encapsulate)
		spin(40 * time.Microsecond)
		was := s.To(Send)
		for range 10 {
			_, _ = unix.Getpriority(unix.PRIO_PROCESS, 0)
		}
		if s.on && was != Encapsulate {
			t.Errorf("the stage before was %v", was)
		}
		s.To(was)
		s.Sent(3)
	})
	if got.Batches == 0 || got.Sent != 3*got.Batches || got.Received != 0 || got.Times[Receive] != 0 || got.Times[None] != 0 {
		t.Fatalf("%+v", got)
	}
	batch := func(s Stage) time.Duration { return got.Times[s] / time.Duration(got.Batches) }
	// The work is done in full, whatever the machine does; what it has more is the machine's, but not that of other stages.
	if batch(Read) < 19*time.Microsecond || batch(Lookup) > batch(Read)/2 || batch(Send) <= 0 {
		t.Errorf("read %v, lookup %v, send %v", batch(Read), batch(Lookup), batch(Send))
	}
	if got.Interrupted == 0 && batch(Encapsulate) < 39*time.Microsecond {
		t.Errorf("encapsulate %v", batch(Encapsulate))
	}
	if p := got.PerPacket(Read); p != float64(got.Times[Read])/float64(got.Sent) || got.PerPacket(Write) != 0 {
		t.Errorf("a packet's read takes %v ns", p)
	}
}

// spin uses the CPU for so long.
func spin(d time.Duration) {
	for begin := time.Now(); time.Since(begin) < d; {
	}
}

// A thread that waits uses no time of the CPU, and long waits between system calls are left out.
func TestWaitsDoNotCount(t *testing.T) {
	pause := func() {
		ts := unix.NsecToTimespec(int64(time.Millisecond))
		_ = unix.Nanosleep(&ts, nil)
	}
	got, _ := traced(t, 1, 10, func(s *Span) {
		s.To(Receive)
		pause()
		s.To(Decapsulate)
		pause()
		s.Received(1)
	})
	if got.Received == 0 || got.PerPacket(Receive) > 500_000 || got.Times[Decapsulate] != 0 || got.Interrupted != got.Batches {
		t.Errorf("%+v", got)
	}
}

// Of n batches one is traced, and after the trace none.
func TestSample(t *testing.T) {
	const every = 7
	got, batches := traced(t, every, 1, func(s *Span) { s.To(Read); s.Sent(1) })
	if got.Sent == 0 || int(got.Sent) > batches/every {
		t.Errorf("%d of %d batches", got.Sent, batches)
	}
	var tr Tracer
	var s Span
	s.Begin(&tr)
	if s.on || s.To(Read) != None || s.on {
		t.Error("a batch is traced though nobody traces")
	}
}

func TestBusy(t *testing.T) {
	var tr Tracer
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { _, err := tr.Run(ctx, 1, time.Hour); ended <- err }()
	for tr.every.Load() == 0 {
		runtime.Gosched()
	}
	if _, err := tr.Run(t.Context(), 1, time.Millisecond); !errors.Is(err, ErrBusy) {
		t.Errorf("got %v", err)
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if _, err := tr.Run(t.Context(), 1, time.Millisecond); err != nil || tr.every.Load() != 0 {
		t.Errorf("after it: %v", err)
	}
}
