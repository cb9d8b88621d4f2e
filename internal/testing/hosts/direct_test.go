package hosts_test

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// subnet makes hosts in one subnet, named a, b … at 10.0.1.11 and so on, and their agents, of which the first starts the cluster.
func subnet(t *testing.T, count int, args ...string) (hs []*hosts.Host, agents []*hosts.Agent) {
	t.Helper()
	n := hosts.New(t)
	sw := n.Switch()
	for i := range count {
		h := n.Host(string(rune('a' + i)))
		h.Plug(sw, "eth0", fmt.Sprintf("10.0.1.%d/24", 11+i))
		first := []string{"--join", "10.0.1.11"}
		if i == 0 {
			first = []string{"--bootstrap", "--cluster-cidr", "10.244.0.0/16"}
		}
		hs, agents = append(hs, h), append(agents, h.Agent(append(first, args...)...))
	}
	for _, a := range agents {
		a.Ready(20 * time.Second)
	}
	return hs, agents
}

// goes is nil once packets to a peer go by a path.
func goes(a *hosts.Agent, peer, mode string) error {
	p, err := peerOf(a, peer)
	if err == nil && (p.Path.Mode != mode || p.Path.State != api.PathUp) {
		err = fmt.Errorf("%s to %s: %s is %s (%s)", a.Host.Name, peer, p.Path.Mode, p.Path.State, p.Path.Reason)
	}
	return err
}

func peerOf(a *hosts.Agent, name string) (api.Peer, error) {
	st, err := a.TryStatus()
	for _, p := range st.Peers {
		if p.Name == name {
			return p, nil
		}
	}
	if err == nil {
		err = fmt.Errorf("%s does not know %s", a.Host.Name, name)
	}
	return api.Peer{}, err
}

// Packets that the kernels forward directly count for the peer, each once, also while they take the tunnel for a time, and probes do not.
func TestDirectTrafficCounts(t *testing.T) {
	t.Parallel()
	hs, agents := subnet(t, 2)
	pa, pb := agents[0].Pod("pa"), agents[1].Pod("pb")
	var to *net.UDPConn
	if err := pb.Do(func() (err error) {
		to, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(pb.IPv4(), 7000)))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	send := func(n int) {
		t.Helper()
		var from net.Conn
		if err := pa.Do(func() (err error) {
			from, err = net.Dial("udp4", netip.AddrPortFrom(pb.IPv4(), 7000).String())
			return err
		}); err != nil {
			t.Fatal(err)
		}
		defer from.Close()
		buf := make([]byte, 100)
		for i := range n { // one after the other: none is lost, none is joined to another
			if _, err := from.Write(buf); err != nil {
				t.Fatal(err)
			}
			_ = to.SetReadDeadline(time.Now().Add(5 * time.Second))
			if _, err := to.Read(buf); err != nil {
				t.Fatalf("datagram %d: %v", i, err)
			}
		}
	}
	const n, size = 50, 128
	check := func(when string, before [2]api.Peer, direct uint64) {
		t.Helper()
		hosts.Within(t, 5*time.Second, when, func() error {
			after, before := [2]api.Peer{}, before
			for i, name := range []string{"b", "a"} {
				var err error
				if after[i], err = peerOf(agents[i], name); err != nil {
					return err
				}
			}
			tx, rx := after[0].TxPackets-before[0].TxPackets, after[1].RxPackets-before[1].RxPackets
			txBytes, rxBytes := after[0].TxBytes-before[0].TxBytes, after[1].RxBytes-before[1].RxBytes
			if tx != n || rx != n || txBytes != n*size || rxBytes != n*size {
				return fmt.Errorf("%s: %d packets and %d bytes sent, %d and %d received, want %d and %d", when, tx, txBytes, rx, rxBytes, n, n*size)
			}
			if c := agents[0].Status().Counters; c.DirectTxPackets != direct {
				return fmt.Errorf("%s: %d packets directly, want %d", when, c.DirectTxPackets, direct)
			}
			return nil
		})
	}
	now := func() (out [2]api.Peer) {
		t.Helper()
		for i, name := range []string{"b", "a"} {
			var err error
			if out[i], err = peerOf(agents[i], name); err != nil {
				t.Fatal(err)
			}
		}
		return out
	}
	both := func(mode string) {
		t.Helper()
		hosts.Within(t, 30*time.Second, "packets go by "+mode, func() error {
			if err := goes(agents[0], "b", mode); err != nil {
				return err
			}
			return goes(agents[1], "a", mode)
		})
	}
	both("direct")
	send(1) // neighbours are found
	already := agents[0].Status().Counters.DirectTxPackets
	before := now()
	send(n)
	check("directly", before, already+n)
	hs[1].Run("nft", "add table inet t; add chain inet t c { type filter hook prerouting priority -300; }; add rule inet t c iifname eth0 ip saddr 10.244.0.0/16 drop")
	both("udp")
	before = now()
	send(n)
	check("through the tunnel", before, already+n)
	hs[1].Run("nft", "delete table inet t")
	both("direct")
	before = now()
	send(n)
	check("directly again", before, already+2*n)
}

// A rule that masquerades whatever leaves by the uplink, made while packets go directly: probes must not go on as the old connection that no rule
// changes, while each new connection of a pod is translated. Packets take the tunnel, in which pods keep their addresses.
func TestMasqueradeOfTheHostComesLater(t *testing.T) {
	t.Parallel()
	hs, agents := subnet(t, 2)
	pa, pb := agents[0].Pod("pa"), agents[1].Pod("pb")
	direct := func() error { return goes(agents[0], "b", "direct") }
	hosts.Within(t, 20*time.Second, "direct", direct)
	hs[0].Run("nft", "add table ip nat; add chain ip nat post { type nat hook postrouting priority 100; }; add rule ip nat post oifname eth0 masquerade")
	hosts.Within(t, 20*time.Second, "not direct with the rule", func() error { return goes(agents[0], "b", "udp") })
	var ln net.Listener
	if err := pb.Do(func() (err error) {
		ln, err = net.Listen("tcp4", netip.AddrPortFrom(pb.IPv4(), 7000).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if err := pa.Do(func() error {
		c, err := net.DialTimeout("tcp4", ln.Addr().String(), 10*time.Second)
		if err == nil {
			err = c.Close()
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if seen := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); seen != pa.IPv4() {
		t.Errorf("the other pod sees %v, want %v", seen, pa.IPv4())
	}
	hs[0].Run("nft", "add rule ip nat post masquerade")
	hosts.Within(t, 10*time.Second, "a names the rule that changes what goes through the tunnel", func() error {
		if p := agents[0].Problems(); !strings.Contains(p, "rule 2 of nftables chain ip nat post translates") {
			return fmt.Errorf("problems: %s", p)
		}
		return nil
	})
	hs[0].Run("nft", "delete table ip nat")
	hosts.Within(t, 90*time.Second, "direct without the rules", direct)
	hosts.NoProblems(t, "without the rules", agents...)
}

// Somebody's bridge has the name of the device for direct probes: it stays as it is, packets take the tunnel, and what is said about it helps.
func TestDirectDeviceIsSomebodyElses(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw, a, b := n.Switch(), n.Host("a"), n.Host("b")
	a.Plug(sw, "eth0", "10.0.1.11/24")
	b.Plug(sw, "eth0", "10.0.1.12/24")
	a.IP("link add tulle-direct type bridge", "addr add 192.168.77.1/24 dev tulle-direct")
	first := a.Agent("--bootstrap", "--cluster-cidr", "10.244.0.0/16", "--underlay", "eth0")
	first.Ready(20 * time.Second)
	second := b.Agent("--join", "10.0.1.11")
	second.Ready(20 * time.Second)
	web, db := first.Pod("web"), second.Pod("db")
	hosts.Within(t, 10*time.Second, "from pod to pod", func() error { return web.Ping(db.IPv4()) })
	hosts.Within(t, 20*time.Second, "tulle peers says why", func() error {
		if out, _, _ := first.Tulle("peers"); !strings.Contains(out, "type bridge has this name: give that one another name") || strings.Contains(out, "--tun") {
			return fmt.Errorf("tulle peers: %s", out)
		}
		return nil
	})
	if out := a.Run("ip", "addr", "show", "tulle-direct"); !strings.Contains(out, "192.168.77.1/24") {
		t.Errorf("the bridge: %s", out)
	}
}
