package bench

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// TCP is the result for TCP streams from one end to the other, counted by the receivers.
type TCP struct {
	Streams     int     `json:"streams"`
	Bytes       int64   `json:"bytes"` // in the counted time
	Seconds     float64 `json:"seconds"`
	Gbps        float64 `json:"gbps"`        // 10^9 bits of payload per second
	Retransmits uint32  `json:"retransmits"` // segments, over the whole lifetime of the streams
	CPU         CPUUse  `json:"cpu"`         // of the whole machine in the counted time
}

// tcpBuffer is the size of one read or write, in bytes.
const tcpBuffer = 256 << 10

// counter is a counter in its own cache line.
type counter struct {
	atomic.Int64
	_ [56]byte
}

// measureTCP runs streams for warm, and then counts the bytes that arrive in the time d. Each end of each stream is a
// blocking socket on its own thread. The CPU time of the processes pids is counted separately.
func measureTCP(ctx context.Context, e *Ends, streams int, warm, d time.Duration, pids []int) (TCP, error) {
	var ends sync.WaitGroup
	var stop atomic.Bool
	got := make([]counter, streams)
	retransmits := make([]uint32, streams)
	errs := make(chan error, 2*streams)
	for i := range streams {
		from, to, err := e.tcpPair()
		if err != nil {
			stop.Store(true)
			ends.Wait()
			return TCP{}, err
		}
		ends.Go(func() {
			defer unix.Close(from)
			if err := tcpSource(from, &stop); err != nil {
				errs <- fmt.Errorf("sender in %s: %w", e.From, err)
			}
			if info, err := unix.GetsockoptTCPInfo(from, unix.SOL_TCP, unix.TCP_INFO); err == nil {
				retransmits[i] = info.Total_retrans
			}
		})
		ends.Go(func() {
			defer unix.Close(to)
			if err := tcpSink(to, &got[i].Int64, &stop); err != nil {
				errs <- fmt.Errorf("receiver in %s: %w", e.To, err)
			}
		})
	}
	total := func() (n int64) {
		for i := range got {
			n += got[i].Load()
		}
		return n
	}
	r := TCP{Streams: streams}
	err := sleep(ctx, warm)
	if err == nil {
		var cpu cpuMeter
		before := total()
		begin := time.Now()
		cpu, err = startCPU(pids)
		err = errors.Join(err, sleep(ctx, d))
		r.Bytes, r.Seconds = total()-before, time.Since(begin).Seconds()
		var cerr error
		r.CPU, cerr = cpu.stop()
		err = errors.Join(err, cerr)
	}
	stop.Store(true)
	ends.Wait()
	close(errs)
	for e := range errs {
		err = errors.Join(err, e)
	}
	if err == nil && r.Bytes == 0 {
		err = fmt.Errorf("no byte from %s arrived in %s within %v", e.From, e.To, warm+d)
	}
	for _, n := range retransmits {
		r.Retransmits += n
	}
	r.Gbps = float64(r.Bytes) * 8 / 1e9 / r.Seconds
	return r, err
}

// tcpPair opens a connection from one end to the other.
func (e *Ends) tcpPair() (from, to int, err error) {
	ln, err := e.socket(e.To, e.ToAddr, unix.SOCK_STREAM)
	if err != nil {
		return -1, -1, err
	}
	defer unix.Close(ln)
	if err := unix.Listen(ln, 1); err != nil {
		return -1, -1, fmt.Errorf("listen in %s: %w", e.To, err)
	}
	at, err := unix.Getsockname(ln)
	if err != nil {
		return -1, -1, err
	}
	if from, err = e.socket(e.From, e.FromAddr, unix.SOCK_STREAM); err != nil {
		return -1, -1, err
	}
	patience := unix.NsecToTimeval(int64(5 * time.Second)) // timeout of connect and write
	if err = unix.SetsockoptTimeval(from, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &patience); err == nil {
		if err = unix.Connect(from, at); err == nil {
			if to, err = acceptRetry(ln); err == nil {
				wait := unix.NsecToTimeval(int64(readTimeout))
				if err = unix.SetsockoptTimeval(to, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err == nil {
					return from, to, nil
				}
				unix.Close(to)
			}
		}
	}
	unix.Close(from)
	return -1, -1, fmt.Errorf("connect %s to %s: %w", e.From, e.To, err)
}

// acceptRetry accepts the connection whose handshake is already done at the other end.
func acceptRetry(ln int) (fd int, err error) {
	for range 100 {
		if fd, _, err = unix.Accept4(ln, unix.SOCK_CLOEXEC); err != unix.EAGAIN && err != unix.EINTR {
			return fd, err
		}
	}
	return -1, err
}

// tcpSource writes until stop, then ends the stream.
func tcpSource(fd int, stop *atomic.Bool) error {
	runtime.LockOSThread() // never unlocked: the thread ends with its goroutine
	buf := make([]byte, tcpBuffer)
	for !stop.Load() {
		if _, err := unix.Write(fd, buf); err != nil && err != unix.EINTR {
			if stop.Load() {
				break
			}
			return err
		}
	}
	// Data in the socket's buffer need not be delivered. A reset discards it, so that it cannot disturb the next measure.
	return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
}

// tcpSink reads until the stream ends, or until stop is set and no more data arrives.
func tcpSink(fd int, got *atomic.Int64, stop *atomic.Bool) error {
	runtime.LockOSThread()
	buf := make([]byte, tcpBuffer)
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

// sleep waits for d, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
