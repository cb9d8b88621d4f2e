package hosts_test

import (
	"net"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// An agent whose gossip port is busy ends and leaves no TUN device behind.
func TestGossipPortBusy(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw := n.Switch()
	a := n.Host("a")
	a.Plug(sw, "eth0", "10.0.1.11/24")
	var busy net.Listener
	if err := a.Do(func() (err error) { busy, err = net.Listen("tcp", "10.0.1.11:7946"); return err }); err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	code, log := a.Agent("--bootstrap", "--underlay", "eth0").Ended(20 * time.Second)
	if code == 0 || !strings.Contains(log, "7946") || !strings.Contains(log, "--gossip-port") {
		t.Errorf("ended with %d: %s", code, log)
	}
	if links := a.Run("ip", "-o", "link"); strings.Contains(links, "tun0") {
		t.Errorf("a device is left behind:\n%s", links)
	}
}

// The second agent of a host is refused also while the first one waits for its seeds and has no routes yet.
func TestSecondAgentOfAHost(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw := n.Switch()
	a := n.Host("a")
	a.Plug(sw, "eth0", "10.0.1.11/24")
	first := a.Agent("--join", "10.0.1.99")
	hosts.Within(t, 20*time.Second, "the first agent has its device", func() error {
		_, err := a.TryRun("ip", "link", "show", "tun0", "up")
		return err
	})
	second := a.Agent("--join", "10.0.1.99", "--tun", "tun1", "--socket", a.StateDir()+"-second.sock", "--state-dir", a.StateDir()+"-second",
		"--gossip-port", "7947", "--udp-port", "6081", "--vxlan-port", "4790")
	if code, log := second.Ended(20 * time.Second); code == 0 || !strings.Contains(log, "another agent runs on this host, with --tun tun0") {
		t.Errorf("the second agent ended with %d: %s", code, log)
	}
	if links := a.Run("ip", "-o", "link"); strings.Contains(links, "tun1") {
		t.Errorf("a device is left behind:\n%s", links)
	}
	first.Stop()
}
