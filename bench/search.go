package bench

import "math"

// Limits of the search for the highest rate without loss.
const (
	lossAllowed  = 0.001 // of the datagrams of a trial
	precision    = 1.03  // between the rate that holds and the lowest known that does not
	maxTrials    = 14    // of one search, repetitions counted
	lossHopeless = 0.02  // a trial that loses more is not repeated
	floorRate    = 100.0 // datagrams a second, below which the search gives up
)

// RateSearch is the outcome of a search. Best.Received is 0 if no rate held.
type RateSearch struct {
	Payload int     `json:"payload"` // bytes of UDP payload
	Best    Trial   `json:"best"`    // of the trials that lost nearly nothing, the one in which most arrived
	Trials  []Trial `json:"trials"`
}

// searchRate looks for the highest rate at which a trial loses at most lossAllowed. The first trial sends as fast as it
// can: if that holds, the sender is the limit, and it is the result. Otherwise the rate is searched for by halving, in
// proportions, beginning near what arrived. A trial that loses a little is repeated once, because on a shared machine it
// may have been somebody else who took the core: a rate holds if one of two trials holds.
func searchRate(payload int, trial func(rate float64) (Trial, error)) (RateSearch, error) {
	s := RateSearch{Payload: payload}
	holds := func(rate float64) (bool, error) {
		for range 2 {
			t, err := trial(rate)
			if err != nil {
				return false, err
			}
			s.Trials = append(s.Trials, t)
			loss := t.Loss()
			if t.Received > 0 && loss <= lossAllowed {
				if s.Best.Received == 0 || t.Rate() > s.Best.Rate() {
					s.Best = t
				}
				return true, nil
			}
			if loss > lossHopeless || len(s.Trials) >= maxTrials {
				break
			}
		}
		return false, nil
	}
	ok, err := holds(0)
	if ok || err != nil {
		return s, err
	}
	flood := s.Trials[0]
	low, high, rate := 0.0, flood.SentRate(), 0.95*flood.Rate()
	for len(s.Trials) < maxTrials && high > floorRate && (low == 0 || high/low > precision) {
		rate = math.Max(rate, floorRate)
		ok, err := holds(rate)
		if err != nil {
			return s, err
		}
		if ok {
			low = rate
		} else {
			high = rate
		}
		switch {
		case low == 0:
			rate = high * 0.7
		case low >= high: // what holds now did not before: it is noise that separates them
			return s, nil
		default:
			rate = math.Sqrt(low * high)
		}
	}
	return s, nil
}
