package hostnet

import (
	"bytes"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/google/nftables"
)

// Counts are packets (a super-packet is one) and their bytes, from the IP header on.
type Counts struct{ TxPackets, TxBytes, RxPackets, RxBytes uint64 }

// directCounts keeps what counters had when their elements went: an element is of one interval, and a new one starts at zero.
type directCounts struct {
	past   map[netip.Prefix]Counts
	wanted bool // the table has these sets
}

// DirectCounts returns what was sent to and received from each peer's prefix directly, beside the tunnel, without probes. Counters go on
// while no agent runs, and start anew if another program removes the nftables table. Where no packet can go directly, nothing is
// counted any more, and on kernels before 5.11 nothing at all.
func (r *Reconciler) DirectCounts() (map[netip.Prefix]Counts, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.counts.wanted {
		return maps.Clone(r.counts.past), nil
	}
	now := map[netip.Prefix]Counts{}
	maps.Copy(now, r.counts.past)
	for _, f := range families {
		for _, name := range []string{setDirectTx, setDirectRx} {
			set := nftSet{name: name + f.suffix, key: f.key, interval: true}
			var err error
			if set.elements, err = r.nft.conn.GetSetElements(set.object()); err != nil {
				return nil, r.nft.reopen(r.ns, fmt.Errorf("hostnet: read the nftables set %s: %w", set.name, err))
			}
			set.addTo(now)
		}
	}
	return now, nil
}

// want notes whether the table has the sets.
func (d *directCounts) want(t *nftTable) {
	d.wanted = slices.ContainsFunc(t.chains, func(c nftChain) bool { return c.name == chainFwd })
}

// ended adds what the counters of t had whose elements are not in next, which has taken its place.
func (d *directCounts) ended(t, next *nftTable) {
	if t == nil {
		return
	}
	if d.past == nil {
		d.past = map[netip.Prefix]Counts{}
	}
	for i, s := range t.sets {
		if next != nil {
			s.elements = otherIntervals(s.elements, next.sets[i].elements)
		}
		s.addTo(d.past)
	}
}

// addTo adds the counters of a set to the counts; other sets have none.
func (s *nftSet) addTo(counts map[netip.Prefix]Counts) {
	for _, iv := range intervalsOf(s.elements) {
		n := iv.first.Counter
		prefix, ok := iv.prefix()
		if n == nil || !ok || n.Packets == 0 {
			continue
		}
		c := counts[prefix]
		switch s.name[:len(s.name)-1] {
		case setDirectTx:
			c.TxPackets, c.TxBytes = c.TxPackets+n.Packets, c.TxBytes+n.Bytes
		case setDirectRx:
			c.RxPackets, c.RxBytes = c.RxPackets+n.Packets, c.RxBytes+n.Bytes
		}
		counts[prefix] = c
	}
}

// countsDirect reports whether packets can go directly to some peer or come directly from one: where it is on the same link as an
// underlay device of this host. A peer elsewhere gets no answers to its probes of the direct path, and does not use it.
func (s *State) countsDirect() bool {
	if s.Direct == "" {
		return false
	}
	return len(s.NextHops) > 0 || slices.ContainsFunc(s.Peers, func(p PeerRoute) bool { return p.Via.IsValid() })
}

// counted are the elements that count: each peer's prefix by itself.
func counted(s *State, v4 bool) (out []nftables.SetElement) {
	if !s.countsDirect() {
		return nil
	}
	for _, p := range s.Peers {
		out = append(out, intervals([]netip.Prefix{p.Prefix}, v4)...)
	}
	return out
}

// interval is one element of an interval set: its first address, and the one after its last, if there is one.
type interval struct {
	first nftables.SetElement
	end   *nftables.SetElement
}

// intervalsOf pairs the elements of an interval set, in order.
func intervalsOf(elements []nftables.SetElement) (out []interval) {
	elements = slices.Clone(elements)
	sortElements(elements)
	for i, e := range elements {
		switch {
		case !e.IntervalEnd:
			out = append(out, interval{first: e})
		case len(out) > 0 && out[len(out)-1].end == nil:
			out[len(out)-1].end = &elements[i]
		}
	}
	return out
}

// prefix is the interval as a prefix; ok is false if it is none.
func (iv interval) prefix() (p netip.Prefix, ok bool) {
	first, ok := netip.AddrFromSlice(iv.first.Key)
	if !ok {
		return p, false
	}
	for bits := first.BitLen(); bits >= 0; bits-- {
		p = netip.PrefixFrom(first, bits)
		if p.Masked() != p {
			return p, false
		}
		after := lastAddr(p).Next()
		if iv.end == nil && !after.IsValid() || iv.end != nil && after.IsValid() && bytes.Equal(after.AsSlice(), iv.end.Key) {
			return p, true
		}
	}
	return p, false
}

// otherIntervals gives the intervals of a, as elements, that are not in b.
func otherIntervals(a, b []nftables.SetElement) (out []nftables.SetElement) {
	key := func(iv interval) string {
		k := string(iv.first.Key)
		if iv.end != nil {
			k += string(iv.end.Key)
		}
		return k
	}
	in := map[string]bool{}
	for _, iv := range intervalsOf(b) {
		in[key(iv)] = true
	}
	for _, iv := range intervalsOf(a) {
		if in[key(iv)] {
			continue
		}
		if out = append(out, iv.first); iv.end != nil {
			out = append(out, *iv.end)
		}
	}
	return out
}
