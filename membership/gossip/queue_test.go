package gossip

import (
	"fmt"
	"testing"

	"github.com/tulle-net/tulle/membership"
)

// idle is a node that does not run.
func idle(t *testing.T) *Gossip {
	t.Helper()
	g, err := New(Config{ID: membership.NewNodeID(), Name: "idle", Bind: testAddr(), Port: testPort, Handler: newRecorder("")})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// gossiped is the next packet's broadcasts.
func (g *Gossip) gossiped() [][]byte {
	return (&delegate{g: g}).GetBroadcasts(2+1, g.cfg.packetSize()-2)
}

// One message that has been sent once, then a burst of others of the same length, more than one packet holds: after a leave, or a
// push/pull that brought much. Each is sent as often as it should be.
func TestQueueLosesNothing(t *testing.T) {
	g := idle(t)
	message := func(i int) []byte { return fmt.Appendf(nil, "%04d%0376d", i, 0) }
	sent := map[string]int{}
	round := func() {
		for _, m := range g.gossiped() {
			sent[string(m[:4])]++
		}
	}
	g.queue.add(message(0))
	round()
	const burst = 40
	for i := range burst {
		g.queue.add(message(i + 1))
	}
	if n := g.Queued(); n != burst+1 {
		t.Errorf("%d queued, not %d", n, burst+1)
	}
	for range retransmitMult * (burst + 1) {
		round()
	}
	for i := range burst + 1 {
		if n := sent[fmt.Sprintf("%04d", i)]; n != retransmitMult {
			t.Errorf("message %d was sent %d times, not %d", i, n, retransmitMult)
		}
	}
	if n := g.Stats().Queue; n != 0 {
		t.Errorf("%d queued at the end", n)
	}
}

// A member whose underlay has a larger MTU may send what does not fit this node's packets. It would stay in the queue for ever, and a
// full queue would drop others in its stead.
func TestQueueTakesOnlyWhatFits(t *testing.T) {
	g := idle(t)
	fits := g.MaxBroadcast() + broadcastHead
	g.queue.add(make([]byte, fits+1))
	if n := g.Queued(); n != 0 {
		t.Errorf("%d queued of a message that never fits", n)
	}
	g.queue.add(make([]byte, fits))
	if n := len(g.gossiped()); n != 1 {
		t.Errorf("%d sent of the largest message that fits", n)
	}
}

func TestQueueIsLimited(t *testing.T) {
	g := idle(t)
	for i := range maxQueued + 100 {
		g.queue.add(fmt.Appendf(nil, "%08d", i))
	}
	if n := g.Queued(); n != maxQueued {
		t.Errorf("%d queued, the limit is %d", n, maxQueued)
	}
	for g.Queued() > 0 {
		g.gossiped()
	}
	g.queue.add([]byte("after all"))
	if n := g.Queued(); n != 1 {
		t.Errorf("%d queued, not 1", n)
	}
}
