package clustertest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/lab"
)

// dockerHost is a host with a real Docker engine, which finds the agent's driver.
type dockerHost struct {
	t      *testing.T
	h      lab.Host
	dir    string
	daemon *exec.Cmd
}

// newDocker starts the host's agent again with a driver's socket, and a Docker engine in the host's network namespace.
func newDocker(t *testing.T, l *lab.Lab, h lab.Host, image string) *dockerHost {
	t.Helper()
	dir, err := os.MkdirTemp("", "dkr") // short: the engine's sockets are in it
	if err != nil {
		t.Fatal(err)
	}
	d := &dockerHost{t: t, h: h, dir: dir}
	if err := errors.Join(os.Mkdir(d.plugins(), 0o755), os.MkdirAll("/run/docker/plugins", 0o755), l.StopAgent(t.Context(), h.Name, syscall.SIGTERM), d.startAgent(l)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.stop()
		if b, err := os.ReadFile(filepath.Join(dir, "log")); err == nil && t.Failed() {
			t.Logf("the log of Docker on %s:\n%s", h.Name, b[max(0, len(b)-8000):])
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	d.launch()
	d.await()
	d.do("import", "--change", "ENV PATH=/bin", image, "box")
	return d
}

func (d *dockerHost) plugins() string { return filepath.Join(d.dir, "p") }

func (d *dockerHost) startAgent(l *lab.Lab) error {
	return l.StartAgent(d.t.Context(), d.h.Name, "--docker-socket", filepath.Join(d.plugins(), "tulle.sock"),
		"--docker-api", filepath.Join(d.dir, "s"))
}

// launch starts the engine, with mounts of its own.
func (d *dockerHost) launch() {
	d.t.Helper()
	log, err := os.OpenFile(filepath.Join(d.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		d.t.Fatal(err)
	}
	defer log.Close()
	in := func(name string) string { return filepath.Join(d.dir, name) }
	d.daemon = exec.Command("nsenter", "--net="+d.h.Netns, "unshare", "-m", "sh", "-c", `mount --bind "$1" /run/docker/plugins && shift && exec "$@"`, "sh", d.plugins(),
		"dockerd", "--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=vfs", "--data-root", in("d"), "--exec-root", in("x"),
		"--pidfile", in("pid"), "-H", "unix://"+in("s"))
	d.daemon.Stdout, d.daemon.Stderr = log, log
	if err := d.daemon.Start(); err != nil {
		d.t.Fatal(err)
	}
}

func (d *dockerHost) await() {
	d.t.Helper()
	untilWithin(d.t, 2*patience, "Docker answers", func() error { _, err := d.try("version"); return err })
}

// stop stops the engine, and with it the containers.
func (d *dockerHost) stop() {
	if d.daemon != nil {
		_ = d.daemon.Process.Signal(syscall.SIGTERM)
		_ = d.daemon.Wait()
		d.daemon = nil
	}
}

// try runs the command line, which never waits for long.
func (d *dockerHost) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, "docker", append([]string{"-H", "unix://" + filepath.Join(d.dir, "s")}, args...)...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("docker %v on %s: %w: %s", args, d.h.Name, err, out)
	}
	return string(bytes.TrimSpace(out)), nil
}

func (d *dockerHost) do(args ...string) string {
	d.t.Helper()
	out, err := d.try(args...)
	if err != nil {
		d.t.Fatal(err)
	}
	return out
}

// refused runs a command that must fail and say why.
func (d *dockerHost) refused(why string, args ...string) {
	d.t.Helper()
	if out, err := d.try(args...); err == nil || !strings.Contains(err.Error(), why) {
		d.t.Errorf("docker %v: %q, %v; want an error with %q", args, out, err, why)
	}
}

// container is what the engine says of one, with its addresses.
func (d *dockerHost) container(name, network string) (netns string, addrs []netip.Addr) {
	d.t.Helper()
	var list []struct {
		State           struct{ Pid int }
		NetworkSettings struct {
			Networks map[string]struct{ NetworkID, EndpointID, IPAddress, GlobalIPv6Address string }
		}
	}
	if err := json.Unmarshal([]byte(d.do("inspect", name)), &list); err != nil || len(list) != 1 {
		d.t.Fatal(err, list)
	}
	n := list[0].NetworkSettings.Networks[network]
	for _, text := range []string{n.IPAddress, n.GlobalIPv6Address} {
		if a, err := netip.ParseAddr(text); err == nil {
			addrs = append(addrs, a)
		}
	}
	pods, err := api.NewClient(d.h.Socket).Pods(d.t.Context())
	if err != nil || !slices.ContainsFunc(pods, func(p api.Pod) bool {
		return p.Engine == api.EngineDocker && p.State == api.PodUp && strings.HasPrefix(n.NetworkID, p.Network) && strings.HasPrefix(n.EndpointID, p.Container) &&
			len(addrs) > 0 && !slices.ContainsFunc(addrs, func(a netip.Addr) bool { return !slices.Contains(p.Addresses, a) })
	}) {
		d.t.Fatalf("%s is not among the pods with %v: %+v (%v)", name, addrs, pods, err)
	}
	return fmt.Sprintf("/proc/%d/ns/net", list[0].State.Pid), addrs
}

// TestDocker: two hosts, each with a Docker engine. Containers in networks of the driver reach each other under their own
// addresses, keep fixed ones when they are restarted, and come back by themselves after the engine was started while the agent was dead.
func TestDocker(t *testing.T) {
	t.Parallel()
	l := up(t, "dkr", lab.Options{Nodes: 2, Subnets: 2, Pods: -1, ClusterCIDRs: dualCIDRs})
	image := filepath.Join(t.TempDir(), "box.tar")
	if err := os.WriteFile(image, boxLayer(t), 0o600); err != nil {
		t.Fatal(err)
	}
	var d []*dockerHost
	for _, h := range l.Hosts() {
		d = append(d, newDocker(t, l, h, image))
	}
	settled(t, l)
	create := []string{"network", "create", "-d", "tulle", "--ipam-driver", "tulle"}
	for _, d := range d {
		d.do(append(create, "--ipv6", "--subnet", dualCIDRs[0].String(), "--subnet", dualCIDRs[1].String(), "both")...)
	}
	fixed := fixedAddrs(t, d[1].h.Socket)
	for name, restart := range map[string]string{"box": "always", "kept": "unless-stopped", "stopped": "unless-stopped", "once": "no"} {
		d[0].do("run", "-d", "--stop-signal", "KILL", "--name", name, "--restart", restart, "--network", "both", "box", "/bin/sleep", "600")
	}
	d[0].do("stop", "stopped")
	d[1].do("run", "-d", "--stop-signal", "KILL", "--name", "box", "--network", "both", "--ip", fixed[0].String(), "--ip6", fixed[1].String(), "box", "/bin/sleep", "600")
	ns, far := d[1].container("box", "both")
	meet(t, d[0], "box", ns, far)

	// Docker repeats calls for half a minute before it gives up: the other host's part is done meanwhile.
	withoutAgent(t, l, d[0], func() { secondHost(t, d[1], fixed, create) })
	ns, far = d[1].container("box", "both")
	if !slices.Equal(far, fixed) {
		t.Errorf("addresses %v, want %v", far, fixed)
	}
	meet(t, d[0], "box", ns, far)
	meet(t, d[0], "kept", ns, far)
	ns, far = d[1].container("four", "plain")
	meet(t, d[0], "box", ns, far)
	// The look that has started the others is long over.
	if names := strings.Fields(d[0].do("ps", "--format", "{{.Names}}")); len(names) != 2 {
		t.Errorf("running are %v, want box and kept only", names)
	}
}

// secondHost restarts a container that has fixed addresses, makes one in another network, and tries what must be refused.
func secondHost(t *testing.T, d *dockerHost, fixed []netip.Addr, create []string) {
	t.Helper()
	run := []string{"run", "-d", "--stop-signal", "KILL", "--network"}
	d.do("restart", "-t", "0", "box")
	d.do(append(create, "plain")...)
	for _, name := range []string{"four", "short"} {
		d.do(append(run, "plain", "--name", name, "box", "/bin/sleep", "600")...)
	}
	d.refused(fixed[0].String(), append(run, "both", "--ip", fixed[0].String(), "box", "/bin/true")...)
	d.refused("already", "network", "connect", "plain", "box")
	d.refused("--subnet 192.0.2.0/24", append(create, "--subnet", "192.0.2.0/24", "other")...)
	d.refused("--ipam-driver tulle", "network", "create", "-d", "tulle", "--subnet", "192.0.2.0/24", "other")
	d.do("rm", "-f", "short")
	if pods, err := api.NewClient(d.h.Socket).Pods(t.Context()); err != nil || len(pods) != 2 {
		t.Errorf("two containers are left, and these pods: %+v (%v)", pods, err)
	}
}

// withoutAgent starts the engine again while the agent is dead: an error, no hang. With the agent back, the containers start that
// would have started with the engine, and no others.
func withoutAgent(t *testing.T, l *lab.Lab, d *dockerHost, meanwhile func()) {
	t.Helper()
	d.stop()
	if err := l.StopAgent(t.Context(), d.h.Name, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	d.launch()
	meanwhile()
	d.await()
	for _, name := range []string{"box", "kept"} {
		if state := d.do("inspect", "-f", "{{.State.Running}} {{.State.Error}}", name); !strings.HasPrefix(state, "false ") || len(state) < 10 {
			t.Errorf("without an agent the container %s is %q", name, state)
		}
	}
	if err := d.startAgent(l); err != nil {
		t.Fatal(err)
	}
	untilWithin(t, 2*patience, "the containers start", func() error {
		if names := d.do("ps", "--format", "{{.Names}}"); !strings.Contains(names, "box") || !strings.Contains(names, "kept") {
			return fmt.Errorf("running are %q", names)
		}
		return nil
	})
}

// meet connects from a container of the host to another one, which must see it under its own address.
func meet(t *testing.T, d *dockerHost, name, at string, to []netip.Addr) {
	t.Helper()
	from, own := d.container(name, "both")
	for i, a := range to {
		var seen netip.Addr
		until(t, "the container reaches "+a.String(), func() (err error) { seen, err = seenAs(from, at, a); return err })
		if seen != own[i] {
			t.Errorf("%v sees %v as %v", a, own[i], seen)
		}
	}
}

// fixedAddrs are free addresses of the host's own blocks, one of each family.
func fixedAddrs(t *testing.T, socket string) []netip.Addr {
	t.Helper()
	space, err := api.NewClient(socket).IPAM(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	out := make([]netip.Addr, 2)
	for _, b := range space.Blocks {
		raw := b.Prefix.Addr().AsSlice()
		raw[len(raw)-1] += 77
		a, _ := netip.AddrFromSlice(raw)
		if a.Is4() {
			out[0] = a
		} else {
			out[1] = a
		}
	}
	return out
}
