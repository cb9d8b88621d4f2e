package clustertest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/lab"
)

// TestKill9DuringJoins kills agents at random while others join and open blocks: space is neither lost nor owned twice.
func TestKill9DuringJoins(t *testing.T) {
	t.Parallel()
	const (
		cidr    = "10.244.0.0/16"
		rounds  = 50 // and more, until as many addresses were given out: a busy machine kills agents before they answer
		longest = 150
		first   = 4 // hosts at the beginning
		every   = 6 // rounds: then another host joins
		most    = 150 * time.Millisecond
	)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	l := up(t, "joins", lab.Options{Bare: true, Nodes: first, Pods: -1, Underlay: lab.IPv4Only})
	seeds := []string{"--join", "192.168.1.11", "--join", "192.168.2.12", "--join", "192.168.1.13"}
	agents := map[string]*stray{}
	var hosts []string
	start := func(h lab.Host, more ...string) {
		t.Helper()
		s := newStray(t, append([]string{"--node-name", h.Name, "--node-prefix-len", "28", "--cluster-cidr", cidr}, more...)...)
		s.start(t, l, h.Name)
		if err := l.AdoptAgent(h.Name, s.socket); err != nil {
			t.Fatal(err)
		}
		agents[h.Name] = s
		hosts = append(hosts, h.Name)
	}
	for i, h := range l.Hosts() {
		if i == 0 {
			start(h, "--bootstrap")
			agents[h.Name].ready(t)
			continue
		}
		start(h, seeds...)
	}
	quiet(t, l, hosts, cidr)

	var mu sync.Mutex
	handed := map[netip.Addr]string{} // address to host and pod, of every answer that arrived
	for round := 0; round < rounds || len(handed) < rounds && round < longest; round++ {
		if round < rounds && round%every == every-1 {
			h, err := l.AddHost(t.Context(), 1+round%2)
			if err != nil {
				t.Fatal(err)
			}
			start(h, seeds...)
		}
		var wg sync.WaitGroup
		busy := hosts[r.IntN(len(hosts))]
		wg.Go(func() { // may fail: the agent may be the one that is killed
			c := api.NewClient(agents[busy].socket)
			ctx, cancel := context.WithTimeout(t.Context(), 2*most)
			defer cancel()
			for i := range 5 {
				id := fmt.Sprintf("pod-%d-%d", round, i)
				a, err := c.Allocate(ctx, api.AllocateRequest{ID: id})
				if err != nil {
					return
				}
				mu.Lock()
				for _, x := range a.Addresses {
					if other, twice := handed[x.Address]; twice {
						t.Errorf("%v was given to %s, and to %s on %s", x.Address, other, id, busy)
					}
					handed[x.Address] = id + " on " + busy
				}
				mu.Unlock()
			}
		})
		victim := hosts[r.IntN(len(hosts))]
		if r.IntN(2) == 0 { // a newcomer's donors and the newcomer itself are the interesting ones
			victim = hosts[len(hosts)-1]
		}
		moment := time.NewTimer(time.Duration(r.Int64N(int64(most))))
		<-moment.C
		agents[victim].kill(t)
		wg.Wait()
		agents[victim].start(t, l, victim)
	}
	quiet(t, l, hosts, cidr)

	// What was answered is still known: the state of before the answer never came back.
	known := map[netip.Addr]bool{}
	for _, h := range hosts {
		ipam, err := api.NewClient(agents[h].socket).IPAM(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range ipam.Allocations {
			for _, addr := range a.Addresses {
				if known[addr] {
					t.Errorf("two nodes hold %v", addr)
				}
				known[addr] = true
			}
		}
	}
	for addr, who := range handed {
		if !known[addr] {
			t.Errorf("%v, given to %s, is forgotten", addr, who)
		}
	}
	if len(handed) < rounds {
		t.Errorf("only %d addresses were given out", len(handed))
	}
}

// kill ends the agent at once.
func (s *stray) kill(t *testing.T) {
	t.Helper()
	if err := s.cmd.Process.Signal(syscall.SIGKILL); err != nil && err != os.ErrProcessDone {
		t.Fatal(err)
	}
	_ = s.cmd.Wait()
	if ws, ok := s.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || ws.Signal() != syscall.SIGKILL {
		t.Errorf("an agent had ended by itself: %v\n%s", s.cmd.ProcessState, s.log.String())
	}
}
