package result

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
)

// column is a metric in a table.
type column struct{ key, title string }

// pathColumns are the metrics of the one table that is read first, for several paths to one host.
var pathColumns = []column{
	{"rtt64_p50_us", "HALF RTT, µs"}, {"open64_p99_us", "p99 AT A FIXED RATE, µs"}, {"rr_p50_us", "TCP REQUEST, µs"}, {"tcp1_gbps", "TCP 1, Gb/s"},
	{"udp_flood1_loss", "UDP LOSS, %"},
}

// glance are the metrics of the one table that is read first, for a lab.
var glance = []column{
	{"tcp1_gbps", "TCP 1, Gb/s"}, {"tcp4_gbps", "TCP 4, Gb/s"}, {"cpu_s_per_gb", "CPU, s/GB"},
	{pinnedTrip, "HALF RTT, µs"}, {"udp64_kpps", "UDP 64 B, k/s"},
}

// pairColumns are the same for one path between two ends.
var pairColumns = []column{
	{"tcp1_gbps", "TCP 1, Gb/s"}, {"tcp4_gbps", "TCP 4, Gb/s"}, {"cpu_s_per_gb", "CPU, s/GB"}, {"rtt64_p50_us", "HALF RTT, µs"}, {"udp64_kpps", "UDP 64 B, k/s"},
}

// pinnedTrip is the half round trip that is read first in a lab.
const pinnedTrip = "rtt64_pinned_p50_us"

// halfTrip is pinnedTrip, or where that was not measured (there is one CPU, or it was measured of another payload) the one that is not pinned.
func (r *Run) halfTrip() string {
	if r.has(pinnedTrip) {
		return pinnedTrip
	}
	return "rtt64_p50_us"
}

// columns are the metrics that are read first, as far as the run has them. A run of other measures has its medians and rates, and
// otherwise whatever it has.
func (r *Run) columns() []column {
	first := slices.Clone(glance)
	for i, c := range first {
		if c.key == pinnedTrip {
			first[i].key = r.halfTrip()
		}
	}
	switch {
	case r.Kind == Pair && len(r.Modes) == 1:
		first = pairColumns
	case r.Kind == Pair:
		first = pathColumns
	}
	if out := r.some(first); len(out) > 0 {
		return out
	}
	var medians, all []column
	for _, m := range r.Metrics {
		c := column{m.Key, m.Title + ", " + m.Unit}
		if strings.HasSuffix(m.Key, "_p50_us") || strings.HasSuffix(m.Key, "bps") {
			medians = append(medians, c)
		}
		if !m.explains() {
			all = append(all, c)
		}
	}
	if len(medians) > 0 {
		return medians
	}
	return all
}

// Overview are the metrics that are read first.
func (r *Run) Overview() (out []Metric) {
	for _, c := range r.columns() {
		out = append(out, r.Metric(c.key))
	}
	return out
}

// Has reports whether the mode has a value of one of the metrics.
func (m *Mode) Has(metrics []Metric) bool {
	return slices.ContainsFunc(metrics, func(k Metric) bool { return m.Summary[k.Key].N > 0 })
}

// nothing is printed where there is no value.
const nothing = "–"

// Print writes the run for people: what it comes to and one table, or if verbose everything.
func (r *Run) Print(w io.Writer, verbose bool) error {
	p := &tables{w: w}
	p.paragraph(r.Verdict(), "  ")
	for _, w := range r.Warnings {
		p.paragraph("! "+w, "  ")
	}
	p.line("")
	if r.Kind == Pair {
		p.pair(r, verbose)
	} else {
		p.lab(r)
	}
	if verbose {
		p.everything(r)
	} else {
		p.line("-v shows all measures with their spread, and how it was measured.")
	}
	for i := range r.Modes {
		for _, e := range r.Modes[i].Errors {
			p.line("%s failed: %s", r.Modes[i].Name, e)
		}
	}
	return p.err
}

// Verdict says in a sentence what the run comes to.
func (r *Run) Verdict() string {
	text := r.comparison()
	if r.Kind == Pair {
		text = r.path()
	}
	if r.Interrupted {
		text = fmt.Sprintf("INTERRUPTED after %d of %d rounds: %s", r.MeasuredRounds(), r.Rounds, text)
	}
	if n := len(r.Warnings); n > 0 {
		text = fmt.Sprintf("NOT TO BE TRUSTED, for %s below: %s", map[bool]string{true: "the reason", false: "the reasons"}[n == 1], text)
	}
	return text
}

// MeasuredRounds are the complete rounds: fewer than Rounds if the run was interrupted.
func (r *Run) MeasuredRounds() (n int) {
	for _, m := range r.Modes {
		n = max(n, len(m.Rounds))
	}
	return n
}

// comparison says how the modes of Tulle fare.
func (r *Run) comparison() string {
	var said []string
	for i := range r.Modes {
		m := &r.Modes[i]
		if !m.Tulle {
			continue
		}
		to := r.ReferenceOf(m)
		var parts []string
		for _, p := range []struct{ key, does, what string }{
			{"tcp1_gbps", "carries", to + " in one TCP stream"}, {"cpu_s_per_gb", "takes", "its CPU"}, {r.halfTrip(), "has", "its latency"},
		} {
			if s, ok := r.Ratio(m.Name, to, p.key); ok {
				what := p.what
				if len(parts) == 0 { // nothing before it says whose
					what = strings.Replace(what, "its", to+"'s", 1)
				}
				parts = append(parts, fmt.Sprintf("%s %s × %s", p.does, Digits(s.Median), what))
			}
		}
		if len(parts) > 0 {
			said = append(said, "Tulle "+m.Name+" "+strings.Join(parts, ", "))
		}
	}
	if len(said) == 0 {
		return "Nothing of Tulle was measured beside a reference."
	}
	return strings.Join(said, "; ") + "."
}

// path says what one path between two ends can do.
func (r *Run) path() string {
	if len(r.Modes) != 1 {
		return r.compared()
	}
	m := &r.Modes[0]
	var parts []string
	for _, p := range []said{
		{"tcp1_gbps", "%s Gb/s in one TCP stream"}, {"rtt64_p50_us", "half a round trip of %s µs"}, {"rr_per_s", "%s TCP requests a second"},
		{"udp64_kpps", "%s thousand small datagrams a second without loss"},
	} {
		switch s, ok := m.Summary[p.key]; {
		case ok && s.Median == 0 && p.key == "udp64_kpps":
			parts = append(parts, "no rate of small datagrams without loss")
		case ok:
			parts = append(parts, fmt.Sprintf(p.text, Digits(s.Median)))
		}
	}
	if len(parts) == 0 {
		h := r.headline()
		if h.key == "" {
			return fmt.Sprintf("%s: nothing was measured.", m.Name)
		}
		parts = append(parts, fmt.Sprintf(h.text, Digits(m.Summary[h.key].Median)))
	}
	return fmt.Sprintf("%s: %s; path MTU %s.", m.Name, strings.Join(parts, ", "), known(r.MTU))
}

// known is an MTU for people; 0 is one that was not found.
func known(mtu int) string {
	if mtu == 0 {
		return "unknown"
	}
	return fmt.Sprint(mtu)
}

// said is a metric as a part of a sentence, with a place for its value.
type said struct{ key, text string }

// headline is what a sentence says of a run if it says one thing. The key is "" if nothing was measured.
func (r *Run) headline() said {
	for _, s := range []said{{"rtt64_p50_us", "half a round trip of %s µs"}, {"tcp1_gbps", "%s Gb/s in one TCP stream"}} {
		if r.has(s.key) {
			return s
		}
	}
	for _, m := range r.Metrics {
		if !m.explains() {
			return said{m.Key, m.Title + " of %s " + strings.ReplaceAll(m.Unit, "%", "%%")}
		}
	}
	return said{}
}

func (p *tables) lab(r *Run) {
	p.glance(r, r.columns())
	text := medians(r.MeasuredRounds())
	if to := r.Glance(); to != "" {
		text += "; × is the ratio within a round, to " + to
	}
	switch {
	case r.has(pinnedTrip):
		text += ". Half RTT: 64 bytes, each side on its own CPU"
	case r.has(r.halfTrip()):
		text += ". Half RTT: 64 bytes, not pinned"
	}
	p.paragraph(fmt.Sprintf("%s. The wire is %s.", text, r.Wire), "")
}

// glance is a table with a line for each mode, each value with its ratio to the mode's reference.
func (p *tables) glance(r *Run, columns []column) {
	head := []string{"MODE"}
	for _, g := range columns {
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
		for _, g := range columns {
			value, ratio := nothing, nothing
			if s, ok := m.Summary[g.key]; ok {
				value = Digits(s.Median)
			}
			if s, ok := r.Ratio(m.Name, r.ReferenceOf(&m), g.key); ok {
				ratio = Digits(s.Median)
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
}

func medians(rounds int) string {
	if rounds == 1 {
		return "One round"
	}
	return fmt.Sprintf("Medians of %d rounds", rounds)
}

// some are the columns that the run has values for.
func (r *Run) some(columns []column) []column {
	return slices.DeleteFunc(slices.Clone(columns), func(c column) bool { return !r.has(c.key) })
}

func (r *Run) has(key string) bool {
	for _, m := range r.Metrics {
		if m.Key == key {
			return true
		}
	}
	return false
}

// pair is the one table of a path: of the measures at a glance, or of all.
func (p *tables) pair(r *Run, all bool) {
	if len(r.Modes) != 1 {
		p.paths(r)
		return
	}
	rows := [][]string{{"MEASURE", "MEDIAN", "95 % INTERVAL", "UNIT"}}
	for _, m := range r.Metrics {
		if !all && !m.atGlance() {
			continue
		}
		s := r.Modes[0].Summary[m.Key]
		interval := nothing
		if s.Certain() {
			interval = Digits(s.Low) + "–" + Digits(s.High)
		}
		rows = append(rows, []string{m.Title, Digits(s.Median), interval, m.Unit})
	}
	p.table(rows)
	p.line("")
	p.paragraph(medians(r.MeasuredRounds())+". Half RTT is half of a UDP datagram's round trip. CPU is that of both ends, sender and receiver.", "")
	for _, n := range r.Limits {
		p.paragraph(n, "")
	}
}

// paths is the one table of several paths to one host.
func (p *tables) paths(r *Run) {
	p.glance(r, r.columns())
	text := fmt.Sprintf("%s; × is the ratio to %s within a round.", medians(r.MeasuredRounds()), r.Reference())
	if r.has("rtt64_p50_us") {
		text += " Half RTT is half of the round trip of a 64-byte UDP datagram."
	}
	p.paragraph(text, "")
	for _, n := range r.Limits {
		p.paragraph(n, "")
	}
}

// compared says in a sentence how several paths to one host compare.
func (r *Run) compared() string {
	var parts []string
	h := r.headline()
	for _, m := range r.Modes {
		if s, ok := m.Summary[h.key]; ok {
			parts = append(parts, fmt.Sprintf("%s has "+h.text+" with path MTU %d", m.Name, Digits(s.Median), m.MTU))
		}
	}
	if len(parts) == 0 {
		return "Nothing was measured."
	}
	return strings.Join(parts, ", ") + "."
}

func (p *tables) everything(r *Run) {
	p.line("")
	p.line("%d rounds of %s each measure, in %v, begun %s", r.MeasuredRounds(),
		time.Duration(r.Duration*float64(time.Second)), (time.Duration(r.Seconds) * time.Second).String(), r.Started.Format(time.RFC3339))
	for _, m := range r.Machines {
		p.paragraph("- "+m.String(), "  ")
	}
	p.line("tulle %s; MTU %s; %s; wire %s", r.Tulle, known(r.MTU), r.Family, map[bool]string{true: "real", false: r.Wire}[r.Wire == ""])
	for _, n := range r.Notes {
		p.paragraph("- "+n, "  ")
	}
	p.line("")
	p.modes(r)
	for _, g := range r.Groups() {
		p.line("")
		p.group(r, g)
	}
	for _, to := range r.References {
		p.ratios(r, to)
	}
	if len(r.Targets) > 0 {
		p.floors(r)
	}
}

// String is one line about the machine.
func (m Machine) String() string {
	s := fmt.Sprintf("Linux %s %s, %d × %s; %s", m.Kernel, m.Arch, m.CPUs, m.CPU, m.Go)
	if m.End != "" {
		s = m.End + ": " + s
	}
	if m.Usable != 0 && m.Usable != m.CPUs {
		s += fmt.Sprintf("; %d CPUs usable", m.Usable)
	}
	if m.Quota > 0 {
		s += fmt.Sprintf("; quota of %s CPUs", Digits(m.Quota))
	}
	if m.Interface != "" {
		s += fmt.Sprintf("; %s with MTU %d, offloads %s", m.Interface, m.LinkMTU, strings.Join(m.Offloads, " "))
	}
	for _, extra := range []string{m.Congestion, m.Affinity, m.Awake} {
		if extra != "" {
			s += "; " + extra
		}
	}
	return s
}

// tables writes to w until the first error.
type tables struct {
	w   io.Writer
	err error
}

func (p *tables) line(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintln(p.w, Printable(fmt.Sprintf(format, args...)))
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
		cells := make([]string, len(r))
		for i, cell := range r {
			cells[i] = Printable(cell)
		}
		fmt.Fprintln(t, strings.Join(cells, "\t"))
	}
	p.err = t.Flush()
}

// Printable is text without what commands a terminal: a stored run, or what a server says, may be anybody's.
func Printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) && r != '\n' || unicode.Is(unicode.Cf, r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}

func (p *tables) modes(r *Run) {
	rows := [][]string{{"MODE", "MTU", "FRAME", "WHAT"}}
	for _, m := range r.Modes {
		mtu, frame, what := known(m.MTU), nothing, m.What
		if c := m.Crossing(); c.InFrames > 0 {
			frame = Digits(c.FrameBytes())
		}
		if m.Missing != "" {
			mtu, frame, what = nothing, nothing, "not measured: "+oneLine(m.Missing)
		}
		rows = append(rows, []string{m.Name, mtu, frame, what})
	}
	p.table(rows)
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

func (p *tables) group(r *Run, metrics []Metric) {
	head := []string{"MODE"}
	for _, m := range metrics {
		head = append(head, m.Title+", "+m.Unit)
	}
	rows := [][]string{head}
	for _, m := range r.Modes {
		row := []string{m.Name}
		for _, k := range metrics {
			s, ok := m.Summary[k.Key]
			row = append(row, s.cell(ok))
		}
		if m.Has(metrics) {
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
		return Digits(s.Median)
	}
	return fmt.Sprintf("%s (%s–%s)", Digits(s.Median), Digits(s.Min), Digits(s.Max))
}

// interval is the median and its interval, or the median alone if there were too few rounds.
func (s Spread) interval(ok bool) string {
	if !ok || !s.Certain() {
		return s.cell(ok)
	}
	return fmt.Sprintf("%s (%s–%s)", Digits(s.Median), Digits(s.Low), Digits(s.High))
}

// Digits writes three significant digits, and all of those before the point.
func Digits(v float64) string {
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

// Compared reports whether ratios of a metric are printed: medians and totals, not the tails.
func (m Metric) Compared() bool {
	return !m.explains() && !strings.HasSuffix(m.Unit, "%") && m.Key != "rss_mb" && m.Group != "CPU per packet" &&
		(m.Unit != "µs" || strings.HasSuffix(m.Key, "_p50_us")) && (m.Group != "CPU" || m.Key == "cpu_s_per_gb")
}

// atGlance reports whether a metric of a path is read first: what is compared, with one tail and the loss of each measure.
func (m Metric) atGlance() bool {
	return m.Compared() && !strings.HasSuffix(m.Key, "_waking_p50_us") || strings.HasSuffix(m.Key, "_p99_us") || m.Unit == "%"
}

func (p *tables) ratios(r *Run, to string) {
	head := []string{"× " + to}
	var compared []Metric
	for _, m := range r.Metrics {
		if m.Compared() {
			compared = append(compared, m)
			head = append(head, m.Title)
		}
	}
	rows := [][]string{head}
	for _, m := range r.Modes {
		row, some := []string{m.Name}, false
		for _, k := range compared {
			s, ok := r.Ratio(m.Name, to, k.Key)
			some = some || ok
			row = append(row, s.interval(ok))
		}
		if some {
			rows = append(rows, row)
		}
	}
	if len(rows) > 1 {
		p.line("")
		p.table(rows)
	}
}

func (p *tables) floors(r *Run) {
	p.line("")
	rows := [][]string{{"FLOOR", "RATIO", ""}}
	for _, f := range r.Targets {
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
			fmt.Sprintf("%s %s %s %g × %s", f.Mode, r.Metric(f.Metric).Title, sign, f.Bound, f.To), f.Ratio.cell(f.Measured), verdict,
		})
	}
	p.table(rows)
}
