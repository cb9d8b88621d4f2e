package nspawn

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/testing/debian"
	"github.com/tulle-net/tulle/internal/testing/stall"
)

// machine is a host of the lab that boots systemd in a container.
type machine struct {
	t    *testing.T
	name string // unique on this machine, for systemd
	host string // its name in the lab, and its own host name
	root string // its disk
	net  string // path of its network namespace

	options []string // of systemd-nspawn, besides boot's
	apart   bool     // has named network namespaces of its own, and none of this machine's

	groups []string      // its cgroups, where there is no systemd to keep them
	leader int           // its init, as this machine's kernel numbers it
	ended  chan struct{} // closed when systemd-nspawn has ended
	out    lockedBuffer
}

// lockedBuffer is a buffer that one process writes while the test reads.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// labName is the name of a lab that no other run has: machines of one name would share their cgroups.
func labName(of string) string { return fmt.Sprintf("n%d-%s", os.Getpid(), of) }

// boot starts the machine and waits until its init has started everything.
func (m *machine) boot() error {
	args := []string{
		"--quiet", "--boot", "--directory=" + m.root, "--machine=" + m.name, "--hostname=" + m.host,
		"--network-namespace-path=" + m.net,
		// The agent needs the TUN device.
		"--bind=/dev/net/tun", "--capability=CAP_NET_ADMIN,CAP_NET_RAW",
		"--console=pipe", "--resolv-conf=off", "--timezone=off", "--link-journal=no",
	}
	args = append(args, m.options...)
	if !m.apart {
		args = append(args, "--bind=/run/netns") // the namespaces of its pods are this machine's, by the same paths
	}
	shell := `exec systemd-nspawn "$@"`
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		// No systemd runs this machine: nobody to register with, and nobody who would give each container a cgroup.
		args = append(args, "--register=no", "--keep-unit")
		enter, err := m.cgroups()
		if err != nil {
			return err
		}
		shell = enter + shell
	}
	cmd := exec.Command("/bin/sh", append([]string{"-ec", shell, "sh"}, args...)...)
	cmd.Stdout, cmd.Stderr = &m.out, &m.out
	// Without it nspawn leaves /proc/sys read-only in a namespace that it did not make itself.
	cmd.Env = append(os.Environ(), "SYSTEMD_NSPAWN_API_VFS_WRITABLE=network")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	started, ended := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread() // Pdeathsig means the death of this thread
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
			close(ended)
		}
	}()
	if err := <-started; err != nil {
		return err
	}
	m.ended, m.leader = ended, 0
	err := m.until("its init to start", 30*time.Second, func() error { return m.findLeader(cmd.Process.Pid) })
	if err != nil {
		return err
	}
	return m.until("its boot to end", time.Minute, func() error {
		out, err := m.run("systemctl", "is-system-running")
		if state, _, _ := strings.Cut(out, "\n"); state == "running" || state == "degraded" {
			return nil
		}
		return cmp.Or(err, errors.New(out))
	})
}

// cgroups makes a cgroup for this machine in each hierarchy that systemd uses, and returns shell commands that enter them.
func (m *machine) cgroups() (string, error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "", err
	}
	var enter strings.Builder
	m.groups = nil
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if f[2] != "cgroup2" && !(f[2] == "cgroup" && strings.Contains(f[3], "name=systemd")) {
			continue
		}
		dir := filepath.Join(f[1], m.name)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return "", err
		}
		fmt.Fprintf(&enter, "echo $$ >%s/cgroup.procs\n", dir)
		m.groups = append(m.groups, dir)
	}
	return enter.String(), nil
}

// removeCgroup removes a cgroup that has no processes any more, and those below it.
func removeCgroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if e.IsDir() {
			err = errors.Join(err, removeCgroup(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(err, os.Remove(dir))
}

// findLeader finds the container's init: the child of systemd-nspawn that is process 1 of a PID namespace of its own.
func (m *machine) findLeader(nspawn int) error {
	stats, _ := filepath.Glob("/proc/[0-9]*/status")
	for _, s := range stats {
		b, err := os.ReadFile(s)
		if err != nil {
			continue
		}
		var pid, ppid int
		init := false
		for line := range strings.Lines(string(b)) {
			switch f := strings.Fields(line); f[0] {
			case "Pid:":
				pid, _ = strconv.Atoi(f[1])
			case "PPid:":
				ppid, _ = strconv.Atoi(f[1])
			case "NSpid:":
				init = len(f) > 2 && f[len(f)-1] == "1"
			}
		}
		if ppid == nspawn && init {
			m.leader = pid
			return nil
		}
	}
	return errors.New("no such process yet")
}

// run runs a command in the machine and returns what it prints.
func (m *machine) run(argv ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	args := append([]string{"--target=" + strconv.Itoa(m.leader), "--all", "--"}, argv...)
	cmd := exec.CommandContext(ctx, "nsenter", args...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"}
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %s: %w\n%s", m.host, strings.Join(argv, " "), err, out)
	}
	return string(out), err
}

// journal is the last that the service said.
func (m *machine) journal() string {
	out, _ := m.run("journalctl", "--no-pager", "--unit=tulle", "--lines=40", "--output=short-precise")
	return out
}

// until polls something about the machine, while it runs. The limit does not run while the machine that all of this is on is short of
// CPUs, for three times as long at most.
func (m *machine) until(what string, limit time.Duration, done func() error) error {
	began, meter := time.Now(), stall.Begin()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := done()
		if err == nil {
			return nil
		}
		if took := time.Since(began); took > limit+min(meter.Short(), 3*limit) {
			return fmt.Errorf("%s: waited %v for %s: %w\n%s", m.host, took.Round(time.Second), what, err, m.out.String())
		}
		select {
		case <-tick.C:
		case <-m.ended:
			return fmt.Errorf("%s: waiting for %s: systemd-nspawn has ended\n%s", m.host, what, m.out.String())
		}
	}
}

// says waits until the service's journal has each of the words so often among the lines with a text: journald writes them a moment after they
// were said. It returns those lines.
func (m *machine) says(t *testing.T, grep string, often int, words ...string) (out string) {
	t.Helper()
	err := m.until(fmt.Sprintf("the journal to say %q", words), 20*time.Second, func() (err error) {
		// Without such a line journalctl fails.
		out, err = m.run("journalctl", "--no-pager", "--unit=tulle", "--output=cat", "--grep="+grep)
		for _, w := range words {
			if n := strings.Count(out, w); n != often {
				err = errors.Join(err, fmt.Errorf("it says %d times %q, want %d:\n%s", n, w, often, out))
			}
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	return out
}

// poweroff shuts the machine down as its user would, and waits for it.
func (m *machine) poweroff() error {
	if _, err := m.run("systemctl", "poweroff"); err != nil {
		return err
	}
	select {
	case <-m.ended:
		return nil
	case <-time.After(3 * time.Minute):
		return fmt.Errorf("%s did not power off within three minutes\n%s", m.host, m.out.String())
	}
}

// kill ends the machine at the end of a test, in whatever state it is.
func (m *machine) kill() {
	if m.ended == nil {
		return
	}
	select {
	case <-m.ended:
	default:
		if m.leader > 0 { // with it dies its PID namespace, then systemd-nspawn
			_ = unix.Kill(m.leader, unix.SIGKILL)
		}
	}
	select {
	case <-m.ended:
	case <-time.After(time.Minute):
		m.t.Errorf("%s: systemd-nspawn does not end\n%s", m.host, m.out.String())
	}
	for _, dir := range m.groups {
		var err error
		for late := time.Now().Add(30 * time.Second); time.Now().Before(late); time.Sleep(10 * time.Millisecond) {
			if err = removeCgroup(dir); err == nil { // the kernel empties it a moment after the last process ended
				break
			}
		}
		if err != nil {
			m.t.Error(err)
		}
	}
	// systemd-nspawn's own rests: it leaves them if /run is no tmpfs.
	if err := os.Remove(filepath.Join("/run/systemd/nspawn/propagate", m.name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		m.t.Error(err)
	}
}

// socket is the path under which this machine's other processes see the agent's socket.
func (m *machine) socket() string { return fmt.Sprintf("/proc/%d/root/run/tulle/tulle.sock", m.leader) }

// machines are the hosts of a lab, made ready to boot: each over the tree of its own, or all over one.
func machines(t *testing.T, l *lab.Lab, trees ...string) []*machine {
	t.Helper()
	base := filepath.Join(debian.CacheDir, "hosts-"+l.Name())
	clear := func() error {
		for _, h := range l.Hosts() { // mounted only if an earlier run was killed
			if err := unix.Unmount(filepath.Join(base, h.Name, "root"), 0); err != nil && err != unix.EINVAL && err != unix.ENOENT {
				return err
			}
		}
		return os.RemoveAll(base)
	}
	if err := clear(); err != nil {
		t.Fatalf("the rests of an earlier run: %v", err)
	}
	t.Cleanup(func() {
		if err := clear(); err != nil {
			t.Error(err)
		}
	})
	var ms []*machine
	for i, h := range l.Hosts() {
		dir := filepath.Join(base, h.Name)
		m := &machine{t: t, name: l.Name() + "-" + h.Name, host: h.Name, net: h.Netns}
		m.root = debian.Overlay(t, trees[min(i, len(trees)-1)], dir)
		t.Cleanup(m.kill)
		ms = append(ms, m)
	}
	return ms
}
