package sys

import (
	"errors"

	"golang.org/x/sys/unix"
)

// ErrAgain is returned by a non-blocking call if there is nothing to read, or no
// space to write. It is EAGAIN itself, so returning it allocates nothing. Compare
// with ==.
var ErrAgain error = unix.EAGAIN

var (
	// ErrWoken is returned by a wait that Wake has ended.
	ErrWoken = errors.New("woken")
	// ErrErrQueue is returned by a wait on a socket whose error queue is not empty.
	// Every wait returns it at once until the queue is drained.
	ErrErrQueue = errors.New("socket error queue not empty")
)
