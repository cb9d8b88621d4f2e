package nspawn

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/testing/debian"
	"github.com/tulle-net/tulle/internal/testing/dockerd"
	"github.com/tulle-net/tulle/internal/testing/namespace"
	"github.com/tulle-net/tulle/internal/testing/testbuild"
)

// reached connects from the host to a container at its own address.
func reached(d *dockerd.Engine, netns, name string) error {
	out, err := d.Try("inspect", "-f", "{{.State.Pid}} {{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}} {{.State.Error}}", name)
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
	_, err = namespace.SeenAs(netns, "/proc/"+f[0]+"/ns/net", addr)
	return err
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
	netns := l.Hosts()[0].Netns
	d := dockerd.New(t, netns)
	m := machines(t, l, tree)[0]
	t.Cleanup(d.Stop) // before the machine ends, for whose agent it would wait
	m.options = []string{"--bind=" + d.Plugins + ":/run/docker/plugins", "--bind=" + filepath.Dir(d.Socket) + ":/run/engine"}
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

	d.Start()
	reach := func(when string) {
		t.Helper()
		if err := m.until("the container, "+when, time.Minute, func() error { return reached(d, netns, "box") }); err != nil {
			t.Fatalf("%v\n%s", err, m.journal())
		}
	}
	if err := m.until("Docker", time.Minute, func() error { _, err := d.Try("version"); return err }); err != nil {
		t.Fatal(err)
	}
	d.Do("import", box(t), "box")
	d.Do("network", "create", "-d", "tulle", "--ipam-driver", "tulle", "pods")
	d.Do("run", "-d", "--stop-signal", "KILL", "--name", "box", "--restart", "always", "--network", "pods", "box", "/bin/busybox", "sleep", "600")
	reach("after the start")
	if err := start(m, l, "restart"); err != nil {
		t.Fatal(err)
	}
	reach("after a restart of the service")
	d.Do("restart", "-t", "0", "box")
	reach("after its own restart")
	withoutService(t, m, l, d)
	reach("after a start of Docker without the service")
	if names := d.Do("ps", "--format", "{{.Names}}"); names != "box" {
		t.Errorf("running are %q, want box only", names)
	}

	d.Stop()
	left, err := filepath.Glob(filepath.Join(d.Plugins, "*"))
	if err := errors.Join(err, m.poweroff(), l.ResetHost(t.Context(), m.host)); err != nil {
		t.Fatal(err)
	}
	for _, path := range left { // a reboot empties /run
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
	}
	d.Start()
	if err := errors.Join(m.boot(), active(m, l)); err != nil {
		t.Fatal(err)
	}
	reach("after a reboot")
}

// withoutService starts the engine again while the service is stopped, and has taken its socket away, and then the service. There is
// also a container that its user has stopped.
func withoutService(t *testing.T, m *machine, l *lab.Lab, d *dockerd.Engine) {
	t.Helper()
	d.Do("run", "-d", "--stop-signal", "KILL", "--name", "stopped", "--restart", "unless-stopped", "--network", "pods", "box", "/bin/busybox", "sleep", "600")
	d.Do("stop", "stopped")
	d.Stop()
	if _, err := m.run("systemctl", "stop", "tulle"); err != nil {
		t.Fatal(err)
	}
	d.Start()
	if err := m.until("Docker", time.Minute, func() error { _, err := d.Try("version"); return err }); err != nil {
		t.Fatal(err)
	}
	if reason := d.Do("inspect", "-f", "{{.State.Error}}", "box"); !strings.Contains(reason, "not found") {
		t.Errorf("without the service the container has the error %q", reason)
	}
	if err := start(m, l, "start"); err != nil {
		t.Fatal(err)
	}
}
