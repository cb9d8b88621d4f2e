package bench

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// idling is what idle CPUs do while latency is measured: whatever lets them be woken soonest.
type idling int

const (
	halts idling = iota // what the kernel lets them do
	polls               // they poll
	spins               // threads spin on them
)

// String says it as a part of a result.
func (i idling) String() string {
	return [...]string{
		halts: "CPUs halt when idle: that is when they wake soonest here",
		polls: "CPUs kept awake: idle ones poll",
		spins: "CPUs kept awake by SCHED_IDLE threads while latency is measured",
	}[i]
}

// wakeTrials is how often a wake-up is timed in each state, in turns, and wakeTime how long each time. The lowest median counts.
const (
	wakeTrials = 3
	wakeTime   = 40 * time.Millisecond
)

// findIdling finds out what wakes CPUs soonest. Polling always does. A thread that spins has to be interrupted instead, and give way, which takes
// longer than a wake-up from some virtual machines' halt: 67 µs instead of 16 for half a round trip of kernel VXLAN on one of them.
func findIdling(ctx context.Context, helper []string) (idling, error) {
	if stop, err := polling(); err == nil {
		stop()
		return polls, nil
	}
	halted, spinning := math.Inf(1), math.Inf(1) // seconds
	for range wakeTrials {
		w, err := wakeUp(wakeTime)
		if err != nil {
			return halts, err
		}
		halted = min(halted, w)
		stop, err := spinningThreads(ctx, helper)
		if err != nil {
			return halts, err
		}
		w, err = wakeUp(wakeTime)
		stop()
		if err != nil {
			return halts, err
		}
		spinning = min(spinning, w)
	}
	return sooner(halted, spinning), nil
}

// sooner picks the state with the shorter wake-up. If they are equal, CPUs stay awake: a halt varies more.
func sooner(halted, spinning float64) idling {
	if halted < spinning {
		return halts
	}
	return spins
}

// wakeUp returns the median time of a wake-up, in seconds: two threads, each on its own CPU if there are two, pass a byte to and fro for d.
func wakeUp(d time.Duration) (float64, error) {
	all, err := allCPUs()
	if err != nil {
		return 0, err
	}
	sides := all.split()
	var there, back [2]int
	if err := unix.Pipe2(there[:], unix.O_CLOEXEC); err != nil {
		return 0, err
	}
	if err := unix.Pipe2(back[:], unix.O_CLOEXEC); err != nil {
		return 0, errors.Join(err, unix.Close(there[0]), unix.Close(there[1]))
	}
	far := make(chan error, 1)
	go func() {
		err := onCPUs(&sides.To, func() error { return echo(there[0], back[1]) })
		far <- errors.Join(err, unix.Close(back[1])) // which ends the wait for an echo
	}()
	var trips []float64
	near := make(chan error, 1)
	go func() {
		near <- onCPUs(&sides.From, func() (err error) { trips, err = roundTrips(there[1], back[0], d); return err })
	}()
	err = <-near
	unix.Close(there[1]) // ends the echo
	err = errors.Join(err, <-far, unix.Close(there[0]), unix.Close(back[0]))
	if err != nil {
		return 0, fmt.Errorf("time a wake-up: %w", err)
	}
	slices.Sort(trips)
	return trips[len(trips)/2] / 2, nil
}

// onCPUs runs f on a thread of those CPUs, with the priority of what it stands for; the thread ends with it.
func onCPUs(cpus *unix.CPUSet, f func() error) error {
	runtime.LockOSThread()
	if err := placeThread(unix.Gettid(), cpus, niceFirst); err != nil {
		return err
	}
	return f()
}

func echo(in, out int) error {
	var b [1]byte
	for {
		if n, err := unix.Read(in, b[:]); n == 0 || err != nil {
			return err
		}
		if _, err := unix.Write(out, b[:]); err != nil {
			return err
		}
	}
}

// roundTrips returns the times of at least one round trip, in seconds.
func roundTrips(out, in int, d time.Duration) (trips []float64, err error) {
	var b [1]byte
	for began := time.Now(); len(trips) == 0 || time.Since(began) < d; {
		sent := time.Now()
		if _, err := unix.Write(out, b[:]); err != nil {
			return nil, err
		}
		if n, err := unix.Read(in, b[:]); n == 0 || err != nil {
			return nil, errors.Join(errors.New("no echo"), err)
		}
		trips = append(trips, time.Since(sent).Seconds())
	}
	return trips, nil
}
