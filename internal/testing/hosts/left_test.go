package hosts_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// A node leaves and stops while a third host hears no gossip: that one sees the node die. When it hears of the others again it knows that the
// node has left, and misses nobody.
func TestLeftUnheard(t *testing.T) {
	t.Parallel()
	hs, agents := subnet(t, 3)
	for _, a := range agents {
		hosts.Within(t, 20*time.Second, a.Host.Name+" sees three members with space", func() error {
			if st := a.Status(); st.Cluster.Alive != 3 || st.Cluster.Table.Entries < 3 {
				return fmt.Errorf("%+v", st.Cluster)
			}
			return nil
		})
	}
	hs[0].Run("nft", "add table inet t; add chain inet t c { type filter hook input priority -300; }; add rule inet t c th dport 7946 drop; add rule inet t c th sport 7946 drop")
	hosts.Within(t, 20*time.Second, "c leaves", func() error {
		if _, stderr, code := agents[2].Tulle("leave"); code != 0 {
			return fmt.Errorf("%d: %s", code, stderr)
		}
		return nil
	})
	agents[2].Kill()
	state := func() string {
		p, err := peerOf(agents[0], "c")
		if err != nil {
			return err.Error()
		}
		return p.State
	}
	hosts.Within(t, 40*time.Second, "a believes c dead", func() error {
		if s := state(); s != api.PeerDead {
			return fmt.Errorf("%s", s)
		}
		return nil
	})
	hs[0].Run("nft", "delete table inet t")
	hosts.Within(t, 40*time.Second, "a has nothing to complain of", func() error {
		if s := state(); s != api.PeerLeft {
			return fmt.Errorf("c is %s: %s", s, agents[0].Problems())
		}
		if p := agents[0].Problems(); p != "" {
			return fmt.Errorf("%s", p)
		}
		if c := agents[0].Status().Cluster; c.Members != 2 || c.Alive != 2 {
			return fmt.Errorf("%d of %d members", c.Alive, c.Members)
		}
		return nil
	})
}
