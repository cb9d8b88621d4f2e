package traffic

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/bench/result"
)

// An answer may take longer than the pause after the last datagram on a short path: how long is known from the path's round trip.
func TestPacedFarAway(t *testing.T) {
	at := netip.MustParseAddrPort("127.0.0.1:0")
	var fds [2]int
	for i := range fds {
		fd, _, err := Socket(at, unix.SOCK_DGRAM)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		fds[i] = fd
	}
	for i, fd := range fds {
		peer, err := unix.Getsockname(fds[1-i])
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Connect(fd, peer); err != nil {
			t.Fatal(err)
		}
	}
	const far = 2 * stragglers
	var stop atomic.Bool
	answered := make(chan struct{})
	go func() { // an echo at the end of a long line
		defer close(answered)
		type letter struct {
			due  time.Time
			data []byte
		}
		var line []letter
		buf := make([]byte, 2048)
		for !stop.Load() {
			if n, err := unix.Read(fds[1], buf); err == nil {
				line = append(line, letter{time.Now().Add(far), bytes.Clone(buf[:n])})
			}
			for len(line) > 0 && !time.Now().Before(line[0].due) {
				_, _ = unix.Write(fds[1], line[0].data)
				line = line[1:]
			}
		}
	}()
	l, err := Paced(t.Context(), fds[0], 64, 50, 0, 400*time.Millisecond, 20*far)
	if err != nil || l.Lost != 0 || l.Answers != 20 || l.Times.Min() < int64(far)*99/100 {
		t.Errorf("over a line of %v: %d answers, %d lost, %v", far, l.Answers, l.Lost, err)
	}
	stop.Store(true)
	<-answered
}

// A connection that takes longer than the whole measure, as one whose first packet was lost, does not leave it without a figure.
func TestTransactionsWaitForOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		took := []time.Duration{time.Second, 3 * time.Millisecond, 3 * time.Millisecond}
		n := 0
		l, err := Transactions(t.Context(), result.CRR, 30*time.Millisecond, 100*time.Millisecond, 0, func() error {
			time.Sleep(took[n])
			n++
			return nil
		})
		if err != nil || l.Answers != 1 || n != 2 || l.Times.TotalCount() != 1 || l.Seconds != (took[0]+took[1]-30*time.Millisecond).Seconds() {
			t.Errorf("%d transactions, of which %d counted in %v s: %v", n, l.Answers, l.Seconds, err)
		}
		broken := errors.New("broken")
		if _, err := Transactions(t.Context(), result.CRR, 0, time.Second, 0, func() error { return broken }); !errors.Is(err, broken) {
			t.Errorf("got %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := Transactions(ctx, result.CRR, time.Second, time.Second, 0, func() error { return nil }); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
}
