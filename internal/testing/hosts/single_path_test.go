package hosts_test

import (
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// With one path only, no packet between pods is lost once an agent that was restarted is there again, though gossip tells it of nobody for
// a while: what it knows from its disk and from the host is enough. With `direct` none is lost at all.
func TestRestartWithOnePath(t *testing.T) {
	for _, mode := range []string{"udp", "vxlan", "ipip", "direct"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			hs, agents := subnet(t, 2, "--paths", mode)
			pa, pb := agents[0].Pod("pa"), agents[1].Pod("pb")
			hosts.Within(t, 20*time.Second, "the pods reach each other", func() error {
				if err := goes(agents[0], "b", mode); err != nil {
					return err
				}
				return pa.Ping(pb.IPv4())
			})
			streams := func(when string) (end func()) {
				there, back := pa.Stream(pb.IPv4(), 10*time.Millisecond), pb.Stream(pa.IPv4(), 10*time.Millisecond)
				return func() {
					t.Helper()
					for way, s := range map[string]*hosts.Stream{"from a": there, "from b": back} {
						if sent, lost := s.Stop(); lost > 0 {
							t.Errorf("%s, %s: %d of %d pings lost %s", mode, when, lost, sent, way)
						}
					}
				}
			}
			always := func() {}
			if mode == "direct" {
				always = streams("over the restart")
			}
			agents[0].Stop()
			hs[0].Run("nft", "add table inet t; add chain inet t c { type filter hook input priority -300; }; add rule inet t c th dport 7946 drop; add rule inet t c th sport 7946 drop")
			agents[0] = hs[0].Agent("--join", "10.0.1.11", "--join", "10.0.1.12", "--paths", mode)
			hosts.Within(t, 20*time.Second, "the agent runs", func() error {
				_, err := peerOf(agents[0], "b")
				return err
			})
			end := streams("while gossip tells of nobody")
			time.Sleep(1500 * time.Millisecond)
			end()
			if p, err := peerOf(agents[0], "b"); err != nil || p.State != api.PeerDead {
				t.Fatalf("gossip was not blocked: %+v, %v", p, err)
			}
			end = streams("when gossip tells of b")
			hs[0].Run("nft", "delete table inet t")
			agents[0].Ready(20 * time.Second)
			time.Sleep(time.Second)
			end()
			always()
		})
	}
}
