package ownership

import (
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/damage"
	"github.com/tulle-net/tulle/ipam"
)

// TestConcurrentUse is for the race detector.
func TestConcurrentUse(t *testing.T) {
	s, _ := lone(t, "10.244.0.0/16")
	changed, cancel := s.Subscribe()
	defer cancel()
	two := NodeID{2}
	req := s.from(two, message{kind: kindRequest, seq: 1})
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 50 {
				now := simStart.Add(time.Duration(i) * time.Second)
				key := fmt.Sprint(g, i%5)
				s.Allocate(now, PodRequest{Key: key})
				s.HandleMessage(now, two, req)
				s.Tick(now)
				s.Status(now)
				s.LocalState(now, false)
				for range s.Routes() {
				}
				s.Release(now, key)
			}
		})
	}
	wg.Wait()
	select {
	case <-changed:
	default:
		t.Error("a donation changed the table, and nobody was told")
	}
}

// sampleMessages returns the encoding of a message of each kind, with all fields.
func sampleMessages(cluster ClusterID) (list [][]byte) {
	block := netip.MustParsePrefix("10.244.3.0/24")
	for k := kindSync; k < kindEnd; k++ {
		m := message{kind: k, cluster: cluster, sender: NodeID{2}, seq: 1, node: NodeID{3}, prefix: block, text: "sixteen bytes...",
			families: []ipam.Family{{CIDR: netip.MustParsePrefix("10.244.0.0/16"), BlockLen: 24}},
			rests:    []rest{{netip.MustParseAddr("10.244.3.1"), 60}},
			entries:  []Entry{{Prefix: block, Owner: NodeID{3}, Version: 2}}}
		list = append(list, m.encode())
	}
	return list
}

// TestHandleDamaged hands damaged messages to a member, as each of the ways in.
func TestHandleDamaged(t *testing.T) {
	id := ClusterID{9}
	for _, good := range sampleMessages(id) {
		s, _ := lone(t, "10.244.0.0/16")
		s.cluster = id
		now := simStart
		damage.Check(t, good, func(b []byte) error {
			if _, err := decode(b); err != nil { // the first thing that each of them does
				return err
			}
			now = now.Add(promiseLease) // or promises about hundreds of nodes pile up
			s.HandleMessage(now, NodeID{2}, b)
			s.HandleBroadcast(now, b)
			s.MergeState(now, b, true)
			return nil
		})
	}
}

func FuzzHandleMessage(f *testing.F) {
	id := ClusterID{9}
	for _, b := range sampleMessages(id) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := decode(b); err == nil {
			again, err := decode(m.encode())
			if err != nil || again.kind != m.kind || again.seq != m.seq || len(again.entries) != len(m.entries) {
				t.Fatalf("%+v does not survive encoding: %v", m, err)
			}
		}
		s, _ := lone(t, "10.244.0.0/16")
		s.cluster = id
		before := s.table.Within(netip.MustParsePrefix("10.244.0.0/24"))
		s.HandleMessage(simStart, NodeID{2}, b)
		s.HandleBroadcast(simStart, b)
		s.MergeState(simStart, b, true)
		s.Tick(simStart.Add(time.Second))
		w, err := New(simStart, Config{ID: NodeID{4}}, nil, new(loneEnv))
		if err != nil {
			t.Fatal(err)
		}
		w.MergeState(simStart, b, true)
		w.Tick(simStart.Add(time.Second))
		if len(s.pool.Prefixes()) > 0 && s.phase != Left && len(before) > 0 {
			s.Allocate(simStart, PodRequest{Key: "x"})
		}
	})
}
