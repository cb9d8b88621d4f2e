package bench

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/testing/testbuild"
)

// The test binary is also the helper processes that All starts.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "helper" {
		if err := Helper(os.Args[2], os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// One short round of every mode: everything that this machine can do is measured, what it cannot is named, and nothing is
// left behind. No figure is held against the clock.
func TestAll(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes network namespaces")
	}
	dir := t.TempDir()
	tulle := filepath.Join(dir, "tulle")
	if err := testbuild.Tulle(tulle, nil); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("t%d-ball", os.Getpid())
	o := AllOptions{
		Name: name, Rounds: 1, Duration: shortest, Binary: tulle, Helper: []string{self, "helper"},
		Progress: func(s string) { t.Log(s) },
	}
	autogroups, _ := os.ReadFile("/proc/sys/kernel/sched_autogroup_enabled")
	r, err := All(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range r.Modes {
		if m.Missing != "" {
			if !m.Lacking || !slices.Contains([]string{KernelVXLAN, KernelIPIP, KernelWireGuard}, m.Name) {
				t.Errorf("%s was not measured: %s", m.Name, m.Missing)
			}
			continue
		}
		for _, e := range m.Errors {
			t.Errorf("%s: %s", m.Name, e)
		}
		for _, metric := range metrics {
			s, ok := m.Summary[metric.Key]
			userspace := m.Name == WireGuardGo || strings.HasPrefix(m.Name, "tulle-")
			switch {
			case metric.Key == "rss_mb" && !userspace:
				if ok {
					t.Errorf("%s has no process, but a memory of %v", m.Name, s)
				}
			case metric.Key == "cpu_s_per_gb" && !ok: // others used all of the machine
			case !ok || s.N != 1 || math.IsNaN(s.Median) || math.IsInf(s.Median, 0) || s.Median < 0:
				t.Errorf("%s: %s = %+v, measured %v", m.Name, metric.Key, s, ok)
			}
		}
		if c := m.crossing(); c.Cut() > cutAllowed || c.FrameBytes() > float64(r.MTU+14) || c.FrameBytes() < float64(r.MTU)/2 {
			t.Errorf("%s: on a wire that cuts, %d frames of %.0f bytes came to the router and %d left it", m.Name, c.InFrames, c.FrameBytes(), c.OutFrames)
		}
		for _, u := range m.Detail[0].UDP {
			if len(u.Trials) == 0 || u.Trials[0].Received == 0 {
				t.Errorf("%s: no datagram of %d bytes arrived: %+v", m.Name, u.Payload, u)
			}
			for _, trial := range u.Trials {
				if trial.Received > trial.Sent {
					t.Errorf("%s: more datagrams arrived than were sent: %+v", m.Name, trial)
				}
			}
		}
	}
	var text, again bytes.Buffer
	if err := r.Print(&text, true); err != nil {
		t.Fatal(err)
	}
	t.Log("\n" + text.String())
	for _, want := range append(Modes(), "FLOOR", "half RTT", r.Machine.Kernel) {
		if !strings.Contains(text.String(), want) {
			t.Errorf("the table lacks %q", want)
		}
	}
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var back AllResult
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	if err := back.Print(&again, true); err != nil || again.String() != text.String() {
		t.Errorf("the result printed from its JSON differs (%v):\n%s", err, again.String())
	}
	labs, err := lab.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range labs {
		if strings.HasPrefix(l, name) {
			t.Errorf("lab %s was left behind", l)
		}
	}
	if now, _ := os.ReadFile("/proc/sys/kernel/sched_autogroup_enabled"); !bytes.Equal(now, autogroups) {
		t.Errorf("autogroups were %q and are %q", autogroups, now)
	}
}

func TestAllRefuses(t *testing.T) {
	good := AllOptions{Helper: []string{"tulle"}}
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	for name, tc := range map[string]struct {
		o    AllOptions
		want string
	}{
		"mode":     {AllOptions{Helper: good.Helper, Modes: []string{"carrier-pigeon"}}, "no mode \"carrier-pigeon\"; there are no-tunnel"},
		"rounds":   {AllOptions{Helper: good.Helper, Rounds: -1}, "-1 rounds"},
		"duration": {AllOptions{Helper: good.Helper, Duration: time.Millisecond}, "at least 100ms"},
		"helper":   {AllOptions{}, "helper"},
	} {
		if err := tc.o.Validate(); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want something about %q", name, err, tc.want)
		}
	}
}

func TestSpread(t *testing.T) {
	for _, tc := range []struct {
		in   []float64
		want Spread
	}{
		{nil, Spread{}},
		{[]float64{7}, Spread{1, 7, 7, 7}},
		{[]float64{3, 1}, Spread{2, 2, 1, 3}},
		{[]float64{9, 1, 2}, Spread{3, 2, 1, 9}},
		{[]float64{4, 1, 3, 100}, Spread{4, 3.5, 1, 100}},
	} {
		before := slices.Clone(tc.in)
		if got := spreadOf(tc.in); got != tc.want {
			t.Errorf("%v: got %+v, want %+v", tc.in, got, tc.want)
		}
		if !slices.Equal(before, tc.in) {
			t.Errorf("%v was sorted in place: the order of rounds is lost", before)
		}
	}
}

// Ratios pair the values of a round; the ratio of the medians would be another.
func TestRatiosArePaired(t *testing.T) {
	a := []Round{{"x": 10}, {"x": 2}, {}, {"x": 6}, {"x": 5}}
	b := []Round{{"x": 5}, {"x": 4}, {"x": 1}, {"y": 1}, {"x": 0}}
	if got := ratios(a, b, "x"); !slices.Equal(got, []float64{2, 0.5}) {
		t.Errorf("got %v", got)
	}
}

// A result of three rounds, made by hand, and what follows from it.
func TestFloors(t *testing.T) {
	tcp := func(gbps ...float64) (out []Detail) {
		for _, g := range gbps {
			out = append(out, Detail{TCP: []TCP{{Streams: 1, Bytes: 2e9, Seconds: 1, Gbps: g, CPU: CPUUse{Busy: g, Agents: 1}}}})
		}
		return out
	}
	r := &AllResult{Modes: []ModeResult{
		{Name: KernelVXLAN, Detail: tcp(4, 4, 4)},
		{Name: NoTunnel, Detail: tcp(8, 8, 5)},
		{Name: TulleUDP, Detail: tcp(6, 2, 5)},
	}}
	r.summarise()
	if got, want := r.Modes[0].Summary["cpu_s_per_gb"], (Spread{3, 2, 2, 2}); got != want {
		t.Errorf("CPU seconds per GB %+v, want %+v", got, want)
	}
	for _, f := range r.Floors {
		if f.Mode == TulleIPIP && (f.Measured || f.Met) {
			t.Errorf("a floor of a mode that was not measured: %+v", f)
		}
		if f.Mode != TulleUDP || f.Metric != "tcp1_gbps" {
			continue
		}
		want := map[string]Spread{KernelVXLAN: {3, 1.25, 0.5, 1.5}, NoTunnel: {3, 0.75, 0.25, 1}}[f.To]
		if !f.Measured || f.Ratio != want || f.Met != (f.To == KernelVXLAN) {
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

func TestDigits(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.0123: "0.012", 0.5: "0.50", 9.876: "9.88", 12.34: "12.3", 187654: "187654", -3: "-3.00"} {
		if got := digits(v); got != want {
			t.Errorf("%v: got %q, want %q", v, got, want)
		}
	}
}

// A tunnel made by hand: what is offered beyond its capacity is lost, and the sender has a limit of its own.
func model(capacity, limit float64, noise func(n int) float64) func(rate float64) (Trial, error) {
	n := 0
	return func(rate float64) (Trial, error) {
		n++
		sent := limit
		if rate > 0 {
			sent = min(rate, limit)
		}
		got := min(sent, capacity)
		if noise != nil {
			got *= 1 - noise(n)
		}
		return Trial{Offered: rate, Sent: uint64(sent), Received: uint64(got), Seconds: 1, Arriving: 1}, nil
	}
}

func TestSearchRate(t *testing.T) {
	for _, capacity := range []float64{1000, 43_000, 99_000, 250_000, 399_000} {
		s, err := searchRate(64, model(capacity, 400_000, nil))
		if err != nil {
			t.Fatal(err)
		}
		if got := s.Best.Rate(); got > capacity || got < capacity/precision || len(s.Trials) > maxTrials+3 {
			t.Errorf("capacity %v: found %v in %d trials", capacity, got, len(s.Trials))
		}
	}
	t.Run("sender is the limit", func(t *testing.T) {
		s, err := searchRate(64, model(500_000, 400_000, nil))
		if err != nil || s.Best.Rate() != 400_000 || len(s.Trials) != 4 {
			t.Errorf("got %+v, %v", s, err)
		}
	})
	t.Run("one disturbed trial", func(t *testing.T) { // every third trial loses 1 % to somebody else
		s, err := searchRate(64, model(100_000, 400_000, func(n int) float64 {
			if n%3 == 0 {
				return 0.01
			}
			return 0
		}))
		if err != nil || s.Best.Rate() < 100_000/precision/precision*(1-confirmDown) || s.Best.Rate() > 100_000 {
			t.Errorf("got %v of %+v, %v", s.Best.Rate(), s.Trials, err)
		}
	})
	t.Run("nothing arrives", func(t *testing.T) {
		s, err := searchRate(64, model(0, 400_000, nil))
		if err != nil || s.Best.Received != 0 || len(s.Trials) > maxTrials {
			t.Errorf("got %+v, %v", s, err)
		}
	})
	t.Run("always a little loss", func(t *testing.T) {
		s, err := searchRate(64, model(1e9, 400_000, func(int) float64 { return 0.01 }))
		if err != nil || s.Best.Received != 0 || len(s.Trials) > maxTrials+3*confirmSteps {
			t.Errorf("got %d trials, %+v, %v", len(s.Trials), s.Best, err)
		}
	})
	t.Run("a lucky trial", func(t *testing.T) { // the sender got through once, at a rate that does not hold
		s, err := searchRate(64, model(100_000, 110_000, func(n int) float64 {
			if n == 1 {
				return -0.1
			}
			return 0
		}))
		if err != nil || s.Best.Rate() > 100_000 || s.Best.Rate() < 90_000 {
			t.Errorf("got %v of %+v, %v", s.Best.Rate(), s.Trials, err)
		}
	})
	t.Run("a trial fails", func(t *testing.T) {
		broken := errors.New("broken")
		if _, err := searchRate(64, func(float64) (Trial, error) { return Trial{}, broken }); !errors.Is(err, broken) {
			t.Errorf("got %v", err)
		}
	})
}

// What a long queue still held when the sender stopped arrives later, and is no faster for it.
func TestTrialRate(t *testing.T) {
	tr := Trial{Sent: 1000, Received: 900, Seconds: 1, Arriving: 1.5}
	if tr.Rate() != 600 || tr.SentRate() != 1000 || math.Abs(tr.Loss()-0.1) > 1e-9 {
		t.Errorf("got %v, %v, %v", tr.Rate(), tr.SentRate(), tr.Loss())
	}
	tr.Arriving = 0.001 // everything came at once, at the end
	if tr.Rate() != 900 {
		t.Errorf("got %v", tr.Rate())
	}
}

func TestParseStat(t *testing.T) {
	const text = "cpu  100 1 50 1000 20 3 4 7 0 0\ncpu0 50 1 25 500 10 3 4 7 0 0\ncpu1 50 0 25 500 10 0 0 0 0 0\nintr 1 2 3\n"
	s, err := parseStat([]byte(text))
	if err != nil || math.Abs(s.idle-10.2) > 1e-9 || math.Abs(s.steal-0.07) > 1e-9 || s.cpus != 2 {
		t.Errorf("got %+v, %v", s, err)
	}
	m := cpuMeter{stat: s, agents: 1, others: 4}
	u := m.use(10, cpuStat{idle: 16.2, steal: 1.07, cpus: 2}, 3, 6)
	want := CPUUse{Busy: 20 - 6 - 1 - 2, Others: 2, Steal: 1, Agents: 2}
	if math.Abs(u.Busy-want.Busy) > 1e-9 || math.Abs(u.Steal-want.Steal) > 1e-9 || u.Others != want.Others || u.Agents != want.Agents {
		t.Errorf("got %+v, want %+v", u, want)
	}
	for _, bad := range []string{"", "cpu 1 2 3\ncpu0 1 2 3\n", "cpu  1 2 3 x 5 6 7 8\ncpu0\n", "cpu0 1 2 3 4 5 6 7 8\n"} {
		if _, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestParseProcess(t *testing.T) {
	const user = "4711 (a) R (b)) S 1 4711 4711 0 -1 4194560 100 0 0 0 150 50 30 20 20 0 8 0 12345 1 2 3"
	p, err := parseProcess([]byte(user))
	if err != nil || p != (process{own: 2, children: 0.5}) {
		t.Errorf("got %+v, %v", p, err)
	}
	const thread = "15 (ksoftirqd/0) S 2 0 0 0 -1 69238848 0 0 0 0 0 7 0 0 20 0 1 0 9 0 0"
	if p, err = parseProcess([]byte(thread)); err != nil || !p.kernel {
		t.Errorf("got %+v, %v", p, err)
	}
	for _, bad := range []string{"", "1 (x) S 1 2 3", strings.Replace(user, "4194560", "x", 1), strings.Replace(user, " 150 ", " x ", 1)} {
		if _, err := parseProcess([]byte(bad)); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
	m := cpuMeter{pids: []int{1}}
	if agents, others, err := m.processes(); err != nil || agents < 0 || others < 0 {
		t.Errorf("got %v, %v, %v", agents, others, err)
	}
	m.pids = []int{math.MaxInt32}
	if _, _, err := m.processes(); err == nil {
		t.Error("a process that does not run was counted")
	}
}

func TestParseResident(t *testing.T) {
	if n, err := parseResident("Name:\tx\nVmHWM:\t 9 kB\nVmRSS:\t    1024 kB\n"); err != nil || n != 1<<20 {
		t.Errorf("got %d, %v", n, err)
	}
	if _, err := parseResident("Name:\tkworker\n"); err == nil {
		t.Error("a process without memory was taken")
	}
	if n, err := residentMemory([]int{os.Getpid()}); err != nil || n < 1<<20 {
		t.Errorf("this process: %d bytes, %v", n, err)
	}
}

func TestCPUName(t *testing.T) {
	if got := cpuName("processor\t: 0\nmodel name\t: Fast: CPU\nmodel name\t: other\n"); got != "Fast: CPU" {
		t.Errorf("got %q", got)
	}
	if got := cpuName("processor\t: 0\n"); got != "" {
		t.Errorf("got %q", got)
	}
}

func TestSplit(t *testing.T) {
	set := func(cpus ...int) (s unix.CPUSet) {
		for _, c := range cpus {
			s.Set(c)
		}
		return s
	}
	for _, tc := range []struct{ all, from, to unix.CPUSet }{
		{set(3), set(3), set(3)},
		{set(0, 1), set(0), set(1)},
		{set(2, 5, 70), set(2), set(5, 70)},
		{set(0, 1, 2, 3), set(0, 1), set(2, 3)},
	} {
		if got := (Sides{tc.all, tc.all}).split(); got != (Sides{tc.from, tc.to}) {
			t.Errorf("%v: got %v", tc.all, got)
		}
	}
}

func TestAutogroup(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it sets a negative nice value")
	}
	// In a session of its own a process has an autogroup.
	c := exec.Command("sleep", "60")
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = c.Process.Kill()
		_ = c.Wait()
	}()
	if err := setAutogroup(c.Process.Pid, -3); err != nil {
		t.Error(err)
	}
	if nice, in, err := autogroup(c.Process.Pid); err != nil || in && nice != -3 {
		t.Errorf("a process that leads a session: nice value %d, in an autogroup %v, %v", nice, in, err)
	}
	// The kernel's threads have none, as their children that began no session, which an init may be.
	const kthreadd = 2
	if nice, in, err := autogroup(kthreadd); err != nil || in {
		t.Errorf("kthreadd: nice value %d, in an autogroup %v, %v", nice, in, err)
	}
	if err := setAutogroup(kthreadd, -3); err != nil {
		t.Error(err)
	}
}

// No CPU is idle while they are kept awake.
func TestKeepAwake(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it switches autogroups off for a moment")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	stop, err := StartAwake(t.Context(), []string{self, "helper"})
	if err != nil {
		t.Fatal(err)
	}
	m, err := startCPU(nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := sleep(t.Context(), 200*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	now, err := readStat()
	if err != nil {
		t.Fatal(err)
	}
	stop()
	if idle := now.idle - m.stat.idle; idle > 0.05 {
		t.Errorf("CPUs that should have been awake were idle for %.2f s of 0.4", idle)
	}
	if _, err := StartAwake(t.Context(), []string{"/bin/false"}); err == nil {
		t.Error("a helper that ends at once was taken for one that works")
	}
}

func TestHelperRefuses(t *testing.T) {
	if err := Helper("nothing", strings.NewReader(""), os.Stderr); err == nil || !strings.Contains(err.Error(), `"nothing"`) {
		t.Errorf("got %v", err)
	}
	if err := wireguardGo(strings.NewReader("{\n"), os.Stderr); err == nil || !strings.Contains(err.Error(), "configuration") {
		t.Errorf("got %v", err)
	}
}
