package bench

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// A halted virtual CPU adds tens of microseconds to the next wake-up and makes latencies bimodal, and one TCP stream, too. So
// CPUs are kept awake. Where idle ones can poll (see [polling]), they do so the whole time: a wake-up then costs least, and no
// measure takes CPU time for it.
//
// Elsewhere, if CPUs wake sooner so than from a halt (see [findIdling]), a helper process spins on every CPU with SCHED_IDLE threads while
// latency is measured: they run only when the CPU is otherwise idle, and give way at once (sched(7)), but have to be interrupted for it.
// At once, but for one case: a thread that has just run may not be eligible yet (EEVDF, Linux 6.6 and later), and then the scheduler lets the SCHED_IDLE thread go on until the next tick.
// Between two agents one packet in a hundred waited for up to 4 ms so. Therefore the spinning threads yield every few microseconds.
//
// The helper is a separate process because Go's scheduler would count such threads as busy. It runs without asynchronous
// preemption, so that its own scheduler does not interrupt the threads.
//
// SCHED_IDLE only decides how threads share the CPU time of their own group. With autogroups each session is a group, and
// such a thread would take half of a CPU from processes in other sessions, such as an agent. So the helper creates these
// threads while autogroups are off: then they stay in the root group.

const ready = "ready" // printed by a helper process when it has started its work

// Helper runs a helper process of this package. The program must call it for the command line in AllOptions.Helper; name
// is the argument that the package appended. It returns when in ends, so that it cannot outlive its parent.
func Helper(name string, in io.Reader, out io.Writer) error {
	switch name {
	case "keep-awake":
		return keepAwake(in, out)
	case "wireguard-go":
		return wireguardGo(in, out)
	}
	return fmt.Errorf("no helper %q", name)
}

// keepAwake spins on every CPU that the process may use, until in ends.
func keepAwake(in io.Reader, out io.Writer) error {
	var mask unix.CPUSet
	if err := unix.SchedGetaffinity(0, &mask); err != nil {
		return fmt.Errorf("find the CPUs: %w", err)
	}
	runtime.GOMAXPROCS(mask.Count() + 1)
	debug.SetGCPercent(-1) // a collection would wait for threads that rarely run
	started := make(chan spinner)
	var spinners []spinner
	var err error
	for cpu := range len(mask) * 64 {
		if mask.IsSet(cpu) {
			go spin(cpu, started) // ends with the process
			s := <-started
			spinners = append(spinners, s)
			err = errors.Join(err, s.err)
		}
	}
	// The threads switch to SCHED_IDLE only now: before, they might wait long for CPU time to report that they started.
	for _, s := range spinners {
		err = errors.Join(err, setPolicy(s.tid, unix.SCHED_IDLE))
	}
	if err != nil {
		return err
	}
	fmt.Fprintln(out, ready)
	_, err = io.Copy(io.Discard, in)
	for _, s := range spinners {
		err = errors.Join(err, setPolicy(s.tid, unix.SCHED_NORMAL))
	}
	return err
}

// spinner is one spinning thread.
type spinner struct {
	tid int
	err error
}

func spin(cpu int, started chan<- spinner) {
	runtime.LockOSThread()
	var one unix.CPUSet
	one.Set(cpu)
	err := unix.SchedSetaffinity(0, &one)
	started <- spinner{unix.Gettid(), err}
	for err == nil {
		for range yieldEvery {
		}
		_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
	}
}

// yieldEvery is how many turns of an empty loop a spinner takes before it yields: microseconds. Without any, the spinner
// holds its run queue's lock half of the time.
const yieldEvery = 20_000

func setPolicy(tid int, policy uint32) error {
	return unix.SchedSetAttr(tid, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: policy}, 0)
}

// StartAwake lets CPUs be woken as soon as they can be until stop is called, and says how. helper is the command line of [AllOptions.Helper].
func StartAwake(ctx context.Context, helper []string) (how string, stop func(), err error) {
	i, err := findIdling(ctx, helper)
	if err != nil {
		return "", nil, err
	}
	stop, err = i.start(ctx, helper)
	return i.String(), stop, err
}

// start begins it, until stop is called.
func (i idling) start(ctx context.Context, helper []string) (stop func(), err error) {
	switch i {
	case polls:
		return polling()
	case spins:
		return spinningThreads(ctx, helper)
	}
	return func() {}, nil
}

// polling makes idle CPUs poll instead of halting, until stop is called: it asks for a wake-up latency of 0 µs
// (Documentation/power/pm_qos_interface.rst), which only the idle state POLL has. Where that is not every CPU's first idle state, this
// is an error.
func polling() (stop func(), err error) {
	var mask unix.CPUSet
	if err := unix.SchedGetaffinity(0, &mask); err != nil {
		return nil, fmt.Errorf("find the CPUs: %w", err)
	}
	for cpu := range len(mask) * 64 {
		if !mask.IsSet(cpu) {
			continue
		}
		state := fmt.Sprintf("/sys/devices/system/cpu/cpu%d/cpuidle/state0/", cpu)
		name, err := os.ReadFile(state + "name")
		disabled, err2 := os.ReadFile(state + "disable")
		if err := errors.Join(err, err2); err != nil {
			return nil, fmt.Errorf("find the idle state that polls: %w", err)
		}
		if n := strings.TrimSpace(string(name)); n != "POLL" || strings.TrimSpace(string(disabled)) != "0" {
			return nil, fmt.Errorf("the first idle state of CPU %d is %s, or disabled; one that polls is named POLL", cpu, n)
		}
	}
	const path = "/dev/cpu_dma_latency"
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if _, err := f.Write(make([]byte, 4)); err != nil { // an int32: microseconds
		return nil, errors.Join(fmt.Errorf("write 0 µs to %s: %w", path, err), f.Close())
	}
	return func() { f.Close() }, nil // which withdraws it
}

// spinningThreads keeps the CPUs awake by SCHED_IDLE threads.
func spinningThreads(ctx context.Context, helper []string) (stop func(), err error) {
	cmd := exec.CommandContext(ctx, helper[0], append(helper[1:len(helper):len(helper)], "keep-awake")...)
	cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C goes to the parent only
	var errs strings.Builder
	cmd.Stderr = &errs
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	stop = func() {
		in.Close()
		_ = cmd.Wait() // being killed with ctx is no error
	}
	err = withoutAutogroups(func() error {
		if err := cmd.Start(); err != nil {
			return err
		}
		if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != ready+"\n" {
			stop()
			return fmt.Errorf("%w: %s", err, strings.TrimSpace(errs.String()))
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("keep the CPUs awake: %w", err)
	}
	return stop, nil
}

// withoutAutogroups runs fn while autogroups are disabled (sched(7)).
func withoutAutogroups(fn func() error) error {
	const path = "/proc/sys/kernel/sched_autogroup_enabled"
	was, err := os.ReadFile(path)
	if err != nil || strings.TrimSpace(string(was)) == "0" {
		return fn() // not supported by the kernel, or already off
	}
	if err := os.WriteFile(path, []byte("0"), 0); err != nil {
		return err
	}
	return errors.Join(fn(), os.WriteFile(path, was, 0))
}
