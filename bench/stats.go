package bench

import "slices"

// Spread summarises the values of the rounds.
type Spread struct {
	N      int     `json:"n"`
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

// spreadOf summarises values. The median of an even number of values is the mean of the middle two.
func spreadOf(values []float64) Spread {
	n := len(values)
	if n == 0 {
		return Spread{}
	}
	s := slices.Sorted(slices.Values(values))
	return Spread{N: n, Median: (s[(n-1)/2] + s[n/2]) / 2, Min: s[0], Max: s[n-1]}
}

// Metric is a quantity with one value per round.
type Metric struct {
	Key    string `json:"key"`
	Title  string `json:"title"`
	Unit   string `json:"unit"`
	Higher bool   `json:"higher_is_better"`
}

// Round has the values of one round by Metric.Key. Values that could not be measured are missing.
type Round map[string]float64

// column returns the values of one metric, in the order of the rounds.
func column(rounds []Round, key string) []float64 {
	var out []float64
	for _, r := range rounds {
		if v, ok := r[key]; ok {
			out = append(out, v)
		}
	}
	return out
}

// ratios returns the ratio of a metric within each round that has both values. A disturbance of the machine in a round
// affects both.
func ratios(of, to []Round, key string) []float64 {
	var out []float64
	for i := range min(len(of), len(to)) {
		a, ok1 := of[i][key]
		b, ok2 := to[i][key]
		if ok1 && ok2 && b != 0 {
			out = append(out, a/b)
		}
	}
	return out
}
