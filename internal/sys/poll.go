package sys

import (
	"fmt"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Poller waits for one descriptor, or for Wake. One goroutine waits at a time;
// Wake may be called from any.
type Poller struct {
	fds     [2]unix.PollFd
	timeout unix.Timespec
	wake    *Event
}

// NewPoller makes a Poller for fd, which stays the caller's.
func NewPoller(fd int) (*Poller, error) {
	wake, err := NewEvent()
	if err != nil {
		return nil, err
	}
	p := &Poller{wake: wake}
	p.fds[0] = unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
	p.fds[1] = unix.PollFd{Fd: int32(wake.FD()), Events: unix.POLLIN}
	return p, nil
}

// hotWait is how long WaitRead holds on to its processor (in the Go scheduler's
// sense) before it lets go: longer than the gaps within a conversation, too short
// to matter where nothing happens.
const hotWait = time.Millisecond

// WaitRead blocks until fd is readable (nil), has an error to collect
// (ErrErrQueue), or Wake was called since the last wait that said so
// (ErrWoken). Wake comes first, errors second, so that neither is starved by a
// busy descriptor.
//
// At first it waits without telling the Go scheduler. A wait that the scheduler
// knows of costs the waker nothing, but the waiter a good deal: after 20 µs the
// scheduler's monitor takes its processor away, wakes another thread to use it,
// and the waiter has to find a new one. So the callers of WaitRead need as many
// processors beside those that the rest of the program uses (GOMAXPROCS). After
// hotWait it waits like any other system call. A pending preemption (the garbage
// collector's, say) interrupts the wait by a signal and is let through.
func (p *Poller) WaitRead() error {
	for hot := true; ; {
		var n uintptr
		var errno unix.Errno
		if hot {
			p.timeout = unix.NsecToTimespec(int64(hotWait)) // the kernel writes back what is left
			n, _, errno = unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p.fds)), 2, uintptr(unsafe.Pointer(&p.timeout)), 0, 0, 0)
		} else {
			n, _, errno = unix.Syscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p.fds)), 2, 0, 0, 0, 0)
		}
		switch errno {
		case 0:
		case unix.EINTR, unix.EAGAIN:
			if hot {
				runtime.Gosched()
			}
			continue
		default:
			return fmt.Errorf("poll: %w", errno)
		}
		if n == 0 {
			hot = false
			continue
		}
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

// Pause waits for d, or less if a signal comes in between; Wake ends it and is left for WaitRead to say. It does not let
// go of the processor, so d must be short.
func (p *Poller) Pause(d time.Duration) {
	p.timeout = unix.NsecToTimespec(int64(d))
	_, _, _ = unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p.fds[1])), 1, uintptr(unsafe.Pointer(&p.timeout)), 0, 0, 0)
}

// Wake ends the present WaitRead, or else the next one, with ErrWoken.
func (p *Poller) Wake() { p.wake.Signal() }

// Close releases the Poller; nobody may be waiting. The descriptor it waited
// for is not touched.
func (p *Poller) Close() error { return p.wake.Close() }

// WaitWrite blocks until fd takes data again or the timeout in milliseconds has
// passed. A socket whose error queue holds something is ready for poll at any
// time; then WaitWrite looks again every millisecond instead of spinning.
func WaitWrite(fd int, timeoutMillis int) error {
	for timeoutMillis > 0 {
		fds := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		n, err := unix.Poll(fds[:], timeoutMillis)
		switch {
		case err == unix.EINTR:
			return nil // the caller's own attempt comes next anyway
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
