package clustertest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/sys"
)

// TestDownLeavesNothing compares the machine before and after a lab.
func TestDownLeavesNothing(t *testing.T) {
	needRoot(t)
	before, err := network(true)
	if err != nil {
		t.Fatal(err)
	}
	name := labName("down")
	r := run(t, newCommand(t, "lab", "up", "--name", name, "--nodes", "2"))
	if r.code != 0 {
		t.Fatalf("lab up: %d\n%s", r.code, r.err)
	}
	if n := len(processesOf(t, name)); n != 2 {
		t.Errorf("%d processes of the lab, want two agents", n)
	}
	if r := run(t, newCommand(t, "lab", "down", "--name", name)); r.code != 0 {
		t.Fatalf("lab down: %d\n%s", r.code, r.err)
	}
	nothingLeft(t, name, before)
}

// TestDemo runs the demo to its end, and once until somebody presses Ctrl-C while it measures.
func TestDemo(t *testing.T) {
	needRoot(t)
	before, err := network(true)
	if err != nil {
		t.Fatal(err)
	}
	name := labName("demo")
	r := run(t, newCommand(t, "lab", "demo", "--name", name))
	if r.code != 0 {
		t.Fatalf("lab demo: %d\n%s\n%s", r.code, r.out, r.err)
	}
	where := "Each side runs on its own CPUs; CPUs "
	if runtime.NumCPU() == 1 {
		where = "Both sides share this machine's CPUs; CPUs "
	}
	if missing := lacks(r.out, "own address", "no tunnel", "kernel VXLAN", "tulle udp", "tulle ipip", where); len(missing) > 0 || strings.Contains(r.out, "NOT THE POD'S") {
		t.Errorf("the output lacks %q:\n%s", missing, r.out)
	}
	nothingLeft(t, name, before)

	cmd := newCommand(t, "lab", "demo", "--name", name)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	interrupted := false
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if !interrupted && strings.HasPrefix(lines.Text(), "4. Latency") {
			interrupted = true
			if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
				t.Error(err)
			}
		}
	}
	if err := cmd.Wait(); err == nil || !interrupted {
		t.Errorf("a demo that was interrupted: %v, %v\n%s", interrupted, err, errOut.String())
	}
	nothingLeft(t, name, before)
}

// nothingLeft wants no trace of a lab, nor of the program, and the machine's own namespace as before.
func nothingLeft(t *testing.T, name string, before snapshot) {
	t.Helper()
	after, err := network(true)
	if err != nil {
		t.Fatal(err)
	}
	after.sameAs(t, "the machine's own namespace", before)
	commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range commands {
		if b, _ := os.ReadFile(f); bytes.HasPrefix(b, []byte(program+"\x00")) {
			t.Errorf("a process is left: %q", b)
		}
	}
	if left := processesOf(t, name); len(left) > 0 {
		t.Errorf("processes are left: %v", left)
	}
	spaces, err := filepath.Glob(filepath.Join(sys.NetnsDir, name+"-*"))
	if err != nil || len(spaces) > 0 {
		t.Errorf("namespaces are left: %v %v", spaces, err)
	}
	if _, err := os.Stat(filepath.Join("/run/tulle-lab", name)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("files are left: %v", err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || bytes.Contains(mounts, []byte(name)) {
		t.Errorf("mounts are left: %v", err)
	}
}

// processesOf lists the processes that carry the lab's mark.
func processesOf(t *testing.T, name string) (out []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if b, _ := os.ReadFile(f); bytes.Contains(b, []byte("TULLE_LAB="+name+"\x00")) {
			out = append(out, f)
		}
	}
	return out
}

// TestCleanup removes what stopped and killed agents leave on a host.
func TestCleanup(t *testing.T) {
	t.Parallel()
	l := up(t, "clean", lab.Options{Nodes: 2, Pods: -1})
	h, err := l.Host("h2")
	if err != nil {
		t.Fatal(err)
	}
	r := inHost(t, l, "h2", "cleanup", "--config", h.Config)
	oneLineError(t, "cleanup under a running agent", r, 1, "an agent is running", h.Socket, "systemctl stop tulle")
	if !l.AgentRuns("h2") {
		t.Fatal("the agent has ended")
	}
	r = inHost(t, l, "h2", "cleanup", "--config", h.Config, "--socket", filepath.Join(t.TempDir(), "other.sock"))
	oneLineError(t, "cleanup of a device in use", r, 1, "tun0", "another process")
	settled(t, l)

	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		if err := l.ResetHost(t.Context(), "h2"); err != nil {
			t.Fatal(err)
		}
		var fresh snapshot
		until(t, "the link of h2 comes up", func() error {
			if fresh = networkOf(t, l, "h2"); len(fresh.with("route fe80::/64")) == 0 {
				return errors.New("no link-local route")
			}
			return nil
		})
		if err := l.StartAgent(t.Context(), "h2"); err != nil {
			t.Fatal(err)
		}
		if err := l.WaitReady(t.Context(), "h2"); err != nil {
			t.Fatal(err)
		}
		owned := mustStatus(t, l, "h2").Node
		if err := l.StopAgent(t.Context(), "h2", sig); err != nil {
			t.Fatal(err)
		}
		left := networkOf(t, l, "h2")
		if len(left.marked()) == 0 || len(left.with("link tun0 ")) != 1 || len(left.with("nft table")) == 0 {
			t.Errorf("after %v, routes, device or nft table did not stay: %q", sig, left.with("link", "nft"))
		}
		for range 2 { // the second time there is nothing to do
			r := inHost(t, l, "h2", "cleanup", "--config", h.Config)
			if r.code != 0 || r.err != "" || !strings.Contains(r.out, filepath.Join(h.Dir, "state")) {
				t.Fatalf("cleanup after %v: %+v", sig, r)
			}
			becomes(t, "cleanup after "+sig.String(), func() snapshot { return networkOf(t, l, "h2") }, fresh)
		}
		if _, err := os.Lstat(h.Socket); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("after %v, the socket's file is left: %v", sig, err)
		}
		// The node has not left the cluster.
		if err := l.StartAgent(t.Context(), "h2"); err != nil {
			t.Fatal(err)
		}
		if err := l.WaitReady(t.Context(), "h2"); err != nil {
			t.Fatal(err)
		}
		sameNode(t, "after cleanup", owned, mustStatus(t, l, "h2").Node)
		if err := l.StopAgent(context.WithoutCancel(t.Context()), "h2", syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
	}
}
