package nspawn

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/testing/debian"
)

// What the package does to the service when it is installed, upgraded and removed: the agent starts where a configuration waits,
// also after a removal; an upgrade restarts an agent that waits for its seeds, too; and what the administrator has stopped or
// disabled stays so.
func TestPackageAndService(t *testing.T) {
	needTools(t)
	first, second := deb(t, "1.0.0"), deb(t, "1.0.1")
	l, err := lab.Up(t.Context(), lab.Options{Name: labName("package"), Nodes: 1, Bare: true, Pods: -1, Replace: true}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
	})
	m := machines(t, l, debian.Tree(t, debian.Release(t)))[0]
	if err := errors.Join(prepare(m, "bootstrap: h1\n", first, second), m.boot()); err != nil {
		t.Fatal(err)
	}
	sh := func(script string) string {
		t.Helper()
		out, err := m.run("sh", "-ec", script)
		if err != nil {
			t.Fatalf("%v\n%s", err, m.journal())
		}
		return out
	}
	dpkg := func(deb string, words ...string) {
		t.Helper()
		began := time.Now()
		out := sh("dpkg --install /root/" + filepath.Base(deb) + " 2>&1")
		t.Logf("%v:\n%s", time.Since(began).Round(time.Millisecond), out)
		for _, w := range words {
			if !strings.Contains(out, w) {
				t.Errorf("dpkg does not say %q:\n%s", w, out)
			}
		}
	}
	// is waits until the service is in that state, and its program, if it has one, is of that version.
	is := func(when, state, enabled, version string) {
		t.Helper()
		err := m.until("the service to be "+state, 30*time.Second, func() error {
			out, err := m.run("sh", "-c", "systemctl is-active tulle; systemctl is-enabled tulle; cmp /proc/$(systemctl show --property=MainPID --value tulle)/exe /usr/bin/tulle && tulle version --socket /none")
			if want := state + "\n" + enabled + "\n"; !strings.HasPrefix(out, want) || version != "" && !strings.Contains(out, version) {
				return fmt.Errorf("want %q and version %s: %w\n%s", want, version, err, out)
			}
			return nil
		})
		if err != nil {
			t.Errorf("%s: %v\n%s", when, err, m.journal())
		}
	}

	// Nothing starts without a configuration. A systemd-networkd that runs has to read its drop-in; a restart of it leaves its links as they were.
	sh(`ip link add d0 type veth peer name d1; ip link set d0 up; ip link set d1 up
printf '[Match]\nName=d0\n\n[Network]\nAddress=203.0.113.10/24\n\n[Route]\nDestination=198.51.100.0/24\nGateway=203.0.113.1\n' >/etc/systemd/network/d0.network; systemctl start systemd-networkd`)
	managers := func(when string, words ...string) {
		t.Helper()
		err := m.until("the doctor to say so", 10*time.Second, func() error {
			out, err := m.run("sh", "-c", "tulle doctor managers --socket /none")
			for _, w := range words {
				if !strings.Contains(out, w) {
					return fmt.Errorf("%q is not in it: %w\n%s", w, err, out)
				}
			}
			return nil
		})
		if err != nil {
			t.Errorf("%s: %v", when, err)
		}
	}
	dpkg(first, "to start, write /etc/tulle/tulle.yaml", "systemctl restart systemd-networkd")
	managers("after the installation", "has not read /usr/lib/systemd/networkd.conf.d/90-tulle.conf", "$ systemctl restart systemd-networkd")
	sh("systemctl restart systemd-networkd; /lib/systemd/systemd-networkd-wait-online --interface=d0 --timeout=60")
	managers("after a restart of systemd-networkd", "1 ok, 0 warnings")
	if out := sh("ip addr show dev d0; ip route show dev d0"); !strings.Contains(out, "203.0.113.10/24") || !strings.Contains(out, "198.51.100.0/24") {
		t.Errorf("after a restart of systemd-networkd: %s", out)
	}
	dpkg(second)
	managers("after an upgrade", "1 ok, 0 warnings")
	dpkg(first)
	sh("systemctl stop systemd-networkd systemd-networkd.socket; rm /etc/systemd/network/d0.network; ip link del d0")
	is("installed without a configuration", "inactive", "disabled", "")

	// A node that waits for its seeds.
	const waiting = "systemctl --no-block start tulle"
	sh("mkdir -p /etc/tulle; printf 'bootstrap: h2\\njoin: [192.0.2.1]\\n' >/etc/tulle/tulle.yaml; systemctl enable tulle; " + waiting)
	is("it waits", "activating", "enabled", "1.0.0")
	dpkg(second, "the agent is not ready yet")
	is("an upgrade while it waits", "activating", "enabled", "1.0.1")
	sh("systemctl disable tulle")
	dpkg(first)
	is("an upgrade while it waits, and is disabled", "activating", "disabled", "1.0.0")

	// What the administrator has stopped or disabled.
	sh("systemctl enable tulle; systemctl stop tulle")
	dpkg(second)
	is("an upgrade of a stopped agent", "inactive", "enabled", "")
	sh("systemctl disable tulle")
	dpkg(first)
	is("an upgrade of a disabled agent", "inactive", "disabled", "")
	sh("dpkg --remove tulle")
	dpkg(second, "was disabled before the package was removed", "systemctl enable --now tulle")
	is("installed again, disabled before", "inactive", "disabled", "")

	// Removed and installed again.
	sh("cp /root/tulle.yaml /etc/tulle/tulle.yaml; systemctl enable --now tulle")
	is("it runs", "active", "enabled", "1.0.1")
	sh("dpkg --remove tulle")
	dpkg(first)
	is("installed again", "active", "enabled", "1.0.0")
	dpkg(second)
	is("an upgrade of an agent that runs", "active", "enabled", "1.0.1")

	// systemd keeps the descriptors of the most queues: the TUN's, and the sockets of both underlay addresses.
	began := time.Now()
	sh("echo 'queues: 64' >>/etc/tulle/tulle.yaml; systemctl restart tulle; systemctl restart tulle")
	is("64 queues", "active", "enabled", "1.0.1")
	t.Logf("two restarts with 64 queues took %v", time.Since(began).Round(time.Millisecond))
	if err := m.until("the journal to say what was kept", 20*time.Second, func() error { // journald writes it a moment after it was said
		out := sh("journalctl --no-pager --unit=tulle --output=cat --grep='the service manager kept' | tail -2")
		if !strings.Contains(out, "adopted the TUN device") || !strings.Contains(out, "sockets=260") {
			return errors.New(out)
		}
		return nil
	}); err != nil {
		t.Errorf("after a restart with 64 queues: %v", err)
	}
	sh("dpkg --remove tulle; rm /etc/tulle/tulle.yaml")
	dpkg(first, "to start, write /etc/tulle/tulle.yaml")
	sh("systemctl mask --now tulle; cp /root/tulle.yaml /etc/tulle/tulle.yaml")
	dpkg(second, "masked")
	is("an upgrade of a masked agent", "inactive", "masked", "")
	sh("systemctl unmask tulle; dpkg --purge tulle; mkdir /etc/tulle; cp /root/tulle.yaml /etc/tulle/tulle.yaml")
	dpkg(first)
	is("installed after a purge", "active", "enabled", "1.0.0")
}
