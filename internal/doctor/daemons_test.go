package doctor_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/doctor"
	"github.com/tulle-net/tulle/internal/testing/debian"
	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// userland is a Debian userland with firewalld and NetworkManager. Its daemons run in a host's network namespace, with a /run and a
// D-Bus of their own. A read-only /sys tells NetworkManager that there is no udev to wait for.
type userland struct {
	t     *testing.T
	root  string
	host  *hosts.Host
	enter []string // what goes before a command
}

// newUserland starts the daemon by its command line. It has the program, for the commands that the doctor prints.
func newUserland(t *testing.T, h *hosts.Host, program, daemon string) *userland {
	t.Helper()
	if testing.Short() {
		t.Skip("makes a tree of Debian")
	}
	if _, err := exec.LookPath("debootstrap"); err != nil {
		if os.Getenv("TULLE_NSPAWN") == "1" {
			t.Fatal("needs debootstrap: make deps")
		}
		t.Skip("needs debootstrap: make deps")
	}
	tree := debian.With(t, debian.Tree(t, debian.Release(t)), "firewalld", "network-manager")
	u := &userland{t: t, host: h, root: debian.Overlay(t, tree, t.TempDir())}
	b, err := os.ReadFile(program)
	if err := errors.Join(err, os.WriteFile(filepath.Join(u.root, "usr/bin/tulle"), b, 0o755)); err != nil {
		t.Fatal(err)
	}
	const script = `
echo $$ >"$1/pid"
exec unshare -m -p -f --kill-child sh -ec '
mount --make-rprivate /
mount --rbind /dev "$1/dev"
mount -t sysfs -o ro sysfs "$1/sys"
mount -t proc proc "$1/proc"
mount -t tmpfs tmpfs "$1/run"
mkdir "$1/run/dbus"
chroot "$1" dbus-daemon --system --fork --nopidfile
exec chroot "$1" $2 >"$1/log" 2>&1
' sh "$1" "$2"
`
	h.Start("sh", "-ec", script, "sh", u.root, daemon)
	t.Cleanup(func() {
		if log, err := os.ReadFile(filepath.Join(u.root, "log")); err == nil && t.Failed() {
			t.Logf("%s: %s", daemon, log)
		}
	})
	hosts.Within(t, 10*time.Second, "the daemon's process", func() error {
		pid, err := os.ReadFile(filepath.Join(u.root, "pid"))
		if err != nil || len(pid) < 2 {
			return fmt.Errorf("%q %v", pid, err)
		}
		ns := "/proc/" + strings.TrimSpace(string(pid)) + "/ns/"
		u.enter = []string{"--mount=" + ns + "mnt", "--pid=" + ns + "pid_for_children", "chroot", u.root, "sh", "-ec"}
		return nil
	})
	return u
}

// try runs a line of shell beside the daemon.
func (u *userland) try(line string) (string, error) {
	return u.host.TryRun("nsenter", append(append([]string(nil), u.enter...), "cd /; "+line)...)
}

func (u *userland) run(line string) string {
	u.t.Helper()
	out, err := u.try(line)
	if err != nil {
		u.t.Fatal(err)
	}
	return out
}

// TestFirewalld has a real firewalld, as it is after its installation, on one of two hosts. The doctor names what it drops, and each of its
// commands, run as printed, opens what it is about: at the end pods reach each other in both directions.
func TestFirewalld(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw := n.Switch()
	a, b := n.Host("a"), n.Host("b")
	a.Plug(sw, "eth0", "10.0.1.11/24")
	b.Plug(sw, "eth0", "10.0.1.12/24")
	first := a.Agent("--bootstrap", "--underlay", "eth0", "--cluster-cidr", "10.244.0.0/16,fd00:244::/48", "--paths", "udp,ipip")
	first.Ready(20 * time.Second)
	second := b.Agent("--join", "10.0.1.11", "--paths", "udp,ipip")
	second.Ready(20 * time.Second)
	pod, other := first.Pod("web"), second.Pod("db")
	both := func() error {
		return errors.Join(connect(pod, other, other.IPv4()), connect(other, pod, pod.IPv4()), connect(pod, other, other.IPv6()), connect(other, pod, pod.IPv6()))
	}
	hosts.Within(t, 10*time.Second, "pods reach each other", both)

	u := newUserland(t, b, n.Program(), "firewalld --nofork --nopid")
	hosts.Within(t, 30*time.Second, "firewalld runs", func() error { _, err := u.try("firewall-cmd --state"); return err })
	u.run("firewall-cmd --permanent --new-zone=engine && firewall-cmd --permanent --zone=engine --set-target=ACCEPT && firewall-cmd --permanent --zone=engine --add-interface=docker0 && firewall-cmd --reload")
	p := at(t, n, b, second, "--paths", "udp,ipip", "--config", os.DevNull)
	mends := func(check, what string) {
		t.Helper()
		f := finds(p, check, what)
		if !strings.Contains(f.Command, "firewall-cmd --reload") {
			t.Fatalf("%+v", f)
		}
		u.run(f.Command)
	}
	for _, port := range []string{"TCP port 7946", "UDP port 7946", "UDP port 6080", "IP protocol 41", "IP protocol 4"} {
		mends("ports", "filter_IN_public drops what no rule accepts, and none names "+port)
	}
	p.well("ports")
	if connect(pod, other, other.IPv4()) == nil || connect(other, pod, pod.IPv6()) == nil {
		t.Error("pods reach each other, though firewalld forwards nothing: the next part tests nothing")
	}
	mends("firewall", "does not name tun0, 10.244.0.0/16, fd00:244::/48")
	p.well("firewall")
	hosts.Within(t, 20*time.Second, "pods reach each other through firewalld", both)
	u.run("firewall-cmd --permanent --zone=trusted --remove-source=10.244.0.0/16 && firewall-cmd --reload")
	if connect(other, pod, pod.IPv4()) == nil {
		t.Error("a pod reaches others, though its source is in no zone that forwards")
	}
	mends("firewall", "does not name 10.244.0.0/16:")
	hosts.Within(t, 20*time.Second, "pods reach each other through firewalld", both)
}

// connect opens a TCP connection, which no firewall takes for a part of an earlier one.
func connect(from, to *hosts.Pod, addr netip.Addr) error {
	var l net.Listener
	if err := to.Do(func() (err error) { l, err = net.Listen("tcp", netip.AddrPortFrom(addr, 0).String()); return err }); err != nil {
		return err
	}
	defer l.Close()
	return from.Do(func() error {
		c, err := net.DialTimeout("tcp", l.Addr().String(), time.Second)
		if err != nil {
			return err
		}
		return c.Close()
	})
}

// finds is one look for what a check found, whatever its state.
func finds(p patient, check, what string) (found doctor.Finding) {
	p.t.Helper()
	hosts.Within(p.t, 10*time.Second, p.host.Name+": the doctor's check "+check+" names it", func() error {
		r, err := p.doctor(check)
		for _, f := range r.Findings {
			if strings.Contains(f.What, what) {
				found = f
				return nil
			}
		}
		return fmt.Errorf("%q is not in %+v, %v", what, r, err)
	})
	return found
}

// TestNetworkManager has a real NetworkManager on a host whose drop-in is missing. The doctor sees that it manages the TUN device, and the command
// makes it leave the device alone, also after a restart of the daemon.
func TestNetworkManager(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	h := n.Host("h")
	h.IP("tuntap add dev tun0 mode tun", "link set tun0 alias tulle up", "addr add 10.244.0.1/32 dev tun0")
	u := newUserland(t, h, n.Program(), "NetworkManager --no-daemon")
	hosts.Within(t, 30*time.Second, "NetworkManager runs", func() error { _, err := u.try("nmcli -t general status"); return err })
	look := func() string {
		return u.run("tulle doctor managers --config /dev/null --socket /nonexistent/s || true")
	}
	var out string
	hosts.Within(t, 20*time.Second, "the doctor names it", func() error {
		if out = look(); !strings.Contains(out, "FAILED managers: NetworkManager manages tun0") {
			return errors.New(out)
		}
		return nil
	})
	_, command, _ := strings.Cut(out, "$ ")
	command, _, _ = strings.Cut(command, "\n")
	u.run(command)
	hosts.Within(t, 20*time.Second, "NetworkManager leaves it alone", func() error {
		if out = look(); !strings.Contains(out, "NetworkManager: tun0 managed false") || !strings.Contains(out, " 0 failed") {
			return errors.New(out)
		}
		return nil
	})
	h.IP("tuntap add dev tulle-direct mode tun", "link set tulle-direct up",
		"link add tp0123456789ab type veth peer name peer", "link set tp0123456789ab up", "link set peer up",
		"link add pods address ee:ee:ee:ee:ee:ee type bridge", "addr add 10.99.0.1/24 dev pods", "link set pods up")
	hosts.Within(t, 20*time.Second, "all other devices of Tulle are left alone, too", func() error {
		s := u.run("nmcli -t -f DEVICE,STATE device")
		for _, d := range []string{"tun0:unmanaged", "tulle-direct:unmanaged", "tp0123456789ab:unmanaged", "pods:connected (externally)"} {
			if !strings.Contains(s, d) {
				return errors.New(s)
			}
		}
		return nil
	})
	h.IP("link set tp0123456789ab alias 'tulle-pod 10.244.0.3 web'")
	if out = look(); !strings.Contains(out, "manages 0 other devices of Tulle") || !strings.Contains(out, " 0 failed") {
		t.Error(out)
	}
	t.Log(command)
}
