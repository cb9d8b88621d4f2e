package hosts_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

func TestMain(m *testing.M) { os.Exit(hosts.Main(m)) }

// TestTwoHosts is an ordinary cluster in which everything that the package offers is used once.
func TestTwoHosts(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw := n.Switch()
	a, b := n.Host("a"), n.Host("b")
	a.Plug(sw, "eth0", "10.0.1.11/24", "fd00:1::11/64")
	b.Plug(sw, "eth0", "10.0.1.12/24", "fd00:1::12/64")
	b.EtcHosts("10.0.1.11 seed")
	first := a.Agent("--bootstrap", "--underlay", "eth0", "--cluster-cidr", "10.244.0.0/16,fd00:244::/48")
	first.Ready(20 * time.Second)
	second := b.Agent("--join", "seed")
	second.Ready(20 * time.Second)
	web, db := first.Pod("web"), second.Pod("db")
	for _, to := range db.Addrs {
		hosts.Within(t, 10*time.Second, "pods reach each other", func() error { return web.Ping(to) })
		hosts.Within(t, 10*time.Second, "fragments pass", func() error { return web.PingSize(to, 4000) })
		header := 28
		if to.Is6() {
			header = 48
		}
		hosts.Within(t, 10*time.Second, "a full packet passes", func() error { return web.PingDF(to, web.MTU-header) })
		if err := web.PingDF(to, web.MTU-header+1); err == nil {
			t.Errorf("a packet above the MTU of %d passed to %v", web.MTU, to)
		}
	}
	s := web.Stream(db.IPv4(), 10*time.Millisecond)
	hosts.Within(t, 10*time.Second, "a ping back", func() error { return db.Ping(web.IPv4()) })
	second.Stop()
	second = b.Agent() // what it needs is on its disk
	second.Ready(20 * time.Second)
	if sent, lost := s.Stop(); sent == 0 || lost == sent {
		t.Errorf("%d of %d pings lost over a restart", lost, sent)
	}
	hosts.NoProblems(t, "after the restart", second)
	hosts.Within(t, 10*time.Second, "tulle peers shows a path that is up", func() error {
		if out, errs, code := second.Tulle("peers"); code != 0 || !strings.Contains(out, "alive") {
			return fmt.Errorf("%d %s%s", code, out, errs)
		}
		return nil
	})
	if st := second.Status(); st.Cluster.ID != first.Status().Cluster.ID || st.Node.Name != "b" {
		t.Errorf("status %+v", st)
	}
	web.Remove()
}

// TestHost needs no agent: what a host is made of.
func TestHost(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	a, b, c := n.Host("a"), n.Host("b"), n.Host("c")
	a.LinkMTU("a-rather-longer", "10.0.1.1/30 fd00:1::1/64", b, "eth0", "10.0.1.2/30 fd00:1::2/64", 9000)
	b.Link("eth1", "10.0.2.1/24", c, "eth0", "10.0.2.2/24")
	a.IP("addr add 10.255.0.1/32 dev lo", "route add default via 10.0.1.2 src 10.255.0.1")
	b.IP("route add 10.255.0.1 via 10.0.1.1")
	c.IP("route add default via 10.0.2.1")
	far := netip.MustParseAddr("10.0.2.2")
	if err := a.Ping(far); err == nil {
		t.Error("a host forwards before it is told to")
	}
	b.Sysctl("net.ipv4.ip_forward", "1")
	if got := b.GetSysctl("net.ipv4.ip_forward"); got != "1" || a.GetSysctl("net.ipv4.ip_forward") != "0" {
		t.Errorf("ip_forward is %s", got)
	}
	hosts.Within(t, 5*time.Second, "through b", func() error { return a.Ping(far) })
	hosts.Within(t, 5*time.Second, "a jumbo frame", func() error { return a.PingDF(netip.MustParseAddr("fd00:1::2"), 9000-48) })
	cat := func() string { return a.Run("cat", "/etc/hosts", "/etc/resolv.conf") }
	a.EtcHosts("10.0.1.2 router")
	a.ResolvConf("nameserver 10.0.1.2")
	if got := cat(); got != "127.0.0.1 localhost\n10.0.1.2 router\nnameserver 10.0.1.2\n" {
		t.Errorf("in /etc: %q", got)
	}
	if out, err := a.TryRun("false"); err == nil {
		t.Errorf("a program that fails: %q", out)
	}
	agent := c.Agent("--pod-cidr", "nonsense")
	if code, log := agent.Ended(20 * time.Second); code == 0 || !strings.Contains(log, "nonsense") {
		t.Errorf("an agent with a wrong flag ended with %d: %s", code, log)
	}
}

// TestNamesAndAdvertisements: an agent that finds its seed by a name server, at an address that a router has advertised.
func TestNamesAndAdvertisements(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw := n.Switch()
	router, a, b := n.Host("router"), n.Host("a"), n.Host("b")
	router.Plug(sw, "eth0", "10.0.1.53/24")
	a.Plug(sw, "eth0", "10.0.1.11/24")
	b.Plug(sw, "eth0", "10.0.1.12/24")
	dns := router.DNS("10.0.1.53")
	b.ResolvConf("nameserver 10.0.1.53", "options timeout:1 attempts:1")
	resolve := func(wait time.Duration) ([]string, error) {
		r := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (c net.Conn, err error) {
			err = b.Do(func() (err error) {
				c, err = (&net.Dialer{}).DialContext(ctx, "udp", "10.0.1.53:53")
				return err
			})
			return c, err
		}}
		ctx, cancel := context.WithTimeout(t.Context(), wait)
		defer cancel()
		return r.LookupHost(ctx, "seed.example.")
	}
	const patience, silence = 10 * time.Second, time.Second
	notFound := func(wait time.Duration) bool {
		_, err := resolve(wait)
		e, ok := errors.AsType[*net.DNSError](err)
		return ok && e.IsNotFound
	}
	if !notFound(patience) {
		t.Error("a name that nobody has set exists")
	}
	dns.Set("seed.example", "10.0.1.11", "fd00:1::11")
	if got, err := resolve(patience); err != nil || len(got) != 2 {
		t.Errorf("seed.example is %v, %v", got, err)
	}
	for _, fault := range []func(bool){dns.Fail, dns.Hang} {
		fault(true)
		if got, err := resolve(silence); err == nil || notFound(silence) {
			t.Errorf("seed.example is %v, %v", got, err)
		}
		fault(false)
	}

	router.Sysctl("net.ipv6.conf.all.forwarding", "1")
	stop := router.Advertise("eth0", "fd00:1::/64", time.Hour)
	hosts.Within(t, 10*time.Second, "b has an advertised address and a default route", func() error {
		if out := b.Run("ip", "-6", "addr", "show", "dev", "eth0") + b.Run("ip", "-6", "route"); !strings.Contains(out, "fd00:1::") || !strings.Contains(out, "default via fe80::") {
			return errors.New(out)
		}
		return nil
	})
	stop()
	a.Agent("--bootstrap", "--underlay", "10.0.1.11").Ready(20 * time.Second)
	b.Agent("--join", "seed.example", "--underlay", "10.0.1.12").Ready(20 * time.Second)
	if dns.Asked() == 0 {
		t.Error("nobody asked the name server")
	}
}
