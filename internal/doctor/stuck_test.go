package doctor_test

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/doctor"
	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// TestAgentStuckOrDead: an agent that takes connections and does not answer has to be restarted; one that is dead on a host that is in a cluster has
// to be started. Neither is a host where none has been yet.
func TestAgentStuckOrDead(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	h := n.Host("h")
	sw := n.Switch()
	h.Plug(sw, "eth0", "10.0.1.11/24")
	a := h.Agent("--bootstrap")
	a.Ready(20 * time.Second)
	p := at(t, n, h, a, "--state-dir", h.StateDir())

	a.Signal(syscall.SIGSTOP)
	if f := p.finds("agent", doctor.Failed, "did not answer in time", "restart it"); f.Command != "systemctl restart tulle" {
		t.Errorf("the command for an agent that is stuck is %q", f.Command)
	}
	p.well("ports") // they are in use by the agent itself
	a.Signal(syscall.SIGCONT)
	p.well("agent")

	q := at(t, n, h, nil, "--state-dir", h.StateDir()) // the wrong socket
	q.finds("ports", doctor.Failed, "is in use by tulle (process", "no agent listens on /nonexistent/s", "--socket")

	a.Kill()
	if f := p.finds("agent", doctor.Failed, "no agent listens on "+a.Socket(), h.StateDir()); f.Command != "systemctl start tulle" {
		t.Errorf("the command for an agent that is dead is %q", f.Command)
	}
	file := filepath.Join(h.StateDir(), "state")
	if err := os.WriteFile(file, []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	p.finds("agent", doctor.Failed, "state file "+file+": damaged", "restore the file from a backup")
	h.WipeDisk()
	p.finds("agent", doctor.Warning, "no agent listens on")

	a = h.Agent("--bootstrap")
	a.Ready(20 * time.Second)
	g := n.Host("g")
	g.Plug(sw, "eth0", "10.0.1.12/24")
	b := g.Agent("--join", "10.0.1.11")
	b.Ready(20 * time.Second)
	g.Run(n.Program(), "leave", "--socket", b.Socket())
	b.Stop()
	at(t, n, g, b, "--state-dir", g.StateDir()).finds("agent", doctor.Warning, "no agent listens on")
}
