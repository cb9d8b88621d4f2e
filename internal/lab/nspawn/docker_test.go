package nspawn

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/testing/debian"
	"github.com/tulle-net/tulle/internal/testing/namespace"
	"github.com/tulle-net/tulle/internal/testing/testbuild"
)

// docker is a Docker engine beside a machine: it runs in the machine's network namespace, and finds what the agent puts into the
// machine's /run/docker/plugins.
type docker struct {
	t      *testing.T
	netns  string
	dir    string
	daemon *exec.Cmd
}

func (d *docker) plugins() string { return filepath.Join(d.dir, "p") }

// socket is the engine's API, in a folder that the machine has too.
func (d *docker) socket() string { return filepath.Join(d.dir, "a", "docker.sock") }

// launch starts the engine.
func (d *docker) launch() {
	d.t.Helper()
	in := func(name string) string { return filepath.Join(d.dir, name) }
	log, err := os.OpenFile(in("log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		d.t.Fatal(err)
	}
	defer log.Close()
	d.daemon = exec.Command("nsenter", "--net="+d.netns, "unshare", "-m", "sh", "-c", `mount --bind "$1" /run/docker/plugins && shift && exec "$@"`, "sh", d.plugins(),
		"dockerd", "--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=vfs", "--data-root", in("d"), "--exec-root", in("x"),
		"--pidfile", in("pid"), "-H", "unix://"+d.socket())
	d.daemon.Stdout, d.daemon.Stderr = log, log
	if err := d.daemon.Start(); err != nil {
		d.t.Fatal(err)
	}
}

// stop stops the engine as a shutdown does, and with it the containers.
func (d *docker) stop() {
	if d.daemon != nil {
		_ = d.daemon.Process.Signal(syscall.SIGTERM)
		_ = d.daemon.Wait()
		d.daemon = nil
	}
}

// try runs the command line, which never waits for long.
func (d *docker) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "docker", append([]string{"-H", "unix://" + d.socket()}, args...)...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("docker %v: %w: %s", args, err, out)
	}
	return string(bytes.TrimSpace(out)), nil
}

func (d *docker) do(args ...string) string {
	d.t.Helper()
	out, err := d.try(args...)
	if err != nil {
		d.t.Fatal(err)
	}
	return out
}

// reached connects from the host to a container at its own address.
func (d *docker) reached(name string) error {
	out, err := d.try("inspect", "-f", "{{.State.Pid}} {{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}} {{.State.Error}}", name)
	if err != nil {
		return err
	}
	f := strings.Fields(out)
	if len(f) != 2 || f[0] == "0" {
		return fmt.Errorf("%s is %q", name, out)
	}
	addr, err := netip.ParseAddr(f[1])
	if err != nil {
		return err
	}
	_, err = namespace.SeenAs(d.netns, "/proc/"+f[0]+"/ns/net", addr)
	return err
}

// newDocker makes the engine's folder.
func newDocker(t *testing.T, netns string) *docker {
	t.Helper()
	dir, err := os.MkdirTemp("", "dkr") // short: the engine's sockets are in it
	if err != nil {
		t.Fatal(err)
	}
	d := &docker{t: t, netns: netns, dir: dir}
	if err := errors.Join(os.Mkdir(d.plugins(), 0o755), os.Mkdir(filepath.Dir(d.socket()), 0o755), os.MkdirAll("/run/docker/plugins", 0o755)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.stop()
		if b, err := os.ReadFile(filepath.Join(dir, "log")); err == nil && t.Failed() {
			t.Logf("the log of Docker:\n%s", b[max(0, len(b)-6000):])
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return d
}

// box is a root file system with busybox and nothing else.
func box(t *testing.T) string {
	t.Helper()
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err = w.WriteHeader(&tar.Header{Name: "bin/busybox", Mode: 0o755, Size: int64(len(busybox))})
	if err == nil {
		_, err = w.Write(busybox)
	}
	path := filepath.Join(t.TempDir(), "box.tar")
	if err := errors.Join(err, w.Close(), os.WriteFile(path, b.Bytes(), 0o600)); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestDockerHost: the driver works in the sandbox of the packaged service, set up as docs/docker.md says. A container of Docker with
// --restart=always stays reachable while the service restarts, and comes back by itself after a reboot in which Docker starts first, and when Docker was started while the service was stopped.
func TestDockerHost(t *testing.T) {
	needTools(t)
	binary := filepath.Join(t.TempDir(), "tulle")
	if err := testbuild.Tulle(binary, []string{"CGO_ENABLED=0"}); err != nil {
		t.Fatal(err)
	}
	tree := debian.Tree(t, debian.Release(t))
	l, err := lab.Up(t.Context(), lab.Options{Name: labName("docker"), Bare: true, Nodes: 1, Subnets: 1, Pods: -1, Replace: true}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
	})
	d := newDocker(t, l.Hosts()[0].Netns)
	m := machines(t, l, tree)[0]
	t.Cleanup(d.stop) // before the machine ends, for whose agent it would wait
	m.options = []string{"--bind=" + d.plugins() + ":/run/docker/plugins", "--bind=" + filepath.Dir(d.socket()) + ":/run/engine"}
	// The engine's socket is where the agent looks for it without being told.
	link := filepath.Join(m.root, "etc/tmpfiles.d/engine.conf")
	dropIn := filepath.Join(m.root, "etc/systemd/system/tulle.service.d/docker.conf")
	err = errors.Join(install(m, binary, config(l)+"docker_socket: /run/docker/plugins/tulle.sock\n"), os.MkdirAll(filepath.Dir(dropIn), 0o755),
		os.WriteFile(dropIn, []byte("[Service]\nRuntimeDirectory=docker/plugins\n"), 0o644),
		os.WriteFile(link, []byte("L /run/docker.sock - - - - /run/engine/docker.sock\n"), 0o644), m.boot())
	if err == nil {
		_, err = m.run("systemctl", "enable", "tulle")
	}
	if err := errors.Join(err, start(m, l, "start")); err != nil {
		t.Fatal(err)
	}

	d.launch()
	reach := func(when string) {
		t.Helper()
		if err := m.until("the container, "+when, time.Minute, func() error { return d.reached("box") }); err != nil {
			t.Fatalf("%v\n%s", err, m.journal())
		}
	}
	if err := m.until("Docker", time.Minute, func() error { _, err := d.try("version"); return err }); err != nil {
		t.Fatal(err)
	}
	d.do("import", box(t), "box")
	d.do("network", "create", "-d", "tulle", "--ipam-driver", "tulle", "pods")
	d.do("run", "-d", "--stop-signal", "KILL", "--name", "box", "--restart", "always", "--network", "pods", "box", "/bin/busybox", "sleep", "600")
	reach("after the start")
	if err := start(m, l, "restart"); err != nil {
		t.Fatal(err)
	}
	reach("after a restart of the service")
	d.do("restart", "-t", "0", "box")
	reach("after its own restart")
	withoutService(t, m, l, d)
	reach("after a start of Docker without the service")
	if names := d.do("ps", "--format", "{{.Names}}"); names != "box" {
		t.Errorf("running are %q, want box only", names)
	}

	d.stop()
	left, err := filepath.Glob(filepath.Join(d.plugins(), "*"))
	if err := errors.Join(err, m.poweroff(), l.ResetHost(t.Context(), m.host)); err != nil {
		t.Fatal(err)
	}
	for _, path := range left { // a reboot empties /run
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
	}
	d.launch()
	if err := errors.Join(m.boot(), active(m, l)); err != nil {
		t.Fatal(err)
	}
	reach("after a reboot")
}

// withoutService starts the engine again while the service is stopped, and has taken its socket away, and then the service. There is
// also a container that its user has stopped.
func withoutService(t *testing.T, m *machine, l *lab.Lab, d *docker) {
	t.Helper()
	d.do("run", "-d", "--stop-signal", "KILL", "--name", "stopped", "--restart", "unless-stopped", "--network", "pods", "box", "/bin/busybox", "sleep", "600")
	d.do("stop", "stopped")
	d.stop()
	if _, err := m.run("systemctl", "stop", "tulle"); err != nil {
		t.Fatal(err)
	}
	d.launch()
	if err := m.until("Docker", time.Minute, func() error { _, err := d.try("version"); return err }); err != nil {
		t.Fatal(err)
	}
	if reason := d.do("inspect", "-f", "{{.State.Error}}", "box"); !strings.Contains(reason, "not found") {
		t.Errorf("without the service the container has the error %q", reason)
	}
	if err := start(m, l, "start"); err != nil {
		t.Fatal(err)
	}
}
