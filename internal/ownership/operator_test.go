package ownership

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/ipam"
)

func TestLeave(t *testing.T) {
	w := quiet(t, 3, "10.244.0.0/16").up()
	h := w.hosts[1]
	h.newPods(3)
	if _, err := h.sp.Leave(w.now); !errors.Is(err, ErrPodsAlive) {
		t.Fatal(err)
	}
	block := h.sp.Blocks()[0].Prefix
	for _, key := range sortedStrings(h.pods) {
		h.sp.Release(w.now, key)
	}
	op, err := h.sp.Leave(w.now)
	if err != nil {
		t.Fatal(err)
	}
	w.runFor(3 * time.Second)
	select {
	case <-op.Done():
	default:
		t.Fatal("it does not end")
	}
	if op.Err() != nil || h.sp.Phase() != Left || len(h.sp.Prefixes()) != 0 {
		t.Fatalf("%v: %v, %v", op.Err(), h.sp.Phase(), h.sp.Prefixes())
	}
	w.runFor(10 * time.Second)
	heir, _ := w.hosts[0].sp.Owner(block.Addr())
	for _, o := range []*host{w.hosts[0], w.hosts[2]} {
		if o.id == heir.Owner && len(o.sp.Resting(w.now)) != 3 {
			t.Errorf("%s, the heir, lets %v rest", o.name, o.sp.Resting(w.now))
		}
		if len(o.sp.Peers()) != 1 {
			t.Errorf("%s still knows %v", o.name, o.sp.Peers())
		}
	}
	if heir.Owner == h.id || !knows(tableOf(h.disk), heir) {
		t.Errorf("%v", heir)
	}
	h.stop()
	h.start(false) // back from the disk it has still left
	w.runFor(20 * time.Second)
	if h.sp.Phase() != Left || len(h.sp.Blocks()) != 0 {
		t.Errorf("%v", h.sp.Status(w.now))
	}
	wantProblem(t, h, "has left")
	if _, err := h.sp.Allocate(w.now, PodRequest{Key: "x"}); !errors.Is(err, ErrNotReady) {
		t.Errorf("%v", err)
	}

	last, _ := lone(t, "10.0.0.0/16")
	if _, err := last.Leave(simStart); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "last node") {
		t.Errorf("%v", err)
	}
}

func TestForget(t *testing.T) {
	w := quiet(t, 3, "10.244.0.0/16", "fd00::/48").up()
	n0, n1, n2 := w.hosts[0], w.hosts[1], w.hosts[2]
	n2.newPods(2)
	pod := n2.sp.Allocations()[0].Addr
	if _, err := n0.sp.Forget(w.now, n2.id, true); !errors.Is(err, ErrAlive) {
		t.Fatalf("a living node, by force: %v", err)
	}
	if _, err := n0.sp.Forget(w.now, NodeID{99}, true); !errors.Is(err, ErrRefused) {
		t.Fatalf("a stranger: %v", err)
	}
	n2.stop()
	if _, err := n0.sp.Forget(w.now, n2.id, false); !errors.Is(err, ErrAlive) {
		t.Fatalf("a node that gossip only suspects: %v", err)
	}
	w.runFor(10 * time.Second)
	n1.group = 1
	w.parted = w.now
	w.runFor(10 * time.Second)
	if _, err := n0.sp.Forget(w.now, n2.id, false); !errors.Is(err, ErrNoMajority) {
		t.Fatalf("one of three: %v", err)
	}
	w.mend()
	w.runFor(5 * time.Second)
	n0.takeover, n0.victim, n0.victimID = &takeover{}, n2, n2.id
	op, err := n0.sp.Forget(w.now, n2.id, false)
	if err != nil {
		t.Fatal(err)
	}
	n0.forgetting = op
	if _, err := n0.sp.Forget(w.now, n2.id, false); !errors.Is(err, ErrBusy) {
		t.Fatalf("twice: %v", err)
	}
	w.runFor(goneFor)
	if op.Err() != nil || op.Result() == "" {
		t.Fatal(op.Err())
	}
	if e, _ := n1.sp.Owner(pod); e.Owner != n0.id {
		t.Errorf("node-1 says %v", e)
	}

	// It comes back: stops using that space, keeps its pods' addresses out of use,
	// says so, and gets other space.
	n2.cfg.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.5.0/24"), netip.MustParsePrefix("fd00:0:0:5::/64")} // or it may get the old space back
	n2.start(false)
	w.runFor(10 * time.Second)
	wantProblem(t, n2, "was forgotten while it was away")
	wantProblem(t, n2, "2 pods of this node have addresses that belong to others") // each has two
	if b := n2.sp.Blocks(); len(b) != 2 || b[0].Prefix.Contains(pod) || n2.sp.Phase() != Ready {
		t.Errorf("%v %v", n2.sp.Phase(), b)
	}
	w.runFor(70 * time.Second)
	if rests := n0.sp.Resting(w.now); !slices.ContainsFunc(rests, func(c ipam.Cooling) bool { return c.Addr == pod }) {
		t.Errorf("node-0 does not keep %v out of use: %v", pod, rests)
	}
	if f := n2.sp.Check(w.now, n2.sp.Allocations(), 0); len(f) != 4 || f[0].Kind != Stranded {
		t.Errorf("%v", f)
	}
	for range 20 {
		n2.endPods()
	}
	w.runFor(reportFor)
	if p := n2.sp.Status(w.now).Problems; len(p) != 0 {
		t.Errorf("after its pods are gone: %v", p)
	}
}

func TestForgetAsksTheTunnel(t *testing.T) {
	s, env := lone(t, "10.244.0.0/16")
	two := NodeID{2}
	s.HandleMessage(simStart, two, s.from(two, message{kind: kindRequest, seq: 1}))
	env.tunnel = true
	if _, err := s.Forget(simStart, two, true); !errors.Is(err, ErrAlive) || !strings.Contains(err.Error(), "tunnel") {
		t.Fatal(err)
	}
	env.tunnel = false
	if _, err := s.Forget(simStart, two, false); !errors.Is(err, ErrNoMajority) {
		t.Fatal(err)
	}
	op, err := s.Forget(simStart, two, true)
	if err != nil || op.Err() != nil {
		t.Fatal(err)
	}
	if got := s.Prefixes(); len(got) != 1 || got[0].Bits() != 16 {
		t.Errorf("%v", got)
	}
}

// A node whose table is not confirmed says so, and what to do, when it is to forget or to leave: that it has no addresses for pods is not the question.
func TestOperationsBeforeTheTableIsConfirmed(t *testing.T) {
	s, env := lone(t, "10.244.0.0/16")
	two := NodeID{2}
	s.HandleMessage(simStart, two, s.from(two, message{kind: kindRequest, seq: 1}))
	again, err := New(simStart, Config{ID: s.Node(), Name: "one"}, env.disk, &loneEnv{})
	if err != nil {
		t.Fatal(err)
	}
	again.Tick(simStart)
	_, err = again.Forget(simStart, two, false)
	if !errors.Is(err, ErrUnconfirmed) || errors.Is(err, ErrNotReady) || !strings.Contains(err.Error(), "--force") {
		t.Errorf("forget: %v", err)
	}
	if _, err = again.Leave(simStart); !errors.Is(err, ErrUnconfirmed) || errors.Is(err, ErrNotReady) {
		t.Errorf("leave: %v", err)
	}
	if _, err = again.Forget(simStart, two, true); err != nil {
		t.Errorf("forget --force: %v", err)
	}
}

func TestExternal(t *testing.T) {
	w := quiet(t, 2, "10.244.0.0/16").up()
	s := w.hosts[0].sp
	p := netip.MustParsePrefix
	x := External{Endpoint: netip.MustParseAddr("192.0.2.9"), Encap: "ipip"}
	theirs := w.hosts[1].sp.Blocks()[0].Prefix
	for what, q := range map[string]netip.Prefix{
		"outside the cluster CIDR": p("10.9.0.0/24"), "belongs to node-1": theirs,
		"is used by the pods": p("10.244.0.64/26"), "host bits": netip.PrefixFrom(netip.MustParseAddr("10.244.9.9"), 24),
	} {
		if err := s.AddExternal(w.now, q, x); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), what) {
			t.Errorf("%v: %v", q, err)
		}
	}
	if err := s.AddExternal(w.now, p("10.244.9.16/28"), x); err != nil {
		t.Fatal(err)
	}
	if err := s.AddExternal(w.now, p("10.244.9.16/28"), x); err != nil {
		t.Errorf("again: %v", err)
	}
	w.runFor(10 * time.Second)
	list := w.hosts[1].sp.Externals()
	if len(list) != 1 || list[0].Prefix != p("10.244.9.16/28") || *list[0].External != x || list[0].Owner != w.hosts[0].id {
		t.Errorf("node-1 sees %v", list)
	}
	if err := w.hosts[1].sp.RemoveExternal(w.now, p("10.244.9.16/28")); !errors.Is(err, ErrRefused) {
		t.Errorf("removed elsewhere: %v", err)
	}
	if err := s.RemoveExternal(w.now, p("10.244.9.16/28")); err != nil || len(s.Externals()) != 0 {
		t.Errorf("%v %v", err, s.Externals())
	}
}
