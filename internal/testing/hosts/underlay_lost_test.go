package hosts_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// DHCP takes the address and the default route of the first node, which has no seeds, for twelve seconds. A container engine's bridge
// is no substitute, neither for the agent that runs nor for one that starts meanwhile.
func TestUnderlayLostBesideBridge(t *testing.T) {
	for name, c := range map[string]struct{ restart, killed bool }{"first start": {}, "second start": {restart: true}, "started meanwhile": {killed: true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := hosts.New(t)
			sw, a, b, ct := n.Switch(), n.Host("a"), n.Host("b"), n.Host("ct")
			a.Plug(sw, "eth0", "10.0.1.11/24")
			b.Plug(sw, "eth0", "10.0.1.12/24")
			a.IP("route add default via 10.0.1.1", "link add docker0 type bridge", "addr add 172.17.0.1/16 dev docker0", "link set docker0 up")
			ct.Link("eth0", "172.17.0.2/16", a, "vct", "")
			a.IP("link set vct master docker0")
			first := a.Agent("--bootstrap")
			first.Ready(20 * time.Second)
			second := b.Agent("--join", "10.0.1.11")
			second.Ready(20 * time.Second)
			if c.restart {
				first.Stop()
				first = a.Agent("--bootstrap")
				first.Ready(20 * time.Second)
			}
			web, db := first.Pod("web"), second.Pod("db")
			ping := func() error { return db.Ping(web.IPv4()) }
			hosts.Within(t, 10*time.Second, "pods reach each other", ping)
			a.IP("addr del 10.0.1.11/24 dev eth0")
			if c.killed {
				first.Kill()
				first = a.Agent("--bootstrap")
				hosts.Within(t, 5*time.Second, "status says that it waits", func() error {
					if p := first.Problems(); !strings.Contains(p, "eth0 has no other address") {
						return fmt.Errorf("problems: %s", p)
					}
					return nil
				})
			} else {
				hosts.Within(t, 5*time.Second, "status names the lost address", func() error {
					if p := first.Problems(); !strings.Contains(p, "10.0.1.11") || !strings.Contains(p, "another address of eth0") {
						return fmt.Errorf("problems: %s", p)
					}
					return nil
				})
			}
			time.Sleep(12 * time.Second) // longer than gossip's patience, and the agent's
			if !c.killed {
				if err := underlayIs(first, "10.0.1.11"); err != nil {
					t.Errorf("while the address is away: %v", err)
				}
			}
			a.IP("addr add 10.0.1.11/24 dev eth0", "route add default via 10.0.1.1")
			hosts.Within(t, 20*time.Second, "pods reach each other again", ping)
			hosts.Within(t, 20*time.Second, "one cluster again", func() error { return oneCluster(first, second) })
			if err := underlayIs(first, "10.0.1.11"); err != nil {
				t.Error(err)
			}
		})
	}
}

// A host with two uplinks loses one of them, but not its address, and the route to the others leads by the other one: that takes over as soon as no
// member answers any more, before gossip has found each of them dead.
func TestUplinkFails(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	a, r := n.Host("a"), n.Host("r")
	r.Sysctl("net.ipv4.ip_forward", "1")
	a.Link("eth0", "10.0.1.11/24", r, "up0", "10.0.1.1/24")
	a.Link("eth1", "10.0.2.11/24", r, "up1", "10.0.2.1/24")
	a.IP("route add default via 10.0.1.1 metric 100", "route add default via 10.0.2.1 metric 200")
	first := a.Agent("--bootstrap")
	first.Ready(20 * time.Second)
	var others []*hosts.Agent
	for i, name := range []string{"b", "c", "d", "e"} {
		h := n.Host(name)
		h.Link("eth0", fmt.Sprintf("10.1.%d.2/24", i), r, name+"0", fmt.Sprintf("10.1.%d.1/24", i))
		h.IP(fmt.Sprintf("route add default via 10.1.%d.1", i))
		others = append(others, h.Agent("--join", "10.0.1.11"))
	}
	for _, o := range others {
		o.Ready(30 * time.Second)
	}
	hosts.Within(t, 20*time.Second, "one cluster", func() error { return oneCluster(append(others, first)...) })
	web, db := first.Pod("web"), others[0].Pod("db")
	ping := func() error { return db.Ping(web.IPv4()) }
	hosts.Within(t, 10*time.Second, "pods reach each other", ping)
	r.IP("link set up0 down")
	a.IP("route del default via 10.0.1.1")
	hosts.Within(t, time.Minute, "the other uplink is in use", func() error { return underlayIs(first, "10.0.2.11") })
	before, _, _ := strings.Cut(first.Log(), "the underlay address changes")
	if found := strings.Count(before, " as failed"); found >= len(others) {
		t.Errorf("the agent waited until gossip had found all %d others dead", found)
	}
	hosts.Within(t, 20*time.Second, "pods reach each other again", ping)
}

// The interface of the members loses its address for a while, and a default route leads elsewhere. The agent tries that way, and goes
// back when there is a route to the members again.
func TestUnderlayGoesBack(t *testing.T) {
	for name, join := range map[string][]string{"seeds": {"--join", "10.0.1.12"}, "members": nil} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := hosts.New(t)
			sw, a, b, out := n.Switch(), n.Host("a"), n.Host("b"), n.Host("out")
			a.Plug(sw, "eth0", "10.0.1.11/24")
			b.Plug(sw, "eth0", "10.0.1.12/24")
			first := a.Agent(append([]string{"--bootstrap=force"}, join...)...)
			first.Ready(30 * time.Second)
			second := b.Agent("--join", "10.0.1.11")
			second.Ready(20 * time.Second)
			web, db := first.Pod("web"), second.Pod("db")
			ping := func() error { return db.Ping(web.IPv4()) }
			hosts.Within(t, 10*time.Second, "pods reach each other", ping)
			a.Link("eth1", "192.0.2.11/24", out, "eth0", "192.0.2.1/24")
			a.IP("route add default via 192.0.2.1", "addr del 10.0.1.11/24 dev eth0")
			hosts.Within(t, 15*time.Second, "the other way is tried", func() error { return underlayIs(first, "192.0.2.11") })
			a.IP("addr add 10.0.1.11/24 dev eth0")
			hosts.Within(t, 20*time.Second, "pods reach each other again", ping)
			hosts.Within(t, 10*time.Second, "the way to the members is in use", func() error { return underlayIs(first, "10.0.1.11") })
		})
	}
}

// A host with both families loses IPv4 for good, and its seeds are IPv4 addresses: IPv6 takes over. When IPv4 is back it is used again.
func TestUnderlayLosesOneFamily(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw, a, b := n.Switch(), n.Host("a"), n.Host("b")
	a.Plug(sw, "eth0", "10.0.1.11/24", "2001:db8:1::11/64")
	b.Plug(sw, "eth0", "10.0.1.12/24", "2001:db8:1::12/64")
	first := a.Agent("--bootstrap")
	first.Ready(20 * time.Second)
	second := b.Agent("--join", "10.0.1.11")
	second.Ready(20 * time.Second)
	web, db := first.Pod("web"), second.Pod("db")
	ping := func() error { return web.Ping(db.IPv4()) }
	hosts.Within(t, 10*time.Second, "pods reach each other", ping)
	b.IP("addr del 10.0.1.12/24 dev eth0")
	hosts.Within(t, 15*time.Second, "the other family takes over", func() error { return underlayIs(second, "2001:db8:1::12") })
	hosts.Within(t, 15*time.Second, "pods reach each other by IPv6", ping)
	b.Addr("eth0", "10.0.1.12/24")
	hosts.Within(t, 10*time.Second, "both are in use", func() error { return underlayIs(second, "2001:db8:1::12", "10.0.1.12") })
	hosts.Within(t, 15*time.Second, "pods still reach each other", ping)
}

// A name server says something wrong at first, and the seed's name leads to another interface. The agent follows when it is right.
func TestSeedNameIsWrongAtFirst(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw, out, a, b := n.Switch(), n.Host("out"), n.Host("a"), n.Host("b")
	a.Plug(sw, "eth0", "10.0.1.11/24")
	b.Plug(sw, "eth0", "10.0.1.12/24")
	b.Link("eth1", "192.0.2.12/24", out, "eth0", "192.0.2.1/24")
	b.IP("route add default via 192.0.2.1")
	first := a.Agent("--bootstrap", "--underlay", "eth0")
	first.Ready(20 * time.Second)
	b.EtcHosts("198.51.100.99 node-a")
	second := b.Agent("--join", "node-a")
	hosts.Within(t, 15*time.Second, "the wrong address is followed", func() error { return underlayIs(second, "192.0.2.12") })
	b.EtcHosts("10.0.1.11 node-a")
	second.Ready(40 * time.Second)
	if err := underlayIs(second, "10.0.1.12"); err != nil {
		t.Error(err)
	}
}

// The underlay address moves to a bridge, as when a host gets virtual machines, and then the device gets another name. Nothing is wrong,
// and status shows where the address is.
func TestUnderlayMovesToBridge(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw, a, b := n.Switch(), n.Host("a"), n.Host("b")
	a.Plug(sw, "eth0", "10.0.1.11/24")
	b.Plug(sw, "eth0", "10.0.1.12/24")
	b.Sysctl("net.ipv4.conf.all.rp_filter", "1")
	first := a.Agent("--bootstrap")
	first.Ready(20 * time.Second)
	second := b.Agent("--join", "10.0.1.11")
	second.Ready(20 * time.Second)
	shows := func(device string) {
		t.Helper()
		hosts.Within(t, 10*time.Second, "status shows "+device, func() error {
			st, err := second.TryStatus()
			if err != nil {
				return err
			}
			if st.Node.Interface != device || !slices.Equal(st.Node.Links, []string{device}) {
				return fmt.Errorf("%s, packets leave by %v", st.Node.Interface, st.Node.Links)
			}
			if p := second.Problems(); p != "" {
				return fmt.Errorf("problems: %s", p)
			}
			return nil
		})
	}
	shows("eth0")
	b.IP("link add br0 type bridge", "addr flush dev eth0", "link set eth0 master br0", "link set br0 up", "addr add 10.0.1.12/24 dev br0")
	shows("br0")
	b.IP("link set br0 name bridge0")
	shows("bridge0")
}

// A host has its IPv6 by router advertisement, and its prefix changes: the old address is gone, and the default route, by the router's link-local
// address, is still there. Neither the TUN device's address nor that of a container engine's bridge, which the kernel would send from, is a
// substitute.
func TestUnderlayIPv6PrefixChanges(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw, a, b, ct := n.Switch(), n.Host("a"), n.Host("b"), n.Host("ct")
	a.Plug(sw, "eth0", "2001:db8:1::11/64")
	b.Plug(sw, "eth0", "2001:db8:1::12/64", "2001:db8:2::12/64")
	a.IP("route add default via fe80::1 dev eth0", "link add docker0 type bridge", "addr add fd00:d0c::1/64 dev docker0 nodad", "link set docker0 up")
	ct.Link("eth0", "fd00:d0c::2/64", a, "vct", "")
	a.IP("link set vct master docker0")
	second := b.Agent("--bootstrap", "--cluster-cidr", "10.244.0.0/16,fd00:244::/48", "--underlay", "2001:db8:1::12")
	second.Ready(20 * time.Second)
	first := a.Agent("--join", "[2001:db8:1::12]")
	first.Ready(20 * time.Second)
	web, db := first.Pod("web"), second.Pod("db")
	ping := func() error { return db.Ping(web.IPv6()) }
	hosts.Within(t, 10*time.Second, "pods reach each other", ping)
	a.IP("addr del 2001:db8:1::11/64 dev eth0")
	hosts.Within(t, 5*time.Second, "status names the lost address", func() error {
		if p := first.Problems(); !strings.Contains(p, "2001:db8:1::11") {
			return fmt.Errorf("problems: %s", p)
		}
		return nil
	})
	time.Sleep(10 * time.Second) // longer than the agent's patience
	if err := underlayIs(first, "2001:db8:1::11"); err != nil {
		t.Errorf("while the host has no address: %v", err)
	}
	a.Addr("eth0", "2001:db8:1::33/64")
	hosts.Within(t, 20*time.Second, "the new address takes over", func() error { return underlayIs(first, "2001:db8:1::33") })
	hosts.Within(t, 20*time.Second, "pods reach each other again", ping)
}

// A network with IPv6 only is renumbered: all hosts get addresses of a new prefix, the old ones are deprecated at the same time, and go at the same
// time. Until then each host has changed over, one after the other, so that they still find each other.
func TestUnderlayRenumbered(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw, a, b := n.Switch(), n.Host("a"), n.Host("b")
	a.Plug(sw, "eth0", "2001:db8:1::11/64")
	b.Plug(sw, "eth0", "2001:db8:1::12/64")
	for _, h := range []*hosts.Host{a, b} {
		h.IP("route add 2001:db8::/32 dev eth0") // the kernel takes away the prefix's own with the first change of the address
	}
	first := a.Agent("--bootstrap")
	first.Ready(20 * time.Second)
	second := b.Agent("--join", "[2001:db8:1::11]")
	second.Ready(20 * time.Second)
	web, db := first.Pod("web"), second.Pod("db")
	ping := func() error { return db.Ping(web.IPv4()) }
	hosts.Within(t, 10*time.Second, "pods reach each other", ping)
	a.Addr("eth0", "fd00:1::11/64") // of a prefix that reaches less far
	for h, last := range map[*hosts.Host]string{a: "11", b: "12"} {
		h.Addr("eth0", "2001:db8:2::"+last+"/64")
		h.IP("addr change 2001:db8:1::" + last + "/64 dev eth0 preferred_lft 0 valid_lft 3600")
	}
	for g, want := range map[*hosts.Agent]string{first: "2001:db8:2::11", second: "2001:db8:2::12"} {
		hosts.Within(t, 90*time.Second, "the new address is used", func() error { return underlayIs(g, want) })
	}
	hosts.Within(t, 20*time.Second, "one cluster", func() error { return oneCluster(first, second) })
	a.IP("addr del 2001:db8:1::11/64 dev eth0")
	b.IP("addr del 2001:db8:1::12/64 dev eth0")
	hosts.Within(t, 20*time.Second, "pods reach each other", ping)
	hosts.NoProblems(t, "after the old addresses have gone", first, second)
}

// DHCP is late on the first node, which has no seeds, and the bridge of a container engine has the only address. That of the default route
// takes over when it comes, also where the agent was restarted before.
func TestUnderlayGuessedAtBridge(t *testing.T) {
	for name, restart := range map[string]bool{"running": false, "restarted": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := hosts.New(t)
			sw, a, b, ct := n.Switch(), n.Host("a"), n.Host("b"), n.Host("ct")
			a.Plug(sw, "eth0")
			b.Plug(sw, "eth0", "10.0.1.12/24")
			a.IP("link add docker0 type bridge", "addr add 172.17.0.1/16 dev docker0", "link set docker0 up")
			ct.Link("eth0", "172.17.0.2/16", a, "vct", "")
			a.IP("link set vct master docker0")
			first := a.Agent("--bootstrap")
			first.Ready(20 * time.Second)
			if restart {
				first.Stop()
			}
			a.IP("addr add 10.0.1.11/24 dev eth0", "route add default via 10.0.1.1")
			if restart {
				first = a.Agent("--bootstrap")
			}
			second := b.Agent("--join", "10.0.1.11")
			second.Ready(30 * time.Second)
			if err := underlayIs(first, "10.0.1.11"); err != nil {
				t.Error(err)
			}
			web, db := first.Pod("web"), second.Pod("db")
			hosts.Within(t, 10*time.Second, "pods reach each other", func() error { return db.Ping(web.IPv4()) })
		})
	}
}

// The interface of the first node, which has no seeds and no other members, becomes a part of a bridge, to which DHCP gives another address.
func TestUnderlayBridgeHasAnotherAddress(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw, a, b := n.Switch(), n.Host("a"), n.Host("b")
	a.Plug(sw, "eth0", "10.0.1.11/24")
	b.Plug(sw, "eth0", "10.0.1.12/24")
	first := a.Agent("--bootstrap")
	first.Ready(20 * time.Second)
	a.IP("link add br0 type bridge", "addr flush dev eth0", "link set eth0 master br0", "link set br0 up", "addr add 10.0.1.57/24 dev br0")
	second := b.Agent("--join", "10.0.1.57")
	second.Ready(30 * time.Second)
	if err := underlayIs(first, "10.0.1.57"); err != nil {
		t.Error(err)
	}
}
