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
	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/internal/testing/debian"
	"github.com/tulle-net/tulle/internal/testing/testbuild"
)

// podmanHost is a host of the lab on which podman of some Debian release runs: in the host's network namespace, with that release's
// files and mounts of its own.
type podmanHost struct {
	t    *testing.T
	h    lab.Host
	held *exec.Cmd // keeps the mounts
}

// enter makes the mounts of a podman host: its disk $1, where its agent's socket $2, the plugin $3, the CNI networks $4 and the image $5
// are found in the places that podman and the plugin look at by default. cgroups are not used.
const enter = `cd "$1"
mount --make-rprivate /
mount --rbind /proc proc; mount --rbind /sys sys; mount --rbind /dev dev; mount -t tmpfs run run; mount -t tmpfs tmp tmp
umount sys/fs/cgroup/unified 2>/dev/null || : # crun takes either version of cgroups, not both
mkdir -p run/tulle "./$2" run/lock usr/lib/netavark opt/cni/bin etc/cni/net.d
touch opt/cni/bin/tulle-cni tmp/box.tar
mount --bind "$2" run/tulle; mount --bind "$2" "./$2"; # the published network names the socket's own path
mount --bind "$3" opt/cni/bin/tulle-cni; mount --bind "$4" etc/cni/net.d; mount --bind "$5" tmp/box.tar
ln -sf /opt/cni/bin/tulle-cni usr/lib/netavark/tulle
printf '[storage]\ndriver = "vfs"\nrunroot = "/run/containers/storage"\ngraphroot = "/var/lib/containers/storage"\n' >etc/containers/storage.conf
printf '[containers]\ncgroups = "disabled"\ndefault_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]\n[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n' >etc/containers/containers.conf
pivot_root . mnt # after chroot, crun would enter the wrong mounts
exec chroot . sh -ec 'umount -l /mnt; echo ready; exec sleep infinity'`

// newPodman makes a podman host over a tree, with an image "box".
func newPodman(t *testing.T, h lab.Host, tree, plugin, networks, image string) *podmanHost {
	t.Helper()
	dir, err := os.MkdirTemp("", "pdm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	p := &podmanHost{t: t, h: h}
	root := debian.Overlay(t, tree, dir)
	p.held = exec.Command("nsenter", "--net="+h.Netns, "unshare", "-m", "sh", "-ec", enter, "sh", root, filepath.Dir(h.Socket), plugin, networks, image)
	p.held.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	p.held.Stderr = os.Stderr
	out, err := p.held.StdoutPipe()
	if err == nil {
		err = p.held.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := p.try("rm", "-f", "-a", "-t", "0"); err != nil {
			t.Error(err)
		}
		_ = p.held.Process.Kill()
		_ = p.held.Wait()
	})
	if _, err := out.Read(make([]byte, 8)); err != nil {
		t.Fatalf("the mounts of podman on %s: %v", h.Name, err)
	}
	p.do("import", "--change", "ENV PATH=/bin", "/tmp/box.tar", "box")
	return p
}

// try runs podman, which never waits for long, and returns what it says with its warnings.
func (p *podmanHost) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	defer cancel()
	c := exec.CommandContext(ctx, "nsenter", append([]string{"-t", fmt.Sprint(p.held.Process.Pid), "--mount", "--net", "podman"}, args...)...)
	c.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "PODMAN_IGNORE_CGROUPSV1_WARNING=1"}
	out, err := c.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("podman %v on %s: %w: %s", args, p.h.Name, err, out)
	}
	return string(bytes.TrimSpace(out)), nil
}

func (p *podmanHost) do(args ...string) string {
	p.t.Helper()
	out, err := p.try(args...)
	if err != nil {
		p.t.Fatal(err)
	}
	return out
}

// refused runs a command that must fail and say why.
func (p *podmanHost) refused(why string, args ...string) {
	p.t.Helper()
	if out, err := p.try(args...); err == nil || !strings.Contains(err.Error(), why) {
		p.t.Errorf("podman %v: %q, %v; want an error with %q", args, out, err, why)
	}
}

// run starts a container that sleeps.
func (p *podmanHost) run(name, network string, options ...string) string {
	p.t.Helper()
	return p.do(append(append([]string{"run", "-d", "--stop-signal", "KILL", "--cap-add", "NET_RAW", "--name", name, "--network", network}, options...), "box", "sleep", "600")...)
}

// container is what podman says of one: its network namespace, addresses, and MAC address. The agent must say the same.
func (p *podmanHost) container(name, network string) (netns string, addrs []netip.Addr, mac string) {
	p.t.Helper()
	var list []struct {
		ID              string `json:"Id"`
		State           struct{ Pid int }
		NetworkSettings struct {
			Networks map[string]struct{ IPAddress, GlobalIPv6Address, MacAddress string }
		}
	}
	if err := json.Unmarshal([]byte(p.do("inspect", name)), &list); err != nil || len(list) != 1 {
		p.t.Fatal(err, list)
	}
	n := list[0].NetworkSettings.Networks[network]
	for _, text := range []string{n.IPAddress, n.GlobalIPv6Address} {
		if a, err := netip.ParseAddr(text); err == nil {
			addrs = append(addrs, a)
		}
	}
	for _, pod := range p.pods() {
		if pod.State == api.PodUp && pod.Network == network && strings.HasPrefix(list[0].ID, pod.Container) && slices.Equal(pod.Addresses, addrs) && len(addrs) == 2 {
			return fmt.Sprintf("/proc/%d/ns/net", list[0].State.Pid), addrs, n.MacAddress
		}
	}
	p.t.Fatalf("%s is not among the pods with %v: %+v", name, addrs, p.pods())
	return "", nil, ""
}

// pods are those on this host.
func (p *podmanHost) pods() []api.Pod {
	p.t.Helper()
	pods, err := api.NewClient(p.h.Socket).Pods(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	return pods
}

// TestPodman: two hosts with a real podman each, of Debian 13 (version 5, whose netavark calls the plugin) and of Debian 12 (version 4.3,
// which finds the network that the agent publishes for CNI). Containers on both reach each other under their own addresses.
func TestPodman(t *testing.T) {
	t.Parallel()
	needRoot(t)
	if testing.Short() {
		t.Skip("makes trees of two Debian releases")
	}
	plugin, image := filepath.Join(t.TempDir(), "tulle-cni"), filepath.Join(t.TempDir(), "box.tar")
	err := errors.Join(testbuild.Command("tulle-cni", plugin, []string{"CGO_ENABLED=0"}), os.WriteFile(image, boxLayer(t), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		suite, network string
		special        func(*testing.T, *lab.Lab, *podmanHost)
	}{
		{"trixie", "pods", netavarkAlone},
		{"bookworm", "tulle", nil},
	} {
		t.Run(c.suite, func(t *testing.T) {
			t.Parallel()
			tree := debian.Tree(t, c.suite)
			l := up(t, "pdm"+c.suite[:1], lab.Options{Nodes: 2, Subnets: 2, Pods: -1, ClusterCIDRs: dualCIDRs})
			var p []*podmanHost
			for _, h := range l.Hosts() {
				networks := t.TempDir()
				if c.network == "tulle" {
					if err := errors.Join(l.StopAgent(t.Context(), h.Name, syscall.SIGTERM), l.StartAgent(t.Context(), h.Name, "--cni-dir", networks)); err != nil {
						t.Fatal(err)
					}
				}
				p = append(p, newPodman(t, h, tree, plugin, networks, image))
			}
			settled(t, l)
			if c.network == "pods" {
				for _, p := range p {
					p.do("network", "create", "-d", "tulle", c.network)
				}
			}
			twoPodmen(t, p, c.network)
			if c.special != nil {
				c.special(t, l, p[1])
			}
			podmanWithoutAgent(t, l, p[1], c.network)
		})
	}
}

// twoPodmen: a container on each host, one of them with fixed addresses that it keeps when it is restarted, and when its network is made again.
func twoPodmen(t *testing.T, p []*podmanHost, network string) {
	t.Helper()
	fixed := fixedAddrs(t, p[1].h.Socket)
	const mac = "02:00:00:aa:bb:01"
	p[0].run("box", network)
	p[1].run("box", network, "--ip", fixed[0].String(), "--ip6", fixed[1].String(), "--mac-address", mac)
	_, had, _ := p[0].container("box", network)
	p[0].do("network", "reload", "box")
	from, own, _ := p[0].container("box", network)
	if !slices.Equal(own, had) {
		t.Errorf("a container with any addresses had %v, has %v after podman network reload", had, own)
	}
	for _, then := range [][]string{{"restart", "-t", "0", "box"}, {"network", "reload", "box"}, {"stop", "-t", "0", "box"}} {
		at, far, has := p[1].container("box", network)
		if !slices.Equal(far, fixed) || has != mac {
			t.Errorf("addresses %v, %s, want %v, %s", far, has, fixed, mac)
		}
		for i, a := range far {
			var seen netip.Addr
			until(t, "the container reaches "+a.String(), func() (err error) { seen, err = seenAs(from, at, a); return err })
			if seen != own[i] {
				t.Errorf("%v sees %v as %v", a, own[i], seen)
			}
		}
		p[0].do("exec", "box", "ping", "-c1", "-W5", far[0].String())
		p[1].do(then...)
	}
	p[1].refused(fixed[0].String(), "run", "--network", network, "--ip", fixed[0].String(), "box", "true")
	p[1].do("rm", "-f", "-a", "-t", "0")
	if left := p[1].pods(); len(left) != 0 {
		t.Errorf("no container is left, and these pods: %+v", left)
	}
}

// netavarkAlone is what only the plugin of netavark has: what `podman network create` must refuse, several networks but one
// for a container, and a warning that no port is published.
func netavarkAlone(t *testing.T, _ *lab.Lab, p *podmanHost) {
	t.Helper()
	create := []string{"network", "create", "-d", "tulle"}
	p.refused("--subnet 192.0.2.0/24", append(create, "--subnet", "192.0.2.0/24", "other")...)
	p.refused("--internal", append(create, "--internal", "other")...)
	p.refused("--opt mtu=9000", append(create, "-o", "mtu=9000", "other")...)
	p.do(append(create, "-o", "socket=/run/tulle/tulle.sock", "later")...)
	if out := p.run("first", "pods", "-p", "8080:80"); !strings.Contains(out, "publishes no ports") {
		t.Errorf("podman run -p says %q", out)
	}
	p.refused("already", "run", "--network", "pods", "--network", "later", "box", "true")
	p.container("first", "pods")
	p.run("second", "later")
	p.container("second", "later")
	netavarkBridge(t, p, create)
	p.do("rm", "-f", "-a", "-t", "0")
}

// netavarkBridge: containers of a network with a bridge are ports of it, and reach each other and those of other networks under their own
// addresses. A name that is none is refused with the network, somebody else's device with the container, of which nothing is left.
func netavarkBridge(t *testing.T, p *podmanHost, create []string) {
	t.Helper()
	p.refused("1 to 15 bytes", append(create, "-o", "bridge=a b", "other")...)
	p.do(append(create, "-o", "bridge=shared", "behind")...)
	p.do(append(create, "-o", "bridge=tun0", "taken")...)
	before := len(p.pods())
	p.refused("tun0 is a device of somebody else", "run", "--network", "taken", "box", "true")
	if after := p.pods(); len(after) != before {
		t.Errorf("a refused container has left one of %+v", after)
	}
	p.run("left", "behind")
	p.run("right", "behind")
	ns, own, _ := p.container("left", "behind")
	for name, network := range map[string]string{"right": "behind", "first": "pods"} {
		at, addrs, _ := p.container(name, network)
		for i, a := range addrs {
			if seen, err := seenAs(ns, at, a); err != nil || seen != own[i] {
				t.Errorf("%s at %v sees left as %v (%v), want %v", name, a, seen, err, own[i])
			}
		}
	}
	if n := ports(t, p.h, "shared"); n != 2 {
		t.Errorf("the bridge has %d ports, want those of two containers", n)
	}
}

// ports counts the ports of a host's bridge.
func ports(t *testing.T, h lab.Host, bridge string) (n int) {
	t.Helper()
	nl, err := sys.OpenNetlink(h.Netns)
	if err != nil {
		t.Fatal(err)
	}
	defer nl.Close()
	b, err := nl.LinkByName(bridge)
	if err != nil || b.Type() != "bridge" {
		t.Fatalf("the bridge %s is %v, %v", bridge, b, err)
	}
	links, err := nl.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if l.Attrs().MasterIndex == b.Attrs().Index {
			n++
		}
	}
	return n
}

// podmanWithoutAgent: an error and no hang; containers can be removed, and the agent honours it when it is back.
func podmanWithoutAgent(t *testing.T, l *lab.Lab, p *podmanHost, network string) {
	t.Helper()
	p.run("old", network)
	if err := l.StopAgent(t.Context(), p.h.Name, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	p.refused("no agent listens", "run", "--network", network, "box", "true")
	p.do("rm", "-f", "-a", "-t", "0")
	if err := l.StartAgent(t.Context(), p.h.Name); err != nil {
		t.Fatal(err)
	}
	until(t, "the agent frees the addresses", func() error {
		pods, err := api.NewClient(p.h.Socket).Pods(t.Context())
		if err == nil && len(pods) > 0 {
			err = fmt.Errorf("%+v", pods)
		}
		return err
	})
}
