package hostnet

import (
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// TestDirectCounts sends to and from a peer's prefix beside the tunnel and compares the counters with what was sent, over changes of
// the table, a second Reconciler, and its own probes, which do not count.
func TestDirectCounts(t *testing.T) {
	pod, node, peer, far := newHost(t), newHost(t), newHost(t), newHost(t)
	node.tun("tun0")
	node.tun(DirectDevice)
	connect(pod, "eth0", []string{"10.244.1.5/24", "fd00:244:0:1::5/64"}, node, "pods", []string{"10.244.1.1/24", "fd00:244:0:1::1/64"})
	connect(node, "eth0", []string{"192.0.2.1/24", "2001:db8::1/64"}, peer, "eth0", []string{"192.0.2.2/24", "2001:db8::2/64"})
	connect(peer, "pods", []string{"10.244.2.1/24", "fd00:244:0:2::1/64"}, far, "eth0", []string{"10.244.2.5/24", "fd00:244:0:2::5/64"})
	way := func(h *host, v4, v6 string) {
		h.route("0.0.0.0/0", v4, "eth0", 0, unix.RTPROT_STATIC)
		h.route("::/0", v6, "eth0", 1024, unix.RTPROT_STATIC)
	}
	way(pod, "10.244.1.1", "fd00:244:0:1::1")
	way(peer, "192.0.2.1", "2001:db8::1")
	way(far, "10.244.2.1", "fd00:244:0:2::1")
	peer.setSysctl("net/ipv4/ip_forward", "1")
	peer.setSysctl("net/ipv6/conf/all/forwarding", "1")
	far.echo("10.244.2.5:99")
	far.echo("[fd00:244:0:2::5]:99")

	s := dual()
	s.Members = ips("192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2")
	s.Direct, s.ProbeAddrs = DirectDevice, ips("10.244.1.255", "fd00:244:0:1:ffff:ffff:ffff:ffff")
	s.Peers = []PeerRoute{
		{Prefix: netip.MustParsePrefix("10.244.2.0/24"), Via: s.Members[1], Device: "eth0"},
		{Prefix: netip.MustParsePrefix("10.244.3.0/24"), Via: s.Members[1], Device: "eth0"}, // a neighbour, which must not be joined to it
		{Prefix: netip.MustParsePrefix("fd00:244:0:2::/64"), Via: s.Members[3], Device: "eth0"},
		{Prefix: netip.MustParsePrefix("fd00:244:0:3::/64"), Via: s.Members[3], Device: "eth0"},
	}
	r := node.reconciler(Options{})
	node.reconcile(r, s)
	node.quiet(r, s)
	get := func() map[netip.Prefix]Counts {
		t.Helper()
		c, err := r.DirectCounts()
		node.check(err)
		return c
	}
	var want [2]Counts
	exchange := func() {
		t.Helper()
		before := get()
		for i, to := range []string{"10.244.2.5:99", "[fd00:244:0:2::5]:99"} {
			seen, err := pod.ask("", to)
			node.check(err)
			header, answer := uint64(28), uint64(len(netip.AddrPortFrom(seen, 65535).String()))
			if i == 1 {
				header = 48
			}
			was := before[s.Peers[2*i].Prefix]
			var got Counts
			var tx, rx uint64
			for began := time.Now(); ; time.Sleep(time.Millisecond) { // a question that was repeated has more answers
				got = get()[s.Peers[2*i].Prefix]
				if tx, rx = got.TxPackets-was.TxPackets, got.RxPackets-was.RxPackets; tx == rx || time.Since(began) > 20*time.Second {
					break
				}
			}
			if tx == 0 || rx == 0 || got.TxBytes-was.TxBytes != tx*(header+1) || got.RxBytes-was.RxBytes > rx*(header+answer) || got.RxBytes-was.RxBytes < rx*(header+answer-4) {
				t.Errorf("to %s: %+v, before %+v", to, got, was)
			}
			want[i] = got
		}
	}
	same := func(when string) {
		t.Helper()
		got := get()
		for i := range want {
			if got[s.Peers[2*i].Prefix] != want[i] || got[s.Peers[2*i+1].Prefix] != (Counts{}) {
				t.Errorf("%s: %+v, want %+v", when, got, want)
			}
		}
	}
	exchange()
	same("at rest")
	s.Peers = append(s.Peers, PeerRoute{Prefix: netip.MustParsePrefix("10.244.4.0/22")}, PeerRoute{Prefix: netip.MustParsePrefix("fd00:244:0:4::/62")})
	node.reconcile(r, s)
	same("with another peer")
	exchange()
	s.Masquerade = !s.Masquerade
	node.reconcile(r, s) // a new table
	same("in a new table")
	exchange()
	all := s.Peers
	s.Peers = s.Peers[4:]
	node.reconcile(r, s)
	s.Peers = all
	same("when the peers have gone")
	node.reconcile(r, s)
	same("when they are back")
	exchange()
	s.Peers = append([]PeerRoute(nil), all...)
	for i := range 4 { // into the tunnel: whatever counts that
		s.Peers[i].Via, s.Peers[i].Device = netip.Addr{}, ""
	}
	node.reconcile(r, s)
	pod.do(func() error {
		c, err := net.Dial("udp", "10.244.2.5:99")
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("?"))
		return err
	})
	same("through the tunnel")
}

// TestNoNeedlessChains: each chain costs every packet something, so those that count direct traffic are there only where a peer can be
// reached directly.
func TestNoNeedlessChains(t *testing.T) {
	h := newHost(t)
	h.tun("tun0")
	h.tun(DirectDevice)
	h.device("eth0", "192.0.2.1/24")
	r, s := h.reconciler(Options{}), dual()
	s.Direct, s.ProbeAddrs = DirectDevice, ips("10.244.1.255")
	chains := func() (names []string) {
		h.nft(func(c *nftables.Conn) error {
			all, err := c.ListChainsOfTableFamily(nftables.TableFamilyINet)
			for _, chain := range all {
				names = append(names, chain.Name)
			}
			return err
		})
		slices.Sort(names)
		return names
	}
	without, with := []string{chainRawOut, chainPost, chainPre}, []string{chainFwd, chainIn, chainOut, chainRawOut, chainPost, chainPre}
	on := s
	on.NextHops = []NextHop{{Probe: netip.MustParseAddr("10.244.2.255"), Via: netip.MustParseAddr("192.0.2.2"), Device: "eth0"}}
	direct := s
	direct.Peers = []PeerRoute{{Prefix: netip.MustParsePrefix("10.244.2.0/24"), Via: netip.MustParseAddr("192.0.2.2"), Device: "eth0"}}
	for _, c := range []struct {
		name  string
		state State
		want  []string
	}{{"peers behind a router", s, without}, {"a peer on the link", on, with}, {"it has gone", s, without}, {"a direct route of an earlier run", direct, with}} {
		h.reconcile(r, c.state)
		if got := chains(); !slices.Equal(got, c.want) {
			t.Errorf("%s: chains %v, want %v", c.name, got, c.want)
		}
	}
}
