// Package dockerd runs a real Docker engine in a network namespace of a test.
package dockerd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// limit is how long a command may take on a busy machine, and the engine to answer after its start: it waits for a driver that
// does not answer.
const limit = 3 * time.Minute

// Engine is a Docker engine with a folder, a network namespace and mounts of its own. It finds plugins in Plugins.
type Engine struct {
	Plugins string // the folder that is /run/docker/plugins for the engine
	Socket  string // of its API, the only file in its folder
	Log     string // the file that it writes

	t      testing.TB
	netns  string
	dir    string
	daemon *exec.Cmd
}

// New makes an engine for the namespace at the path netns. Start starts it. It ends with the test, and shows its log if that
// has failed.
func New(t testing.TB, netns string) *Engine {
	t.Helper()
	dir, err := os.MkdirTemp("", "dkr") // short: the engine's sockets are in it
	if err != nil {
		t.Fatal(err)
	}
	e := &Engine{t: t, netns: netns, dir: dir, Plugins: filepath.Join(dir, "p"), Socket: filepath.Join(dir, "a", "docker.sock"), Log: filepath.Join(dir, "log")}
	if err := errors.Join(os.Mkdir(e.Plugins, 0o755), os.Mkdir(filepath.Dir(e.Socket), 0o755), os.MkdirAll("/run/docker/plugins", 0o755)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		e.Stop()
		if b, err := os.ReadFile(e.Log); err == nil && t.Failed() {
			t.Logf("the log of Docker in %s:\n%s", netns, b[max(0, len(b)-8000):])
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return e
}

func (e *Engine) in(name string) string { return filepath.Join(e.dir, name) }

// Start starts the engine, and does not wait until it answers.
func (e *Engine) Start() {
	e.t.Helper()
	log, err := os.OpenFile(e.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		e.t.Fatal(err)
	}
	defer log.Close()
	e.daemon = exec.Command("nsenter", "--net="+e.netns, "unshare", "-m", "sh", "-c", `mount --bind "$1" /run/docker/plugins && shift && exec "$@"`, "sh", e.Plugins,
		"dockerd", "--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=vfs", "--data-root", e.in("d"), "--exec-root", e.in("x"),
		"--pidfile", e.in("pid"), "-H", "unix://"+e.Socket)
	e.daemon.Stdout, e.daemon.Stderr = log, log
	if err := e.daemon.Start(); err != nil {
		e.t.Fatal(err)
	}
}

// Await waits until the engine answers.
func (e *Engine) Await() {
	e.t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(100 * time.Millisecond) {
		_, err := e.Try("version")
		if err == nil {
			return
		}
		if time.Now().After(end) {
			e.t.Fatalf("Docker does not answer within %v: %v", limit, err)
		}
	}
}

// Stop stops the engine, if it runs, as a shutdown does, and with it the containers.
func (e *Engine) Stop() {
	if e.daemon != nil {
		_ = e.daemon.Process.Signal(syscall.SIGTERM)
		_ = e.daemon.Wait()
		e.daemon = nil
	}
}

// Try runs the command line of Docker, which never waits for long, and returns what it prints.
func (e *Engine) Try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	out, err := exec.CommandContext(ctx, "docker", append([]string{"-H", "unix://" + e.Socket}, args...)...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("docker %v in %s: %w: %s", args, e.netns, err, out)
	}
	return string(bytes.TrimSpace(out)), nil
}

// Do is Try for what must work.
func (e *Engine) Do(args ...string) string {
	e.t.Helper()
	out, err := e.Try(args...)
	if err != nil {
		e.t.Fatal(err)
	}
	return out
}

// Refused runs a command that must fail and say why.
func (e *Engine) Refused(why string, args ...string) {
	e.t.Helper()
	if out, err := e.Try(args...); err == nil || !strings.Contains(err.Error(), why) {
		e.t.Errorf("docker %v: %q, %v; want an error with %q", args, out, err, why)
	}
}
