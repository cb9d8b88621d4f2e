package sys

import (
	"fmt"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Poller waits for one descriptor, or for Wake. Only one goroutine may wait at a time;
// any goroutine may call Wake.
type Poller struct {
	fds     [2]unix.PollFd
	timeout unix.Timespec
	wake    *Event
	spare   int32 // processors that hot waits of all Pollers may keep
	active  bool  // the last wait was short
}

// NewPoller returns a Poller for fd. The caller keeps ownership of fd.
func NewPoller(fd int) (*Poller, error) {
	wake, err := NewEvent()
	if err != nil {
		return nil, err
	}
	p := &Poller{wake: wake, spare: int32(max(runtime.GOMAXPROCS(0)-runtime.NumCPU(), 0))}
	p.fds[0] = unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
	p.fds[1] = unix.PollFd{Fd: int32(wake.FD()), Events: unix.POLLIN}
	return p, nil
}

// hotWait is how long WaitRead keeps its processor (P of the Go scheduler) before it
// releases it: longer than the gaps between packets of an active flow, and too short to
// matter when idle. It is also longer than a tick of the kernel (10 ms at most). A wait
// that ends before the next tick would be the CPU's next timer event: the kernel programs
// the CPU's timer for it, and again when a packet ends the wait. Each time a virtual
// machine has to leave to its hypervisor, which takes microseconds.
const hotWait = 20 * time.Millisecond

// hotWaits is how many waits keep a processor.
var hotWaits atomic.Int32

// claim reports whether this wait may keep its processor: the descriptor is active, and one is to spare. If so, hotWaits counts it.
func (p *Poller) claim() bool {
	if !p.active {
		return false
	}
	if hotWaits.Add(1) > p.spare {
		hotWaits.Add(-1)
		return false
	}
	return true
}

// WaitRead blocks until fd is readable (nil), its error queue is not empty
// (ErrErrQueue), or Wake has been called since the last ErrWoken (ErrWoken). It checks
// Wake first and errors second, so that a busy descriptor starves neither.
//
// If the last wait was short, it bypasses the Go scheduler for the first hotWait. In a
// wait that the scheduler knows, its monitor takes the waiter's processor away after 20 µs
// and wakes another thread to use it; the waiter then has to find a new one. No more waits
// do so at a time than GOMAXPROCS exceeds the number of CPUs by (when the Poller was made),
// so other goroutines have as many processors as there are CPUs. After hotWait it waits
// like any other system call. A pending preemption (by the garbage collector, say)
// interrupts the wait by a signal.
func (p *Poller) WaitRead() error {
	hot := p.claim()
	p.timeout = unix.NsecToTimespec(int64(hotWait))
	began := time.Now()
	for {
		var n uintptr
		var errno unix.Errno
		if hot { // the kernel writes the remaining time back
			n, _, errno = unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p.fds)), 2, uintptr(unsafe.Pointer(&p.timeout)), 0, 0, 0)
		} else {
			n, _, errno = unix.Syscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p.fds)), 2, 0, 0, 0, 0)
		}
		if (errno == unix.EINTR || errno == unix.EAGAIN) && hot {
			runtime.Gosched()
			continue
		}
		if hot {
			hotWaits.Add(-1)
			hot = false
		}
		switch errno {
		case 0:
		case unix.EINTR, unix.EAGAIN:
			continue
		default:
			return fmt.Errorf("poll: %w", errno)
		}
		if n == 0 {
			continue
		}
		p.active = time.Since(began) < hotWait
		switch r := p.fds[0].Revents; {
		case p.fds[1].Revents != 0 && p.wake.Clear():
			return ErrWoken
		case r&unix.POLLNVAL != 0:
			return fmt.Errorf("poll: %w", unix.EBADF)
		case r&unix.POLLERR != 0:
			return ErrErrQueue
		case r != 0:
			return nil
		}
	}
}

// Pause sleeps for d, or less if a signal arrives. Wake ends it; the next WaitRead returns ErrWoken then. It keeps the
// processor, so d must be short.
func (p *Poller) Pause(d time.Duration) {
	p.timeout = unix.NsecToTimespec(int64(d))
	_, _, _ = unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p.fds[1])), 1, uintptr(unsafe.Pointer(&p.timeout)), 0, 0, 0)
}

// Wake ends the current WaitRead, or else the next one, with ErrWoken.
func (p *Poller) Wake() { p.wake.Signal() }

// Close releases the Poller. No goroutine may be waiting. It does not close the
// descriptor that the Poller waited for.
func (p *Poller) Close() error { return p.wake.Close() }

// WaitWrite blocks until fd accepts data again, or until the timeout in milliseconds.
// poll always returns at once for a socket whose error queue is not empty; then
// WaitWrite checks every millisecond instead of spinning.
func WaitWrite(fd int, timeoutMillis int) error {
	for timeoutMillis > 0 {
		fds := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		n, err := unix.Poll(fds[:], timeoutMillis)
		switch {
		case err == unix.EINTR:
			return nil // the caller tries again anyway
		case err != nil:
			return fmt.Errorf("poll: %w", err)
		case fds[0].Revents&unix.POLLNVAL != 0:
			return fmt.Errorf("poll: %w", unix.EBADF)
		case n == 0 || fds[0].Revents&unix.POLLOUT != 0:
			return nil
		}
		unix.Poll(nil, 1)
		timeoutMillis--
	}
	return nil
}
