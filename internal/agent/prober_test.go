package agent

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/tunnel"
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
		p.send = func(peer string, mode encap.Mode, payload []byte, size int) error {
			mu.Lock()
			sent[peer]++
			mu.Unlock()
			if _, nonce, _, ok := parseProbe(payload); ok && peer != silent.Load() && mode.String() != silent.Load() {
				replies.Go(func() {
					time.Sleep(time.Millisecond)
					p.received(peer, mode, appendProbe(nil, probeReply, nonce, size), 0)
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
		for id := range want {
			if m, ok := p.chosen(id); !ok || m != encap.IPIP {
				t.Fatalf("%s: %s is used three seconds after udp is filtered", id, m)
			}
		}
		silent.Store("")
		time.Sleep(25 * time.Second)
		for id := range want {
			if m, ok := p.chosen(id); !ok || m != encap.UDP {
				t.Fatalf("%s: %s is used though udp works again", id, m)
			}
		}

		silent.Store("peer-7")
		p.poke(time.Now(), "peer-7")
		time.Sleep(10 * time.Second)
		if n := up(); n != 2*peers-2 {
			t.Errorf("%d of %d paths are up, want all but those of peer-7", n, 2*peers)
		}

		silent.Store("")
		mu.Lock()
		clear(sent)
		mu.Unlock()
		p.poke(time.Now(), "peer-7")
		time.Sleep(time.Second)
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
