package bench

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/bench/machine"
	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/bench/traffic"
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
	if len(os.Args) == 3 && os.Args[1] == "all" { // a run that TestAllKilled kills
		o := AllOptions{
			Name: os.Args[2], Modes: []string{NoTunnel, KernelVXLAN}, Rounds: 1000, Measures: []string{Delay}, Duration: shortest, Binary: "/bin/false",
			Helper: []string{os.Args[0], "helper"}, Progress: func(s string) { fmt.Println(s) },
		}
		_, err := All(context.Background(), o)
		fmt.Println(err)
		os.Exit(1)
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
	const autogroupSwitch = "/proc/sys/kernel/sched_autogroup_enabled"
	autogroups, _ := os.ReadFile(autogroupSwitch)
	r, err := All(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	measured, unstamped := 0, map[string]int{} // modes; those without a time of arrival, by metric
	for _, m := range r.Modes {
		if m.Missing != "" {
			if !m.Lacking || !slices.Contains([]string{KernelVXLAN, KernelIPIP, KernelFOU, KernelWireGuard, WireGuard}, m.Name) {
				t.Errorf("%s was not measured: %s", m.Name, m.Missing)
			}
			continue
		}
		measured++
		for _, e := range m.Errors {
			t.Errorf("%s: %s", m.Name, e)
		}
		for _, key := range []string{
			"tcp1_gbps", "tcp4_gbps", "tunnel_cpu_s_per_gb", "softirq_s_per_gb", "rtt64_p50_us", "rtt64_p99_9_us", "rtt64_pinned_p50_us", "rtt1400_p50_us",
			"open64_pinned_p50_us", "open64_pinned_loss", "rr_per_s", "rr_p99_us", "crr_per_s", "crr_p99_us", "udp64_kpps", "udp_full_kpps", "goodput_gbps",
			"udp_flood1_gbps", "udp_flood1_loss", "udp_flood4_gbps", "udp_flood4_loss",
		} {
			if _, ok := m.Summary[key]; !ok {
				t.Errorf("%s: no %s", m.Name, key)
			}
		}
		for _, metric := range r.Metrics {
			s, ok := m.Summary[metric.Key]
			userspace := m.Name == WireGuardGo || m.Tulle
			switch {
			case strings.HasPrefix(metric.Key, "trace_"):
				if traced := slices.Contains([]string{UDP, VXLAN, IPIP}, m.Name); traced != ok {
					t.Errorf("%s: %s is there: %v, its packets pass through agents: %v", m.Name, metric.Key, ok, traced)
				}
			case metric.Key == "rss_mb" && !userspace:
				if ok {
					t.Errorf("%s has no process, but a memory of %v", m.Name, s)
				}
			case (metric.Key == "cpu_s_per_gb" || metric.Key == "gbps_per_cpu" || metric.Group == "CPU per packet") && !ok: // others used all of the machine, or no rate held
			case strings.Contains(metric.Key, "_waking_") && !ok: // none of the few answers of a busy machine had the time of its arrival; looked at below
				unstamped[metric.Key]++
			case !ok || s.N != 1 || math.IsNaN(s.Median) || math.IsInf(s.Median, 0) || s.Median < 0:
				t.Errorf("%s: %s = %+v, measured %v", m.Name, metric.Key, s, ok)
			}
		}
		if c := m.Crossing(); c.Cut() > cutAllowed || c.FrameBytes() > float64(r.MTU+14) || c.FrameBytes() < float64(r.MTU)/2 {
			t.Errorf("%s: on a wire that cuts, %d frames of %.0f bytes came to the router and %d left it", m.Name, c.InFrames, c.FrameBytes(), c.OutFrames)
		}
		for _, b := range m.Rounds[0].Breakdown {
			if len(b.Stages) != 7 || b.Stages[0].Name != "read" || b.Stages[6].Name != "write" {
				t.Errorf("%s: the stages of %s are %+v", m.Name, b.Traffic, b.Stages)
			}
			for _, s := range b.Stages {
				if s.Nanoseconds <= 0 && b.Interrupted == 0 {
					t.Errorf("%s: %s takes no time for %s", m.Name, s.Name, b.Traffic)
				}
			}
		}
		for _, u := range m.Rounds[0].UDP {
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
	for key, n := range unstamped {
		if n == measured {
			t.Errorf("%s is measured in no mode", key)
		}
	}
	for _, key := range r.Asked {
		if r.Metric(key).Unit == "" {
			t.Errorf("a measure was asked for whose main metric, %s, is in no round", key)
		}
	}
	if want := 14; len(r.Asked) != want {
		t.Errorf("%d measures were asked for, want %d: %v", len(r.Asked), want, r.Asked)
	}
	var text, again bytes.Buffer
	if err := r.Print(&text, true); err != nil {
		t.Fatal(err)
	}
	t.Log("\n" + text.String())
	for _, want := range append(Modes(), "FLOOR", "half RTT", "TCP 1 stream: TUN read, ns", "ping-pong 64 B: sum, ns", r.Machines[0].Kernel) {
		if !strings.Contains(text.String(), want) {
			t.Errorf("the table lacks %q", want)
		}
	}
	var stored bytes.Buffer
	if err := r.WriteJSON(&stored); err != nil {
		t.Fatal(err)
	}
	back, err := result.Read(&stored)
	if err != nil {
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
	// Whoever else measures on this machine switches them off for a moment, too.
	now := func() []byte { b, _ := os.ReadFile(autogroupSwitch); return b }
	for end := time.Now().Add(20 * time.Second); !bytes.Equal(now(), autogroups) && string(autogroups) != "0\n"; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("autogroups were %q and are %q", autogroups, now())
		}
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
		"measure":  {AllOptions{Helper: good.Helper, Measures: []string{"taste"}}, "no measure \"taste\"; there are throughput"},
		"twice":    {AllOptions{Helper: good.Helper, Sizes: []int{64, 1400, 64}}, "a payload of 64 bytes is named twice"},
		"name":     {AllOptions{Helper: good.Helper, Name: "no name"}, `lab name "no name-13"`},
		"size":     {AllOptions{Helper: good.Helper, Sizes: []int{4}}, "a payload of 4 bytes: want between 8 and 65507"},
	} {
		if err := tc.o.Validate(); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want something about %q", name, err, tc.want)
		}
	}
}

// Modes have one name and, as they once had another, an alias; direct brings what it is compared with.
func TestChosen(t *testing.T) {
	for _, tc := range []struct{ in, want []string }{
		{nil, Modes()},
		{[]string{"kernel-fou", "tulle-udp", "udp"}, []string{UDP, KernelFOU}},
		{[]string{"direct"}, []string{NoTunnelSubnet, Direct}},
		{strings.Split("no-tunnel,direct,udp,udp-fast,ipip,ipip-fast,vxlan,wireguard,kernel-vxlan,kernel-ipip,kernel-fou,kernel-wireguard,wireguard-go", ","), Modes()},
	} {
		picked, err := chosen(tc.in)
		var got []string
		for _, m := range picked {
			got = append(got, m.name)
		}
		if err != nil || !slices.Equal(got, tc.want) {
			t.Errorf("%v: got %v, want %v (%v)", tc.in, got, tc.want, err)
		}
	}
}

// On one CPU no side has its own, so nothing is measured twice under one name.
func TestMeasuresOnOneCPU(t *testing.T) {
	o := &AllOptions{Sizes: []int{64, 1400}}
	want := map[int]int{1: 0, 2: 2} // pinned measures, by CPUs
	for cpus, pinned := range want {
		done := make(chan []measure)
		go func() {
			runtime.LockOSThread() // never unlocked: the thread ends with its goroutine
			var all, some unix.CPUSet
			if err := unix.SchedGetaffinity(0, &all); err != nil {
				t.Error(err)
			}
			for cpu := range len(all) * 64 {
				if all.IsSet(cpu) && some.Count() < cpus {
					some.Set(cpu)
				}
			}
			if err := unix.SchedSetaffinity(0, &some); err != nil || some.Count() < cpus {
				done <- nil
				return
			}
			done <- o.measures()
		}()
		measures := <-done
		if measures == nil {
			continue // this machine has fewer
		}
		n, seen := 0, map[string]int{}
		for _, m := range measures {
			if seen[m.main]++; strings.Contains(m.main, "pinned") {
				n++
			}
		}
		if n != pinned || seen["rtt64_p50_us"] != 1 || seen["open64_p50_us"]+seen["open64_pinned_p50_us"] != 1 || seen["rtt1400_p50_us"] != 1 {
			t.Errorf("%d CPUs: %v", cpus, seen)
		}
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

// No CPU is idle while threads spin.
func TestSpinning(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it switches autogroups off for a moment")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	stop, err := spinningThreads(t.Context(), []string{self, "helper"})
	if err != nil {
		t.Fatal(err)
	}
	before, err := machine.IdleSeconds()
	if err != nil {
		t.Fatal(err)
	}
	if err := traffic.Sleep(t.Context(), 200*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	now, err := machine.IdleSeconds()
	if err != nil {
		t.Fatal(err)
	}
	stop()
	if idle := now - before; idle > 0.05 {
		t.Errorf("CPUs that should have been awake were idle for %.2f s of 0.4", idle)
	}
	if _, err := spinningThreads(t.Context(), []string{"/bin/false"}); err == nil {
		t.Error("a helper that ends at once was taken for one that works")
	}
}

// While idle CPUs poll, they enter no other idle state. Afterwards nothing asks for that any more.
func TestPolling(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: /dev/cpu_dma_latency")
	}
	stop, err := polling()
	if err != nil {
		t.Skipf("idle CPUs cannot poll here: %v", err)
	}
	entered := func() (polled, other uint64) { // idle states, so far
		states, err := filepath.Glob("/sys/devices/system/cpu/cpu[0-9]*/cpuidle/state*/usage")
		if err != nil || len(states) == 0 {
			t.Fatalf("%v idle states, %v", states, err)
		}
		for _, path := range states {
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			n, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(path, "/state0/") {
				polled += n
			} else {
				other += n
			}
		}
		return polled, other
	}
	asks := func() (n int) { // this process
		files, err := filepath.Glob("/proc/self/fd/*")
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if to, err := os.Readlink(f); err == nil && to == "/dev/cpu_dma_latency" {
				n++
			}
		}
		return n
	}
	sleep := func() {
		if err := traffic.Sleep(t.Context(), 20*time.Millisecond); err != nil {
			t.Fatal(err)
		}
	}
	sleep() // until each CPU has left the state that it was in
	p, o := entered()
	polled, other := p, o
	for i := 0; i < 10 || i < 500 && polled == p; i++ { // others may use all CPUs for a while
		sleep()
		polled, other = entered()
	}
	if polled == p || other != o {
		t.Errorf("idle CPUs polled %d times and entered other states %d times", polled-p, other-o)
	}
	if n := asks(); n != 1 {
		t.Errorf("%d open files ask for polling, want 1", n)
	}
	stop()
	if n := asks(); n != 0 {
		t.Errorf("%d open files ask for polling after the end", n)
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

// The state with the shorter wake-up is chosen, and timing one gives a time.
func TestIdling(t *testing.T) {
	for _, tc := range []struct {
		halted, spinning float64
		want             idling
	}{{16e-6, 67e-6, halts}, {70e-6, 40e-6, spins}, {40e-6, 40e-6, spins}} {
		if got := sooner(tc.halted, tc.spinning); got != tc.want {
			t.Errorf("a wake-up of %v s from a halt, %v s beside threads that spin: %v", tc.halted, tc.spinning, got)
		}
	}
	const d = 20 * time.Millisecond
	began := time.Now()
	w, err := wakeUp(d)
	if took := time.Since(began); err != nil || took < d || w <= 0 || w > took.Seconds() {
		t.Errorf("a wake-up takes %v s (%v), in %v", w, err, took)
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: it switches autogroups off for a moment")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	i, err := findIdling(t.Context(), []string{self, "helper"})
	if err != nil {
		t.Fatal(err)
	}
	stop, err := i.start(t.Context(), []string{self, "helper"})
	if err != nil {
		t.Fatal(err)
	}
	stop()
	t.Log(i)
	if _, err := findIdling(t.Context(), []string{"/bin/false"}); err == nil && i != polls {
		t.Error("a helper that ends at once was taken for one that works")
	}
}
