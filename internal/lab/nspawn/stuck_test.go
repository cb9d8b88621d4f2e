package nspawn

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// fastWatchdog makes the watchdog of the unit, which has half a minute, fast enough for a test, from the next start of the agent on.
// Only for the test of the watchdog: elsewhere a machine that stands still for six seconds is no reason to end an agent.
func (m *machine) fastWatchdog() error {
	conf := m.watchdogConf()
	if err := os.MkdirAll(filepath.Dir(conf), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(conf, []byte("[Service]\nWatchdogSec=6s\n"), 0o644); err != nil {
		return err
	}
	_, err := m.run("systemctl", "daemon-reload")
	return err
}

// slowWatchdog takes that back.
func (m *machine) slowWatchdog() error {
	if err := os.Remove(m.watchdogConf()); err != nil {
		return err
	}
	_, err := m.run("systemctl", "daemon-reload")
	return err
}

func (m *machine) watchdogConf() string {
	return filepath.Join(m.root, "etc/systemd/system/tulle.service.d/watchdog.conf")
}

// stopWorker stops one thread of the agent, as a bug in the kernel or a driver might: one that waits for packets (ppoll(2), in
// which only the data path's workers wait; the rest of a Go program waits in epoll). It stays so until the process ends.
func (m *machine) stopWorker() error {
	out, err := m.run("systemctl", "show", "--property=MainPID", "--value", "tulle")
	if err != nil {
		return err
	}
	pid, err := m.hostPID(strings.TrimSpace(out))
	if err != nil {
		return err
	}
	var tid int
	err = m.until("a worker that waits", 10*time.Second, func() error {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/[0-9]*/syscall", pid))
		for _, task := range tasks {
			call, err := os.ReadFile(task)
			if n, _, _ := strings.Cut(string(call), " "); err == nil && n == strconv.Itoa(unix.SYS_PPOLL) {
				tid, err = strconv.Atoi(filepath.Base(filepath.Dir(task)))
				return err
			}
		}
		return fmt.Errorf("none of %d threads of process %d is in ppoll", len(tasks), pid)
	})
	if err != nil {
		return err
	}
	stopped := make(chan error)
	go func() {
		// The thread that traces is the one that has to wait for the traced one's end: until then the agent is a zombie.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := unix.PtraceSeize(tid)
		if err == nil {
			err = unix.PtraceInterrupt(tid)
		}
		var st unix.WaitStatus
		if err == nil {
			_, err = wait(tid, &st)
		}
		if err == nil && !st.Stopped() {
			err = fmt.Errorf("thread %d did not stop: %#x", tid, st)
		}
		stopped <- err
		for err == nil && !st.Exited() && !st.Signaled() {
			_, err = wait(tid, &st)
		}
	}()
	return <-stopped
}

// wait waits for a change of a traced thread.
func wait(tid int, st *unix.WaitStatus) (int, error) {
	for {
		n, err := unix.Wait4(tid, st, unix.WALL, nil)
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// hostPID is the number by which this machine's kernel knows a process of the container.
func (m *machine) hostPID(inner string) (int, error) {
	namespace, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", m.leader))
	if err != nil {
		return 0, err
	}
	processes, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range processes {
		if ns, err := os.Readlink(filepath.Join(p, "ns/pid")); err != nil || ns != namespace {
			continue
		}
		status, _ := os.ReadFile(filepath.Join(p, "status"))
		for line := range strings.Lines(string(status)) {
			if f := strings.Fields(line); len(f) > 1 && f[0] == "NSpid:" && f[len(f)-1] == inner {
				return strconv.Atoi(filepath.Base(p))
			}
		}
	}
	return 0, fmt.Errorf("%s: no process %s", m.host, inner)
}
