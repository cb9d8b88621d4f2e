// Package nspawn tests the package and its service on hosts that boot systemd: containers of systemd-nspawn over a tree that
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
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"golang.org/x/sys/unix"

	benchresult "github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/internal/testing/debian"
	"github.com/tulle-net/tulle/internal/testing/stall"
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

// Three hosts on two subnets, the same configuration file on each, the package installed: the cluster forms and pods reach each
// other. A restart of the service, an upgrade and a crash lose no packet, or as few as may be; the watchdog acts; a reboot of a host
// heals by itself; a purge leaves nothing.
func TestSystemdHosts(t *testing.T) {
	needTools(t)
	first, second := deb(t, "1.0.0"), deb(t, "1.0.1")
	tree := debian.With(t, debian.Tree(t, debian.Release(t)), "iputils-ping")

	// One such test at a time on a machine: the name, and so the rests of a killed run, are always the same.
	l, err := lab.Up(t.Context(), lab.Options{Name: labName("systemd"), Bare: true, Pods: -1, Replace: true}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
	})
	ms := machines(t, l, tree)
	ms[0].options = []string{"--capability=CAP_BPF", "--system-call-filter=bpf"} // what a host allows anyway
	each(t, ms, func(m *machine) error {
		if err := errors.Join(prepare(m, config(l), first), m.boot()); err != nil {
			return err
		}
		out, err := m.walk(t, "install")
		if err == nil && !strings.Contains(out, "Setting up tulle") {
			err = fmt.Errorf("%s: nothing was installed:\n%s", m.host, out)
		}
		return errors.Join(err, active(m, l))
	})
	walkPods(t, ms)
	for _, m := range ms {
		for range 2 {
			if _, err := l.AddPod(t.Context(), m.host); err != nil {
				t.Fatalf("%v\n%s", err, m.journal())
			}
		}
	}
	reachAll(t, l, ms, "after the start")
	allWays(t, l, "h1", "h3")
	benchTo(t, ms[0], "h3")

	before := identity(t, l, "h2")
	withoutLoss(t, l, ms, first, second)
	reachAll(t, l, ms, "after all that happened to the agent of h2")
	if after := identity(t, l, "h2"); after != before {
		t.Errorf("h2 was %s, is %s after restarts of its service", before, after)
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
	out, err := ms[0].run("systemd-analyze", "security", "--no-pager", "tulle")
	if m := regexp.MustCompile(`exposure level for tulle.service: ([0-9.]+) `).FindStringSubmatch(out); m == nil || m[1] > "3.0" || len(m[1]) != 3 {
		t.Errorf("systemd-analyze security: %v, want at most 3.0: %v\n%s", m, err, out)
	}
	fastPath(t, l, ms[0])
	purge(t, ms[2])
}

// fastPath turns the fast path on by the configuration alone, which the unit does not allow, and with the drop-in of docs/operations.md.
func fastPath(t *testing.T, l *lab.Lab, m *machine) {
	t.Helper()
	page, err := os.ReadFile(filepath.Join(repository, "docs/operations.md"))
	if err != nil {
		t.Fatal(err)
	}
	dropIn := regexp.MustCompile(`(?m)(^    \[Service\]\n(?:    \S.*\n)+)\nThen .systemctl restart tulle`).FindSubmatch(page)
	if dropIn == nil {
		t.Fatal("docs/operations.md has no drop-in for the fast path")
	}
	status := func(on bool, reason string) {
		t.Helper()
		if err := start(m, l, "restart"); err != nil {
			t.Fatal(err)
		}
		err := m.until("the fast path", 20*time.Second, func() error {
			c, err := l.Client(m.host)
			if err != nil {
				return err
			}
			st, err := c.Status(t.Context())
			if err == nil && (st.FastPath.On != on || !strings.Contains(st.FastPath.Reason, reason)) {
				err = fmt.Errorf("%+v", st.FastPath)
			}
			return err
		})
		if err != nil {
			t.Errorf("%v\n%s", err, m.journal())
		}
	}
	conf, err := os.OpenFile(filepath.Join(m.root, "etc/tulle/tulle.yaml"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = conf.WriteString("fast_path: true\n")
	if err := errors.Join(err, conf.Close()); err != nil {
		t.Fatal(err)
	}
	status(false, "CAP_BPF")
	dir := filepath.Join(m.root, "etc/systemd/system/tulle.service.d")
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "fast-path.conf"), dropIn[1], 0o644)); err != nil {
		t.Fatal(err)
	}
	if _, err := m.run("systemctl", "daemon-reload"); err != nil {
		t.Fatal(err)
	}
	status(true, "")
}

// allWays waits until two hosts reach each other by every way.
func allWays(t *testing.T, l *lab.Lab, one, other string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	for host, name := range map[string]string{one: other, other: one} {
		var last error
		err := sys.Poll(ctx, 100*time.Millisecond, func() (bool, error) {
			last = nil
			for _, p := range peers(t, l, host) {
				for _, c := range p.Candidates {
					if p.Name == name && (c.State != api.PathUp || c.MTU < 1280) {
						last = fmt.Errorf("%s to %s: %+v", host, name, c)
					}
				}
			}
			return last == nil, nil
		})
		if err != nil {
			t.Fatalf("%v: %v", err, last)
		}
	}
}

// benchTo measures to another host of the subnet, whose agent, in the sandbox of its unit, starts the process that answers.
func benchTo(t *testing.T, m *machine, host string) {
	t.Helper()
	out, err := m.run("tulle", "bench", "run", "--to", host, "--rounds", "1", "--duration", "100ms", "-o", "json")
	var r *benchresult.Run
	if err == nil {
		r, err = benchresult.Read(strings.NewReader(out[max(0, strings.Index(out, "\n{")):]))
	}
	if err != nil {
		t.Errorf("bench run --to %s: %v\n%s\n%s", host, err, out, m.journal())
		return
	}
	for _, mode := range []string{"direct", "udp", "vxlan", "ipip"} {
		if x := r.Mode(mode); x == nil || x.Missing != "" || x.Summary["tcp1_gbps"].Median <= 0 || x.Summary["rtt64_p50_us"].Median <= 0 {
			t.Errorf("bench run --to %s: %s was measured as %+v", host, mode, x)
		}
	}
}

// config is the file that all hosts share.
func config(l *lab.Lab) string {
	var b strings.Builder
	fmt.Fprintf(&b, "bootstrap: %s\njoin:\n", l.Hosts()[0].Name)
	for _, h := range l.Hosts() {
		fmt.Fprintf(&b, "  - %s\n", h.Addr(false))
	}
	// Two queues, on however few CPUs: a restart has to keep all of them.
	b.WriteString("cluster_cidr: [10.244.0.0/16, \"fd00:10:244::/48\"]\nqueues: 2\n")
	return b.String()
}

// prepare puts the configuration, and the packages to install, on a host's disk.
func prepare(m *machine, config string, packages ...string) error {
	files := map[string][]byte{"etc/hostname": []byte(m.host + "\n"), "root/tulle.yaml": []byte(config)}
	for _, p := range packages {
		deb, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		files[filepath.Join("root", filepath.Base(p))] = deb
	}
	for name, data := range files {
		path := filepath.Join(m.root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// walk runs the commands that docs/operations.md has under that name, where prepare has put the files, and with words replaced. So the page
// and what is tried are the same.
func (m *machine) walk(t *testing.T, name string, replace ...string) (string, error) {
	page, err := os.ReadFile(filepath.Join(repository, "docs/operations.md"))
	if err != nil {
		return "", err
	}
	_, block, found := strings.Cut(string(page), "<!-- walk: "+name+" -->\n```sh\n")
	commands, _, ended := strings.Cut(block, "```\n")
	if !found || !ended {
		return "", fmt.Errorf("docs/operations.md has no commands for %q", name)
	}
	out, err := m.run("env", "DEBIAN_FRONTEND=noninteractive", "sh", "-ec", "cd /root\n"+strings.NewReplacer(replace...).Replace(commands))
	t.Logf("%s: %s:\n%s", m.host, name, out)
	return out, err
}

// walkPods makes a pod on each host, and pings from the first one's to the others'.
func walkPods(t *testing.T, ms []*machine) {
	t.Helper()
	for i, m := range ms {
		clear := func() { // the hosts' named namespaces are this machine's, and outlive them
			space := filepath.Join("/run/netns", "pod-"+m.host)
			_ = unix.Unmount(space, unix.MNT_DETACH)
			if err := os.Remove(space); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Error(err)
			}
		}
		clear()
		t.Cleanup(clear)
		out, err := m.walk(t, "pod")
		addrs := regexp.MustCompile(`\b10\.244\.\d+\.\d+\b|\bfd00:10:244:[0-9a-f:]+`).FindAllString(out, -1)
		if err != nil || len(addrs) < 2 {
			t.Fatalf("%v: addresses %v", err, addrs)
		}
		for _, a := range addrs[:min(2, 2*i)] {
			err := ms[0].until("the pod to be reached, and all to be well", time.Minute, func() error { // hosts learn of each other and of pods by gossip
				_, err := ms[0].run("sh", "-ec", "tulle pod exec pod-$(uname -n) -- ping -c 1 -W 2 "+a+"; tulle doctor")
				return err
			})
			if err != nil {
				t.Error(err)
			}
			if out, err := ms[0].walk(t, "ping", "ADDRESS", a); err != nil || !strings.Contains(out, " 0% packet loss") || !strings.Contains(out, " 0 failed") {
				t.Errorf("%v\n%s", err, out)
			}
		}
	}
}

// install installs a package that prepare has put there.
func (m *machine) install(deb string) error {
	out, err := m.run("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "--yes", "--no-install-recommends", "/root/"+filepath.Base(deb))
	if err == nil && !strings.Contains(out, "Setting up tulle") {
		err = fmt.Errorf("%s: nothing was installed:\n%s", m.host, out)
	}
	return err
}

// upgrade installs a newer package in place of the one that is there, as the page says.
func (m *machine) upgrade(t *testing.T, old, newer string) error {
	deb, err := os.ReadFile(newer)
	if err == nil {
		err = errors.Join(os.Remove(filepath.Join(m.root, "root", filepath.Base(old))), os.WriteFile(filepath.Join(m.root, "root", filepath.Base(newer)), deb, 0o644))
	}
	if err != nil {
		return err
	}
	_, err = m.walk(t, "upgrade")
	return err
}

// withoutLoss does to the agent of h2 what operators and accidents do, while pods talk.
func withoutLoss(t *testing.T, l *lab.Lab, ms []*machine, first, second string) {
	h2 := ms[1]
	during := func(what string, gap time.Duration, do func() error) {
		t.Helper()
		tr, meter := between(t, l, "p1a", "p2a"), stall.Begin()
		err := do()
		if gap > 0 { // an agent that has to wait for a CPU takes longer to start
			gap += min(meter.Short(), 3*gap)
		}
		most := int(gap / pingEvery)
		if lost := tr.end(what); lost > most || err != nil {
			t.Errorf("%s: %d pings lost, at most %d may be; %v\n%s", what, lost, most, err, h2.journal())
		}
	}
	for range 2 { // a second run has descriptors that a first one took over
		during("systemctl restart", 0, func() error { return start(h2, l, "restart") })
	}
	kept(t, h2)
	during("apt-get install of a newer version", 0, func() error { return h2.upgrade(t, first, second) })
	if out, err := h2.run("tulle", "version"); err != nil || strings.Count(out, "1.0.1") != 2 {
		t.Errorf("after the upgrade, program and agent have these versions: %v\n%s", err, out)
	}
	during("kill -9", time.Second, func() error {
		if _, err := h2.run("systemctl", "kill", "--signal=KILL", "tulle"); err != nil {
			return err
		}
		return restarted(h2, l, 1)
	})
	watchdogActs(t, l, h2)
}

// kept checks that the service manager keeps the queues of the TUN and the sockets of both, and that a run took them over.
func kept(t *testing.T, m *machine) {
	t.Helper()
	m.says(t, "the service manager kept", 2, "adopted the TUN device", "adopted the sockets") // of two restarts
}

// watchdogActs stops the whole agent, and then one worker of the data path: systemd starts the agent again both times.
func watchdogActs(t *testing.T, l *lab.Lab, m *machine) {
	if err := m.fastWatchdog(); err != nil {
		t.Fatal(err)
	}
	if err := start(m, l, "restart"); err != nil { // systemd counts its restarts from here
		t.Fatal(err)
	}
	began := time.Now()
	if _, err := m.run("systemctl", "kill", "--signal=STOP", "tulle"); err != nil {
		t.Fatal(err)
	}
	if err := restarted(m, l, 1); err != nil {
		t.Errorf("the agent is stopped: %v\n%s", err, m.journal())
	}
	t.Logf("a stopped agent was back after %v", time.Since(began).Round(time.Millisecond))
	began = time.Now()
	if err := m.stopWorker(); err != nil {
		t.Fatal(err)
	}
	if err := restarted(m, l, 2); err != nil {
		t.Errorf("a worker is stopped: %v\n%s", err, m.journal())
	}
	t.Logf("an agent with a stopped worker was back after %v", time.Since(began).Round(time.Millisecond))
	if out := m.says(t, "no sign of life", 1, "no sign of life"); !strings.Contains(out, "reader of queue") && !strings.Contains(out, "receiver of") {
		t.Errorf("the journal does not name the worker:\n%s", out)
	}
	if err := m.slowWatchdog(); err != nil {
		t.Fatal(err)
	}
	if err := start(m, l, "restart"); err != nil {
		t.Fatal(err)
	}
}

// purge removes the package with everything that it has made, and says what.
func purge(t *testing.T, m *machine) {
	out, err := m.walk(t, "remove")
	for _, want := range []string{"removing tun0, routes and nftables tables", "purging /var/lib/tulle", "tulle forget " + m.host, "purging /etc/tulle"} {
		if err != nil || !strings.Contains(out, want) {
			t.Errorf("purge does not say %q: %v\n%s", want, err, out)
		}
	}
	out, err = m.run("sh", "-c", "ls -d /var/lib/tulle /etc/tulle /run/tulle /usr/bin/tulle /sys/class/net/tun0 2>/dev/null; ip route show table all proto 84; "+
		"systemctl cat tulle 2>/dev/null; true")
	if out = strings.TrimSpace(out); err != nil || out != "" {
		t.Errorf("a purge has left: %v\n%s", err, out)
	}
}

// restarted waits until systemd has restarted the service that often since it was last started by hand, and it runs.
func restarted(m *machine, l *lab.Lab, times int) error {
	err := m.until("a restart by systemd", time.Minute, func() error {
		out, err := m.run("systemctl", "show", "--property=NRestarts,ActiveState", "tulle")
		if err == nil && (!strings.Contains(out, fmt.Sprintf("NRestarts=%d\n", times)) || !strings.Contains(out, "ActiveState=active\n")) {
			err = errors.New(out)
		}
		return err
	})
	return errors.Join(err, active(m, l))
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
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
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
