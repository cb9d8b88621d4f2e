package traffic

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestSettle(t *testing.T) {
	for name, tc := range map[string]struct {
		arrivals []uint64 // after each pause of 10 ms; the last stays
		want     time.Duration
	}{
		"all are there":       {[]uint64{100}, 0},
		"the rest is lost":    {[]uint64{90}, 10 * time.Millisecond},
		"some come late":      {[]uint64{50, 70, 90}, 30 * time.Millisecond},
		"all come late":       {[]uint64{0, 0, 0, 0, 0, 0, 0, 0, 100}, 80 * time.Millisecond},
		"none come":           {[]uint64{0}, time.Second},
		"the last come in it": {[]uint64{0, 60, 100}, 20 * time.Millisecond},
	} {
		synctest.Test(t, func(t *testing.T) {
			begin, calls := time.Now(), 0
			err := Settle(t.Context(), 100, 10*time.Millisecond, func() (uint64, error) {
				n := tc.arrivals[min(calls, len(tc.arrivals)-1)]
				calls++
				return n, nil
			})
			if passed := time.Since(begin); err != nil || passed != tc.want {
				t.Errorf("%s: settled after %v, want %v (%v)", name, passed, tc.want, err)
			}
			broken := errors.New("broken")
			if err := Settle(t.Context(), 1, time.Second, func() (uint64, error) { return 0, broken }); !errors.Is(err, broken) {
				t.Errorf("got %v", err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if err := Settle(ctx, 1, time.Second, func() (uint64, error) { return 0, nil }); !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
		})
	}
}
