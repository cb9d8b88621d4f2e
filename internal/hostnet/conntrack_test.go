package hostnet

import (
	"strings"
	"testing"
)

func TestConntrack(t *testing.T) {
	for _, c := range []struct {
		count, limit int
		full         bool
	}{{-1, -1, false}, {0, 0, false}, {949, 1000, false}, {950, 1000, true}, {1000, 1000, true}} {
		if list := conntrackProblems(c.count, c.limit); (len(list) == 1) != c.full {
			t.Errorf("%d of %d: %v", c.count, c.limit, list)
		} else if c.full && (!strings.Contains(list[0].What, "of 1000 connections") || list[0].Command != "sysctl -w net.netfilter.nf_conntrack_max=2000") {
			t.Errorf("%d of %d: %+v", c.count, c.limit, list[0])
		}
	}
	h := newHost(t)
	h.tun("tun0")
	h.reconcile(h.reconciler(Options{}), dual()) // with rules for which the kernel tracks connections
	var count, limit int
	h.do(func() error { count, limit = Conntrack(); return nil })
	if count < 0 || limit <= 0 {
		t.Errorf("of this kernel: %d of %d", count, limit)
	}
}
