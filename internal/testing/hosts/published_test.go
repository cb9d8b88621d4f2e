package hosts_test

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// A port of a host that leads to a pod there (hostPort, docker -p) is reached from other hosts, whose pods are reached through the tunnel: the
// answers leave as the packets of the host that was called, and the pod sees who calls.
func TestPublishedPort(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw, a, b := n.Switch(), n.Host("a"), n.Host("b")
	a.Plug(sw, "eth0", "10.0.1.11/24", "fd00:1::11/64")
	b.Plug(sw, "eth0", "10.0.1.12/24", "fd00:1::12/64")
	first := a.Agent("--bootstrap", "--underlay", "eth0", "--paths", "udp", "--cluster-cidr", "10.244.0.0/16,fd00:244::/48")
	first.Ready(20 * time.Second)
	second := b.Agent("--join", "10.0.1.11", "--paths", "udp")
	second.Ready(20 * time.Second)
	pod := first.Pod("pod")
	var listener net.Listener
	if err := pod.Do(func() (err error) {
		listener, err = net.Listen("tcp", ":80")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			caller := netip.MustParseAddrPort(c.RemoteAddr().String()).Addr().Unmap()
			_, _ = fmt.Fprint(c, caller)
			_ = c.Close()
		}
	}()
	a.Run("nft", `table inet ports {
		chain pre {
			type nat hook prerouting priority dstnat;
			ip daddr 10.0.1.11 tcp dport 8080 dnat ip to `+pod.IPv4().String()+`:80
			ip6 daddr fd00:1::11 tcp dport 8080 dnat ip6 to [`+pod.IPv6().String()+`]:80
		}
	}`)
	call := func(h *hosts.Host, to, from string) error {
		return h.Do(func() error {
			c, err := net.DialTimeout("tcp", net.JoinHostPort(to, "8080"), 2*time.Second)
			if err != nil {
				return err
			}
			defer func() { _ = c.Close() }()
			_ = c.SetDeadline(time.Now().Add(5 * time.Second))
			got, err := io.ReadAll(c)
			if err == nil && string(got) != from {
				err = fmt.Errorf("the pod sees %q, not %s", got, from)
			}
			return err
		})
	}
	caller := second.Pod("caller")
	for _, addr := range pod.Addrs {
		hosts.Within(t, 40*time.Second, "the tunnel is up", func() error { return caller.Ping(addr) })
	}
	for _, c := range []struct{ to, host, pod string }{
		{"10.0.1.11", "10.0.1.12", caller.IPv4().String()}, {"fd00:1::11", "fd00:1::12", caller.IPv6().String()},
	} {
		hosts.Within(t, 20*time.Second, "host b calls "+c.to, func() error { return call(b, c.to, c.host) })
		hosts.Within(t, 20*time.Second, "a pod of b calls "+c.to, func() error { return call(caller.Host, c.to, c.pod) })
	}
	if d := first.Status().Drops["loop"]; d != 0 {
		t.Errorf("%d packets of the answers were dropped", d)
	}
	hosts.NoProblems(t, "with a published port", first, second)
}
