package result

import (
	"fmt"
	"io"
	"math"
	"slices"
)

// Change is a metric of a mode in two runs.
type Change struct {
	Mode   string  `json:"mode"`
	Metric Metric  `json:"metric"`
	A      float64 `json:"a"`     // median of the first run
	B      float64 `json:"b"`     // median of the second
	Ratio  float64 `json:"ratio"` // B ÷ A
	Low    float64 `json:"low"`   // interval of Ratio
	High   float64 `json:"high"`
	Worse  bool    `json:"worse"`
	// Beyond reports whether the change is beyond noise: the interval excludes 1, and the change is at least the threshold.
	Beyond bool `json:"beyond_noise"`
}

// Diff is the comparison of two runs.
type Diff struct {
	Notes   []string `json:"notes"`   // what makes the runs hard to compare
	Changes []Change `json:"changes"` // everything that both have
	Missing []string `json:"missing"` // what only one of them has
}

// Regressed reports whether something got worse beyond noise, or was measured in the first run only.
func (d *Diff) Regressed() bool {
	return slices.ContainsFunc(d.Changes, func(c Change) bool { return c.Beyond && c.Worse })
}

// Compare compares two runs. A change smaller than the share threshold never counts. The intervals hold with Confidence
// for all changes together (Bonferroni), so that a long list does not contain changes by chance. Both runs need
// IntervalRounds; an error says that they have fewer.
func Compare(a, b *Run, threshold float64) (*Diff, error) {
	for i, r := range []*Run{a, b} {
		if n := r.measuredRounds(); n < IntervalRounds {
			return nil, fmt.Errorf("the %s run has %d rounds: noise can be told from change with %d or more (--rounds)", []string{"first", "second"}[i], n, IntervalRounds)
		}
	}
	d := &Diff{Notes: differences(a, b)}
	type both struct {
		mode   string
		metric Metric
		a, b   []float64
	}
	var pairs []both
	for _, m := range a.Modes {
		other := b.Mode(m.Name)
		if a.Kind == Pair && b.Kind == Pair && len(a.Modes) == 1 && len(b.Modes) == 1 {
			other = &b.Modes[0] // two labels of one path
		}
		if m.Missing != "" {
			continue
		}
		if other == nil {
			d.Missing = append(d.Missing, m.Name)
			continue
		}
		for _, metric := range a.Metrics {
			if metric.explains() {
				continue
			}
			va, vb := Column(m.Rounds, metric.Key), Column(other.Rounds, metric.Key)
			switch {
			case len(va) >= IntervalRounds && len(vb) >= IntervalRounds:
				pairs = append(pairs, both{m.Name, metric, va, vb})
			case len(va) > 0:
				d.Missing = append(d.Missing, m.Name+" "+metric.Key)
			}
		}
	}
	confidence := 1 - (1-Confidence)/float64(max(len(pairs), 1))
	for _, p := range pairs {
		c := Change{Mode: p.mode, Metric: p.metric, A: SpreadOf(p.a).Median, B: SpreadOf(p.b).Median}
		if c.A == 0 || SpreadOf(p.a).Min <= 0 || SpreadOf(p.b).Min < 0 { // loss: a ratio to nothing says nothing
			c.absolute(p.a, p.b)
		} else {
			c.Ratio, c.Low, c.High = RatioOf(p.b, p.a, confidence)
			c.Beyond = (c.Low > 1 || c.High < 1) && math.Abs(c.Ratio-1) >= threshold
		}
		c.Worse = c.B != c.A && p.metric.Higher == (c.B < c.A)
		d.Changes = append(d.Changes, c)
	}
	return d, nil
}

// leastStep is the least change that counts of a value that may be 0, in its unit.
const leastStep = 0.1

// absolute judges values that may be 0, such as a loss in per cent: beyond noise are rounds that do not overlap, and
// medians that differ by leastStep.
func (c *Change) absolute(a, b []float64) {
	c.Beyond = (slices.Min(b) > slices.Max(a) || slices.Max(b) < slices.Min(a)) && math.Abs(c.B-c.A) >= leastStep
}

// differences are facts in which the runs differ.
func differences(a, b *Run) (notes []string) {
	say := func(what string, x, y any) {
		if x != y {
			notes = append(notes, fmt.Sprintf("%s: %v and %v", what, x, y))
		}
	}
	say("kind", a.Kind, b.Kind)
	say("MTU", a.MTU, b.MTU)
	say("wire", a.Wire, b.Wire)
	say("family", a.Family, b.Family)
	say("seconds of each measure", a.Duration, b.Duration)
	say("number of machines", len(a.Machines), len(b.Machines))
	for i := range min(len(a.Machines), len(b.Machines)) {
		x, y := a.Machines[i], b.Machines[i]
		end := x.End
		if end != "" {
			end += ": "
		}
		say(end+"kernel", x.Kernel, y.Kernel)
		say(end+"CPU", x.CPU, y.CPU)
		say(end+"CPUs", x.CPUs, y.CPUs)
		say(end+"link MTU", x.LinkMTU, y.LinkMTU)
		say(end+"offloads", fmt.Sprint(x.Offloads), fmt.Sprint(y.Offloads))
	}
	for i, r := range []*Run{a, b} {
		for _, w := range r.Warnings {
			notes = append(notes, fmt.Sprintf("the %s run is not to be trusted: %s", []string{"first", "second"}[i], w))
		}
	}
	return notes
}

// Print writes what changed, or if verbose everything.
func (d *Diff) Print(w io.Writer, verbose bool) error {
	p := &tables{w: w}
	worse, better := 0, 0
	rows := [][]string{{"MODE", "MEASURE", "A", "B", "UNIT", "B ÷ A", "INTERVAL", ""}}
	for _, c := range d.Changes {
		verdict := "within noise"
		if c.Beyond && c.Worse {
			verdict = "WORSE"
			worse++
		} else if c.Beyond {
			verdict = "better"
			better++
		}
		if !verbose && !c.Beyond {
			continue
		}
		ratio, interval := nothing, nothing
		if c.Ratio != 0 {
			ratio, interval = Digits(c.Ratio), Digits(c.Low)+"–"+Digits(c.High)
		}
		rows = append(rows, []string{c.Mode, c.Metric.Title, Digits(c.A), Digits(c.B), c.Metric.Unit, ratio, interval, verdict})
	}
	p.line("%d worse and %d better beyond noise, of %d measures.", worse, better, len(d.Changes))
	for _, n := range d.Notes {
		p.paragraph("! "+n, "  ")
	}
	if len(rows) > 1 {
		p.line("")
		p.table(rows)
	}
	for _, m := range d.Missing {
		p.line("Not in both runs, or in fewer than %d rounds: %s", IntervalRounds, m)
	}
	return p.err
}
