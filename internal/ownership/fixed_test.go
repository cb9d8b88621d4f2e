package ownership

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/tulle-net/tulle/ipam"
)

func (h *host) restart(fixed ...netip.Prefix) {
	h.stop()
	h.w.runFor(time.Second)
	h.cfg.PodCIDRs = fixed
	h.start(true)
}

// allocates returns the address of a new pod.
func (h *host) allocates(t *testing.T, key string) netip.Addr {
	t.Helper()
	list, err := h.sp.Allocate(h.w.now, PodRequest{Key: key})
	if err != nil {
		t.Fatal(key, err)
	}
	return list[0].Addr
}

// A node that gets a fixed CIDR while it has pods uses it for new pods at once, and closes its other blocks as soon as they
// have none. Its tun address changes at the next start only.
func TestFixedBlockLater(t *testing.T) {
	w := quiet(t, 2, "10.244.0.0/16").up()
	n1 := w.hosts[1]
	n1.newPods(1)
	old, tun := n1.sp.Blocks()[0].Prefix, n1.sp.TunAddrs()
	fixed := netip.MustParsePrefix("10.244.77.0/24")
	n1.restart(fixed)
	w.runFor(time.Minute)
	if a := n1.allocates(t, "later"); !fixed.Contains(a) {
		t.Errorf("a new pod gets %v; blocks %v", a, n1.sp.Blocks())
	}
	had := n1.sp.Allocations()[0]
	for range 20 {
		n1.endPods()
	}
	w.runFor(30 * time.Second)
	if _, err := n1.sp.Allocate(w.now, PodRequest{Key: had.Key, Want: []netip.Addr{had.Addr}}); err != nil {
		t.Errorf("a pod that is restarted does not get its address: %v", err)
	}
	n1.sp.Release(w.now, had.Key)
	w.runFor(2 * time.Minute)
	if got := n1.sp.pool.Prefixes(); slices.Contains(got, old) || !slices.Equal(n1.sp.TunAddrs(), tun) {
		t.Errorf("without pods in %v the blocks are %v, and the tun address %v is %v", old, got, tun, n1.sp.TunAddrs())
	}
	if _, ok := n1.sp.pool.ProbeAddr(false); !ok {
		t.Error("no address for direct probes is left")
	}
	for i := range 254 {
		n1.sp.Allocate(w.now, PodRequest{Key: string(rune('a' + i))})
	}
	if list, err := n1.sp.Allocate(w.now, PodRequest{Key: "one more"}); err == nil {
		t.Errorf("the fixed block is full, and a pod gets %v", list)
	}
	n1.restart(fixed)
	if got := n1.sp.pool.Prefixes(); !slices.Equal(got, []netip.Prefix{fixed}) || n1.sp.TunAddrs()[0] != fixed.Addr() {
		t.Errorf("after the next start: blocks %v, tun address %v", got, n1.sp.TunAddrs())
	}
	w.runFor(time.Minute)
	if free := n1.sp.free(w.now, 0); !ipam.Overlaps(free, old) {
		t.Errorf("%v can not be given away: free are %v", old, free)
	}
}

// Without a pod nothing holds the former blocks, except for the tun address while the agent runs.
func TestFixedBlockWithoutPods(t *testing.T) {
	w := quiet(t, 2, "10.244.0.0/16").up()
	n1 := w.hosts[1]
	old, tun := n1.sp.Blocks()[0].Prefix, n1.sp.TunAddrs()
	for _, fixed := range []string{"10.244.77.0/24", "10.244.78.0/24"} {
		n1.restart(netip.MustParsePrefix(fixed))
		w.runFor(time.Minute)
		if !slices.Equal(n1.sp.TunAddrs(), tun) || n1.sp.pool.Prefixes()[0] == old {
			t.Errorf("tun address %v, now %v; blocks %v", tun, n1.sp.TunAddrs(), n1.sp.Blocks())
		}
		if a := n1.allocates(t, fixed); !netip.MustParsePrefix(fixed).Contains(a) {
			t.Errorf("a pod gets %v", a)
		}
		n1.sp.Release(w.now, fixed)
		w.runFor(2 * time.Minute)
		n1.restart(netip.MustParsePrefix(fixed))
		tun = n1.sp.TunAddrs()
		if tun[0] != netip.MustParsePrefix(fixed).Addr() {
			t.Errorf("after another start the tun address is %v", tun)
		}
	}
	n1.restart() // without a fixed CIDR it goes on with what it has
	w.runFor(time.Minute)
	if got := n1.sp.Blocks(); len(got) != 1 || !slices.Equal(n1.sp.TunAddrs(), tun) {
		t.Errorf("blocks %v, tun address %v", got, n1.sp.TunAddrs())
	}
}

// A fixed CIDR that overlaps the block of the tun address takes its place.
func TestFixedBlockOverTheTunAddress(t *testing.T) {
	for _, bits := range []int{23, 25} {
		w := quiet(t, 2, "10.244.0.0/16").up()
		n0 := w.hosts[0]
		tun := n0.sp.TunAddrs()
		n0.restart(netip.PrefixFrom(tun[0], bits))
		w.runFor(time.Minute)
		if got := n0.sp.pool.Prefixes(); len(got) != 1 || got[0].Bits() != bits || !slices.Equal(n0.sp.TunAddrs(), tun) {
			t.Errorf("blocks %v, tun address %v, was %v", got, n0.sp.TunAddrs(), tun)
		}
	}
}

// A node that gives a part of its first block away as a fixed CIDR keeps the rest of it, and with it its tun address.
func TestTunAddressStaysWhenAFixedBlockIsGiven(t *testing.T) {
	w := quiet(t, 2, "10.244.0.0/16").up()
	n0, n1 := w.hosts[0], w.hosts[1]
	tun := n0.sp.TunAddrs()
	lo, hi := ipam.Halves(n0.sp.Blocks()[0].Prefix)
	n1.restart(hi)
	w.runFor(time.Minute)
	if !slices.Equal(tun, n0.sp.TunAddrs()) {
		t.Errorf("the tun address of node-0 was %v, and is %v", tun, n0.sp.TunAddrs())
	}
	if got := n0.sp.pool.Prefixes(); got[0] != lo {
		t.Errorf("node-0 has the blocks %v, want %v first", got, lo)
	}
	if got := n1.sp.pool.Prefixes(); !slices.Contains(got, hi) {
		t.Errorf("node-1 has the blocks %v, want %v among them", got, hi)
	}
	if a := n0.allocates(t, "pod"); !lo.Contains(a) {
		t.Errorf("a pod on node-0 gets %v", a)
	}
	n0.restart()
	if !slices.Equal(tun, n0.sp.TunAddrs()) {
		t.Errorf("after a restart the tun address of node-0 is %v", n0.sp.TunAddrs())
	}
}
