package agent

import (
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/ownership"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/membership/gossip"
	"github.com/tulle-net/tulle/membership/keyring"
)

// A key operation names, beside those that answer, the owners of space that this node has never seen, and the nodes that it saw
// and that own nothing.
func TestKeyOperationNamesTheAbsent(t *testing.T) {
	self, alive, owner, seen := membership.NodeID{1}, membership.NodeID{2}, membership.NodeID{3}, membership.NodeID{4}
	entry := func(prefix string, owner membership.NodeID) membership.Entry {
		return membership.Entry{Prefix: netip.MustParsePrefix(prefix), Owner: owner, Version: 1}
	}
	state := &ipam.State{
		Node: ipam.ID(self), Cluster: ipam.ID{7}, Families: []ipam.Family{{CIDR: netip.MustParsePrefix("10.244.0.0/16"), BlockLen: 24}},
		Peers: []ipam.Peer{{ID: ipam.ID(alive), Name: "b"}, {ID: ipam.ID(seen), Name: "d"}},
	}
	state.Table = membership.AppendEntries(nil, []membership.Entry{entry("10.244.0.0/17", self), entry("10.244.128.0/18", alive), entry("10.244.192.0/18", owner)})
	m, err := ownership.New(time.Now(), ownership.Config{ID: self, Name: "a"}, state, &cluster{})
	if err != nil {
		t.Fatal(err)
	}
	s := &session{clusterSide: clusterSide{ownership: m}}
	r := gossip.KeyReport{Answers: []gossip.KeyAnswer{{ID: self, Name: "a"}, {ID: alive, Name: "b", Err: "no answer"}}}
	got, err := s.keyResult(keyring.Fingerprint{}, r, nil)
	if err != nil {
		t.Fatal(err)
	}
	var failed []api.NodeRef
	for _, f := range got.Failed {
		failed = append(failed, f.Node)
	}
	want := []api.NodeRef{{Name: "b", ID: alive.String()}, {ID: owner.String()}, {Name: "d", ID: seen.String()}}
	if !reflect.DeepEqual(failed, want) || got.Members != 4 || got.Done != 1 {
		t.Errorf("%d of %d, failed on %+v, want %+v", got.Done, got.Members, failed, want)
	}
}
