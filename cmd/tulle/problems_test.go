package main

import (
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/api"
)

// A problem that stays listed for minutes after its cause is gone says when it was seen last.
func TestProblemLastSeen(t *testing.T) {
	now := time.Now()
	p := &printer{width: 120, now: now}
	printProblems(p, []api.Problem{
		{What: "a lasting one", Since: now.Add(-7 * time.Minute)},
		{What: "an event", Since: now.Add(-7 * time.Minute), Last: now.Add(-4 * time.Minute)},
	})
	for _, want := range []string{"a lasting one (for 7m00s)", "an event (for 7m00s, last seen 4m00s ago)"} {
		if !strings.Contains(p.String(), want) {
			t.Errorf("%s\nlacks %q", p.String(), want)
		}
	}
}
