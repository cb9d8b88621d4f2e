package agent

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/ownership"
	"github.com/tulle-net/tulle/membership"
)

func testPeer(id byte, name, state, addr string, prefixes ...string) peerView {
	p := peerView{name: name, state: state, underlay: []netip.Addr{netip.MustParseAddr(addr)}}
	p.endpoint = p.underlay[0]
	if state == api.PeerExternal {
		p.id = "external " + addr
	} else {
		p.node = membership.NodeID{id, id, id, id}
		p.id = p.node.String()
	}
	for _, s := range prefixes {
		p.prefixes = append(p.prefixes, netip.MustParsePrefix(s))
	}
	return p
}

// A host that lost its disk is another node at the same address: packets from there are the new node's, whatever the order
// in which the two come.
func TestAddressesYield(t *testing.T) {
	peers := []peerView{
		testPeer(1, "a", api.PeerDead, "192.0.2.1", "10.244.0.0/24"), // a's disk was lost
		testPeer(2, "a", api.PeerAlive, "192.0.2.1", "10.244.1.0/24"),
		testPeer(3, "a", api.PeerDead, "192.0.2.1"),                  // and once more, before it had any space
		testPeer(4, "b", api.PeerDead, "192.0.2.2", "10.244.2.0/24"), // just dead
		testPeer(5, "c", api.PeerDead, "192.0.2.9", "10.244.3.0/24"), // this host's former self
		testPeer(0, "192.0.2.6", api.PeerExternal, "192.0.2.6", "10.244.6.0/24"),
		testPeer(6, "d", api.PeerSuspect, "192.0.2.6", "10.244.4.0/24"),
	}
	for range 2 {
		slices.Reverse(peers)
		v := &view{self: "c", peers: slices.Clone(peers)}
		v.yieldAddresses([]netip.Addr{netip.MustParseAddr("192.0.2.9")})
		if len(v.peers) != 6 {
			t.Errorf("%d peers are listed, want all but the one of which nothing is left", len(v.peers))
		}
		accepted := map[netip.Addr]string{}
		for i, tp := range v.tunnelPeers() {
			p := &v.peers[i]
			keeps := p.lives() || p.name == "b"
			if p.replaced == keeps || tp.Endpoint.IsValid() != keeps || tp.Unreachable == keeps {
				t.Errorf("%s (%s): replaced %v, endpoint %v, unreachable %v, %q", p.name, p.state, p.replaced, tp.Endpoint, tp.Unreachable, p.why)
			}
			for _, a := range tp.Accept {
				if accepted[a] != "" {
					t.Errorf("%v stands for %s and for %s", a, accepted[a], tp.ID)
				}
				accepted[a] = tp.ID
			}
		}
		if len(accepted) != 3 {
			t.Errorf("accepted: %v", accepted)
		}
	}
}

func TestLivesAt(t *testing.T) {
	ours := []netip.Addr{netip.MustParseAddr("192.0.2.9")}
	v := &view{self: "self", peers: []peerView{testPeer(1, "a", api.PeerAlive, "192.0.2.1"), testPeer(2, "b", api.PeerDead, "192.0.2.2"), testPeer(0, "x", api.PeerExternal, "192.0.2.3")}}
	for text, want := range map[string]string{"192.0.2.1": "a", "192.0.2.2": "", "192.0.2.3": "", "192.0.2.9": "this node, self"} {
		if got := v.livesAt(netip.MustParseAddr(text), ours); got != want {
			t.Errorf("%s: %q, want %q", text, got, want)
		}
	}
}

func TestFindNamesakes(t *testing.T) {
	dead, alive, own := testPeer(1, "a", api.PeerDead, "192.0.2.1", "10.244.0.0/24"), testPeer(2, "a", api.PeerAlive, "192.0.2.2"), testPeer(3, "self", api.PeerDead, "192.0.2.3")
	v := &view{self: "self", status: ownership.Status{Node: membership.NodeID{9, 9, 9, 9}}, peers: []peerView{alive, dead, own, testPeer(4, "b", api.PeerAlive, "192.0.2.4")}}
	for _, tc := range []struct{ text, found, err string }{
		{"b", "04040404", ""},
		{"a", "", `"a" fits 02020202 (alive), 01010101 (dead)`},
		{"01010101", "01010101", ""},
		{"10.244.0.7", "01010101", ""},
		{"self", "", `"self" fits this node itself, 03030303 (dead)`},
		{"09090909", "", "is this node itself"},
		{"x", "", "known are: a (02020202), a (01010101), self (03030303), b"},
	} {
		p, err := v.find(tc.text)
		switch {
		case tc.err != "":
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%s: %v, %v; want %s", tc.text, p, err, tc.err)
			}
		case err != nil || p.node.Short() != tc.found:
			t.Errorf("%s: %v, %v; want %s", tc.text, p, err, tc.found)
		}
	}
	for i, want := range []string{"02020202", "01010101", "03030303", "b"} {
		if got := v.argument(&v.peers[i]); got != want {
			t.Errorf("peer %d is called %s, want %s", i, got, want)
		}
	}
	if _, err := (&view{self: "self"}).find("x"); err == nil || !strings.Contains(err.Error(), "knows no other") {
		t.Errorf("alone: %v", err)
	}
}
