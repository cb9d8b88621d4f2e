package config

import (
	"slices"
	"testing"
)

func TestNearest(t *testing.T) {
	words := []string{"config", "join", "mtu", "udp_port", "vni"}
	for in, want := range map[string]string{"joni": "join", "udpport": "udp_port", "udp_ports": "udp_port", "mut": "mtu", "mtu": "mtu",
		"xyz": "", "": "", "entirely_else": ""} {
		if got := Nearest(in, slices.Values(words)); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
	for _, tc := range []struct {
		a, b string
		want int
	}{{"", "abc", 3}, {"abc", "", 3}, {"kitten", "sitting", 3}, {"flaw", "lawn", 2}, {"a", "a", 0}} {
		if got := distance(tc.a, tc.b); got != tc.want {
			t.Errorf("%q to %q: %d, want %d", tc.a, tc.b, got, tc.want)
		}
	}
}
