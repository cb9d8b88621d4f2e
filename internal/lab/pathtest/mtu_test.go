package pathtest

import (
	"fmt"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// hasMTU waits until both hosts know the path's MTU.
func (s *stage) hasMTU(t *testing.T, limit time.Duration, want int) {
	t.Helper()
	finds(t, limit, s.first, want)
	finds(t, limit, s.second, want)
}

// finds waits until an agent knows the MTU of the path to its only peer.
func finds(t *testing.T, limit time.Duration, ag *hosts.Agent, want int) {
	t.Helper()
	hosts.Within(t, limit, fmt.Sprintf("%s finds the path MTU %d", ag.Host.Name, want), func() error {
		if p, err := path(ag); err != nil || p.MTU != want {
			return fmt.Errorf("%+v %w", p, err)
		}
		return nil
	})
}

// TestRouterMTULowered lowers the MTU in the middle during a transfer: the router says so by ICMP, or says nothing.
func TestRouterMTULowered(t *testing.T) {
	for _, tc := range []struct {
		name   string
		silent bool
	}{{"with ICMP", false}, {"without ICMP", true}} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := newStage(t, "udp", 1500, 1500)
			s.hasMTU(t, 20*time.Second, 1472)
			x := s.transfer(t)
			x.progress(t, 10*time.Second)
			if tc.silent {
				s.router.Run("nft", "table ip filter { chain output { type filter hook output priority 0; icmp type destination-unreachable drop; }; }")
			}
			s.router.IP("link set toa mtu 1300", "link set tob mtu 1300")
			fell := hosts.Within(t, 15*time.Second, "the black hole is found", func() error {
				if p, err := path(s.first); err != nil || p.MTU > 1272 {
					return fmt.Errorf("%+v %w", p, err)
				}
				return nil
			})
			x.progress(t, 20*time.Second)
			s.hasMTU(t, 30*time.Second, 1272)
			says(t, "tulle peers", command(s.first, "peers"), "1272")
			t.Logf("found after %v, the transfer stood still for %v", fell.Round(10*time.Millisecond), x.stop(t).Round(time.Millisecond))
		})
	}
}

// TestUnderlayMTUs has links of all kinds, also jumbo frames on one side only.
func TestUnderlayMTUs(t *testing.T) {
	for _, tc := range []struct{ a, b, want int }{{9000, 9000, 8972}, {9000, 1500, 1472}, {1500, 9000, 1472}, {1280, 1280, 1252}, {1280, 9000, 1252}} {
		t.Run(fmt.Sprintf("%d and %d", tc.a, tc.b), func(t *testing.T) {
			t.Parallel()
			s := newStage(t, "udp", tc.a, tc.b)
			s.hasMTU(t, 30*time.Second, tc.want)
			x := s.transfer(t)
			x.progress(t, 20*time.Second)
			x.stop(t)
		})
	}
}
