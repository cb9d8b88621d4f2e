package pathtest

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// TestBrokenTrains has a wire that loses or damages all but the first packet of each train toward one of two peers, as some
// drivers do, and kernels 7.0 to 7.1.4 with some network cards. The agent finds it within seconds, sends that peer single
// packets, and names what is wrong; the other peer is not concerned.
//
// The sender's kernel cuts the trains (gso_max_segs 1). Their packets have IP IDs 0, 1, 2 and so on, single packets have 0:
// the router breaks what has another one.
func TestBrokenTrains(t *testing.T) {
	toB := netip.MustParseAddrPort(addrB + ":6080")
	for _, tc := range []struct {
		name   string
		sums   bool // the sender's kernel computes whole checksums, which receivers verify
		damage func(t *testing.T, s *stage)
	}{
		{"lost", false, func(t *testing.T, s *stage) {
			s.router.Run("nft", "table ip filter { chain forward { type filter hook forward priority 0; ip daddr "+addrB+" udp dport 6080 ip id != 0 counter drop; }; }")
		}},
		{"bad checksums", true, func(t *testing.T, s *stage) { damages(t, s.router, "toa", toB, badSum) }},
		{"short lengths", false, func(t *testing.T, s *stage) { damages(t, s.router, "toa", toB, shortLen) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := newStage(t, "udp, ipip", 1500, 1500)
			s.a.IP("link set eth0 gso_max_segs 1")
			if tc.sums {
				s.a.Run("ethtool", "-K", "eth0", "tx", "off")
			}
			brokenTrains(t, s, tc.damage)
		})
	}
}

func brokenTrains(t *testing.T, s *stage, breakThem func(t *testing.T, s *stage)) {
	c := s.net.Host("c")
	c.Link("eth0", "10.0.3.13/24", s.router, "toc", "10.0.3.1/24")
	c.IP("route add default via 10.0.3.1")
	third := c.Agent("--join", addrA, "--paths", "udp,ipip")
	third.Ready(30 * time.Second)
	cache := third.Pod("cache")
	hosts.Within(t, 20*time.Second, "pods reach each other", func() error { return s.pod.Ping(cache.IPv4()) })
	x := s.transfer(t)
	x.progress(t, 10*time.Second)
	s.pod.Stream(cache.IPv4(), 10*time.Millisecond) // the third host is busy, too
	time.Sleep(3 * time.Second)                     // trains to all of them are tried, and arrive
	hosts.NoProblems(t, "before", s.first)

	breakThem(t, s)
	took := hosts.Within(t, 15*time.Second, "the trains are off", func() error {
		if p := s.first.Problems(); !strings.Contains(p, "trains") {
			return fmt.Errorf("problems: %q", p)
		}
		return nil
	})
	x.progress(t, 15*time.Second)
	t.Logf("trains are off after %v, the transfer stood still for %v", took.Round(10*time.Millisecond), x.stop(t).Round(time.Millisecond))
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	problems := s.first.Problems()
	contains(t, "the problem", problems, "do not reach b:", unix.ByteSliceToString(u.Release[:]), "eth0", "ethtool -K eth0")
	if strings.Contains(problems, "reach c:") {
		t.Errorf("others are concerned: %s", problems)
	}
	hosts.NoProblems(t, "others are not concerned", s.second, third)
	hosts.Within(t, 20*time.Second, "only trains are broken", func() error {
		for _, p := range s.first.Status().Peers {
			if p.Path.Mode != "udp" {
				return fmt.Errorf("%s is reached by %s", p.Name, p.Path.Mode)
			}
		}
		return nil
	})
}
