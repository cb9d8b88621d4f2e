package traffic

import (
	"context"
	"encoding/binary"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/internal/sys"
)

// Echo returns every datagram to its sender, until stop, and counts their bytes of payload in got. fd is a connected
// socket.
func Echo(fd int, got *atomic.Int64, stop *atomic.Bool) {
	buf := make([]byte, 1<<16)
	for !stop.Load() {
		n, err := unix.Read(fd, buf)
		if err == nil {
			got.Add(int64(n))
			_, err = unix.Write(fd, buf[:n]) // the other end counts lost answers
		}
		if err != nil && !Passing(err) && err != unix.EMSGSIZE {
			return
		}
	}
}

// Least is the least payload of a datagram, in bytes: it holds a number.
const Least = 8

// PingPong sends datagrams of payload bytes to an [Echo], each when the previous one was answered or is given up
// (ReadTimeout) and every has passed, and records the round trips that begin between warm and warm+d.
func PingPong(ctx context.Context, fd, payload int, warm, d, every time.Duration) (*result.Latency, error) {
	l := &result.Latency{Kind: result.PingPong, Payload: payload, Times: result.NewHistogram(), Waking: result.NewHistogram(), Seconds: d.Seconds()}
	_, _ = sys.ArrivedAt(fd) // from now on the kernel notes when datagrams arrive
	out, in := make([]byte, max(payload, Least)), make([]byte, 1<<16)
	begin := time.Now()
	for seq := uint64(1); ; seq++ {
		if (seq%256 == 0 || every > 0) && ctx.Err() != nil {
			return nil, ctx.Err()
		}
		binary.BigEndian.PutUint64(out, seq)
		start := time.Now()
		if _, err := unix.Write(fd, out); err != nil && !Passing(err) {
			return nil, fmt.Errorf("send: %w", err)
		}
		answered, err := awaitAnswer(ctx, fd, in, seq)
		if err != nil {
			return nil, err
		}
		end := time.Now()
		if start.Sub(begin) >= warm {
			if answered {
				l.Times.Record(end.Sub(start))
				l.Answers++
				if at, err := sys.ArrivedAt(fd); err == nil && end.After(at) {
					l.Waking.Record(time.Duration(end.UnixNano() - at.UnixNano()))
				}
			} else {
				l.Lost++
			}
		}
		// Where the machine stood still for the whole time, the measure waits for its first answer.
		if took := end.Sub(begin); took >= warm+d && (l.Answers > 0 || took >= warm+d+patience) {
			return l, nil
		}
		rest(start, every)
	}
}

// LoadedPayload is the payload of the datagrams of [Loaded], in bytes, and loadedEvery the least time from one to the next.
const (
	LoadedPayload = 64
	loadedEvery   = 5 * time.Millisecond
)

// Loaded is [PingPong] beside TCP streams, which the caller runs: how long packets wait in the queues that TCP fills. It is no load itself, with one
// datagram each 5 ms, or each every if that is longer. An answer may take a second.
func Loaded(ctx context.Context, fd int, warm, d, every time.Duration) (*result.Latency, error) {
	wait := unix.NsecToTimeval(int64(time.Second))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		return nil, fmt.Errorf("SO_RCVTIMEO: %w", err)
	}
	l, err := PingPong(ctx, fd, LoadedPayload, warm, d, max(every, loadedEvery))
	if err == nil {
		l.Kind, l.Waking = result.Loaded, nil
	}
	return l, err
}

// rest sleeps on its thread until every has passed since start. Sleep would hand the thread over to others.
func rest(start time.Time, every time.Duration) {
	if every <= 0 {
		return
	}
	for wait := every - time.Since(start); wait > 0; wait = every - time.Since(start) {
		ts := unix.NsecToTimespec(int64(wait))
		_ = unix.Nanosleep(&ts, nil) // a signal ends it early
	}
}

// awaitAnswer reads until the answer with that number arrives or the read times out. It skips late answers to earlier datagrams.
func awaitAnswer(ctx context.Context, fd int, in []byte, seq uint64) (bool, error) {
	for {
		n, err := unix.Read(fd, in)
		switch {
		case err == unix.EINTR:
			if ctx.Err() != nil {
				return false, ctx.Err()
			}
		case err != nil && Passing(err):
			return false, nil
		case err != nil:
			return false, fmt.Errorf("receive: %w", err)
		case n >= Least && binary.BigEndian.Uint64(in) == seq:
			return true, nil
		}
	}
}

const (
	// early is how long before a datagram is due its sender stops to sleep and spins on the clock: a timer alone is late
	// by as much as a wake-up takes.
	early = 150 * time.Microsecond
	// stragglers is the least time that answers may take after the last datagram was sent.
	stragglers = 300 * time.Millisecond
)

// Paced sends datagrams of payload bytes to an [Echo] at a constant rate, whether or not answers come, and records for
// each the time from when it was due to its answer. A sender that is held up thus measures what it was held up, and a slow
// answer delays no other datagram (there is no coordinated omission). It counts the datagrams that are due between warm and
// warm+d. Answers may take late after the last one was sent.
func Paced(ctx context.Context, fd, payload int, rate float64, warm, d, late time.Duration) (*result.Latency, error) {
	l := &result.Latency{Kind: result.OpenLoop, Payload: payload, Offered: rate, Times: result.NewHistogram(), Seconds: d.Seconds()}
	first, n := int(warm.Seconds()*rate), int((warm+d).Seconds()*rate)
	begin := time.Now().Add(time.Millisecond)
	due := func(seq int) time.Duration { return time.Duration(float64(seq) / rate * 1e9) }
	var stop atomic.Bool
	answers := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its goroutine
		answers <- collect(fd, first, n, begin, due, &stop, l)
	}()
	err := pacedSource(ctx, fd, max(payload, Least), n, begin, due)
	if err == nil {
		for deadline := time.Now().Add(max(late, stragglers)); err == nil && time.Now().Before(deadline); {
			select {
			case err := <-answers: // all came
				return l, err
			default:
				err = Sleep(ctx, 5*time.Millisecond)
			}
		}
	}
	stop.Store(true)
	if aerr := <-answers; err == nil {
		err = aerr
	}
	return l, err
}

// pacedSource sends n numbered datagrams, each when it is due.
func pacedSource(ctx context.Context, fd, payload, n int, begin time.Time, due func(int) time.Duration) error {
	sent := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1000, 0, 0, 0) // sleep to the microsecond, not to fifty
		out := make([]byte, payload)
		for seq := range n {
			at := begin.Add(due(seq))
			if wait := time.Until(at) - early; wait > 0 {
				ts := unix.NsecToTimespec(int64(wait))
				_ = unix.Nanosleep(&ts, nil)
			}
			for time.Now().Before(at) {
			}
			binary.BigEndian.PutUint64(out, uint64(seq))
			if _, err := unix.Write(fd, out); err != nil && !Passing(err) {
				sent <- fmt.Errorf("send: %w", err)
				return
			}
			if ctx.Err() != nil {
				sent <- ctx.Err()
				return
			}
		}
		sent <- nil
	}()
	return <-sent
}

// collect records the answers until stop, or until all have come.
func collect(fd, first, n int, begin time.Time, due func(int) time.Duration, stop *atomic.Bool, l *result.Latency) error {
	seen := make([]bool, n)
	left := n
	defer func() { l.Lost = int64(n-first) - l.Answers }()
	in := make([]byte, 1<<16)
	for left > 0 {
		size, err := unix.Read(fd, in)
		now := time.Now()
		switch {
		case err != nil && Passing(err):
			if stop.Load() {
				return nil
			}
			continue
		case err != nil:
			return fmt.Errorf("receive: %w", err)
		case size < Least:
			continue
		}
		seq := binary.BigEndian.Uint64(in)
		if seq >= uint64(n) || seen[seq] {
			continue
		}
		seen[seq] = true
		left--
		if int(seq) >= first {
			l.Answers++
			l.Times.Record(now.Sub(begin.Add(due(int(seq)))))
		}
	}
	return nil
}
