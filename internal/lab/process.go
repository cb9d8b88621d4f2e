package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/tulle-net/tulle/internal/sys"
)

// process identifies a process uniquely: PIDs are reused, but not with the same start time.
type process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks since boot
}

func thisProcess() process {
	pid := os.Getpid()
	start, _, _ := procStat(pid)
	return process{pid, start}
}

// procStat reads the state letter and start time of a process (proc(5), fields 3 and 22).
func procStat(pid int) (start uint64, letter byte, err error) {
	dir := fmt.Sprintf("/proc/%d", pid)
	f, err := statFields(dir)
	if err != nil {
		return 0, 0, err
	}
	if len(f) < 20 {
		return 0, 0, fmt.Errorf("%s/stat: %d fields", dir, len(f))
	}
	start, err = strconv.ParseUint(string(f[19]), 10, 64)
	return start, f[0][0], err
}

// statFields are the fields of a process's stat from the third one on. The second one is the command in parentheses and may contain
// any character.
func statFields(dir string) ([][]byte, error) {
	b, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return nil, err
	}
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(f) == 0 {
		return nil, fmt.Errorf("%s/stat: no fields", dir)
	}
	return f, nil
}

// alive reports whether that process is still running. A zombie is not.
func (p process) alive() bool {
	if p.PID <= 0 {
		return false
	}
	start, letter, err := procStat(p.PID)
	return err == nil && start == p.Start && letter != 'Z' && letter != 'X'
}

// signal sends sig to that process. os.FindProcess opens a handle for the current process with that PID; the start time then
// shows whether it is the same process.
func (p process) signal(sig syscall.Signal) error {
	h, err := os.FindProcess(p.PID)
	if err != nil {
		return err
	}
	defer h.Release()
	if !p.alive() {
		return os.ErrProcessDone
	}
	return h.Signal(sig)
}

// end sends sig and waits until the process is gone.
func (p process) end(ctx context.Context, sig syscall.Signal) error {
	if err := p.signal(sig); errors.Is(err, os.ErrProcessDone) {
		return nil
	} else if err != nil {
		return fmt.Errorf("signal process %d: %w", p.PID, err)
	}
	return sys.Poll(ctx, 2*time.Millisecond, func() (bool, error) { return !p.alive(), nil })
}

// labEnv marks each process that a lab starts.
const labEnv = "TULLE_LAB"

// processesIn finds the processes in one of the namespaces that have the lab's mark: its agents, including one that was
// started just before the lab's creator was killed, and commands of Exec.
func processesIn(name string, namespaces []string) []process {
	ours := map[uint64]bool{}
	for _, ns := range namespaces {
		var st syscall.Stat_t
		if syscall.Stat(sys.NetnsPath(ns), &st) == nil {
			ours[st.Ino] = true
		}
	}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	var found []process
	for _, dir := range dirs {
		var st syscall.Stat_t
		if syscall.Stat(filepath.Join(dir, "ns/net"), &st) != nil || !ours[st.Ino] {
			continue
		}
		if !marked(dir, name) {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(dir))
		if start, _, err := procStat(pid); err == nil {
			found = append(found, process{pid, start})
		}
	}
	return found
}

// marked reports whether the process of dir has the lab's mark. During execve the environment of a process is empty or
// truncated (fs/proc/base.c, environ_read), so marked looks a hundred times, for a tenth of a second, at a process without mark; and
// for ten seconds while the kernel has no environment for it, as when the machine stands still within execve.
func marked(dir, name string) bool {
	for look := range 10_000 {
		last := look >= 100 && hasEnviron(dir)
		env, err := os.ReadFile(filepath.Join(dir, "environ"))
		if errors.Is(err, os.ErrNotExist) {
			return false
		}
		if bytes.Contains(append([]byte{0}, env...), []byte("\x00"+labEnv+"="+name+"\x00")) {
			return true
		}
		if last {
			return false
		}
		time.Sleep(time.Millisecond)
	}
	return false
}

// hasEnviron reports whether the kernel has set where the environment of a process begins and ends, or the process has
// ended (proc(5), fields 50 and 51 of its stat).
func hasEnviron(dir string) bool {
	f, err := statFields(dir)
	if err != nil || len(f) < 49 || f[0][0] == 'Z' || f[0][0] == 'X' {
		return true
	}
	return string(f[47]) != "0" && string(f[48]) != "0"
}
