package doctor_test

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/doctor"
	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// TestSpaceAndClusters has more hosts than blocks, a host of another cluster, and a clone.
func TestSpaceAndClusters(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw := n.Switch()
	a, b, c := n.Host("a"), n.Host("b"), n.Host("c")
	for h, addr := range map[*hosts.Host]string{a: "10.0.1.11/24", b: "10.0.1.12/24", c: "10.0.1.13/24"} {
		h.Plug(sw, "eth0", addr)
	}
	first := a.Agent("--bootstrap", "--underlay", "eth0", "--cluster-cidr", "10.244.0.0/24", "--node-prefix-len", "25", "--paths", "udp")
	first.Ready(20 * time.Second)
	second := b.Agent("--join", "10.0.1.11", "--paths", "udp")
	second.Ready(20 * time.Second)

	// c has a cluster of its own, and is told to join this one.
	own := c.Agent("--bootstrap", "--underlay", "eth0", "--paths", "udp")
	own.Ready(20 * time.Second)
	own.Stop()
	own = c.Agent("--join", "10.0.1.11", "--paths", "udp")
	p := at(t, n, c, own)
	f := p.finds("cluster", doctor.Failed, "belongs to cluster", "two clusters never merge")
	if !strings.Contains(f.What, "10.0.1.11:7946") && !strings.Contains(f.What, "10.0.1.12:7946") { // the seed, or the other member
		t.Errorf("names no member of the other cluster: %s", f.What)
	}
	own.Stop()
	c.WipeDisk()

	// There are two blocks, and two hosts have them.
	third := c.Agent("--join", "10.0.1.11", "--paths", "udp")
	p = at(t, n, c, third)
	p.well("cluster")
	p.finds("space", doctor.Failed, "no free block", "10.244.0.0/24")
	if out, errs, code := second.Tulle("leave"); code != 0 {
		t.Fatal(out, errs)
	}
	second.Stop()
	third.Ready(30 * time.Second)
	p.well("space")

	// A clone of c, where b was.
	b.WipeDisk()
	if err := os.CopyFS(b.StateDir(), os.DirFS(c.StateDir())); err != nil {
		t.Fatal(err)
	}
	clone := b.Agent("--join", "10.0.1.11", "--paths", "udp")
	if code, _ := clone.Ended(20 * time.Second); code == 0 {
		t.Error("a clone ended as if all were well")
	}
	at(t, n, a, first).finds("identity", doctor.Failed, "in use by", "the newer of them does not run")
}
