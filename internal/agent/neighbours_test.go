package agent

import (
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/hostnet"
)

// A table is full while the kernel has refused neighbours within the last minute; what it refused before the agent looked first says nothing.
func TestFullNeighbours(t *testing.T) {
	start := time.Date(2026, 12, 1, 12, 0, 0, 0, time.UTC)
	f := fullNeighbours{}
	at := func(after time.Duration, refused uint64, want int) {
		t.Helper()
		now := start.Add(after)
		f.note(now, []hostnet.NeighbourTable{{Family: "IPv4", Limit: 1024, Refused: refused}, {Family: "IPv6", Limit: 1024, Refused: 3}})
		if got := f.problems(now); len(got) != want {
			t.Errorf("after %v: %v", after, got)
		} else if want > 0 && (!got[0].Since.Equal(start.Add(10*time.Second)) || got[0].Command == "") {
			t.Errorf("after %v: %+v", after, got[0])
		}
	}
	at(0, 50, 0)
	at(time.Second, 50, 0)
	at(10*time.Second, 51, 1)
	at(60*time.Second, 70, 1)
	at(119*time.Second, 70, 1)
	at(121*time.Second, 70, 0)
	if got := (fullNeighbours)(nil).problems(start); len(got) != 0 {
		t.Errorf("before the first look: %v", got)
	}
}
