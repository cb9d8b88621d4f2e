package hosts_test

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// The router between two hosts drops every packet with a pod's address, and all reverse path filters are strict. Pods
// reach pods, and the other host by its underlay address; hosts reach pods. Everybody sees the sender's own address.
func TestPodsReachHostsOverAnyFabric(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	r, a, b := n.Host("r"), n.Host("a"), n.Host("b")
	r.Link("left", "10.0.1.1/24 fd00:1::1/64", a, "eth0", "10.0.1.11/24 fd00:1::11/64")
	r.Link("right", "10.0.2.1/24 fd00:2::1/64", b, "eth0", "10.0.2.12/24 fd00:2::12/64")
	a.IP("route add default via 10.0.1.1", "route add default via fd00:1::1")
	b.IP("route add default via 10.0.2.1", "route add default via fd00:2::1")
	for _, h := range []*hosts.Host{r, a, b} {
		h.Sysctl("net.ipv4.conf.all.rp_filter", "1")
		h.Sysctl("net.ipv4.conf.default.rp_filter", "1")
	}
	r.Sysctl("net.ipv4.ip_forward", "1")
	r.Sysctl("net.ipv6.conf.all.forwarding", "1")
	r.Run("nft", "add table inet fabric; add chain inet fabric forward { type filter hook forward priority 0; };"+
		"add rule inet fabric forward ip saddr 10.244.0.0/16 drop; add rule inet fabric forward ip daddr 10.244.0.0/16 drop;"+
		"add rule inet fabric forward ip6 saddr fd00:244::/48 drop; add rule inet fabric forward ip6 daddr fd00:244::/48 drop")
	first := a.Agent("--bootstrap", "--cluster-cidr", "10.244.0.0/16,fd00:244::/48")
	second := b.Agent("--join", "10.0.1.11")
	first.Ready(20 * time.Second)
	second.Ready(20 * time.Second)
	pa, pb := first.Pod("pa"), second.Pod("pb")
	for f, far := range []netip.Addr{netip.MustParseAddr("10.0.2.12"), netip.MustParseAddr("fd00:2::12")} {
		to := pb.Addrs[f]
		hosts.Within(t, 15*time.Second, "pods reach each other", func() error { return pa.Ping(to) })
		hosts.Within(t, 15*time.Second, "a pod reaches the other host", func() error { return pa.Ping(far) })
		if err := pa.PingOnce(far, 4000); err != nil {
			t.Errorf("fragments to the other host: %v", err)
		}
		if err := a.PingOnce(to, 56); err != nil {
			t.Errorf("host to pod: %v", err)
		}
		if from := source(t, b, netip.AddrPortFrom(far, 8080), pa.Do); from != pa.Addrs[f] {
			t.Errorf("the other host sees %v, want the pod's %v", from, pa.Addrs[f])
		}
	}
	hosts.NoProblems(t, "over any fabric", first, second)
}

// source is the address that a server of host h at the address at sees of a client, which do runs.
func source(t *testing.T, h *hosts.Host, at netip.AddrPort, do func(func() error) error) netip.Addr {
	t.Helper()
	var l net.Listener
	if err := h.Do(func() (err error) { l, err = net.Listen("tcp", at.String()); return err }); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	seen := make(chan netip.Addr, 1)
	go func() { // ends with the listener
		if c, err := l.Accept(); err == nil {
			seen <- c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
			c.Close()
		}
	}()
	err := do(func() error {
		c, err := net.DialTimeout("tcp", at.String(), 30*time.Second)
		if err != nil {
			return fmt.Errorf("dial: %w", err)
		}
		return c.Close()
	})
	if err != nil {
		t.Errorf("to %v: %v", at, err)
		return netip.Addr{}
	}
	return <-seen
}
