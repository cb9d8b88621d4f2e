package clustertest

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/internal/testing/namespace"
	"github.com/tulle-net/tulle/internal/testing/testbuild"
)

// machine is a host with a real containerd.
type machine struct {
	t                 *testing.T
	h                 lab.Host
	dir               string
	networks, plugins string // what it finds in /etc/cni/net.d and /opt/cni/bin
}

const boxImage = "localhost/box:latest"

// newMachine starts containerd without the interface for Kubernetes, with an image.
func newMachine(t *testing.T, h lab.Host, plugins, networks, image string) *machine {
	t.Helper()
	m := startContainerd(t, h, plugins, networks, `disabled_plugins = ["io.containerd.grpc.v1.cri"]`)
	if err := m.ctr("image", "import", "--snapshotter", "native", image); err != nil {
		t.Fatal(err)
	}
	return m
}

// startContainerd starts containerd in the host's network namespace, with these lines first in its configuration. The host's agent publishes
// its network in networks.
func startContainerd(t *testing.T, h lab.Host, plugins, networks, config string) *machine {
	t.Helper()
	// A socket's path has 107 bytes at most, and containerd adds its own to this one.
	dir, err := os.MkdirTemp("", "ctd")
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{t: t, h: h, dir: dir, networks: networks, plugins: plugins}
	for _, at := range []string{"/etc/cni/net.d", "/opt/cni/bin"} {
		if err := os.MkdirAll(at, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	conf := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\n%s\n[grpc]\n  address = %q\n",
		filepath.Join(dir, "root"), filepath.Join(dir, "state"), config, m.socket())
	if err := os.WriteFile(filepath.Join(dir, "config.toml"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	daemon := m.command(log, "containerd", "--config", filepath.Join(dir, "config.toml"))
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = daemon.Process.Signal(syscall.SIGTERM)
		_ = daemon.Wait()
		log.Close()
		if b, err := os.ReadFile(log.Name()); err == nil && t.Failed() {
			t.Logf("the log of containerd on %s:\n%s", h.Name, b[max(0, len(b)-4000):])
		}
		_ = os.RemoveAll(dir)
	})
	until(t, "containerd answers", func() error { return m.ctr("version") })
	return m
}

func (m *machine) socket() string { return filepath.Join(m.dir, "s") }

// command runs in the host's network namespace, with the machine's /sys (cgroups) and mounts of its own.
func (m *machine) command(out io.Writer, args ...string) *exec.Cmd {
	const script = `mount --bind "$1" /etc/cni/net.d && mount --bind "$2" /opt/cni/bin && shift 2 && exec "$@"`
	c := exec.Command("nsenter", append([]string{"--net=" + m.h.Netns, "unshare", "-m", "sh", "-c", script, "sh", m.networks, m.plugins}, args...)...)
	c.Stdout, c.Stderr = out, out
	return c
}

func (m *machine) ctr(args ...string) error {
	_, err := m.ctrOutput(args...)
	return err
}

func (m *machine) ctrOutput(args ...string) (string, error) {
	var out bytes.Buffer
	if err := m.command(&out, append([]string{"ctr", "-a", m.socket()}, args...)...).Run(); err != nil {
		return "", fmt.Errorf("ctr %v on %s: %w: %s", args, m.h.Name, err, out.Bytes())
	}
	return out.String(), nil
}

// container starts one that sleeps, and removes it when the test ends: ctr calls the plugin both times.
func (m *machine) container(name string) api.Pod {
	m.t.Helper()
	var out bytes.Buffer
	c := m.command(&out, "ctr", "-a", m.socket(), "run", "--rm", "--snapshotter", "native", "--cni", boxImage, name, "/bin/sleep", "600")
	if err := c.Start(); err != nil {
		m.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	m.t.Cleanup(func() {
		if err := m.ctr("task", "kill", "-s", "SIGKILL", name); err != nil {
			m.t.Error(err)
			_ = c.Process.Kill()
		}
		<-ended // its exit code is that of the killed task
		if p, err := m.pod(name); err == nil {
			m.t.Errorf("its container is gone, and there is %+v", p)
		}
	})
	var pod api.Pod
	until(m.t, "container "+name, func() (err error) {
		if len(ended) > 0 {
			m.t.Fatalf("ctr run has ended: %s", out.Bytes())
		}
		if pod, err = m.pod(name); err == nil {
			err = m.ctr("task", "exec", "--exec-id", fmt.Sprint(time.Now().UnixNano()), name, "/bin/true")
		}
		return err
	})
	return pod
}

// pod is what the agent knows of a container. containerd gives the plugin a container ID of its own making.
func (m *machine) pod(name string) (api.Pod, error) {
	pods, err := api.NewClient(m.h.Socket).Pods(context.Background())
	for _, p := range pods {
		if p.Engine == api.EngineCNI && p.State == api.PodUp {
			return p, nil
		}
	}
	return api.Pod{}, errors.Join(err, fmt.Errorf("%s has no container %s: %+v", m.h.Name, name, pods))
}

// packTar makes an archive of files, and of links to busybox.
func packTar(t *testing.T, files map[string][]byte, links ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, data := range files {
		err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(data))})
		if err == nil {
			_, err = w.Write(data)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, l := range links {
		if err := w.WriteHeader(&tar.Header{Name: l, Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// boxLayer is a root file system with busybox and nothing else.
func boxLayer(t *testing.T) []byte {
	t.Helper()
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	return packTar(t, map[string][]byte{"bin/busybox": busybox}, "bin/sleep", "bin/ping", "bin/true")
}

// boxTar is an image of it.
func boxTar(t *testing.T) string { return imageTar(t, boxImage, boxLayer(t)) }

// imageTar is an image of one layer, in the form of `docker save`, whose containers run cmd unless they are told otherwise.
func imageTar(t *testing.T, name string, layer []byte, cmd ...string) string {
	t.Helper()
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux", "config": map[string]any{"Env": []string{"PATH=/bin"}, "Cmd": cmd},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{fmt.Sprintf("sha256:%x", sha256.Sum256(layer))}},
	})
	if err != nil {
		t.Fatal(err)
	}
	manifest := fmt.Appendf(nil, `[{"Config": "config.json", "RepoTags": [%q], "Layers": ["layer.tar"]}]`, name)
	path := filepath.Join(t.TempDir(), "image.tar")
	if err := os.WriteFile(path, packTar(t, map[string][]byte{"config.json": config, "manifest.json": manifest, "layer.tar": layer}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// seenAs connects from one network namespace to an address in another, and returns the source address that was seen there.
var seenAs = namespace.SeenAs

// TestContainerd: two hosts, each with a containerd that starts a container with the network that the agent publishes. The
// containers reach each other, their host, the other host and the outside, through each encapsulation and without one; only the outside sees
// another address.
func TestContainerd(t *testing.T) {
	for _, c := range []struct {
		name    string
		subnets int
		modes   []string
	}{
		{"ctd", 2, []string{"udp", "vxlan", "ipip"}},
		{"ctdd", 1, []string{"direct"}},
	} {
		t.Run(c.modes[0], func(t *testing.T) {
			t.Parallel()
			l, pods := containerds(t, c.name, c.subnets)
			for _, mode := range c.modes {
				onlyBy(t, l, mode)
				containersReach(t, l, mode, pods)
			}
		})
	}
}

// containerds is a lab of two hosts, each with a containerd and a container.
func containerds(t *testing.T, name string, subnets int) (*lab.Lab, []api.Pod) {
	t.Helper()
	plugins, networks := t.TempDir(), filepath.Join(t.TempDir(), "net.d")
	if err := errors.Join(testbuild.Command("tulle-cni", filepath.Join(plugins, "tulle-cni"), nil), os.Mkdir(networks, 0o755)); err != nil {
		t.Fatal(err)
	}
	l := up(t, name, lab.Options{Nodes: 2, Subnets: subnets, Pods: -1, ClusterCIDRs: dualCIDRs})
	settled(t, l)
	image := boxTar(t)
	var pods []api.Pod
	for _, h := range l.Hosts() {
		dir := filepath.Join(networks, h.Name)
		conf := fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "tulle", "plugins": [{"type": "tulle-cni", "socket": %q}]}`, h.Socket)
		if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(filepath.Join(dir, "10-tulle.conflist"), []byte(conf), 0o644)); err != nil {
			t.Fatal(err)
		}
		pods = append(pods, newMachine(t, h, plugins, dir, image).container("box-"+l.Name()+"-"+h.Name))
	}
	return l, pods
}

// onlyBy pins the encapsulation on all hosts of a lab that has no Paths of its own.
func onlyBy(t *testing.T, l *lab.Lab, mode string) {
	t.Helper()
	for _, h := range l.Hosts() {
		conf, err := os.ReadFile(h.Config)
		if err != nil {
			t.Fatal(err)
		}
		conf = regexp.MustCompile(`(?m)^paths: .*\n`).ReplaceAll(conf, nil)
		if err := os.WriteFile(h.Config, append(conf, "paths: ["+mode+"]\n"...), 0o600); err != nil {
			t.Fatal(err)
		}
		if res, err := api.NewClient(h.Socket).Reload(t.Context()); err != nil || len(res.Changed) != 1 {
			t.Fatalf("reload of %s: %+v, %v", h.Name, res, err)
		}
		until(t, h.Name+" uses "+mode, func() error {
			st, err := status(t.Context(), l, h.Name)
			for _, p := range st.Peers {
				if p.Path.Mode != mode || p.Path.State != api.PathUp {
					err = fmt.Errorf("its path to %s: %+v", p.Name, p.Path)
				}
			}
			return err
		})
	}
}

// containersReach lets a container on the first host reach everything, and everything it.
func containersReach(t *testing.T, l *lab.Lab, mode string, pods []api.Pod) {
	t.Helper()
	h1, h2 := l.Hosts()[0], l.Hosts()[1]
	own, other := mustStatus(t, l, h1.Name).Node, mustStatus(t, l, h2.Name).Node
	hostAddrs := append(slices.Clone(own.Underlay), own.Tun.Addresses...)
	otherAddrs := append(slices.Clone(other.Underlay), other.Tun.Addresses...)
	for i, a := range pods[0].Addresses {
		for _, c := range []struct {
			what, from, at string
			to             netip.Addr
			want           []netip.Addr
		}{
			{"container to container", pods[0].Netns, pods[1].Netns, pods[1].Addresses[i], []netip.Addr{a}},
			{"container to container, back", pods[1].Netns, pods[0].Netns, a, []netip.Addr{pods[1].Addresses[i]}},
			{"container to its host", pods[0].Netns, h1.Netns, own.Underlay[i], []netip.Addr{a}},
			{"container to the other host's tunnel address", pods[0].Netns, h2.Netns, other.Tun.Addresses[i], []netip.Addr{a}},
			{"container to the other host's network", pods[0].Netns, h2.Netns, other.Underlay[i], []netip.Addr{a}},
			{"host to its container", h1.Netns, pods[0].Netns, a, hostAddrs},
			{"the other host to the container", h2.Netns, pods[0].Netns, a, otherAddrs},
			{"container to the outside", pods[0].Netns, sys.NetnsPath(l.Name() + "-" + lab.Router), routerOf(h2, i), own.Underlay},
		} {
			seen, err := seenAs(c.from, c.at, c.to)
			if err != nil || !slices.Contains(c.want, seen) {
				t.Errorf("%s: %s, %v: seen as %v (%v), want %v", mode, c.what, c.to, seen, err, c.want)
			}
		}
	}
}

// routerOf is the router's address in a host's subnet, of the i-th family of the host's underlay.
func routerOf(h lab.Host, i int) netip.Addr {
	b := h.Underlay[i].AsSlice()
	b[len(b)-1] = 1
	a, _ := netip.AddrFromSlice(b)
	return a
}
