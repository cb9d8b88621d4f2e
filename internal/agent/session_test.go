package agent

import (
	"slices"
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

// What has failed is tried again soon, and ever less often while it keeps failing.
func TestRetry(t *testing.T) {
	var r retry
	begin := time.Now()
	if r.due(begin) {
		t.Error("due without a failure")
	}
	var at []time.Duration
	now := begin
	r.note(now, true)
	for range 7 {
		for !r.due(now) {
			now = now.Add(lookEvery / 4)
		}
		at = append(at, now.Sub(begin)/time.Second)
		r.note(now, true)
	}
	if want := []time.Duration{1, 3, 7, 15, 31, 61, 91}; !slices.Equal(at, want) {
		t.Errorf("tried again after %v seconds, want %v", at, want)
	}
	if r.note(now, false); r.due(now.Add(time.Hour)) {
		t.Error("due after a success")
	}
	if r.note(now, true); !r.due(now.Add(lookEvery)) {
		t.Error("a new failure waits as long as the one before")
	}
}
