package hosts_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// A firewall drops gossip of one family without a word: what one host receives, what it sends, or both. All members stay alive by the other
// family, and no host finds another one dead.
func TestGossipFamilyFiltered(t *testing.T) {
	for name, hooks := range map[string][]string{"in": {"input"}, "out": {"output"}, "both": {"input", "output"}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := hosts.New(t)
			sw := n.Switch()
			var agents []*hosts.Agent
			var first *hosts.Host
			for i := range 3 {
				h := n.Host(string(rune('a' + i)))
				h.Plug(sw, "eth0", fmt.Sprintf("10.0.1.%d/24", 11+i), fmt.Sprintf("fd01::%d/64", 11+i))
				if i == 0 {
					first = h
					agents = append(agents, h.Agent("--bootstrap", "--cluster-cidr", "10.244.0.0/16"))
					continue
				}
				agents = append(agents, h.Agent("--join", "10.0.1.11"))
			}
			alive := func() error {
				for _, a := range agents {
					st, err := a.TryStatus()
					if err != nil {
						return err
					}
					if st.Cluster.Alive != 3 || !st.Ready {
						return fmt.Errorf("%s sees %d alive: %s", a.Host.Name, st.Cluster.Alive, a.Problems())
					}
				}
				return nil
			}
			hosts.Within(t, 20*time.Second, "all see all", alive)
			knows(t, 2, agents...)
			time.Sleep(3 * time.Second) // what else they have to tell of themselves has spread
			for _, hook := range hooks {
				first.Run("nft", "add table ip t; add chain ip t "+hook+" { type filter hook "+hook+" priority -300; }; add rule ip t "+hook+" th dport 7946 drop; add rule ip t "+hook+" th sport 7946 drop")
			}
			for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
				if err := alive(); err != nil {
					t.Fatal(err)
				}
			}
			hosts.NoProblems(t, "afterwards", agents...)
		})
	}
}
