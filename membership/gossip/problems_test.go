package gossip

import (
	"testing"
	"testing/synctest"
	"time"
)

// What an event reported stays listed after the event, with the time of the last one.
func TestProblemKeepsLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s problemSet
		began := time.Now()
		s.note("foreign x", "a foreign cluster", "")
		time.Sleep(time.Minute)
		s.note("foreign x", "a foreign cluster", "")
		time.Sleep(problemExpiry - time.Second)
		if p := s.byKey["foreign x"]; !s.has("foreign x") || !p.Since.Equal(began) || !p.Last.Equal(began.Add(time.Minute)) {
			t.Errorf("since %v, last %v; began %v", p.Since, p.Last, began)
		}
	})
}
