package result

import (
	"cmp"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
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

// Failure is a mode, or a measure of a mode, that the first run has and that failed in the second.
type Failure struct {
	Mode   string `json:"mode"`
	Metric string `json:"metric,omitempty"` // the key of the measure's main metric; "" for the whole mode
	Title  string `json:"title,omitempty"`  // of Metric
	Why    string `json:"why"`
}

// Diff is the comparison of two runs.
type Diff struct {
	Notes   []string  `json:"notes"`   // what makes the runs hard to compare
	Changes []Change  `json:"changes"` // everything that both have
	Failed  []Failure `json:"failed"`  // what the second run could not measure as the first did
	Missing []string  `json:"missing"` // what only one of them has because the other was not to measure it, or has in too few rounds
}

// Regressed reports whether something got worse beyond noise, or failed in the second run.
func (d *Diff) Regressed() bool {
	return len(d.Failed) > 0 || slices.ContainsFunc(d.Changes, func(c Change) bool { return c.Beyond && c.Worse })
}

// Compare compares two runs. A change smaller than the share threshold never counts. The intervals hold with Confidence
// for all changes together (Bonferroni), so that a long list does not contain changes by chance. Both runs need
// IntervalRounds; an error says that they have fewer, or nothing in common.
func Compare(a, b *Run, threshold float64) (*Diff, error) {
	for i, r := range []*Run{a, b} {
		if n := r.MeasuredRounds(); n < IntervalRounds {
			return nil, fmt.Errorf("the %s run has %d rounds: noise can be told from change with %d or more (--rounds)", []string{"first", "second"}[i], n, IntervalRounds)
		}
	}
	d := &Diff{Notes: differences(a, b), Changes: []Change{}, Failed: []Failure{}, Missing: []string{}}
	var pairs []both
	for i := range a.Modes {
		m := &a.Modes[i]
		if m.Missing != "" {
			continue
		}
		switch other := twin(a, b, m.Name); {
		case other == nil:
			d.Missing = append(d.Missing, m.Name+onlyFirst)
		case other.Missing != "":
			d.Failed = append(d.Failed, Failure{Mode: m.Name, Why: oneLine(other.Missing)})
		default:
			pairs = append(pairs, d.match(a, b, m, other)...)
		}
	}
	for _, m := range b.Modes {
		if other := twin(b, a, m.Name); m.Missing == "" && (other == nil || other.Missing != "") {
			d.Missing = append(d.Missing, m.Name+onlySecond)
		}
	}
	if len(pairs) == 0 && len(d.Failed) == 0 {
		return nil, fmt.Errorf("the runs have nothing in common: %s", strings.Join(d.Missing, "; "))
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

// both is a metric that two runs have in enough rounds.
type both struct {
	mode   string
	metric Metric
	a, b   []float64
}

// Which run has what the other has not.
const onlyFirst, onlySecond = ": only in the first run", ": only in the second run"

// twin is the mode of another run that the mode of a run is compared with; nil: none.
func twin(of, other *Run, name string) *Mode {
	if of.Kind == Pair && other.Kind == Pair && len(of.Modes) == 1 && len(other.Modes) == 1 {
		return &other.Modes[0] // two labels of one path
	}
	for i := range other.Modes {
		if other.Modes[i].Name == name {
			return &other.Modes[i]
		}
	}
	return nil
}

// match returns what can be compared of a mode, and lists what cannot.
func (d *Diff) match(a, b *Run, m, other *Mode) (pairs []both) {
	metrics := slices.Clone(a.Metrics)
	for _, k := range b.Metrics {
		if !a.has(k.Key) {
			metrics = append(metrics, k)
		}
	}
	told := map[string]bool{} // measures of which was said what there is to say
	for _, k := range metrics {
		va, vb := Column(m.Rounds, k.Key), Column(other.Rounds, k.Key)
		main := cmp.Or(a.mains[k.Key], b.mains[k.Key])
		if k.explains() || told[main] || len(va)+len(vb) == 0 {
			continue
		}
		miss := func(text string) {
			d.Missing = append(d.Missing, m.Name+" "+k.Key+text)
			told[main] = told[main] || k.Key == main
		}
		switch {
		case len(va) == 0:
			miss(onlySecond)
		case len(vb) == 0 && !(k.Key == main && b.tried(other, main)):
			miss(onlyFirst)
		case k.Key == main && len(vb)*len(m.Rounds) < len(va)*len(other.Rounds):
			why := fmt.Sprintf("in %d of %d rounds, in the first run in %d of %d", len(other.Rounds)-len(vb), len(other.Rounds), len(m.Rounds)-len(va), len(m.Rounds))
			d.Failed = append(d.Failed, Failure{m.Name, k.Key, k.Title, why})
			told[main] = len(vb) < IntervalRounds
		case len(va) < IntervalRounds || len(vb) < IntervalRounds:
			miss(fmt.Sprintf(": in fewer than %d rounds", IntervalRounds))
		}
		if len(va) >= IntervalRounds && len(vb) >= IntervalRounds {
			pairs = append(pairs, both{m.Name, k, va, vb})
		}
	}
	return pairs
}

// tried reports whether a run set out to take a measure, which has no value. Runs that do not record it leave an error behind.
func (r *Run) tried(m *Mode, main string) bool {
	if len(r.Asked) > 0 {
		return slices.Contains(r.Asked, main)
	}
	return len(m.Errors) > 0
}

// leastStep is the least change that counts of a value that may be 0, in its unit.
const leastStep = 0.1

// absolute judges values that may be 0, such as a loss in per cent: beyond noise are rounds that do not overlap, and
// medians that differ by leastStep.
func (c *Change) absolute(a, b []float64) {
	c.Beyond = (slices.Min(b) > slices.Max(a) || slices.Max(b) < slices.Min(a)) && math.Abs(c.B-c.A) >= leastStep
}

// differences are facts in which the runs differ.
func differences(a, b *Run) []string {
	notes := []string{}
	say := func(what string, x, y any) {
		if x != y {
			notes = append(notes, fmt.Sprintf("%s: %v and %v", what, x, y))
		}
	}
	say("kind", a.Kind, b.Kind)
	if len(a.Modes) == 1 && len(b.Modes) == 1 && twin(a, b, a.Modes[0].Name) != nil {
		say("label", a.Modes[0].Name, b.Modes[0].Name)
	}
	say("MTU", a.MTU, b.MTU)
	say("wire", a.Wire, b.Wire)
	say("family", a.Family, b.Family)
	say("seconds of each measure", a.Duration, b.Duration)
	if x, y := a.fixedRate(), b.fixedRate(); x > 0 && y > 0 {
		say("datagrams a second at the fixed rate", x, y)
	}
	say("limits", none(strings.Join(a.Limits, " ")), none(strings.Join(b.Limits, " ")))
	say("number of machines", len(a.Machines), len(b.Machines))
	for i := range min(len(a.Machines), len(b.Machines)) {
		x, y := a.Machines[i], b.Machines[i]
		end := x.End
		if end != "" {
			end += ": "
		}
		say(end+"kernel", x.Kernel, y.Kernel)
		say(end+"architecture", x.Arch, y.Arch)
		say(end+"CPU", x.CPU, y.CPU)
		say(end+"CPUs", x.CPUs, y.CPUs)
		say(end+"usable CPUs", x.Usable, y.Usable)
		say(end+"CPU quota", quota(x), quota(y))
		say(end+"idle CPUs", x.Awake, y.Awake)
		say(end+"TCP congestion control", x.Congestion, y.Congestion)
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

// fixedRate is the rate of the open loop, in datagrams a second; 0: there was none.
func (r *Run) fixedRate() float64 {
	for _, m := range r.Modes {
		for _, d := range m.Rounds {
			for _, l := range d.Latency {
				if l.Kind == OpenLoop {
					return l.Offered
				}
			}
		}
	}
	return 0
}

func none(s string) string { return cmp.Or(s, "none") }

func quota(m Machine) string {
	if m.Quota == 0 {
		return "none"
	}
	return Digits(m.Quota)
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
	text := fmt.Sprintf("%d worse and %d better beyond noise, of %d measures.", worse, better, len(d.Changes))
	if n := len(d.Failed); n > 0 {
		text += fmt.Sprintf(" %d FAILED in the second run.", n)
	}
	p.line("%s", text)
	for _, f := range d.Failed {
		p.paragraph(strings.Join(slices.DeleteFunc([]string{"FAILED in the second run: " + f.Mode, f.Title, f.Why}, func(s string) bool { return s == "" }), ": "), "  ")
	}
	for _, n := range d.Notes {
		p.paragraph("! "+n, "  ")
	}
	if len(rows) > 1 {
		p.line("")
		p.table(rows)
	}
	for _, m := range d.Missing {
		p.line("Not compared: %s", m)
	}
	return p.err
}
