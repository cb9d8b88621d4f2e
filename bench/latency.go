package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/bench/traffic"
)

// RoundTrips measures the latency of 64-byte datagrams between the ends for the time d, with each end on its own CPUs.
// pids are the tunnel's processes, first From's, then To's; each shares the CPUs of its side. Call it within [StartAwake].
func RoundTrips(ctx context.Context, e *Ends, pids []int, d time.Duration) (*result.Latency, error) {
	defer manyProcessors()()
	return placed(pids, true, func(cpus Sides) (*result.Latency, error) {
		return overUDP(e, cpus, func(fd int) (*result.Latency, error) { return traffic.PingPong(ctx, fd, 64, d/3, d, 0) })
	})
}

// manyProcessors raises GOMAXPROCS until undo is called, so that threads that return from system calls need not wait for a
// processor of Go's scheduler.
func manyProcessors() (undo func()) {
	was := runtime.GOMAXPROCS(max(16, 4*runtime.NumCPU()))
	return func() { runtime.GOMAXPROCS(was) }
}

// placed calls measure while this program and the tunnel's processes have priority over others and, if pinned, each side
// has its own CPUs.
func placed(pids []int, pinned bool, measure func(cpus Sides) (*result.Latency, error)) (l *result.Latency, err error) {
	all, err := allCPUs()
	if err != nil {
		return nil, err
	}
	cpus := all
	if pinned {
		cpus = all.split()
	}
	self := os.Getpid()
	before, _, err := autogroup(self)
	if err != nil {
		return nil, err
	}
	defer func() {
		err = errors.Join(err, placeTunnel(pids, all, niceNormal), setAutogroup(self, before))
	}()
	if err := errors.Join(placeTunnel(pids, cpus, niceFirst), setAutogroup(self, niceFirst)); err != nil {
		return nil, err
	}
	l, err = measure(cpus)
	if err == nil {
		l.Pinned = cpus.From != cpus.To
	}
	return l, err
}

// onThread runs fn on a thread of its own, on a side's CPUs and with priority.
func onThread(cpus *unix.CPUSet, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its goroutine
		err := placeThread(0, cpus, niceFirst)
		if err == nil {
			err = fn()
		}
		done <- err
	}()
	return <-done
}

// overUDP measures with a socket of From that is connected to an echo in To. Both ends are blocking sockets on their own
// threads, each on its side's CPUs.
func overUDP(e *Ends, cpus Sides, measure func(fd int) (*result.Latency, error)) (l *result.Latency, err error) {
	from, to, err := e.udpPair()
	if err != nil {
		return nil, err
	}
	defer unix.Close(from)
	var stop atomic.Bool
	var served sync.WaitGroup
	served.Go(func() {
		defer unix.Close(to)
		_ = onThread(&cpus.To, func() error { traffic.Echo(to, new(atomic.Int64), &stop); return nil }) // without echo nothing is answered
	})
	defer served.Wait()
	defer stop.Store(true)
	err = onThread(&cpus.From, func() error {
		l, err = measure(from)
		return err
	})
	if err != nil {
		return nil, err
	}
	if l.Answers == 0 {
		return nil, fmt.Errorf("no datagram of %d bytes from %s was answered by %s", l.Payload, e.From, e.To)
	}
	return l, nil
}

// overTCP measures transactions over TCP. CRR uses a connection for each transaction, the others one for all.
func overTCP(ctx context.Context, e *Ends, kind string, cpus Sides, warm, d time.Duration) (l *result.Latency, err error) {
	ln, at, err := e.listen()
	if err != nil {
		return nil, err
	}
	var stop atomic.Bool
	var served sync.WaitGroup
	served.Go(func() {
		defer unix.Close(ln)
		_ = onThread(&cpus.To, func() error { respondAll(ln, &stop); return nil })
	})
	defer served.Wait()
	defer stop.Store(true)
	request, buf := make([]byte, traffic.Request), make([]byte, traffic.Request)
	one := func() error {
		fd, err := e.dialHere(at)
		if err != nil {
			return err
		}
		return errors.Join(traffic.Exchange(ctx, fd, request, buf), traffic.Reset(fd), unix.Close(fd))
	}
	err = onThread(&cpus.From, func() error {
		return e.Do(e.From, func() error { // on a thread in the namespace, so that connecting needs no other
			if err := placeThread(0, &cpus.From, niceFirst); err != nil {
				return err
			}
			if kind != result.CRR {
				fd, err := e.dialHere(at)
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				one = func() error { return traffic.Exchange(ctx, fd, request, buf) }
				if kind == result.Nagle {
					if one, err = traffic.InParts(ctx, fd); err != nil {
						return err
					}
				}
			}
			l, err = traffic.Transactions(ctx, kind, warm, d, 0, one)
			return err
		})
	})
	return l, err
}

// respondAll answers the requests of one connection after another, until stop.
func respondAll(ln int, stop *atomic.Bool) {
	for !stop.Load() {
		fd, err := accept(ln)
		if err == nil {
			traffic.Respond(fd, new(atomic.Int64), stop)
			unix.Close(fd)
		} else if !traffic.Passing(err) {
			return
		}
	}
}
