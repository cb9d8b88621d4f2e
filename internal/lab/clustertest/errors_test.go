package clustertest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/lab"
)

// stray is an agent that the test starts by hand on a host of a bare lab.
type stray struct {
	dir, socket string
	args        []string
	cmd         *exec.Cmd
	log         lockedBuffer
}

// newStray gives an agent a folder of its own for all that it writes.
func newStray(t *testing.T, args ...string) *stray {
	t.Helper()
	dir := t.TempDir()
	config := filepath.Join(dir, "empty.yaml")
	if err := os.WriteFile(config, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	s := &stray{dir: dir, socket: filepath.Join(dir, "tulle.sock")}
	s.args = append([]string{"agent", "--config", config, "--state-dir", filepath.Join(dir, "state"), "--socket", s.socket, "--metrics", "off"}, args...)
	return s
}

// start starts it, to be stopped with the test at the latest.
func (s *stray) start(t *testing.T, l *lab.Lab, host string, more ...string) {
	t.Helper()
	again := s.cmd != nil
	s.cmd = exec.Command(program, append(s.args, more...)...)
	s.cmd.Stdout, s.cmd.Stderr = &s.log, &s.log
	if err := l.Do(host, s.cmd.Start); err != nil {
		t.Fatal(err)
	}
	if again {
		return
	}
	t.Cleanup(func() {
		s.stop()
		if t.Failed() {
			const most = 6000 // bytes
			b := s.log.String()
			t.Logf("the log of the agent on %s:\n%s", host, b[max(0, len(b)-most):])
		}
	})
}

func (s *stray) stop() {
	if s.cmd.ProcessState == nil {
		_ = s.cmd.Process.Signal(syscall.SIGTERM)
		_ = s.cmd.Wait()
	}
}

// says waits for a problem in the agent's status that has all the words.
func (s *stray) says(t *testing.T, words ...string) {
	t.Helper()
	until(t, fmt.Sprintf("status says %q", words), func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		st, err := api.NewClient(s.socket).Status(ctx)
		if err != nil {
			return err
		}
		for _, p := range st.Problems {
			line := p.What + "; " + p.Remedy
			if len(lacks(line, words...)) == 0 {
				t.Logf("status: %s", line)
				if p.Remedy == "" {
					t.Errorf("no remedy: %s", line)
				}
				return nil
			}
		}
		return fmt.Errorf("it says %+v", st.Problems)
	})
}

// ready waits for the agent.
func (s *stray) ready(t *testing.T) api.Status {
	t.Helper()
	var st api.Status
	until(t, "the agent is ready", func() (err error) {
		if st, err = api.NewClient(s.socket).Status(t.Context()); err == nil && !st.Ready {
			err = fmt.Errorf("%+v", st.Problems)
		}
		return err
	})
	return st
}

func write(t *testing.T, path, text string, mode os.FileMode) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

const (
	keyA = "QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE="
	keyB = "QkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkI="
)

// TestErrors starts agents that cannot work: each says why and what to do, in one line.
func TestErrors(t *testing.T) {
	t.Parallel()
	l := up(t, "err", lab.Options{Bare: true, Nodes: 2, Subnets: 1, Pods: -1, Underlay: lab.IPv4Only})
	dir := t.TempDir()
	// The program must be executable by nobody.
	if err := os.Chmod(filepath.Dir(program), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name  string
		args  []string
		hold  func() (io.Closer, error)                     // on h1, kept while the agent starts
		start func(program string, args []string) *exec.Cmd // in another way than usual
		code  int
		want  []string
	}{
		{name: "bad flag", args: []string{"--udp-prot", "1"}, code: 2, want: []string{"unknown flag: --udp-prot", "did you mean --udp-port?", "--help"}},
		{name: "bad value", args: []string{"--mtu", "9"}, code: 2, want: []string{"--mtu", `"9"`, "576 to 65535"}},
		{
			name: "unknown key", args: []string{"--config", write(t, filepath.Join(dir, "key.yaml"), "node_name: a\n\nudp_prot: 1\n", 0o644)}, code: 2,
			want: []string{"key.yaml:3:", `"udp_prot"`, "did you mean udp_port?"},
		},
		{
			name: "busy UDP port", code: 1, want: []string{"UDP port 6080", "--udp-port", "ss -"},
			hold: func() (io.Closer, error) { return net.ListenPacket("udp4", "192.168.1.11:6080") },
		},
		{
			name: "busy gossip port, TCP", code: 1, want: []string{"192.168.1.11:7946", "--gossip-port", "ss -"},
			hold: func() (io.Closer, error) { return net.Listen("tcp4", "192.168.1.11:7946") },
		},
		{
			name: "busy gossip port, UDP", code: 1, want: []string{"192.168.1.11:7946", "--gossip-port", "ss -"},
			hold: func() (io.Closer, error) { return net.ListenPacket("udp4", "192.168.1.11:7946") },
		},
		{
			name: "busy metrics port", args: []string{"--metrics", "127.0.0.1:9646"}, code: 1, want: []string{"--metrics 127.0.0.1:9646", "off", "ss -"},
			hold: func() (io.Closer, error) { return net.Listen("tcp4", "127.0.0.1:9646") },
		},
		{
			name: "no TUN", code: 1, want: []string{"/dev/net/tun is missing", "modprobe tun", "mknod"},
			start: func(program string, args []string) *exec.Cmd {
				script := `d=$(mktemp -d) && mount -t tmpfs none "$d" && mount --bind "$d" /dev/net && exec "$@"`
				return exec.Command("unshare", append([]string{"-m", "sh", "-c", script, "sh", program}, args...)...)
			},
		},
		{
			name: "few files", code: 1, want: []string{"too many open files", "may have 40 open", "LimitNOFILE"},
			start: func(program string, args []string) *exec.Cmd {
				return exec.Command("prlimit", append([]string{"--nofile=40:40", program}, args...)...)
			},
		},
		{
			name: "no root", code: 1, want: []string{"CAP_NET_ADMIN", "CAP_NET_RAW", "uid 65534", "root", "systemctl start tulle"},
			start: func(program string, args []string) *exec.Cmd {
				cmd := exec.Command(program, args...)
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
				cmd.Dir = "/"
				return cmd
			},
		},
		{
			name: "overlapping CIDR", args: []string{"--cluster-cidr", "192.168.0.0/16"}, code: 1,
			want: []string{"cluster CIDR 192.168.0.0/16", "192.168.1.11", "eth0", "--cluster-cidr"},
		},
		{name: "link-local underlay", args: []string{"--underlay", "fe80::1"}, code: 1, want: []string{"fe80::1", "link-local", "--underlay"}},
		{name: "key file is missing", args: []string{"--gossip-key-file", dir + "/none.key"}, code: 1, want: []string{dir + "/none.key", "does not exist", "tulle keys generate"}},
		{
			name: "key file is readable by all", args: []string{"--gossip-key-file", write(t, dir+"/loose.key", keyA+"\n", 0o644)}, code: 1,
			want: []string{dir + "/loose.key", "0644", "chmod 600 " + dir + "/loose.key"},
		},
		{
			name: "key file holds no key", args: []string{"--gossip-key-file", write(t, dir+"/short.key", "c2hvcnQ=\n", 0o600)}, code: 1,
			want: []string{dir + "/short.key", "32", "tulle keys generate"},
		},
		{name: "paths that do not exist", args: []string{"--paths", "direct,gre"}, code: 2, want: []string{"--paths", "gre", "direct", "udp"}},
		{name: "MTU beyond the underlay's", args: []string{"--mtu", "9000"}, code: 1, want: []string{"--mtu 9000", "eth0", "1500", "1472"}},
	} {
		s := newStray(t, append([]string{"--bootstrap"}, tc.args...)...)
		if err := os.Chmod(filepath.Dir(s.dir), 0o755); err != nil { // readable by nobody as well
			t.Fatal(err)
		}
		var r result
		if err := l.Do("h1", func() error {
			if tc.hold != nil {
				held, err := tc.hold()
				if err != nil {
					return err
				}
				defer held.Close()
			}
			cmd := exec.Command(program, s.args...)
			if tc.start != nil {
				cmd = tc.start(program, s.args)
			}
			timeout := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
			defer timeout.Stop()
			r = run(t, cmd)
			return nil
		}); err != nil {
			t.Fatalf("%s: %v", tc.name, err)
		}
		oneLineError(t, tc.name, r, tc.code, tc.want...)
		if links := networkOf(t, l, "h1").with("link tun"); len(links) > 0 && !strings.Contains(tc.name, "gossip port") && !strings.Contains(tc.name, "metrics") {
			t.Errorf("%s: it left %q", tc.name, links)
		}
		if r := inHost(t, l, "h1", "cleanup", "--socket", s.socket); r.code != 0 {
			t.Fatalf("%s: cleanup: %+v", tc.name, r)
		}
	}
}

// TestCorruptState damages a state file: the agent says so, and leaves it alone.
func TestCorruptState(t *testing.T) {
	t.Parallel()
	l := up(t, "state", lab.Options{Bare: true, Nodes: 1, Pods: -1, Underlay: lab.IPv4Only})
	s := newStray(t, "--bootstrap")
	s.start(t, l, "h1")
	s.ready(t)
	s.stop()
	file := filepath.Join(s.dir, "state", "state")
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string][]byte{
		"flipped":   append(bytes.Clone(good[:len(good)-4]), good[len(good)-4]^1, '}', '\n', '\n'),
		"truncated": good[:len(good)/2],
		"empty":     nil,
		"newer":     bytes.Replace(good, []byte("tulle-state 1 "), []byte("tulle-state 9 "), 1),
	} {
		write(t, file, string(bad), 0o600)
		r := inHost(t, l, "h1", s.args...)
		want := []string{file, "Remedy:"}
		if name == "newer" {
			want = append(want, "newer version")
		} else {
			want = append(want, "damaged")
		}
		oneLineError(t, name, r, 1, want...)
		if now, err := os.ReadFile(file); err != nil || !bytes.Equal(now, bad) {
			t.Errorf("%s: the file was changed (%v)", name, err)
		}
	}
	write(t, file, string(good), 0o600)
	s.start(t, l, "h1")
	s.ready(t)
}

// TestSeedProblems starts agents that run, but cannot join: their status says why.
func TestSeedProblems(t *testing.T) {
	t.Parallel()
	l := up(t, "seeds", lab.Options{Bare: true, Nodes: 2, Subnets: 1, Pods: -1, Underlay: lab.IPv4Only})
	dir := t.TempDir()
	first := newStray(t, "--node-name", "first", "--bootstrap", "--gossip-key-file", write(t, dir+"/a.key", keyA+"\n", 0o600))
	first.start(t, l, "h1")
	st := first.ready(t)

	with := func(name string, args []string, words ...string) {
		t.Run(name, func(t *testing.T) {
			s := newStray(t, append([]string{"--node-name", "second"}, args...)...)
			s.start(t, l, "h2")
			s.says(t, words...)
			s.stop()
		})
	}
	keyed := []string{"--gossip-key-file", dir + "/a.key"}
	with("unreachable", append(keyed, "--join", "192.168.1.99"), "seed 192.168.1.99:7946", "no route", "route")
	with("nobody listens", append(keyed, "--join", "192.168.1.11:7000"), "seed 192.168.1.11:7000", "nothing listens there", "start the agent there")
	with("no name", append(keyed, "--join", "no-such-host.invalid"), "seed no-such-host.invalid:7946", "does not resolve", "--join")
	with("wrong key", []string{"--join", "192.168.1.11", "--gossip-key-file", write(t, dir+"/b.key", keyB+"\n", 0o600)}, "seed 192.168.1.11:7946", "another gossip key", "--gossip-key-file")
	first.says(t, "no key", "192.168.1.12")
	with("no key", []string{"--join", "192.168.1.11"}, "seed 192.168.1.11:7946", "gossip key", "--gossip-key-file")
	with("no seed", nil, "no pod addresses", "--join")
	with("nobody bootstraps", append(keyed, "--join", "192.168.1.12:7947"), "no pod addresses", "seed")

	t.Run("other cluster", func(t *testing.T) {
		second := newStray(t, append(keyed, "--node-name", "second", "--bootstrap", "--cluster-cidr", "10.77.0.0/16")...)
		second.start(t, l, "h2")
		other := second.ready(t)
		if other.Cluster.ID == st.Cluster.ID {
			t.Fatal("both have one cluster ID")
		}
		second.stop()
		second.start(t, l, "h2", "--join", "192.168.1.11")
		second.says(t, "192.168.1.11:7946", st.Cluster.ID, other.Cluster.ID, "never merge", "--state-dir")
		first.says(t, "192.168.1.12", st.Cluster.ID, other.Cluster.ID, "never merge", "--join")
		if st := second.ready(t); st.Cluster.ID != other.Cluster.ID || st.Cluster.Members != 1 {
			t.Errorf("the clusters have merged: %+v", st.Cluster)
		}
	})
}
