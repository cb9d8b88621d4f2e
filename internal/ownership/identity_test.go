package ownership

import (
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// A newcomer asks for space only once its ID is on disk: what is given to an ID that a crash makes it forget would be lost
// to everybody.
func TestNoRequestBeforeTheDisk(t *testing.T) {
	one, _ := lone(t, "10.244.0.0/16")
	env := &loneEnv{fail: errors.New("no space left on device"), members: []Member{{ID: NodeID{1}, Cluster: one.Cluster(), Alive: true}}}
	s, err := New(simStart, Config{ID: NodeID{2}, Name: "two", CIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}}, nil, env)
	if err != nil {
		t.Fatal(err)
	}
	requests := func() int {
		n := 0
		for _, m := range env.sent {
			if m.kind == kindRequest {
				n++
			}
		}
		return n
	}
	now := simStart
	s.Tick(now)
	if err := s.MergeState(now, one.LocalState(now, true), true); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		now = now.Add(time.Second)
		s.Tick(now)
	}
	if s.Cluster() != one.Cluster() {
		t.Fatalf("it has not joined: %+v", s.Status(now))
	}
	if requests() != 0 {
		t.Fatal("it has asked for space, and nobody could tell after a crash who it was")
	}
	if st := s.Status(now); !slices.ContainsFunc(st.Problems, func(p Problem) bool { return p.What == "the state cannot be saved: no space left on device" }) {
		t.Errorf("problems: %v", st.Problems)
	}
	env.fail = nil
	now = now.Add(time.Second)
	s.Tick(now)
	if requests() == 0 || env.disk == nil || NodeID(env.disk.Node) != (NodeID{2}) || ClusterID(env.disk.Cluster) != one.Cluster() {
		t.Fatalf("with a disk: %d requests, on disk %+v", requests(), env.disk)
	}
}
