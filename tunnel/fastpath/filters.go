package fastpath

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// What our filters carry. Filters of other programs with a lower priority come first, the others after ours.
const (
	priority = 8484
	prefix   = "tulle_" // of a filter's name, before that of the program
)

// The programs' names.
const (
	send    = programsProgSend
	receive = programsProgReceive
	deliver = programsProgDeliver
)

// filter is where a program hangs: a device and HANDLE_MIN_INGRESS or HANDLE_MIN_EGRESS of its clsact qdisc (net/sched/sch_ingress.c).
type filter struct {
	link   int
	parent uint32
}

// attach lets the programs hang at filters and nowhere else.
func (p *Path) attach(filters map[filter]string) error {
	var errs []error
	if !p.swept {
		// Those of an earlier run stay until ours replace them: packets go on meanwhile.
		err := sweep(p.nl, func(f filter) bool { return filters[f] == "" })
		p.swept = err == nil
		errs = append(errs, err)
	}
	for f := range p.attached {
		if filters[f] != "" {
			continue
		}
		if err := detach(p.nl, f); err != nil {
			errs = append(errs, err)
			continue
		}
		delete(p.attached, f)
	}
	for _, name := range []string{deliver, receive, send} { // what comes first needs the next ones
		for f, its := range filters {
			if its != name {
				continue
			}
			p.attached[f] = name // also if it fails: one of an earlier run may be there
			if err := p.hang(f, name); err != nil {
				errs = append(errs, fmt.Errorf("fast path: attach %s to device %d: %w", name, f.link, err))
			}
		}
	}
	return errors.Join(errs...)
}

// Whole reports whether everything is as the last Update has left it: somebody may have removed a filter, or the joint, or set that down.
func (p *Path) Whole() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for f, name := range p.attached {
		if there, err := ours(p.nl, f); there == nil || err != nil || name == deliver && !isUp(p.nl, f.link) {
			return false
		}
	}
	return p.on.Joint == 0 || isUp(p.nl, int(p.on.Joint))
}

// hang attaches a program, unless it is there.
func (p *Path) hang(f filter, name string) error {
	prog := map[string]*ebpf.Program{send: p.programs.Send, receive: p.programs.Receive, deliver: p.programs.Deliver}[name]
	info, err := prog.Info()
	if err != nil {
		return err
	}
	id, _ := info.ID()
	if there, err := ours(p.nl, f); err != nil {
		return err
	} else if there != nil && there.Id == int(id) {
		return nil
	}
	err = p.nl.QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: f.link, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}})
	if errors.Is(err, unix.EEXIST) {
		err = p.clsact(f.link)
	}
	if err != nil {
		return fmt.Errorf("clsact: %w", err)
	}
	return p.nl.FilterReplace(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: f.link, Parent: f.parent, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: priority},
		Fd:          prog.FD(), Name: prefix + name, DirectAction: true,
	})
}

// clsact is an error if a device has the older qdisc named ingress instead, which has no filters for what leaves.
func (p *Path) clsact(link int) error {
	list, err := sys.RetryDump(func() ([]netlink.Qdisc, error) {
		return p.nl.QdiscList(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: link}})
	})
	for _, q := range list {
		if q.Type() == "ingress" {
			return errors.New("another program has given it a qdisc ingress: replace that by clsact (tc qdisc replace dev … clsact)")
		}
	}
	return err
}

// ours returns our filter; nil if there is none.
func ours(nl *sys.Netlink, f filter) (*netlink.BpfFilter, error) {
	list, err := sys.RetryDump(func() ([]netlink.Filter, error) {
		return nl.FilterList(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: f.link}}, f.parent)
	})
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) { // no clsact qdisc; no device
		return nil, nil
	}
	for _, l := range list {
		if b, ok := l.(*netlink.BpfFilter); ok && b.Priority == priority && len(b.Name) > len(prefix) && b.Name[:len(prefix)] == prefix {
			return b, nil
		}
	}
	return nil, err
}

// detach removes our filter, and the clsact qdisc if nothing else hangs there.
func detach(nl *sys.Netlink, f filter) error {
	b, err := ours(nl, f)
	if b == nil || err != nil {
		return err
	}
	if err := nl.FilterDel(b); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("fast path: detach from device %d: %w", f.link, err)
	}
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		list, err := nl.FilterList(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: f.link}}, parent)
		if err != nil || len(list) > 0 {
			return nil
		}
	}
	err = nl.QdiscDel(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: f.link, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}})
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("fast path: remove clsact from device %d: %w", f.link, err)
	}
	return nil
}

// Remove removes the programs that an earlier run has left in this network namespace.
func Remove() error {
	nl, err := sys.NewNetlink(-1)
	if err != nil {
		return err
	}
	defer nl.Close()
	return errors.Join(sweep(nl, func(filter) bool { return true }), removeJoint(nl))
}

// sweep removes our filters that match.
func sweep(nl *sys.Netlink, match func(filter) bool) error {
	qdiscs, err := sys.RetryDump(func() ([]netlink.Qdisc, error) { return nl.QdiscList(nil) })
	if err != nil {
		return fmt.Errorf("fast path: list qdiscs: %w", err)
	}
	var errs []error
	for _, q := range qdiscs {
		if q.Type() != "clsact" {
			continue
		}
		for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
			if f := (filter{q.Attrs().LinkIndex, parent}); match(f) {
				errs = append(errs, detach(nl, f))
			}
		}
	}
	return errors.Join(errs...)
}
