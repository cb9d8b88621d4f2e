package pathtest

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/testing/hosts"
)

const (
	nextA, nextB   = "10.0.1.11", "10.0.1.12"
	next6A, next6B = "fd01::11", "fd01::12"
	podRanges      = "10.244.0.0/16,fd00:244::/48"
)

// newSubnet is a stage whose hosts a and b are in one subnet, at a switch ("router" of the stage), with both families.
func newSubnet(t *testing.T, paths string, prepare ...func(s *stage)) *stage {
	t.Helper()
	n := hosts.New(t)
	s := &stage{net: n, a: n.Host("a"), b: n.Host("b"), router: n.Switch()}
	s.a.Plug(s.router, "eth0", nextA+"/24", next6A+"/64")
	s.b.Plug(s.router, "eth0", nextB+"/24", next6B+"/64")
	for _, f := range prepare {
		f(s)
	}
	s.startSubnet(t, paths)
	s.pod, s.other = s.first.Pod("web"), s.second.Pod("db")
	s.reach(t)
	return s
}

func (s *stage) startSubnet(t *testing.T, paths string) {
	t.Helper()
	s.first = s.a.Agent("--bootstrap", "--join", nextB, "--cluster-cidr", podRanges, "--config", writePaths(s.a, paths))
	s.second = s.b.Agent("--join", nextA, "--config", writePaths(s.b, paths))
	s.first.Ready(30 * time.Second)
	s.second.Ready(30 * time.Second)
}

// reach waits until pods reach each other, by both families.
func (s *stage) reach(t *testing.T) {
	t.Helper()
	hosts.Within(t, 20*time.Second, "pods reach each other", func() error {
		if err := s.pod.Ping(s.other.IPv4()); err != nil {
			return err
		}
		return s.pod.Ping(s.other.IPv6())
	})
}

// goes waits until packets of a family (endpoint tells) from one host to the other go direct, or do not.
func goes(t *testing.T, limit time.Duration, ag *hosts.Agent, endpoint string, direct bool) time.Duration {
	t.Helper()
	return hosts.Within(t, limit, fmt.Sprintf("%s sends direct to %s: %v", ag.Host.Name, endpoint, direct), func() error {
		st, err := ag.TryStatus()
		if err != nil {
			return err
		}
		for _, p := range st.Peers {
			for _, c := range p.Candidates {
				if c.Mode == "direct" && c.Endpoint.Addr() == netip.MustParseAddr(endpoint) {
					if c.Active == direct {
						return nil
					}
					return fmt.Errorf("direct %s, active %v: %s", c.State, c.Active, c.Reason)
				}
			}
		}
		return fmt.Errorf("no candidate: %+v", st.Peers)
	})
}

// allDirect waits until both hosts send both families direct.
func (s *stage) allDirect(t *testing.T) {
	t.Helper()
	var took time.Duration
	for _, e := range []string{nextB, next6B} {
		took += goes(t, 20*time.Second, s.first, e, true)
	}
	for _, e := range []string{nextA, next6A} {
		took += goes(t, 20*time.Second, s.second, e, true)
	}
	t.Logf("all direct after %v", took.Round(10*time.Millisecond))
}

// count counts, at the switch, echo requests as they are on the wire, by pods' addresses and within packets to the tunnel's port. There the inner
// packet follows the UDP header: its version, and its protocol at offset 9 (IPv4) or 6 (IPv6).
func (s *stage) count() { s.router.Run("nft", countTable) }

const countTable = `table bridge wire {
	counter pods {}
	counter tunnel {}
	chain forward {
		type filter hook forward priority 0;
		ip saddr 10.244.0.0/16 ip protocol icmp counter name pods
		ip6 saddr fd00:244::/48 meta l4proto ipv6-icmp counter name pods
		ip saddr 10.0.1.0/24 udp dport 6080 @th,64,4 4 @th,136,8 1 counter name tunnel
		ip saddr 10.0.1.0/24 udp dport 6080 @th,64,4 6 @th,112,8 58 counter name tunnel
	}
}`

// counted returns the packets of a counter.
func (s *stage) counted(t *testing.T, name string) int {
	t.Helper()
	fields := strings.Fields(s.router.Run("nft", "list", "counter", "bridge", "wire", name))
	for i, f := range fields {
		if f == "packets" {
			n, err := strconv.Atoi(fields[i+1])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no packets in %v", fields)
	return 0
}

// noPods lets the switch drop packets with pods' addresses, all or those of one direction, and keeps what else it has.
func (s *stage) noPods(match string) {
	s.router.Run("nft", "table bridge holes { chain forward { type filter hook forward priority 10; "+match+" drop; }; }")
}

const anyPods = "ip saddr 10.244.0.0/16 drop; ip6 saddr fd00:244::/48"

// TestDirect: what is in one subnet goes without a tunnel, with pods' own addresses on the wire; what is in another one
// takes the tunnel; and pods reach hosts the same way, with their own addresses.
func TestDirect(t *testing.T) {
	t.Parallel()
	s := newSubnet(t, "direct, udp", func(s *stage) {
		r, c := s.net.Host("r"), s.net.Host("c")
		r.Plug(s.router, "eth0", "10.0.1.1/24")
		c.Link("eth0", "10.0.3.13/24", r, "toc", "10.0.3.1/24")
		r.Sysctl("net.ipv4.ip_forward", "1")
		for _, h := range []*hosts.Host{s.a, s.b} {
			h.IP("route add 10.0.3.0/24 via 10.0.1.1")
		}
		c.IP("route add default via 10.0.3.1")
		s.far = c
	})
	third := s.far.Agent("--join", nextA)
	third.Ready(30 * time.Second)
	far := third.Pod("far")
	s.allDirect(t)
	hosts.Within(t, 20*time.Second, "the other subnet", func() error { return s.pod.Ping(far.IPv4()) })
	s.count()
	const n = 20
	for range n {
		for _, to := range []netip.Addr{s.other.IPv4(), s.other.IPv6(), netip.MustParseAddr(nextB), netip.MustParseAddr(next6B)} {
			if err := s.pod.PingOnce(to, 56); err != nil {
				t.Fatalf("to %v: %v", to, err)
			}
		}
	}
	// 20 requests and replies of two families between pods, 20 requests of two families from a pod to a host.
	if pods, tunnel := s.counted(t, "pods"), s.counted(t, "tunnel"); pods < 6*n || tunnel > 0 {
		t.Errorf("on the wire %d packets with pods' addresses, want %d; %d in the tunnel, want none", pods, 6*n, tunnel)
	}
	for range n {
		if err := s.pod.PingOnce(far.IPv4(), 56); err != nil {
			t.Fatalf("to the other subnet: %v", err)
		}
	}
	if tunnel := s.counted(t, "tunnel"); tunnel < n {
		t.Errorf("%d packets in the tunnel to the other subnet, want %d", tunnel, n)
	}
	hosts.Within(t, 20*time.Second, "status knows both ways", func() error {
		for _, p := range s.first.Status().Peers {
			for _, c := range p.Candidates {
				if p.Name == "c" && c.Mode == "direct" {
					if c.State != "off" || !strings.Contains(c.Reason, "other subnet") && !strings.Contains(c.Reason, "no IPv6 underlay") {
						return fmt.Errorf("to c: %+v", c)
					}
				} else if p.Name == "b" && c.Mode == "direct" && (c.MTU != 1500 || c.RTTUS == 0) {
					return fmt.Errorf("to b: %+v", c)
				}
			}
		}
		return nil
	})
	says(t, "tulle peers", command(s.first, "peers"), "direct", "other subnet, behind router 10.0.1.1")
	says(t, "tulle ping", command(s.first, "ping", "b"), "direct", "1500")
	says(t, "tulle route get", command(s.first, "route", "get", s.other.IPv4().String()), "direct", nextB)
	contains(t, "the route", s.a.Run("ip", "route", "show", "proto", "84"), "via "+nextB+" dev eth0")
	hosts.NoProblems(t, "with a direct path", s.first, s.second, third)
	writePaths(s.a, "direct")
	if out, errs, code := s.first.Tulle("reload"); code != 0 {
		t.Fatalf("reload: %s%s", out, errs)
	}
	hosts.Within(t, 10*time.Second, "status says that c has no way", func() error {
		if p := s.first.Problems(); !strings.Contains(p, "packets to c have no way: direct: other subnet, behind router 10.0.1.1") || strings.Contains(p, "packets to b") {
			return fmt.Errorf("problems: %s", p)
		}
		return nil
	})
}

// TestDirectFiltered lets the switch drop packets with pods' addresses only, while pods talk: the tunnel takes over within
// about a second. Then all passes again.
func TestDirectFiltered(t *testing.T) {
	for _, tc := range []struct{ name, match string }{
		{"both ways", anyPods},
		{"one way", "ip daddr 10.244.0.0/16 ether saddr"}, // completed below
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := newSubnet(t, "direct, udp")
			s.allDirect(t)
			x := s.transfer(t)
			x.progress(t, 10*time.Second)
			ping := s.pod.Stream(s.other.IPv4(), 10*time.Millisecond)
			match := tc.match
			if strings.HasSuffix(match, "saddr") {
				match += " " + strings.TrimSpace(s.a.Run("cat", "/sys/class/net/eth0/address"))
			}
			s.noPods(match)
			took := goes(t, 10*time.Second, s.first, nextB, false)
			goes(t, 10*time.Second, s.second, nextA, false)
			x.progress(t, 10*time.Second)
			sent, lost := ping.Stop()
			stood := x.stop(t)
			t.Logf("withdrawn after %v, %d of %d pings lost, the transfer stood still for %v", took.Round(10*time.Millisecond), lost, sent, stood.Round(time.Millisecond))
			// 1 s until it is found on each side, room for a busy machine, and what it stood still.
			if most := ping.Most(3 * time.Second); lost == 0 || lost > most {
				t.Errorf("%d pings lost, want 1 to %d", lost, most)
			}
			says(t, "the filtered path", reason(t, s.first, "direct"), "no answer since", "udp works: packets with pod addresses are dropped on the way")
			hosts.Within(t, 10*time.Second, "the route goes", func() error {
				if r := s.a.Run("ip", "route", "show", "proto", "84"); strings.Contains(r, "via") {
					return fmt.Errorf("it is still there: %s", r)
				}
				return nil
			})
			hosts.NoProblems(t, "a preferred path that does not work is none", s.first, s.second)
			ping = s.pod.Stream(s.other.IPv4(), 10*time.Millisecond)
			s.router.Run("nft", "delete table bridge holes")
			goes(t, 40*time.Second, s.first, nextB, true)
			goes(t, 40*time.Second, s.second, nextA, true)
			if sent, lost := ping.Stop(); lost > 0 {
				t.Errorf("%d of %d pings lost on the way back to direct", lost, sent)
			}
		})
	}
}

// TestDirectOneFamily: IPv4 goes directly, and IPv6 by no way at all. tulle peers shows both and fails, although the first one works.
func TestDirectOneFamily(t *testing.T) {
	t.Parallel()
	s := newSubnet(t, "direct, udp")
	s.allDirect(t)
	hosts.Within(t, 20*time.Second, "tulle peers says that both go directly", func() error {
		if out, _, code := s.first.Tulle("peers"); code != 0 || !strings.Contains(out, "direct ipv6") {
			return fmt.Errorf("exit code %d:\n%s", code, out)
		}
		return nil
	})
	s.noPods("udp dport 6080 drop; ip6 saddr fd00:244::/48")
	hosts.Within(t, 20*time.Second, "tulle peers says that IPv6 is lost", func() error {
		if out, _, code := s.first.Tulle("peers"); code != 1 || !strings.Contains(out, "udp down") {
			return fmt.Errorf("exit code %d:\n%s", code, out)
		}
		return nil
	})
	if err := s.pod.PingOnce(s.other.IPv4(), 56); err != nil {
		t.Errorf("IPv4: %v", err)
	}
	if err := s.pod.PingOnce(s.other.IPv6(), 56); err == nil {
		t.Error("IPv6 arrives")
	}
	s.router.Run("nft", "delete table bridge holes")
	hosts.Within(t, 40*time.Second, "all is well again", func() error {
		if out, _, code := s.first.Tulle("peers"); code != 0 {
			return fmt.Errorf("exit code %d:\n%s", code, out)
		}
		return nil
	})
}

// TestDirectNeverProven: where pods' addresses do not pass from the start, no route is ever made, and nothing is lost.
func TestDirectNeverProven(t *testing.T) {
	for _, tc := range []struct {
		name  string
		where func(s *stage)
		says  string
	}{
		{"the switch drops them", func(s *stage) { s.noPods(anyPods) }, "dropped on the way"},
		{"a host does not forward them", func(s *stage) {
			s.b.Run("nft", `table inet filter { chain forward { type filter hook forward priority 0; policy drop; iifname "tun0" accept; oifname "tun0" accept; }; }`)
		}, "dropped on the way"},
		{"a host hides them", func(s *stage) {
			s.b.Run("nft", `table inet nat { chain postrouting { type nat hook postrouting priority 100; oifname "eth0" masquerade; }; }`)
		}, "dropped on the way"},
		{"strict reverse path filter", func(s *stage) {
			s.a.Sysctl("net.ipv4.conf.all.rp_filter", "1")
			s.b.Sysctl("net.ipv4.conf.all.rp_filter", "1")
			s.a.Sysctl("net.ipv4.conf.eth0.rp_filter", "1")
			s.b.Sysctl("net.ipv4.conf.eth0.rp_filter", "1")
		}, "reverse path filter of eth0 is strict"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := newSubnet(t, "direct, udp", tc.where)
			ping := s.pod.Stream(s.other.IPv4(), 10*time.Millisecond)
			hosts.Within(t, 15*time.Second, "the reason", func() error {
				if c := candidate(t, s.first, "direct"); !strings.Contains(c.Reason, tc.says) {
					return fmt.Errorf("%+v", c)
				}
				return nil
			})
			time.Sleep(3 * time.Second)
			if sent, lost := ping.Stop(); lost > 0 {
				t.Errorf("%d of %d pings lost", lost, sent)
			}
			if log := s.first.Log() + s.second.Log(); strings.Contains(log, "route 10.244") && strings.Contains(log, "via") {
				t.Errorf("a direct route was made: %s", log)
			}
			if r := s.a.Run("ip", "route", "show", "proto", "84") + s.b.Run("ip", "route", "show", "proto", "84"); strings.Contains(r, "via") {
				t.Errorf("a direct route was made: %s", r)
			}
			hosts.NoProblems(t, "without a direct path", s.first, s.second)
		})
	}
}

// TestDirectReload changes the order on running agents: not a packet is lost.
func TestDirectReload(t *testing.T) {
	t.Parallel()
	s := newSubnet(t, "direct, udp")
	s.allDirect(t)
	ping := s.pod.Stream(s.other.IPv4(), 10*time.Millisecond)
	ping6 := s.pod.Stream(s.other.IPv6(), 10*time.Millisecond)
	x := s.transfer(t)
	for _, paths := range []string{"udp, direct", "direct, udp", "udp", "vxlan, direct", "direct"} {
		for _, ag := range []*hosts.Agent{s.first, s.second} {
			writePaths(ag.Host, paths)
			if out, errs, code := ag.Tulle("reload"); code != 0 {
				t.Fatalf("reload: %d %s%s", code, out, errs)
			}
		}
		first, _, _ := strings.Cut(paths, ",")
		s.uses(t, 20*time.Second, first)
		x.progress(t, 10*time.Second)
	}
	for _, p := range []*hosts.Stream{ping, ping6} {
		if sent, lost := p.Stop(); lost > 0 || sent < 100 {
			t.Errorf("%d of %d pings lost over five changes of the order", lost, sent)
		}
	}
	t.Logf("the transfer stood still for %v at most", x.stop(t).Round(time.Millisecond))
}

// TestDirectWithoutAgents kills both agents: pods in one subnet go on talking. New ones find the routes and keep them. At
// last `tulle cleanup` removes all.
func TestDirectWithoutAgents(t *testing.T) {
	t.Parallel()
	s := newSubnet(t, "direct, udp")
	s.allDirect(t)
	ping := s.pod.Stream(s.other.IPv4(), 10*time.Millisecond)
	s.first.Kill()
	s.second.Kill()
	time.Sleep(2 * time.Second)
	s.startSubnet(t, "direct, udp")
	s.allDirect(t)
	sent, lost := ping.Stop()
	if lost > 0 || sent < 200 {
		t.Errorf("%d of %d pings lost while agents were killed and started", lost, sent)
	}
	// One agent stays dead: the other one sees neither path answer, and leaves the route to the host's kernel. Before, both have to
	// have proven the way that they found: one whose first probe the other missed uses the tunnel for a moment.
	for _, ag := range []*hosts.Agent{s.first, s.second} {
		hosts.Within(t, 20*time.Second, "the direct paths of "+ag.Host.Name+" are proven", func() error {
			st, err := ag.TryStatus()
			if err != nil {
				return err
			}
			for _, p := range st.Peers {
				for _, c := range p.Candidates {
					if c.Mode == "direct" && c.State != api.PathUp {
						return fmt.Errorf("to %s: %+v", p.Name, c)
					}
				}
			}
			return nil
		})
	}
	s.allDirect(t)
	ping = s.pod.Stream(s.other.IPv4(), 10*time.Millisecond)
	s.second.Kill()
	hosts.Within(t, 40*time.Second, "the agent is missed", func() error {
		if p := s.first.Problems(); !strings.Contains(p, "b is gone") {
			return fmt.Errorf("problems %q", p)
		}
		return nil
	})
	if sent, lost := ping.Stop(); lost > 0 {
		t.Errorf("%d of %d pings lost without the agent", lost, sent)
	}
	s.first.Stop()
	for _, ag := range []*hosts.Agent{s.first, s.second} {
		if out, errs, code := ag.Tulle("cleanup"); code != 0 {
			t.Fatalf("cleanup: %s%s", out, errs)
		}
		for _, f := range []string{"-4", "-6"} {
			if r := ag.Host.Run("ip", f, "route", "show", "table", "all", "proto", "84") + ag.Host.Run("ip", f, "rule", "show", "table", "8485"); r != "" {
				t.Errorf("%s has %s left", ag.Host.Name, r)
			}
		}
	}
}

// TestDirectExternal has a router without any tunnel as external peer.
func TestDirectExternal(t *testing.T) {
	t.Parallel()
	s := newSubnet(t, "direct, udp")
	e := s.net.Host("e")
	e.Plug(s.router, "eth0", "10.0.1.20/24")
	e.IP("addr add 10.244.63.1/32 dev lo", "route add 10.244.0.0/17 via "+nextA+" src 10.244.63.1", "route add 10.244.128.0/17 via "+nextB+" src 10.244.63.1")
	if out, errs, code := s.first.Tulle("external", "add", "10.244.63.0/24", "10.0.1.20", "--encap", "direct"); code != 0 {
		t.Fatalf("external add: %s%s", out, errs)
	}
	to := netip.MustParseAddr("10.244.63.1")
	for _, pod := range []*hosts.Pod{s.pod, s.other} {
		hosts.Within(t, 10*time.Second, "the external peer", func() error { return pod.Ping(to) })
		if err := e.PingOnce(pod.IPv4(), 56); err != nil {
			t.Errorf("from the external peer: %v", err)
		}
	}
	s.count()
	if err := s.pod.PingOnce(to, 56); err != nil || s.counted(t, "pods") != 2 {
		t.Errorf("%v; %d packets on the wire, want 2", err, s.counted(t, "pods"))
	}
	out, _, _ := s.second.Tulle("route", "get", to.String())
	contains(t, "tulle route get", out, "direct", "10.0.1.20", "external peers are not probed")
	if out, errs, code := s.first.Tulle("external", "remove", "10.244.63.0/24"); code != 0 {
		t.Fatalf("external remove: %s%s", out, errs)
	}
	hosts.Within(t, 10*time.Second, "its route goes", func() error {
		if r := s.b.Run("ip", "route", "show", "proto", "84"); strings.Contains(r, "10.0.1.20") {
			return fmt.Errorf("%s", r)
		}
		return nil
	})
}
