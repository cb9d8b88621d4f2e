package agent

import (
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/damage"
	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/membership/gossip"
)

var memoryCluster = membership.ClusterID{7}

// memberOf is a member as gossip sees it.
func memberOf(id byte, name string, state gossip.MemberState, since time.Time) gossip.Member {
	meta := membership.Meta{
		ID: membership.NodeID{id}, Cluster: memoryCluster, Name: name, UDPPort: 6080, VXLANPort: 4789, Version: "1.2.3",
		Underlay: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 1, id})}, TunAddrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 244, id, 0})},
		Capabilities: membership.CapHostByTunnel,
	}
	return gossip.Member{ID: meta.ID, Name: name, Meta: meta, State: state, Since: since}
}

func owners(ids ...byte) func(membership.NodeID) bool {
	return func(id membership.NodeID) bool {
		for _, o := range ids {
			if id == (membership.NodeID{o}) {
				return true
			}
		}
		return false
	}
}

func memoryIn(t *testing.T, dir string, now time.Time) *memory {
	t.Helper()
	m, err := recall(dir, memoryCluster, now)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// Gossip drops a member a day after its death. As long as that member owns space, the agent lists it as gossip last saw it, and so
// probes its tunnel.
func TestDeadOwnerIsRememberedForEver(t *testing.T) {
	died := time.Now()
	m := memoryIn(t, t.TempDir(), died)
	dead := memberOf(2, "b", gossip.StateDead, died)
	if missing := m.update(died, []gossip.Member{memberOf(1, "a", gossip.StateAlive, died), dead}, owners(1, 2)); len(missing) != 0 {
		t.Errorf("missing although gossip lists it: %+v", missing)
	}
	later := died.Add(1000 * time.Hour)
	missing := m.update(later, []gossip.Member{memberOf(1, "a", gossip.StateAlive, died)}, owners(1, 2))
	if want := []remembered{{Member: dead}}; !reflect.DeepEqual(missing, want) {
		t.Errorf("missing is %+v, want %+v", missing, want)
	}
	// A forget has given its space to another node.
	if missing := m.update(later, nil, owners(1)); len(missing) != 1 || missing[0].ID != (membership.NodeID{1}) {
		t.Errorf("missing after a forget: %+v", missing)
	}
	if missing := m.update(later, nil, owners(1, 2)); len(missing) != 1 {
		t.Errorf("a node that owned nothing for a while is still remembered: %+v", missing)
	}
}

// After a restart the agent knows the owners that gossip does not reach, with all that it needs to probe them.
func TestOwnersAreRememberedOverARestart(t *testing.T) {
	dir, now := t.TempDir(), time.Now()
	m := memoryIn(t, dir, now)
	all := []gossip.Member{memberOf(1, "a", gossip.StateAlive, now), memberOf(2, "b", gossip.StateDead, now), memberOf(3, "owns nothing", gossip.StateAlive, now)}
	m.update(now, all, owners(1, 2))
	if err := m.save(now, true); err != nil {
		t.Fatal(err)
	}
	started := now.Add(time.Hour)
	m = memoryIn(t, dir, started)
	missing := m.update(started, nil, owners(1, 2, 3))
	if len(missing) != 2 {
		t.Fatalf("missing: %+v", missing)
	}
	for i, r := range missing {
		if !r.unseen || r.State != gossip.StateDead || !r.Since.Equal(started) || r.Name != all[i].Name || !reflect.DeepEqual(r.Meta, all[i].Meta) {
			t.Errorf("after the restart: %+v, it was %+v", r, all[i])
		}
	}
	m.update(started, all[:1], owners(1, 2))
	if missing = m.update(started, nil, owners(1, 2)); len(missing) != 2 || missing[0].unseen || !missing[1].unseen {
		t.Errorf("gossip has seen one since the start: %+v", missing)
	}
	if other, err := recall(dir, membership.ClusterID{8}, started); err != nil || len(other.members) != 0 {
		t.Errorf("members of another cluster: %+v, %v", other.members, err)
	}
}

// The file is written when something has changed, but not again and again while a cluster grows.
func TestMemoryIsSavedOnChange(t *testing.T) {
	dir, now := t.TempDir(), time.Now()
	m := memoryIn(t, dir, now)
	step := func(what string, at time.Duration, want bool, members ...gossip.Member) {
		t.Helper()
		path := filepath.Join(dir, memoryFile)
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
		m.update(now.Add(at), members, owners(1, 2))
		if err := m.save(now.Add(at), false); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(path); (err == nil) != want {
			t.Errorf("%s: saved %v, want %v", what, err == nil, want)
		}
	}
	a, b := memberOf(1, "a", gossip.StateAlive, now), memberOf(2, "b", gossip.StateAlive, now)
	step("nobody there", 0, false)
	step("the first", time.Second, true, a)
	step("the next one soon after", 2*time.Second, false, a, b)
	step("later", time.Second+saveMemory, true, a, b)
	step("nothing new", time.Hour, false, a, b)
	a.State = gossip.StateDead
	step("a state that is not saved", 2*time.Hour, false, a, b)
	b.Meta.TunAddrs = []netip.Addr{netip.MustParseAddr("10.244.9.0")}
	step("another tun address", 3*time.Hour, true, a, b)
}

// A damaged file is as good as none, but for what can be read of it.
func TestMemoryDamaged(t *testing.T) {
	dir, now := t.TempDir(), time.Now()
	m := memoryIn(t, dir, now)
	m.update(now, []gossip.Member{memberOf(1, "a", gossip.StateAlive, now)}, owners(1))
	good, err := encodeMembers(m.members)
	if err != nil {
		t.Fatal(err)
	}
	damage.Check(t, good, func(b []byte) error { _, err := decodeMembers(b); return err })
	for text, want := range map[string]int{"": 0, "[": 0, `["AAAA"]`: 0, `["AAAA",` + string(good[1:]): 1} {
		if err := os.WriteFile(filepath.Join(dir, memoryFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		m, err := recall(dir, memoryCluster, now)
		if err == nil || m == nil || len(m.members) != want {
			t.Errorf("%q: %v, %+v", text, err, m)
		}
	}
}

func FuzzMembersFile(f *testing.F) {
	b, err := encodeMembers(map[membership.NodeID]remembered{{1}: {Member: memberOf(1, "a", gossip.StateAlive, time.Time{})}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		list, _ := decodeMembers(b)
		for _, m := range list {
			if _, err := m.Encode(nil); err != nil {
				t.Fatalf("%+v was read and cannot be written: %v", m, err)
			}
		}
	})
}
