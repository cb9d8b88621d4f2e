package bench

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/internal/lab"
)

// oneRound is what one round may have found: TCP with one stream, and frames that came to the router and left it.
func oneRound(gbps float64, in, out, bytes uint64) Detail {
	return Detail{
		TCP:      []TCP{{Streams: 1, Bytes: 1e9, Seconds: 1, Gbps: gbps, CPU: CPUUse{Busy: 2}}},
		Crossing: lab.Crossing{InFrames: in, InBytes: bytes, OutFrames: out, OutBytes: bytes},
	}
}

func TestWarnings(t *testing.T) {
	good := oneRound(6, 1000, 1001, 1000*1500)
	for name, tc := range map[string]struct {
		change func(r *AllResult)
		want   string // "" for none
	}{
		"nothing wrong":          {func(*AllResult) {}, ""},
		"whole wire":             {func(r *AllResult) { r.Wire, r.Modes[2].Detail[0].Crossing.InBytes = lab.WireWhole, 1000*50000 }, ""},
		"the router cuts":        {func(r *AllResult) { r.Modes[1].Detail[0].Crossing.OutFrames = 40_331 }, "kernel-vxlan: the router sent 40.3 frames on for each"},
		"the wire does not":      {func(r *AllResult) { r.Modes[2].Detail[0].Crossing.InBytes = 1000 * 50000 }, "tulle-udp: frames of 50000 bytes"},
		"kernel VXLAN is slow":   {func(r *AllResult) { r.Modes[1].Detail[0].TCP[0].Gbps = 2.9 }, "kernel-vxlan carries 0.48 of no-tunnel"},
		"no tunnel is slow":      {func(r *AllResult) { r.Modes[0].Detail[0].TCP[0].Gbps = 4 }, "no tunnel is slower"},
		"rounds disagree":        {func(r *AllResult) { r.Modes[2].Detail = append(r.Modes[2].Detail, oneRound(2, 1, 1, 1500)) }, "6.00 in another"},
		"others are busy":        {func(r *AllResult) { r.Others.Max = 0.4 }, "40 % of the machine"},
		"the hypervisor is busy": {func(r *AllResult) { r.Steal.Max = 0.1 }, "10 % of the machine away"},
	} {
		r := &AllResult{MTU: 1500, Wire: lab.WireCut, Rounds: 1, Modes: []ModeResult{
			{Name: NoTunnel, Detail: []Detail{good}}, {Name: KernelVXLAN, Detail: []Detail{oneRound(5, 1000, 1001, 1000*1500)}}, {Name: TulleUDP, Detail: []Detail{good}},
			{Name: KernelIPIP, Missing: "this kernel has none", Lacking: true},
		}}
		for i := range r.Modes { // changes are to this case's own
			r.Modes[i].Detail = slices.Clone(r.Modes[i].Detail)
			for j := range r.Modes[i].Detail {
				r.Modes[i].Detail[j].TCP = slices.Clone(r.Modes[i].Detail[j].TCP)
			}
		}
		tc.change(r)
		r.summarise()
		r.Warnings = r.warnings()
		if tc.want == "" && len(r.Warnings) > 0 || tc.want != "" && !strings.Contains(strings.Join(r.Warnings, "\n"), tc.want) {
			t.Errorf("%s: %q, want %q", name, r.Warnings, tc.want)
		}
		var out bytes.Buffer
		if err := r.Print(&out, false); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(out.String(), "NOT TO BE TRUSTED") != (tc.want != "") || !strings.Contains(out.String(), "kernel-ipip: this kernel has none") {
			t.Errorf("%s: printed as\n%s", name, out.String())
		}
	}
}

func TestAtAGlance(t *testing.T) {
	r := &AllResult{MTU: 1500, Wire: lab.WireCut, Rounds: 2, Modes: []ModeResult{
		{Name: KernelVXLAN, Detail: []Detail{oneRound(5, 1, 1, 1500), oneRound(4, 1, 1, 1500)}}, {Name: TulleUDP, Detail: []Detail{oneRound(6, 1, 1, 1500), oneRound(5, 1, 1, 1500)}},
	}}
	r.summarise()
	var table, csv bytes.Buffer
	if err := r.Print(&table, false); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"tulle-udp carries 1.23 × kernel-vxlan in one TCP stream, takes 1.00 × its CPU.\n", "kernel-vxlan  4.50         –     –            –  2.00 ",
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
