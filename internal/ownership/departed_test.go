package ownership

import (
	"bytes"
	"encoding/hex"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/tulle-net/tulle/ipam"
)

func peersOf(h *host) (names []string) {
	for _, p := range h.sp.Peers() {
		names = append(names, p.Name)
	}
	return names
}

// leaves lets a node leave, and stops it.
func (w *world) leaves(t *testing.T, h *host) {
	t.Helper()
	op, err := h.sp.Leave(w.now)
	if err != nil {
		t.Fatal(err)
	}
	w.runFor(5 * time.Second)
	if op.Err() != nil || h.sp.Phase() != Left {
		t.Fatal(op.Err(), h.sp.Phase())
	}
	h.stop()
	w.runFor(10 * time.Second)
}

// A node does not wait for the confirmation of one that left while it was down itself.
func TestConfirmedWithoutOneThatLeftMeanwhile(t *testing.T) {
	w := quiet(t, 3, "10.244.0.0/16").up()
	n0, n1, n2 := w.hosts[0], w.hosts[1], w.hosts[2]
	n0.stop()
	w.runFor(10 * time.Second)
	w.leaves(t, n2)
	n1.stop() // the word survives a restart
	n1.start(true)
	w.runFor(10 * time.Second)
	n0.start(true)
	w.runFor(10 * time.Minute)
	n1.stop()
	n0.stop()
	w.runFor(10 * time.Second)
	n0.start(false)
	w.runFor(10 * time.Second)
	wantProblem(t, n0, "no member that knows the table answers yet, of node-1 (02000000);")
	if _, err := n0.sp.Forget(w.now, n1.id, true); err != nil {
		t.Fatal(err)
	}
	w.runFor(10 * time.Minute)
	_, err := n0.sp.Allocate(w.now, PodRequest{Key: "pod"})
	if st := n0.sp.Status(w.now); st.Phase != Ready || err != nil {
		t.Errorf("owns %v, is %v: %s; peers %v; allocate: %v", n0.sp.Prefixes(), st.Phase, st.Why, peersOf(n0), err)
	}
}

// Nodes that left while a node was down do not count for its majority.
func TestMajorityWithoutThoseThatLeftMeanwhile(t *testing.T) {
	w := quiet(t, 5, "10.244.0.0/16").up()
	w.hosts[0].stop()
	w.runFor(10 * time.Second)
	for _, h := range w.hosts[3:] {
		w.leaves(t, h)
	}
	w.hosts[0].start(true)
	w.runFor(10 * time.Minute)
	w.hosts[2].stop()
	w.runFor(20 * time.Second)
	if _, err := w.hosts[0].sp.Forget(w.now, w.hosts[2].id, false); err != nil {
		t.Errorf("2 of 3 members are alive: %v", err)
	}
}

// A node that was forgotten while another one was down is no member for that one either, until it is back.
func TestForgottenMeanwhile(t *testing.T) {
	w := quiet(t, 4, "10.244.0.0/16").up()
	n0, n3 := w.hosts[0], w.hosts[3]
	n0.stop()
	n3.stop()
	w.runFor(20 * time.Second)
	op, err := w.hosts[1].sp.Forget(w.now, n3.id, true)
	if err != nil {
		t.Fatal(err)
	}
	w.runFor(5 * time.Second)
	if op.Err() != nil {
		t.Fatal(op.Err())
	}
	n0.start(true)
	w.runFor(time.Minute)
	if slices.Contains(peersOf(n0), n3.name) {
		t.Errorf("forgotten a minute ago, and still a member for node-0: %v", peersOf(n0))
	}
	n3.start(true)
	w.runFor(time.Minute)
	n3.stop()
	w.runFor(10 * time.Minute)
	for _, h := range w.hosts[:3] {
		if !slices.Contains(peersOf(h), n3.name) {
			t.Errorf("%s: a node that came back and is down again is no member: %v", h.name, peersOf(h))
		}
	}
}

// stateBefore is the state of node 2 as the version before wrote it, which did not tell who had departed.
const stateBefore = "0102" + "09000000000000000000000000000000" + "02000000000000000000000000000000" + "0300" + "0700" + "00" + "00" + "00" +
	"01040af400001018" + "00" + "010100100af4" + "0200000000000000000000000000000003"

func TestWordOfDepartedNodesAmongVersions(t *testing.T) {
	before, err := hex.DecodeString(stateBefore)
	if err != nil {
		t.Fatal(err)
	}
	m, err := decode(before)
	if err != nil || len(m.entries) != 1 || m.entries[0].Version != 3 || len(m.departed()) != 0 {
		t.Fatalf("of the version before: %+v, %v", m, err)
	}
	gone := []NodeID{{3}, {4}}
	m.setDeparted(gone)
	now := m.encode()
	if got, err := decode(now); err != nil || !slices.Equal(got.departed(), gone) {
		t.Errorf("tells of %v, heard %v, %v", gone, got.departed(), err)
	}
	// The version before reads the text of any message, and uses that of an answer only. All else has to be as it was.
	at := bytes.Index(now, append([]byte{32}, gone[0][:]...))
	if at < 0 || !bytes.Equal(slices.Concat(now[:at], []byte{0}, now[at+1+32:]), before) {
		t.Errorf("more than the text differs:\n%x\n%x", now, before)
	}
	m.text = "17 bytes are none"
	if got := m.departed(); len(got) != 0 {
		t.Errorf("of another length: %v", got)
	}
	many := make([]NodeID, 1000)
	for i := range many {
		many[i] = NodeID{5, byte(i >> 8), byte(i)}
	}
	m.setDeparted(many)
	if got, err := decode(m.encode()); err != nil || len(got.departed()) != maxTold {
		t.Errorf("of a thousand %d, %v", len(got.departed()), err)
	}
}

// However many have departed, what is kept and told is bounded, and everybody hears of all that are kept.
func TestDepartedAreBounded(t *testing.T) {
	s, env := lone(t, "10.244.0.0/16")
	other := NodeID{2}
	for i := range 2 * maxFormer {
		id := NodeID{7, byte(i >> 8), byte(i)}
		s.peers[id] = ipam.Peer{ID: ipam.ID(id)}
		s.HandleBroadcast(simStart, s.from(other, message{kind: kindNews, node: id}))
	}
	if s.Tick(simStart); len(s.former) != maxFormer || len(env.disk.Departed) != maxFormer || len(s.peers) != 0 {
		t.Fatalf("%d are kept, %d are on disk, %d are peers", len(s.former), len(env.disk.Departed), len(s.peers))
	}
	heard := make(map[NodeID]bool)
	for range maxFormer / maxTold {
		m, err := decode(s.LocalState(simStart, false))
		if err != nil {
			t.Fatal(err)
		}
		for _, id := range m.departed() {
			heard[id] = true
		}
	}
	if len(heard) != maxFormer {
		t.Errorf("%d are told of in %d messages", len(heard), maxFormer/maxTold)
	}
}

// Only a node that gossip does not see and that owns nothing is dropped on the word of others, and only on the word of one
// whose table counts.
func TestWordAboutAMember(t *testing.T) {
	alive, owner, silent := NodeID{3}, NodeID{4}, NodeID{5}
	for _, tc := range []struct {
		name string
		from uint8 // flags of the one who says it
		want []NodeID
	}{
		{"by one that has owned space", flagJoined, []NodeID{alive, owner}},
		{"by a new node", 0, []NodeID{alive, owner, silent}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, env := lone(t, "10.244.0.0/16")
			s.HandleMessage(simStart, owner, s.from(owner, message{kind: kindRequest, seq: 1}))
			env.members = []Member{{ID: alive, Name: "three", Alive: true, Cluster: s.cluster}}
			s.Tick(simStart)
			for _, id := range []NodeID{owner, silent} {
				s.peers[id] = ipam.Peer{ID: ipam.ID(id)}
			}
			m := message{kind: kindState, flags: tc.from, families: s.params.Families}
			m.setDeparted([]NodeID{alive, owner, silent, s.cfg.ID})
			if err := s.MergeState(simStart, s.from(NodeID{2}, m), false); err != nil {
				t.Fatal(err)
			}
			if got := sortedKeys(s.peers); !slices.Equal(got, tc.want) {
				t.Errorf("members are %v, want %v", got, tc.want)
			}
			if told, _ := decode(s.LocalState(simStart, false)); slices.Contains(told.departed(), owner) || slices.Contains(told.departed(), alive) {
				t.Errorf("tells that %v have departed", told.departed())
			}
		})
	}
}

// A peer that owns nothing can be forgotten, too: it does not count any more, here and elsewhere.
func TestForgetAPeerWithoutSpace(t *testing.T) {
	w := quiet(t, 3, "10.244.0.0/23").up() // two blocks for three nodes
	var poor *host
	var rest []*host
	for _, h := range w.hosts {
		if h.sp.Phase() == Joining {
			poor = h
		} else {
			rest = append(rest, h)
		}
	}
	poor.stop()
	w.runFor(20 * time.Second)
	op, err := rest[0].sp.Forget(w.now, poor.id, false)
	if err != nil {
		t.Fatal(err)
	}
	w.runFor(5 * time.Second)
	if op.Err() != nil || op.Result() != "it owned no space; it is no member any more" {
		t.Errorf("%v: %q", op.Err(), op.Result())
	}
	for _, h := range rest {
		if slices.Contains(peersOf(h), poor.name) {
			t.Errorf("%s: still a member: %v", h.name, peersOf(h))
		}
	}
	if _, err := rest[0].sp.Forget(w.now, poor.id, false); !errors.Is(err, ErrRefused) {
		t.Errorf("once more: %v", err)
	}
}
