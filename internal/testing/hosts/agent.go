package hosts

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/api"
)

// Agent is an agent that was started on a host.
type Agent struct {
	Host   *Host
	Client *api.Client

	cmd    *exec.Cmd
	socket string
	log    string
	ended  chan struct{} // closed when the process is gone
}

// Agent starts an agent, named like the host unless args name it otherwise. It keeps its state in the host's folder, where a
// later one finds it again.
func (h *Host) Agent(args ...string) *Agent {
	h.net.t.Helper()
	return h.AgentOf(h.net.program, args...)
}

// AgentOf is Agent with another build of the program.
func (h *Host) AgentOf(program string, args ...string) *Agent {
	n := h.net
	n.t.Helper()
	h.starts++
	a := &Agent{Host: h, socket: filepath.Join(h.dir, "s"), log: filepath.Join(h.dir, fmt.Sprintf("log%d", h.starts)), ended: make(chan struct{})}
	a.Client = api.NewClient(a.socket)
	log, err := os.Create(a.log)
	n.check(err)
	defer log.Close()
	line := append(slices.Clone(h.Wrap), program, "agent", "--node-name", h.Name, "--state-dir", h.StateDir(), "--socket", a.socket, "--metrics", "off")
	line = append(line, args...)
	a.cmd = exec.Command(line[0], line[1:]...)
	a.cmd.Dir, a.cmd.Stdout, a.cmd.Stderr = h.dir, log, log
	n.check(h.start(a.cmd))
	go func() { // ends with the process
		_ = a.cmd.Wait()
		close(a.ended)
	}()
	n.t.Cleanup(a.clean)
	return a
}

// clean ends the agent and looks at what it logged.
func (a *Agent) clean() {
	t := a.Host.net.t
	if !a.end(syscall.SIGTERM, patience) {
		a.Kill()
		t.Errorf("the agent of %s did not end within %v of SIGTERM", a.Host.Name, patience)
	}
	log := a.Log()
	for _, bad := range []string{"DATA RACE", "panic:", "fatal error:"} {
		if strings.Contains(log, bad) {
			t.Errorf("%s in the log of %s", bad, a.Host.Name)
		}
	}
	if t.Failed() {
		const most = 6000 // bytes
		t.Logf("the log of %s:\n%s", a.Host.Name, log[max(0, len(log)-most):])
	}
}

// Stop ends the agent as systemd does.
func (a *Agent) Stop() {
	a.Host.net.t.Helper()
	if !a.end(syscall.SIGTERM, patience) {
		a.Host.net.t.Fatalf("the agent of %s did not end within %v of SIGTERM", a.Host.Name, patience)
	}
}

// Kill ends the agent with SIGKILL.
func (a *Agent) Kill() { a.end(syscall.SIGKILL, time.Minute) }

// Signal sends a signal (SIGSTOP, SIGCONT, SIGHUP …).
func (a *Agent) Signal(sig syscall.Signal) {
	a.Host.net.t.Helper()
	a.Host.net.check(a.cmd.Process.Signal(sig))
}

// Hostname gives the agent's host another name. Its agent must have a UTS namespace of its own (Wrap: unshare --uts).
func (a *Agent) Hostname(name string) {
	a.Host.net.t.Helper()
	out, err := exec.Command("nsenter", "--uts", "--target", fmt.Sprint(a.cmd.Process.Pid), "hostname", name).CombinedOutput()
	if err != nil {
		a.Host.net.t.Fatalf("hostname %s: %v: %s", name, err, out)
	}
}

func (a *Agent) end(sig syscall.Signal, limit time.Duration) bool {
	_ = a.cmd.Process.Signal(sig) // it may have ended
	return a.hasEnded(limit)
}

func (a *Agent) hasEnded(limit time.Duration) bool {
	select {
	case <-a.ended:
		return true
	default:
	}
	select {
	case <-a.ended:
		return true
	case <-time.After(limit):
		return false
	}
}

// Ended waits until the agent has ended by itself, and returns its exit code and what it logged.
func (a *Agent) Ended(limit time.Duration) (code int, log string) {
	a.Host.net.t.Helper()
	Within(a.Host.net.t, limit, "the agent of "+a.Host.Name+" has ended", func() error {
		if !a.hasEnded(0) {
			return fmt.Errorf("it runs: %s", a.Problems())
		}
		return nil
	})
	return a.cmd.ProcessState.ExitCode(), a.Log()
}

// Ready waits until the agent says that it is ready, and returns how long that took.
func (a *Agent) Ready(limit time.Duration) time.Duration {
	a.Host.net.t.Helper()
	return Within(a.Host.net.t, limit, a.Host.Name+" is ready", a.NotReady)
}

// NotReady is nil if the agent is ready, else it says why not.
func (a *Agent) NotReady() error {
	st, err := a.TryStatus()
	if err != nil {
		return err
	}
	if !st.Ready {
		return fmt.Errorf("not ready: %s", problems(&st))
	}
	return nil
}

// patience is how long an agent may take to answer on a busy machine, or to end.
const patience = 20 * time.Second

// TryStatus asks the agent for its status.
func (a *Agent) TryStatus() (api.Status, error) {
	if a.hasEnded(0) {
		log := strings.TrimSpace(a.Log())
		return api.Status{}, fmt.Errorf("it has ended: %s", log[strings.LastIndexByte(log, '\n')+1:])
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return a.Client.Status(ctx)
}

// Status is TryStatus that ends the test if there is none.
func (a *Agent) Status() api.Status {
	a.Host.net.t.Helper()
	st, err := a.TryStatus()
	if err != nil {
		a.Host.net.t.Fatalf("status of %s: %v", a.Host.Name, err)
	}
	return st
}

// Problems is what the agent finds wrong, in one line with the remedies; "" if nothing, and the error if it does not answer.
func (a *Agent) Problems() string {
	st, err := a.TryStatus()
	if err != nil {
		return err.Error()
	}
	return problems(&st)
}

// NoProblems waits until these agents find nothing wrong.
func NoProblems(t testing.TB, when string, agents ...*Agent) {
	t.Helper()
	for _, a := range agents {
		Within(t, 20*time.Second, when+": no problems of "+a.Host.Name, func() error {
			if p := a.Problems(); p != "" {
				return fmt.Errorf("problems: %s", p)
			}
			return nil
		})
	}
}

func problems(st *api.Status) string {
	var all []string
	for _, p := range st.Problems {
		all = append(all, p.What+" ("+p.Remedy+")")
	}
	return strings.Join(all, "; ")
}

// Socket is the path of the agent's control socket.
func (a *Agent) Socket() string { return a.socket }

// Log is what the agent has logged since it was started.
func (a *Agent) Log() string {
	b, err := os.ReadFile(a.log)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// Tulle runs the command line against the agent, and returns what it prints and its exit code.
func (a *Agent) Tulle(args ...string) (stdout, stderr string, code int) {
	t := a.Host.net.t
	t.Helper()
	var out, errOut bytes.Buffer
	cmd := exec.CommandContext(t.Context(), a.Host.net.program, append(args, "--socket", a.socket)...)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := a.Host.start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
		t.Fatalf("%v: %v", cmd, err)
	}
	return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
}
