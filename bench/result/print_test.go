package result

import (
	"bytes"
	"io"
	"math"
	"strings"
	"testing"
	"time"
	"unicode"
)

// latencyOf is a round with one measure of latency.
func latencyOf(kind string, payload int) Round {
	l := Latency{Kind: kind, Payload: payload, Seconds: 1, Answers: 1, Times: NewHistogram()}
	l.Times.Record(20 * time.Microsecond)
	return Round{Latency: []Latency{l}}
}

// The sentence at the beginning names what was measured, whatever that is.
func TestVerdictOfWhatWasMeasured(t *testing.T) {
	tcp, flood := oneRound(5), Round{Floods: []Flood{{Flows: 1, Payload: 1000, Trial: Trial{Sent: 100, Received: 50, Seconds: 1}}}}
	for name, tc := range map[string]struct {
		modes []string
		round Round
		want  string
	}{
		"paths, latency":            {[]string{"direct", "udp"}, latencyOf(PingPong, 64), "direct has half a round trip of 10.0 µs with path MTU 1400, udp has half a round trip of 10.0 µs with path MTU 1400."},
		"paths, another payload":    {[]string{"direct", "udp"}, latencyOf(PingPong, 1400), "direct has half RTT 1,400 B p50 of 10.0 µs with path MTU 1400, udp has half RTT 1,400 B p50 of 10.0 µs with path MTU 1400."},
		"paths, throughput":         {[]string{"direct", "udp"}, tcp, "direct has 5.00 Gb/s in one TCP stream with path MTU 1400, udp has 5.00 Gb/s in one TCP stream with path MTU 1400."},
		"paths, TCP has failed":     {[]string{"direct", "udp"}, flood, "direct has UDP 1 flow of 0.0004 Gb/s with path MTU 1400, udp has UDP 1 flow of 0.0004 Gb/s with path MTU 1400."},
		"paths, all has failed":     {[]string{"direct", "udp"}, Round{}, "Nothing was measured."},
		"one path, another payload": {[]string{"net"}, latencyOf(PingPong, 1400), "net: half RTT 1,400 B p50 of 10.0 µs; path MTU 1400."},
		"one path, all has failed":  {[]string{"net"}, Round{}, "net: nothing was measured."},
	} {
		r := &Run{Kind: Pair, MTU: 1400, Rounds: 1}
		for _, m := range tc.modes {
			r.Modes = append(r.Modes, Mode{Name: m, MTU: 1400, Rounds: []Round{tc.round}})
		}
		r.Summarise()
		if got := r.Verdict(); got != tc.want {
			t.Errorf("%s: got %q, want %q", name, got, tc.want)
		}
	}
}

// A table says of how many rounds its medians are: of those that were complete.
func TestMediansOfMeasuredRounds(t *testing.T) {
	for name, tc := range map[string]struct {
		kind  string
		modes []string
	}{"lab": {Lab, []string{"kernel-vxlan", "udp"}}, "one path": {Pair, []string{"net"}}, "paths": {Pair, []string{"direct", "udp"}}} {
		for rounds, want := range map[int]string{1: "One round", 2: "Medians of 2 rounds"} {
			r := &Run{Kind: tc.kind, Interrupted: true, Rounds: 5, References: tc.modes[:1]}
			for _, m := range tc.modes {
				r.Modes = append(r.Modes, Mode{Name: m, Rounds: []Round{oneRound(5), oneRound(6)}[:rounds]})
			}
			r.Summarise()
			var table, markdown bytes.Buffer
			if err := r.Print(&table, true); err != nil {
				t.Fatal(err)
			}
			if err := r.WriteMarkdown(&markdown); err != nil {
				t.Fatal(err)
			}
			for _, text := range []string{table.String(), markdown.String()} {
				if !strings.Contains(text, want) || strings.Contains(text, "Medians of 5") || strings.Contains(text, "\n5 rounds") {
					t.Errorf("%s, %d of 5 rounds:\n%s", name, rounds, text)
				}
			}
			if strings.Contains(table.String(), "Half RTT: 64 bytes") || strings.Contains(table.String(), "MTU  FRAME  WHAT\n"+tc.modes[0]+"  0    0") {
				t.Errorf("%s: latency and frames were not measured:\n%s", name, table.String())
			}
		}
	}
}

// A path of which no rate held does not carry a rate of 0.
func TestVerdictWithoutRate(t *testing.T) {
	r := &Run{Kind: Pair, MTU: 1500, Modes: []Mode{{Name: "net", Rounds: []Round{{UDP: []RateSearch{{Payload: 64}}}}}}}
	r.Summarise()
	if got := r.Verdict(); got != "net: no rate of small datagrams without loss; path MTU 1500." {
		t.Errorf("got %q", got)
	}
}

// The last percentile of few answers is their longest, which is said, with the smallest number of them.
func TestSparse(t *testing.T) {
	round := func(kind string, answers int64) Round {
		d := latencyOf(kind, 64)
		d.Latency[0].Answers = answers
		return d
	}
	r := &Run{Kind: Pair, Modes: []Mode{{Name: "a", Rounds: []Round{round(PingPong, 1000), round(OpenLoop, 999)}}, {Name: "b", Rounds: []Round{round(OpenLoop, 20), round(OpenLoop, 30), round(CRR, 7)}}}}
	r.Summarise()
	want := "p99.9 of a round with fewer than 1,000 answers is the longest of them. There are as few as: half RTT 64 B at a fixed rate (20), TCP connect/request/response (7). A longer --duration has more."
	if got := r.Sparse(); len(got) != 1 || got[0] != want {
		t.Errorf("got %q", got)
	}
	r.Modes = []Mode{{Name: "a", Rounds: []Round{round(PingPong, 1000), oneRound(5)}}}
	r.Summarise()
	if got := r.Sparse(); got != nil {
		t.Errorf("of enough answers: %q", got)
	}
}

// Where nobody knows what the tunnel's processes are, they have no CPU time, and not one of 0.
func TestTunnelProcesses(t *testing.T) {
	for kind, want := range map[string]bool{Lab: true, Pair: false} {
		r := &Run{Kind: kind, Modes: []Mode{{Name: "net", Rounds: []Round{oneRound(5)}}}}
		r.Summarise()
		if _, has := r.Modes[0].Summary["tunnel_cpu_s_per_gb"]; has != want || !r.has("cpu_s_per_gb") {
			t.Errorf("%s: CPU time of the tunnel's processes: %v, want %v", kind, has, want)
		}
	}
}

// The table of a path has what is read first; -v has the rest.
func TestPathAtAGlance(t *testing.T) {
	d := latencyOf(PingPong, 64)
	d.TCP = oneRound(5).TCP
	r := &Run{Kind: Pair, MTU: 1500, Rounds: 1, Modes: []Mode{{Name: "net", Rounds: []Round{d}}}}
	r.Summarise()
	for verbose, want := range map[bool][]string{false: {"half RTT 64 B p50 ", "half RTT 64 B p99 ", "half RTT 64 B loss", "TCP 1 stream", "CPU, TCP 1 stream"}, true: {"half RTT 64 B p50 ", "half RTT 64 B p99.9", "half RTT 64 B max", "of it softirqs"}} {
		var out bytes.Buffer
		if err := r.Print(&out, verbose); err != nil {
			t.Fatal(err)
		}
		for _, w := range want {
			if !strings.Contains(out.String(), "\n"+w) {
				t.Errorf("verbose %v: no %q:\n%s", verbose, w, out.String())
			}
		}
		if !verbose && (strings.Contains(out.String(), "p99.9") || strings.Contains(out.String(), "softirqs")) {
			t.Errorf("this is no glance:\n%s", out.String())
		}
	}
}

// Where nothing is pinned, as on one CPU, the half round trip at a glance is the one that there is.
func TestHalfTripOfOneCPU(t *testing.T) {
	r := &Run{Kind: Lab, Rounds: 1, Wire: "cut", References: []string{"kernel-vxlan"}, Modes: []Mode{
		{Name: "kernel-vxlan", Rounds: []Round{latencyOf(PingPong, 64)}}, {Name: "udp", Tulle: true, Rounds: []Round{latencyOf(PingPong, 64)}},
	}}
	r.Summarise()
	var out bytes.Buffer
	if err := r.Print(&out, false); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Tulle udp has 1.00 × kernel-vxlan's latency.", "HALF RTT, µs", "Half RTT: 64 bytes, not pinned. The wire is cut."} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("lacks %q:\n%s", want, out.String())
		}
	}
}

// A stored run may be anybody's: no form that is printed commands a terminal. A kind of latency of a newer program is not taken for another one.
func TestPrintOfAnybody(t *testing.T) {
	const bad = "\x1b]0;x\x07\u009b2J\u202e\r"
	times := NewHistogram()
	times.Record(time.Millisecond)
	r := &Run{
		Kind: Pair, Warnings: []string{bad}, Notes: []string{bad}, Limits: []string{"held to 5 Mb/s"}, Machines: []Machine{{CPU: bad}},
		Modes: []Mode{{Name: bad, Errors: []string{bad}, Rounds: []Round{{Latency: []Latency{
			{Kind: PingPong, Payload: 64, Answers: 1, Times: times}, {Kind: "new", Payload: 64, Answers: 1, Times: NewHistogram()}, {Kind: bad, Payload: 64, Answers: 1, Times: times},
		}}}}},
	}
	r.Modes[0].Rounds[0].Latency[1].Times.Record(time.Second)
	r.Summarise()
	if v := r.Modes[0].Rounds[0].Values; math.Abs(v["rtt64_p50_us"]-500) > 1 || v["new_p50_us"] == 0 {
		t.Errorf("the values are %v", v)
	}
	for name, write := range map[string]func(io.Writer) error{
		"table": func(w io.Writer) error { return r.Print(w, true) }, "csv": r.WriteCSV, "markdown": r.WriteMarkdown,
	} {
		var b strings.Builder
		if err := write(&b); err != nil || strings.ContainsFunc(b.String(), func(c rune) bool { return c != '\n' && !unicode.IsPrint(c) }) {
			t.Errorf("%s: %v: %q", name, err, b.String())
		}
		if name != "csv" && !strings.Contains(b.String(), "held to 5 Mb/s") {
			t.Errorf("%s does not say that the run was limited", name)
		}
	}
}
