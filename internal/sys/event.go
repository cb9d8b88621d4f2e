package sys

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Event is an eventfd(2). Any goroutine may Signal it; then FD is readable until
// Clear. Several signals count as one.
type Event struct {
	fd  int
	one uint64 // the 8 bytes that Signal writes
}

// NewEvent returns an Event without a signal.
func NewEvent() (*Event, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	return &Event{fd: fd, one: 1}, nil
}

// FD returns the descriptor to poll.
func (e *Event) FD() int { return e.fd }

// Signal makes FD readable. It never blocks.
func (e *Event) Signal() {
	// EAGAIN means that the counter is full: then FD is readable already.
	unix.RawSyscall(unix.SYS_WRITE, uintptr(e.fd), uintptr(unsafe.Pointer(&e.one)), 8)
}

// Clear removes the signal and reports whether there was one.
func (e *Event) Clear() bool {
	var n uint64
	_, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(e.fd), uintptr(unsafe.Pointer(&n)), 8)
	return errno == 0
}

// Close closes the descriptor. No goroutine may poll it any more.
func (e *Event) Close() error { return unix.Close(e.fd) }
