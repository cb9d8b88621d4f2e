package agent

import (
	"strings"
	"testing"
	"time"
)

// One change of the host by others is repaired. Changes that go on are a problem, until a minute after the last one.
func TestTakenAgain(t *testing.T) {
	now := time.Now()
	for _, c := range []struct {
		name  string
		every time.Duration
		times int
		want  bool
	}{
		{"a network manager starts", time.Second, 5, false},
		{"in a loop", 300 * time.Millisecond, 100, true},
		{"every half a minute", 30 * time.Second, 20, true},
		{"every five minutes", 5 * time.Minute, 50, false},
	} {
		var w taken
		at := now
		for range c.times {
			w.note(at, []string{"table", "route 10.244.0.0/16"})
			w.note(at, nil)
			at = at.Add(c.every)
		}
		list := w.problem(at)
		if got := len(list) == 1; got != c.want {
			t.Errorf("%s: a problem %v, want %v", c.name, got, c.want)
		}
		for _, p := range list {
			if !strings.Contains(p.What, "route 10.244.0.0/16") || !p.Since.Equal(now) {
				t.Errorf("%s: %+v, want what was taken last, since %v", c.name, p, now)
			}
		}
		if list := w.problem(at.Add(takenOver)); len(list) > 0 {
			t.Errorf("%s: still a problem when it is over: %v", c.name, list)
		}
	}
}
