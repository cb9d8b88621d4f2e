package clustertest

import (
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/lab"
)

// TestExternalVXLAN gives a prefix to the router, whose kernel has a VXLAN device: pods and it reach each other, without
// anybody telling a MAC. Its routes have the hosts' tun addresses as gateways, which the agents answer for.
func TestExternalVXLAN(t *testing.T) {
	t.Parallel()
	l := up(t, "extvx", lab.Options{Overlay: lab.IPv4Only, Nodes: 2, Underlay: lab.IPv4Only})
	settled(t, l)
	const endpoint = "192.168.1.1"
	b := lastOf(mustStatus(t, l, "h1").Node.Prefixes[0]).As4()
	prefix := netip.PrefixFrom(netip.AddrFrom4([4]byte{b[0], b[1], b[2], 0}), 24)
	own := prefix.Addr().Next()
	router := func(args ...string) {
		t.Helper()
		if err := l.Do(lab.Router, func() error {
			r := run(t, exec.CommandContext(t.Context(), args[0], args[1:]...))
			if r.code != 0 {
				return fmt.Errorf("%v: %s", args, r.err)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	router("ip", "link", "add", "t0", "mtu", "1450", "type", "vxlan", "id", "1", "dstport", "4789", "local", endpoint)
	router("ip", "addr", "add", own.String()+"/32", "dev", "t0")
	router("ip", "link", "set", "t0", "up")
	for _, h := range l.Hosts() {
		st := mustStatus(t, l, h.Name)
		router("bridge", "fdb", "append", "00:00:00:00:00:00", "dev", "t0", "dst", h.Underlay[0].String())
		for _, p := range st.Node.Prefixes {
			router("ip", "route", "add", p.String(), "via", st.Node.Tun.Addresses[0].String(), "dev", "t0", "onlink", "src", own.String())
		}
	}
	e := ask[api.External](t, l, "h1", "external", "add", prefix.String(), endpoint, "--encap", "vxlan")
	if e.Encapsulation != "vxlan" || e.Port != 0 || e.MAC != "" {
		t.Errorf("added %+v", e)
	}
	until(t, "all pods and the external peer reach each other", func() error {
		for _, p := range l.Pods() {
			for _, way := range [][2]string{{p.Name, lab.Router}, {lab.Router, p.Name}} {
				to := own
				if way[1] == p.Name {
					to = p.Addr(false)
				}
				if pong := l.Ping(t.Context(), way[0], way[1], to); pong.Err != nil {
					return fmt.Errorf("%s to %v: %w", way[0], to, pong.Err)
				}
			}
		}
		return nil
	})
	for _, h := range hostNames(l) {
		p, err := peerOf(new(mustStatus(t, l, h)), endpoint)
		if err != nil || !strings.Contains(p.Path.Reason, "learned from what it sends") || p.Path.Mode != "vxlan" {
			t.Errorf("%s: %+v, %v", h, p, err)
		}
	}
	refused(t, tulle(t, l, "h1", "external", "add", prefix.String(), endpoint, "--encap", "vxlan", "--port", "4791"), "by vxlan already")
}
