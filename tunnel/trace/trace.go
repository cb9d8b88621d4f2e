// Package trace measures where the time of packets goes inside the engine, stage by stage, on a sample of its batches.
//
// While nobody traces, a worker loads one variable per batch and looks at one bool of its own per stage. While somebody
// does, each worker times every n-th batch: a [Span] follows it from stage to stage.
//
// Two clocks: stages that are system calls count the CPU time of the worker's thread, so that what other threads do with
// the CPU meanwhile (the kernel likes to run the one that was just woken) is not taken for theirs. Softirqs that the kernel
// runs inside the call are in it, unless the kernel accounts for interrupts (CONFIG_IRQ_TIME_ACCOUNTING). Stages in between
// take nanoseconds, which only the monotonic clock tells apart. What reading a clock takes is measured and subtracted.
// Waiting for packets is no stage.
//
// Any goroutine may call the methods of a [Tracer]; a Span belongs to one goroutine.
package trace

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Stage is a step of a packet's way through the engine.
type Stage uint8

// The stages. None is before and after a batch.
const (
	None        Stage = iota
	Read              // read packets and super-packets from the TUN (system call)
	Lookup            // parse the headers, find the peer
	Encapsulate       // complete checksums, split super-packets, put headers in front, gather trains
	Send              // hand messages to the underlay's socket (system call)
	Receive           // take messages from the underlay's socket (system call)
	Decapsulate       // take the outer headers off, check, join packets of a flow
	Write             // write packets and super-packets to the TUN (system call)
)

// NumStages is the number of values of Stage.
const NumStages = 8

var names = [NumStages]string{"none", "read", "lookup", "encapsulate", "send", "receive", "decapsulate", "write"}

// String is the stage's name.
func (s Stage) String() string { return names[s] }

// system reports whether the stage is a system call.
func (s Stage) system() bool { return s == Read || s == Send || s == Receive || s == Write }

// sending reports whether the stage is one of packets that are sent.
func (s Stage) sending() bool { return s <= Send }

// Stages lists the stages in the order of a packet's way from one node to another.
func Stages() []Stage { return []Stage{Read, Lookup, Encapsulate, Send, Receive, Decapsulate, Write} }

// ErrBusy means that somebody traces already.
var ErrBusy = errors.New("a trace is running already")

// Totals are what a trace has found. Packets are counted as the underlay carries them: a super-packet is as many as its segments.
type Totals struct {
	Sent, Received uint64 // packets in the traced batches, by direction
	Batches        uint64 // that were traced
	Interrupted    uint64 // times of stages that were left out, because the thread had lost its CPU
	Times          [NumStages]time.Duration
}

// PerPacket is the time of a stage for each packet of its direction, in nanoseconds; 0 if there were none.
func (t *Totals) PerPacket(s Stage) float64 {
	n := t.Received
	if s.sending() {
		n = t.Sent
	}
	if n == 0 {
		return 0
	}
	return float64(t.Times[s]) / float64(n)
}

// Tracer collects the spans of all workers of an engine. The zero value is off.
type Tracer struct {
	every atomic.Uint32 // of so many batches of a worker one is traced; 0: off

	mu       sync.Mutex // guards what follows
	busy     bool
	overhead [2]int64 // of a reading of the monotonic and of the CPU clock, in nanoseconds
	totals   Totals
}

// Run traces one of every so many batches for d, or until ctx ends. It fails with ErrBusy if another Run is at work.
func (t *Tracer) Run(ctx context.Context, every uint32, d time.Duration) (Totals, error) {
	overhead := calibrate()
	t.mu.Lock()
	if t.busy {
		t.mu.Unlock()
		return Totals{}, ErrBusy
	}
	t.busy, t.totals, t.overhead = true, Totals{}, overhead
	t.mu.Unlock()
	t.every.Store(max(every, 1))
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
	t.every.Store(0)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.busy = false
	for i, d := range t.totals.Times {
		t.totals.Times[i] = max(d, 0) // a stage without work may come out a little below
	}
	return t.totals, ctx.Err()
}

var begun = time.Now()

// clocks are the monotonic clock and the CPU time of the calling thread.
func monotonic() int64 { return int64(time.Since(begun)) }

func threadCPU() int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts) // every Linux has it
	return ts.Nano()
}

// calibrate measures how much of an interval of each clock is the reading itself.
func calibrate() (overhead [2]int64) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for i, clock := range []func() int64{monotonic, threadCPU} {
		var took [201]int64
		for k := range took {
			start := clock()
			took[k] = clock() - start
		}
		slices.Sort(took[:])
		overhead[i] = took[len(took)/2]
	}
	return overhead
}

// longest is the most that a stage that is no system call takes at a time; if it took longer, its thread had lost its CPU.
const longest = 100_000 // ns

// Span follows one worker from stage to stage. The zero value is ready.
type Span struct {
	on      bool   // a traced batch is under way
	skipped uint32 // batches since the last that was traced
	*batch         // of the traced one; kept apart, so that a Span is small
}

// batch is what a Span knows of a traced batch.
type batch struct {
	tracer *Tracer
	stage  Stage
	since  int64    // when the stage began, by its clock
	cost   [2]int64 // of reading the clocks
	found  Totals
}

// On reports whether somebody traces.
func (t *Tracer) On() bool { return t.every.Load() != 0 }

// Begin is called at the beginning of each batch.
func (s *Span) Begin(t *Tracer) {
	if every := t.every.Load(); every != 0 {
		s.begin(t, every)
	}
}

func (s *Span) begin(t *Tracer, every uint32) {
	if s.on {
		return
	}
	if s.skipped++; s.skipped < every {
		return
	}
	runtime.LockOSThread() // so that the CPU time is of one thread
	if s.batch == nil {
		s.batch = new(batch)
	}
	t.mu.Lock()
	s.cost = t.overhead
	t.mu.Unlock()
	s.on, s.skipped, s.tracer, s.found, s.stage = true, 0, t, Totals{Batches: 1}, None
}

// On reports whether the present batch is traced.
func (s *Span) On() bool { return s.on }

// To ends the present stage and begins the next. It returns the one that has ended, to go back to.
func (s *Span) To(next Stage) Stage {
	if !s.on {
		return None
	}
	return s.to(next)
}

func (s *Span) to(next Stage) Stage {
	was := s.stage
	switch {
	case was == None:
	case was.system():
		s.found.Times[was] += time.Duration(threadCPU() - s.since - s.cost[1])
	default:
		if took := monotonic() - s.since - s.cost[0]; took > longest {
			s.found.Interrupted++
		} else {
			s.found.Times[was] += time.Duration(took)
		}
	}
	s.stage = next
	if next.system() {
		s.since = threadCPU()
	} else if next != None {
		s.since = monotonic()
	}
	return was
}

// Sent counts packets of the batch, as the underlay carries them.
func (s *Span) Sent(n int) {
	if s.on {
		s.found.Sent += uint64(n)
	}
}

// Received counts packets of the batch.
func (s *Span) Received(n int) {
	if s.on {
		s.found.Received += uint64(n)
	}
}

// End is called at the end of each batch.
func (s *Span) End() {
	if s.on {
		s.end()
	}
}

func (s *Span) end() {
	s.to(None)
	s.on = false
	runtime.UnlockOSThread()
	t := s.tracer
	t.mu.Lock()
	defer t.mu.Unlock()
	if s.found.Sent+s.found.Received == 0 { // the last look into an empty queue belongs to the packets before it
		s.found.Batches = 0
	}
	sum := &t.totals
	sum.Sent += s.found.Sent
	sum.Received += s.found.Received
	sum.Batches += s.found.Batches
	sum.Interrupted += s.found.Interrupted
	for i, d := range s.found.Times {
		sum.Times[i] += d
	}
}
