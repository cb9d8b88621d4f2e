package ownership

import (
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/tulle-net/tulle/ipam"
)

// rests returns how long the node keeps an address out of use.
func (h *host) rests(a netip.Addr) time.Duration {
	for _, c := range h.sp.Resting(h.w.now) {
		if c.Addr == a {
			return c.Until.Sub(h.w.now)
		}
	}
	return 0
}

// The addresses that pods of a forgotten node still have stay out of use over a restart of the new owner, also when the
// reminders of that node do not come through for some minutes.
func TestHeldAddressesRestOverARestart(t *testing.T) {
	w := quiet(t, 3, "10.244.0.0/16").up()
	n0, n2 := w.hosts[0], w.hosts[2]
	n2.newPods(2)
	pod := n2.sp.Allocations()[0].Addr
	n2.stop()
	w.runFor(10 * time.Second)
	op, err := n0.sp.Forget(w.now, n2.id, false)
	if err != nil {
		t.Fatal(err)
	}
	w.runFor(goneFor)
	if op.Err() != nil {
		t.Fatal(op.Err())
	}
	n2.cfg.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.5.0/24")} // or it may get the old space back
	n2.start(false)
	w.runFor(3 * time.Minute)
	before := n0.rests(pod)
	n2.group = 1
	w.parted = w.now
	w.relink()
	n0.stop()
	w.runFor(2 * time.Second)
	n0.start(true)
	w.runFor(2 * time.Minute)
	if after := n0.rests(pod); before < 8*time.Minute || after < before-3*time.Minute {
		t.Errorf("%v, which a running pod has, rests for %v, and two minutes after the restart for %v", pod, before, after)
	}
}

// A promise that was saved while the clock was ahead ends in time all the same.
func TestPromiseAfterClockWasAhead(t *testing.T) {
	w := quiet(t, 4, "10.244.0.0/16").up()
	n0, n1, n2, n3 := w.hosts[0], w.hosts[1], w.hosts[2], w.hosts[3]
	n3.stop()
	w.runFor(20 * time.Second)
	n1.sp.HandleMessage(w.now.Add(8*time.Hour), n2.id, n2.sp.from(n2.id, message{kind: kindPromise, seq: 5, node: n3.id}))
	n1.stop()
	w.runFor(time.Second)
	n1.start(true)
	w.runFor(2 * promiseLease)
	op, err := n0.sp.Forget(w.now, n3.id, false)
	if err != nil {
		t.Fatal(err)
	}
	w.runFor(12 * time.Second)
	if op.Err() != nil {
		t.Errorf("two minutes later: %v", op.Err())
	}
}

// A majority does not protect a node on the smaller side of a split, as docs/membership.md says. When the split is over, it
// gives the space up and says so.
func TestForgetDuringASplit(t *testing.T) {
	w := quiet(t, 5, "10.244.0.0/16").up()
	n0, n4 := w.hosts[0], w.hosts[4]
	n4.newPods(1)
	w.hosts[3].group, n4.group = 1, 1
	w.parted = w.now
	w.relink()
	w.runFor(time.Minute)
	n0.victim, n0.victimID, n0.takeover = n4, n4.id, &takeover{}
	op, err := n0.sp.Forget(w.now, n4.id, false)
	if err != nil {
		t.Fatal(err)
	}
	n0.forgetting = op
	w.runFor(time.Minute)
	if op.Err() != nil {
		t.Fatal(op.Err())
	}
	n4.newPods(1)
	for _, a := range n4.sp.Allocations() {
		if e, _ := n0.sp.Owner(a.Addr); e.Owner != n0.id {
			t.Errorf("%v belongs to %v", a.Addr, e)
		}
	}
	w.mend()
	w.runFor(20 * time.Second)
	wantProblem(t, n4, "which this node used, belongs to node-0")
	wantProblem(t, n4, "2 pods of this node have addresses that belong to others")
	pods := n4.sp.Allocations()
	slices.SortFunc(pods, func(a, b ipam.Allocation) int { return a.Addr.Compare(b.Addr) })
	if got := n4.sp.Stranded(); !slices.Equal(got, pods) || len(n0.sp.Stranded()) > 0 {
		t.Errorf("stranded: %v, want %v; of the new owner %v", got, pods, n0.sp.Stranded())
	}
	for _, b := range n4.sp.pool.Prefixes() {
		if e, _ := n0.sp.Owner(b.Addr()); e.Owner != n4.id {
			t.Errorf("node-4 goes on with %v of %v", b, e)
		}
	}
}

// A node is restarted after it was forgotten, and reaches nobody: it gives no address that belongs to another one now. One that
// was away for a moment only does, as nobody can have forgotten it.
func TestRestartAfterAForget(t *testing.T) {
	for _, away := range []time.Duration{5 * time.Second, time.Minute} { // and ten seconds more
		w := quiet(t, 3, "10.244.0.0/16").up()
		n0, n2 := w.hosts[0], w.hosts[2]
		n2.newPods(1)
		n2.stop()
		w.runFor(10 * time.Second)
		op, err := n0.sp.Forget(w.now, n2.id, false)
		if err != nil {
			t.Fatal(err)
		}
		w.runFor(away)
		n2.group = 1
		w.parted = w.now
		n2.start(true)
		w.runFor(time.Hour)
		list, err := n2.sp.Allocate(w.now, PodRequest{Key: "new"})
		if away > ipam.FreshFor {
			if err == nil || op.Err() != nil || len(n0.sp.table.Owned(n2.id)) > 0 {
				t.Errorf("away for %v: %v, forgotten: %v", away, list, op.Err())
			}
		} else if err != nil {
			t.Errorf("away for %v: %v", away, err)
		}
	}
}

// A forget waits until the node has been gone for long enough: after this node has seen it, or has started itself. By force it
// does not wait. It ends if the node comes back.
func TestForgetWaits(t *testing.T) {
	ended := func(op *Op) bool {
		select {
		case <-op.Done():
			return true
		default:
			return false
		}
	}
	w := quiet(t, 4, "10.244.0.0/16").up()
	n0, n1, n3 := w.hosts[0], w.hosts[1], w.hosts[3]
	n3.stop()
	w.runFor(10 * time.Second)
	op, err := n0.sp.Forget(w.now, n3.id, false)
	if err != nil {
		t.Fatal(err)
	}
	w.runFor(ipam.FreshFor - 10*time.Second)
	if ended(op) {
		t.Fatal("it did not wait", op.Err())
	}
	n3.start(true)
	w.runFor(time.Second)
	if !ended(op) || !errors.Is(op.Err(), ErrAlive) {
		t.Fatal("the node is back, and it is still to be forgotten")
	}

	n3.stop()
	w.runFor(goneFor + 10*time.Second)
	n0.stop()
	n0.start(true)
	w.runFor(2 * time.Second)
	if op, err = n0.sp.Forget(w.now, n3.id, false); err != nil {
		t.Fatal(err)
	}
	w.runFor(goneFor - 4*time.Second)
	if ended(op) {
		t.Fatal("it did not wait after its start", op.Err())
	}
	if op, err = n1.sp.Forget(w.now, n3.id, false); err != nil {
		t.Fatal(err)
	}
	if w.runFor(time.Second); !ended(op) || op.Err() != nil {
		t.Fatal("it waits although the node has been gone for long", op.Err())
	}

	n2 := w.hosts[2]
	n2.stop()
	w.runFor(5 * time.Second)
	n1.sp.HandleMessage(w.now, n0.id, n0.sp.from(n0.id, message{kind: kindPromise, seq: 9, node: n2.id}))
	if p, ok := n1.sp.promises[n2.id]; ok {
		t.Errorf("a member promises %+v about a node that it has just seen", p)
	}
	if op, err = n1.sp.Forget(w.now, n2.id, true); err != nil {
		t.Fatal(err)
	}
	if w.runFor(time.Second); !ended(op) || op.Err() != nil {
		t.Fatal("by force it waits", op.Err())
	}
}
