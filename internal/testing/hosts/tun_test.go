package hosts_test

import (
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
	"github.com/tulle-net/tulle/tunnel/device"
)

// A VPN keeps its TUN device while its process does not run. The agent refuses it by name and changes nothing of it, and so does
// `tulle cleanup`; also one made for another number of queues, which the agent could not use as it is.
func TestTunOfAnotherVPN(t *testing.T) {
	t.Parallel()
	for name, more := range map[string]string{"one queue": "", "several queues": "multi_queue"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := hosts.New(t)
			a := n.Host("a")
			a.Plug(n.Switch(), "eth0", "10.0.1.11/24")
			a.IP("tuntap add tun0 mode tun "+more, "addr add 10.8.0.2/24 dev tun0", "link set tun0 mtu 1420 up", "route add 10.99.0.0/16 via 10.8.0.1 dev tun0")
			state := func() string {
				return a.Run("ip", "addr", "show", "dev", "tun0") + a.Run("ip", "route", "show", "dev", "tun0") + a.GetSysctl("net.ipv4.conf.tun0.rp_filter")
			}
			before := state()
			agent := a.Agent("--bootstrap", "--underlay", "eth0")
			if code, log := agent.Ended(20 * time.Second); code == 0 || !strings.Contains(log, "--tun") || !strings.Contains(log, "ip link del tun0") {
				t.Errorf("ended with %d: %s", code, log)
			}
			if out, errs, code := agent.Tulle("cleanup"); code == 0 || !strings.Contains(errs, "--tun") {
				t.Errorf("cleanup ended with %d: %s %s", code, out, errs)
			}
			if out, _ := a.TryRun(n.Program(), "doctor", "tun", "--socket", agent.Socket()); !strings.Contains(out, "not Tulle's") {
				t.Errorf("doctor: %s", out)
			}
			if _, err := a.TryRun(n.Program(), "doctor", "forwarding", "--fix", "--socket", agent.Socket()); err != nil {
				t.Error(err)
			}
			if is := state(); is != before {
				t.Errorf("tun0 was\n%s\nand is\n%s", before, is)
			}
			other := a.Agent("--bootstrap", "--underlay", "eth0", "--tun", "tulle0")
			other.Ready(20 * time.Second)
			if is := state(); is != before {
				t.Errorf("with --tun tulle0: tun0 was\n%s\nand is\n%s", before, is)
			}
		})
	}
}

// The agent takes its own device again after it was killed, also one that has lost its mark, as early versions left it, and a
// device that somebody has made for it.
func TestOwnTunAgain(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	a := n.Host("a")
	a.Plug(n.Switch(), "eth0", "10.0.1.11/24")
	a.IP("tuntap add tun0 mode tun", "link set tun0 up")
	first := a.Agent("--bootstrap", "--underlay", "eth0")
	first.Ready(20 * time.Second)
	first.Kill()
	second := a.Agent("--underlay", "eth0")
	second.Ready(20 * time.Second)
	second.Kill()
	a.Run("ip", "link", "set", "dev", "tun0", "alias", "")
	last := a.Agent("--underlay", "eth0")
	last.Ready(20 * time.Second)
	if links := a.Run("ip", "link", "show", "dev", "tun0"); !strings.Contains(links, "alias tulle") {
		t.Errorf("the device has no mark: %s", links)
	}
}

// While the VPN's process runs, its device is in use, and the error says so.
func TestTunInUse(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	a := n.Host("a")
	a.Plug(n.Switch(), "eth0", "10.0.1.11/24")
	var vpn *device.Device
	if err := a.Do(func() (err error) { vpn, err = device.Open(device.Options{Name: "tun0", MTU: 1420}); return err }); err != nil {
		t.Fatal(err)
	}
	defer vpn.Close()
	a.IP("addr add 10.8.0.2/24 dev tun0")
	if code, log := a.Agent("--bootstrap", "--underlay", "eth0").Ended(20 * time.Second); code == 0 || !strings.Contains(log, "held by another process") || !strings.Contains(log, "--tun") {
		t.Errorf("ended with %d: %s", code, log)
	}
	if is := a.Run("ip", "addr", "show", "dev", "tun0"); !strings.Contains(is, "10.8.0.2/24") || !strings.Contains(is, "mtu 1420") {
		t.Errorf("tun0 is\n%s", is)
	}
}
