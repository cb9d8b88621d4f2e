package hostnet

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A setting that the operator changed after us is left as it is.
func TestRemoveKeepsOthersSysctls(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	r := h.reconciler(Options{Tun: "tun0"})
	h.setSysctl("net/ipv4/ip_forward", "1") // was so before us
	h.reconcile(r, dual())
	h.setSysctl("net/ipv4/conf/tun0/rp_filter", "1")
	h.check(r.Remove(t.Context()))
	if a, b := h.sysctl("net/ipv4/ip_forward"), h.sysctl("net/ipv4/conf/tun0/rp_filter"); a != "1" || b != "1" {
		t.Errorf("ip_forward %s, rp_filter %s, want 1 and 1", a, b)
	}
}

// The file of another boot, another namespace, or a torn one must not be written to /proc/sys.
func TestSysctlFileOfAnotherPlace(t *testing.T) {
	a, b := newHost(t), newHost(t)
	a.tun("tun0")
	o := Options{Tun: "tun0", SysctlFile: filepath.Join(t.TempDir(), "s.json")}
	a.reconcile(a.reconciler(o), dual())
	b.setSysctl("net/ipv4/ip_forward", "1")
	b.check(b.reconciler(o).Remove(t.Context()))
	if got := b.sysctl("net/ipv4/ip_forward"); got != "1" {
		t.Errorf("another namespace's file was applied: ip_forward %s", got)
	}
}

func TestKeepsRouterAdvertisements(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	h.device("eth0", "2001:db8::1/64")
	h.device("eth1", "2001:db8:1::1/64")
	h.setSysctl("net/ipv6/conf/eth0/accept_ra", "1")
	h.setSysctl("net/ipv6/conf/eth1/accept_ra", "1")
	h.route("::/0", "2001:db8::254", "eth0", 1024, unix.RTPROT_RA)
	r := h.reconciler(Options{Tun: "tun0"})
	h.reconcile(r, dual())
	if got := h.sysctl("net/ipv6/conf/eth0/accept_ra"); got != "2" {
		t.Errorf("accept_ra of eth0 is %s, want 2", got)
	}
	if got := h.sysctl("net/ipv6/conf/eth1/accept_ra"); got != "1" {
		t.Errorf("accept_ra of eth1, without a learned default route, is %s", got)
	}
	if !slices.ContainsFunc(h.routes(), func(s string) bool { return strings.HasPrefix(s, "default") }) {
		t.Error("the default route is gone")
	}
	h.quiet(r, dual())
	h.check(r.Remove(t.Context()))
	if got := h.sysctl("net/ipv6/conf/eth0/accept_ra"); got != "1" {
		t.Errorf("accept_ra of eth0 is %s after Remove", got)
	}
}
