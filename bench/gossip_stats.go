package bench

import "slices"

// Quantiles summarise a sample, in its unit.
type Quantiles struct {
	N      int     `json:"n"`
	Min    float64 `json:"min"`
	Median float64 `json:"median"`
	P90    float64 `json:"p90"`
	P99    float64 `json:"p99"`
	Max    float64 `json:"max"`
}

// quantiles sorts the sample in place. The q-quantile is the smallest value that
// at least a share q of the sample does not exceed (nearest rank).
func quantiles(sample []float64) Quantiles {
	if len(sample) == 0 {
		return Quantiles{}
	}
	slices.Sort(sample)
	n := len(sample)
	rank := func(percent int) float64 { return sample[max(0, (n*percent+99)/100-1)] }
	return Quantiles{N: n, Min: sample[0], Median: rank(50), P90: rank(90), P99: rank(99), Max: sample[n-1]}
}
