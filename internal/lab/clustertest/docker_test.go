package clustertest

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/testing/dockerd"
)

// dockerHost is a host with a real Docker engine, which finds the agent's driver.
type dockerHost struct {
	*dockerd.Engine
	t *testing.T
	h lab.Host
}

// newDocker starts the host's agent again with a driver's socket, and a Docker engine in the host's network namespace.
func newDocker(t *testing.T, l *lab.Lab, h lab.Host, image string) *dockerHost {
	t.Helper()
	d := &dockerHost{dockerd.New(t, h.Netns), t, h}
	if err := errors.Join(l.StopAgent(t.Context(), h.Name, syscall.SIGTERM), d.startAgent(l)); err != nil {
		t.Fatal(err)
	}
	d.Start()
	d.Await()
	d.Do("import", "--change", "ENV PATH=/bin", image, "box")
	return d
}

func (d *dockerHost) startAgent(l *lab.Lab) error {
	return l.StartAgent(d.t.Context(), d.h.Name, "--docker-socket", filepath.Join(d.Plugins, "tulle.sock"), "--docker-api", d.Socket)
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
	if err := json.Unmarshal([]byte(d.Do("inspect", name)), &list); err != nil || len(list) != 1 {
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
		d.Do(append(create, "--ipv6", "--subnet", dualCIDRs[0].String(), "--subnet", dualCIDRs[1].String(), "both")...)
	}
	fixed := fixedAddrs(t, d[1].h.Socket)
	for name, restart := range map[string]string{"box": "always", "kept": "unless-stopped", "stopped": "unless-stopped", "once": "no"} {
		d[0].Do("run", "-d", "--stop-signal", "KILL", "--name", name, "--restart", restart, "--network", "both", "box", "/bin/sleep", "600")
	}
	d[0].Do("stop", "stopped")
	d[1].Do("run", "-d", "--stop-signal", "KILL", "--name", "box", "--network", "both", "--ip", fixed[0].String(), "--ip6", fixed[1].String(), "box", "/bin/sleep", "600")
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
	stoppedAlone(t, l, d[1], fixed)
	ns, far = d[1].container("box", "both")
	meet(t, d[0], "box", ns, far)
	// The look that has started the others is long over.
	if names := strings.Fields(d[0].Do("ps", "--format", "{{.Names}}")); len(names) != 2 {
		t.Errorf("running are %v, want box and kept only", names)
	}
}

// secondHost restarts a container that has fixed addresses, makes one in another network, and tries what must be refused.
func secondHost(t *testing.T, d *dockerHost, fixed []netip.Addr, create []string) {
	t.Helper()
	run := []string{"run", "-d", "--stop-signal", "KILL", "--network"}
	d.Do("restart", "-t", "0", "box")
	d.Do(append(create, "plain")...)
	for _, name := range []string{"four", "short"} {
		d.Do(append(run, "plain", "--name", name, "box", "/bin/sleep", "600")...)
	}
	d.Refused(fixed[0].String(), append(run, "both", "--ip", fixed[0].String(), "box", "/bin/true")...)
	d.Refused("already", "network", "connect", "both", "four") // and wanted by the engine from then on: four is not started again
	d.Refused("--subnet 192.0.2.0/24", append(create, "--subnet", "192.0.2.0/24", "other")...)
	d.Refused("--ipam-driver tulle", "network", "create", "-d", "tulle", "--subnet", "192.0.2.0/24", "other")
	d.Do("rm", "-f", "short")
	if pods, err := api.NewClient(d.h.Socket).Pods(t.Context()); err != nil || len(pods) != 2 {
		t.Errorf("two containers are left, and these pods: %+v (%v)", pods, err)
	}
}

// stoppedAlone stops a container of a host while its agent is dead. With the agent back, it can be started with its fixed addresses.
func stoppedAlone(t *testing.T, l *lab.Lab, d *dockerHost, fixed []netip.Addr) {
	t.Helper()
	if err := l.StopAgent(t.Context(), d.h.Name, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	var kill sync.WaitGroup
	kill.Go(func() { _, _ = d.Try("kill", "box") }) // which waits for the agent
	defer kill.Wait()
	untilWithin(t, 3*patience, "the engine gives up to delete the endpoint", func() error {
		log, err := os.ReadFile(d.Log)
		if err == nil && !strings.Contains(string(log), "tulle.sock/IpamDriver.ReleaseAddress") {
			err = errors.New("it tries")
		}
		return err
	})
	if err := d.startAgent(l); err != nil {
		t.Fatal(err)
	}
	if err := l.WaitReady(t.Context(), d.h.Name); err != nil {
		t.Fatal(err)
	}
	d.Do("start", "box")
	if _, addrs := d.container("box", "both"); !slices.Equal(addrs, fixed) {
		t.Errorf("addresses %v, want %v", addrs, fixed)
	}
}

// withoutAgent starts the engine again while the agent is dead: an error, no hang. With the agent back, the containers start that
// would have started with the engine, and no others.
func withoutAgent(t *testing.T, l *lab.Lab, d *dockerHost, meanwhile func()) {
	t.Helper()
	d.Stop()
	if err := l.StopAgent(t.Context(), d.h.Name, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	d.Start()
	meanwhile()
	d.Await()
	for _, name := range []string{"box", "kept"} {
		if state := d.Do("inspect", "-f", "{{.State.Running}} {{.State.Error}}", name); !strings.HasPrefix(state, "false ") || len(state) < 10 {
			t.Errorf("without an agent the container %s is %q", name, state)
		}
	}
	if err := d.startAgent(l); err != nil {
		t.Fatal(err)
	}
	untilWithin(t, 2*patience, "the containers start", func() error {
		if names := d.Do("ps", "--format", "{{.Names}}"); !strings.Contains(names, "box") || !strings.Contains(names, "kept") {
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
