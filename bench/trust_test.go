package bench

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/internal/lab"
)

// oneRound is what one round may have found: TCP with one stream, and frames that came to the router and left it.
func oneRound(gbps float64, in, out, bytes uint64) result.Round {
	return result.Round{
		TCP:      []result.TCP{{Streams: 1, Bytes: 1e9, Seconds: 1, Gbps: gbps, CPU: result.CPUUse{Busy: 2}}},
		Crossing: result.Crossing{InFrames: in, InBytes: bytes, OutFrames: out, OutBytes: bytes},
	}
}

// slow is a ping-pong of a hundred datagrams that took so many µs, of which some were lost.
func slow(micros, lost int64) result.Latency {
	l := result.Latency{Kind: result.PingPong, Payload: 64, Seconds: 1, Answers: 100 - lost, Lost: lost, Times: result.NewHistogram()}
	for range l.Answers {
		l.Times.Record(time.Duration(micros) * time.Microsecond)
	}
	return l
}

func TestWarnings(t *testing.T) {
	good := oneRound(6, 1000, 1001, 1000*1500)
	for name, tc := range map[string]struct {
		change func(r *result.Run)
		want   string // "" for none
	}{
		"nothing wrong":         {func(*result.Run) {}, ""},
		"whole wire":            {func(r *result.Run) { r.Wire, r.Modes[2].Rounds[0].Crossing.InBytes = string(lab.WireWhole), 1000*50000 }, ""},
		"the router cuts":       {func(r *result.Run) { r.Modes[1].Rounds[0].Crossing.OutFrames = 40_331 }, "kernel-vxlan: the router sent 40.3 frames on for each"},
		"the wire does not":     {func(r *result.Run) { r.Modes[2].Rounds[0].Crossing.InBytes = 1000 * 50000 }, "udp: frames of 50000 bytes"},
		"kernel VXLAN is slow":  {func(r *result.Run) { r.Modes[1].Rounds[0].TCP[0].Gbps = 2.9 }, "kernel-vxlan carries 0.48 of no-tunnel"},
		"no tunnel is slow":     {func(r *result.Run) { r.Modes[0].Rounds[0].TCP[0].Gbps = 4 }, "no tunnel is slower"},
		"rounds disagree":       {func(r *result.Run) { r.Modes[2].Rounds = append(r.Modes[2].Rounds, oneRound(2, 1, 1, 1500)) }, "6.00 in another"},
		"others are busy":       {func(r *result.Run) { r.Others.Max = 0.4 }, "40 % of the machine"},
		"others come meanwhile": {func(r *result.Run) { r.Modes[2].Rounds[0].TCP[0].CPU.Others = 1 }, "Others used up to 25 % of the machine while TCP was measured"},
		"a quota":               {func(r *result.Run) { r.Machines[0].Quota = 1.5 }, "The CPU quota is 1.50 of 4 CPUs"},
		"a mode loses":          {func(r *result.Run) { r.Modes[2].Rounds[0].Latency = []result.Latency{slow(20, 2)} }, "udp: half RTT 64 B loss: 2.00 % of a flow of "},
		"latency disagrees": {func(r *result.Run) {
			more := oneRound(6, 1000, 1001, 1000*1500)
			r.Modes[2].Rounds[0].Latency, more.Latency = []result.Latency{slow(20, 0)}, []result.Latency{slow(50, 0)}
			r.Modes[2].Rounds = append(r.Modes[2].Rounds, more)
		}, "udp: half RTT 64 B p50 was 10.0 µs in one round and 25.0 in another"},
		"the hypervisor is busy": {func(r *result.Run) { r.Steal.Max = 0.1 }, "10 % of the machine away"},
	} {
		r := &result.Run{MTU: 1500, References: references, Machines: []result.Machine{{CPUs: 4}}, Wire: string(lab.WireCut), Rounds: 1, Modes: []result.Mode{
			{Name: NoTunnel, Rounds: []result.Round{good}}, {Name: KernelVXLAN, Rounds: []result.Round{oneRound(5, 1000, 1001, 1000*1500)}}, {Name: UDP, Rounds: []result.Round{good}},
			{Name: KernelIPIP, Missing: "this kernel has none", Lacking: true},
		}}
		for i := range r.Modes { // changes are to this case's own
			r.Modes[i].Rounds = slices.Clone(r.Modes[i].Rounds)
			for j := range r.Modes[i].Rounds {
				r.Modes[i].Rounds[j].TCP = slices.Clone(r.Modes[i].Rounds[j].TCP)
			}
		}
		tc.change(r)
		r.Summarise()
		r.Warnings = warnings(r)
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

// A result of three rounds, made by hand, and what follows from it.
func TestFloors(t *testing.T) {
	tcp := func(gbps ...float64) (out []result.Round) {
		for _, g := range gbps {
			out = append(out, result.Round{TCP: []result.TCP{{Streams: 1, Bytes: 2e9, Seconds: 1, Gbps: g, CPU: result.CPUUse{Busy: g, Agents: 1}}}})
		}
		return out
	}
	r := &result.Run{References: references, Targets: slices.Clone(targets), Modes: []result.Mode{
		{Name: "kernel-vxlan", Rounds: tcp(4, 4, 4)},
		{Name: "no-tunnel", Rounds: tcp(8, 8, 5)},
		{Name: "udp", Tulle: true, Rounds: tcp(6, 2, 5)},
	}}
	r.Summarise()
	if got, want := r.Modes[0].Summary["cpu_s_per_gb"], (result.Spread{N: 3, Median: 2, Min: 2, Max: 2}); got != want {
		t.Errorf("CPU seconds per GB %+v, want %+v", got, want)
	}
	for _, f := range r.Targets {
		if f.Mode == "ipip" && (f.Measured || f.Met) {
			t.Errorf("a floor of a mode that was not measured: %+v", f)
		}
		if f.Mode != "udp" || f.Metric != "tcp1_gbps" {
			continue
		}
		want := map[string]result.Spread{KernelVXLAN: {N: 3, Median: 1.25, Min: 0.5, Max: 1.5}, NoTunnel: {N: 3, Median: 0.75, Min: 0.25, Max: 1}}[f.To]
		if !f.Measured || f.Ratio != want || f.Met != (f.To == "kernel-vxlan") {
			t.Errorf("floor against %s: %+v, want ratio %+v", f.To, f, want)
		}
	}
	var out bytes.Buffer
	if err := r.Print(&out, true); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"1.25 (0.50–1.50)  met\n", "0.75 (0.25–1.00)  not met\n", "not measured"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the table lacks %q:\n%s", want, out.String())
		}
	}
}
