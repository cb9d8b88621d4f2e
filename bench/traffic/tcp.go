package traffic

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/bench/result"
)

// TCPBuffer is the size of one read or write, in bytes.
const TCPBuffer = 256 << 10

// TCPSource writes until stop, then ends the stream with a reset, so that data in its buffer cannot disturb the next
// measure. It works on its own thread. It returns how many segments were sent again.
func TCPSource(fd int, stop *atomic.Bool) (retransmits uint32, err error) {
	runtime.LockOSThread()
	buf := make([]byte, TCPBuffer)
	for !stop.Load() {
		if _, err = unix.Write(fd, buf); err != nil && err != unix.EINTR {
			if stop.Load() {
				break
			}
			if err == unix.EAGAIN {
				err = fmt.Errorf("for %v nothing more could be sent: %w", patience, err)
			}
			return 0, err
		}
	}
	if info, err := unix.GetsockoptTCPInfo(fd, unix.SOL_TCP, unix.TCP_INFO); err == nil {
		retransmits = info.Total_retrans
	}
	return retransmits, Reset(fd)
}

// Reset makes closing a socket send a reset: what is buffered is discarded and the port is free at once.
func Reset(fd int) error {
	return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
}

// TCPSink counts what it reads until the stream ends, or until stop is set and no more data arrives. It works on its own
// thread. fd has a read timeout.
func TCPSink(fd int, got *atomic.Int64, stop *atomic.Bool) error {
	runtime.LockOSThread()
	buf := make([]byte, TCPBuffer)
	for {
		n, err := unix.Read(fd, buf)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			if stop.Load() {
				return nil
			}
		case err == unix.ECONNRESET && stop.Load():
			return nil
		case err != nil:
			return err
		case n == 0:
			return nil
		default:
			got.Add(int64(n))
		}
	}
}

// Request is the size of a TCP request and of its response, in bytes.
const Request = 64

// patience is how long one transaction may take. TCP repeats what is lost, after 200 ms at first.
const patience = 5 * time.Second

// readFull reads len(b) bytes, over read timeouts.
func readFull(fd int, b []byte, stop func() bool) error {
	deadline := time.Time{}
	for len(b) > 0 {
		n, err := unix.Read(fd, b)
		switch {
		case err == unix.EAGAIN || err == unix.EINTR:
			if deadline.IsZero() {
				deadline = time.Now().Add(patience)
			}
			if stop() || time.Now().After(deadline) {
				return fmt.Errorf("no answer within %v: %w", patience, err)
			}
		case err != nil:
			return err
		case n == 0:
			return io.ErrUnexpectedEOF
		default:
			b = b[n:]
		}
	}
	return nil
}

// writeFull writes b, over signals.
func writeFull(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		if err != nil && err != unix.EINTR {
			return err
		}
		b = b[max(n, 0):]
	}
	return nil
}

// Respond answers requests on a connection until the other end closes it, or stop, and counts their bytes in got.
func Respond(fd int, got *atomic.Int64, stop *atomic.Bool) {
	buf := make([]byte, Request)
	for !stop.Load() {
		switch err := readFull(fd, buf, stop.Load); {
		case errors.Is(err, unix.EAGAIN):
			continue
		case err != nil:
			return
		}
		got.Add(Request)
		if err := writeFull(fd, buf); err != nil {
			return
		}
	}
}

// Transactions calls one again and again, not sooner than every after the last call began, and records how long the calls took that began between warm and warm+d. Call it
// with kind RR and [Exchange] of one connection, or with CRR and a function that also connects and closes.
func Transactions(ctx context.Context, kind string, warm, d, every time.Duration, one func() error) (*result.Latency, error) {
	l := &result.Latency{Kind: kind, Payload: Request, Times: result.NewHistogram()}
	begin := time.Now()
	for {
		start := time.Now()
		if err := one(); err != nil {
			return nil, err
		}
		end := time.Now()
		if start.Sub(begin) >= warm {
			l.Times.Record(end.Sub(start))
			l.Answers++
		}
		if end.Sub(begin) >= warm+d && l.Answers > 0 { // one that took longer than all of it does not count, but the next one does
			l.Seconds = (end.Sub(begin) - warm).Seconds()
			return l, ctx.Err()
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		rest(start, every)
	}
}

// InParts makes a connection hold back what it could send at once (Nagle's algorithm, RFC 896), as one that does not set
// TCP_NODELAY does, and returns an exchange that writes its request in two parts.
func InParts(ctx context.Context, fd int) (one func() error, err error) {
	if err := unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_NODELAY, 0); err != nil {
		return nil, fmt.Errorf("switch Nagle's algorithm on: %w", err)
	}
	half, buf := make([]byte, Request/2), make([]byte, Request)
	return func() error {
		if err := writeFull(fd, half); err != nil {
			return fmt.Errorf("send the first half of a request: %w", err)
		}
		return Exchange(ctx, fd, half, buf)
	}, nil
}

// Exchange sends a request and awaits its response.
func Exchange(ctx context.Context, fd int, request, buf []byte) error {
	if err := writeFull(fd, request); err != nil {
		return fmt.Errorf("send a request: %w", err)
	}
	if err := readFull(fd, buf, func() bool { return ctx.Err() != nil }); err != nil {
		return fmt.Errorf("await a response: %w", err)
	}
	return nil
}
