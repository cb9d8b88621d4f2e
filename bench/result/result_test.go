package result

import (
	"bytes"
	"encoding/json"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestSpread(t *testing.T) {
	for _, tc := range []struct {
		in   []float64
		want Spread
	}{
		{nil, Spread{}},
		{[]float64{7}, Spread{N: 1, Median: 7, Min: 7, Max: 7}},
		{[]float64{3, 1}, Spread{N: 2, Median: 2, Min: 1, Max: 3}},
		{[]float64{9, 1, 2}, Spread{N: 3, Median: 2, Min: 1, Max: 9}},
		{[]float64{4, 1, 3, 100}, Spread{N: 4, Median: 3.5, Min: 1, Max: 100}},
	} {
		before := slices.Clone(tc.in)
		if got := SpreadOf(tc.in); got != tc.want {
			t.Errorf("%v: got %+v, want %+v", tc.in, got, tc.want)
		}
		if !slices.Equal(before, tc.in) {
			t.Errorf("%v was sorted in place: the order of rounds is lost", before)
		}
	}
}

// Ratios pair the values of a round; the ratio of the medians would be another.
func TestRatiosArePaired(t *testing.T) {
	rounds := func(values ...map[string]float64) (out []Round) {
		for _, v := range values {
			out = append(out, Round{Values: v})
		}
		return out
	}
	type m = map[string]float64
	a := rounds(m{"x": 10}, m{"x": 2}, m{}, m{"x": 6}, m{"x": 5})
	b := rounds(m{"x": 5}, m{"x": 4}, m{"x": 1}, m{"y": 1}, m{"x": 0})
	if got := Ratios(a, b, "x"); !slices.Equal(got, []float64{2, 0.5}) {
		t.Errorf("got %v", got)
	}
}

func TestDigits(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.0123: "0.012", 0.5: "0.50", 9.876: "9.88", 12.34: "12.3", 187654: "187654", -3: "-3.00"} {
		if got := Digits(v); got != want {
			t.Errorf("%v: got %q, want %q", v, got, want)
		}
	}
}

// What a long queue still held when the sender stopped arrives later, and is no faster for it.
func TestTrialRate(t *testing.T) {
	tr := Trial{Sent: 1000, Received: 900, Seconds: 1, Arriving: 899. / 600}
	if tr.Rate() != 600 || tr.SentRate() != 1000 || math.Abs(tr.Loss()-0.1) > 1e-9 {
		t.Errorf("got %v, %v, %v", tr.Rate(), tr.SentRate(), tr.Loss())
	}
	for _, arriving := range []float64{0.001, 0} { // everything came at once, at the end
		if tr.Arriving = arriving; tr.Rate() != 900 {
			t.Errorf("got %v", tr.Rate())
		}
	}
	// A path of 80 a second, whose queue has room for all that a short trial sends.
	slow := Trial{Sent: 11, Received: 11, Seconds: 0.125, Arriving: 10. / 80}
	if slow.Rate() != 80 {
		t.Errorf("a path that carries 80 a second was found to carry %v", slow.Rate())
	}
}

// oneRound is what one round may have found of TCP with one stream.
func oneRound(gbps float64) Round {
	return Round{TCP: []TCP{{Streams: 1, Bytes: 1e9, Seconds: 1, Gbps: gbps, CPU: CPUUse{Busy: 2}}}}
}

func TestAtAGlance(t *testing.T) {
	r := &Run{MTU: 1500, References: []string{"kernel-vxlan"}, Wire: "cut", Rounds: 2, Modes: []Mode{
		{Name: "kernel-vxlan", Rounds: []Round{oneRound(5), oneRound(4)}}, {Name: "udp", Tulle: true, Rounds: []Round{oneRound(6), oneRound(5)}},
	}}
	r.Summarise()
	var table, csv bytes.Buffer
	if err := r.Print(&table, false); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"Tulle udp carries 1.23 × kernel-vxlan in one TCP stream, takes 1.00 × its CPU.\n", "kernel-vxlan  4.50         –     2.00       –\n", "udp           5.50         1.23  2.00       1.00\n",
	} {
		if !strings.Contains(table.String(), want) {
			t.Errorf("lacks %q:\n%s", want, table.String())
		}
	}
	if n := strings.Count(table.String(), "\n"); n > 10 {
		t.Errorf("%d lines are no glance:\n%s", n, table.String())
	}
	if err := r.WriteCSV(&csv); err != nil {
		t.Fatal(err)
	}
	if got := csv.String(); !strings.HasPrefix(got, "mode,metric,unit,round,value\nkernel-vxlan,tcp1_gbps,Gb/s,1,5\nkernel-vxlan,tcp1_gbps,Gb/s,2,4\n") {
		t.Errorf("CSV:\n%s", got)
	}
}

// Every run has a table for a README, whatever was measured: it would be too late to say that there is none.
func TestMarkdown(t *testing.T) {
	latency := func(kind string, size int, pinned bool) Round {
		l := Latency{Kind: kind, Payload: size, Pinned: pinned, Seconds: 1, Answers: 1, Times: NewHistogram()}
		l.Times.Record(20 * time.Microsecond)
		return Round{Latency: []Latency{l}}
	}
	for name, tc := range map[string]struct {
		kind  string
		modes []string
		round Round
		want  string
	}{
		"latency of a pair":          {Pair, []string{"net"}, latency(PingPong, 64, false), "| mode | half RTT 64 B p50, µs |\n|---|---|\n| `net` | 10.0 |\n"},
		"another size":               {Pair, []string{"net"}, latency(PingPong, 1400, false), "| mode | half RTT 1,400 B p50, µs |\n|---|---|\n| `net` | 10.0 |\n"},
		"another size in a lab":      {Lab, []string{"udp", "vxlan"}, latency(PingPong, 1400, true), "| mode | half RTT 1,400 B pinned p50, µs |\n|---|---|\n| `udp` | 10.0 |\n| `vxlan` | 10.0 |\n"},
		"paths":                      {Pair, []string{"udp", "vxlan"}, latency(RR, 0, false), "| mode | TCP request/response p50, µs |\n"},
		"memory":                     {Lab, []string{"udp"}, Round{RSS: 5e6}, "| mode | memory, MB |\n|---|---|\n| `udp` | 5.00 |\n"},
		"nothing, as all has failed": {Pair, []string{"net"}, Round{}, "| mode |\n|---|\n| `net` |\n"},
	} {
		r := &Run{Kind: tc.kind, Rounds: 1}
		for _, m := range tc.modes {
			r.Modes = append(r.Modes, Mode{Name: m, Rounds: []Round{tc.round}, Errors: []string{"round 1: no answer"}})
		}
		r.Summarise()
		var out, table bytes.Buffer
		if err := r.WriteMarkdown(&out); err != nil || !strings.HasPrefix(out.String(), tc.want) || !strings.Contains(out.String(), "` failed: round 1: no answer\n") {
			t.Errorf("%s: %v\n%s", name, err, out.String())
		}
		if err := r.Print(&table, true); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Intervals of the median cover the median of the distribution as often as they say, and ratios of equals cover 1.
func TestIntervalsCover(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 7))
	for _, n := range []int{5, 7, 9, 15} {
		for name, draw := range map[string]func() float64{
			"normal":      func() float64 { return 10 + rng.NormFloat64() },
			"log-normal":  func() float64 { return 10 * math.Exp(rng.NormFloat64()/2) },
			"uniform":     func() float64 { return 5 + 10*rng.Float64() },
			"exponential": func() float64 { return 10 / math.Ln2 * rng.ExpFloat64() },
		} {
			const runs = 300
			covered, one := 0, 0
			for range runs {
				var a, b []Round
				for range n {
					common := math.Exp(rng.NormFloat64()) // the machine's mood in this round affects both
					a = append(a, Round{Values: map[string]float64{"x": common * draw()}})
					b = append(b, Round{Values: map[string]float64{"x": common * draw()}})
				}
				var plain []float64
				for range n {
					plain = append(plain, draw())
				}
				if SpreadOf(plain).Covers(10) {
					covered++
				}
				if SpreadOf(Ratios(a, b, "x")).Covers(1) {
					one++
				}
			}
			// 94 % at five rounds, and never less; 300 runs leave a standard error of 1.4 %.
			if covered < runs*90/100 || one < runs*90/100 {
				t.Errorf("%s, %d rounds: the interval of the median covers it in %d of %d runs, that of a ratio of equals 1 in %d", name, n, covered, runs, one)
			}
		}
	}
	if s := SpreadOf([]float64{1, 2, 3, 4}); s.Certain() || s.Covers(2) || s.Low != 0 {
		t.Errorf("four rounds have an interval: %+v", s)
	}
	wide, narrow := SpreadOf([]float64{1, 2, 3, 4, 5, 6, 7, 8, 9}), SpreadOf([]float64{4.8, 4.9, 5, 5.1, 5.2, 5, 5, 5, 5})
	if wide.High-wide.Low <= narrow.High-narrow.Low || wide.Low < wide.Min || wide.High > wide.Max {
		t.Errorf("%+v is not wider than %+v", wide, narrow)
	}
}

// tcpRun is a run of n rounds of two modes around given rates, in Gb/s, which vary by a few per cent.
func tcpRun(rng *rand.Rand, n int, udp, vxlan float64) *Run {
	r := &Run{Format: Format, Version: Version, Kind: Lab, References: []string{"kernel-vxlan"}, Modes: []Mode{{Name: "kernel-vxlan"}, {Name: "udp", Tulle: true}}}
	for range n {
		for i, base := range []float64{vxlan, udp} {
			r.Modes[i].Rounds = append(r.Modes[i].Rounds, oneRound(base*(1+0.02*rng.NormFloat64())))
		}
	}
	r.Rounds = n
	r.Summarise()
	return r
}

func TestCompare(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	for _, tc := range []struct {
		name             string
		udp              float64 // of the second run
		better, worse    bool
		rounds, quantity int
	}{
		{"nothing", 5, false, false, 9, 0}, {"slower", 4, false, true, 9, 1}, {"faster", 6, true, false, 9, 1}, {"five rounds", 4, false, true, 5, 1},
	} {
		d, err := Compare(tcpRun(rng, tc.rounds, 5, 5), tcpRun(rng, tc.rounds, tc.udp, 5), 0.03)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range d.Changes {
			if c.Metric.Key != "tcp1_gbps" {
				continue
			}
			want := c.Mode == "udp" && (tc.better || tc.worse)
			if c.Beyond != want || want && c.Worse != tc.worse {
				t.Errorf("%s: %+v", tc.name, c)
			}
		}
		if d.Regressed() != tc.worse {
			t.Errorf("%s: regressed %v", tc.name, d.Regressed())
		}
		var out bytes.Buffer
		if err := d.Print(&out, false); err != nil || strings.Contains(out.String(), "WORSE") != tc.worse {
			t.Errorf("%s: %v\n%s", tc.name, err, out.String())
		}
	}
	a, b := tcpRun(rng, 5, 5, 5), tcpRun(rng, 4, 5, 5)
	if _, err := Compare(a, b, 0.03); err == nil || !strings.Contains(err.Error(), "the second run has 4 rounds: noise can be told from change with 5") {
		t.Errorf("four rounds: %v", err)
	}
}

// without is a copy of a run whose mode udp lacks what cut takes away.
func without(r *Run, cut func(m *Mode)) *Run {
	c := *r
	c.Modes = slices.Clone(r.Modes)
	m := &c.Modes[1]
	m.Rounds = slices.Clone(m.Rounds)
	cut(m)
	c.Summarise()
	return &c
}

// What the first run has and the second could not measure is a regression; what the second was not to measure is none.
func TestCompareFailed(t *testing.T) {
	full := tcpRun(rand.New(rand.NewPCG(3, 3)), 5, 5, 5)
	for i := range full.Modes {
		for j := range full.Modes[i].Rounds {
			full.Modes[i].Rounds[j].Floods = []Flood{{Flows: 1, Payload: 1000, Trial: Trial{Sent: 100, Received: 100, Seconds: 1}}}
		}
	}
	full.Summarise()
	asked := func(r *Run, keys ...string) *Run {
		c := *r
		c.Asked = keys
		return &c
	}
	tcpFails := func(rounds int) func(m *Mode) {
		return func(m *Mode) {
			for i := range rounds {
				m.Rounds[i].TCP = nil
				m.Errors = append(m.Errors, "round: TCP, one stream: no byte arrived")
			}
		}
	}
	noFlood := func(m *Mode) {
		for i := range m.Rounds {
			m.Rounds[i].Floods = nil
		}
	}
	noCPU := func(m *Mode) {
		for i := range m.Rounds {
			m.Rounds[i].TCP = []TCP{{Streams: 1, Bytes: 1e9, Seconds: 1, Gbps: m.Rounds[i].TCP[0].Gbps}}
		}
	}
	for _, tc := range []struct {
		name            string
		a, b            *Run
		failed, missing []string // beginnings
	}{
		{"nothing", full, full, nil, nil},
		{"one round", full, without(full, tcpFails(1)), []string{"udp tcp1_gbps in 1 of 5 rounds, in the first run in 0 of 5"}, nil},
		{"all rounds", full, without(full, tcpFails(5)), []string{"udp tcp1_gbps in 5 of 5 rounds"}, nil},
		{"all rounds, and that is recorded", full, asked(without(full, tcpFails(5)), "tcp1_gbps", "udp_flood1_gbps"), []string{"udp tcp1_gbps in 5 of 5"}, nil},
		{"as often in both", without(full, tcpFails(1)), without(full, tcpFails(1)), nil, []string{"udp tcp1_gbps: in fewer than 5 rounds"}},
		{"in the first run", without(full, tcpFails(1)), full, nil, []string{"udp tcp1_gbps: in fewer than 5 rounds"}},
		{"the mode", full, without(full, func(m *Mode) { m.Rounds, m.Missing = nil, "no answer" }), []string{"udp  no answer"}, nil},
		{"the mode in the first run", without(full, func(m *Mode) { m.Rounds, m.Missing = nil, "no answer" }), full, nil, []string{"udp: only in the second run"}},
		{"a mode left out", full, without(full, func(m *Mode) { m.Name = "vxlan" }), nil, []string{"udp: only in the first run", "vxlan: only in the second run"}},
		{"a measure left out", full, without(full, noFlood), nil, []string{"udp udp_flood1_gbps: only in the first run"}},
		{"a measure left out while another failed", full, asked(without(full, func(m *Mode) { noFlood(m); tcpFails(1)(m) }), "tcp1_gbps"),
			[]string{"udp tcp1_gbps in 1 of 5"}, []string{"udp udp_flood1_gbps: only in the first run"}},
		{"a measure added", without(full, noFlood), full, nil, []string{"udp udp_flood1_gbps: only in the second run"}},
		{"CPU time that cannot be read", full, without(full, noCPU), nil, []string{
			"udp cpu_s_per_gb: only in the first run", "udp gbps_per_cpu: only", "udp softirq_s_per_gb: only", "udp tunnel_cpu_s_per_gb: only",
		}},
	} {
		d, err := Compare(tc.a, tc.b, 0.03)
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		var failed []string
		for _, f := range d.Failed {
			failed = append(failed, f.Mode+" "+f.Metric+" "+f.Why)
		}
		if begins := strings.HasPrefix; !slices.EqualFunc(failed, tc.failed, begins) || !slices.EqualFunc(d.Missing, tc.missing, begins) || d.Regressed() != (len(tc.failed) > 0) {
			t.Errorf("%s: failed %q, missing %q, regressed %v", tc.name, failed, d.Missing, d.Regressed())
		}
	}
	nothing := without(full, func(m *Mode) { m.Name = "vxlan" })
	nothing.Modes = nothing.Modes[1:]
	if _, err := Compare(full, nothing, 0.03); err == nil || !strings.Contains(err.Error(), "the runs have nothing in common: kernel-vxlan: only in the first run") {
		t.Errorf("nothing in common: %v", err)
	}
}

// What a comparison has none of is an empty list for programs.
func TestCompareLists(t *testing.T) {
	a := tcpRun(rand.New(rand.NewPCG(3, 3)), 5, 5, 5)
	d, err := Compare(a, a, 0.03)
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(d)
	if err != nil || strings.Contains(string(b), "null") || !strings.Contains(string(b), `"notes":[]`) || !strings.Contains(string(b), `"missing":[]`) {
		t.Errorf("%v: %s", err, b)
	}
}

// What makes two runs hard to compare is said: other machines, another way to measure, another limit.
func TestCompareNotes(t *testing.T) {
	run := func(change func(r *Run, m *Machine, l *Latency)) *Run {
		r := tcpRun(rand.New(rand.NewPCG(3, 3)), 5, 5, 5)
		r.Machines, r.MTU, r.Duration, r.Wire, r.Family = []Machine{{Kernel: "6.12", CPUs: 4, Usable: 4, Arch: "amd64", Congestion: "cubic", Awake: "polls"}}, 1500, 1, "cut", "IPv4"
		r.Modes[0].Rounds[0].Latency = []Latency{{Kind: OpenLoop, Payload: 64, Offered: 1000}}
		if change != nil {
			change(r, &r.Machines[0], &r.Modes[0].Rounds[0].Latency[0])
		}
		r.Summarise()
		return r
	}
	for name, tc := range map[string]struct {
		change func(r *Run, m *Machine, l *Latency)
		want   string
	}{
		"nothing":           {nil, ""},
		"kernel":            {func(_ *Run, m *Machine, _ *Latency) { m.Kernel = "6.1" }, "kernel: 6.12 and 6.1"},
		"MTU":               {func(r *Run, _ *Machine, _ *Latency) { r.MTU = 1400 }, "MTU: 1500 and 1400"},
		"wire":              {func(r *Run, _ *Machine, _ *Latency) { r.Wire = "whole" }, "wire: cut and whole"},
		"congestion":        {func(_ *Run, m *Machine, _ *Latency) { m.Congestion = "bbr" }, "TCP congestion control: cubic and bbr"},
		"quota":             {func(_ *Run, m *Machine, _ *Latency) { m.Quota = 1.5 }, "CPU quota: none and 1.50"},
		"affinity":          {func(_ *Run, m *Machine, _ *Latency) { m.Usable = 1 }, "usable CPUs: 4 and 1"},
		"idle CPUs":         {func(_ *Run, m *Machine, _ *Latency) { m.Awake = "halt" }, "idle CPUs: polls and halt"},
		"architecture":      {func(_ *Run, m *Machine, _ *Latency) { m.Arch = "arm64" }, "architecture: amd64 and arm64"},
		"rate":              {func(_ *Run, _ *Machine, l *Latency) { l.Offered = 5000 }, "datagrams a second at the fixed rate: 1000 and 5000"},
		"limit":             {func(r *Run, _ *Machine, _ *Latency) { r.Limits = []string{"At most 1 Gb/s."} }, "limits: none and At most 1 Gb/s."},
		"not to be trusted": {func(r *Run, _ *Machine, _ *Latency) { r.Warnings = []string{"busy"} }, "the second run is not to be trusted: busy"},
	} {
		d, err := Compare(run(nil), run(tc.change), 0.03)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(d.Notes, "|"); got != tc.want {
			t.Errorf("%s: got %q, want %q", name, got, tc.want)
		}
	}
	label := func(name string) *Run {
		return run(func(r *Run, _ *Machine, _ *Latency) { r.Kind, r.Modes, r.Modes[0].Name = Pair, r.Modes[:1], name })
	}
	d, err := Compare(label("flannel"), label("cilium"), 0.03)
	if err != nil || len(d.Notes) != 1 || d.Notes[0] != "label: flannel and cilium" {
		t.Errorf("two networks: %v, %+v", err, d)
	}
}

// Of runs that differ by nothing but noise, few are told apart.
func TestCompareNoise(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 5))
	alarms := 0
	for range 40 {
		d, err := Compare(tcpRun(rng, 5, 5, 5), tcpRun(rng, 5, 5, 5), 0.03)
		if err != nil {
			t.Fatal(err)
		}
		if d.Regressed() {
			alarms++
		}
	}
	if alarms > 2 {
		t.Errorf("%d of 40 pairs of equal runs are regressions", alarms)
	}
}

func TestStored(t *testing.T) {
	r := tcpRun(rand.New(rand.NewPCG(1, 1)), 5, 5, 4)
	l := Latency{Kind: PingPong, Payload: 64, Seconds: 1, Times: NewHistogram()}
	for i := range 1000 {
		l.Times.Record(time.Duration(i) * time.Microsecond)
		l.Answers++
	}
	r.Modes[1].Rounds[0].Latency = []Latency{l}
	r.Summarise()
	var stored bytes.Buffer
	if err := r.WriteJSON(&stored); err != nil {
		t.Fatal(err)
	}
	text := stored.String()
	back, err := Read(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	var again bytes.Buffer
	if err := back.WriteJSON(&again); err != nil || again.String() != text {
		t.Errorf("a stored run changes when it is read (%v)", err)
	}
	if got := back.Modes[1].Summary["rtt64_p50_us"].Median; math.Abs(got-249.75) > 1 {
		t.Errorf("half of 499.5 µs is %v", got)
	}
	for name, tc := range map[string]struct{ from, to, want string }{
		"no JSON":    {text, "hello", "no JSON result"},
		"other JSON": {text, "{}", `format "": want "tulle-bench"`},
		"newer":      {`"version": 1`, `"version": 2`, "version 2 of the format: this program reads version 1"},
		"histogram":  {`"times": "H`, `"times": "X`, "histogram"},
	} {
		if _, err := Read(strings.NewReader(strings.Replace(text, tc.from, tc.to, 1))); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want something about %q", name, err, tc.want)
		}
	}
}

// Whatever is damaged in a stored histogram is an error or another histogram, not a panic.
func TestDamagedHistogram(t *testing.T) {
	h := NewHistogram()
	for i := range 100 {
		h.Record(time.Duration(i*i) * time.Microsecond)
	}
	b, err := h.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	for i := 1; i < len(b)-1; i++ {
		for _, c := range []byte{'A', '/', '='} {
			bad := slices.Clone(b)
			bad[i] = c
			var got Histogram
			_ = got.UnmarshalJSON(bad)
			_ = got.UnmarshalJSON(append(bad[:i:i], '"'))
		}
	}
}

func TestVerdictNamesTheReference(t *testing.T) {
	latency := func(us int) Round {
		l := Latency{Kind: PingPong, Payload: 64, Pinned: true, Seconds: 1, Answers: 1, Times: NewHistogram()}
		l.Times.Record(time.Duration(us) * time.Microsecond)
		return Round{Latency: []Latency{l}}
	}
	r := &Run{References: []string{"kernel-vxlan"}, Modes: []Mode{{Name: "kernel-vxlan", Rounds: []Round{latency(10)}}, {Name: "udp", Tulle: true, Rounds: []Round{latency(20)}}}}
	r.Summarise()
	if got := r.Verdict(); got != "Tulle udp has 2.00 × kernel-vxlan's latency." {
		t.Errorf("got %q", got)
	}
}
