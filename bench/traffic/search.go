package traffic

import (
	"math"
	"slices"
	"time"

	"github.com/tulle-net/tulle/bench/result"
)

// Limits of the search for the highest rate without loss.
const (
	LossAllowed  = 0.001 // maximum share of lost datagrams in a trial that holds
	precision    = 1.03  // end of the search: ratio of the lowest rate that failed to the highest that held
	maxTrials    = 12    // of the search, with repetitions, without the confirming trials
	lossHopeless = 0.02  // a trial that loses more is not repeated
	floorRate    = 100.0 // datagrams per second; the search gives up below it
	confirmSteps = 5     // attempts to confirm; each after the first lowers the rate
	confirmDown  = 0.05  // share by which the first such step lowers the rate; each step doubles it
)

func holds(t *result.Trial) bool { return t.Received > 0 && t.Loss() <= LossAllowed }

// SearchRate finds the highest rate at which a trial loses at most LossAllowed, and then confirms it: of three trials at that
// rate, or slightly below it, two must hold; the result is the median of those that held. So every tunnel has the same
// chance of a lucky trial. Where trials take long, because the path or its queues are, the search becomes no more precise after the time most; 0 is for no limit.
func SearchRate(payload int, most time.Duration, trial func(rate float64) (result.Trial, error)) (result.RateSearch, error) {
	s := result.RateSearch{Payload: payload}
	begin := time.Now()
	run := func(rate float64) (result.Trial, error) {
		t, err := trial(rate)
		if err == nil {
			s.Trials = append(s.Trials, t)
		}
		return t, err
	}
	rate, err := highest(&s, run, func() bool { return most > 0 && time.Since(begin) > most })
	if err != nil || rate < 0 {
		return s, err
	}
	for step := range confirmSteps {
		var held []result.Trial
		fastest := 0.0
		for range 3 {
			t, err := run(rate)
			if err != nil {
				return s, err
			}
			fastest = max(fastest, t.SentRate())
			if holds(&t) {
				held = append(held, t)
			}
		}
		if len(held) >= 2 {
			slices.SortFunc(held, func(a, b result.Trial) int { return int(a.Rate() - b.Rate()) })
			s.Best = held[(len(held)-1)/2]
			return s, nil
		}
		if rate == 0 {
			rate = fastest
		}
		rate *= 1 - confirmDown*float64(int(1)<<step)
	}
	return s, nil
}

// highest returns the highest offered rate that held; 0 if the unpaced sender held, negative if no rate held. The first
// trial is unpaced: if it holds, the sender is the limit. Otherwise a bisection on a logarithmic scale starts near the rate that
// arrived. A trial with a small loss is repeated once, because on a shared machine another process may have used
// the CPU. When late says so, the first rate that holds will do.
func highest(s *result.RateSearch, trial func(rate float64) (result.Trial, error), late func() bool) (float64, error) {
	steady := func(rate float64) (bool, error) {
		for range 2 {
			t, err := trial(rate)
			if err != nil || holds(&t) {
				return err == nil, err
			}
			if t.Loss() > lossHopeless || len(s.Trials) >= maxTrials {
				break
			}
		}
		return false, nil
	}
	if ok, err := steady(0); ok || err != nil {
		return 0, err
	}
	flood := s.Trials[0]
	low, high, rate := -1.0, flood.SentRate(), 0.95*flood.Rate()
	for len(s.Trials) < maxTrials && high > floorRate && (low < 0 || high/low > precision && !late()) {
		rate = math.Max(rate, floorRate)
		ok, err := steady(rate)
		if err != nil {
			return 0, err
		}
		if ok {
			low = rate
		} else {
			high = rate
		}
		switch {
		case low < 0:
			rate = high * 0.7
		case low >= high: // this rate failed before and holds now: the difference is noise
			return low, nil
		default:
			rate = math.Sqrt(low * high)
		}
	}
	return low, nil
}
