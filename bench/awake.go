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

// A halted virtual CPU adds tens of microseconds to the next wake-up, and makes latencies bimodal. So while latency is
// measured, a process spins on every CPU, in threads of the class SCHED_IDLE: they run only when nothing else wants to,
// and give way at once (sched(7)). It is a process of its own because Go's scheduler would take such threads for busy
// ones, and without asynchronous preemption, so that its own scheduler leaves them alone.
//
// The class says only how threads of one group share what their group gets, and with autogroups each session is a group:
// there such a thread takes half of a CPU from whatever runs in another session, such as an agent. So these threads are made
// while autogroups are off, which puts them in the root group for good.

const ready = "ready" // is what a helper process prints once it does its work

// Helper runs a helper process of this package, which the program must make reachable: name is the last word of the
// command line that the package started it with (AllOptions.Helper). It ends when in does, so that it cannot outlive its
// maker.
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
		return fmt.Errorf("which CPUs there are: %w", err)
	}
	runtime.GOMAXPROCS(mask.Count() + 1)
	debug.SetGCPercent(-1) // a collection would wait for threads that hardly run
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
	// The threads become idle ones only now, and not in the end: as such they might not get to say so for long.
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

// spinner is a thread that spins.
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
	}
}

func setPolicy(tid int, policy uint32) error {
	return unix.SchedSetAttr(tid, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: policy}, 0)
}

// StartAwake keeps the CPUs awake until the result is called. helper is the command line of [AllOptions.Helper].
func StartAwake(ctx context.Context, helper []string) (stop func(), err error) {
	cmd := exec.CommandContext(ctx, helper[0], append(helper[1:len(helper):len(helper)], "keep-awake")...)
	cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is its maker's
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
		_ = cmd.Wait() // that it was killed with ctx is no error
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

// withoutAutogroups runs fn while threads are made in no autogroup (sched(7)).
func withoutAutogroups(fn func() error) error {
	const path = "/proc/sys/kernel/sched_autogroup_enabled"
	was, err := os.ReadFile(path)
	if err != nil || strings.TrimSpace(string(was)) == "0" {
		return fn() // a kernel without them, or switched off
	}
	if err := os.WriteFile(path, []byte("0"), 0); err != nil {
		return err
	}
	return errors.Join(fn(), os.WriteFile(path, was, 0))
}
