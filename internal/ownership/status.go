package ownership

import (
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/ipam"
)

// Phase returns the current phase.
func (s *Machine) Phase() Phase {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.phase
}

// Node returns this node's ID.
func (s *Machine) Node() NodeID { return s.cfg.ID }

// Cluster returns the cluster's ID; zero before the node is in one.
func (s *Machine) Cluster() ClusterID {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cluster
}

// Params returns the cluster's parameters; empty before the node is in one.
func (s *Machine) Params() Params {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Params{slices.Clone(s.params.Families)}
}

// Prefixes returns the space that this node owns, without the prefixes of external peers.
func (s *Machine) Prefixes() []netip.Prefix {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []netip.Prefix
	for fam := range s.params.Families {
		out = append(out, s.owned(fam)...)
	}
	return ipam.Aggregate(out)
}

// Blocks returns the open blocks in order of opening.
func (s *Machine) Blocks() []ipam.Block {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pool.Blocks()
}

// TunAddrs returns the addresses of the TUN device, IPv4 first, at most one per family:
// the first address of the first open block.
func (s *Machine) TunAddrs() []netip.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []netip.Addr
	for _, v6 := range []bool{false, true} {
		if a, ok := s.pool.TunAddr(v6); ok {
			out = append(out, a)
		}
	}
	return out
}

// ProbeAddrs returns the addresses to which probes of the direct path go, IPv4 first, at
// most one per family: the last address of the first open block.
func (s *Machine) ProbeAddrs() []netip.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []netip.Addr
	for _, v6 := range []bool{false, true} {
		if a, ok := s.pool.ProbeAddr(v6); ok {
			out = append(out, a)
		}
	}
	return out
}

// Routes yields every prefix of the table with its destination, in order. It works on a
// snapshot.
func (s *Machine) Routes() iter.Seq2[netip.Prefix, Route] {
	s.mu.Lock()
	entries := s.table.Entries()
	s.mu.Unlock()
	return func(yield func(netip.Prefix, Route) bool) {
		for _, e := range entries {
			if !yield(e.Prefix, Route{Owner: e.Owner, Self: e.Owner == s.cfg.ID, External: e.External}) {
				return
			}
		}
	}
}

// Entries returns the table's entries. The slice is shared and does not change.
func (s *Machine) Entries() []Entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.table.Entries()
}

// Digest returns the table's digest. It is equal on nodes with equal tables.
func (s *Machine) Digest() [32]byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.table.Digest()
}

// Owner returns the entry that contains an address.
func (s *Machine) Owner(a netip.Addr) (Entry, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.table.Owner(a)
}

// Peers returns the other nodes that this one knows or knew, as in the state file. Their
// gossip addresses are used to find the cluster after a restart.
func (s *Machine) Peers() []ipam.Peer {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []ipam.Peer
	for _, id := range sortedKeys(s.peers) {
		out = append(out, s.peers[id])
	}
	return out
}

// Status returns a snapshot for status output.
func (s *Machine) Status(now time.Time) Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Status{
		Phase: s.phase, Since: s.since, Why: s.why,
		Node: s.cfg.ID, Cluster: s.cluster, Params: Params{slices.Clone(s.params.Families)},
		Confirmed: s.confirm.done, Entries: s.table.Len(), Shares: s.shares(),
	}
	st.Problems = s.problems(now)
	return st
}

// problems lists the current problems in a stable order. Of a note, the topic is the first word of its key.
func (s *Machine) problems(now time.Time) (out []Problem) {
	switch {
	case s.phase == Waiting || s.phase == Joining:
		out = append(out, Problem{"this node has no pod addresses: " + s.why, "the reason says what to do; the agent goes on by itself as soon as it can", "phase"})
	case s.phase == Confirming && s.confirm.unsaved: // the disk is a problem of its own, below
	case s.phase == Confirming && s.confirm.blocked:
		out = append(out, Problem{"the table is not confirmed: " + s.why,
			"open the gossip port there (tulle doctor ports); until then it confirms within minutes by itself, or stop its agent", "phase"})
	case s.phase == Confirming:
		out = append(out, Problem{"the table is not confirmed: " + s.why,
			"start the other nodes; a node that is gone for good: tulle forget NODE (--force when nobody else is left)", "phase"})
	case s.phase == Left:
		out = append(out, Problem{"this node has left the cluster", "stop the agent; to join again, remove the state directory first", "phase"})
	}
	for fam, f := range s.params.Families {
		if full := s.asks[fam].full; full != "" && s.phase == Ready && s.pool.Spare(now, f.CIDR.Addr().Is6(), 1) == 0 {
			out = append(out, Problem{"the blocks of this node are full: " + full, "the reason says what to do; pods that have addresses keep them", "full"})
		}
	}
	if s.saveErr != nil {
		out = append(out, Problem{fmt.Sprintf("the state cannot be saved: %v", s.saveErr), "no pod gets an address, and no space is given, until it can be", "save"})
	}
	pods := map[string]bool{} // one may have an address of each family
	for _, a := range s.stranded() {
		pods[a.Key] = true
	}
	if n := len(pods); n > 0 {
		out = append(out, Problem{fmt.Sprintf("%d pods of this node have addresses that belong to others now", n),
			"restart them: they get addresses of this node's present space (tulle ipam check lists them)", "stranded"})
	}
	out = append(out, s.sharedNames()...)
	keys := make([]string, 0, len(s.notes))
	for k := range s.notes {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		p := s.notes[k].Problem
		p.Topic, _, _ = strings.Cut(k, " ")
		out = append(out, p)
	}
	return out
}

// sharedNames reports names that several live hosts have. Nothing but people, and the right to start the cluster, goes by
// a name; but hosts that share one are clones, or nobody knows which one is meant.
func (s *Machine) sharedNames() (out []Problem) {
	by := map[string][]Member{}
	for _, m := range append(s.env.Members(), Member{ID: s.cfg.ID, Name: s.cfg.Name, Alive: true, Addr: netip.AddrPortFrom(s.cfg.Addr, 0)}) {
		if m.Alive && m.Name != "" {
			by[m.Name] = append(by[m.Name], m)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(by)) {
		list := by[name]
		if len(list) < 2 || len(out) == maxSharedNames {
			continue
		}
		slices.SortFunc(list, func(a, b Member) int {
			switch s.cfg.ID { // this one first: the list may be cut
			case a.ID:
				return -1
			case b.ID:
				return 1
			}
			return a.ID.Compare(b.ID)
		})
		var who []string
		for _, m := range list {
			who = append(who, strings.TrimPrefix(described(m), name+" "))
		}
		out = append(out, Problem{fmt.Sprintf("%d live hosts have the node name %s%s", len(list), name, listed(": ", who)),
			"give each host a name of its own (its host name, or --node-name) and restart its agent; where one is a clone of the other, look after its machine ID and SSH keys, too", "name"})
	}
	return out
}

// maxSharedNames bounds the report: a whole rack of images that were never named is one mistake.
const maxSharedNames = 5
