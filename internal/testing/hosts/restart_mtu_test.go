package hosts_test

import (
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// Full packets pass from the first moment on and over a restart of either agent, and no kernel is told of a smaller path
// MTU meanwhile: it would remember that for ten minutes.
func TestFullPacketsOverRestart(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw := n.Switch()
	a, b := n.Host("a"), n.Host("b")
	a.Plug(sw, "eth0", "10.0.1.11/24")
	b.Plug(sw, "eth0", "10.0.1.12/24")
	agents := []*hosts.Agent{a.Agent("--bootstrap", "--cluster-cidr", "10.244.0.0/16,fd00:244::/48"), b.Agent("--join", "10.0.1.11")}
	for _, agent := range agents {
		agent.Ready(20 * time.Second)
	}
	pa, pb := agents[0].Pod("pa"), agents[1].Pod("pb")
	full := func(p *hosts.Pod, q *hosts.Pod, family int) error {
		return p.PingDF(q.Addrs[family], p.MTU-[]int{28, 48}[family])
	}
	var stop atomic.Bool
	var wg sync.WaitGroup
	for _, way := range [][2]*hosts.Pod{{pa, pb}, {pb, pa}} {
		for family := range 2 {
			wg.Go(func() {
				for !stop.Load() {
					_ = full(way[0], way[1], family) // some are lost while an agent is away
				}
			})
		}
	}
	time.Sleep(time.Second)
	for i, h := range []*hosts.Host{a, b} {
		agents[i].Stop()
		agents[i] = h.Agent("--join", "10.0.1.11", "--join", "10.0.1.12")
		agents[i].Ready(20 * time.Second)
		time.Sleep(time.Second) // the traffic meets what the new run has set up
	}
	stop.Store(true)
	wg.Wait()
	for _, way := range [][2]*hosts.Pod{{pa, pb}, {pb, pa}} {
		for family := range 2 {
			hosts.Within(t, 10*time.Second, "a full packet passes", func() error { return full(way[0], way[1], family) })
			if got := way[0].Run("ip", "route", "get", way[1].Addrs[family].String()); strings.Contains(got, "expires") {
				t.Errorf("the kernel of %s was told of another MTU: %s", way[0].Name, got)
			}
		}
	}
}
