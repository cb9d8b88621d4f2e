package clustertest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/sys"
)

// busyboxRoot is a root file system with busybox, as whole as systemd-nspawn and LXC want it.
func busyboxRoot(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	for _, dir := range []string{"bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "usr", "var"} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err := errors.Join(err, os.Chmod(root, 0o755), os.WriteFile(filepath.Join(root, "bin/busybox"), busybox, 0o755)); err != nil {
		t.Fatal(err)
	}
	return root
}

// command runs a program that must succeed, and returns what it prints.
func command(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// TestSharedNamespace: containers of systemd-nspawn and LXC in the network namespace of a pod, and an LXC container whose own namespace
// becomes a pod, reach a pod on another host, as docs/operations.md has them.
func TestSharedNamespace(t *testing.T) {
	t.Parallel()
	needRoot(t)
	l := up(t, "shr", lab.Options{Nodes: 2, Subnets: 1, Pods: 1, ClusterCIDRs: dualCIDRs})
	settled(t, l)
	h, far := l.Hosts()[0], l.Pods()[1]
	name := l.Name() + "-web"
	t.Cleanup(func() { _ = sys.DeleteNetns(name) })
	pod := func(args ...string) {
		t.Helper()
		if r := inHost(t, l, h.Name, append([]string{"pod", "--socket", h.Socket}, args...)...); r.code != 0 {
			t.Fatalf("%+v", r)
		}
	}
	reaches := func(inside ...string) {
		t.Helper()
		for _, a := range far.Addresses {
			command(t, append(inside, "/bin/busybox", "ping", "-c1", "-W20", a.String())...)
		}
	}
	root := busyboxRoot(t)

	pod("add", name, "--new")
	nspawn := []string{"systemd-nspawn", "--quiet", "--console=pipe", "--resolv-conf=off", "--timezone=off", "--machine=" + name, "-D", root, "--network-namespace-path=/run/netns/" + name}
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		nspawn = append(nspawn, "--register=no", "--keep-unit") // no systemd runs this machine
	}
	reaches(nspawn...)
	shared := startLXC(t, root, "shared", "lxc.namespace.share.net = /run/netns/"+name)
	reaches(append(shared.tool("lxc-attach"), "--")...)
	shared.stop()
	pod("del", name)

	own := startLXC(t, root, "own", "lxc.net.0.type = empty")
	pod("add", name, "--netns", fmt.Sprintf("/proc/%s/ns/net", command(t, append(own.tool("lxc-info"), "-pH")...)))
	reaches(append(own.tool("lxc-attach"), "--")...)
	pod("del", name)
	own.stop()
	gone(t, l, name)
}

// lxc is a running container of LXC.
type lxc struct {
	t         *testing.T
	dir, name string
}

func (c *lxc) tool(program string) []string { return []string{program, "-P", c.dir, "-n", c.name} }

func (c *lxc) stop() {
	if out, err := exec.Command("lxc-stop", append(c.tool("")[1:], "-k")...).CombinedOutput(); err != nil && c.t.Context().Err() == nil {
		c.t.Errorf("lxc-stop %s: %v: %s", c.name, err, out)
	}
}

// startLXC starts a container that sleeps, with these lines about its network.
func startLXC(t *testing.T, root, name, network string) *lxc {
	t.Helper()
	c := &lxc{t: t, dir: t.TempDir(), name: name}
	conf := fmt.Sprintf("lxc.rootfs.path = dir:%s\nlxc.mount.auto = proc:mixed sys:ro\nlxc.init.cmd = /bin/busybox sleep 600\n%s\n", root, network)
	file := filepath.Join(c.dir, "config")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(c.dir, "log")
	if out, err := exec.CommandContext(t.Context(), "lxc-start", append(c.tool("")[1:], "-f", file, "-o", log, "-l", "INFO")...).CombinedOutput(); err != nil {
		text, _ := os.ReadFile(log)
		t.Fatalf("lxc-start: %v: %s\n%s", err, out, text)
	}
	t.Cleanup(c.stop)
	return c
}
