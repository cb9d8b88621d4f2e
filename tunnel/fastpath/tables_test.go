package fastpath

import (
	"net/netip"
	"testing"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }
func prefixes(s ...string) (out []netip.Prefix) {
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

// TestBuild holds the tables against what they say about single addresses.
func TestBuild(t *testing.T) {
	s := State{
		Underlay: []netip.Addr{addr("192.0.2.1"), addr("2001:db8::1")},
		Own:      prefixes("10.1.0.0/24", "fd00:1::/64"),
		Except:   []netip.Addr{addr("10.1.0.0"), addr("fd00:1::")},
		Peers: []Peer{
			{
				ID: "a", Accept: []netip.Addr{addr("192.0.2.2")}, Prefixes: prefixes("10.2.0.0/24", "fd00:2::/64"), Except: []netip.Addr{addr("10.2.0.9")},
				Way: &Way{From: addr("192.0.2.1"), To: addr("192.0.2.2"), Link: "eth0", MTU: 1480, Port: 6081},
			},
			{ID: "b", Accept: []netip.Addr{addr("2001:db8::3"), addr("192.0.2.1")}, Prefixes: prefixes("10.3.0.0/24", "10.1.0.0/24")}, // claims what is this node's
			{ID: "c", Way: &Way{From: addr("192.0.2.1"), To: addr("192.0.2.4"), Link: "wg0", MTU: 1400}},
			{ID: "d", Way: &Way{From: addr("192.0.2.1"), To: addr("2001:db8::5"), Link: "eth0", MTU: 1400}},               // of two families
			{ID: "e", Way: &Way{From: addr("2001:db8::1"), To: addr("2001:db8::6"), Link: "eth0", MTU: 1400, Port: 6080}}, // udp over IPv6
		},
	}
	number := map[string]uint32{"a": 2, "b": 3, "c": 4, "d": 5, "e": 6}
	got := build(s, func(id string) uint32 { return number[id] }, func(link string) uint32 { return map[string]uint32{"eth0": 7}[link] })
	for p, want := range map[string]uint32{
		"10.1.0.0/24": own, "fd00:1::/64": own, "10.1.0.0/32": agent, "fd00:1::/128": agent,
		"10.2.0.0/24": 2, "fd00:2::/64": 2, "10.2.0.9/32": agent, "10.3.0.0/24": 3,
	} {
		if who, ok := got.spaces[prefixOf(netip.MustParsePrefix(p))]; !ok || who != want {
			t.Errorf("%s is %d's (%v), want %d's", p, who, ok, want)
		}
	}
	for a, want := range map[string]uint32{"192.0.2.1": own, "2001:db8::1": own, "192.0.2.2": 2, "2001:db8::3": 3} {
		if who := got.hosts[addrOf(addr(a))]; who != want {
			t.Errorf("host %s is %d's, want %d's", a, who, want)
		}
	}
	if len(got.spaces) != 12 || len(got.hosts) != 4 || len(got.counters) != 5 {
		t.Errorf("%d spaces, %d hosts, %d counters", len(got.spaces), len(got.hosts), len(got.counters))
	}
	want := programsWay{From: addrOf(addr("192.0.2.1")), To: addrOf(addr("192.0.2.2")), Link: 7, Mtu: 1480, Port: 6081}
	if len(got.ways) != 1 || got.ways[2] != want {
		t.Errorf("ways %v, want %v to 2 only", got.ways, want)
	}
}
