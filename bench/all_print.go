package bench

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

func sinceSeconds(t time.Time) float64 { return time.Since(t).Seconds() }

// notes describe the method.
func notes(o *AllOptions, r *AllResult) []string {
	n := []string{
		map[lab.Wire]string{
			lab.WireCut: "Wire: cut. Links carry frames of the MTU, as between NICs. The sender's CPU cuts super-packets, which a NIC would do for " +
				"bare TCP and for some tunnels. Receivers join segments (GRO).",
			lab.WireWhole: "Wire: whole. Links carry super-packets of 64 KiB, which no NIC does. Figures are higher than between machines, most of all without a tunnel and in the kernel's.",
		}[o.Wire] + " FRAME is the mean frame from sender to receiver during TCP, in bytes.",
		"Setup: two hosts in two subnets, a router, one pod per host. All are network namespaces on this machine and share its CPUs. " +
			"Each mode has its own lab; only one mode has traffic at a time.",
		fmt.Sprintf("Rounds: %d. Each measure is taken for all modes before the next measure begins. Values: median (lowest–highest). "+
			"Ratios are taken within each round.", o.Rounds),
		"Half round trip: one UDP datagram at a time between blocking sockets. A SCHED_IDLE thread spins on each CPU, so none halts. " +
			"Ends and tunnel run at nice -20. Unpinned, the scheduler usually puts both ends on one CPU. Pinned, the sender and its host's tunnel process get the " +
			"first half of the CPUs, the receiver and its host's the second.",
		"All other measures: CPUs may halt, nothing is pinned, nice 0.",
		fmt.Sprintf("UDP rate: the highest rate with at most %.1f %% loss in a trial of %v, counted at the receiver. Sent with sendmmsg about every %v, "+
			"received with recvmmsg. Two of three confirming trials must hold; the result is their median. If the unpaced sender loses nothing, the sender is the limit.",
			100*lossAllowed, o.Duration/4, pace),
		"CPU: all CPU time of the machine during one TCP stream (softirqs, sender and receiver included), without unrelated processes, per 10^9 bytes received.",
		"Memory: resident set of the larger of the tunnel's two processes at the end of each round.",
	}
	return n
}

// groups are the tables: each lists the metrics of its columns.
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

// nothing is printed where there is no value.
const nothing = "–"

// Print writes the result for people: what it comes to and one table, or if verbose everything.
func (r *AllResult) Print(w io.Writer, verbose bool) error {
	p := &tables{w: w}
	p.glance(r)
	if verbose {
		p.everything(r)
	} else {
		p.line("-v shows all measures with their spread, ratios and floors, and how it was measured.")
	}
	for i := range r.Modes {
		for _, e := range r.Modes[i].Errors {
			p.line("%s failed: %s", r.Modes[i].Name, e)
		}
	}
	return p.err
}

func (p *tables) everything(r *AllResult) {
	p.line("")
	p.line("tulle bench all: %d rounds of %s each measure, in %v, begun %s", r.Rounds,
		time.Duration(r.Duration*float64(time.Second)), (time.Duration(r.Seconds) * time.Second).String(), r.Started.Format(time.RFC3339))
	m := &r.Machine
	p.line("Linux %s %s, %d × %s; %s; underlay MTU %d, wire %s", m.Kernel, m.Arch, m.CPUs, m.CPU, m.Go, r.MTU, r.Wire)
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
}

// tables writes to w until the first error.
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
	rows := [][]string{{"MODE", "MTU", "FRAME", "WHAT"}}
	for _, m := range r.Modes {
		mtu, frame, what := fmt.Sprint(m.MTU), digits(m.crossing().FrameBytes()), m.What
		if m.Missing != "" {
			mtu, frame, what = nothing, nothing, "not measured: "+oneLine(m.Missing)
		}
		rows = append(rows, []string{m.Name, mtu, frame, what})
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
