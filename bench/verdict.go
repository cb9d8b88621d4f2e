package bench

import (
	"encoding/csv"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// glance are the metrics of the one table that is read first.
var glance = []struct{ key, title string }{
	{"tcp1_gbps", "TCP 1, Gb/s"}, {"tcp4_gbps", "TCP 4, Gb/s"}, {"cpu_s_per_gb", "CPU, s/GB"},
	{"rtt64_pinned_p50_us", "HALF RTT, µs"}, {"udp64_kpps", "UDP 64 B, k/s"},
}

// reference is the mode that the others are held against at a glance: the kernel's VXLAN if it was measured, else no tunnel.
func (r *AllResult) reference() string {
	for _, name := range []string{KernelVXLAN, NoTunnel} {
		for _, m := range r.Modes {
			if m.Name == name && m.Missing == "" {
				return name
			}
		}
	}
	return ""
}

// verdict says in a sentence how the modes of Tulle fare.
func (r *AllResult) verdict() string {
	to := r.reference()
	var said []string
	for _, m := range r.Modes {
		if !strings.HasPrefix(m.Name, "tulle-") {
			continue
		}
		var parts []string
		for _, p := range []struct{ key, does, what string }{
			{"tcp1_gbps", "carries", to + " in one TCP stream"}, {"cpu_s_per_gb", "takes", "its CPU"}, {"rtt64_pinned_p50_us", "has", "its latency"},
		} {
			if s, ok := r.ratio(m.Name, to, p.key); ok {
				parts = append(parts, fmt.Sprintf("%s %s × %s", p.does, digits(s.Median), p.what))
			}
		}
		if len(parts) > 0 {
			said = append(said, m.Name+" "+strings.Join(parts, ", "))
		}
	}
	text := strings.Join(said, "; ") + "."
	if len(said) == 0 {
		text = "Nothing of Tulle was measured beside a reference."
	}
	if n := len(r.Warnings); n > 0 {
		text = fmt.Sprintf("NOT TO BE TRUSTED, for %s below: %s", map[bool]string{true: "the reason", false: "the reasons"}[n == 1], text)
	}
	return text
}

// glance prints the verdict and one table.
func (p *tables) glance(r *AllResult) {
	p.paragraph(r.verdict(), "  ")
	for _, w := range r.Warnings {
		p.paragraph("! "+w, "  ")
	}
	p.line("")
	to := r.reference()
	head := []string{"MODE"}
	for _, g := range glance {
		head = append(head, g.title, "×")
	}
	rows := [][]string{head}
	var missing []string
	for _, m := range r.Modes {
		if m.Missing != "" {
			missing = append(missing, m.Name+": "+oneLine(m.Missing))
			continue
		}
		row := []string{m.Name}
		for _, g := range glance {
			value, ratio := nothing, nothing
			if s, ok := m.Summary[g.key]; ok {
				value = digits(s.Median)
			}
			if s, ok := r.ratio(m.Name, to, g.key); ok {
				ratio = digits(s.Median)
			}
			row = append(row, value, ratio)
		}
		rows = append(rows, row)
	}
	p.table(rows)
	p.line("")
	for _, m := range missing {
		p.paragraph("Not measured: "+m, "  ")
	}
	medians := fmt.Sprintf("Medians of %d rounds", r.Rounds)
	if r.Rounds == 1 {
		medians = "One round"
	}
	p.paragraph(fmt.Sprintf("%s; × is the ratio to %s within a round. The wire is %s. Half RTT: 64 bytes, each side on its own CPU.",
		medians, to, r.Wire), "")
}

// WriteCSV writes every value of every round, one a line.
func (r *AllResult) WriteCSV(w io.Writer) error {
	c := csv.NewWriter(w)
	_ = c.Write([]string{"mode", "metric", "unit", "round", "value"}) // Flush and Error tell
	for _, m := range r.Modes {
		for _, metric := range metrics {
			for i, round := range m.Rounds {
				if v, ok := round[metric.Key]; ok {
					_ = c.Write([]string{m.Name, metric.Key, metric.Unit, strconv.Itoa(i + 1), strconv.FormatFloat(v, 'g', -1, 64)})
				}
			}
		}
	}
	c.Flush()
	return c.Error()
}
