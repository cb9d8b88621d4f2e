package ownership

import (
	"slices"
	"strings"
	"time"
)

// The law of starts: nobody begins a cluster while
//
//  1. a living member of another one is in reach, or
//  2. a seed that is in another one is down or cut off, unless no name has led the founder to it for seedPatience.
//
// In reach is whom packets get to and who is known: gossip of the two has met, or a chain of living hosts leads from one to the other
// in which each has the next one, or is had by it, as a seed, by the names as they resolve on these hosts. Each link must
// have been there for linkTime, in which one of the two tries the other and is answered, unless it is the founder that is new.
//
// So a second cluster is begun only where the founder could not know of the first: all its members are down or cut off and
// were no seeds (a founder that dies before anybody has joined it), or a name server has led the founder elsewhere. Each such beginning is
// traced to one of these facts, and the schedule ends with it.

// linkTime is the longest time between two attempts, with the time that a host needs to start.
const linkTime = 2800 * time.Millisecond

// relink notes since when each two hosts that run could reach each other and one of them tries the other. It is called after each
// change to hosts, network and resolvers.
func (w *world) relink() {
	if w.starts == nil {
		return
	}
	for i, a := range w.hosts {
		for j, b := range w.hosts[:i] {
			key := [2]int{i, j}
			if !a.reaches(b) || !slices.Contains(a.seedAddrs(), b.addr) && !slices.Contains(b.seedAddrs(), a.addr) {
				delete(w.starts.links, key)
			} else if _, ok := w.starts.links[key]; !ok {
				w.starts.links[key] = w.now
			}
		}
	}
}

// inReach returns the hosts that h reaches, itself included: over links that are older than an age, and those that gossip has met.
func (h *host) inReach(age time.Duration) map[*host]bool {
	w := h.w
	in := map[*host]bool{h: true}
	for list := []*host{h}; len(list) > 0; list = list[1:] {
		a := list[0]
		for _, b := range w.hosts {
			since, ok := w.starts.links[[2]int{max(a.index, b.index), min(a.index, b.index)}]
			if !in[b] && (ok && w.now.Sub(since) > age || a.met(b) && a.answeredBy(b)) {
				in[b] = true
				list = append(list, b)
			}
		}
	}
	return in
}

// began checks the law when a host has got into a cluster.
func (l *invariants) began(h *host, sp *Machine) {
	w := l.w
	others := slices.DeleteFunc(slices.Clone(w.hosts), func(o *host) bool { return o == h })
	if slices.ContainsFunc(others, func(o *host) bool { return o.clusterOnDisk() == sp.cluster }) {
		return // it has joined
	}
	w.logf("%s (%s) begins cluster %s", h.name, h.id.Short(), sp.cluster.Short())
	l.seen["cluster begun"]++
	near, soon := h.inReach(linkTime), h.inReach(0)
	for _, o := range others {
		if o.clusterOnDisk().IsZero() {
			continue
		}
		w.over = true
		told, ok := h.told[o.addr]
		switch {
		case near[o]:
			w.fail("%s (%s) begins a second cluster, beside that of %s (%s), which is in reach", h.name, h.id.Short(), o.name, o.id.Short())
		case soon[o] && w.now.Sub(h.upAt) <= linkTime:
			w.fail("%s (%s) begins a second cluster, before %s (%s) could call", h.name, h.id.Short(), o.name, o.id.Short())
		case soon[o]:
			l.seen["second cluster: a member came into reach that moment"]++
		case ok && w.now.Sub(told) < seedPatience:
			w.fail("%s (%s) begins a second cluster, beside that of its seed %s (%s), which does not answer", h.name, h.id.Short(), o.name, o.id.Short())
		case !h.reaches(o) && o.index >= w.starts.seeds:
			l.seen["second cluster: a member that is no seed was down or cut off"]++
		case !h.reaches(o):
			l.seen["second cluster: a seed was down or cut off, and its name led elsewhere"]++
			if h.resolver != outdated && h.resolver != selfish {
				w.fail("%s (%s) begins a second cluster, although its name server (%v) leads it to %s (%s), which is down", h.name, h.id.Short(), h.resolver, o.name, o.id.Short())
			}
		default:
			l.seen["second cluster: a member and the founder had no name of each other"]++
			if h.resolver == truthful && o.resolver == truthful {
				w.fail("%s (%s) begins a second cluster, beside that of %s (%s), both with truthful name servers", h.name, h.id.Short(), o.name, o.id.Short())
			}
		}
	}
	if !w.over { // if there was another one before, it is gone with all its disks
		clear(l.facts)
		clear(l.changes)
		clear(l.released)
	}
}

// clusterOnDisk is the cluster that a host is in, whether it runs or not.
func (h *host) clusterOnDisk() (c ClusterID) {
	if h.disk != nil {
		c = ClusterID(h.disk.Cluster)
	}
	if h.sp != nil {
		c = h.sp.cluster
	}
	return c
}

// oneCluster: once all is healed, everybody is in the cluster, and shared names are reported by all who have them.
func (l *invariants) oneCluster() {
	w := l.w
	first := w.hosts[0].clusterOf()
	for _, h := range w.hosts {
		if h.sp == nil {
			continue
		}
		if h.sp.cluster.IsZero() || h.sp.cluster != first {
			w.fail("after healing %s (%s) is in cluster %v, %s in %v: %s", h.name, h.id.Short(), h.sp.cluster.Short(), w.hosts[0].name, first.Short(), h.sp.why)
		}
		twins := 0
		for _, o := range w.hosts {
			if o != h && o.sp != nil && o.name == h.name {
				twins++
			}
		}
		told := slices.ContainsFunc(h.sp.Status(w.now).Problems, func(p Problem) bool {
			return strings.Contains(p.What, " live hosts have the node name "+h.name+": ") && strings.Contains(p.What, h.id.Short())
		})
		if told != (twins > 0) {
			w.fail("%s (%s) shares its name with %d live hosts, reported: %v", h.name, h.id.Short(), twins, told)
		}
		if twins > 0 {
			l.seen["shared name reported"]++
		}
	}
}
