package hosts_test

import (
	"errors"
	"fmt"
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
					time.Sleep(time.Millisecond)
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

// What nftables knows of the members stays over a restart of the agent, also while gossip has not told of them again, and the log blames
// nobody for what an earlier run has left.
func TestMembersOverRestart(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw := n.Switch()
	a, b := n.Host("a"), n.Host("b")
	a.Plug(sw, "eth0", "10.0.1.11/24", "fd01::11/64")
	b.Plug(sw, "eth0", "10.0.1.12/24", "fd01::12/64")
	agents := []*hosts.Agent{a.Agent("--bootstrap", "--cluster-cidr", "10.244.0.0/16"), b.Agent("--join", "10.0.1.11")}
	for _, agent := range agents {
		agent.Ready(20 * time.Second)
	}
	missing := func() error {
		now, err := a.TryRun("nft", "list table inet tulle")
		if err != nil {
			return err
		}
		for _, addr := range []string{"10.0.1.11", "10.0.1.12", "fd01::11", "fd01::12"} {
			if !strings.Contains(now, addr) {
				return fmt.Errorf("%s is missing:\n%s", addr, now)
			}
		}
		return nil
	}
	hosts.Within(t, 20*time.Second, "all members are in the sets", missing)
	agents[0].Stop()
	a.Run("nft", "add table inet t; add chain inet t c { type filter hook input priority -300; }; add rule inet t c th dport 7946 drop; add rule inet t c th sport 7946 drop")
	agents[0] = a.Agent("--join", "10.0.1.11", "--join", "10.0.1.12")
	hosts.Within(t, 20*time.Second, "it has done the host's network", func() error {
		st, err := agents[0].TryStatus()
		if err == nil && len(st.Peers) == 0 {
			err = errors.New("no peer yet")
		}
		return err
	})
	for range 20 {
		if err := missing(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	a.Run("nft", "delete table inet t")
	agents[0].Ready(20 * time.Second)
	if log := agents[0].Log(); strings.Contains(log, "somebody else") {
		t.Errorf("it blames somebody:\n%s", log)
	}
	if n := agents[0].Status().Counters.Repairs; n > 0 {
		t.Errorf("%d repairs", n)
	}
}
