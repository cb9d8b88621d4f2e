package ownership

import (
	"net/netip"
	"strings"
	"testing"
	"time"
)

// rebooted returns a node of three after a reboot: two answers it, three does not get its questions.
func rebooted(t *testing.T) (s *Machine, env *loneEnv, table []Entry, step func(now time.Time) time.Time) {
	t.Helper()
	before, first := lone(t, "10.244.0.0/16")
	two, three := NodeID{2}, NodeID{3}
	for i, id := range []NodeID{two, three} {
		first.members = append(first.members, Member{ID: id, Name: string(rune('b' + i)), Alive: true, Cluster: before.cluster,
			Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, id[0]}), 7946)})
		before.HandleMessage(simStart, id, before.from(id, message{kind: kindRequest, seq: 1}))
	}
	before.Tick(simStart)
	table = before.Entries()
	env = &loneEnv{members: first.members}
	s, err := New(simStart, Config{ID: NodeID{1}, Name: "one", CIDRs: before.cfg.CIDRs}, first.disk, env)
	if err != nil {
		t.Fatal(err)
	}
	return s, env, table, func(now time.Time) time.Time {
		now = s.Tick(now)
		for _, m := range env.sent {
			if m.kind == kindSync {
				s.HandleMessage(now, two, s.from(two, message{kind: kindState, seq: m.seq, flags: flagJoined, families: s.params.Families, entries: table}))
				break
			}
		}
		env.sent = nil
		return now
	}
}

// A member whose TCP port is filtered is seen alive and cannot be asked. It still exchanges tables by connections of its own.
func TestPushPullConfirms(t *testing.T) {
	for _, tc := range []struct {
		name  string
		flags uint8
		ready bool
	}{{"of a member", flagJoined, true}, {"of a member that never owned space", 0, true}} {
		s, _, table, step := rebooted(t)
		now := step(simStart)
		if s.Phase() != Confirming {
			t.Fatalf("%s: before it: %v", tc.name, s.Phase())
		}
		three := NodeID{3}
		if err := s.MergeState(now, s.from(three, message{kind: kindState, flags: tc.flags, families: s.params.Families, entries: table}), false); err != nil {
			t.Fatal(err)
		}
		if now = step(now); s.Phase() != Ready {
			t.Errorf("%s: %v: %s", tc.name, s.Phase(), s.why)
		}
		if _, err := s.Allocate(now, PodRequest{Key: "pod"}); err != nil {
			t.Error(tc.name, err)
		}
	}
}

// What one answer was worth a later one, which was sent earlier, does not take back.
func TestLateAnswerTakesNothingBack(t *testing.T) {
	s, _, _, _ := rebooted(t)
	two := NodeID{2}
	for _, flags := range []uint8{flagJoined, 0} {
		s.HandleMessage(simStart, two, s.from(two, message{kind: kindState, seq: s.confirm.nonce, flags: flags, families: s.params.Families}))
	}
	if !s.confirm.answers[two] {
		t.Error("the answer of a member that has owned space does not count any more")
	}
}

// The operator hears who keeps a node waiting, and what may be wrong, but not about an answer that is on its way.
func TestSilentMemberIsNamed(t *testing.T) {
	s, _, _, step := rebooted(t)
	port := "TCP port 7946 of c (03000000) at 192.0.2.3 may be blocked"
	problem := func(now time.Time) string {
		for _, p := range s.Status(now).Problems {
			if strings.Contains(p.What, "waiting for the table of c (03000000)") {
				return p.What + "; " + p.Remedy
			}
		}
		t.Fatalf("%+v", s.Status(now))
		return ""
	}
	now := step(simStart)
	if p := problem(now); strings.Contains(p, "blocked") {
		t.Errorf("at once: %s", p)
	}
	for now.Before(simStart.Add(2 * answerWithin)) {
		now = step(now)
	}
	if p := problem(now); !strings.Contains(p, port) || !strings.Contains(p, "tulle doctor ports") {
		t.Errorf("later: %s", p)
	}
}
