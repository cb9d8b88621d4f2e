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
	woken   atomic.Bool // Wake has been called since the last ErrWoken
	spare   int32       // processors that hot waits of all Pollers may keep
	active  bool        // the last packet did not take long to come

	receives uint // calls of WaitRecv
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

// HotWait is how long a wait keeps its processor (P of the Go scheduler) before it
// releases it: longer than the gaps between packets of an active flow, and too short to
// matter when idle. It is also longer than a tick of the kernel (10 ms at most). A wait
// that ends before the next tick would be the CPU's next timer event: the kernel programs
// the CPU's timer for it, and again when a packet ends the wait. Each time a virtual
// machine has to leave to its hypervisor, which takes microseconds.
const HotWait = 20 * time.Millisecond

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
// Wake first and errors second, so that a busy descriptor starves neither. It returns how
// long it waited.
//
// If the last packet did not take long to come, it bypasses the Go scheduler for the first
// HotWait. In a wait that the scheduler knows, its monitor takes the waiter's processor away
// after 20 µs and wakes another thread to use it; the waiter then has to find a new one. No
// more waits do so at a time than GOMAXPROCS exceeds the number of CPUs by (when the Poller
// was made), so other goroutines have as many processors as there are CPUs. After HotWait it
// waits like any other system call. A pending preemption (by the garbage collector, say)
// interrupts the wait by a signal. A Wake does not: it is seen with the next packet, with
// the next signal, or at the end of HotWait. Polling for it, too, would make each wait longer.
func (p *Poller) WaitRead() (waited time.Duration, err error) {
	if p.takeWake() {
		return 0, ErrWoken
	}
	hot := p.claim()
	p.timeout = unix.NsecToTimespec(int64(HotWait))
	began := now()
	for {
		var n uintptr
		var errno unix.Errno
		p.fds[1].Revents = 0
		if hot { // the kernel writes the remaining time back
			n, _, errno = unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p.fds)), 1, uintptr(unsafe.Pointer(&p.timeout)), 0, 0, 0)
		} else {
			n, _, errno = unix.Syscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p.fds)), 2, 0, 0, 0, 0)
		}
		if (errno == unix.EINTR || errno == unix.EAGAIN) && hot && !p.woken.Load() {
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
			return now() - began, fmt.Errorf("poll: %w", errno)
		}
		if n == 0 {
			continue
		}
		waited = now() - began
		if p.fds[1].Revents != 0 {
			p.woken.Store(false)
			p.wake.Clear()
			return waited, ErrWoken
		}
		p.active = waited < HotWait
		switch r := p.fds[0].Revents; {
		case r&unix.POLLNVAL != 0:
			return waited, fmt.Errorf("poll: %w", unix.EBADF)
		case r&unix.POLLERR != 0:
			return waited, ErrErrQueue
		case r != 0:
			return waited, nil
		}
	}
}

// WaitRecv is WaitRead for a socket, which must be a blocking one with a SO_RCVTIMEO of
// HotWait. Where WaitRead would bypass the Go scheduler, the call that receives waits by
// itself. This saves polling before it: n messages, at most most, have been received into m
// then. With n = 0 and no error they are still to be received. err can also be what receiving
// returned.
//
// Not every error is told by receiving, so every pollEvery-th wait polls.
func (p *Poller) WaitRecv(m *RecvMsgs, most int) (n int, waited time.Duration, err error) {
	if p.receives++; p.receives%pollEvery == 0 || p.woken.Load() || !p.claim() {
		waited, err = p.WaitRead()
		return 0, waited, err
	}
	began := now()
	for {
		n, err = m.recv(int(p.fds[0].Fd), most, unix.MSG_WAITFORONE)
		waited = now() - began
		if err != unix.EINTR { // of a pending preemption, after which the kernel would wait the whole time again
			break
		}
		runtime.Gosched()
		if waited >= HotWait || p.woken.Load() {
			err = ErrAgain
			break
		}
	}
	hotWaits.Add(-1)
	if err != ErrAgain {
		return n, waited, err
	}
	p.active = false
	more, err := p.WaitRead()
	waited += more
	p.active = waited < HotWait
	return 0, waited, err
}

// pollEvery is how many waits of WaitRecv one that polls is among.
const pollEvery = 64

// takeWake reports whether Wake has been called since the last ErrWoken, and forgets it.
func (p *Poller) takeWake() bool {
	if !p.woken.Swap(false) {
		return false
	}
	p.wake.Clear()
	return true
}

// now is the time since the program started: one reading of the clock, where time.Now takes two.
func now() time.Duration { return time.Since(started) }

var started = time.Now()

// Pause sleeps for d, or less if a signal arrives. Wake ends it; the next WaitRead returns ErrWoken then. It keeps the
// processor, so d must be short.
func (p *Poller) Pause(d time.Duration) {
	p.timeout = unix.NsecToTimespec(int64(d))
	_, _, _ = unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p.fds[1])), 1, uintptr(unsafe.Pointer(&p.timeout)), 0, 0, 0)
}

// Wake ends the current WaitRead, or else the next one, with ErrWoken: at once, or soon after HotWait if packets came shortly before.
func (p *Poller) Wake() {
	p.wake.Signal() // before woken is set: whoever sees that can clear the signal
	p.woken.Store(true)
}

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
