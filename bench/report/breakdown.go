package report

import (
	"fmt"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"

	"github.com/tulle-net/tulle/bench/result"
)

// traffics are the kinds of traffic that were traced in some mode, in the order of the run.
func traffics(r *result.Run) (out []result.Breakdown) {
	for i := range r.Modes {
		for _, b := range r.Modes[i].Breakdowns() {
			if !slices.ContainsFunc(out, func(o result.Breakdown) bool { return o.Traffic == b.Traffic }) {
				out = append(out, b)
			}
		}
	}
	return out
}

const breakdownNote = "Mean time for each packet as the underlay carries it, on a sample of packets, in both agents: CPU time of system calls, elapsed time of what is between. " +
	"What else a packet takes (the kernels, wake-ups, waiting) is not in it. Sending includes what the kernel does at once: here, where all hosts are one machine, that may be the way to the peer's socket. " +
	"Modes without an agent on the way have no such times."

// stacked draws a horizontal bar for each mode that was traced, with a part for each stage.
func stacked(p *plot.Plot, r *result.Run, traffic string) (bool, error) {
	p.X.Label.Text = "ns per packet"
	p.Legend.Top, p.Legend.Padding = true, 2
	var ticks []plot.Tick
	row, most := 0, 0.0
	for i := range slices.Backward(r.Modes) {
		m := &r.Modes[i]
		all := m.Breakdowns()
		k := slices.IndexFunc(all, func(b result.Breakdown) bool { return b.Traffic == traffic })
		if k < 0 {
			continue
		}
		sum := 0.0
		var below *plotter.BarChart
		for n, s := range all[k].Stages {
			b, err := plotter.NewBarChart(plotter.Values{s.Nanoseconds}, 0.6*vg.Centimeter)
			if err != nil {
				return false, err
			}
			b.Horizontal, b.XMin, b.Color = true, float64(row), palette[n%len(palette)]
			b.LineStyle.Width = 0
			if below != nil {
				b.StackOn(below)
			}
			below = b
			p.Add(b)
			if row == 0 {
				p.Legend.Add(s.Title()+"    ", b) // room: a browser's font may be wider
			}
			sum += s.Nanoseconds
		}
		most = max(most, sum)
		ticks = append(ticks, plot.Tick{Value: float64(row), Label: fmt.Sprintf("%s  %s    ", m.Name, result.Digits(sum))})
		row++
	}
	p.Y.Tick.Marker = plot.ConstantTicks(ticks)
	p.Y.Tick.Length, p.Y.LineStyle.Width = 0, 0
	p.Y.Min, p.Y.Max, p.X.Min, p.X.Max = -0.6, float64(row)-0.4, 0, most*1.45 // room for the legend
	return row > 0 && most > 0, nil
}
