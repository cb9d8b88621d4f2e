package pathtest

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// failover bounds what may be lost while a path is found to be dead: 1.85 s, the second until traffic is noticed, and
// room for a busy machine.
const failover = 5 * time.Second

// TestFilteredOnTheWay lets the router filter the encapsulation in use, in both directions or in one, while pods talk.
func TestFilteredOnTheWay(t *testing.T) {
	for _, tc := range []struct {
		name, paths, from, to string
		rule                  string // of the router's forward chain
		says                  string
	}{
		{"protocol 4", "ipip,udp", "ipip", "udp", "ip protocol 4", "IP protocol 4 or 41"},
		{"protocol 4 one way", "ipip,udp", "ipip", "udp", "ip protocol 4 ip daddr " + addrB, "IP protocol 4 or 41"},
		{"UDP", "udp,ipip", "udp", "ipip", "udp dport 6080", "UDP port 6080"},
		{"UDP one way", "udp,ipip", "udp", "ipip", "udp dport 6080 ip daddr " + addrA, "UDP port 6080"},
		{"UDP, with vxlan", "udp,vxlan,ipip", "udp", "vxlan", "udp dport 6080", "UDP port 6080"},
		{"both one way", "ipip,udp,vxlan", "ipip", "vxlan", "ip protocol 4 ip daddr " + addrB + " drop; udp dport 6080 ip daddr " + addrB, "IP protocol 4 or 41"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := newStage(t, tc.paths, 1500, 1500)
			s.uses(t, 20*time.Second, tc.from)
			x := s.transfer(t)
			x.progress(t, 10*time.Second)
			ping := s.pod.Stream(s.other.IPv4(), 10*time.Millisecond)
			s.router.Run("nft", "table ip filter { chain forward { type filter hook forward priority 0; "+tc.rule+" drop; }; }")
			s.uses(t, 15*time.Second, tc.to)
			x.progress(t, 10*time.Second)
			sent, lost := ping.Stop()
			t.Logf("%d of %d pings lost, the transfer stood still for %v", lost, sent, x.stop(t).Round(time.Millisecond))
			if most := ping.Most(failover); lost == 0 || lost > most {
				t.Errorf("%d pings lost, want 1 to %d", lost, most)
			}
			says(t, "the filtered path", reason(t, s.first, tc.from), "no answer since", tc.to+" works: "+tc.says+" is filtered on the way")
			says(t, "the path in use", reason(t, s.first, tc.to), "answers; "+tc.from+": no answer since")
			says(t, "tulle peers", command(s.first, "peers"), tc.from+" down", tc.says+" is filtered")
			says(t, "tulle route get", command(s.first, "route", "get", s.other.IPv4().String()), tc.to, tc.says+" is filtered")
			hosts.NoProblems(t, "a preferred path that does not work is none", s.first, s.second)
		})
	}
}

// TestReloadSwitches changes the order of preference on a running agent: not a packet is lost.
func TestReloadSwitches(t *testing.T) {
	t.Parallel()
	s := newStage(t, "ipip, udp", 1500, 1500)
	s.uses(t, 20*time.Second, "ipip")
	x := s.transfer(t)
	ping := s.pod.Stream(s.other.IPv4(), 10*time.Millisecond)
	for _, paths := range slices.Repeat([]string{"udp, ipip", "ipip", "udp"}, 3) {
		writePaths(s.a, paths)
		writePaths(s.b, paths)
		for _, ag := range []*hosts.Agent{s.first, s.second} {
			out, errs, code := ag.Tulle("reload")
			if code != 0 {
				t.Fatalf("reload: %d %s%s", code, out, errs)
			}
			contains(t, "tulle reload", out, "paths")
		}
		first, _, _ := strings.Cut(paths, ",")
		s.uses(t, 10*time.Second, first)
		x.progress(t, 10*time.Second)
	}
	sent, lost := ping.Stop()
	if lost > 0 || sent < 100 {
		t.Errorf("%d of %d pings lost over nine changes of the order", lost, sent)
	}
	t.Logf("the transfer stood still for %v at most", x.stop(t).Round(time.Millisecond))
}

// TestOtherVNI gives a host another VNI: vxlan between the two is off and says why, and where it is the only way, so does status.
func TestOtherVNI(t *testing.T) {
	t.Parallel()
	s := newStage(t, "vxlan, udp", 1500, 1500)
	s.uses(t, 20*time.Second, "vxlan")
	s.second.Stop()
	s.second = s.b.Agent("--config", s.b.WriteFile("tulle.yaml", "paths: [vxlan, udp]\nvni: 7\n"))
	s.second.Ready(30 * time.Second)
	s.uses(t, 20*time.Second, "udp")
	const why = "its --vni is 7, and this node's 1"
	says(t, "vxlan", reason(t, s.first, "vxlan"), why)
	hosts.NoProblems(t, "there is another way", s.first, s.second)
	writePaths(s.a, "vxlan")
	if out, errs, code := s.first.Tulle("reload"); code != 0 {
		t.Fatalf("reload: %s%s", out, errs)
	}
	hosts.Within(t, 10*time.Second, "status says that b has no way", func() error {
		if p := s.first.Problems(); !strings.Contains(p, "packets to b have no way: vxlan: "+why) {
			return fmt.Errorf("problems: %s", p)
		}
		return nil
	})
}

// TestNATBetweenHosts lets the router translate a host's address, of packets of the tunnel alone: the other host says what it sees.
func TestNATBetweenHosts(t *testing.T) {
	t.Parallel()
	s := newStage(t, "udp", 1500, 1500)
	s.uses(t, 20*time.Second, "udp")
	s.router.Run("nft", "table ip nat { chain postrouting { type nat hook postrouting priority srcnat; ip saddr "+addrA+" udp dport 6080 snat to 10.0.2.99; }; }")
	hosts.Within(t, 20*time.Second, "status of b names the address", func() error {
		if p := s.second.Problems(); !strings.Contains(p, "packets of a arrive from 10.0.2.99") || !strings.Contains(p, "NAT") {
			return fmt.Errorf("problems: %s", p)
		}
		return nil
	})
	s.router.Run("nft", "delete table ip nat")
	s.uses(t, 60*time.Second, "udp")
	hosts.NoProblems(t, "without NAT", s.first, s.second)
}
