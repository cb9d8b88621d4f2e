package report

import (
	"bytes"
	"fmt"
	"image/color"
	"math"
	"slices"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgimg"
	"gonum.org/v1/plot/vg/vgsvg"

	"github.com/tulle-net/tulle/bench/result"
)

// Picture is one plot.
type Picture struct {
	Name  string // of its files, without ending
	Title string
	Part  string // of the page: one of Parts
	Note  string // how to read it
	SVG   []byte // with a transparent ground; black is currentColor
	PNG   []byte // on white
}

// palette has colours that can be told apart on white and on black, also by most who see few colours (Okabe and Ito).
var palette = []color.Color{
	color.RGBA{0x00, 0x72, 0xb2, 0xff}, color.RGBA{0xd5, 0x5e, 0x00, 0xff}, color.RGBA{0x00, 0x9e, 0x73, 0xff}, color.RGBA{0xcc, 0x79, 0xa7, 0xff},
	color.RGBA{0xe6, 0x9f, 0x00, 0xff}, color.RGBA{0x56, 0xb4, 0xe9, 0xff}, color.RGBA{0x99, 0x55, 0xcc, 0xff}, color.RGBA{0x88, 0x88, 0x88, 0xff},
}

// Parts are the parts of the page with plots, in their order.
var Parts = []string{"Throughput, rates and CPU", "Latency", "Where the time goes"}

// part is where a metric's plots belong.
func part(m result.Metric) string {
	if m.Unit == "µs" || m.Unit == "1/s" {
		return Parts[1]
	}
	return Parts[0]
}

// Pictures draws all plots of a run.
func Pictures(r *result.Run) ([]Picture, error) {
	var out []Picture
	add := func(p Picture, fill func(p *plot.Plot) (bool, error), height vg.Length) error {
		pl := newPlot()
		some, err := fill(pl)
		if err != nil || !some {
			return err
		}
		p.Name = fileName(p.Name)
		p.SVG, p.PNG, err = render(pl, height)
		if err == nil {
			out = append(out, p)
		}
		return err
	}
	for _, l := range latencies(r) {
		key := fmt.Sprintf("latency-%s-%d", l.Kind, l.Payload)
		if l.Pinned {
			key += "-pinned"
		}
		p := Picture{Name: key, Part: Parts[1], Title: latencyTitle(&l), Note: "Each line shows which time is not exceeded by which share of the answers, over all rounds. Further right is rarer; lower is better. Both scales are logarithmic."}
		if err := add(p, func(pl *plot.Plot) (bool, error) { return percentiles(pl, r, &l) }, 8*vg.Centimeter); err != nil {
			return nil, err
		}
	}
	for _, g := range r.Groups() {
		for _, m := range g {
			if !m.Compared() {
				continue
			}
			if to := r.Reference(); to != "" {
				p := Picture{Name: "ratio-" + m.Key, Part: part(m), Title: m.Title + ", ratio to " + to, Note: better(m) + " Ratio to " + r.Glance() + ". The thin lines are 95 % intervals, where there were at least five rounds."}
				fill := func(pl *plot.Plot) (bool, error) {
					return bars(pl, r, "×", func(mode *result.Mode) (result.Spread, bool) {
						return r.Ratio(mode.Name, r.ReferenceOf(mode), m.Key) // of a reference itself there is none
					}, 1)
				}
				if err := add(p, fill, barHeight(r)); err != nil {
					return nil, err
				}
			}
			p := Picture{Name: "value-" + m.Key, Part: part(m), Title: m.Title + ", " + m.Unit, Note: better(m)}
			fill := func(pl *plot.Plot) (bool, error) {
				return bars(pl, r, m.Unit, func(mode *result.Mode) (result.Spread, bool) {
					s, ok := mode.Summary[m.Key]
					return s, ok
				}, 0)
			}
			if err := add(p, fill, barHeight(r)); err != nil {
				return nil, err
			}
		}
	}
	for _, b := range traffics(r) {
		p := Picture{Name: "breakdown-" + b.Traffic, Part: Parts[2], Title: "Where the time of a packet goes in Tulle's agents, " + b.Title(), Note: "Shorter is better. The number is the sum, in ns."}
		fill := func(pl *plot.Plot) (bool, error) { return stacked(pl, r, b.Traffic) }
		if err := add(p, fill, 6.5*vg.Centimeter); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// fileName is a name without what leads to another folder: a part of it may come from anybody's file.
func fileName(name string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' {
			return r
		}
		return '_'
	}, name)
}

func better(m result.Metric) string {
	if m.Higher {
		return "Higher is better."
	}
	return "Lower is better."
}

func barHeight(r *result.Run) vg.Length {
	return vg.Length(place(r, len(r.Modes)))*0.75*vg.Centimeter + 1.8*vg.Centimeter
}

// place is the place of a mode among those that were measured: a mode has its colour in all plots.
func place(r *result.Run, mode int) (n int) {
	for _, m := range r.Modes[:mode] {
		if m.Missing == "" {
			n++
		}
	}
	return n
}

// latencies are the measures of latency, once each.
func latencies(r *result.Run) []result.Latency {
	var out []result.Latency
	for _, m := range r.Modes {
		for _, round := range m.Rounds {
			for _, l := range round.Latency {
				same := func(o result.Latency) bool { return o.Kind == l.Kind && o.Payload == l.Payload && o.Pinned == l.Pinned }
				if !slices.ContainsFunc(out, same) {
					out = append(out, l)
				}
			}
		}
	}
	return out
}

func latencyTitle(l *result.Latency) string {
	pinned := ""
	if l.Pinned {
		pinned = ", each side on its own CPUs"
	}
	switch l.Kind {
	case result.RR:
		return "TCP request and response on one connection" + pinned
	case result.Nagle:
		return "TCP request in two writes without TCP_NODELAY" + pinned
	case result.CRR:
		return "TCP connection with a request and response" + pinned
	case result.Loaded:
		return fmt.Sprintf("Half a round trip of %d bytes beside several TCP streams", l.Payload)
	case result.OpenLoop:
		return fmt.Sprintf("Half a round trip of %d bytes, %.0f datagrams a second%s", l.Payload, l.Offered, pinned)
	}
	return fmt.Sprintf("Half a round trip of %d bytes, one datagram at a time%s", l.Payload, pinned)
}

func newPlot() *plot.Plot {
	p := plot.New()
	p.BackgroundColor = nil
	p.X.Tick.Marker = plainTicks{}
	for _, f := range []*draw.TextStyle{&p.Title.TextStyle, &p.X.Label.TextStyle, &p.Y.Label.TextStyle, &p.X.Tick.Label, &p.Y.Tick.Label, &p.Legend.TextStyle} {
		f.Font.Variant = "Sans"
		f.Font.Size = 10
	}
	return p
}

// nines is the scale of percentiles: 0 is the median's half, each further unit is a tenth of what is left.
func nines(share float64) float64 { return -math.Log10(1 - share) }

// percentiles draws the distribution of a latency for each mode.
func percentiles(p *plot.Plot, r *result.Run, what *result.Latency) (bool, error) {
	p.X.Label.Text, p.Y.Label.Text = "share of answers", "µs"
	p.Y.Scale, p.Y.Tick.Marker = plot.LogScale{}, logTicks{}
	p.X.Tick.Marker = plot.ConstantTicks{
		{Value: 0, Label: "0"}, {Value: nines(0.5), Label: "50 %"}, {Value: 1, Label: "90 %"}, {Value: 2, Label: "99 %"}, {Value: 3, Label: "99.9 %"}, {Value: 4, Label: "99.99 %"}, {Value: 5, Label: "99.999 %"},
	}
	p.Legend.Top, p.Legend.Left = true, true
	grid := plotter.NewGrid()
	grid.Vertical.Color, grid.Horizontal.Color = color.Gray{0x99}, color.Gray{0x99}
	grid.Vertical.Width, grid.Horizontal.Width = 0.25, 0.25
	p.Add(grid)
	some := false
	for i, m := range r.Modes {
		l := m.Merged(what.Kind, what.Payload, what.Pinned)
		if l == nil || l.Times.TotalCount() == 0 {
			continue
		}
		last := nines(1 - 1/float64(l.Times.TotalCount()+1))
		var points plotter.XYs
		for x := 0.0; x <= last; x += 0.02 {
			points = append(points, plotter.XY{X: x, Y: l.At(100 * (1 - math.Pow(10, -x)))})
		}
		line, err := plotter.NewLine(points)
		if err != nil {
			return false, err
		}
		n := place(r, i)
		line.Color, line.Width = palette[n%len(palette)], 1.5
		if n >= len(palette) {
			line.Dashes = []vg.Length{4, 2}
		}
		p.Add(line)
		p.Legend.Add(m.Name, line)
		some = true
	}
	if p.Y.Min == p.Y.Max { // where all answers took the same, the library would go below 0, of which there is no logarithm
		p.Y.Min, p.Y.Max = p.Y.Min/2, p.Y.Max*2
	}
	p.X.Max += 0.25 // room for the last label
	return some, nil
}

// plainTicks labels a linear scale with as many digits as needed.
type plainTicks struct{}

// Ticks implements plot.Ticker.
func (plainTicks) Ticks(low, high float64) []plot.Tick {
	out := plot.DefaultTicks{}.Ticks(low, high)
	for i := range out {
		if out[i].Label != "" {
			out[i].Label = fmt.Sprintf("%.6g", out[i].Value)
		}
	}
	return out
}

// logTicks labels 1, 2 and 5 of each power of ten, or more where there are too few of them to read the scale.
type logTicks struct{}

// Ticks implements plot.Ticker.
func (logTicks) Ticks(low, high float64) []plot.Tick {
	var out []plot.Tick
	for _, factors := range [][]float64{{1, 2, 5}, {1, 2, 3, 4, 5, 6, 7, 8, 9}} {
		out = nil
		for e := math.Floor(math.Log10(low)); e <= math.Ceil(math.Log10(high)); e++ {
			for _, f := range factors {
				if v := f * math.Pow(10, e); v >= low && v <= high {
					out = append(out, plot.Tick{Value: v, Label: fmt.Sprintf("%g", v)})
				}
			}
		}
		if len(out) >= 3 {
			break
		}
	}
	if len(out) < 2 { // where all times are nearly the same
		return plainTicks{}.Ticks(low, high)
	}
	return out
}

// bars draws a horizontal bar for each mode, with its interval. A line is drawn at the value one if it is not 0.
func bars(p *plot.Plot, r *result.Run, unit string, value func(*result.Mode) (result.Spread, bool), one float64) (bool, error) {
	p.X.Label.Text = unit
	var ticks []plot.Tick
	row := 0
	most := one
	for i := range slices.Backward(r.Modes) {
		m := &r.Modes[i]
		s, ok := value(m)
		if !ok {
			continue
		}
		b, err := plotter.NewBarChart(plotter.Values{s.Median}, 0.45*vg.Centimeter)
		if err != nil {
			return false, err
		}
		b.Horizontal, b.XMin, b.Color = true, float64(row), palette[place(r, i)%len(palette)]
		b.LineStyle.Width = 0
		p.Add(b)
		if s.Certain() {
			interval, err := plotter.NewXErrorBars(errorBar{s, float64(row)})
			if err != nil {
				return false, err
			}
			interval.LineStyle.Width = 1
			p.Add(interval)
		}
		most = max(most, s.Median, s.High)
		ticks = append(ticks, plot.Tick{Value: float64(row), Label: fmt.Sprintf("%s  %s    ", m.Name, result.Digits(s.Median))})
		row++
	}
	if row == 0 {
		return false, nil
	}
	if one != 0 {
		line, err := plotter.NewLine(plotter.XYs{{X: one, Y: -0.6}, {X: one, Y: float64(row) - 0.4}})
		if err != nil {
			return false, err
		}
		line.Dashes = []vg.Length{3, 3}
		p.Add(line)
	}
	p.Y.Tick.Marker = plot.ConstantTicks(ticks)
	p.Y.Tick.Length, p.Y.LineStyle.Width = 0, 0
	p.Y.Min, p.Y.Max, p.X.Min, p.X.Max = -0.6, float64(row)-0.4, 0, most*1.05
	return true, nil
}

// errorBar is one interval for plotter.NewXErrorBars.
type errorBar struct {
	s result.Spread
	y float64
}

// Len, XY and XError implement its interfaces.
func (e errorBar) Len() int { return 1 }

// XY is the median.
func (e errorBar) XY(int) (x, y float64) { return e.s.Median, e.y }

// XError is how far the interval reaches.
func (e errorBar) XError(int) (low, high float64) { return e.s.Median - e.s.Low, e.s.High - e.s.Median }

// render draws a plot in both forms.
func render(p *plot.Plot, height vg.Length) (svg, png []byte, err error) {
	const width, margin = 14 * vg.Centimeter, 0.35 * vg.Centimeter // the last label of the scale may need half of it, the longest name of a mode a little
	vector := vgsvg.New(width, height)
	p.Draw(draw.Crop(draw.New(vector), margin/3, -margin, 0, 0))
	var out bytes.Buffer
	if _, err := vector.WriteTo(&out); err != nil {
		return nil, nil, fmt.Errorf("draw SVG: %w", err)
	}
	text := out.String()
	text = text[strings.Index(text, "<svg"):]
	text = strings.NewReplacer("#000000", "currentColor", "font-family:Liberation Sans", "font-family:Liberation Sans,Arial,Helvetica,sans-serif").Replace(text)
	p.BackgroundColor = color.White
	bitmap := vgimg.PngCanvas{Canvas: vgimg.NewWith(vgimg.UseWH(width, height), vgimg.UseDPI(192))}
	p.Draw(draw.Crop(draw.New(bitmap), margin/3, -margin, 0, 0))
	var image bytes.Buffer
	if _, err := bitmap.WriteTo(&image); err != nil {
		return nil, nil, fmt.Errorf("draw PNG: %w", err)
	}
	return []byte(text), image.Bytes(), nil
}
