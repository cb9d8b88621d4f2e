package clustertest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containernetworking/cni/libcni"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"

	"github.com/tulle-net/tulle/internal/api"
)

// cnitool is the reference program of the CNI project, on h1, with notes of its own below dir.
type cnitool struct {
	e                  *engine
	program, dir, conf string
}

// run runs one verb for a container. cnitool keeps its notes in /var/lib/cni: here, it has another one.
func (c *cnitool) run(verb string, box *libcni.RuntimeConf) (out []byte, err error) {
	h, err := c.e.l.Host(c.e.host)
	if err != nil {
		return nil, err
	}
	const script = `mount --bind "$1" /var/lib/cni && shift && exec "$@"`
	cmd := exec.CommandContext(c.e.t.Context(), "nsenter", "--net="+h.Netns, "unshare", "-m", "sh", "-c", script, "sh", c.dir, c.program, verb, "tulle", box.NetNS)
	cmd.Env = append(os.Environ(), "NETCONFPATH="+c.conf, "CNI_PATH="+c.e.lib.Path[0], "CNI_IFNAME="+box.IfName)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("cnitool %s: %w: %s", verb, err, stderr.String())
	}
	return stdout.Bytes(), nil
}

// TestCNITool: every verb by cnitool, for every version of the configuration.
func TestCNITool(t *testing.T) {
	t.Parallel()
	e := newEngine(t, "cnitool", -1)
	tool := &cnitool{e: e, program: filepath.Join(t.TempDir(), "cnitool"), dir: t.TempDir()}
	if out, err := exec.Command("go", "build", "-o", tool.program, "github.com/containernetworking/cni/cnitool").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v: %s", err, out)
	}
	if err := os.MkdirAll("/var/lib/cni", 0o700); err != nil {
		t.Fatal(err)
	}
	for _, version := range []string{"0.4.0", "1.0.0", "1.1.0"} {
		tool.conf = t.TempDir()
		if err := os.WriteFile(filepath.Join(tool.conf, "10-tulle.conflist"), e.network(version).Bytes, 0o600); err != nil {
			t.Fatal(err)
		}
		tool.allVerbs(version)
	}
	if err := e.l.StopAgent(t.Context(), e.host, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, err := tool.run("status", e.container()); err == nil || !strings.Contains(err.Error(), "no agent") {
		t.Errorf("status without an agent: %v", err)
	}
}

func (c *cnitool) allVerbs(version string) {
	t, e := c.e.t, c.e
	t.Helper()
	ok := func(verb string, box *libcni.RuntimeConf) []byte {
		t.Helper()
		out, err := c.run(verb, box)
		if err != nil {
			t.Fatalf("%s: %v", version, err)
		}
		return out
	}
	first, second := e.container(), e.container()
	ok("status", first)
	for _, box := range []*libcni.RuntimeConf{first, second} {
		raw := ok("add", box)
		r, err := create.CreateFromBytes(raw)
		if err != nil {
			t.Fatalf("%s: %v: %s", version, err, raw)
		}
		res, err := current.NewResultFromResult(r)
		if err != nil {
			t.Fatalf("%s: %v: %s", version, err, raw)
		}
		for id, p := range e.pods() {
			if p.Netns == box.NetNS && p.State == api.PodUp {
				box.ContainerID = id // cnitool makes it
			}
		}
		e.validate(version, box, res, raw)
		ok("check", box)
	}
	if _, err := c.run("add", first); err == nil {
		t.Errorf("%s: a second add is no error", version)
	}
	ok("check", first)
	ok("del", first)
	ok("del", first)
	if _, err := c.run("check", first); err == nil {
		t.Errorf("%s: check after del is no error", version)
	}
	ok("check", second)
	ok("gc", second) // cnitool lists no attachments: all are garbage. GC came with 1.1.0; before, cnitool has DEL do it
	e.nothingLeft()
}
