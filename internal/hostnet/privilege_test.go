package hostnet

import (
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// An agent has CAP_NET_ADMIN and CAP_NET_RAW and nothing else.
func TestLeastPrivileges(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	file := filepath.Join(t.TempDir(), "sysctls.json")
	// The thread has no way back, and ends with this.
	h.do(func() error {
		head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		data[0].Effective = 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW
		data[0].Permitted = data[0].Effective
		if err := unix.Capset(&head, &data[0]); err != nil {
			return err
		}
		r, err := New(Options{Tun: "tun0", SysctlFile: file})
		if err != nil {
			return err
		}
		defer r.Close()
		if _, err := r.Reconcile(t.Context(), dual()); err != nil {
			return err
		}
		h.wantRoutes(dualRoutes)
		if _, err := ForwardProblems("tun0", nil); err != nil {
			return err
		}
		return r.Remove(t.Context())
	})
	h.wantRoutes(nil)
}

// Reconcilers of several namespaces in one process, and calls at once on each, keep
// to their own namespace: sysctls are the ones that could go astray.
func TestNamespacesStayApart(t *testing.T) {
	a, b, bystander := newHost(t), newHost(t), newHost(t)
	v4 := State{Tun: "tun0", TunAddrs: ips("10.9.0.0"), ClusterCIDRs: pfx("10.9.0.0/16"), Own: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/24")}}
	var wg sync.WaitGroup
	for _, c := range []struct {
		h *host
		s State
	}{{a, dual()}, {b, v4}} {
		c.h.tun("tun0")
		r := c.h.reconciler(Options{})
		for range 8 {
			wg.Go(func() {
				if _, err := r.Reconcile(t.Context(), c.s); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	var got []string
	for _, h := range []*host{a, b, bystander} {
		got = append(got, h.sysctl("net/ipv4/ip_forward")+h.sysctl("net/ipv6/conf/all/forwarding"))
	}
	if want := []string{"11", "10", "00"}; !slices.Equal(got, want) {
		t.Errorf("forwarding of IPv4 and IPv6: %v, want %v", got, want)
	}
	a.wantRoutes(dualRoutes)
}
