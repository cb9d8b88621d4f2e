package traffic

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/bench/result"
)

// A tunnel made by hand: what is offered beyond its capacity is lost, and the sender has a limit of its own.
func model(capacity, limit float64, noise func(n int) float64) func(rate float64) (result.Trial, error) {
	n := 0
	return func(rate float64) (result.Trial, error) {
		n++
		sent := limit
		if rate > 0 {
			sent = min(rate, limit)
		}
		got := min(sent, capacity)
		if noise != nil {
			got *= 1 - noise(n)
		}
		return result.Trial{Offered: rate, Sent: uint64(sent), Received: uint64(got), Seconds: 1, Arriving: 1 - 1/sent}, nil
	}
}

func TestSearchRate(t *testing.T) {
	for _, capacity := range []float64{1000, 43_000, 99_000, 250_000, 399_000} {
		s, err := SearchRate(64, 0, model(capacity, 400_000, nil))
		if err != nil {
			t.Fatal(err)
		}
		if got := s.Best.Rate(); got > capacity || got < capacity/precision || len(s.Trials) > maxTrials+3 {
			t.Errorf("capacity %v: found %v in %d trials", capacity, got, len(s.Trials))
		}
	}
	t.Run("sender is the limit", func(t *testing.T) {
		s, err := SearchRate(64, 0, model(500_000, 400_000, nil))
		if err != nil || s.Best.Rate() != 400_000 || len(s.Trials) != 4 {
			t.Errorf("got %+v, %v", s, err)
		}
	})
	t.Run("one disturbed trial", func(t *testing.T) { // every third trial loses 1 % to somebody else
		s, err := SearchRate(64, 0, model(100_000, 400_000, func(n int) float64 {
			if n%3 == 0 {
				return 0.01
			}
			return 0
		}))
		if err != nil || s.Best.Rate() < 100_000/precision/precision*(1-confirmDown) || s.Best.Rate() > 100_000 {
			t.Errorf("got %v of %+v, %v", s.Best.Rate(), s.Trials, err)
		}
	})
	t.Run("nothing arrives", func(t *testing.T) {
		s, err := SearchRate(64, 0, model(0, 400_000, nil))
		if err != nil || s.Best.Received != 0 || len(s.Trials) > maxTrials {
			t.Errorf("got %+v, %v", s, err)
		}
	})
	t.Run("always a little loss", func(t *testing.T) {
		s, err := SearchRate(64, 0, model(1e9, 400_000, func(int) float64 { return 0.01 }))
		if err != nil || s.Best.Received != 0 || len(s.Trials) > maxTrials+3*confirmSteps {
			t.Errorf("got %d trials, %+v, %v", len(s.Trials), s.Best, err)
		}
	})
	t.Run("a lucky trial", func(t *testing.T) { // the sender got through once, at a rate that does not hold
		s, err := SearchRate(64, 0, model(100_000, 110_000, func(n int) float64 {
			if n == 1 {
				return -0.1
			}
			return 0
		}))
		if err != nil || s.Best.Rate() > 100_000 || s.Best.Rate() < 90_000 {
			t.Errorf("got %v of %+v, %v", s.Best.Rate(), s.Trials, err)
		}
	})
	t.Run("trials take long", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			fast := model(43_000, 400_000, nil)
			begin := time.Now()
			s, err := SearchRate(64, 3*time.Second, func(rate float64) (result.Trial, error) {
				time.Sleep(time.Second)
				return fast(rate)
			})
			if took := time.Since(begin); err != nil || took > 8*time.Second || s.Best.Rate() > 43_000 || s.Best.Rate() < 30_000 {
				t.Errorf("found %v in %v and %d trials, %v", s.Best.Rate(), took, len(s.Trials), err)
			}
		})
	})
	t.Run("a trial fails", func(t *testing.T) {
		broken := errors.New("broken")
		if _, err := SearchRate(64, 0, func(float64) (result.Trial, error) { return result.Trial{}, broken }); !errors.Is(err, broken) {
			t.Errorf("got %v", err)
		}
	})
}
