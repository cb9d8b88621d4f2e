package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/internal/testing/testbuild"
)

// tulle builds the program once for all tests.
var tulle = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "tulle-lab-test")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "tulle")
	tulleDir = dir
	return path, testbuild.Tulle(path, nil)
})

// tulleDir is where it is, for TestMain to remove.
var tulleDir string

// upAgents makes a lab with agents that the test removes.
func upAgents(t *testing.T, o Options) *Lab {
	t.Helper()
	needRoot(t)
	binary, err := tulle()
	if err != nil {
		t.Fatal(err)
	}
	o.Binary = binary
	l, err := Up(t.Context(), o, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		hosts := l.Hosts()
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
		for _, h := range hosts {
			if (process{h.PID, h.StartTime}).alive() {
				t.Errorf("the agent of %s outlived its lab as process %d", h.Name, h.PID)
			}
		}
		nothingLeft(t, o.Name)
	})
	return l
}

// eventually polls a condition, and ends the test if it does not come, with what it last said.
func eventually(t *testing.T, what string, cond func() error) {
	t.Helper()
	var last error
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	err := sys.Poll(ctx, 50*time.Millisecond, func() (bool, error) {
		last = cond()
		return last == nil, nil
	})
	if err != nil {
		t.Fatalf("%s: %v: %v", what, err, last)
	}
}

func TestAgents(t *testing.T) {
	l := upAgents(t, Options{Name: testName("agents"), Nodes: 3, Pods: 2})
	ctx := t.Context()
	reach(t, l, "up", everyone)

	// All pods reach each other: what gossip tells of the members, and of hosts' own addresses, may take a moment longer.
	eventually(t, "all agents know all members", func() error {
		for _, h := range l.Status(ctx).Hosts {
			if !h.Runs || h.Agent == nil || h.Error != "" || h.Agent.Node.Name != h.Name || h.Agent.Cluster.Members != 3 {
				return fmt.Errorf("status of %s: runs %v, error %q, %+v", h.Name, h.Runs, h.Error, h.Agent)
			}
		}
		return nil
	})
	eventually(t, "pods and hosts reach each other", func() error {
		pongs, err := l.PingAll(ctx, true)
		for _, p := range pongs {
			if p.Err != nil {
				err = errors.Join(err, fmt.Errorf("%+v", p))
			}
		}
		return err
	})

	t.Run("exec finds the host's agent", func(t *testing.T) {
		for target, node := range map[string]string{"h2": "h2", "p3b": "h3"} {
			var out, errs bytes.Buffer
			code, err := l.Exec(ctx, target, []string{l.Options().Binary, "status", "-o", "json"}, Stdio{Out: &out, Err: &errs})
			var st api.Status
			if err := errors.Join(err, json.Unmarshal(out.Bytes(), &st)); err != nil || st.Node.Name != node {
				t.Errorf("%s: tulle status: %d, %v, node %q\n%s", target, code, err, st.Node.Name, errs.String())
			}
		}
	})

	t.Run("kill and start", func(t *testing.T) {
		before, _ := l.Host("h2")
		if err := l.StopAgent(ctx, "h2", syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if l.AgentRuns("h2") {
			t.Error("the agent runs after SIGKILL")
		}
		if st := l.Status(ctx); st.Healthy() || st.Hosts[1].Error == "" || st.Hosts[1].Runs {
			t.Errorf("status without the agent of h2: %+v", st.Hosts[1])
		}
		if err := l.StartAgent(ctx, "h2"); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(l.WaitReady(ctx, "h2"), l.WaitPods(ctx)); err != nil {
			t.Fatal(err)
		}
		if after, _ := l.Host("h2"); after.PID == before.PID {
			t.Errorf("the same process %d", after.PID)
		}
		if err := l.StartAgent(ctx, "h2"); err == nil || !strings.Contains(err.Error(), "running already") {
			t.Errorf("a second agent on h2: %v", err)
		}
		// A lab that another process opens can do the same.
		again, err := Open(l.Name())
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(again.StopAgent(ctx, "h3", syscall.SIGTERM), again.StartAgent(ctx, "h3"), again.WaitReady(ctx, "h3"), again.WaitPods(ctx)); err != nil {
			t.Fatal(err)
		}
		reach(t, l, "after kill and start", everyone)
	})

	t.Run("grow and shrink", func(t *testing.T) {
		h, err := l.AddHost(ctx, 1)
		if err != nil {
			t.Fatal(err)
		}
		p, err := l.AddPod(ctx, h.Name)
		if err != nil {
			t.Fatal(err)
		}
		if err := l.WaitPods(ctx); err != nil {
			t.Fatal(err)
		}
		if err := l.RemovePod(ctx, p.Name); err != nil {
			t.Fatal(err)
		}
		c, err := l.Client(h.Name)
		if err != nil {
			t.Fatal(err)
		}
		ipam, err := c.IPAM(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range ipam.Allocations {
			if a.ID == p.ID && a.State == api.AllocationUsed {
				t.Errorf("the removed pod still has its addresses: %+v", a)
			}
		}
		if err := l.RemoveHost(ctx, h.Name); err != nil {
			t.Fatal(err)
		}
	})

	t.Run("split and heal", func(t *testing.T) {
		if err := l.Split([]string{"h2"}); err != nil {
			t.Fatal(err)
		}
		reach(t, l, "h2 cut off", func(a, b Pod) bool { return (a.Host == "h2") == (b.Host == "h2") })
		if err := l.Heal(); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
		defer cancel()
		if err := l.WaitPods(ctx); err != nil {
			t.Fatal(err)
		}
	})
}

// An agent that cannot run is named, with the end of its log.
func TestAgentThatFails(t *testing.T) {
	needRoot(t)
	binary, err := tulle()
	if err != nil {
		t.Fatal(err)
	}
	name := testName("fails")
	_, err = Up(t.Context(), Options{Name: name, Nodes: 1, Binary: binary, ExtraAgentArgs: []string{"--no-such-flag"}}, nil)
	if err == nil || !strings.Contains(err.Error(), "h1") || !strings.Contains(err.Error(), "no-such-flag") {
		t.Errorf("up with a flag that is not there: %v", err)
	}
	nothingLeft(t, name)
}

// Pods that `tulle pod` makes inside `tulle lab exec` work, go with `pod del`, and those that are left go with the lab.
func TestPodsOfExec(t *testing.T) {
	name := testName("execpod")
	web, left := "web-of-"+name, "left-of-"+name
	t.Cleanup(func() { // after the lab's end
		if _, err := os.Lstat(sys.NetnsPath(left)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the pod outlived its lab: %v", err)
			_ = sys.DeleteNetns(left)
		}
	})
	l := upAgents(t, Options{Name: name, Nodes: 2, Pods: -1})
	tulle := func(argv ...string) string {
		t.Helper()
		var out bytes.Buffer
		code, err := l.Exec(t.Context(), "h1", append([]string{l.Options().Binary}, argv...), Stdio{Out: &out, Err: &out})
		if code != 0 || err != nil {
			t.Errorf("tulle %q: %d, %v: %s", argv, code, err, &out)
		}
		return out.String()
	}
	// A namespace that is gone leaves a file, which stands in nobody's way.
	if err := os.WriteFile(sys.NetnsPath(web), nil, 0o444); err != nil {
		t.Fatal(err)
	}
	tulle("pod", "del", web)
	if _, err := os.Lstat(sys.NetnsPath(web)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the stale file after pod del: %v", err)
	}
	tulle("pod", "add", web, "--new")
	tulle("pod", "add", left, "--new")
	for _, c := range []struct {
		argv []string
		want string
	}{
		{[]string{"pod", "add", web, "--new"}, "`tulle pod del " + web + "` first, or choose another name"},
		{[]string{"pod", "add", web}, "`tulle pod del " + web + "` first, or choose another name"},
		{[]string{"pod", "add", "other", "--netns", "/etc/hosts"}, "/etc/hosts is not a network namespace"},
	} {
		var errs bytes.Buffer
		code, err := l.Exec(t.Context(), "h1", append([]string{l.Options().Binary}, c.argv...), Stdio{Err: &errs})
		if code != 1 || err != nil || !strings.Contains(errs.String(), c.want) || strings.Contains(errs.String(), "exists") {
			t.Errorf("tulle %q: %d, %v: %s", c.argv, code, err, &errs)
		}
	}
	// Root of another user namespace is nobody here.
	for _, argv := range [][]string{{"add", "more-of-" + name, "--new"}, {"add", "other", "--netns", sys.NetnsPath(left)}, {"exec", web, "--", "true"}, {"del", web}} {
		var errs bytes.Buffer
		code, err := l.Exec(t.Context(), "h1", append([]string{"unshare", "--user", l.Options().Binary, "pod"}, argv...), Stdio{Err: &errs})
		if code != 1 || err != nil || !strings.HasSuffix(strings.TrimSpace(errs.String()), "run as root") || strings.Count(errs.String(), "run as root") != 1 {
			t.Errorf("tulle pod %q without rights: %d, %v: %s", argv, code, err, &errs)
		}
	}
	if out := tulle("pod", "list"); strings.Count(out, " up") != 2 {
		t.Errorf("pods:\n%s", out)
	}
	if out := tulle("pod", "exec", web, "--", "cat", "/proc/net/dev"); !strings.Contains(out, "eth0") {
		t.Errorf("devices of the pod:\n%s", out)
	}
	tulle("pod", "del", web)
	if _, err := os.Lstat(sys.NetnsPath(web)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the namespace after pod del: %v", err)
	}
	// A power failure takes the pods of a host, too.
	tulle("pod", "add", web, "--new")
	if err := l.RemoveHost(t.Context(), "h1"); err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{web, left} {
		if _, err := os.Lstat(sys.NetnsPath(n)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s after the end of its host: %v", n, err)
		}
	}
	if code, err := l.Exec(t.Context(), "h2", []string{l.Options().Binary, "pod", "add", left, "--new"}, Stdio{Out: os.Stdout, Err: os.Stderr}); code != 0 || err != nil {
		t.Errorf("a pod on h2: %d, %v", code, err)
	}
}
