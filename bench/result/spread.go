package result

import (
	"math"
	"math/rand/v2"
	"slices"

	"gonum.org/v1/gonum/stat/distuv"
)

// Confidence is the nominal confidence of all intervals.
const Confidence = 0.95

// IntervalRounds is the least number of rounds for an interval of a median. With five, the interval is the range of the
// values, which covers the median of what is measured with a probability of 1 − 2·(1/2)^5 = 94 %; with fewer rounds no
// interval that rests on the values alone comes near 95 %.
const IntervalRounds = 5

// resamples is the number of resamples of a bootstrap.
const resamples = 4000

// Spread summarises the values of the rounds. Low and High are the interval of the median with Confidence, by bootstrap
// over the rounds; both are 0 if there are fewer than IntervalRounds.
type Spread struct {
	N      int     `json:"n"`
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	Low    float64 `json:"low,omitzero"`
	High   float64 `json:"high,omitzero"`
}

// Certain reports whether there were enough rounds for an interval.
func (s Spread) Certain() bool { return s.N >= IntervalRounds }

// Covers reports whether the interval contains a value.
func (s Spread) Covers(v float64) bool { return s.Certain() && s.Low <= v && v <= s.High }

// SpreadOf summarises values.
func SpreadOf(values []float64) Spread {
	n := len(values)
	if n == 0 {
		return Spread{}
	}
	sorted := slices.Sorted(slices.Values(values))
	s := Spread{N: n, Median: median(sorted), Min: sorted[0], Max: sorted[n-1]}
	if s.Certain() {
		s.Low, s.High = Bootstrap(Confidence, n, func(pick func(int) int) float64 {
			return resampledMedian(sorted, pick)
		})
	}
	return s
}

// median of an even number of values is the mean of the middle two.
func median(sorted []float64) float64 {
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// resampledMedian is the median of as many values as there are, each picked with pick(n), a number below n.
func resampledMedian(sorted []float64, pick func(int) int) float64 {
	n := len(sorted)
	var small [64]int
	picks := small[:] // how often each value was picked
	if n > len(small) {
		picks = make([]int, n)
	}
	for range n {
		picks[pick(n)]++
	}
	at := func(rank int) float64 {
		for i, k := range picks {
			if rank -= k; rank < 0 {
				return sorted[i]
			}
		}
		return sorted[n-1]
	}
	return (at((n-1)/2) + at(n/2)) / 2
}

// Bootstrap is the percentile interval of a statistic of n values (B. Efron, 1979): statistic computes it from one
// resample, whose elements it picks with pick(n), uniform below n. Percentiles of few values are too narrow, so the
// interval is expanded as T. Hesterberg proposes (What Teachers Should Know About the Bootstrap, 2015, §5.2). The same
// input gives the same interval.
func Bootstrap(confidence float64, n int, statistic func(pick func(n int) int) float64) (low, high float64) {
	rng := rand.New(rand.NewPCG(1, 2))
	got := make([]float64, resamples)
	for i := range got {
		got[i] = statistic(rng.IntN)
	}
	slices.Sort(got)
	size := float64(n)
	student := distuv.StudentsT{Sigma: 1, Nu: size - 1}.Quantile((1 - confidence) / 2)
	tail := distuv.UnitNormal.CDF(math.Sqrt(size/(size-1)) * student)
	at := int(tail * resamples)
	return got[at], got[resamples-1-at]
}

// RatioOf is the interval of median(a) ÷ median(b) for values that are not paired, such as those of two runs.
func RatioOf(a, b []float64, confidence float64) (ratio, low, high float64) {
	sortedA, sortedB := slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b))
	low, high = Bootstrap(confidence, min(len(a), len(b)), func(pick func(int) int) float64 {
		return resampledMedian(sortedA, pick) / resampledMedian(sortedB, pick)
	})
	return median(sortedA) / median(sortedB), low, high
}

// Column returns the values of one metric, in the order of the rounds.
func Column(rounds []Round, key string) []float64 {
	var out []float64
	for _, r := range rounds {
		if v, ok := r.Values[key]; ok {
			out = append(out, v)
		}
	}
	return out
}

// Ratios returns the ratio of a metric within each round that has both values. A disturbance of the machine in a round
// affects both.
func Ratios(of, to []Round, key string) []float64 {
	var out []float64
	for i := range min(len(of), len(to)) {
		a, ok1 := of[i].Values[key]
		b, ok2 := to[i].Values[key]
		if ok1 && ok2 && b != 0 {
			out = append(out, a/b)
		}
	}
	return out
}
