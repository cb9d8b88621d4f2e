package tunnel

import (
	"math"
	"time"
)

// The figures of codel: how long packets may wait, and for how long they may wait longer. RFC 8289 §4.2 has 5 and 100 ms, for round trips across
// the internet (docs/decisions/0039-queue-delay.md).
const (
	codelTarget   = 2 * time.Millisecond
	codelInterval = 40 * time.Millisecond
)

// codel decides when a sender has to slow down, so that the packets of a queue wait less: controlled delay, RFC 8289. It is told how
// long packets have waited. While all have waited for codelTarget or longer for codelInterval, it asks for one drop, and for more of them the longer
// that lasts. The zero value is ready.
type codel struct {
	from     time.Time // from when to drop unless a packet has waited less before; zero: one has
	next     time.Time // of the next drop, while dropping; of the one that was not needed, after it
	dropping bool
	count    int // drops of this time of dropping, where it goes on with what the last one left
	began    int // count when this time of dropping began
}

// waited tells that a packet read at now has waited for d.
func (c *codel) waited(now time.Time, d time.Duration) {
	switch {
	case d < codelTarget:
		c.from, c.dropping = time.Time{}, false
	case c.from.IsZero():
		c.from = now.Add(codelInterval)
	}
}

// calm reports whether nothing is to be dropped before waited has told of a long wait.
func (c *codel) calm() bool { return c.from.IsZero() }

// drop reports whether a packet read at now is to be dropped, or marked.
func (c *codel) drop(now time.Time) bool {
	switch {
	case c.calm() || now.Before(c.from):
		return false
	case !c.dropping:
		c.dropping = true
		// Soon after the last time, the rate at which that ended is about the right one (RFC 8289 §4.4).
		if more := c.count - c.began; more > 1 && now.Sub(c.next) < 16*codelInterval {
			c.count = more
		} else {
			c.count = 1
		}
		c.began = c.count
		c.next = c.after(now)
		return true
	case now.Before(c.next):
		return false
	}
	c.count++
	c.next = c.after(c.next)
	return true
}

// after is the time of the next drop if there was one at t.
func (c *codel) after(t time.Time) time.Time {
	return t.Add(time.Duration(float64(codelInterval) / math.Sqrt(float64(c.count))))
}
