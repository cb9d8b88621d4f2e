package result

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Times between these bounds are recorded with three significant digits.
const (
	Shortest = time.Nanosecond
	Longest  = 10 * time.Second
)

// Histogram counts times in nanoseconds. In JSON it is a string: HdrHistogram's compressed encoding V2 in base64, which
// the HdrHistogram libraries of other languages read.
type Histogram struct{ *hdrhistogram.Histogram }

// NewHistogram returns an empty histogram.
func NewHistogram() *Histogram {
	return &Histogram{hdrhistogram.New(int64(Shortest), int64(Longest), 3)}
}

// Record counts a time. Times beyond the bounds count as the bound.
func (h *Histogram) Record(d time.Duration) {
	_ = h.RecordValue(int64(min(max(d, Shortest), Longest))) // within the bounds it cannot fail
}

// MarshalJSON implements [json.Marshaler].
func (h *Histogram) MarshalJSON() ([]byte, error) {
	b, err := h.Encode(hdrhistogram.V2CompressedEncodingCookieBase)
	if err != nil {
		return nil, fmt.Errorf("encode a histogram: %w", err)
	}
	return json.Marshal(string(b))
}

// UnmarshalJSON implements [json.Unmarshaler]. Times beyond the bounds of NewHistogram are an error.
func (h *Histogram) UnmarshalJSON(b []byte) (err error) {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("histogram: %w", err)
	}
	defer func() { // the library trusts what it decodes
		if p := recover(); p != nil {
			err = fmt.Errorf("histogram: damaged: %v", p)
		}
	}()
	got, err := hdrhistogram.Decode([]byte(s))
	if err != nil {
		return fmt.Errorf("histogram: %w", err)
	}
	fresh := NewHistogram()
	if n := fresh.Merge(got); n > 0 || got.TotalCount() < 0 {
		return fmt.Errorf("histogram: %d times are not between %v and %v", n, Shortest, Longest)
	}
	h.Histogram = fresh.Histogram
	return nil
}

// Merged is the sum of the histograms of one measure over the rounds of a mode, as a Latency; nil if there are none.
func (m *Mode) Merged(kind string, payload int, pinned bool) *Latency {
	var sum *Latency
	for _, r := range m.Rounds {
		for _, l := range r.Latency {
			if l.Kind != kind || l.Payload != payload || l.Pinned != pinned || l.Times == nil {
				continue
			}
			if sum == nil {
				sum = &Latency{Kind: kind, Payload: payload, Pinned: pinned, Offered: l.Offered, Times: NewHistogram()}
			}
			sum.Times.Merge(l.Times.Histogram)
			sum.Answers += l.Answers
			sum.Lost += l.Lost
			sum.Seconds += l.Seconds
		}
	}
	return sum
}
