package main

import (
	"errors"
	"log/slog"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// logPatience is how long a line of the log waits for a reader that does not read, before it and the next ones are lost.
const logPatience = time.Second

// logFile writes the log to a pipe, a socket or a file. Where its reader does not read (a journal that is stopped, a terminal that is held), lines are lost and
// counted: a network must not stand still for its log. One goroutine at a time may call Write, which is what slog does.
type logFile struct {
	f    *os.File
	tell *slog.Logger // says in f how many lines are lost
	lost int
	torn bool // a line ends in the middle
}

// Write implements io.Writer for one line. It has no errors: there is nowhere to tell them.
func (l *logFile) Write(line []byte) (int, error) {
	n := len(line)
	if l.lost > 0 {
		if !l.takes(0) {
			l.lost++
			return n, nil
		}
		if l.torn {
			_, _ = l.f.Write([]byte("\n"))
		}
		l.tell.Warn("lines of the log are lost: its reader did not read", "lines", l.lost)
		l.lost, l.torn = 0, false
	}
	for rest := line; len(rest) > 0; {
		if !l.takes(logPatience) {
			l.lost, l.torn = 1, len(rest) < n
			break
		}
		part := rest[:min(len(rest), 4096)] // a pipe that takes something takes a page
		_, _ = l.f.Write(part)
		rest = rest[len(part):]
	}
	return n, nil
}

// takes waits for at most limit until something can be written without waiting.
func (l *logFile) takes(limit time.Duration) bool {
	for end := time.Now().Add(limit); ; {
		fds := []unix.PollFd{{Fd: int32(l.f.Fd()), Events: unix.POLLOUT}}
		n, err := unix.Poll(fds, int(max(time.Until(end), 0).Milliseconds()))
		if !errors.Is(err, syscall.EINTR) {
			return n > 0 || err != nil
		}
	}
}
