package hosts_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// Forwarding of the interface to the other hosts and of the one to the outside is switched off, before the agent starts and while it
// runs, as a network manager or a file of sysctls does: pods reach each other and the outside all the same, by both families, and
// `tulle cleanup` puts the settings back. An interface that the agent does not need stays as it is, and so does forwarding of IPv6,
// which the kernel does not decide by interface.
func TestForwardingOffOnOneInterface(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw := n.Switch()
	a, b, o := n.Host("a"), n.Host("b"), n.Host("o")
	a.Plug(sw, "eth0", "10.0.1.11/24")
	b.Plug(sw, "eth0", "10.0.1.12/24")
	a.Link("pub", "192.0.2.1/24", o, "eth0", "192.0.2.9/24")
	a.IP("addr add 2001:db8::1/64 dev pub nodad", "route add default via 192.0.2.9 dev pub", "route add default via 2001:db8::9 dev pub",
		"link add storage type bridge", "link set storage up")
	o.IP("addr add 2001:db8::9/64 dev eth0 nodad")
	off := func(devices ...string) {
		for _, d := range devices {
			a.Sysctl("net.ipv4.conf."+d+".forwarding", "0")
		}
	}
	a.Sysctl("net.ipv4.ip_forward", "1")
	off("eth0", "pub", "storage")
	args := []string{"--bootstrap", "--underlay", "eth0", "--cluster-cidr", "10.244.0.0/16,fd00:244::/48"}
	first := a.Agent(args...)
	first.Ready(20 * time.Second)
	second := b.Agent("--join", "10.0.1.11")
	second.Ready(20 * time.Second)
	web, db := first.Pod("web"), second.Pod("db")
	outside := []netip.Addr{netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("2001:db8::9")}
	well := func(when string) {
		t.Helper()
		for _, to := range append(outside, db.Addrs...) {
			hosts.Within(t, 10*time.Second, when+": "+to.String(), func() error { return web.Ping(to) })
		}
		hosts.Within(t, 10*time.Second, when+": directly", func() error {
			p, err := peerOf(second, "a")
			if err == nil && p.Path.Mode != "direct" {
				err = fmt.Errorf("%+v", p.Path)
			}
			return err
		})
		hosts.NoProblems(t, when, first)
	}
	well("before the agent")
	off("eth0", "pub")
	a.Sysctl("net.ipv6.conf.eth0.forwarding", "0")
	a.Sysctl("net.ipv6.conf.pub.forwarding", "0")
	well("while it runs")
	logs(t, first, "net/ipv4/conf/eth0/forwarding=1 (was: 0)", "net/ipv4/conf/pub/forwarding=1 (was: 0)")
	first.Stop()
	if out, errs, code := first.Tulle("cleanup"); code != 0 {
		t.Fatalf("cleanup: %s %s", out, errs)
	}
	for _, name := range []string{"ipv4.conf.eth0", "ipv4.conf.pub", "ipv4.conf.storage", "ipv6.conf.eth0", "ipv6.conf.pub"} {
		if got := a.GetSysctl("net." + name + ".forwarding"); got != "0" {
			t.Errorf("net.%s.forwarding is %s after cleanup", name, got)
		}
	}
}

// A hardening file switches IPv6 off for all devices while pods with IPv6 run, over an underlay of IPv4, and on again: pods go on.
func TestIPv6SwitchedOffLater(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw := n.Switch()
	a, b := n.Host("a"), n.Host("b")
	a.Plug(sw, "eth0", "10.0.1.11/24")
	b.Plug(sw, "eth0", "10.0.1.12/24")
	first := a.Agent("--bootstrap", "--underlay", "eth0", "--cluster-cidr", "10.244.0.0/16,fd00:244::/48")
	first.Ready(20 * time.Second)
	second := b.Agent("--join", "10.0.1.11")
	second.Ready(20 * time.Second)
	web, db := first.Pod("web"), second.Pod("db")
	well := func(when string) {
		t.Helper()
		for _, to := range db.Addrs {
			hosts.Within(t, 10*time.Second, when+": "+to.String(), func() error { return web.Ping(to) })
		}
		hosts.NoProblems(t, when, first)
	}
	well("at first")
	for _, value := range []string{"1", "0"} {
		a.Sysctl("net.ipv6.conf.all.disable_ipv6", value)
		well("net.ipv6.conf.all.disable_ipv6=" + value)
	}
	logs(t, first, "net/ipv6/conf/vweb/disable_ipv6=0 (was: 1)")
}

// logs waits until the agent has logged that it has repaired these settings: it says so after the repair, which pods notice at once.
func logs(t *testing.T, a *hosts.Agent, repairs ...string) {
	t.Helper()
	for _, r := range repairs {
		hosts.Within(t, 10*time.Second, "the repair is told", func() error {
			if !strings.Contains(a.Log(), r) {
				return fmt.Errorf("the log does not have %s", r)
			}
			return nil
		})
	}
}
