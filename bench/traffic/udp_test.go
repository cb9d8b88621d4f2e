package traffic

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// What arrived is counted in full, whatever it is: a server holds it against its limit.
func TestSinkBytes(t *testing.T) {
	at := netip.MustParseAddrPort("127.0.0.1:0")
	fd, _, err := Socket(at, unix.SOCK_DGRAM)
	if err != nil {
		t.Fatal(err)
	}
	to, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := PacketConn(fd)
	if err != nil {
		t.Fatal(err)
	}
	var s Sink
	ended := make(chan error, 1)
	go func() { ended <- s.Run(conn) }()
	from, _, err := Socket(at, unix.SOCK_DGRAM)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(from)
	for _, size := range []int{1, 100, 9000} {
		if err := unix.Sendto(from, bytes.Repeat([]byte{0xff}, size), 0, to); err != nil { // no number of a UDPSource
			t.Fatal(err)
		}
	}
	for deadline := time.Now().Add(time.Minute); s.Bytes() < 9101 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	conn.Close()
	if err := <-ended; err != nil || s.Bytes() != 9101 {
		t.Errorf("%d bytes were counted (%v)", s.Bytes(), err)
	}
}

func TestAwait(t *testing.T) {
	const d = 100 * time.Millisecond
	broken := errors.New("broken")
	for name, tc := range map[string]struct {
		comes, want time.Duration
		err         error // of the look
	}{
		"something is there":    {0, d, nil},
		"something comes late":  {d + 50*time.Millisecond, d + 50*time.Millisecond, nil},
		"nothing comes":         {time.Hour, d + patience, nil},
		"nobody can tell":       {time.Hour, d, broken},
		"something came before": {d / 2, d, nil},
	} {
		synctest.Test(t, func(t *testing.T) {
			begin := time.Now()
			err := Await(t.Context(), d, func() (bool, error) { return time.Since(begin) >= tc.comes, tc.err })
			if passed := time.Since(begin); err != tc.err || passed != tc.want {
				t.Errorf("%s: waited %v, want %v (%v)", name, passed, tc.want, err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if err := Await(ctx, d, func() (bool, error) { return true, nil }); !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestSettle(t *testing.T) {
	for name, tc := range map[string]struct {
		arrivals []uint64 // after each pause of 10 ms; the last stays
		want     time.Duration
	}{
		"all are there":       {[]uint64{100}, 0},
		"the rest is lost":    {[]uint64{90}, 10 * time.Millisecond},
		"some come late":      {[]uint64{50, 70, 90}, 30 * time.Millisecond},
		"all come late":       {[]uint64{0, 0, 0, 0, 0, 0, 0, 0, 100}, 80 * time.Millisecond},
		"none come":           {[]uint64{0}, time.Second},
		"the last come in it": {[]uint64{0, 60, 100}, 20 * time.Millisecond},
	} {
		synctest.Test(t, func(t *testing.T) {
			begin, calls := time.Now(), 0
			err := Settle(t.Context(), 100, 10*time.Millisecond, func() (uint64, error) {
				n := tc.arrivals[min(calls, len(tc.arrivals)-1)]
				calls++
				return n, nil
			})
			if passed := time.Since(begin); err != nil || passed != tc.want {
				t.Errorf("%s: settled after %v, want %v (%v)", name, passed, tc.want, err)
			}
			broken := errors.New("broken")
			if err := Settle(t.Context(), 1, time.Second, func() (uint64, error) { return 0, broken }); !errors.Is(err, broken) {
				t.Errorf("got %v", err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if err := Settle(ctx, 1, time.Second, func() (uint64, error) { return 0, nil }); !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
		})
	}
}
