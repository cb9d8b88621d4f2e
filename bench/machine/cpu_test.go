package machine

import (
	"math"
	"os"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/bench/result"
)

func TestParseStat(t *testing.T) {
	const text = "cpu  100 1 50 1000 20 3 4 7 0 0\ncpu0 50 1 25 500 10 3 4 7 0 0\ncpu1 50 0 25 500 10 0 0 0 0 0\nintr 1 2 3\n"
	s, err := parseStat([]byte(text))
	if err != nil || math.Abs(s.idle-10.2) > 1e-9 || math.Abs(s.steal-0.07) > 1e-9 || math.Abs(s.softirq-0.04) > 1e-9 || math.Abs(s.all-11.85) > 1e-9 || s.cpus != 2 {
		t.Errorf("got %+v, %v", s, err)
	}
	m := Meter{stat: s, agents: 1, others: 4}
	u := m.use(10, cpuStat{idle: 16.2, steal: 1.07, cpus: 2}, 3, 6)
	want := result.CPUUse{Busy: 20 - 6 - 1 - 2, Others: 2, Steal: 1, Agents: 2}
	if math.Abs(u.Busy-want.Busy) > 1e-9 || math.Abs(u.Steal-want.Steal) > 1e-9 || u.Others != want.Others || u.Agents != want.Agents {
		t.Errorf("got %+v, want %+v", u, want)
	}
	if later := (cpuStat{all: s.all + 0.01}); later.standsStill(s, 1) || !s.standsStill(s, 1) || s.standsStill(s, 0.02) {
		t.Error("one tick is taken for a /proc/stat that stands still, or none for one that does not")
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
	m := Meter{pids: []int{1}}
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
	if n, err := ResidentMemory([]int{os.Getpid()}); err != nil || n < 1<<20 {
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
