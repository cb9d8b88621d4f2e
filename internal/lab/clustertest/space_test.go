package clustertest

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/lab"
)

// conserved checks, out of what each agent says that it owns, that no address belongs to two and none to nobody.
func conserved(owned map[string][]netip.Prefix, cidr netip.Prefix) error {
	type piece struct {
		prefix netip.Prefix
		owner  string
	}
	var all []piece
	for owner, prefixes := range owned {
		for _, p := range prefixes {
			if p.Addr().Is4() == cidr.Addr().Is4() {
				all = append(all, piece{p, owner})
			}
		}
	}
	slices.SortFunc(all, func(a, b piece) int {
		return cmp.Or(a.prefix.Addr().Compare(b.prefix.Addr()), a.prefix.Bits()-b.prefix.Bits())
	})
	next := cidr.Addr()
	for i, p := range all {
		switch {
		case !cidr.Contains(p.prefix.Addr()):
			return fmt.Errorf("%s owns %v, outside %v", p.owner, p.prefix, cidr)
		case i > 0 && all[i-1].prefix.Overlaps(p.prefix):
			return fmt.Errorf("%s owns %v, and %s owns %v", all[i-1].owner, all[i-1].prefix, p.owner, p.prefix)
		case p.prefix.Addr() != next:
			return fmt.Errorf("nobody owns %v to %v", next, p.prefix.Addr())
		}
		next = lastOf(p.prefix).Next()
	}
	if last := lastOf(cidr); next != last.Next() {
		return fmt.Errorf("nobody owns %v to %v", next, last)
	}
	return nil
}

func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

func TestConserved(t *testing.T) {
	cidr := netip.MustParsePrefix("10.0.0.0/8")
	ps := func(s string) (out []netip.Prefix) {
		for f := range strings.FieldsSeq(s) {
			out = append(out, netip.MustParsePrefix(f))
		}
		return out
	}
	for _, tc := range []struct{ a, b, want string }{
		{"10.0.0.0/9", "10.128.0.0/9", ""},
		{"10.0.0.0/9 10.192.0.0/10", "10.128.0.0/10", ""},
		{"10.0.0.0/9", "10.192.0.0/10", "nobody owns 10.128.0.0 to 10.192.0.0"},
		{"10.0.0.0/9", "10.128.0.0/10", "nobody owns 10.192.0.0 to 10.255.255.255"},
		{"10.0.0.0/8", "10.128.0.0/9", "and b owns"},
		{"10.0.0.0/8", "11.0.0.0/24", "outside"},
		{"", "", "nobody owns"},
	} {
		err := conserved(map[string][]netip.Prefix{"a": ps(tc.a), "b": ps(tc.b)}, cidr)
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%q, %q: %v, want %q", tc.a, tc.b, err, tc.want)
		}
	}
}

// quiet waits until the agents of the hosts are ready, alive for each other, and of one mind about who owns what, which
// is everything, once.
func quiet(t *testing.T, l *lab.Lab, hosts []string, cidrs ...string) {
	t.Helper()
	// Members that were apart exchange their tables by push/pull, one pair after the other, twice a minute.
	untilWithin(t, 3*patience, "the table is equal and whole everywhere", func() error {
		digest := ""
		owned := map[string][]netip.Prefix{}
		for _, h := range hosts {
			st, err := status(t.Context(), l, h)
			if err != nil {
				return fmt.Errorf("%s: %w", h, err)
			}
			if !st.Ready || st.Cluster.Alive != len(hosts) {
				return fmt.Errorf("%s: ready %v, %d of %d alive, %+v", h, st.Ready, st.Cluster.Alive, len(hosts), st.Problems)
			}
			if digest = cmp.Or(digest, st.Cluster.Table.Digest); digest != st.Cluster.Table.Digest {
				return fmt.Errorf("the table of %s is not that of %s", h, hosts[0])
			}
			owned[h] = st.Node.Prefixes
		}
		for _, c := range cidrs {
			if err := conserved(owned, netip.MustParsePrefix(c)); err != nil {
				return err
			}
		}
		return nil
	})
}

// fill allocates addresses, so that the node has to open blocks. It returns those it got.
func fill(t *testing.T, l *lab.Lab, host string, n int) []netip.Addr {
	t.Helper()
	c, err := l.Client(host)
	if err != nil {
		t.Fatal(err)
	}
	var out []netip.Addr
	for i := range n {
		until(t, "an address on "+host, func() error {
			a, err := c.Allocate(t.Context(), api.AllocateRequest{ID: fmt.Sprintf("filler-%s-%d", host, i)})
			if err != nil {
				return err
			}
			for _, x := range a.Addresses {
				out = append(out, x.Address)
			}
			return nil
		})
	}
	return out
}

// TestPartition splits a cluster, lets both sides grow, and heals it.
func TestPartition(t *testing.T) {
	t.Parallel()
	const cidr4, cidr6 = "10.244.0.0/16", "fd00:10:244::/48"
	l := up(t, "split", lab.Options{Bare: true, Nodes: 6, Pods: -1})
	blocks := []string{"--node-prefix-len", "28,124"}
	byHand(t, l, func(lab.Host) []string { return blocks })
	for _, h := range l.Hosts() {
		if _, err := l.AddPod(t.Context(), h.Name); err != nil {
			t.Fatal(err)
		}
	}
	settled(t, l)
	quiet(t, l, hostNames(l), cidr4, cidr6)

	left, right := []string{"h1", "h2", "h3"}, []string{"h4", "h5", "h6"}
	if err := l.Split(left, right); err != nil {
		t.Fatal(err)
	}
	until(t, "each side misses the other", func() error {
		for _, h := range l.Hosts() {
			if st := mustStatus(t, l, h.Name); st.Cluster.Alive != 3 {
				return fmt.Errorf("%s sees %d alive", h.Name, st.Cluster.Alive)
			}
		}
		return nil
	})
	grow := func(side *[]string, seed string) {
		t.Helper()
		h, err := l.AddHost(t.Context(), 1)
		if err != nil {
			t.Fatal(err)
		}
		*side = append(*side, h.Name)
		if err := l.Split(left, right); err != nil {
			t.Fatal(err)
		}
		at, err := l.Host(seed)
		if err != nil {
			t.Fatal(err)
		}
		s := newStray(t, append(blocks, "--node-name", h.Name, "--join", at.Underlay[0].String())...)
		s.start(t, l, h.Name)
		if err := l.AdoptAgent(h.Name, s.socket); err != nil {
			t.Fatal(err)
		}
		s.ready(t)
		if _, err := l.AddPod(t.Context(), h.Name); err != nil {
			t.Fatal(err)
		}
	}
	grow(&left, "h2")
	grow(&right, "h5")
	handed := map[netip.Addr]string{}
	for _, h := range append(slices.Clone(left), right...) {
		for _, a := range fill(t, l, h, 20) {
			if other, twice := handed[a]; twice {
				t.Errorf("%v was given out by %s and by %s", a, other, h)
			}
			handed[a] = h
		}
		if st := mustStatus(t, l, h); len(st.Node.Blocks) < 4 {
			t.Errorf("%s has opened no further blocks: %+v", h, st.Node.Blocks)
		}
	}
	if err := l.Heal(); err != nil {
		t.Fatal(err)
	}
	quiet(t, l, hostNames(l), cidr4, cidr6)
	settled(t, l)
	if err := l.WaitPods(t.Context()); err != nil {
		t.Error(err)
	}
}
