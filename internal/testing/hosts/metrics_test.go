package hosts_test

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// An agent that cannot serve metrics ends with one line that names the remedy, and leaves no device behind.
func TestMetricsAddressNotThere(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		flag, want string
		host       func(*hosts.Host)
	}{
		"an address of another host": {"192.0.2.77:9646", "192.0.2.77", func(*hosts.Host) {}},
		"lo is down":                 {"127.0.0.1:9646", "ip link set lo up", func(h *hosts.Host) { h.IP("addr flush dev lo", "link set lo down") }},
		"IPv6 is off":                {"[::1]:9646", "disable_ipv6", func(h *hosts.Host) { h.Sysctl("net.ipv6.conf.all.disable_ipv6", "1") }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := hosts.New(t)
			a := n.Host("a")
			a.Plug(n.Switch(), "eth0", "10.0.1.11/24")
			c.host(a)
			code, log := a.Agent("--bootstrap", "--underlay", "10.0.1.11", "--metrics", c.flag).Ended(20 * time.Second)
			log = strings.TrimSpace(log)
			last := log[strings.LastIndexByte(log, '\n')+1:]
			if code != 1 || !strings.HasPrefix(last, "tulle: --metrics "+c.flag) || !strings.Contains(last, c.want) || !strings.Contains(last, "off") {
				t.Errorf("ended with %d: %s", code, log)
			}
			if links := a.Run("ip", "-o", "link"); strings.Contains(links, "tun0") {
				t.Errorf("a device is left behind:\n%s", links)
			}
		})
	}
}

// SIGTERM ends the agent at once in each state.
func TestStopInEachState(t *testing.T) {
	t.Parallel()
	has := func(what string) func(*hosts.Agent) error {
		return func(a *hosts.Agent) error {
			if p := a.Problems(); !strings.Contains(p, what) {
				return fmt.Errorf("problems: %s", p)
			}
			return nil
		}
	}
	for name, c := range map[string]struct {
		addr    string
		args    []string
		reached func(*hosts.Agent) error
	}{
		"no underlay": {"", []string{"--bootstrap", "--underlay", "10.0.1.11"}, has("no underlay address yet")},
		"no seed":     {"10.0.1.11/24", []string{"--join", "10.0.1.99"}, has("10.0.1.99")},
		"ready":       {"10.0.1.11/24", []string{"--bootstrap"}, (*hosts.Agent).NotReady},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := hosts.New(t)
			a := n.Host("a")
			a.Plug(n.Switch(), "eth0", strings.Fields(c.addr)...)
			agent := a.Agent(c.args...)
			hosts.Within(t, 20*time.Second, "the state is reached", func() error { return c.reached(agent) })
			began := time.Now()
			agent.Signal(syscall.SIGTERM)
			if code, log := agent.Ended(5 * time.Second); code != 0 {
				t.Errorf("ended with %d after %v: %s", code, time.Since(began), log)
			}
		})
	}
}
