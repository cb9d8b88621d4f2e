package nspawn

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/testing/debian"
	"github.com/tulle-net/tulle/internal/testing/namespace"
)

// What a host needs beside the package: podman within a container has no overlay file systems, no keyrings and no cgroups to give away. The
// unit of a single container, and the order of podman's own unit, are as docs/podman.md has them.
var podmanFiles = map[string]string{
	"etc/containers/storage.conf": "[storage]\ndriver = \"vfs\"\nrunroot = \"/run/containers/storage\"\ngraphroot = \"/var/lib/containers/storage\"\n",
	"etc/containers/containers.conf": "[containers]\ncgroups = \"disabled\"\nkeyring = false\n[engine]\ncgroup_manager = \"cgroupfs\"\n" +
		"events_logger = \"file\"\n",
	"etc/systemd/system/podman-restart.service.d/tulle.conf": "[Unit]\nAfter=tulle.service\n",
	// A service in the network namespace of a pod, as docs/operations.md has it.
	"etc/systemd/system/pod@.service": "[Unit]\nAfter=tulle.service\n\n[Service]\nType=oneshot\nRemainAfterExit=yes\n" +
		"ExecStart=/usr/bin/tulle pod add %i --new\nExecStop=/usr/bin/tulle pod del %i\n",
	"etc/systemd/system/alone.service": "[Unit]\nRequires=pod@" + alonePod + ".service\nAfter=pod@" + alonePod + ".service\n\n[Service]\n" +
		"NetworkNamespacePath=/run/netns/" + alonePod + "\nExecStart=/bin/sleep 600\n\n[Install]\nWantedBy=multi-user.target\n",
	// Installed when its image and its network are there: else podman would look for the image elsewhere.
	"root/web.container": "[Unit]\nAfter=tulle.service\n\n[Container]\nImage=localhost/box\nNetwork=pods\nExec=/bin/busybox sleep 600\n" +
		"PodmanArgs=--cgroups=disabled --stop-signal=KILL\n\n[Install]\nWantedBy=multi-user.target\n",
}

// alonePod is the pod of a service.
const alonePod = "alone"

// aloneBox is the service as a container.
func (m *machine) aloneBox(l *lab.Lab) (podmanBox, error) {
	b := podmanBox{name: m.host + "'s service"}
	pid, err := m.run("systemctl", "show", "--property=MainPID", "--value", "alone")
	if err != nil {
		return b, err
	}
	b.netns = fmt.Sprintf("/proc/%d/root/proc/%s/ns/net", m.leader, strings.TrimSpace(pid))
	c, err := l.Client(m.host)
	if err != nil {
		return b, err
	}
	pods, err := c.Pods(context.Background())
	for _, p := range pods {
		if p.Name == alonePod && p.State == api.PodUp && strings.TrimSpace(pid) != "0" {
			b.addrs = p.Addresses
			return b, nil
		}
	}
	return b, fmt.Errorf("%s, process %s, is not among the pods %+v: %w", b.name, pid, pods, err)
}

// podmanRuns starts the container "box" with fixed addresses of the host's own, in a network of this name.
func podmanRuns(m *machine, l *lab.Lab, network string) error {
	c, err := l.Client(m.host)
	if err != nil {
		return err
	}
	st, err := c.Status(context.Background())
	if err != nil {
		return err
	}
	args := []string{"run", "-d", "--name", "box", "--restart", "always", "--stop-signal", "KILL", "--network", network}
	for _, b := range st.Node.Blocks {
		raw := b.Prefix.Addr().AsSlice()
		raw[len(raw)-1] += 77
		a, _ := netip.AddrFromSlice(raw)
		args = append(args, map[bool]string{true: "--ip", false: "--ip6"}[a.Is4()], a.String())
	}
	if len(st.Node.Blocks) != 2 {
		return fmt.Errorf("%s: want a block of each family, got %+v", m.host, st.Node.Blocks)
	}
	if _, err := m.podman("import", "/root/box.tar", "box"); err != nil {
		return err
	}
	_, err = m.podman(append(args, "box", "/bin/busybox", "sleep", "600")...)
	return err
}

// podman runs the command line on the machine.
func (m *machine) podman(args ...string) (string, error) {
	out, err := m.run(append([]string{"env", "PODMAN_IGNORE_CGROUPSV1_WARNING=1", "podman"}, args...)...)
	return strings.TrimSpace(out), err
}

// podmanBox is a running container.
type podmanBox struct {
	name, netns string
	addrs       []netip.Addr // IPv4, then IPv6
}

// podmanBox finds a container, of which podman and the agent must say the same.
func (m *machine) podmanBox(l *lab.Lab, name, network string) (podmanBox, error) {
	b := podmanBox{name: m.host + "'s " + name}
	out, err := m.podman("inspect", name)
	if err != nil {
		return b, err
	}
	var list []struct {
		ID              string `json:"Id"`
		State           struct{ Pid int }
		NetworkSettings struct {
			Networks map[string]struct{ IPAddress, GlobalIPv6Address string }
		}
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil || len(list) != 1 || list[0].State.Pid == 0 {
		return b, fmt.Errorf("%s does not run: %w: %s", b.name, err, out)
	}
	b.netns = fmt.Sprintf("/proc/%d/root/proc/%d/ns/net", m.leader, list[0].State.Pid)
	n := list[0].NetworkSettings.Networks[network]
	for _, text := range []string{n.IPAddress, n.GlobalIPv6Address} {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return b, fmt.Errorf("%s: %w", b.name, err)
		}
		b.addrs = append(b.addrs, a)
	}
	c, err := l.Client(m.host)
	if err != nil {
		return b, err
	}
	pods, err := c.Pods(context.Background())
	if !slices.ContainsFunc(pods, func(p api.Pod) bool {
		return p.Network == network && p.State == api.PodUp && slices.Equal(p.Addresses, b.addrs) && strings.HasPrefix(list[0].ID, p.Container[:min(len(p.Container), 12)])
	}) {
		return b, fmt.Errorf("%s with %v is not among the pods %+v: %w", b.name, b.addrs, pods, err)
	}
	return b, nil
}

// TestPodmanHosts: podman 5 of Debian 13 with the plugin for netavark, and podman 4.3 of Debian 12 with the network that the agent publishes,
// on hosts that boot systemd and have nothing but the package, set up as docs/podman.md says. Containers with fixed addresses reach each
// other while the agent restarts, after their own restart, and after a reboot of all hosts that nobody lends a hand. So does
// the container of a unit, and a service in the network namespace of a pod.
func TestPodmanHosts(t *testing.T) {
	needTools(t)
	pkg, image := deb(t, "1.0.0"), box(t)
	l, err := lab.Up(t.Context(), lab.Options{Name: labName("podman"), Bare: true, Nodes: 2, Subnets: 2, Pods: -1, Replace: true}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
	})
	ms := machines(t, l, debian.Tree(t, "trixie"), debian.Tree(t, "bookworm"))
	networks := []string{"pods", "tulle"}
	each(t, ms, func(m *machine) error {
		m.apart = true // podman makes namespaces, too
		conf := config(l)
		if m == ms[1] {
			conf += "cni_dir: /etc/cni/net.d\ncni_bin_dir: /usr/lib/cni\n"
		}
		return errors.Join(preparePodman(m, conf, pkg, image), m.boot(), m.install(pkg), start(m, l, "start"))
	})
	podmanNetworks(t, ms[0])
	podmanRootless(t, ms)
	each(t, ms, func(m *machine) error { return podmanRuns(m, l, networks[slices.Index(ms, m)]) })
	each(t, ms, func(m *machine) error { _, err := m.run("systemctl", "enable", "--now", "podman-restart"); return err })
	if _, err := ms[0].run("sh", "-ec", "install -D -m 644 /root/web.container /etc/containers/systemd/web.container; systemctl daemon-reload; systemctl start web; systemctl enable --now alone"); err != nil {
		t.Fatal(err)
	}

	fixed := podmenMeet(t, l, ms, networks, "after the start")
	each(t, ms, func(m *machine) error { return start(m, l, "restart") })
	podmenMeet(t, l, ms, networks, "after a restart of the agents")
	each(t, ms, func(m *machine) error { _, err := m.podman("restart", "-t", "0", "box"); return err })
	podmenMeet(t, l, ms, networks, "after a restart of the containers")
	each(t, ms, (*machine).poweroff)
	each(t, ms, func(m *machine) error { return l.ResetHost(t.Context(), m.host) })
	each(t, ms, (*machine).boot)
	each(t, ms, func(m *machine) error { return active(m, l) })
	if again := podmenMeet(t, l, ms, networks, "after a reboot of all hosts"); !slices.Equal(again, fixed) {
		t.Errorf("the containers had %v, have %v after a reboot", fixed, again)
	}
}

// preparePodman puts on a host's disk what it needs.
func preparePodman(m *machine, conf, pkg, image string) error {
	errs := []error{prepare(m, conf, pkg), os.MkdirAll(filepath.Join(m.root, "etc/cni/net.d"), 0o755)}
	layer, err := os.ReadFile(image)
	errs = append(errs, err, os.WriteFile(filepath.Join(m.root, "root/box.tar"), layer, 0o644))
	for name, data := range podmanFiles {
		path := filepath.Join(m.root, name)
		errs = append(errs, os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(data), 0o644))
	}
	configFile := filepath.Join(m.root, "etc/tulle/tulle.yaml")
	errs = append(errs, os.MkdirAll(filepath.Dir(configFile), 0o755), os.WriteFile(configFile, []byte(conf), 0o644))
	return errors.Join(errs...)
}

// podmanNetworks makes, lists, describes and removes networks.
func podmanNetworks(t *testing.T, m *machine) {
	t.Helper()
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"create", "-d", "tulle", "pods"}, "pods"},
		{[]string{"create", "-d", "tulle", "-o", "bridge=shared", "other"}, "other"},
		{[]string{"ls", "--format", "{{.Name}} {{.Driver}}", "--filter", "driver=tulle"}, "other tulle\npods tulle"},
		{[]string{"inspect", "-f", "{{.Driver}} {{.DNSEnabled}} {{.Options}} {{.IPAMOptions}}", "other"}, "tulle false map[bridge:shared] map[driver:none]"},
		{[]string{"rm", "other"}, "other"},
		{[]string{"ls", "--format", "{{.Name}}", "--filter", "driver=tulle"}, "pods"},
	} {
		if out, err := m.podman(append([]string{"network"}, c.args...)...); err != nil || out != c.want {
			t.Errorf("podman network %v: %q, %v, want %q", c.args, out, err, c.want)
		}
	}
}

// podmanRootless: podman of an ordinary user is told why it cannot use the driver; that of Debian 12 does not see the network.
func podmanRootless(t *testing.T, ms []*machine) {
	t.Helper()
	for i, c := range []struct{ args, why string }{
		{"network create -d tulle pods", "podman of user 1000 is rootless"},
		{"network inspect tulle", "network not found"},
	} {
		_, err := ms[i].run("sh", "-ec", `useradd -m -u 1000 joe; sed -i /joe/d /etc/subuid /etc/subgid # one ID is enough, and needs no further program
			mkdir -m 700 /run/joe; chown joe /run/joe; cd /
			exec setpriv --reuid joe --regid joe --init-groups env HOME=/home/joe XDG_RUNTIME_DIR=/run/joe podman --storage-driver vfs `+c.args)
		if err == nil || !strings.Contains(err.Error(), c.why) {
			t.Errorf("%s: rootless podman %s: %v, want an error with %q", ms[i].host, c.args, err, c.why)
		}
	}
}

// podmenMeet waits until the containers run, connects each to each, and returns the addresses of those that have fixed ones.
func podmenMeet(t *testing.T, l *lab.Lab, ms []*machine, networks []string, when string) (fixed []netip.Addr) {
	t.Helper()
	boxes := make([]podmanBox, 4)
	for i, want := range []struct {
		m             *machine
		name, network string
	}{{ms[0], "box", networks[0]}, {ms[1], "box", networks[1]}, {ms[0], "systemd-web", networks[0]}} {
		err := want.m.until(want.name+" "+when, time.Minute, func() (err error) {
			boxes[i], err = want.m.podmanBox(l, want.name, want.network)
			return err
		})
		if err != nil {
			out, _ := want.m.run("journalctl", "--no-pager", "--lines=60", "--output=short-precise")
			t.Fatalf("%v\n%s", err, out)
		}
		if want.name == "box" {
			fixed = append(fixed, boxes[i].addrs...)
		}
	}
	err := ms[0].until("the service "+when, time.Minute, func() (err error) { boxes[3], err = ms[0].aloneBox(l); return err })
	if err != nil {
		t.Fatal(err)
	}
	for _, from := range boxes {
		for _, to := range boxes {
			for i, a := range to.addrs {
				err := ms[0].until(from.name+" to "+to.name+" "+when, time.Minute, func() error {
					seen, err := namespace.SeenAs(from.netns, to.netns, a)
					if err == nil && seen != from.addrs[i] {
						err = fmt.Errorf("seen as %v, want %v", seen, from.addrs[i])
					}
					return err
				})
				if err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	return fixed
}
