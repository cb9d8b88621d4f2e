// Package nspawn tests the packaged service on hosts that boot systemd: containers of systemd-nspawn over a tree that
// debootstrap makes, on the hosts' side of a lab's network. It needs root, debootstrap and systemd-nspawn, and runs only
// where they are; with TULLE_NSPAWN=1 their absence is a failure.
package nspawn

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/testing/debian"
	"github.com/tulle-net/tulle/internal/testing/testbuild"
)

// repository is the root of this module, seen from here.
const repository = "../../.."

func needTools(t *testing.T) {
	t.Helper()
	give := t.Skipf
	if os.Getenv("TULLE_NSPAWN") == "1" {
		give = t.Fatalf
	} else if testing.Short() {
		t.Skip("boots three hosts")
	}
	if os.Geteuid() != 0 {
		give("needs root: boots containers")
	}
	for _, tool := range []string{"debootstrap", "systemd-nspawn", "nsenter", "apt-get"} {
		if _, err := exec.LookPath(tool); err != nil {
			give("needs %s: apt-get install debootstrap systemd-container util-linux", tool)
		}
	}
}

// Three hosts on two subnets, the same configuration file on each, `systemctl start tulle`: the cluster forms and pods reach
// each other; a restart of the service and a reboot of a host heal by themselves.
func TestSystemdHosts(t *testing.T) {
	needTools(t)
	binary := filepath.Join(t.TempDir(), "tulle")
	if err := testbuild.Tulle(binary, []string{"CGO_ENABLED=0"}); err != nil { // the hosts' C library need not be ours
		t.Fatal(err)
	}
	tree := debian.Tree(t, debian.Release(t))

	// One such test at a time on a machine: the name, and so the rests of a killed run, are always the same.
	l, err := lab.Up(t.Context(), lab.Options{Name: "tulle-systemd", Bare: true, Pods: -1, Replace: true}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
	})
	ms := machines(t, l, tree)
	each(t, ms, func(m *machine) error {
		if err := errors.Join(install(m, binary, config(l)), m.boot()); err != nil {
			return err
		}
		_, err := m.run("systemctl", "enable", "tulle")
		return err
	})
	each(t, ms, func(m *machine) error { return start(m, l, "start") })
	for _, m := range ms {
		for range 2 {
			if _, err := l.AddPod(t.Context(), m.host); err != nil {
				t.Fatalf("%v\n%s", err, m.journal())
			}
		}
	}
	reachAll(t, l, ms, "after the start")

	before := identity(t, l, "h2")
	each(t, ms[1:2], func(m *machine) error { return start(m, l, "restart") })
	reachAll(t, l, ms, "after a restart of the service on h2")
	if after := identity(t, l, "h2"); after != before {
		t.Errorf("h2 was %s, is %s after a restart of its service", before, after)
	}

	each(t, ms[2:], (*machine).poweroff)
	if err := l.ResetHost(t.Context(), "h3"); err != nil {
		t.Fatal(err)
	}
	before = "" // of h3: its agent is gone, so ask a peer
	for _, p := range peers(t, l, "h1") {
		if p.Name == "h3" {
			before = p.ID
		}
	}
	each(t, ms[2:], (*machine).boot)
	each(t, ms[2:], func(m *machine) error { return active(m, l) }) // nobody starts it: it is enabled
	if after := identity(t, l, "h3"); after != before || before == "" {
		t.Errorf("h3 was %q, is %s after a reboot", before, after)
	}
	for range 2 {
		if _, err := l.AddPod(t.Context(), "h3"); err != nil {
			t.Fatalf("%v\n%s", err, ms[2].journal())
		}
	}
	reachAll(t, l, ms, "after a reboot of h3")
	each(t, ms, func(m *machine) error {
		out, err := m.run("systemctl", "--failed", "--no-legend", "--plain")
		if strings.Contains(out, "tulle") {
			err = errors.Join(err, fmt.Errorf("%s: failed units:\n%s", m.host, out))
		}
		return err
	})
}

// config is the file that all hosts share.
func config(l *lab.Lab) string {
	var b strings.Builder
	fmt.Fprintf(&b, "bootstrap: %s\njoin:\n", l.Hosts()[0].Name)
	for _, h := range l.Hosts() {
		fmt.Fprintf(&b, "  - %s\n", h.Addr(false))
	}
	b.WriteString("cluster_cidr: [10.244.0.0/16, \"fd00:10:244::/48\"]\n")
	return b.String()
}

// install puts program, unit and configuration on a host's disk.
func install(m *machine, binary, config string) error {
	unit, err := os.ReadFile(filepath.Join(repository, "packaging/tulle.service"))
	if err != nil {
		return err
	}
	program, err := os.ReadFile(binary)
	if err != nil {
		return err
	}
	for _, f := range []struct {
		path string
		data []byte
		mode os.FileMode
	}{
		{"etc/hostname", []byte(m.host + "\n"), 0o644},
		{"usr/bin/tulle", program, 0o755},
		{"etc/systemd/system/tulle.service", unit, 0o644},
		{"etc/tulle/tulle.yaml", []byte(config), 0o644},
	} {
		path := filepath.Join(m.root, f.path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, f.data, f.mode); err != nil {
			return err
		}
	}
	return nil
}

// each does something to some machines at once; a failure of one ends the test.
func each(t *testing.T, ms []*machine, fn func(*machine) error) {
	t.Helper()
	errs := make([]error, len(ms))
	var wg sync.WaitGroup
	for i, m := range ms {
		wg.Go(func() { errs[i] = fn(m) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// start starts or restarts the service. It is Type=notify: systemctl returns when the agent is ready.
func start(m *machine, l *lab.Lab, verb string) error {
	if _, err := m.run("systemctl", verb, "tulle"); err != nil {
		return fmt.Errorf("%w\n%s", err, m.journal())
	}
	return active(m, l)
}

// active waits until the service runs.
func active(m *machine, l *lab.Lab) error {
	err := m.until("the service", time.Minute, func() error {
		_, err := m.run("systemctl", "is-active", "tulle")
		return err
	})
	if err != nil {
		return fmt.Errorf("%w\n%s", err, m.journal())
	}
	return l.AdoptAgent(m.host, m.socket())
}

func reachAll(t *testing.T, l *lab.Lab, ms []*machine, when string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	began := time.Now()
	if err := l.WaitPods(ctx); err != nil {
		for _, m := range ms {
			t.Logf("%s:\n%s", m.host, m.journal())
		}
		t.Fatalf("%s: %v", when, err)
	}
	t.Logf("%s: all pods reach each other, %v later", when, time.Since(began).Round(time.Millisecond))
	pongs, err := l.PingAll(ctx, false)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pongs {
		from, err := l.Pod(p.From)
		if err != nil || p.Err != nil || p.Source != from.Addr(p.Addr.Is6()) {
			t.Errorf("%s: %+v, %v", when, p, err)
		}
	}
}

// identity is the ID of a host's node.
func identity(t *testing.T, l *lab.Lab, host string) string {
	t.Helper()
	c, err := l.Client(host)
	if err != nil {
		t.Fatal(err)
	}
	st, err := c.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return st.Node.ID
}

func peers(t *testing.T, l *lab.Lab, host string) []api.Peer {
	t.Helper()
	c, err := l.Client(host)
	if err != nil {
		t.Fatal(err)
	}
	ps, err := c.Peers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return ps
}
