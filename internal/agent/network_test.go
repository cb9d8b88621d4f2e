package agent

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/ownership"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/tunnel/encap"
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

// Since when an external peer is there is known only of those that come after the table itself.
func TestExternalTimes(t *testing.T) {
	var x externalTimes
	start := time.Unix(1000, 0)
	look := func(seconds int, phase ownership.Phase, want map[string]int) { // 0: not known
		t.Helper()
		now := start.Add(time.Duration(seconds) * time.Second)
		peers := map[netip.Addr]*peerView{}
		for text, sec := range want {
			a := netip.MustParseAddr(text)
			p := &peerView{since: x.since(a, now)}
			peers[a] = p
			if sec == 0 && !p.since.IsZero() || sec != 0 && !p.since.Equal(start.Add(time.Duration(sec)*time.Second)) {
				t.Errorf("after %d s: %s is there since %v, want second %d", seconds, text, p.since, sec)
			}
		}
		x.keep(&view{status: ownership.Status{Phase: phase}}, peers)
	}
	look(1, ownership.Waiting, map[string]int{"192.0.2.1": 0})
	look(2, ownership.Ready, map[string]int{"192.0.2.1": 0, "192.0.2.2": 0})
	look(3, ownership.Ready, map[string]int{"192.0.2.1": 0, "192.0.2.3": 3})
	look(4, ownership.Ready, map[string]int{"192.0.2.2": 4, "192.0.2.3": 3}) // the second was removed and added again
	look(5, ownership.Waiting, map[string]int{"192.0.2.3": 3, "192.0.2.4": 5})
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

// tulle forget finds peers that own nothing and that gossip does not know any more, by name and by ID; a name that a listed
// node has, too, does not lead to them.
func TestFindFormerPeers(t *testing.T) {
	id := membership.NodeID{9, 9, 9, 9}
	peers := []ipam.Peer{
		{ID: ipam.ID(id), Name: "d"},
		{ID: ipam.ID{8, 8, 8, 8}, Name: "a"},
		{ID: ipam.ID{1, 1, 1, 1}, Name: "a"}, // listed
		{ID: ipam.ID{7, 7, 7, 7}},
	}
	v := &view{self: "c", peers: []peerView{testPeer(1, "a", api.PeerAlive, "192.0.2.1", "10.244.0.0/24")}}
	former := v.withFormer(peers)
	for text, want := range map[string]string{
		"d": id.String(), "09090909": id.String(), id.String(): id.String(), "0808": "08080808" + strings.Repeat("0", 24), "07070707": "07070707" + strings.Repeat("0", 24),
		"01010101": v.peers[0].id, "10.244.0.7": v.peers[0].id,
	} {
		if p, err := former.find(text); err != nil || p.id != want {
			t.Errorf("%s: %+v, %v, want %s", text, p, err, want)
		}
	}
	if p, err := former.find("a"); err == nil || !strings.Contains(err.Error(), "fits 01010101 (alive), 08080808 (dead)") {
		t.Errorf("a: %+v, %v", p, err)
	}
	if _, err := former.find("e"); err == nil || !strings.Contains(err.Error(), "known are: a (01010101), d, a (08080808), 07070707") {
		t.Errorf("e: %v", err)
	}
	if _, err := v.find("d"); err == nil || len(v.peers) != 1 {
		t.Error("other commands find a peer that is not listed")
	}
}

func TestMembersAreCounted(t *testing.T) {
	v := &view{peers: []peerView{{state: api.PeerAlive}, {state: api.PeerSuspect}, {state: api.PeerDead}, {state: api.PeerLeft}, {state: api.PeerExternal}}}
	if all, alive := v.members(); all != 4 || alive != 3 {
		t.Errorf("%d of %d members alive, not 3 of 4", alive, all)
	}
	v.status.Phase = ownership.Left // and its agent still runs
	if all, alive := v.members(); all != 3 || alive != 2 {
		t.Errorf("%d of %d members alive without this node, not 2 of 3", alive, all)
	}
}

// Probes need a pod address of one family on both sides; where there is none, nothing is sent, and nothing is blamed.
func TestUnprobed(t *testing.T) {
	four, six := netip.MustParseAddr("10.244.0.0"), netip.MustParseAddr("fd00:244::")
	for _, tc := range []struct {
		name     string
		state    string // of the peer
		own, tun []netip.Addr
		prefixes []string
		want     string
	}{
		{"both have IPv4", api.PeerAlive, []netip.Addr{four, six}, []netip.Addr{four}, []string{"10.244.1.0/24"}, ""},
		{"both have IPv6", api.PeerAlive, []netip.Addr{six}, []netip.Addr{four, six}, []string{"10.244.1.0/24"}, ""},
		{"this node has none", api.PeerAlive, nil, []netip.Addr{four}, []string{"10.244.1.0/24"}, "this node has no pod addresses yet, so nothing is probed"},
		{"no family in common", api.PeerAlive, []netip.Addr{six}, []netip.Addr{four}, []string{"10.244.1.0/24"}, "its pod addresses [10.244.0.0] and this node's [fd00:244::] have no family in common, so nothing is probed"},
		{"the peer has no space", api.PeerAlive, []netip.Addr{four}, nil, nil, "it has no address space yet, so nothing to probe"},
		{"the peer has just joined", api.PeerAlive, []netip.Addr{four}, nil, []string{"10.244.1.0/24"}, "it has not announced its pod addresses yet, so nothing to probe"},
		{"the peer is not heard of", api.PeerDead, []netip.Addr{four}, nil, []string{"10.244.1.0/24"}, "not probed: not heard of by gossip"},
	} {
		p := testPeer(1, "a", tc.state, "192.0.2.1", tc.prefixes...)
		p.tun = tc.tun
		v := &view{tun: tc.own, peers: []peerView{p}}
		if got := v.unprobed(&v.peers[0]); got != tc.want {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
	}
}

// By which paths packets to a peer go: each family that the peer has by its own.
func TestActive(t *testing.T) {
	all := []encap.Mode{encap.Direct, encap.Direct6, encap.UDP}
	for _, tc := range []struct {
		name     string
		prefixes []string
		direct   [2]bool
		mode     encap.Mode
		main     encap.Mode
		want     []encap.Mode
	}{
		{"both direct", []string{"10.244.1.0/24", "fd00:244:0:1::/64"}, [2]bool{true, true}, encap.UDP, encap.Direct, []encap.Mode{encap.Direct, encap.Direct6}},
		{"IPv6 by udp", []string{"10.244.1.0/24", "fd00:244:0:1::/64"}, [2]bool{true, false}, encap.UDP, encap.Direct, []encap.Mode{encap.Direct, encap.UDP}},
		{"IPv4 by udp", []string{"10.244.1.0/24", "fd00:244:0:1::/64"}, [2]bool{false, true}, encap.UDP, encap.Direct6, []encap.Mode{encap.Direct6, encap.UDP}},
		{"it has no IPv6", []string{"10.244.1.0/24"}, [2]bool{true, false}, encap.UDP, encap.Direct, []encap.Mode{encap.Direct}},
		{"it has nothing yet", nil, [2]bool{}, encap.UDP, encap.UDP, []encap.Mode{encap.UDP}},
		{"direct alone, IPv6 does not pass", []string{"10.244.1.0/24", "fd00:244:0:1::/64"}, [2]bool{true, false}, encap.Direct, encap.Direct, []encap.Mode{encap.Direct, encap.Direct6}},
	} {
		p := testPeer(1, "a", api.PeerAlive, "192.0.2.1", tc.prefixes...)
		p.mode = tc.mode
		for f := range p.direct {
			p.direct[f].on = tc.direct[f]
		}
		v := &view{status: ownership.Status{Params: ownership.Params{Families: []ipam.Family{
			{CIDR: netip.MustParsePrefix("10.244.0.0/16")}, {CIDR: netip.MustParsePrefix("fd00:244::/48")}}}}}
		var got []encap.Mode
		for _, m := range all {
			if p.active(v, m) {
				got = append(got, m)
			}
		}
		if !slices.Equal(got, tc.want) || p.main(v) != tc.main {
			t.Errorf("%s: %v, mainly %v, want %v and %v", tc.name, got, p.main(v), tc.want, tc.main)
		}
	}
}

// A benchmark sends IPv4 packets unless it is asked for IPv6, or the cluster has nothing else.
func TestBenchFamily(t *testing.T) {
	for _, tc := range []struct {
		cidrs       []string
		asked, want bool
	}{
		{[]string{"10.244.0.0/16", "fd00:244::/48"}, false, false},
		{[]string{"10.244.0.0/16", "fd00:244::/48"}, true, true},
		{[]string{"10.244.0.0/16"}, false, false},
		{[]string{"fd00:244::/48"}, false, true},
		{[]string{"fd00:244::/48"}, true, true},
	} {
		v := new(view)
		for _, c := range tc.cidrs {
			v.status.Params.Families = append(v.status.Params.Families, ipam.Family{CIDR: netip.MustParsePrefix(c)})
		}
		if got := v.benchSix(tc.asked); got != tc.want {
			t.Errorf("%v, asked for IPv6: %v: sends IPv6: %v, want %v", tc.cidrs, tc.asked, got, tc.want)
		}
	}
}

// What was found on the host, and may be no pod, takes nothing from what status says of the host's addresses.
func TestStrays(t *testing.T) {
	pod, other := netip.MustParseAddr("10.244.8.7"), netip.MustParseAddr("10.244.254.7")
	list := []ipam.Allocation{{Addr: pod, Key: "tulle/tulle/web/eth0"}, {Addr: other, Key: foundKey + other.String()}}
	if got := strays(list); !slices.Equal(got, []netip.Addr{pod}) {
		t.Errorf("%v", got)
	}
}
