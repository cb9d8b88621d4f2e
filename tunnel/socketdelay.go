package tunnel

import "time"

// Where the agent is slower than what its peers send, packets wait in the socket's buffer, which TCP would fill (see queuedelay.go). The kernel
// knows when each came into the host.

const (
	// asksApart is the least time between two questions to the kernel.
	asksApart = 500 * time.Microsecond
	// steppedBy is a wait that is none: somebody has set the clock.
	steppedBy = 10 * time.Second
)

// socketDelay measures how long packets wait in the buffer of a worker's socket. Its worker owns it.
type socketDelay struct {
	waiting
	since time.Time // the socket has not been empty; zero: it was
	last  time.Time // when the kernel was last asked
}

// empty is to be called when no more messages were there.
func (q *socketDelay) empty() {
	if !q.since.IsZero() {
		q.since = time.Time{}
		q.waited(time.Time{}, 0)
	}
}

// busy is to be called when there may be more messages, after some were received.
func (q *socketDelay) busy(from inSocket) {
	now := time.Now()
	switch {
	case q.since.IsZero():
		q.since = now
		return
	case now.Sub(q.since) < codelTarget: // nothing has waited for longer, and the kernel need not keep times
		return
	case now.Sub(q.last) < asksApart:
		return
	}
	q.last = now
	at, err := from.Arrived()
	if err != nil {
		return
	}
	if d := now.Sub(at); d < steppedBy { // at has no monotonic clock
		q.waited(now, max(0, d))
	}
}
