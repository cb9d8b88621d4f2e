package agent

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/membership/gossip"
	"github.com/tulle-net/tulle/tunnel"
	"github.com/tulle-net/tulle/tunnel/direct"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/path"
)

// TestProberSchedule has many peers that answer, one that stops, and one that gossip has news of: looking only at who is due
// must miss none of it.
func TestProberSchedule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const peers = 300
		var silent atomic.Value // the peer that does not answer, or the encapsulation that does not pass
		silent.Store("")
		var mu sync.Mutex
		sent := map[string]int{}
		var replies sync.WaitGroup
		defer replies.Wait() // last: of what is sent until then
		p := newProber(slog.New(slog.DiscardHandler))
		p.traffic = func(string) tunnel.PeerStats { return tunnel.PeerStats{} }
		p.train = func(string, encap.Mode, []tunnel.ProbePacket, bool) error { return nil }
		p.send = func(peer string, mode encap.Mode, six bool, payload []byte, size int) error {
			mu.Lock()
			sent[peer]++
			mu.Unlock()
			if _, nonce, _, ok := parseProbe(payload); ok && peer != silent.Load() && mode.String() != silent.Load() {
				replies.Go(func() {
					time.Sleep(time.Millisecond)
					p.received(peer, mode, six, appendProbe(nil, probeReply, nonce, size), 0)
				})
			}
			return nil
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var running sync.WaitGroup
		defer running.Wait()
		defer cancel()
		running.Go(func() { _ = p.run(ctx) })
		want := map[string][]path.Candidate{}
		for i := range peers {
			want[fmt.Sprint("peer-", i)] = []path.Candidate{{Mode: encap.UDP, Max: 1472}, {Mode: encap.IPIP, Max: 1480}}
		}
		p.setPeers(time.Now(), want)
		up := func() (n int) {
			for id := range want {
				for _, c := range want[id] {
					if i, ok := p.info(id, c.Mode); ok && i.Up {
						n++
					}
				}
			}
			return n
		}
		time.Sleep(2 * time.Second)
		synctest.Wait() // for what happens at this very instant
		if n := up(); n != 2*peers {
			t.Fatalf("%d of %d paths are up", n, 2*peers)
		}
		for id := range want {
			if i, _ := p.info(id, encap.UDP); i.MTU != 1472 {
				t.Fatalf("%s: path MTU %d", id, i.MTU)
			}
		}

		silent.Store("udp") // in general: a firewall on the way
		for id := range want {
			p.poke(time.Now(), id)
		}
		time.Sleep(3 * time.Second)
		synctest.Wait() // for what happens at this very instant
		for id := range want {
			if m, ok := p.chosen(id); !ok || m != encap.IPIP {
				t.Fatalf("%s: %s is used three seconds after udp is filtered", id, m)
			}
		}
		silent.Store("")
		time.Sleep(25 * time.Second)
		synctest.Wait() // for what happens at this very instant
		for id := range want {
			if m, ok := p.chosen(id); !ok || m != encap.UDP {
				t.Fatalf("%s: %s is used though udp works again", id, m)
			}
		}

		silent.Store("peer-7")
		p.poke(time.Now(), "peer-7")
		time.Sleep(10 * time.Second)
		synctest.Wait() // for what happens at this very instant
		if n := up(); n != 2*peers-2 {
			t.Errorf("%d of %d paths are up, want all but those of peer-7", n, 2*peers)
		}

		silent.Store("")
		mu.Lock()
		clear(sent)
		mu.Unlock()
		p.poke(time.Now(), "peer-7")
		time.Sleep(time.Second)
		synctest.Wait() // for what happens at this very instant
		mu.Lock()
		defer mu.Unlock()
		if sent["peer-7"] == 0 {
			t.Error("gossip has news of peer-7, and it is not probed within a second")
		}
		if n := up(); n != 2*peers {
			t.Errorf("%d of %d paths are up after peer-7 came back", n, 2*peers)
		}
	})
}

// What this host cannot send, for want of an address on one side, is not lost on the way.
func TestProberWithoutAddresses(t *testing.T) {
	for _, missing := range []error{tunnel.ErrNoAddress, direct.ErrNoAddress} {
		synctest.Test(t, func(t *testing.T) {
			var ready atomic.Bool
			p := newProber(slog.New(slog.DiscardHandler))
			p.traffic = func(string) tunnel.PeerStats { return tunnel.PeerStats{} }
			p.train = func(string, encap.Mode, []tunnel.ProbePacket, bool) error { return nil }
			var replies sync.WaitGroup
			p.send = func(peer string, mode encap.Mode, six bool, payload []byte, size int) error {
				if !ready.Load() {
					return fmt.Errorf("probe %s: %w", peer, missing)
				}
				if _, nonce, _, ok := parseProbe(payload); ok {
					replies.Go(func() { p.received(peer, mode, six, appendProbe(nil, probeReply, nonce, size), 0) })
				}
				return nil
			}
			ctx, cancel := context.WithCancel(t.Context())
			var running sync.WaitGroup
			running.Go(func() { _ = p.run(ctx) })
			p.setPeers(time.Now(), map[string][]path.Candidate{"far": {{Mode: encap.UDP, Max: 1472}}})
			time.Sleep(20 * time.Second)
			synctest.Wait() // for what happens at this very instant
			if st, ok := p.status("far", encap.UDP); !ok || st.Probed != 0 || st.Loss != 0 || strings.Contains(st.Words, "(") {
				t.Errorf("%v: probed %d, loss %v, %q", missing, st.Probed, st.Loss, st.Words)
			}
			ready.Store(true)
			time.Sleep(2 * time.Second)
			synctest.Wait() // for what happens at this very instant
			if i, _ := p.info("far", encap.UDP); !i.Up || i.Loss != 0 {
				t.Errorf("%v: two seconds after the addresses came: %+v", missing, i)
			}
			cancel()
			running.Wait()
			replies.Wait()
		})
	}
}

// What the journal says about a path has the peer's name beside its ID, where it is known.
func TestProberLogsNames(t *testing.T) {
	var log bytes.Buffer
	p := newProber(slog.New(slog.NewTextHandler(&log, nil)))
	p.name = func(id string) string { return map[string]string{"3660": "node-b"}[id] }
	up, found := path.Info{Up: true}, path.Info{Up: true, MTU: 1472, Search: "complete"}
	for _, id := range []string{"3660", "4711"} {
		for _, c := range []path.Change{{Peer: id, Mode: encap.UDP, Is: up}, {Peer: id, Mode: encap.UDP, Was: up, Is: found}, {Peer: id, Mode: encap.UDP, Was: up}} {
			p.tell(c)
		}
		p.tellSwitch(path.Switch{Peer: id, From: encap.UDP, To: encap.IPIP, Why: "udp does not answer"})
		p.tellTrains(path.TrainChange{Peer: id})
		p.tellTrains(path.TrainChange{Peer: id, TrainInfo: path.TrainInfo{Off: true, Of: 8}})
	}
	for _, msg := range []string{`"path is up"`, `"path MTU found"`, `"path is down"`, `"packets go another way"`, `"trains are sent again"`, `"trains are lost where single packets arrive: none are sent"`} {
		for _, want := range []string{"msg=" + msg + " peer=3660 name=node-b", "msg=" + msg + " peer=4711 "} {
			if !strings.Contains(strings.ReplaceAll(log.String(), "\n", " \n"), want) {
				t.Errorf("no %s in\n%s", want, &log)
			}
		}
	}
	if strings.Count(log.String(), "name=") != 6 {
		t.Errorf("names that are not known:\n%s", &log)
	}
}

// Members that gossip has lost or found again are probed at once; those that are new, or as they were, need it not.
func TestMemberStates(t *testing.T) {
	id := func(n byte) membership.NodeID { return membership.NodeID{n} }
	member := func(n byte, state gossip.MemberState) gossip.Member {
		return gossip.Member{ID: id(n), State: state}
	}
	var s memberStates
	for _, tt := range []struct {
		members []gossip.Member
		want    []membership.NodeID
	}{
		{[]gossip.Member{member(1, gossip.StateAlive), member(2, gossip.StateDead)}, nil},
		{[]gossip.Member{member(1, gossip.StateAlive), member(2, gossip.StateDead)}, nil},
		{[]gossip.Member{member(1, gossip.StateSuspect), member(2, gossip.StateDead), member(3, gossip.StateAlive)}, []membership.NodeID{id(1)}},
		{[]gossip.Member{member(1, gossip.StateDead), member(2, gossip.StateAlive)}, []membership.NodeID{id(1), id(2)}},
		{nil, nil},
		{[]gossip.Member{member(1, gossip.StateAlive)}, nil},
	} {
		if got := s.moved(tt.members); !slices.Equal(got, tt.want) {
			t.Errorf("%v: probed %v, want %v", tt.members, got, tt.want)
		}
	}
}
