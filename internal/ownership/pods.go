package ownership

import (
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/ipam"
)

// A PodRequest requests the addresses of one pod interface: one for each family of the
// cluster.
type PodRequest struct {
	Key   string       // container ID and interface; the same key gets the same addresses
	Pod   string       // for people
	Netns string       // path, for Check
	Want  []netip.Addr // requested addresses, at most one of each family
	From  string       // a key whose addresses pass to this one, except where Want has others; may be Key itself
	Only4 bool         // no IPv6 address
}

// Allocate allocates the addresses of a pod and saves that. Errors wrap ErrNotReady,
// ErrGrowing (try again soon), ErrExhausted, or ipam.ErrUnavailable (a requested
// address). On an error nothing has changed.
func (s *Machine) Allocate(now time.Time, r PodRequest) ([]ipam.Allocation, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.Key == "" {
		return nil, errOf(ErrRefused, "the request names no container")
	}
	for i, a := range r.Want {
		if s.cluster.IsZero() {
			break
		}
		if !slices.ContainsFunc(s.params.Families, func(f ipam.Family) bool { return f.CIDR.Contains(a) }) {
			return nil, errOf(ipam.ErrUnavailable, "%v is outside the cluster CIDR %s", a, s.cidrs())
		}
		if slices.ContainsFunc(r.Want[:i], func(b netip.Addr) bool { return a.Is6() == b.Is6() }) {
			return nil, errOf(ipam.ErrUnavailable, "two addresses of one family were asked for")
		}
	}
	var out, passed []ipam.Allocation
	if r.From != "" {
		passed = s.pool.Pass(now, r.From, ipam.Allocation{Key: r.Key, Pod: r.Pod, Netns: r.Netns}, r.Want)
	}
	var made []netip.Addr
	undo := func() {
		for _, addr := range made {
			s.pool.Drop(addr)
		}
		s.pool.Restore(passed)
	}
	for fam, f := range s.params.Families {
		if r.Only4 && f.CIDR.Addr().Is6() {
			continue
		}
		a, isNew, err := s.allocate(now, fam, r)
		if err != nil {
			undo()
			return nil, err
		}
		if isNew {
			made = append(made, a.Addr)
		}
		out = append(out, a)
	}
	if len(out) == 0 {
		return nil, errOf(ErrNotReady, "%s", s.why)
	}
	if len(made)+len(passed) == 0 {
		return out, nil
	}
	if err := s.save(now); err != nil {
		undo()
		return nil, err
	}
	s.driveSpace(now) // opens the next block before this one is full
	return out, nil
}

func (s *Machine) allocate(now time.Time, fam int, r PodRequest) (a ipam.Allocation, isNew bool, err error) {
	f := s.params.Families[fam]
	six := f.CIDR.Addr().Is6()
	want := ipam.Allocation{Key: r.Key, Pod: r.Pod, Netns: r.Netns}
	for _, addr := range r.Want {
		if addr.Is6() == six {
			want.Addr = addr
		}
	}
	old, had := s.pool.Lookup(r.Key, six)
	switch {
	case had && (!want.Addr.IsValid() || want.Addr == old.Addr):
		if r.Netns != "" { // it is being wired again: as young as a new one
			s.pool.Drop(old.Addr)
			old.Netns, old.Since = r.Netns, now
			s.pool.Adopt(old)
			s.dirty = true
		}
		return old, false, nil
	case s.leave != nil || s.left:
		return a, false, errOf(ErrNotReady, "it is leaving the cluster")
	case !s.confirm.done && !s.cfg.Fresh:
		return a, false, errOf(ErrNotReady, "its state is not confirmed: %s", s.why)
	}
	a, err = s.pool.Allocate(now, want, six)
	if errors.Is(err, ipam.ErrFull) {
		s.driveSpace(now)
		a, err = s.pool.Allocate(now, want, six)
	}
	if !errors.Is(err, ipam.ErrFull) {
		return a, err == nil, err
	}
	ask := &s.asks[fam]
	switch {
	case s.phase != Ready:
		err = errOf(ErrNotReady, "%s", s.why)
	case ask.full != "":
		err = errOf(ErrExhausted, "%s", ask.full)
	case ask.seq != 0:
		err = ErrGrowing
	default:
		err = errOf(ipam.ErrFull, "the fixed block of this node is full, or its addresses rest for a while after their release")
	}
	return a, false, err
}

// Release frees the addresses of a key and saves that. Another pod gets them only after
// the cool-down. For an unknown key it returns nothing.
func (s *Machine) Release(now time.Time, key string) ([]ipam.Allocation, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.release(now, key)
}

// ReleaseRested is Release without a cool-down, for addresses that have been out of use that long already.
func (s *Machine) ReleaseRested(now time.Time, key string) ([]ipam.Allocation, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []ipam.Allocation
	for _, v6 := range []bool{false, true} {
		if a, ok := s.pool.Lookup(key, v6); ok {
			s.pool.Drop(a.Addr)
			out = append(out, a)
		}
	}
	return s.released(now, out)
}

func (s *Machine) release(now time.Time, keys ...string) ([]ipam.Allocation, error) {
	var out []ipam.Allocation
	for _, key := range keys {
		out = append(out, s.pool.Release(now, key)...)
	}
	return s.released(now, out)
}

// released saves that these were released, or takes it back.
func (s *Machine) released(now time.Time, out []ipam.Allocation) ([]ipam.Allocation, error) {
	if len(out) == 0 {
		return nil, nil
	}
	if err := s.save(now); err != nil {
		for _, a := range out {
			s.pool.Adopt(a)
		}
		return nil, err
	}
	return out, nil
}

// Adopt records addresses that pods on the host have although the state does not list them
// (the state was lost, or is an old one). They are not allocated while the pods exist. It
// returns those that could not be recorded because another pod has them. If the rest cannot be saved, the next Tick tries
// again: they are out of use all the same.
func (s *Machine) Adopt(now time.Time, list []ipam.Allocation) (refused []ipam.Allocation, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	added := false
	for _, a := range list {
		_, had := s.pool.At(a.Addr)
		if a.Since.IsZero() {
			a.Since = now
		}
		switch {
		case !s.pool.Adopt(a):
			refused = append(refused, a)
		case !had:
			added = true
		}
	}
	if !added || s.cluster.IsZero() {
		return refused, nil
	}
	return refused, s.save(now)
}

// Allocations returns all allocations in address order.
func (s *Machine) Allocations() []ipam.Allocation {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pool.Allocations()
}

// Resting returns the addresses in cool-down, in order.
func (s *Machine) Resting(now time.Time) []ipam.Cooling {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pool.Cooling(now)
}

// A FindingKind is the kind of a difference between the allocations and the host.
type FindingKind string

const (
	Leaked   FindingKind = "leaked"   // allocated, but no pod on the host has it
	Unknown  FindingKind = "unknown"  // a pod has it, but it is not allocated
	Stranded FindingKind = "stranded" // a pod has it, but this node does not own it any more
)

// A Finding is one difference that Check found.
type Finding struct {
	Kind       FindingKind
	Allocation ipam.Allocation // for Unknown: as found on the host
	Remedy     string
}

// Check compares the allocations with live, the addresses that pods on the host have. Key
// and Netns of live are set as far as the host shows them. An allocation younger than
// grace is not reported as leaked, because its pod may still be starting.
func (s *Machine) Check(now time.Time, live []ipam.Allocation, grace time.Duration) []Finding {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.check(now, live, grace)
}

func (s *Machine) check(now time.Time, live []ipam.Allocation, grace time.Duration) []Finding {
	var out []Finding
	onHost := make(map[netip.Addr]bool, len(live))
	for _, a := range live {
		onHost[a.Addr] = true
		if _, ok := s.pool.At(a.Addr); !ok && s.familyOf(netip.PrefixFrom(a.Addr, a.Addr.BitLen())) >= 0 {
			out = append(out, Finding{Unknown, a, "remove the pod, or restart the agent, which adopts it"})
		}
	}
	for _, a := range s.pool.Allocations() {
		e, ok := s.table.Owner(a.Addr)
		switch {
		case !onHost[a.Addr] && now.Sub(a.Since) >= grace:
			out = append(out, Finding{Leaked, a, "tulle ipam release"})
		case !ok || e.Owner != s.cfg.ID:
			out = append(out, Finding{Stranded, a, "restart the pod, it gets an address of this node's present space"})
		}
	}
	return out
}

// ReleaseLeaked releases the addresses that Check finds leaked now, only those of keys if
// there are any.
func (s *Machine) ReleaseLeaked(now time.Time, live []ipam.Allocation, grace time.Duration, keys ...string) ([]ipam.Allocation, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var leaked []string
	for _, f := range s.check(now, live, grace) {
		k := f.Allocation.Key
		if f.Kind == Leaked && (len(keys) == 0 || slices.Contains(keys, k)) && s.allGone(k, live) {
			leaked = append(leaked, k)
		}
	}
	return s.release(now, leaked...)
}

// allGone reports whether the host has none of the key's addresses.
func (s *Machine) allGone(key string, live []ipam.Allocation) bool {
	for _, v6 := range []bool{false, true} {
		if a, ok := s.pool.Lookup(key, v6); ok && slices.ContainsFunc(live, func(l ipam.Allocation) bool { return l.Addr == a.Addr }) {
			return false
		}
	}
	return true
}
