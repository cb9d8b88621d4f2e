package result

import (
	"encoding/csv"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// WriteCSV writes every value of every round, one a line.
func (r *Run) WriteCSV(w io.Writer) error {
	c := csv.NewWriter(w)
	_ = c.Write([]string{"mode", "metric", "unit", "round", "value"}) // Flush and Error tell
	for _, m := range r.Modes {
		for _, metric := range r.Metrics {
			for i, round := range m.Rounds {
				if v, ok := round.Values[metric.Key]; ok {
					_ = c.Write([]string{Printable(m.Name), Printable(metric.Key), metric.Unit, strconv.Itoa(i + 1), strconv.FormatFloat(v, 'g', -1, 64)})
				}
			}
		}
	}
	c.Flush()
	return c.Error()
}

// WriteMarkdown writes the table for a README: medians, with the ratio to the reference and its interval. What failed comes after it.
func (r *Run) WriteMarkdown(w io.Writer) error {
	var b strings.Builder
	to := r.Reference()
	columns := r.Overview()
	b.WriteString("| mode |")
	for _, m := range columns {
		fmt.Fprintf(&b, " %s, %s |", m.Title, m.Unit)
	}
	b.WriteString("\n|---|" + strings.Repeat("---|", len(columns)) + "\n")
	for _, m := range r.Modes {
		if m.Missing != "" {
			continue
		}
		fmt.Fprintf(&b, "| `%s` |", m.Name)
		for _, c := range columns {
			s, ok := m.Summary[c.Key]
			if !ok {
				b.WriteString(" " + nothing + " |")
				continue
			}
			fmt.Fprintf(&b, " %s", Digits(s.Median))
			if ratio, ok := r.Ratio(m.Name, r.ReferenceOf(&m), c.Key); ok {
				fmt.Fprintf(&b, "; %s×", ratio.interval(true))
			}
			b.WriteString(" |")
		}
		b.WriteString("\n")
	}
	b.WriteString("\n" + medians(r.MeasuredRounds()))
	if to != "" {
		fmt.Fprintf(&b, "; × is the ratio within a round, with its 95 %% interval, to %s", r.Glance())
	}
	if len(r.Machines) > 0 {
		m := r.Machines[0]
		fmt.Fprintf(&b, ". Linux %s, %d × %s, %s", m.Kernel, m.CPUs, m.CPU, r.Started.Format("2006-01-02"))
	}
	b.WriteString(".\n")
	for _, limit := range r.Limits {
		fmt.Fprintf(&b, "\n%s\n", limit)
	}
	if len(r.Warnings) > 0 {
		b.WriteString("\n**Not to be trusted**, for these reasons:\n\n")
	}
	for _, warning := range r.Warnings {
		fmt.Fprintf(&b, "- %s\n", warning)
	}
	var missing []string
	for _, m := range r.Modes {
		if m.Missing != "" {
			missing = append(missing, fmt.Sprintf("`%s` (%s)", m.Name, oneLine(m.Missing)))
		}
	}
	if len(missing) > 0 {
		fmt.Fprintf(&b, "\nNot measured: %s.\n", strings.Join(missing, ", "))
	}
	for _, m := range r.Modes {
		for _, e := range m.Errors {
			fmt.Fprintf(&b, "\n`%s` failed: %s\n", m.Name, oneLine(e))
		}
	}
	_, err := io.WriteString(w, Printable(b.String()))
	return err
}
