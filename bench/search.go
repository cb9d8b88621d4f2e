package bench

import (
	"math"
	"slices"
)

// Limits of the search for the highest rate without loss.
const (
	lossAllowed  = 0.001 // of the datagrams of a trial
	precision    = 1.03  // between the rate that holds and the lowest known that does not
	maxTrials    = 12    // of the search, repetitions counted; those that confirm its result come on top
	lossHopeless = 0.02  // a trial that loses more is not repeated
	floorRate    = 100.0 // datagrams a second, below which the search gives up
	confirmSteps = 5     // of which each after the first goes down from a rate that was not confirmed
	confirmDown  = 0.05  // the share that the first such step takes off; each takes twice as much as the one before
)

// RateSearch is the outcome of a search. Best.Received is 0 if no rate held.
type RateSearch struct {
	Payload int     `json:"payload"` // bytes of UDP payload
	Best    Trial   `json:"best"`    // the median of the trials that confirmed the rate
	Trials  []Trial `json:"trials"`
}

func (t *Trial) holds() bool { return t.Received > 0 && t.Loss() <= lossAllowed }

// searchRate looks for the highest rate at which a trial loses at most lossAllowed, and then confirms it: of three
// trials at that rate, or a little below it, two must hold, and the middle one of those that do is the result. So no
// tunnel gets more chances of a lucky trial than another.
func searchRate(payload int, trial func(rate float64) (Trial, error)) (RateSearch, error) {
	s := RateSearch{Payload: payload}
	run := func(rate float64) (Trial, error) {
		t, err := trial(rate)
		if err == nil {
			s.Trials = append(s.Trials, t)
		}
		return t, err
	}
	rate, err := s.highest(run)
	if err != nil || rate < 0 {
		return s, err
	}
	for step := range confirmSteps {
		var held []Trial
		fastest := 0.0
		for range 3 {
			t, err := run(rate)
			if err != nil {
				return s, err
			}
			fastest = max(fastest, t.SentRate())
			if t.holds() {
				held = append(held, t)
			}
		}
		if len(held) >= 2 {
			slices.SortFunc(held, func(a, b Trial) int { return int(a.Rate() - b.Rate()) })
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

// highest is the highest offered rate that held, 0 if that is as fast as the sender can, or negative if none did. The
// first trial is unpaced: if it holds, the sender is the limit. Otherwise the rate is searched for by halving, in
// proportions, beginning near what arrived. A trial that loses a little is repeated once, because on a shared machine it
// may have been somebody else who took the core.
func (s *RateSearch) highest(trial func(rate float64) (Trial, error)) (float64, error) {
	holds := func(rate float64) (bool, error) {
		for range 2 {
			t, err := trial(rate)
			if err != nil || t.holds() {
				return err == nil, err
			}
			if t.Loss() > lossHopeless || len(s.Trials) >= maxTrials {
				break
			}
		}
		return false, nil
	}
	if ok, err := holds(0); ok || err != nil {
		return 0, err
	}
	flood := s.Trials[0]
	low, high, rate := -1.0, flood.SentRate(), 0.95*flood.Rate()
	for len(s.Trials) < maxTrials && high > floorRate && (low < 0 || high/low > precision) {
		rate = math.Max(rate, floorRate)
		ok, err := holds(rate)
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
		case low >= high: // what holds now did not before: it is noise that separates them
			return low, nil
		default:
			rate = math.Sqrt(low * high)
		}
	}
	return low, nil
}
