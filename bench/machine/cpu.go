package machine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tulle-net/tulle/bench/result"
)

// clockTick is the unit of times in /proc, USER_HZ: 100 a second on every architecture that Go runs on (time(7)).
const clockTick = 10 * time.Millisecond

// cpuStat is the first line of /proc/stat, in seconds, and the number of online CPUs (proc(5)).
type cpuStat struct {
	idle, steal, softirq float64
	all                  float64 // the sum of all
	cpus                 int
}

func parseStat(b []byte) (cpuStat, error) {
	var s cpuStat
	found := false
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) == 0 || !strings.HasPrefix(f[0], "cpu") {
			continue
		}
		if f[0] != "cpu" {
			s.cpus++
			continue
		}
		if len(f) < 9 { // user nice system idle iowait irq softirq steal: since Linux 2.6.11
			return s, fmt.Errorf("/proc/stat: %d fields in %q", len(f), line)
		}
		var ticks [4]uint64
		for i, field := range []int{4, 5, 8, 7} {
			var err error
			if ticks[i], err = strconv.ParseUint(f[field], 10, 64); err != nil {
				return s, fmt.Errorf("/proc/stat: %w", err)
			}
		}
		s.idle = float64(ticks[0]+ticks[1]) * clockTick.Seconds()
		for _, field := range f[1:9] {
			n, err := strconv.ParseUint(field, 10, 64)
			if err != nil {
				return s, fmt.Errorf("/proc/stat: %w", err)
			}
			s.all += float64(n) * clockTick.Seconds()
		}
		s.steal = float64(ticks[2]) * clockTick.Seconds()
		s.softirq = float64(ticks[3]) * clockTick.Seconds()
		found = true
	}
	if !found || s.cpus == 0 {
		return s, errors.New("/proc/stat has no line of all CPUs")
	}
	return s, nil
}

func readStat() (cpuStat, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return cpuStat{}, err
	}
	return parseStat(b)
}

// Meter measures CPU time from Start to Stop. The time of the machine is elapsed time × CPUs − idle time: the kernel
// counts idle time to the nanosecond if its tick stops on idle CPUs, while the other values of /proc/stat are sampled.
type Meter struct {
	begin  time.Time
	stat   cpuStat
	pids   []int
	agents float64
	others float64
}

// Start begins to measure. The CPU time of the processes pids is counted separately.
func Start(pids []int) (m Meter, err error) {
	m.pids = pids
	if m.agents, m.others, err = m.processes(); err != nil {
		return m, err
	}
	m.stat, err = readStat()
	m.begin = time.Now()
	return m, err
}

// Stop returns the use since Start.
func (m *Meter) Stop() (result.CPUUse, error) {
	passed := time.Since(m.begin).Seconds()
	now, err := readStat()
	if err != nil {
		return result.CPUUse{}, err
	}
	if now.standsStill(m.stat, passed) {
		return result.CPUUse{}, errors.New("/proc/stat stands still")
	}
	agents, others, err := m.processes()
	if err != nil {
		return result.CPUUse{}, err
	}
	return m.use(passed, now, agents, others), nil
}

// standsStill reports whether there is nobody behind /proc/stat that counts: some sandboxes have one of zeros. By that all CPUs were busy.
func (s cpuStat) standsStill(since cpuStat, passed float64) bool {
	return s.all == since.all && passed > 10*clockTick.Seconds()
}

func (m *Meter) use(passed float64, now cpuStat, agents, others float64) result.CPUUse {
	u := result.CPUUse{Steal: now.steal - m.stat.steal, SoftIRQ: now.softirq - m.stat.softirq, Agents: agents - m.agents, Others: max(others-m.others, 0)}
	u.Busy = max(passed*float64(now.cpus)-(now.idle-m.stat.idle)-u.Steal-u.Others, 0)
	return u
}

// processes returns the CPU time so far of the tunnel's processes (agents) and of unrelated processes (others). The time
// of ended children counts for their parents, so that nothing is lost when a child ends. Kernel threads count for neither:
// their work, such as softirqs, may belong to the tunnel.
func (m *Meter) processes() (agents, others float64, err error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return 0, 0, err
	}
	found := 0
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		b, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil {
			continue // it has just ended
		}
		p, err := parseProcess(b)
		if err != nil {
			return 0, 0, fmt.Errorf("%s/stat: %w", dir, err)
		}
		switch {
		case slices.Contains(m.pids, pid):
			agents += p.own
			found++
		case pid != os.Getpid() && !p.kernel:
			others += p.own + p.children
		}
	}
	if found != len(m.pids) {
		return 0, 0, fmt.Errorf("of the tunnel's processes %v, %d run", m.pids, found)
	}
	return agents, others, nil
}

// process holds the values of /proc/PID/stat, times in seconds.
type process struct {
	own, children float64 // of its children, those that have ended
	kernel        bool    // a kernel thread
}

const kernelThread = 0x00200000 // PF_KTHREAD, linux/sched.h

func parseProcess(b []byte) (process, error) {
	// The second field is the command in parentheses; it may contain any character. The next field has number 3 (proc(5)).
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	const flags, utime, cstime = 9 - 3, 14 - 3, 17 - 3
	if len(f) <= cstime {
		return process{}, fmt.Errorf("%d fields after the command", len(f))
	}
	word, err := strconv.ParseUint(string(f[flags]), 10, 64)
	if err != nil {
		return process{}, err
	}
	var t [4]float64 // utime, stime, cutime, cstime
	for i := range t {
		ticks, err := strconv.ParseInt(string(f[utime+i]), 10, 64)
		if err != nil {
			return process{}, err
		}
		t[i] = float64(ticks) * clockTick.Seconds()
	}
	return process{own: t[0] + t[1], children: t[2] + t[3], kernel: word&kernelThread != 0}, nil
}

// ResidentMemory is the largest resident set among processes, in bytes.
func ResidentMemory(pids []int) (largest uint64, err error) {
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return 0, err
		}
		rss, err := parseResident(string(b))
		if err != nil {
			return 0, fmt.Errorf("/proc/%d/status: %w", pid, err)
		}
		largest = max(largest, rss)
	}
	return largest, nil
}

func parseResident(status string) (uint64, error) {
	for line := range strings.Lines(status) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.ParseUint(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 10, 64)
			return kb << 10, err
		}
	}
	return 0, errors.New("no VmRSS: the process has ended")
}

// OthersShare measures the share of the machine's CPU time that is used while this program sleeps for a moment.
func OthersShare(ctx context.Context) (float64, error) {
	m, err := Start(nil)
	if err != nil {
		return 0, err
	}
	select {
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-time.After(300 * time.Millisecond):
	}
	u, err := m.Stop()
	return (u.Busy + u.Others) / (time.Since(m.begin).Seconds() * float64(m.stat.cpus)), err
}

// IdleSeconds is the time that all CPUs have been idle since boot, in CPU seconds.
func IdleSeconds() (float64, error) {
	s, err := readStat()
	return s.idle, err
}
