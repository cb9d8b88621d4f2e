package hosts_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// A host's own process that calls a pod's address on another host hears at once that there is no such pod, by the tunnel and
// directly. The kernel there takes the caller, the first address of a prefix, for an anycast address of IPv6's routers, and tells such nothing.
func TestErrorsReachHosts(t *testing.T) {
	t.Parallel()
	for _, paths := range []string{"udp", "direct"} {
		t.Run(paths, func(t *testing.T) {
			t.Parallel()
			n := hosts.New(t)
			sw, a, b := n.Switch(), n.Host("a"), n.Host("b")
			a.Plug(sw, "eth0", "10.0.1.11/24", "fd00:1::11/64")
			b.Plug(sw, "eth0", "10.0.1.12/24", "fd00:1::12/64")
			first := a.Agent("--bootstrap", "--underlay", "eth0", "--paths", paths, "--cluster-cidr", "10.244.0.0/16,fd00:244::/48")
			first.Ready(20 * time.Second)
			second := b.Agent("--join", "10.0.1.11", "--paths", paths)
			second.Ready(20 * time.Second)
			pod := second.Pod("pod")
			for _, addr := range pod.Addrs {
				hosts.Within(t, 40*time.Second, "from host a to the pod", func() error { return a.Ping(addr) })
			}
			for _, addr := range pod.Addrs {
				to := netip.AddrPortFrom(addr.Next(), 9)
				hosts.Within(t, 20*time.Second, "host a hears that there is no "+addr.Next().String(), func() error {
					return a.Do(func() error {
						c, err := net.DialTimeout("tcp", to.String(), 2*time.Second)
						if err == nil {
							_ = c.Close()
						}
						if !errors.Is(err, syscall.EHOSTUNREACH) && !errors.Is(err, syscall.ENETUNREACH) {
							return fmt.Errorf("dial %v: %w", to, err)
						}
						return nil
					})
				})
			}
		})
	}
}
