package bench

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Sides are the CPUs on which each end runs.
type Sides struct{ From, To unix.CPUSet }

// allCPUs lets both ends run on all CPUs that this program may use. The scheduler then usually places sender and receiver on
// one CPU, where they wake each other at the lowest cost.
func allCPUs() (Sides, error) {
	var all unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return Sides{}, fmt.Errorf("find the CPUs: %w", err)
	}
	return Sides{all, all}, nil
}

// split divides the CPUs between the ends, as if each host had its own: a packet then always wakes a process on another
// CPU. Both ends share a single CPU.
func (s Sides) split() Sides {
	all := s.From
	n, seen := all.Count(), 0
	if n < 2 {
		return s
	}
	var out Sides
	for cpu := range len(all) * 64 {
		if !all.IsSet(cpu) {
			continue
		}
		if seen < n/2 {
			out.From.Set(cpu)
		} else {
			out.To.Set(cpu)
		}
		seen++
	}
	return out
}

// canPin reports whether each side can have CPUs of its own.
func canPin() bool {
	all, err := allCPUs()
	return err == nil && all.From.Count() > 1
}

// The nice values for latency and for everything else. For latency the ends and the tunnel's processes have priority over
// other processes, so that load on the machine does not look like latency of the tunnel. On an idle machine this makes no
// difference. Throughput is measured at 0, because there processes compete with the kernel's threads.
const (
	niceFirst  = -20
	niceNormal = 0
)

// place pins all threads of a process, and the threads that they start later, to CPUs. It sets the nice value of the threads
// and of their autogroup.
func place(pid int, on *unix.CPUSet, nice int) error {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/[0-9]*", pid))
	if err != nil || len(tasks) == 0 {
		return errors.Join(err, fmt.Errorf("process %d has ended", pid))
	}
	for _, t := range tasks {
		tid, err := strconv.Atoi(filepath.Base(t))
		if err != nil {
			return err
		}
		if err := placeThread(tid, on, nice); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("thread %d of process %d: %w", tid, pid, err)
		}
	}
	return setAutogroup(pid, nice)
}

// setAutogroup sets the nice value of a process's autogroup, if it has one. All processes of a session share it.
func setAutogroup(pid, nice int) error {
	if _, in, err := autogroup(pid); err != nil || !in {
		return err
	}
	return os.WriteFile(autogroupPath(pid), []byte(strconv.Itoa(nice)), 0)
}

// autogroup returns the nice value of a process's autogroup. A process has none if the kernel has no autogroups, or if
// neither it nor an ancestor has started a session since boot (sched(7)). kernel/sched/autogroup.c then prints nothing
// and refuses a value.
func autogroup(pid int) (nice int, in bool, err error) {
	b, err := os.ReadFile(autogroupPath(pid))
	if errors.Is(err, os.ErrNotExist) || err == nil && len(b) == 0 {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	_, value, _ := strings.Cut(strings.TrimSpace(string(b)), " nice ") // "/autogroup-53 nice 0"
	if nice, err = strconv.Atoi(value); err != nil {
		return 0, false, fmt.Errorf("%s: %w", autogroupPath(pid), err)
	}
	return nice, true, nil
}

func autogroupPath(pid int) string { return fmt.Sprintf("/proc/%d/autogroup", pid) }

// placeThread is place for one thread; 0 is the calling one.
func placeThread(tid int, on *unix.CPUSet, nice int) error {
	if err := unix.SchedSetaffinity(tid, on); err != nil {
		return fmt.Errorf("pin: %w", err)
	}
	if err := unix.Setpriority(unix.PRIO_PROCESS, tid, nice); err != nil {
		return fmt.Errorf("nice value %d: %w", nice, err)
	}
	return nil
}

// placeTunnel places the tunnel's processes: the first on the CPUs of From's side, the second on those of To's side.
func placeTunnel(pids []int, cpus Sides, nice int) error {
	for i, pid := range pids {
		on := &cpus.From
		if i%2 == 1 {
			on = &cpus.To
		}
		if err := place(pid, on, nice); err != nil {
			return err
		}
	}
	return nil
}
