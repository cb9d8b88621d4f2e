package bench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/internal/lab"
)

// labOptions are for a test that measures a few modes shortly.
func labOptions(t *testing.T, name string, modes ...string) AllOptions {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes network namespaces")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return AllOptions{Name: fmt.Sprintf("t%d-%s", os.Getpid(), name), Modes: modes, Duration: shortest, Binary: "/bin/false", Helper: []string{self, "helper"}}
}

// The same mode under two names: its ratio to itself lies around 1 in each measure. By chance all of eleven ratios are on
// one side once in a thousand, and in both of two runs once in a million.
func TestIdenticalModes(t *testing.T) {
	if testing.Short() {
		t.Skip("eleven rounds: the other tests show the race detector as much")
	}
	const again = "no-tunnel-again"
	was := modes
	modes = append(modes[:1:1], mode{again, "the same", "", "", setupNoTunnel})
	defer func() { modes = was }()
	o := labOptions(t, "twin", NoTunnel, again)
	o.Rounds, o.Measures = 11, []string{Delay}
	first := ratiosOfEquals(t, o, again)
	if len(first) == 0 {
		return
	}
	t.Log(first)
	for key, s := range ratiosOfEquals(t, o, again) {
		if _, twice := first[key]; twice {
			t.Errorf("%s: the ratio of equals is %+v, and was %+v", key, s, first[key])
		}
	}
}

// ratiosOfEquals measures, and returns those ratios of the mode to itself that do not lie around 1.
func ratiosOfEquals(t *testing.T, o AllOptions, again string) (wrong map[string]result.Spread) {
	t.Helper()
	r, err := All(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	for i, round := range r.Modes[0].Rounds {
		if other := r.Modes[1].Rounds[i]; round.Order != i%2 || other.Order != 1-i%2 {
			t.Errorf("round %d measured the modes in the places %d and %d", i, round.Order, other.Order)
		}
	}
	wrong = map[string]result.Spread{}
	for _, key := range []string{"rtt64_pinned_p50_us", "rtt1400_p50_us"} {
		s, ok := r.Ratio(again, NoTunnel, key)
		if !ok || s.N != 11 || s.Low > s.Median || s.High < s.Median {
			t.Errorf("%s: the ratio of equals is %+v", key, s)
		}
		if s.Min > 1 || s.Max < 1 {
			wrong[key] = s
		}
	}
	return wrong
}

// Ctrl-C keeps the rounds that are complete, and leaves no lab behind.
func TestAllInterrupted(t *testing.T) {
	o := labOptions(t, "int", NoTunnel)
	o.Rounds, o.Measures = 3, []string{Delay}
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	o.Progress = func(s string) {
		if strings.HasPrefix(s, "round 2 of 3: latency at 1400") {
			interrupt()
		}
	}
	r, err := All(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	if !r.Interrupted || len(r.Modes[0].Rounds) != 1 || !strings.Contains(r.Verdict(), "INTERRUPTED after 1 of 3 rounds") {
		t.Fatal(r.Verdict())
	}
	if _, ok := r.Modes[0].Summary["rtt64_p50_us"]; !ok || r.Kind != result.Lab {
		t.Errorf("of the complete round is left: %v", r.Modes[0].Summary)
	}
	labs, err := lab.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range labs {
		if strings.HasPrefix(l, o.Name) {
			t.Errorf("lab %s was left behind", l)
		}
	}
}

// What cannot be profiled is said before anything is measured, and what fails after the rounds takes none of them away.
func TestAllKeepsRounds(t *testing.T) {
	o := labOptions(t, "keep", NoTunnel)
	o.Rounds, o.Measures, o.Profile = 1, []string{Delay}, filepath.Join(t.TempDir(), "profile")
	tools := t.TempDir()
	t.Setenv("PATH", tools)
	o.Progress = func(s string) { t.Errorf("before a profile was refused: %s", s) }
	if r, err := All(t.Context(), o); r != nil || err == nil || !strings.Contains(err.Error(), "a profile needs perf") {
		t.Fatalf("without perf: %v, %v", r, err)
	}
	o.Progress = nil
	if err := os.WriteFile(filepath.Join(tools, "perf"), []byte("#!/bin/sh\necho no such event >&2\nexit 3\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	r, err := All(t.Context(), o)
	if err == nil || !strings.Contains(err.Error(), "perf record: exit status 3: no such event") {
		t.Errorf("perf that fails: %v", err)
	}
	if r == nil || r.Interrupted || len(r.Modes[0].Rounds) != 1 || r.Modes[0].Summary["rtt64_p50_us"].N != 1 {
		t.Fatalf("the round is lost: %+v", r)
	}
}
