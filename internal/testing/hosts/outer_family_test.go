package hosts_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// over is nil if the agent's packets to a member go to this address, and nothing is wrong.
func over(a *hosts.Agent, name, endpoint, reason string) error {
	p, err := peerOf(a, name)
	if err != nil {
		return err
	}
	if p.Reason != reason {
		return fmt.Errorf("reason %q, want %q", p.Reason, reason)
	}
	for _, c := range p.Candidates {
		if c.Mode == "udp" && c.Endpoint.Addr() != netip.MustParseAddr(endpoint) {
			return fmt.Errorf("udp to %v, want %s", c.Endpoint, endpoint)
		}
	}
	if text := a.Problems(); text != "" {
		return fmt.Errorf("problems: %s", text)
	}
	return nil
}

// Two sites: each host has a private IPv4 address that leads to nobody, and a global IPv6 address that works. Packets go over IPv6, also
// at once after a restart of the agent.
func TestPrivateIPv4GlobalIPv6(t *testing.T) {
	for name, underlay := range map[string][]string{"the host's order": nil, "another order on each side": {"192.168.1.11,2001:db8:1::11", "2001:db8:2::12,192.168.2.12"}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := hosts.New(t)
			r, a, b := n.Host("r"), n.Host("a"), n.Host("b")
			r.Link("left", "192.168.1.1/24 2001:db8:1::1/64", a, "eth0", "192.168.1.11/24 2001:db8:1::11/64")
			r.Link("right", "192.168.2.1/24 2001:db8:2::1/64", b, "eth0", "192.168.2.12/24 2001:db8:2::12/64")
			a.IP("route add default via 192.168.1.1", "route add default via 2001:db8:1::1")
			b.IP("route add default via 192.168.2.1", "route add default via 2001:db8:2::1")
			r.Sysctl("net.ipv6.conf.all.forwarding", "1")
			r.Sysctl("net.ipv4.ip_forward", "1")
			r.Run("nft", "add table ip f; add chain ip f c { type filter hook forward priority 0; policy drop; }")
			args := func(i int, more ...string) []string {
				if underlay != nil {
					more = append(more, "--underlay", underlay[i])
				}
				return more
			}
			first := a.Agent(args(0, "--bootstrap")...)
			first.Ready(20 * time.Second)
			second := b.Agent(args(1, "--join", "[2001:db8:1::11]")...)
			second.Ready(20 * time.Second)
			web, db := first.Pod("web"), second.Pod("db")
			limit, why := 15*time.Second, "over IPv6, because IPv4 was not answered"
			if underlay != nil {
				limit = 2 * time.Minute
			}
			hosts.Within(t, limit, "pods reach each other", func() error { return web.Ping(db.IPv4()) })
			hosts.Within(t, 20*time.Second, "status says so", func() error { return over(first, "b", "2001:db8:2::12", why) })
			if underlay == nil {
				hosts.Within(t, 20*time.Second, "on both sides", func() error { return over(second, "a", "2001:db8:1::11", "") })
				hosts.Within(t, 20*time.Second, "large packets", func() error { return web.PingSize(db.IPv4(), 4000) })
				first.Stop()
				first = a.Agent("--bootstrap")
				first.Ready(20 * time.Second)
				hosts.Within(t, 3*time.Second, "over IPv6 at once", func() error { return over(first, "b", "2001:db8:2::12", why) })
			}
		})
	}
}

// A firewall in one subnet drops IPv4 between two hosts that both have both families, then IPv6 instead, then both. Each time packets go by
// what is left; a family that is answered is kept.
func TestOuterFamilyFiltered(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw := n.Switch()
	var agents []*hosts.Agent
	var first *hosts.Host
	for i := range 2 {
		h := n.Host(string(rune('a' + i)))
		h.Plug(sw, "eth0", fmt.Sprintf("10.0.1.%d/24", 11+i), fmt.Sprintf("2001:db8:1::%d/64", 11+i))
		if i == 0 {
			first = h
			agents = append(agents, h.Agent("--bootstrap", "--paths", "udp,ipip"))
			agents[0].Ready(20 * time.Second)
			continue
		}
		agents = append(agents, h.Agent("--join", "10.0.1.11", "--paths", "udp,ipip"))
	}
	agents[1].Ready(20 * time.Second)
	web, db := agents[0].Pod("web"), agents[1].Pod("db")
	ping := func() error { return web.Ping(db.IPv4()) }
	hosts.Within(t, 10*time.Second, "pods reach each other", ping)
	drop := func(families ...string) {
		first.Run("nft", "add table inet t; delete table inet t; add table inet t; add chain inet t i { type filter hook input priority -300; }; add chain inet t o { type filter hook output priority -300; }")
		for _, f := range families {
			first.Run("nft", "add rule inet t i meta nfproto "+f+" meta l4proto != ipv6-icmp iifname != lo drop; add rule inet t o meta nfproto "+f+" meta l4proto != ipv6-icmp oifname eth0 drop")
		}
	}
	knows(t, 2, agents...)
	time.Sleep(2 * time.Second) // what else gossip tells has spread
	drop("ipv4")
	hosts.Within(t, 20*time.Second, "pods reach each other without IPv4", ping)
	hosts.Within(t, 20*time.Second, "status says so", func() error {
		return over(agents[0], "b", "2001:db8:1::12", "over IPv6, because IPv4 was not answered")
	})
	drop()
	s := web.Stream(db.IPv4(), 20*time.Millisecond)
	time.Sleep(3 * time.Second) // that nothing happens takes its time
	if sent, lost := s.Stop(); lost > 0 {
		t.Errorf("%d of %d pings lost when IPv4 came back", lost, sent)
	}
	drop("ipv6")
	hosts.Within(t, 20*time.Second, "pods reach each other without IPv6", ping)
	hosts.Within(t, 20*time.Second, "status is as at first", func() error { return over(agents[0], "b", "10.0.1.12", "") })
	hosts.Within(t, 20*time.Second, "on both sides", func() error { return over(agents[1], "a", "10.0.1.11", "") })
	// Gossip alone passes, so that the member stays alive: status has the problem all the time, whichever family is tried.
	first.Run("nft", "add table inet t; delete table inet t; add table inet t; add chain inet t i { type filter hook input priority -300; };"+
		"add rule inet t i udp dport 6080 drop; add rule inet t i meta l4proto { 4, 41 } drop")
	problem := func() error {
		if p := agents[1].Problems(); !strings.Contains(p, "a is alive for gossip, but") {
			return fmt.Errorf("problems: %s", p)
		}
		return nil
	}
	hosts.Within(t, 30*time.Second, "both are tried", func() error {
		p, err := peerOf(agents[1], "a")
		if err == nil && !strings.Contains(p.Reason, "tried in turn") {
			err = fmt.Errorf("reason %q", p.Reason)
		}
		return err
	})
	var seen []netip.Addr
	turns := func() int { return len(slices.Compact(slices.Clone(seen))) }
	const watch = 15 * time.Second // and longer on a machine that is slow
	for began := time.Now(); time.Since(began) < watch || turns() < 2 && time.Since(began) < 4*watch; time.Sleep(100 * time.Millisecond) {
		if err := problem(); err != nil {
			t.Fatal(err)
		}
		p, err := peerOf(agents[1], "a")
		if err != nil {
			t.Fatal(err)
		}
		if len(p.Candidates) > 0 {
			seen = append(seen, p.Candidates[0].Endpoint.Addr())
		}
	}
	if n := turns(); n < 2 || n > 7 {
		t.Errorf("%d families in turn", n)
	}
	drop()
	hosts.Within(t, 40*time.Second, "pods reach each other again", ping)
}

// A host whose agent is down for a while, and a network that fails, take both families away: the one in use stays.
func TestOuterFamilyStays(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw := n.Switch()
	a, b := n.Host("a"), n.Host("b")
	a.Plug(sw, "eth0", "10.0.1.11/24", "2001:db8:1::11/64")
	b.Plug(sw, "eth0", "10.0.1.12/24", "2001:db8:1::12/64")
	first := a.Agent("--bootstrap", "--paths", "udp")
	first.Ready(20 * time.Second)
	second := b.Agent("--join", "10.0.1.11", "--paths", "udp")
	second.Ready(20 * time.Second)
	web, db := first.Pod("web"), second.Pod("db")
	hosts.Within(t, 10*time.Second, "pods reach each other", func() error { return web.Ping(db.IPv4()) })
	knows(t, 2, first, second)
	time.Sleep(2 * time.Second) // what else gossip tells has spread
	fourAgain := func(after string) {
		t.Helper()
		hosts.Within(t, 40*time.Second, "pods reach each other after "+after, func() error { return web.Ping(db.IPv4()) })
		hosts.Within(t, 20*time.Second, "over IPv4 after "+after, func() error { return over(first, "b", "10.0.1.12", "") })
		hosts.Within(t, 20*time.Second, "over IPv4 after "+after, func() error { return over(second, "a", "10.0.1.11", "") })
		if log := first.Log() + second.Log(); strings.Contains(log, "go by the other family") {
			t.Errorf("after %s the family had changed:\n%s", after, log)
		}
	}
	for _, down := range []time.Duration{4 * time.Second, 12 * time.Second} {
		second.Kill()
		time.Sleep(down) // without the agent
		second = b.Agent("--join", "10.0.1.11", "--paths", "udp")
		fourAgain(fmt.Sprintf("%v without its agent", down))
	}
	for _, down := range []time.Duration{5 * time.Second, 15 * time.Second} {
		b.IP("link set eth0 down")
		time.Sleep(down)
		b.IP("link set eth0 up", "address replace 2001:db8:1::12/64 dev eth0")
		fourAgain(fmt.Sprintf("%v without a network", down))
	}
}

// When the first family works again, packets go back to it without a loss, also large ones.
func TestFirstFamilyAgain(t *testing.T) {
	for _, paths := range []string{"udp", "vxlan", "ipip"} {
		t.Run(paths, func(t *testing.T) {
			t.Parallel()
			n := hosts.New(t)
			sw := n.Switch()
			var agents []*hosts.Agent
			for i := range 2 {
				h := n.Host(string(rune('a' + i)))
				h.Plug(sw, "eth0", fmt.Sprintf("10.0.1.%d/24", 11+i), fmt.Sprintf("2001:db8:1::%d/64", 11+i))
				agents = append(agents, h.Agent("--paths", paths, []string{"--bootstrap", "--join=10.0.1.11"}[i]))
				agents[i].Ready(20 * time.Second)
			}
			web, db := agents[0].Pod("web"), agents[1].Pod("db")
			ping := func() error { return web.Ping(db.IPv4()) }
			hosts.Within(t, 10*time.Second, "pods reach each other", ping)
			both := func(why string, addrs ...string) {
				t.Helper()
				hosts.Within(t, 100*time.Second, "over "+addrs[0], func() error { return over(agents[0], "b", addrs[0], why) })
				hosts.Within(t, 100*time.Second, "over "+addrs[1], func() error { return over(agents[1], "a", addrs[1], why) })
			}
			both("", "10.0.1.12", "10.0.1.11")
			// IPv4 fails between them but for gossip, so that both members stay alive.
			agents[0].Host.Run("nft", "add table ip t; add chain ip t o { type filter hook output priority -300; }; add chain ip t i { type filter hook input priority -300; };"+
				"add rule ip t o oifname eth0 udp dport { 6080, 4789 } drop; add rule ip t o oifname eth0 ip protocol { 4, 41 } drop;"+
				"add rule ip t i iifname eth0 udp dport { 6080, 4789 } drop; add rule ip t i iifname eth0 ip protocol { 4, 41 } drop")
			both("over IPv6, because IPv4 was not answered", "2001:db8:1::12", "2001:db8:1::11")
			hosts.Within(t, 20*time.Second, "pods reach each other over IPv6", func() error { return web.PingSize(db.IPv4(), 1300) })
			s := web.Stream(db.IPv4(), 20*time.Millisecond)
			agents[0].Host.Run("nft", "delete table ip t")
			both("", "10.0.1.12", "10.0.1.11")
			if sent, lost := s.Stop(); lost > 0 {
				t.Errorf("%d of %d pings lost on the way back to IPv4", lost, sent)
			}
			if err := web.PingSize(db.IPv4(), 1300); err != nil {
				t.Errorf("a large packet: %v", err)
			}
			for _, a := range agents {
				if log := a.Log(); !strings.Contains(log, "packets to a member go by the first family again") {
					t.Errorf("%s does not log that it went back:\n%s", a.Host.Name, log)
				}
			}
		})
	}
}

// Packets go back to IPv6, where that is the first family, also by an encapsulation with larger headers than the preferred one, which the
// MTU of the TUN device is made for: the trial is as large as IPv6 carries, not as IPv4 does.
func TestFirstFamilyAgainIPv6(t *testing.T) {
	n := hosts.New(t)
	sw := n.Switch()
	var agents []*hosts.Agent
	for i := range 2 {
		h := n.Host(string(rune('a' + i)))
		h.Plug(sw, "eth0", fmt.Sprintf("10.0.1.%d/24", 11+i), fmt.Sprintf("2001:db8:1::%d/64", 11+i))
		agents = append(agents, h.Agent("--paths", "ipip,udp", "--underlay", fmt.Sprintf("2001:db8:1::%d,10.0.1.%[1]d", 11+i), []string{"--bootstrap", "--join=[2001:db8:1::11]"}[i]))
		agents[i].Ready(20 * time.Second)
	}
	web, db := agents[0].Pod("web"), agents[1].Pod("db")
	hosts.Within(t, 20*time.Second, "pods reach each other", func() error { return web.Ping(db.IPv4()) })
	both := func(why string, addrs ...string) {
		t.Helper()
		hosts.Within(t, 100*time.Second, "over "+addrs[0], func() error { return over(agents[0], "b", addrs[0], why) })
		hosts.Within(t, 100*time.Second, "over "+addrs[1], func() error { return over(agents[1], "a", addrs[1], why) })
	}
	both("", "2001:db8:1::12", "2001:db8:1::11")
	agents[0].Host.Run("nft", "add table inet t; add chain inet t o { type filter hook output priority -300; }; add chain inet t i { type filter hook input priority -300; };"+
		"add rule inet t o oifname eth0 meta l4proto { 4, 41 } drop; add rule inet t i iifname eth0 meta l4proto { 4, 41 } drop;"+
		"add table ip6 t; add chain ip6 t o { type filter hook output priority -300; }; add chain ip6 t i { type filter hook input priority -300; };"+
		"add rule ip6 t o oifname eth0 udp dport 6080 drop; add rule ip6 t i iifname eth0 udp dport 6080 drop")
	both("over IPv4, because IPv6 was not answered", "10.0.1.12", "10.0.1.11")
	agents[0].Host.Run("nft", "delete table ip6 t")
	both("", "2001:db8:1::12", "2001:db8:1::11")
}
