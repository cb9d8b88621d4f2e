package ownership

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/ipam"
)

func (s *Machine) has(now time.Time, part string) bool {
	for _, p := range s.Status(now).Problems {
		if strings.Contains(p.What, part) {
			return true
		}
	}
	return false
}

// Two pods have one address: the report ends with either of them.
func TestTwiceEnds(t *testing.T) {
	s, _ := lone(t, "10.244.0.0/16")
	two := NodeID{2}
	list, err := s.Allocate(simStart, PodRequest{Key: "pod"})
	if err != nil {
		t.Fatal(err)
	}
	const twice = "is used by a pod here"
	held := s.from(two, message{kind: kindHeld, rests: []rest{{list[0].Addr, 600}}})
	now := simStart
	for range 60 { // its node tells every minute
		s.HandleMessage(now, two, held)
		now = now.Add(heldEvery)
		s.Tick(now)
	}
	if !s.has(now, twice) {
		t.Error("while both pods run nothing is reported")
	}
	if _, err := s.Release(now, "pod"); err != nil {
		t.Fatal(err)
	}
	if s.Tick(now); s.has(now, twice) {
		t.Error("the pod here is gone, and it is reported")
	}

	list, err = s.Allocate(now, PodRequest{Key: "other"})
	if err != nil {
		t.Fatal(err)
	}
	s.HandleMessage(now, two, s.from(two, message{kind: kindHeld, rests: []rest{{list[0].Addr, 600}}}))
	if s.Tick(now); !s.has(now, twice) {
		t.Error("not reported")
	}
	now = now.Add(heldFor)
	if s.Tick(now); s.has(now, twice) {
		t.Errorf("the other pod's node has said nothing for %v, and it is reported", heldFor)
	}
}

// A tie is reported for a while; on the node that lost it, as long as its pods have addresses of it.
func TestTieEnds(t *testing.T) {
	for _, pods := range []int{0, 1} {
		s, _ := lone(t, "10.244.0.0/16")
		winner := Entry{Prefix: netip.MustParsePrefix("10.244.0.0/16"), Owner: NodeID{0, 1}, Version: 1}
		for range pods {
			if _, err := s.Allocate(simStart, PodRequest{Key: "pod"}); err != nil {
				t.Fatal(err)
			}
		}
		s.HandleMessage(simStart, NodeID{0, 1}, s.from(NodeID{0, 1}, message{kind: kindState, families: s.params.Families, entries: []Entry{winner}}))
		if s.Tick(simStart); !s.has(simStart, "two nodes claimed") || !s.has(simStart, "which this node used, belongs to") {
			t.Fatalf("not reported: %+v", s.Status(simStart).Problems)
		}
		now := simStart.Add(reportFor)
		if s.Tick(now); s.has(now, "two nodes claimed") != (pods > 0) || s.has(now, "which this node used, belongs to") != (pods > 0) {
			t.Errorf("%d pods have lost addresses, %v later: %+v", pods, reportFor, s.Status(now).Problems)
		}
		s.Release(now, "pod")
		if s.Tick(now); s.has(now, "two nodes claimed") || s.has(now, "which this node used, belongs to") {
			t.Errorf("after the pods: %+v", s.Status(now).Problems)
		}
	}
}

// Another cluster, and one that cannot be joined, are reported until they have been silent for a while.
func TestReportsOfOtherClustersEnd(t *testing.T) {
	s, _ := lone(t, "10.244.0.0/16")
	other := message{kind: kindState, cluster: ClusterID{7}, sender: NodeID{2}}
	s.MergeState(simStart, other.encode(), false)
	now := simStart.Add(reportFor - time.Second)
	if s.Tick(now); !s.has(now, "they never merge") {
		t.Error("not reported")
	}
	now = simStart.Add(reportFor)
	if s.Tick(now); s.has(now, "they never merge") {
		t.Error("nobody of the other cluster is there any more, and it is reported")
	}

	for _, joins := range []bool{true, false} {
		n, err := New(simStart, Config{ID: NodeID{4}}, nil, new(loneEnv))
		if err != nil {
			t.Fatal(err)
		}
		strange := message{kind: kindState, cluster: s.cluster, sender: NodeID{2}, families: []ipam.Family{{CIDR: netip.MustParsePrefix("10.244.0.0/16"), BlockLen: 99}}}
		n.MergeState(simStart, strange.encode(), false)
		if !n.has(simStart, "--node-prefix-len 99 does not fit") {
			t.Fatalf("not reported: %+v", n.Status(simStart).Problems)
		}
		now := simStart.Add(reportFor)
		if joins {
			now = simStart.Add(time.Second)
			n.MergeState(now, s.LocalState(now, false), false)
		}
		if n.Tick(now); n.has(now, "--node-prefix-len 99 does not fit") {
			t.Errorf("joined: %v, and it is reported", joins)
		}
	}
}

// Of two fixed CIDRs one is refused: that is reported, and said once in the log.
func TestOneOfTwoFixedBlocksIsRefused(t *testing.T) {
	w := quiet(t, 2, "10.244.0.0/16", "fd00::/48")
	w.hosts[1].cfg.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.77.0/24"), netip.MustParsePrefix("fd00::/64")}
	w.up()
	for range 3 {
		if _, ok := w.hosts[1].sp.notes["fixed fd00::/64"]; !ok || len(w.hosts[1].sp.notes) != 1 {
			t.Errorf("%+v", w.hosts[1].sp.notes)
		}
		w.hosts[1].sp.driveFamily(w.now, 0)
	}
}

// Whoever names a cluster of his own choice in each message makes no endless list of problems, and hides no others.
func TestReportsAreBounded(t *testing.T) {
	s, _ := lone(t, "10.244.0.0/16")
	s.noteAt(simStart, "adopt", "something else", "")
	for i := range 1000 {
		other := message{kind: kindState, cluster: ClusterID{7, byte(i >> 8), byte(i)}, sender: NodeID{2}}
		s.MergeState(simStart, other.encode(), false)
	}
	if n := len(s.notes); n != maxNotes+1 {
		t.Errorf("%d problems, want %d", n, maxNotes+1)
	}
	if !s.has(simStart, "they never merge") || !s.has(simStart, "something else") {
		t.Error("not reported")
	}
	now := simStart.Add(reportFor)
	s.Tick(now)
	other := message{kind: kindState, cluster: ClusterID{8}, sender: NodeID{2}}
	s.MergeState(now, other.encode(), false)
	if !s.has(now, "they never merge") {
		t.Error("one that comes later is not reported")
	}
}
