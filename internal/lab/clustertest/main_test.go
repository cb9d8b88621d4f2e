package clustertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/testing/stall"
	"github.com/tulle-net/tulle/internal/testing/testbuild"
)

// program is the tulle program that TestMain has built.
var program string

func TestMain(m *testing.M) { os.Exit(buildAndRun(m)) }

func buildAndRun(m *testing.M) int {
	dir, err := os.MkdirTemp("", "tulle-clustertest")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	program = filepath.Join(dir, "tulle")
	var flags []string
	if raceEnabled {
		flags = append(flags, "-race")
	}
	if err := testbuild.Tulle(program, nil, flags...); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
}

// up makes a lab that the test removes. When the test has failed, the agents' logs are shown.
func up(t *testing.T, what string, o lab.Options) *lab.Lab {
	t.Helper()
	needRoot(t)
	o.Name, o.Binary = labName(what), program
	if o.Paths == "" { // what these tests watch and break is the tunnel; internal/lab/pathtest has the direct path
		o.Paths = "udp, vxlan, ipip"
	}
	l, err := lab.Up(t.Context(), o, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			showLogs(t, l)
		}
		checkRaces(t, l)
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return l
}

// labName is a name that no other test process uses at this moment.
func labName(what string) string { return fmt.Sprintf("c%d-%s", os.Getpid()%100000, what) }

func showLogs(t *testing.T, l *lab.Lab) {
	const most = 6000 // bytes of each
	for _, h := range l.Hosts() {
		b, err := os.ReadFile(h.Log)
		if errors.Is(err, fs.ErrNotExist) {
			continue // a bare lab
		}
		t.Logf("the log of %s:\n%s", h.Name, b[max(0, len(b)-most):])
	}
}

// checkRaces fails the test if an agent has panicked or raced.
func checkRaces(t *testing.T, l *lab.Lab) {
	for _, h := range l.Hosts() {
		b, _ := os.ReadFile(h.Log)
		for _, bad := range []string{"DATA RACE", "panic:", "fatal error:"} {
			if i := bytes.Index(b, []byte(bad)); i >= 0 {
				t.Errorf("%s in the log of %s:\n%s", bad, h.Name, b[max(0, i-200):min(len(b), i+4000)])
			}
		}
	}
}

// patience is how long a condition may take on a busy machine; far more than it should need.
const patience = 60 * time.Second

// until polls a condition. It ends the test if the condition does not come, with what it last said.
func until(t *testing.T, what string, cond func() error) {
	t.Helper()
	untilWithin(t, patience, what, cond)
}

// untilWithin is until with a limit, which does not run while the machine is short of CPUs, for three times as long at most.
func untilWithin(t *testing.T, limit time.Duration, what string, cond func() error) {
	t.Helper()
	began, meter := time.Now(), stall.Begin()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := cond()
		if err == nil {
			return
		}
		if short := min(meter.Short(), 3*limit); time.Since(began) > limit+short {
			t.Fatalf("%s: not within %v, and %v in which the machine was short of CPUs: %v", what, limit, short.Round(time.Millisecond), err)
		}
		select {
		case <-t.Context().Done():
			t.Fatalf("%s: %v", what, context.Cause(t.Context()))
		case <-tick.C:
		}
	}
}

// status asks a host's agent.
func status(ctx context.Context, l *lab.Lab, host string) (api.Status, error) {
	c, err := l.Client(host)
	if err != nil {
		return api.Status{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	return c.Status(ctx)
}

func mustStatus(t *testing.T, l *lab.Lab, host string) api.Status {
	t.Helper()
	st, err := status(t.Context(), l, host)
	if err != nil {
		t.Fatalf("status of %s: %v", host, err)
	}
	return st
}

// peerOf is one peer in a status.
func peerOf(st *api.Status, name string) (api.Peer, error) {
	for _, p := range st.Peers {
		if p.Name == name {
			return p, nil
		}
	}
	return api.Peer{}, fmt.Errorf("%s has no peer %s", st.Node.Name, name)
}

// names of all hosts.
func hostNames(l *lab.Lab) []string {
	var out []string
	for _, h := range l.Hosts() {
		out = append(out, h.Name)
	}
	return out
}

// settled waits until the hosts' agents (all of them if none is named) are ready, see each other alive with their paths up
// and fully measured, have equal tables, and find nothing wrong.
func settled(t *testing.T, l *lab.Lab, hosts ...string) {
	t.Helper()
	if len(hosts) == 0 {
		hosts = hostNames(l)
	}
	until(t, "the cluster settles", func() error { return settledNow(t.Context(), l, hosts) })
}

func settledNow(ctx context.Context, l *lab.Lab, hosts []string) error {
	digest := ""
	for _, h := range hosts {
		st, err := status(ctx, l, h)
		if err != nil {
			return fmt.Errorf("%s: %w", h, err)
		}
		if !st.Healthy() {
			return fmt.Errorf("%s is not healthy: ready %v, %+v", h, st.Ready, st.Problems)
		}
		if digest == "" {
			digest = st.Cluster.Table.Digest
		} else if digest != st.Cluster.Table.Digest {
			return fmt.Errorf("the table of %s is not that of %s", h, hosts[0])
		}
		for _, other := range hosts {
			if other == h {
				continue
			}
			p, err := peerOf(&st, other)
			if err != nil {
				return err
			}
			want := st.Node.Tun.MTU
			if p.Path.Mode == "direct" {
				want = st.Node.LinkMTU
			}
			if p.State != api.PeerAlive || p.Path.State != api.PathUp || p.Path.MTU != want {
				return fmt.Errorf("%s: %s is %s, its path %+v", h, other, p.State, p.Path)
			}
		}
	}
	return nil
}

// result of a command.
type result struct {
	out, err string
	code     int
}

// tulle runs the command line against a host's agent.
func tulle(t *testing.T, l *lab.Lab, host string, args ...string) result {
	t.Helper()
	h, err := l.Host(host)
	if err != nil {
		t.Fatal(err)
	}
	return run(t, newCommand(t, append(args, "--socket", h.Socket)...))
}

// newCommand is the program with arguments.
func newCommand(t *testing.T, args ...string) *exec.Cmd {
	return exec.CommandContext(t.Context(), program, args...)
}

// run runs a command to its end.
func run(t *testing.T, cmd *exec.Cmd) result {
	t.Helper()
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		t.Fatalf("%v: %v", cmd, err)
	}
	return result{out.String(), errOut.String(), cmd.ProcessState.ExitCode()}
}

// lacks returns those of the words that a text does not contain.
func lacks(text string, words ...string) (missing []string) {
	for _, w := range words {
		if !strings.Contains(text, w) {
			missing = append(missing, w)
		}
	}
	return missing
}
