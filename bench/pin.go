package bench

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// sides splits the CPUs that this program may use between the two ends, as if each host had its own: whatever runs for
// From gets the first half, whatever runs for To the second. Left to itself the scheduler sometimes puts both ends on one
// CPU and sometimes not, which makes latencies of one and the same tunnel differ by a factor. With a single CPU both get it.
func sides() (from, to unix.CPUSet, err error) {
	var all unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return from, to, fmt.Errorf("which CPUs there are: %w", err)
	}
	from, to = splitCPUs(&all)
	return from, to, nil
}

func splitCPUs(all *unix.CPUSet) (from, to unix.CPUSet) {
	n := all.Count()
	if n < 2 {
		return *all, *all
	}
	seen := 0
	for cpu := range len(all) * 64 {
		if all.IsSet(cpu) {
			if seen < n/2 {
				from.Set(cpu)
			} else {
				to.Set(cpu)
			}
			seen++
		}
	}
	return from, to
}

// pinProcess confines all threads of a process, and those that they start, to CPUs.
func pinProcess(pid int, to *unix.CPUSet) error {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/[0-9]*", pid))
	if err != nil || len(tasks) == 0 {
		return errors.Join(err, fmt.Errorf("process %d has ended", pid))
	}
	for _, t := range tasks {
		tid, err := strconv.Atoi(filepath.Base(t))
		if err != nil {
			return err
		}
		if err := unix.SchedSetaffinity(tid, to); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("pin thread %d of process %d: %w", tid, pid, err)
		}
	}
	return nil
}

// pinTunnel pins the tunnel's processes, the first to from and the second to to. The result lets them go again.
func pinTunnel(pids []int, from, to *unix.CPUSet) (undo func() error, err error) {
	var all unix.CPUSet
	if err := unix.SchedGetaffinity(os.Getpid(), &all); err != nil {
		return nil, err
	}
	undo = func() error {
		var err error
		for _, pid := range pids {
			err = errors.Join(err, pinProcess(pid, &all))
		}
		return err
	}
	for i, pid := range pids {
		set := from
		if i%2 == 1 {
			set = to
		}
		if err := pinProcess(pid, set); err != nil {
			return nil, errors.Join(err, undo())
		}
	}
	return undo, nil
}
