package result

import (
	"bytes"
	"strings"
	"testing"
)

// traced is a round in which the agents took so long to send, in ns.
func traced(gbps, send float64) Round {
	return Round{
		TCP:       []TCP{{Streams: 1, Bytes: 1e9, Seconds: 1, Gbps: gbps}},
		Breakdown: []Breakdown{{Traffic: TraceTCP, Sent: 10, Received: 10, Stages: []StageTime{{"read", 100}, {"send", send}}}},
	}
}

// Each stage has its median, the sum is shown beside them, and modes without agents have no row. A comparison of two runs
// leaves the stages out: they explain, and are no measures of their own.
func TestBreakdown(t *testing.T) {
	run := func(factor float64) *Run {
		r := &Run{Kind: Lab, References: []string{"kernel-vxlan"}, Modes: []Mode{{Name: "kernel-vxlan"}, {Name: "udp", Tulle: true}}}
		for i := range IntervalRounds {
			r.Modes[0].Rounds = append(r.Modes[0].Rounds, Round{TCP: []TCP{{Streams: 1, Gbps: 5}}})
			r.Modes[1].Rounds = append(r.Modes[1].Rounds, traced(6, factor*float64(1000+i)))
		}
		r.Summarise()
		return r
	}
	r := run(1)
	got := r.Modes[1].Breakdowns()
	if len(got) != 1 || got[0].Traffic != TraceTCP || len(got[0].Stages) != 2 || got[0].Stages[1] != (StageTime{"send", 1002}) {
		t.Errorf("medians %+v", got)
	}
	if s := r.Modes[1].Summary["trace_tcp_sum_ns"]; s.Median != 1102 {
		t.Errorf("sum %+v", s)
	}
	if got := r.Modes[0].Breakdowns(); got != nil {
		t.Errorf("a mode of the kernel has %+v", got)
	}
	var out bytes.Buffer
	if err := r.Print(&out, true); err != nil {
		t.Fatal(err)
	}
	_, table, ok := strings.Cut(out.String(), "TCP 1 stream: TUN read, ns")
	row, _, _ := strings.Cut(strings.SplitN(table, "\n", 3)[1], " ")
	if !ok || row != "udp" {
		t.Errorf("the first row of the table is of %q:\n%s", row, table)
	}
	d, err := Compare(r, run(3), 0)
	if err != nil || d.Regressed() || len(d.Changes) != 2 {
		t.Errorf("a comparison has %+v (%v)", d.Changes, err)
	}
}

// Ratios are taken among modes whose hosts are wired alike.
func TestWiring(t *testing.T) {
	one := func(name, wiring string, gbps float64) Mode {
		return Mode{Name: name, Wiring: wiring, Tulle: name == "direct", Rounds: []Round{{TCP: []TCP{{Streams: 1, Gbps: gbps}}}}}
	}
	r := &Run{Kind: Lab, Rounds: 1, References: []string{"kernel-vxlan", "no-tunnel-subnet"}, Modes: []Mode{
		one("kernel-vxlan", "", 5), one("no-tunnel-subnet", OneSubnet, 8), one("direct", OneSubnet, 6),
	}}
	r.Summarise()
	if s, ok := r.Ratio("direct", "no-tunnel-subnet", "tcp1_gbps"); !ok || s.Median != 0.75 || len(r.Ratios) != 1 {
		t.Errorf("ratios %+v", r.Ratios)
	}
	if got, want := r.Glance(), "kernel-vxlan, of direct to no-tunnel-subnet"; got != want {
		t.Errorf("at a glance %q, want %q", got, want)
	}
	if got, want := r.Verdict(), "Tulle direct carries 0.75 × no-tunnel-subnet in one TCP stream."; got != want {
		t.Errorf("verdict %q, want %q", got, want)
	}
}
