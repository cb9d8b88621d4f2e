package agent

import (
	"net/netip"
	"reflect"
	"testing"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/fastpath"
)

// What the kernel may carry to and from peers in all kinds of states.
func TestFastPeer(t *testing.T) {
	addr := netip.MustParseAddr
	s := &session{}
	s.link.Addrs = []netip.Addr{addr("2001:db8::1"), addr("192.0.2.1")}
	space := []netip.Prefix{netip.MustParsePrefix("10.244.63.0/24")}
	accept := []netip.Addr{addr("192.0.2.9")}
	way := fastpath.Way{From: addr("192.0.2.1"), To: addr("192.0.2.9"), Link: "eth0", MTU: 1480}
	byUDP := way
	byUDP.Port = 6080
	for _, tc := range []struct {
		name   string
		change func(p *peerView)
		accept []netip.Addr
		way    *fastpath.Way
	}{
		{"ipip", func(*peerView) {}, accept, &way},
		{"udp, and its kernel takes it", func(p *peerView) { p.mode, p.fast = encap.UDP, true }, accept, &byUDP},
		{"udp, and its kernel does not", func(p *peerView) { p.mode = encap.UDP }, accept, nil},
		{"udp over IPv6", func(p *peerView) { p.mode, p.fast, p.endpoint = encap.UDP, true, addr("2001:db8::9") }, accept, nil},
		{"vxlan", func(p *peerView) { p.mode = encap.VXLAN }, accept, nil},
		{"without an endpoint", func(p *peerView) { p.endpoint = netip.Addr{} }, accept, nil},
		{"two devices", func(p *peerView) { p.leaves = []string{"eth0", "eth1"} }, accept, nil},
		{"gone", func(p *peerView) { p.gone = true }, accept, nil},
		// Its space may lie within another peer's, as an external peer's does.
		{"replaced", func(p *peerView) { p.replaced, p.gone, p.endpoint = true, true, netip.Addr{} }, nil, nil},
	} {
		p := testPeer(1, "a", api.PeerAlive, "192.0.2.9")
		p.prefixes, p.mode, p.mtu, p.leaves, p.udpPort = space, encap.IPIP, 1480, []string{"eth0"}, 6080
		tc.change(&p)
		want := fastpath.Peer{ID: p.id, Accept: tc.accept, Prefixes: space, Way: tc.way}
		if got := s.fastPeer(&view{}, &p); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, want %+v", tc.name, got, want)
		}
	}
}
