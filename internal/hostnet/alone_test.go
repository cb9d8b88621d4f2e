package hostnet

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A second agent of a host is known by its TUN device from the moment that it has one; what a stopped agent left, and
// other programs' devices, are none.
func TestCheckAlone(t *testing.T) {
	h := newHost(t)
	check := func(want string) {
		t.Helper()
		var err error
		h.do(func() error { err = CheckAlone("tun0"); return nil })
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	h.device("vpn0")
	h.tun("tun8") // persistent, and nobody holds it
	h.up("tun8")
	h.check(h.nl.LinkSetAlias(h.link("tun8"), Alias))
	check("")
	h.device("tun9") // up with a carrier, as a TUN device that is held
	check("")
	h.check(h.nl.LinkSetAlias(h.link("tun9"), Alias))
	check("--tun tun9")
	h.do(func() error { return CheckAlone("tun9") })
}

// A TUN device that is not the agent's is refused, also while no process uses it. One that is, or is nobody's, is taken.
func TestCheckTun(t *testing.T) {
	for _, c := range []struct {
		name string
		make func(h *host)
		want string // "": taken
	}{
		{"none", func(*host) {}, ""},
		{"bare", func(h *host) { h.tun("tun0") }, ""},
		{"bare and up", func(h *host) { h.tun("tun0"); h.up("tun0") }, ""},
		{"with an address", func(h *host) { h.tun("tun0"); h.addrs("tun0", "10.8.0.2/24") }, "10.8.0.2/24"},
		{"with an IPv6 address", func(h *host) { h.tun("tun0"); h.addrs("tun0", "fd08::2/64") }, "fd08::2/64"},
		{"with a route", func(h *host) {
			h.tun("tun0")
			h.up("tun0")
			h.route("10.99.0.0/16", "", "tun0", 0, unix.RTPROT_STATIC)
		}, "10.99.0.0/16"},
		{"with a route in another table", func(h *host) {
			h.tun("tun0")
			h.up("tun0")
			h.shell("ip route add 10.99.0.0/16 dev tun0 table 51")
		}, "10.99.0.0/16"},
		{"with an alias", func(h *host) { h.tun("tun0"); h.check(h.nl.LinkSetAlias(h.link("tun0"), "office")) }, "office"},
		{"ours", func(h *host) {
			h.tun("tun0")
			h.addrs("tun0", "10.244.1.0/32")
			h.check(h.nl.LinkSetAlias(h.link("tun0"), Alias))
		}, ""},
		{"that of an early version", func(h *host) { h.tun("tun0"); h.reconcile(h.reconciler(Options{Tun: "tun0"}), dual()) }, ""},
		{"that of an early version without peers", func(h *host) {
			h.tun("tun0")
			s := dual()
			s.Peers, s.ClusterCIDRs = nil, nil
			h.reconcile(h.reconciler(Options{Tun: "tun0"}), s)
		}, ""},
		{"of a VPN on a host with an agent", func(h *host) {
			h.tun("tulle0")
			s := dual()
			s.Tun = "tulle0"
			h.reconcile(h.reconciler(Options{Tun: "tulle0"}), s)
			h.tun("tun0")
			h.addrs("tun0", "10.8.0.2/24")
		}, "10.8.0.2/24"},
		{"another type", func(h *host) { h.device("tun0", "10.8.0.2/24") }, ""}, // the open names it
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			c.make(h)
			var err error
			h.do(func() error { err = CheckTun("tun0"); return nil })
			switch {
			case c.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case c.want != "":
				wantError(t, err, c.want, "tun0", "--tun", "ip link del tun0")
			}
		})
	}
}
