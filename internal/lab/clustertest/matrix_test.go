package clustertest

import (
	"testing"

	"github.com/tulle-net/tulle/internal/lab"
)

// TestMatrix sends everything from everywhere to everywhere, through each encapsulation over each family.
func TestMatrix(t *testing.T) {
	needRoot(t)
	needTshark(t)
	for _, tc := range []struct {
		name     string
		underlay lab.Families
		paths    string
		mtu      int // of the TUN: 1500 less the overhead
	}{
		{"udp4", lab.IPv4Only, "udp", 1472},
		{"udp6", lab.IPv6Only, "udp", 1452},
		{"vxlan4", lab.IPv4Only, "vxlan", 1450},
		{"vxlan6", lab.IPv6Only, "vxlan", 1430},
		{"ipip4", lab.IPv4Only, "ipip", 1480},
		{"ipip6", lab.IPv6Only, "ipip", 1460},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			l := up(t, tc.name, lab.Options{Underlay: tc.underlay, Paths: tc.paths})
			settled(t, l)
			for _, h := range l.Hosts() {
				st := mustStatus(t, l, h.Name)
				if st.Node.Tun.MTU != tc.mtu {
					t.Errorf("%s: MTU of the TUN is %d, want %d", h.Name, st.Node.Tun.MTU, tc.mtu)
				}
				for _, p := range st.Peers {
					if p.Path.Mode != tc.paths {
						t.Errorf("%s: the path to %s is %q, want %q", h.Name, p.Name, p.Path.Mode, tc.paths)
					}
				}
			}
			pods, hosts := pods(l), hostStations(t, l)
			pairs := allPairs(pods, hosts)
			tr := newTraffic(t, l, append(pods, hosts...))
			before := drops(t, l)

			capture := startCapture(t, l)
			tr.all(t, pairs, tc.mtu, 100<<10)
			pingAll(t, l, hosts)
			capture.check(t, tc.paths)

			tr.all(t, pairs, tc.mtu, 2<<20)
			if t.Failed() {
				return
			}
			for host, now := range drops(t, l) {
				for reason, n := range now {
					// The kernels' own router solicitations and MLD reports, and TCP that may fill a queue on a slow machine.
					if more := n - before[host][reason]; more != 0 && reason != "local_multicast" && reason != "queue_delay" {
						t.Errorf("%s dropped %d packets: %s", host, more, reason)
					}
				}
			}
		})
	}
}

// drops are the drop counters of all hosts.
func drops(t *testing.T, l *lab.Lab) map[string]map[string]uint64 {
	t.Helper()
	out := map[string]map[string]uint64{}
	for _, h := range l.Hosts() {
		st := mustStatus(t, l, h.Name)
		if len(st.Drops) == 0 {
			t.Fatalf("%s has no drop counters", h.Name)
		}
		out[h.Name] = st.Drops
		out[h.Name]["tun_drops"] = st.Counters.TunDrops
		out[h.Name]["socket_overflows"] = st.Counters.SocketOverflows
	}
	return out
}
