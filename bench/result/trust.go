package result

import "fmt"

// What makes figures doubtful in any run, without a measure having failed.
const (
	// othersAllowed and stealAllowed are shares of the machines.
	othersAllowed, stealAllowed = 0.05, 0.02
	// tcpAllowed and latencyAllowed are how far the best round of a mode may be from its worst, as a factor of TCP with one stream and of
	// the medians of latency.
	tcpAllowed, latencyAllowed = 1.5, 2
	// lossAllowed is how much of a slow flow may be lost, in per cent.
	lossAllowed = 0.1
)

// Doubts are the reasons not to trust figures that follow from the result itself: rounds that disagree, other users of the machines,
// loss that nothing explains, a quota. Summarise comes first.
func (r *Run) Doubts() []string {
	out := []string{}
	doubt := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	for i := range r.Modes {
		r.Modes[i].doubts(r, doubt)
	}
	senders, all := "the machine", "the machine"
	if len(r.Machines) > 1 {
		senders, all = "the sender's machine", "the machines"
	}
	if r.Others.Max > othersAllowed {
		doubt("Others used up to %.0f %% of %s just before a round: figures are too low, and noisy.", 100*min(r.Others.Max, 1), senders)
	}
	if share := r.othersMeanwhile(); share > othersAllowed {
		doubt("Others used up to %.0f %% of %s while TCP was measured: figures are too low, and noisy.", 100*min(share, 1), all)
	}
	if r.Steal.Max > stealAllowed {
		doubt("The hypervisor took up to %.0f %% of %s away while TCP was measured.", 100*r.Steal.Max, all)
	}
	for _, m := range r.Machines {
		if end := ""; m.Quota > 0 && m.Quota < float64(m.CPUs) {
			if m.End != "" {
				end = fmt.Sprintf(" at the %q end", m.End)
			}
			doubt("The CPU quota%s is %s of %d CPUs: throughput and the longest latencies may be the quota's.", end, Digits(m.Quota), m.CPUs)
		}
	}
	return out
}

// doubts are those about one mode.
func (m *Mode) doubts(r *Run, doubt func(format string, args ...any)) {
	name := ""
	if len(r.Modes) > 1 {
		name = m.Name + ": "
	}
	if s, ok := m.Summary["tcp1_gbps"]; ok && s.Max > tcpAllowed*s.Min {
		doubt("%sone TCP stream carried %s Gb/s in one round and %s in another.", name, Digits(s.Min), Digits(s.Max))
	}
	var worst Metric
	most := float64(latencyAllowed)
	for _, k := range r.Metrics {
		s, ok := m.Summary[k.Key]
		switch {
		case !ok, r.mains[k.Key] == "loaded_p50_us": // a queue that others fill has no steady length, and may be full
		case k.Unit == "µs" && k.Key == r.mains[k.Key] && s.Max > most*s.Min:
			worst, most = k, s.Max/s.Min
		case k.Unit == "%" && k.Group != "UDP throughput" && s.Median > lossAllowed:
			doubt("%s%s: %s %% of a flow of %s Mb/s. TCP and latency suffer from what loses it.", name, k.Title, Digits(s.Median), Digits(m.sent(k)/1e6))
		}
	}
	if s, ok := m.Summary[worst.Key]; ok {
		doubt("%s%s was %s µs in one round and %s in another.", name, worst.Title, Digits(s.Min), Digits(s.Max))
	}
}

// sent is the most payload that a round sent in the latency measure whose loss is k, in bits a second.
func (m *Mode) sent(k Metric) (most float64) {
	for _, d := range m.Rounds {
		for _, l := range d.Latency {
			if key, _ := l.key(); key+lossSuffix == k.Key {
				most = max(most, float64(l.Answers+l.Lost)*float64(l.Payload)*8/l.Seconds)
			}
		}
	}
	return most
}

// othersMeanwhile is the largest share of the machines' CPU time that other processes used during a measure of TCP, as far as they can be seen.
func (r *Run) othersMeanwhile() (most float64) {
	cpus := 0
	for _, m := range r.Machines {
		cpus += m.CPUs
	}
	for _, m := range r.Modes {
		for _, d := range m.Rounds {
			for _, t := range d.TCP {
				if all := t.Seconds * float64(cpus); all > 0 {
					most = max(most, t.CPU.Others/all)
				}
			}
		}
	}
	return most
}
