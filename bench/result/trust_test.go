package result

import (
	"slices"
	"testing"
)

// Between two machines, other users of either are a reason for doubt, and where there are several paths it is said which one.
func TestDoubts(t *testing.T) {
	lossy := latencyOf(PingPong, 64)
	l := &lossy.Latency[0]
	l.Lost = 1
	l.Seconds = 2 * 64 * 8 / 102e6 // one datagram at a time may be a fast flow where round trips are short
	full := latencyOf(Loaded, 64)  // of a queue that others fill, a loss is no doubt
	full.Latency[0].Lost = 1
	busy := oneRound(5)
	busy.TCP[0].CPU.Others = 0.6
	for name, tc := range map[string]struct {
		rounds []Round
		modes  int
		want   []string
	}{
		"nothing":          {[]Round{oneRound(5), oneRound(6)}, 1, []string{}},
		"rounds of a path": {[]Round{oneRound(5), oneRound(8)}, 2, []string{"b: one TCP stream carried 5.00 Gb/s in one round and 8.00 in another."}},
		"rounds":           {[]Round{oneRound(5), oneRound(8)}, 1, []string{"one TCP stream carried 5.00 Gb/s in one round and 8.00 in another."}},
		"others":           {[]Round{oneRound(5), busy}, 1, []string{"Others used up to 10 % of the machines while TCP was measured: figures are too low, and noisy."}},
		"a full queue":     {[]Round{full}, 1, []string{}},
		"loss":             {[]Round{lossy}, 1, []string{"half RTT 64 B loss: 50.0 % of a flow of 102 Mb/s. TCP and latency suffer from what loses it."}},
	} {
		r := &Run{Kind: Pair, Machines: []Machine{{End: "from", CPUs: 2}, {End: "to", CPUs: 4}}}
		if tc.modes > 1 {
			r.Modes = append(r.Modes, Mode{Name: "a", Rounds: []Round{oneRound(5)}})
		}
		r.Modes = append(r.Modes, Mode{Name: "b", Rounds: tc.rounds})
		r.Summarise()
		if got := r.Doubts(); !slices.Equal(got, tc.want) {
			t.Errorf("%s: got %q, want %q", name, got, tc.want)
		}
	}
	r := &Run{Kind: Pair, Machines: []Machine{{End: "from", CPUs: 2}, {End: "to", CPUs: 4, Quota: 1}}}
	if got := r.Doubts(); len(got) != 1 || got[0] != `The CPU quota at the "to" end is 1.00 of 4 CPUs: throughput and the longest latencies may be the quota's.` {
		t.Errorf("a quota at the other end: %q", got)
	}
}
