package bench

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/bench/machine"
	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/bench/traffic"
)

// counter is a counter in its own cache line.
type counter struct {
	atomic.Int64
	_ [56]byte
}

// measureTCP runs streams for warm, and then counts the bytes that arrive in the time d. Each end of each stream is a
// blocking socket on its own thread. The CPU time of the processes pids is counted separately.
func measureTCP(ctx context.Context, e *Ends, streams int, warm, d time.Duration, pids []int) (result.TCP, error) {
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
			return result.TCP{}, err
		}
		ends.Go(func() {
			defer unix.Close(from)
			n, err := traffic.TCPSource(from, &stop)
			if retransmits[i] = n; err != nil {
				errs <- fmt.Errorf("sender in %s: %w", e.From, err)
			}
		})
		ends.Go(func() {
			defer unix.Close(to)
			if err := traffic.TCPSink(to, &got[i].Int64, &stop); err != nil {
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
	r := result.TCP{Streams: streams}
	err := traffic.Sleep(ctx, warm)
	if err == nil {
		var cpu machine.Meter
		cpu, err = machine.Start(pids) // first: where there are many processes, reading /proc takes a while
		before := total()
		begin := time.Now()
		err = errors.Join(err, traffic.Await(ctx, d, func() (bool, error) { return total() > before, nil }))
		r.Bytes, r.Seconds = total()-before, time.Since(begin).Seconds()
		var cerr error
		r.CPU, cerr = cpu.Stop()
		err = errors.Join(err, cerr)
	}
	stop.Store(true)
	ends.Wait()
	close(errs)
	for e := range errs {
		err = errors.Join(err, e)
	}
	if err == nil && r.Bytes == 0 {
		err = fmt.Errorf("no byte from %s arrived in %s within %.1f s", e.From, e.To, r.Seconds)
	}
	for _, n := range retransmits {
		r.Retransmits += n
	}
	r.Gbps = float64(r.Bytes) * 8 / 1e9 / r.Seconds
	return r, err
}

// tcpPair opens a connection from one end to the other.
func (e *Ends) tcpPair() (from, to int, err error) {
	ln, at, err := e.listen()
	if err != nil {
		return -1, -1, err
	}
	defer unix.Close(ln)
	if from, err = e.dial(at); err != nil {
		return -1, -1, err
	}
	if to, err = acceptRetry(ln); err != nil {
		unix.Close(from)
		return -1, -1, fmt.Errorf("accept in %s: %w", e.To, err)
	}
	return from, to, nil
}

// listen opens a listening socket in To.
func (e *Ends) listen() (ln int, at unix.Sockaddr, err error) {
	if ln, err = e.socket(e.To, e.ToAddr, unix.SOCK_STREAM); err != nil {
		return -1, nil, err
	}
	if err = unix.Listen(ln, 64); err == nil {
		at, err = unix.Getsockname(ln)
	}
	if err != nil {
		unix.Close(ln)
		return -1, nil, fmt.Errorf("listen in %s: %w", e.To, err)
	}
	return ln, at, nil
}

// dial connects From to a listening socket.
func (e *Ends) dial(at unix.Sockaddr) (from int, err error) {
	err = e.Do(e.From, func() error {
		from, err = e.dialHere(at)
		return err
	})
	return from, err
}

// dialHere does so on a thread that is in From's namespace already.
func (e *Ends) dialHere(at unix.Sockaddr) (from int, err error) {
	if from, err = e.open(e.FromAddr, unix.SOCK_STREAM); err != nil {
		return -1, fmt.Errorf("socket in %s: %w", e.From, err)
	}
	if err = traffic.Connect(from, at); err != nil {
		unix.Close(from)
		return -1, fmt.Errorf("connect %s to %s: %w", e.From, e.To, err)
	}
	return from, nil
}

// acceptRetry accepts the connection whose handshake is already done at the other end.
func acceptRetry(ln int) (fd int, err error) {
	for range 100 {
		if fd, err = accept(ln); err != unix.EAGAIN && err != unix.EINTR {
			break
		}
	}
	return fd, err
}

// accept waits for a connection as long as for other reads.
func accept(ln int) (int, error) {
	fd, _, err := unix.Accept4(ln, unix.SOCK_CLOEXEC)
	if err != nil {
		return -1, err
	}
	wait := unix.NsecToTimeval(int64(traffic.ReadTimeout))
	err = errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait), unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_NODELAY, 1))
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}
