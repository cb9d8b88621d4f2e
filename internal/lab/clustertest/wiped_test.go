package clustertest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

// TestWipedBootstrap takes its disk from the host that the shared configuration file names as the one which starts the
// cluster: it must never start a second one, and joins the one that is there as a new node, at the address of its dead self.
func TestWipedBootstrap(t *testing.T) {
	t.Parallel()
	l := up(t, "wiped", lab.Options{Underlay: lab.IPv4Only})
	settled(t, l)
	const cidr4, cidr6 = "10.244.0.0/16", "fd00:10:244::/48"
	before := mustStatus(t, l, "h1")
	h1, err := l.Host("h1")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.ResetHost(t.Context(), "h1"); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(h1.Dir, "state")); err != nil {
		t.Fatal(err)
	}

	// It cannot know that there is a cluster, but it asks all of its seeds before it would start one.
	others := []string{"h2", "h3"}
	var seeds []string
	for _, h := range l.Hosts()[1:] {
		seeds = append(seeds, h.Underlay[0].String())
	}
	if err := l.Split([]string{"h1"}, others); err != nil {
		t.Fatal(err)
	}
	if err := l.StartAgent(t.Context(), "h1"); err != nil {
		t.Fatal(err)
	}
	waits := func() error {
		st, err := status(t.Context(), l, "h1")
		if err != nil {
			return err
		}
		if st.Ready || st.Cluster.ID != "" || len(st.Node.Prefixes) > 0 {
			t.Fatalf("a wiped bootstrap node whose seeds do not answer: ready %v, cluster %q, owns %v", st.Ready, st.Cluster.ID, st.Node.Prefixes)
		}
		if missing := lacks(fmt.Sprintf("%+v", st.Problems), seeds[0], seeds[1], "--bootstrap=force"); len(missing) > 0 {
			return fmt.Errorf("it lacks %q: %+v", missing, st.Problems)
		}
		return nil
	}
	until(t, "it waits for its seeds", waits)
	for range 20 {
		time.Sleep(100 * time.Millisecond)
		if err := waits(); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Heal(); err != nil {
		t.Fatal(err)
	}
	if err := l.WaitReady(t.Context(), "h1"); err != nil {
		t.Fatal(err)
	}
	after := mustStatus(t, l, "h1")
	if after.Cluster.ID != before.Cluster.ID || after.Node.ID == before.Node.ID {
		t.Errorf("cluster %s, want %s as before; node %s, want another than %s", after.Cluster.ID, before.Cluster.ID, after.Node.ID, before.Node.ID)
	}
	for _, p := range after.Node.Prefixes {
		for _, old := range before.Node.Blocks {
			if p.Overlaps(old.Prefix) {
				t.Errorf("it owns %v, with %v of its former self, whose space nobody has taken over", p, old.Prefix)
			}
		}
	}
	if _, err := l.AddPod(t.Context(), "h1"); err != nil {
		t.Fatal(err)
	}
	soon, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	if err := l.WaitPods(soon); err != nil {
		t.Fatal(err)
	}
	until(t, "everybody reaches everybody", func() error {
		pongs, err := l.PingAll(t.Context(), true)
		for _, q := range pongs {
			if q.Err != nil {
				err = errors.Join(err, fmt.Errorf("%s to %s: %w", q.From, q.To, q.Err))
			}
		}
		return err
	})

	// Both have the same name, so the name says which IDs there are, and the ID tells them apart.
	until(t, "the former self is given up", func() error {
		r := tulle(t, l, "h2", "forget", before.Node.ID)
		if r.code != 0 {
			return errors.New(r.out + r.err)
		}
		return nil
	})
	all := hostNames(l)
	quiet(t, l, all, cidr4, cidr6)
	settled(t, l)
	for _, h := range all {
		st := mustStatus(t, l, h)
		for _, q := range st.Peers {
			if q.ID == before.Node.ID {
				t.Errorf("%s still counts on the former self: %+v", h, q)
			}
		}
	}
}
