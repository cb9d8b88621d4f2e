package sys

import (
	"errors"

	"golang.org/x/sys/unix"
)

// ErrAgain is what a non-blocking call returns when there is nothing to read,
// or no room to write. It is EAGAIN itself, so that returning it costs nothing:
// compare with ==.
var ErrAgain error = unix.EAGAIN

var (
	// ErrWoken is returned by a wait that was ended by Wake.
	ErrWoken = errors.New("woken")
	// ErrErrQueue is returned by a wait on a socket whose error queue holds
	// something. It comes back at once until the queue has been drained.
	ErrErrQueue = errors.New("socket error queue not empty")
)
