package bench

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
)

func sinceSeconds(t time.Time) float64 { return time.Since(t).Seconds() }

// notes say how it was measured.
func notes(o *AllOptions, r *AllResult) []string {
	n := []string{
		"Two hosts in two subnets, a router between them, one pod each, all of them network namespaces on this machine: sender, " +
			"receiver, router and both tunnel ends share its CPUs. Each mode has a lab of its own; the others are idle meanwhile.",
		fmt.Sprintf("Each measure is taken of one mode after the other before the next measure begins; %d such rounds. Values are medians "+
			"over the rounds, with the lowest and the highest in parentheses; ratios are taken within each round, then their median.", o.Rounds),
		"Half round trip: one UDP datagram at a time, to and fro between blocking sockets, with a SCHED_IDLE thread spinning on each " +
			"CPU so that none halts. Nothing is pinned to a CPU, so that the scheduler mostly brings both ends together on one; where " +
			"it says pinned, sender and its host's tunnel process have the first half of the CPUs, receiver and its host's the second, " +
			"and each trip crosses from CPU to CPU. Ends and tunnel run at nice -20, before what else runs here. In all other measures CPUs may halt, and nothing is pinned or preferred.",
		fmt.Sprintf("UDP: the highest rate at which at most %.1f %% of a %v trial's datagrams are lost, in datagrams received a second, sent with "+
			"sendmmsg about every %v, received with recvmmsg; the median of the trials that confirm it, of which two of three must hold. Where the unpaced "+
			"sender loses nothing, the sender is the limit.", 100*lossAllowed, o.Duration/4, pace),
		"CPU: all that was not idle on the machine during TCP with one stream, softirqs, sender and receiver included, less what " +
			"processes were charged that have nothing to do with it, per 10^9 bytes received.",
		"Memory: resident set of the larger of the tunnel's two processes at the end of each round.",
	}
	if r.Others.Max > 0.05 {
		n = append(n, fmt.Sprintf("Others used up to %.0f %% of the machine just before a round: figures are too low, and noisy.", 100*r.Others.Max))
	}
	if r.Steal.Max > 0.02 {
		n = append(n, fmt.Sprintf("The hypervisor took up to %.0f %% of the machine away while TCP was measured.", 100*r.Steal.Max))
	}
	return n
}

// groups are the columns that are printed together.
var groups = [][]string{
	{"tcp1_gbps", "tcp4_gbps", "cpu_s_per_gb", "tunnel_cpu_s_per_gb"},
	{"rtt64_p50_us", "rtt64_p99_us", "rtt64_p99_9_us"},
	{"rtt64_pinned_p50_us", "rtt64_pinned_p99_us", "rtt64_pinned_p99_9_us"},
	{"rtt1400_p50_us", "rtt1400_p99_us", "rtt1400_p99_9_us"},
	{"udp64_kpps", "udp1300_kpps", "rss_mb"},
}

// compared are the metrics whose ratios are printed.
var compared = []string{"tcp1_gbps", "tcp4_gbps", "cpu_s_per_gb", "rtt64_p50_us", "rtt64_pinned_p50_us", "rtt1400_p50_us", "udp64_kpps", "udp1300_kpps"}

func metricOf(key string) Metric {
	for _, m := range metrics {
		if m.Key == key {
			return m
		}
	}
	return Metric{Key: key, Title: key}
}

// nothing stands where there is no value.
const nothing = "–"

// Print writes the result as tables for people.
func (r *AllResult) Print(w io.Writer) error {
	p := &tables{w: w}
	p.line("tulle bench all: %d rounds of %s each measure, in %v, begun %s", r.Rounds,
		time.Duration(r.Duration*float64(time.Second)), (time.Duration(r.Seconds) * time.Second).String(), r.Started.Format(time.RFC3339))
	m := &r.Machine
	p.line("Linux %s %s, %d × %s; %s; underlay MTU %d", m.Kernel, m.Arch, m.CPUs, m.CPU, m.Go, r.MTU)
	for _, n := range r.Notes {
		p.paragraph("- "+n, "  ")
	}
	p.line("")
	p.modes(r)
	for _, g := range groups {
		p.line("")
		p.group(r, g)
	}
	for _, to := range references {
		p.ratios(r, to)
	}
	p.floors(r)
	for i := range r.Modes {
		for _, e := range r.Modes[i].Errors {
			p.line("%s failed: %s", r.Modes[i].Name, e)
		}
	}
	return p.err
}

// tables writes to w until something fails.
type tables struct {
	w   io.Writer
	err error
}

func (p *tables) line(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format+"\n", args...)
	}
}

// paragraph breaks text into lines of at most 118 columns.
func (p *tables) paragraph(text, indent string) {
	line := ""
	for word := range strings.FieldsSeq(text) {
		if line != "" && len([]rune(line))+1+len([]rune(word)) > 118 {
			p.line("%s", line)
			line = indent + word
			continue
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	p.line("%s", line)
}

// table writes rows with aligned columns.
func (p *tables) table(rows [][]string) {
	if p.err != nil {
		return
	}
	t := tabwriter.NewWriter(p.w, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		fmt.Fprintln(t, strings.Join(r, "\t"))
	}
	p.err = t.Flush()
}

func (p *tables) modes(r *AllResult) {
	rows := [][]string{{"MODE", "MTU", "WHAT"}}
	for _, m := range r.Modes {
		mtu, what := fmt.Sprint(m.MTU), m.What
		if m.Missing != "" {
			mtu, what = nothing, "not measured: "+oneLine(m.Missing)
		}
		rows = append(rows, []string{m.Name, mtu, what})
	}
	p.table(rows)
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

func (p *tables) group(r *AllResult, keys []string) {
	head := []string{"MODE"}
	for _, k := range keys {
		m := metricOf(k)
		head = append(head, m.Title+", "+m.Unit)
	}
	rows := [][]string{head}
	for _, m := range r.Modes {
		row := []string{m.Name}
		for _, k := range keys {
			s, ok := m.Summary[k]
			row = append(row, s.cell(ok))
		}
		if m.Missing == "" {
			rows = append(rows, row)
		}
	}
	p.table(rows)
}

// cell is the median and, if there were several rounds, the extremes.
func (s Spread) cell(ok bool) string {
	switch {
	case !ok:
		return nothing
	case s.N == 1:
		return digits(s.Median)
	}
	return fmt.Sprintf("%s (%s–%s)", digits(s.Median), digits(s.Min), digits(s.Max))
}

// digits writes three significant digits, and all of those before the point.
func digits(v float64) string {
	switch a := max(v, -v); {
	case v == 0:
		return "0"
	case a >= 100:
		return fmt.Sprintf("%.0f", v)
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	case a >= 0.1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.2g", v)
}

func (p *tables) ratios(r *AllResult, to string) {
	head := []string{"× " + to}
	for _, k := range compared {
		head = append(head, metricOf(k).Title)
	}
	rows := [][]string{head}
	for _, m := range r.Modes {
		row, any := []string{m.Name}, false
		for _, k := range compared {
			s, ok := r.ratio(m.Name, to, k)
			any = any || ok
			row = append(row, s.cell(ok))
		}
		if any {
			rows = append(rows, row)
		}
	}
	if len(rows) > 1 {
		p.line("")
		p.table(rows)
	}
}

func (p *tables) floors(r *AllResult) {
	p.line("")
	rows := [][]string{{"FLOOR", "RATIO", ""}}
	for _, f := range r.Floors {
		sign, verdict := "≤", "not met"
		if f.AtLeast {
			sign = "≥"
		}
		switch {
		case !f.Measured:
			verdict = "not measured"
		case f.Met:
			verdict = "met"
		}
		rows = append(rows, []string{
			fmt.Sprintf("%s %s %s %g × %s", f.Mode, metricOf(f.Metric).Title, sign, f.Bound, f.To), f.Ratio.cell(f.Measured), verdict,
		})
	}
	p.table(rows)
}
