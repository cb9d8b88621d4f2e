package sys

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Event is an eventfd(2): any goroutine may Signal it, a poll on FD sees it
// readable until it is cleared. Signals add up into one.
type Event struct {
	fd  int
	one uint64 // the 8 bytes that Signal writes
}

// NewEvent opens an Event that is not signalled.
func NewEvent() (*Event, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	return &Event{fd: fd, one: 1}, nil
}

// FD is the descriptor to poll.
func (e *Event) FD() int { return e.fd }

// Signal makes FD readable. It never blocks.
func (e *Event) Signal() {
	// EAGAIN means that the counter is full: it is readable, which is the point.
	unix.RawSyscall(unix.SYS_WRITE, uintptr(e.fd), uintptr(unsafe.Pointer(&e.one)), 8)
}

// Clear takes all signals and reports whether there was one.
func (e *Event) Clear() bool {
	var n uint64
	_, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(e.fd), uintptr(unsafe.Pointer(&n)), 8)
	return errno == 0
}

// Close closes the descriptor. Nobody may be polling it any more.
func (e *Event) Close() error { return unix.Close(e.fd) }
