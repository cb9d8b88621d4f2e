package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/sys"
)

const sigKill = syscall.SIGKILL

// errTimeout is the cause of a context that Options.Timeout ended.
type errTimeout struct{ after time.Duration }

func (e errTimeout) Error() string { return fmt.Sprintf("not within %v", e.after) }

// Client returns a client of a host's agent.
func (l *Lab) Client(host string) (*api.Client, error) {
	h, err := l.Host(host)
	if err != nil {
		return nil, err
	}
	return api.NewClient(h.Socket), nil
}

// writeConfig writes the agent's configuration file. All hosts of a lab share the keys bootstrap, join and cluster_cidr,
// as the hosts of a real cluster do.
func (l *Lab) writeConfig(h *Host) error {
	o := &l.st.Options
	var b bytes.Buffer
	fmt.Fprintf(&b, "# Written by tulle lab. The agent of %s in lab %s.\n", h.Name, o.Name)
	fmt.Fprintf(&b, "node_name: %s\n", h.Name)
	fmt.Fprintf(&b, "bootstrap: %s\n", l.Hosts()[0].Name)
	fmt.Fprintf(&b, "join:\n")
	for _, p := range l.Hosts() {
		fmt.Fprintf(&b, "  - %q\n", joinAddr(&p))
	}
	fmt.Fprintf(&b, "cluster_cidr:\n")
	for _, c := range o.ClusterCIDRs {
		fmt.Fprintf(&b, "  - %q\n", c.String())
	}
	if o.Paths != "" {
		fmt.Fprintf(&b, "paths: [%s]\n", o.Paths)
	}
	fmt.Fprintf(&b, "state_dir: %s\n", filepath.Join(h.Dir, "state"))
	fmt.Fprintf(&b, "socket: %s\n", h.Socket)
	return os.WriteFile(h.Config, b.Bytes(), 0o600)
}

// joinAddr is the entry for a host in the `join` list of other hosts: its first underlay address, IPv6 in brackets.
func joinAddr(h *Host) string {
	if a := h.Underlay[0]; a.Is6() {
		return "[" + a.String() + "]"
	}
	return h.Underlay[0].String()
}

// AdoptAgent registers an agent on a host that the lab did not start, with its socket: new pods on that host get their
// addresses from it. It is for bare labs.
func (l *Lab) AdoptAgent(host, socket string) error {
	if _, err := l.Host(host); err != nil {
		return err
	}
	if !l.st.Options.Bare {
		return fmt.Errorf("the agent on %s is the lab's own", host)
	}
	return l.change(func(s *state) {
		for i := range s.Hosts {
			if s.Hosts[i].Name == host {
				s.Hosts[i].Socket, s.Hosts[i].Adopted = socket, true
			}
		}
	})
}

// hasAgent reports whether a host should have an agent.
func (l *Lab) hasAgent(h *Host) bool { return !l.st.Options.Bare || h.Adopted }

// StartAgent starts the agent of a host whose agent is not running, with additional arguments after those of the lab.
func (l *Lab) StartAgent(ctx context.Context, host string, args ...string) error {
	if l.st.Options.Bare {
		return errNoAgent
	}
	h, err := l.Host(host)
	if err != nil {
		return err
	}
	if p := (process{h.PID, h.StartTime}); p.alive() {
		return fmt.Errorf("the agent on %s is running already, as process %d", host, p.PID)
	}
	return l.startAgent(host, args...)
}

// RestartAgents stops all agents, starts them with additional arguments, and waits until they are ready and all pods reach
// each other.
func (l *Lab) RestartAgents(ctx context.Context, args ...string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, l.st.Options.Timeout, errTimeout{l.st.Options.Timeout})
	defer cancel()
	for _, h := range l.Hosts() {
		if err := l.StopAgent(ctx, h.Name, syscall.SIGTERM); err != nil {
			return err
		}
	}
	for _, h := range l.Hosts() {
		if err := l.StartAgent(ctx, h.Name, args...); err != nil {
			return err
		}
	}
	for _, h := range l.Hosts() {
		if err := l.WaitReady(ctx, h.Name); err != nil {
			return err
		}
	}
	return l.WaitPods(ctx)
}

// startAgent starts a host's agent in the host's namespace and in its own session: it outlives the process that created the lab.
func (l *Lab) startAgent(host string, args ...string) error {
	o := &l.st.Options
	h, err := l.Host(host)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(h.Dir, "state"), 0o700); err != nil {
		return err
	}
	if err := l.writeConfig(&h); err != nil {
		return err
	}
	log, err := os.OpenFile(h.Log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	argv := append([]string{"agent", "--config", h.Config}, o.ExtraAgentArgs...)
	cmd := exec.Command(o.Binary, append(argv, args...)...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = h.Dir, log, log
	cmd.Env = append(os.Environ(), labEnv+"="+o.Name)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := sys.WithNetns(h.Netns, cmd.Start); err != nil {
		return fmt.Errorf("start the agent on %s: %w", host, err)
	}
	p := process{PID: cmd.Process.Pid}
	p.Start, _, _ = procStat(p.PID)
	reaped := make(chan struct{})
	go func() { // ends when the agent does
		_ = cmd.Wait()
		close(reaped)
	}()
	return l.change(func(s *state) {
		l.waits[p] = reaped
		for i := range s.Hosts {
			if s.Hosts[i].Name == host {
				s.Hosts[i].PID, s.Hosts[i].StartTime = p.PID, p.Start
			}
		}
	})
}

// StopAgent sends sig (SIGTERM, SIGKILL) to a host's agent and waits until the process is gone. It is no error if none is running.
func (l *Lab) StopAgent(ctx context.Context, host string, sig syscall.Signal) error {
	h, err := l.Host(host)
	if err != nil {
		return err
	}
	p := process{h.PID, h.StartTime}
	if err := p.end(ctx, sig); err != nil {
		return fmt.Errorf("stop the agent on %s: %w", host, err)
	}
	l.mu.Lock()
	reaped := l.waits[p]
	delete(l.waits, p)
	l.mu.Unlock()
	if reaped != nil {
		<-reaped
	}
	return nil
}

// AgentRuns reports whether a host's agent is running.
func (l *Lab) AgentRuns(host string) bool {
	h, err := l.Host(host)
	return err == nil && process{h.PID, h.StartTime}.alive()
}

// WaitReady waits until the host's agent reports that it is ready. If the agent or ctx ends first, the error contains the end
// of the agent's log.
func (l *Lab) WaitReady(ctx context.Context, host string) error {
	h, err := l.Host(host)
	if err != nil {
		return err
	}
	c := api.NewClient(h.Socket)
	last := errors.New("its socket does not answer")
	err = sys.Poll(ctx, 20*time.Millisecond, func() (bool, error) {
		if !l.AgentRuns(host) {
			return false, errors.New("it has ended")
		}
		st, err := c.Status(ctx)
		if err != nil {
			return false, nil
		}
		if !st.Ready {
			last = errors.New(problems(&st))
		}
		return st.Ready, nil
	})
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		err = fmt.Errorf("%w: %w", context.Cause(ctx), last)
	}
	return fmt.Errorf("the agent on %s is not ready: %w", host, l.withLog(&h, err))
}

func problems(st *api.Status) string {
	if len(st.Problems) == 0 {
		return "it names no problem"
	}
	var out []string
	for _, p := range st.Problems {
		out = append(out, p.What+" ("+p.Remedy+")")
	}
	return strings.Join(out, "; ")
}

// withLog adds the end of the agent's log to an error.
func (l *Lab) withLog(h *Host, err error) error {
	const lines = 12
	b, rerr := os.ReadFile(h.Log)
	if rerr != nil || len(b) == 0 {
		return err
	}
	all := strings.Split(strings.TrimSpace(string(b)), "\n")
	all = all[max(0, len(all)-lines):]
	return fmt.Errorf("%w\nthe end of its log, %s:\n  %s", err, h.Log, strings.Join(all, "\n  "))
}
