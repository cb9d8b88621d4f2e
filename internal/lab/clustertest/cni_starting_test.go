package clustertest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/testing/testbuild"
)

// TestCNIBeforeCluster: an agent runs and has not found its cluster yet. Engines see no network, STATUS says why, ADD is to be tried
// again and DEL works. With the cluster there, all of it is served. After a reboot the agent is in the same state at first: what the containers
// of before had is given back by a DEL with the ID alone.
func TestCNIBeforeCluster(t *testing.T) {
	t.Parallel()
	bin, dir := t.TempDir(), t.TempDir()
	if err := testbuild.Command("tulle-cni", filepath.Join(bin, "tulle-cni"), nil); err != nil {
		t.Fatal(err)
	}
	l := up(t, "cnib", lab.Options{Nodes: 2, Subnets: 1, Pods: -1, Bare: true})
	seed, h := l.Hosts()[0], l.Hosts()[1]
	late := newStray(t, "--node-name", h.Name, "--join", seed.Underlay[0].String(), "--cni-dir", dir, "--cni-bin-dir", bin)
	late.start(t, l, h.Name)
	e := &engine{t: t, l: l, host: h.Name, socket: late.socket, dir: dir, lib: libcni.NewCNIConfigWithCacheDir([]string{bin}, t.TempDir(), nil)}
	n, c := e.network("1.1.0"), e.container()
	waits := func(why string) {
		t.Helper()
		until(t, "STATUS says why", func() error {
			err := e.status(n)
			if code(err) != types.ErrPluginNotAvailable || !strings.Contains(err.Error(), why) {
				return errors.Join(fmt.Errorf("want code 50, and %q", why), err)
			}
			return nil
		})
		e.published(false)
		if _, _, err := e.add(n, e.container()); code(err) != types.ErrTryAgainLater {
			t.Errorf("ADD: %v, want code %d", err, types.ErrTryAgainLater)
		}
	}
	waits("none of 1 seeds answers")
	if err := e.del(n, c); err != nil {
		t.Errorf("DEL of what never was: %v", err)
	}

	first := newStray(t, "--node-name", seed.Name, "--bootstrap", "--cluster-cidr", "10.244.0.0/16")
	first.start(t, l, seed.Name)
	late.ready(t)
	e.published(true)
	if err := e.status(n); err != nil {
		t.Errorf("STATUS: %v", err)
	}
	if _, _, err := e.add(n, c); err != nil {
		t.Fatalf("ADD: %v", err)
	}

	// A power failure of the host, while the other one is down.
	first.stop()
	_ = late.cmd.Process.Signal(syscall.SIGKILL)
	_ = late.cmd.Wait()
	if err := l.ResetHost(t.Context(), h.Name); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(late.dir, "*.tun0")) // what is beside the socket is in /run
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
	late.start(t, l, h.Name)
	waits("no member that knows the table answers yet")
	c.NetNS = ""
	if err := e.del(n, c); err != nil {
		t.Errorf("DEL after a reboot: %v", err)
	}
	first.start(t, l, seed.Name)
	late.ready(t)
	e.published(true)
	e.noPods("after a DEL")
}
