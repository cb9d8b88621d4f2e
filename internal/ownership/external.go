package ownership

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/tulle-net/tulle/ipam"
)

// AddExternal gives a prefix of this node's free space to a peer without an agent: a
// router, or a host with a plain kernel tunnel. This node keeps owning the entry. The
// prefix may be smaller than a block. Adding an existing entry is not an error.
func (s *Machine) AddExternal(now time.Time, p netip.Prefix, x External) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.mayChange(); err != nil {
		return err
	}
	if !p.IsValid() || p != p.Masked() {
		return errOf(ErrRefused, "%v is not a prefix without host bits", p)
	}
	if err := (Entry{Prefix: p, Owner: s.cfg.ID, Version: 1, External: &x}).Check(); err != nil {
		return errOf(ErrRefused, "%v", err)
	}
	fam := s.familyOf(p)
	if fam < 0 {
		return errOf(ErrRefused, "%v is outside the cluster CIDR %v: choose a prefix inside it", p, s.cidrs())
	}
	for _, e := range s.table.Within(p) {
		switch {
		case e.Owner != s.cfg.ID:
			return errOf(ErrRefused, "%v belongs to %s: add it there, or choose a prefix of this node (tulle ipam show)", e.Prefix, s.name(e.Owner))
		case e.External != nil && *e.External != x:
			return errOf(ErrRefused, "%v is used by the external peer at %v: remove that first", e.Prefix, e.External.Endpoint)
		}
	}
	if in := s.table.Within(p); len(in) == 1 && in[0].External != nil {
		return nil
	}
	for _, b := range s.busy(now) {
		if b.Overlaps(p) {
			return errOf(ErrRefused, "%v is used by the pods of this node (%v): choose a prefix outside its blocks", p, b)
		}
	}
	return s.assign(now, p, &x)
}

// RemoveExternal takes a prefix back from an external peer. The prefix must be one of
// AddExternal, or a part of it.
func (s *Machine) RemoveExternal(now time.Time, p netip.Prefix) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.mayChange(); err != nil {
		return err
	}
	in := s.table.Within(p.Masked())
	if !p.IsValid() || len(in) == 0 {
		return errOf(ErrRefused, "no external peer has %v", p)
	}
	for _, e := range in {
		if e.External == nil {
			return errOf(ErrRefused, "no external peer has %v (tulle external list)", e.Prefix)
		}
		if e.Owner != s.cfg.ID {
			return errOf(ErrRefused, "the external peer's %v is kept by %s: remove it there", e.Prefix, s.name(e.Owner))
		}
	}
	return s.assign(now, p.Masked(), nil)
}

// Externals returns the entries of all external peers.
func (s *Machine) Externals() []Entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []Entry
	for _, e := range s.table.Entries() {
		if e.External != nil {
			out = append(out, e)
		}
	}
	return out
}

func (s *Machine) mayChange() error {
	switch {
	case s.cluster.IsZero():
		return errOf(ErrNotReady, "%s", s.why)
	case !s.confirm.done:
		return errOf(ErrUnconfirmed, "%s", s.why)
	case s.leave != nil:
		return ErrBusy
	}
	return nil
}

// assign changes the use of a prefix that this node owns.
func (s *Machine) assign(now time.Time, p netip.Prefix, x *External) error {
	before := s.table.Clone()
	entries, err := s.table.Assign(p, s.cfg.ID, x)
	if err != nil {
		return err
	}
	if err := s.save(now); err != nil {
		s.table = before
		return err
	}
	s.tell(entries)
	s.notify()
	return nil
}

// familyOf returns the index of the family whose CIDR contains p, or -1.
func (s *Machine) familyOf(p netip.Prefix) int {
	for i, f := range s.params.Families {
		if ipam.Covers(f.CIDR, p) {
			return i
		}
	}
	return -1
}

func (s *Machine) cidrs() string {
	var out strings.Builder
	for i, f := range s.params.Families {
		if i > 0 {
			out.WriteString(", ")
		}
		out.WriteString(fmt.Sprint(f.CIDR))
	}
	return out.String()
}
