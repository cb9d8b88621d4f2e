package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"golang.org/x/sys/unix"
)

// Latency is half of the round-trip time of UDP datagrams, in microseconds. Each datagram is sent after the previous one
// was answered.
type Latency struct {
	Payload int     `json:"payload"` // bytes of UDP payload
	Pinned  bool    `json:"pinned"`  // each side had its own CPUs
	Answers int64   `json:"answers"`
	Lost    int64   `json:"lost"` // not answered within 50 ms
	Min     float64 `json:"min_us"`
	Mean    float64 `json:"mean_us"`
	P50     float64 `json:"p50_us"`
	P99     float64 `json:"p99_us"`
	P999    float64 `json:"p99_9_us"`
	Max     float64 `json:"max_us"`
}

// Round trips between these bounds are recorded with three significant digits.
const (
	shortestTrip = 100 * time.Nanosecond
	longestTrip  = 10 * time.Second
)

// RoundTrips measures the latency of 64-byte datagrams between the ends for the time d, with each end on its own CPUs.
// pids are the tunnel's processes, first From's, then To's; each shares the CPUs of its side. Call it within [StartAwake].
func RoundTrips(ctx context.Context, e *Ends, pids []int, d time.Duration) (Latency, error) {
	defer manyProcessors()()
	return placedLatency(ctx, e, pids, 64, d/3, d, true)
}

// manyProcessors raises GOMAXPROCS until undo is called, so that threads that return from system calls need not wait for a
// processor of Go's scheduler.
func manyProcessors() (undo func()) {
	was := runtime.GOMAXPROCS(max(16, 4*runtime.NumCPU()))
	return func() { runtime.GOMAXPROCS(was) }
}

// placedLatency calls measureLatency while this program and the tunnel's processes have priority over others and, if
// pinned, each side has its own CPUs.
func placedLatency(ctx context.Context, e *Ends, pids []int, payload int, warm, d time.Duration, pinned bool) (l Latency, err error) {
	all, err := allCPUs()
	if err != nil {
		return Latency{}, err
	}
	cpus := all
	if pinned {
		cpus = all.split()
	}
	self := os.Getpid()
	before, _, err := autogroup(self)
	if err != nil {
		return Latency{}, err
	}
	defer func() {
		err = errors.Join(err, placeTunnel(pids, all, niceNormal), setAutogroup(self, before))
	}()
	if err := errors.Join(placeTunnel(pids, cpus, niceFirst), setAutogroup(self, niceFirst)); err != nil {
		return Latency{}, err
	}
	return measureLatency(ctx, e, payload, warm, d, cpus)
}

// measureLatency runs a ping-pong for warm, and then counts the round trips of the time d. Both ends are blocking sockets
// on their own threads, each on its side's CPUs.
func measureLatency(ctx context.Context, e *Ends, payload int, warm, d time.Duration, cpus Sides) (Latency, error) {
	from, to, err := e.udpPair()
	if err != nil {
		return Latency{}, err
	}
	defer unix.Close(from)
	var stop atomic.Bool
	var served sync.WaitGroup
	served.Go(func() {
		defer unix.Close(to)
		runtime.LockOSThread() // never unlocked: the thread ends with its goroutine
		if err := placeThread(0, &cpus.To, niceFirst); err == nil {
			echo(to, &stop)
		}
	})
	defer served.Wait()
	defer stop.Store(true)

	type outcome struct {
		h    *hdrhistogram.Histogram
		lost int64
		err  error
	}
	done := make(chan outcome, 1)
	go func() { // on its own thread, which ends with the goroutine
		runtime.LockOSThread()
		var o outcome
		o.h = hdrhistogram.New(int64(shortestTrip), int64(longestTrip), 3)
		if o.err = placeThread(0, &cpus.From, niceFirst); o.err == nil {
			o.lost, o.err = pingPong(ctx, from, payload, warm, d, o.h)
		}
		done <- o
	}()
	o := <-done
	if o.err != nil {
		return Latency{}, o.err
	}
	if o.h.TotalCount() == 0 {
		return Latency{}, fmt.Errorf("no datagram of %d bytes from %s was answered by %s", payload, e.From, e.To)
	}
	half := func(ns float64) float64 { return ns / 2 / 1e3 }
	at := func(percent float64) float64 { return half(float64(o.h.ValueAtQuantile(percent))) }
	return Latency{
		Payload: payload, Pinned: cpus.From != cpus.To, Answers: o.h.TotalCount(), Lost: o.lost, Min: half(float64(o.h.Min())), Mean: half(o.h.Mean()),
		P50: at(50), P99: at(99), P999: at(99.9), Max: half(float64(o.h.Max())),
	}, nil
}

// echo returns every datagram to its sender, until stop.
func echo(fd int, stop *atomic.Bool) {
	buf := make([]byte, 1<<16)
	for !stop.Load() {
		n, err := unix.Read(fd, buf)
		if err == nil {
			_, err = unix.Write(fd, buf[:n]) // the other end counts lost answers
		}
		if err != nil && !passing(err) {
			return
		}
	}
}

// pingPong records the round trips over a connected socket.
func pingPong(ctx context.Context, fd, payload int, warm, d time.Duration, h *hdrhistogram.Histogram) (lost int64, err error) {
	out, in := make([]byte, max(payload, 8)), make([]byte, 1<<16)
	begin := time.Now()
	for seq := uint64(1); ; seq++ {
		if seq%256 == 0 && ctx.Err() != nil {
			return lost, ctx.Err()
		}
		binary.BigEndian.PutUint64(out, seq)
		start := time.Now()
		if _, err := unix.Write(fd, out); err != nil && !passing(err) {
			return lost, fmt.Errorf("send: %w", err)
		}
		answered, err := awaitAnswer(fd, in, seq)
		if err != nil {
			return lost, err
		}
		end := time.Now()
		if start.Sub(begin) >= warm {
			if answered {
				_ = h.RecordValue(int64(min(end.Sub(start), longestTrip)))
			} else {
				lost++
			}
		}
		if end.Sub(begin) >= warm+d {
			return lost, nil
		}
	}
}

// awaitAnswer reads until the answer with that number arrives or the read times out. It skips late answers to earlier datagrams.
func awaitAnswer(fd int, in []byte, seq uint64) (bool, error) {
	for {
		n, err := unix.Read(fd, in)
		switch {
		case err == unix.EINTR:
		case err != nil && passing(err):
			return false, nil
		case err != nil:
			return false, fmt.Errorf("receive: %w", err)
		case n >= 8 && binary.BigEndian.Uint64(in) == seq:
			return true, nil
		}
	}
}
