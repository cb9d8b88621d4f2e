package ownership

import (
	"net/netip"
	"slices"
	"testing"
)

// What a push/pull brings is news on this side of a healed partition: it is passed on by broadcast, once.
func TestHealIsBroadcast(t *testing.T) {
	s, env := lone(t, "10.244.0.0/16")
	other := Entry{Prefix: netip.MustParsePrefix("10.244.128.0/17"), Owner: NodeID{2}, Version: 2}
	m := message{kind: kindState, cluster: s.Cluster(), sender: NodeID{3}, families: s.Params().Families, entries: []Entry{other}}
	env.told = nil
	for range 2 {
		if err := s.MergeState(simStart, m.encode(), false); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.EqualFunc(env.told, []Entry{other}, Entry.Equal) {
		t.Errorf("told %v", env.told)
	}
}
