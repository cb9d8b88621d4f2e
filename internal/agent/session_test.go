package agent

import (
	"testing"
	"time"
)

func TestPauseAfter(t *testing.T) {
	const ms = time.Millisecond
	for took, want := range map[time.Duration]time.Duration{
		0: 50 * ms, 5 * ms: 50 * ms, 100 * ms: 400 * ms, 10 * time.Second: time.Second,
	} {
		if got := pauseAfter(took); got != want {
			t.Errorf("a look of %v is followed by %v, want %v", took, got, want)
		}
	}
}
