package hosts

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/sys"
)

// Host is a host, a switch, a router or a pod: a network namespace and files.
type Host struct {
	Name string
	Wrap []string // a command in front of the agents that are started next, such as unshare with its arguments; it must not fork

	net    *Net
	netns  string // its name
	dir    string // its files: hosts, resolv.conf, state …
	ports  int    // that a switch has had
	starts int    // of agents
}

// NetnsPath is the path of the host's network namespace.
func (h *Host) NetnsPath() string { return sys.NetnsPath(h.netns) }

// Link makes a wire of MTU 1500 to another host, with addresses in CIDR notation (several separated by blanks, "" for none).
func (h *Host) Link(dev, addrs string, other *Host, otherDev, otherAddrs string) {
	h.net.t.Helper()
	h.LinkMTU(dev, addrs, other, otherDev, otherAddrs, 1500)
}

// LinkMTU is Link with another MTU. Both ends are up and their addresses usable when it returns.
func (h *Host) LinkMTU(dev, addrs string, other *Host, otherDev, otherAddrs string, mtu int) {
	n := h.net
	n.t.Helper()
	nl, err := sys.OpenNetlink(h.NetnsPath())
	n.check(err)
	defer nl.Close()
	n.check(lab.Veth(nl, dev, otherDev, other.NetnsPath(), mtu, nil, nil))
	h.IP("link set " + dev + " up")
	other.IP("link set " + otherDev + " up")
	h.Addr(dev, strings.Fields(addrs)...)
	other.Addr(otherDev, strings.Fields(otherAddrs)...)
	n.waitUp(h, dev)
	n.waitUp(other, otherDev)
}

// Plug plugs a new interface into a switch, with the switch's MTU and addresses in CIDR notation.
func (h *Host) Plug(sw *Host, dev string, addrs ...string) {
	n := h.net
	n.t.Helper()
	nl, err := sys.OpenNetlink(sw.NetnsPath())
	n.check(err)
	defer nl.Close()
	br, err := nl.LinkByName("br0")
	n.check(err)
	sw.ports++
	port := fmt.Sprintf("port%d", sw.ports)
	h.LinkMTU(dev, "", sw, port, "", br.Attrs().MTU)
	sw.IP("link set " + port + " master br0")
	h.Addr(dev, addrs...)
}

// Addr adds addresses in CIDR notation, which are usable when it returns: there is no duplicate address detection.
func (h *Host) Addr(dev string, addrs ...string) {
	n := h.net
	n.t.Helper()
	nl, err := sys.OpenNetlink(h.NetnsPath())
	n.check(err)
	defer nl.Close()
	link, err := nl.LinkByName(dev)
	n.check(err)
	for _, a := range addrs {
		p, err := netip.ParsePrefix(a)
		n.check(err)
		n.check(nl.AddAddress(n.t.Context(), link, p))
	}
}

// IP runs lines of ip(8), each without the word "ip".
func (h *Host) IP(lines ...string) {
	h.net.t.Helper()
	cmd := exec.Command("ip", "-n", h.netns, "-batch", "-")
	cmd.Stdin = strings.NewReader(strings.Join(lines, "\n") + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		h.net.t.Fatalf("%s: ip %q: %v: %s", h.Name, lines, err, out)
	}
}

// Sysctl sets a value of the host's own network settings, by its name as sysctl(8) has it.
func (h *Host) Sysctl(name, value string) {
	h.net.t.Helper()
	h.net.check(h.sysctl(name, value))
}

func (h *Host) sysctl(name, value string) error {
	return h.Do(func() error { return os.WriteFile(sysctlPath(name), []byte(value), 0) })
}

// GetSysctl reads such a value.
func (h *Host) GetSysctl(name string) (value string) {
	h.net.t.Helper()
	h.net.check(h.Do(func() error {
		b, err := os.ReadFile(sysctlPath(name))
		value = strings.TrimSpace(string(b))
		return err
	}))
	return value
}

func sysctlPath(name string) string {
	return "/proc/sys/" + strings.ReplaceAll(strings.ReplaceAll(name, ".", "/"), "//", ".")
}

// Do runs fn on a thread in the host's network namespace. Sockets that fn opens stay in it; goroutines do not run there.
func (h *Host) Do(fn func() error) error { return sys.WithNetns(h.NetnsPath(), fn) }

// EtcHosts writes the host's /etc/hosts: localhost and these lines. What runs on the host sees the change.
func (h *Host) EtcHosts(lines ...string) {
	h.net.t.Helper()
	h.WriteFile("hosts", "127.0.0.1 localhost\n"+strings.Join(append(lines, ""), "\n"))
}

// ResolvConf writes the host's /etc/resolv.conf. What runs on the host sees the change.
func (h *Host) ResolvConf(lines ...string) {
	h.net.t.Helper()
	h.WriteFile("resolv.conf", strings.Join(append(lines, ""), "\n"))
}

// WriteFile writes a file into the host's folder and returns its path.
func (h *Host) WriteFile(name, text string) string {
	h.net.t.Helper()
	path := filepath.Join(h.dir, name)
	h.net.check(os.WriteFile(path, []byte(text), 0o600)) // in place: a bind mount shows the same file
	return path
}

// StateDir is the folder where the host's agent keeps its state.
func (h *Host) StateDir() string { return filepath.Join(h.dir, "state") }

// WipeDisk removes what an agent has stored.
func (h *Host) WipeDisk() { h.net.t.Helper(); h.net.check(os.RemoveAll(h.StateDir())) }

// start starts a command in the host's namespace, with its /etc.
func (h *Host) start(cmd *exec.Cmd) error {
	return lab.Start(cmd, h.NetnsPath(),
		lab.Bind{From: filepath.Join(h.dir, "hosts"), At: "/etc/hosts"},
		lab.Bind{From: filepath.Join(h.dir, "resolv.conf"), At: "/etc/resolv.conf"})
}

// Run runs a program on the host and returns what it prints; the test ends if it fails.
func (h *Host) Run(name string, args ...string) string {
	h.net.t.Helper()
	out, err := h.TryRun(name, args...)
	h.net.check(err)
	return out
}

// TryRun is Run that returns the error, with what was printed in it.
func (h *Host) TryRun(name string, args ...string) (string, error) {
	var out strings.Builder
	cmd := exec.CommandContext(h.net.t.Context(), name, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	err := h.start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		err = fmt.Errorf("%s: %s %q: %w: %s", h.Name, name, args, err, out.String())
	}
	return out.String(), err
}

// Start starts a program that runs until the test ends, or stop is called.
func (h *Host) Start(name string, args ...string) (stop func()) {
	h.net.t.Helper()
	cmd := exec.Command(name, args...)
	h.net.check(h.start(cmd))
	stop = func() {
		if err := cmd.Process.Kill(); errors.Is(err, os.ErrProcessDone) {
			return
		}
		_ = cmd.Wait()
	}
	h.net.t.Cleanup(stop)
	return stop
}
