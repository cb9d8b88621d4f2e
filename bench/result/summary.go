package result

import (
	"cmp"
	"fmt"
	"strings"
)

// Ratio is a metric of a mode divided by the same metric of a reference mode. It is taken within each round.
type Ratio struct {
	Mode   string `json:"mode"`
	To     string `json:"to"`
	Metric string `json:"metric"`
	Spread
}

// Target is a bound for the median of a ratio (docs/performance.md).
type Target struct {
	Mode     string  `json:"mode"`
	Metric   string  `json:"metric"`
	To       string  `json:"to"`
	Bound    float64 `json:"bound"` // a lower bound if AtLeast, else an upper bound
	AtLeast  bool    `json:"at_least"`
	Measured bool    `json:"measured"`
	Ratio    Spread  `json:"ratio"`
	Met      bool    `json:"met"`
}

// percentiles are reported of each latency.
var percentiles = []struct {
	key, title string
	percent    float64
}{{"p50", "p50", 50}, {"p90", "p90", 90}, {"p99", "p99", 99}, {"p99_9", "p99.9", 99.9}, {"max", "max", 100}}

// key is the beginning of the keys of a latency's metrics, and title is for people.
func (l *Latency) key() (key, title string) {
	switch l.Kind {
	case RR:
		return "rr", "TCP request/response"
	case Nagle:
		return "nagle", "TCP request in two writes"
	case CRR:
		return "crr", "TCP connect/request/response"
	case Loaded:
		return "loaded", fmt.Sprintf("half RTT %s B beside TCP streams", thousands(l.Payload))
	case OpenLoop:
		key, title = fmt.Sprintf("open%d", l.Payload), fmt.Sprintf("half RTT %s B at a fixed rate", thousands(l.Payload))
	case PingPong:
		key, title = fmt.Sprintf("rtt%d", l.Payload), fmt.Sprintf("half RTT %s B", thousands(l.Payload))
	default: // of a newer program
		return l.Kind, l.Kind
	}
	if l.Pinned {
		key, title = key+"_pinned", title+" pinned"
	}
	return key, title
}

func thousands(n int) string {
	s := fmt.Sprint(n)
	if n >= 1000 {
		return s[:len(s)-3] + "," + s[len(s)-3:]
	}
	return s
}

// found collects the values of a round, and the metrics that they belong to.
type found struct {
	values  map[string]float64
	metrics *[]Metric
	known   map[string]bool
	pair    bool              // see Run.Kind: the tunnel's processes are not known
	mains   map[string]string // see Run
	main    string            // of the measure at hand: its first metric
}

// measure begins with another measure.
func (f *found) measure(derive func(f *found)) {
	f.main = ""
	derive(f)
}

func (f *found) add(m Metric, v float64) {
	f.main = cmp.Or(f.main, m.Key)
	f.mains[m.Key] = f.main
	f.values[m.Key] = v
	if !f.known[m.Key] {
		f.known[m.Key] = true
		*f.metrics = append(*f.metrics, m)
	}
}

// derive computes the values of a round from what was measured.
func (d *Round) derive(f *found) {
	for _, t := range d.TCP {
		f.measure(t.derive)
	}
	for _, l := range d.Latency {
		f.measure(l.derive)
	}
	for _, s := range d.UDP {
		f.measure(s.derive)
	}
	for _, fl := range d.Floods {
		f.measure(fl.derive)
	}
	for _, b := range d.Breakdown {
		f.measure(b.derive)
	}
	if d.RSS > 0 {
		f.measure(func(f *found) { f.add(Metric{"rss_mb", "memory", "MB", false, "memory"}, float64(d.RSS)/1e6) })
	}
}

func (fl *Flood) derive(f *found) {
	key := fmt.Sprintf("udp_flood%d", fl.Flows)
	title := fmt.Sprintf("UDP %d %s", fl.Flows, map[bool]string{true: "flow", false: "flows"}[fl.Flows == 1])
	f.add(Metric{key + "_gbps", title, "Gb/s", true, "UDP throughput"}, fl.Trial.Rate()*float64(fl.Payload)*8/1e9)
	f.add(Metric{key + "_loss", title + " loss", "%", false, "UDP throughput"}, 100*fl.Trial.Loss())
}

func (t *TCP) derive(f *found) {
	n := t.Streams
	title := fmt.Sprintf("TCP %d %s", n, map[bool]string{true: "stream", false: "streams"}[n == 1])
	f.add(Metric{fmt.Sprintf("tcp%d_gbps", n), title, "Gb/s", true, "TCP throughput"}, t.Gbps)
	gb := float64(t.Bytes) / 1e9
	if n != 1 || gb == 0 || t.CPU == (CPUUse{}) { // /proc/stat is not readable everywhere
		return
	}
	if t.CPU.Busy > 0 { // else others were charged with all that the machine did
		f.add(Metric{"cpu_s_per_gb", "CPU, TCP 1 stream", "s/GB", false, "CPU"}, t.CPU.Busy/gb)
		f.add(Metric{"gbps_per_cpu", "TCP per busy CPU", "Gb/s", true, "CPU"}, t.Gbps*t.Seconds/t.CPU.Busy)
	}
	f.add(Metric{"softirq_s_per_gb", "of it softirqs", "s/GB", false, "CPU"}, t.CPU.SoftIRQ/gb)
	if f.pair {
		return
	}
	f.add(Metric{"tunnel_cpu_s_per_gb", "of it the tunnel's processes", "s/GB", false, "CPU"}, t.CPU.Agents/gb)
}

// lossSuffix ends the key of the loss of a latency measure.
const lossSuffix = "_loss"

func (l *Latency) derive(f *found) {
	if l.Times == nil || l.Times.TotalCount() == 0 {
		return
	}
	key, title := l.key()
	for _, p := range percentiles {
		f.add(Metric{key + "_" + p.key + "_us", title + " " + p.title, "µs", false, title}, l.At(p.percent))
	}
	if l.Waking != nil && l.Waking.TotalCount() > 0 {
		f.add(Metric{key + "_waking_p50_us", title + ", of it waking the receiver", "µs", false, title}, float64(l.Waking.ValueAtQuantile(50))/1e3)
	}
	switch l.Kind {
	case RR, CRR, Nagle:
		if l.Offered > 0 { // held to a rate: how many there were says nothing
			return
		}
		f.add(Metric{key + "_per_s", title, "1/s", true, title}, float64(l.Answers)/l.Seconds)
	default:
		f.add(Metric{key + lossSuffix, title + " loss", "%", false, title}, 100*float64(l.Lost)/float64(max(l.Lost+l.Answers, 1)))
	}
}

func (s *RateSearch) derive(f *found) {
	key, title := fmt.Sprintf("udp%d", s.Payload), fmt.Sprintf("UDP %s B", thousands(s.Payload))
	if s.Full {
		key, title = "udp_full", "UDP, full packets"
	}
	rate := 0.0 // no rate held
	if s.Best.Received > 0 {
		rate = s.Best.Rate()
	}
	f.add(Metric{key + "_kpps", title + ", no loss", "k/s", true, "UDP rate"}, rate/1e3)
	if s.Full {
		f.add(Metric{"goodput_gbps", "UDP goodput at the path MTU, no loss", "Gb/s", true, "UDP rate"}, rate*float64(s.Payload)*8/1e9)
	}
	if c := s.Best.CPU; c != nil && s.Best.Received > 0 && c.Busy > 0 {
		million := float64(s.Best.Received) / 1e6
		f.add(Metric{key + "_cpu_s_per_mpkt", title + ", CPU per million packets", "s", false, "CPU per packet"}, c.Busy/million)
		f.add(Metric{key + "_softirq_s_per_mpkt", title + ", of it softirqs", "s", false, "CPU per packet"}, c.SoftIRQ/million)
	}
}

// Summarise computes values, metrics, medians, ratios and targets from what was measured.
func (r *Run) Summarise() {
	r.Metrics, r.mains = nil, map[string]string{}
	f := &found{metrics: &r.Metrics, known: map[string]bool{}, pair: r.Kind == Pair, mains: r.mains}
	for i := range r.Modes {
		m := &r.Modes[i]
		m.Summary = map[string]Spread{}
		for j := range m.Rounds {
			f.values = map[string]float64{}
			m.Rounds[j].derive(f)
			m.Rounds[j].Values = f.values
		}
		for _, metric := range r.Metrics {
			if v := Column(m.Rounds, metric.Key); len(v) > 0 {
				m.Summary[metric.Key] = SpreadOf(v)
			}
		}
	}
	r.Ratios = nil
	for _, m := range r.Modes {
		for _, to := range r.References {
			reference := r.Mode(to)
			if reference == nil || m.Name == to || m.Wiring != reference.Wiring {
				continue
			}
			for _, metric := range r.Metrics {
				if v := Ratios(m.Rounds, reference.Rounds, metric.Key); len(v) > 0 {
					r.Ratios = append(r.Ratios, Ratio{m.Name, to, metric.Key, SpreadOf(v)})
				}
			}
		}
	}
	for i := range r.Targets {
		t := &r.Targets[i]
		t.Ratio, t.Measured = r.Ratio(t.Mode, t.To, t.Metric)
		t.Met = t.Measured && (t.AtLeast && t.Ratio.Median >= t.Bound || !t.AtLeast && t.Ratio.Median <= t.Bound)
	}
}

// Sparse says of which latencies a round has too few answers for the last percentile: one of a thousand is beyond it. It is a note on the method,
// or none. Summarise comes first.
func (r *Run) Sparse() []string {
	const enough = 1000
	var few []string
	least := map[string]int64{} // answers of a round, by the title of the measure
	for _, m := range r.Modes {
		for _, d := range m.Rounds {
			for _, l := range d.Latency {
				_, title := l.key()
				n, known := least[title]
				if l.Answers >= enough || l.Answers == 0 || known && n <= l.Answers {
					continue
				}
				if !known {
					few = append(few, title)
				}
				least[title] = l.Answers
			}
		}
	}
	if len(few) == 0 {
		return nil
	}
	for i, title := range few {
		few[i] = fmt.Sprintf("%s (%d)", title, least[title])
	}
	return []string{fmt.Sprintf("p99.9 of a round with fewer than %s answers is the longest of them. There are as few as: %s. A longer --duration has more.", thousands(enough), strings.Join(few, ", "))}
}

// Ratio returns the ratio of a mode to a reference.
func (r *Run) Ratio(mode, to, metric string) (Spread, bool) {
	for _, x := range r.Ratios {
		if x.Mode == mode && x.To == to && x.Metric == metric {
			return x.Spread, true
		}
	}
	return Spread{}, false
}

// Metric returns a metric by its key.
func (r *Run) Metric(key string) Metric {
	for _, m := range r.Metrics {
		if m.Key == key {
			return m
		}
	}
	return Metric{Key: key, Title: strings.ReplaceAll(key, "_", " ")}
}

// Groups are the metrics in the order of the run, those of one table or plot together.
func (r *Run) Groups() [][]Metric {
	var out [][]Metric
	place := map[string]int{}
	for _, m := range r.Metrics {
		i, ok := place[m.Group]
		if !ok {
			i = len(out)
			place[m.Group] = i
			out = append(out, nil)
		}
		out[i] = append(out[i], m)
	}
	return out
}

// Reference is the mode that the others are held against at a glance: the first reference that was measured, or "".
func (r *Run) Reference() string { return r.reference("") }

// ReferenceOf is the reference of a mode at a glance: of those whose hosts are wired like its own.
func (r *Run) ReferenceOf(m *Mode) string { return r.reference(m.Wiring) }

func (r *Run) reference(wiring string) string {
	for _, name := range r.References {
		if m := r.Mode(name); m != nil && m.Wiring == wiring {
			return name
		}
	}
	return ""
}

// Glance says what the ratios at a glance are taken to.
func (r *Run) Glance() string {
	var parts []string
	if to := r.Reference(); to != "" {
		parts = append(parts, to)
	}
	for i := range r.Modes {
		m := &r.Modes[i]
		if to := r.ReferenceOf(m); m.Wiring != "" && m.Missing == "" && to != "" && to != m.Name {
			parts = append(parts, fmt.Sprintf("of %s to %s", m.Name, to))
		}
	}
	return strings.Join(parts, ", ")
}
