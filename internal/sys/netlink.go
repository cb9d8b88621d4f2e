package sys

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// dumpAttempts is the maximum number of attempts for a dump. A dump is interrupted if
// the table changes while it is read (NLM_F_DUMP_INTR). If routes change all the
// time, the last answer may be inconsistent and is refused.
const dumpAttempts = 16

// RetryDump calls list until neither a signal nor a change of the table interrupts
// it.
func RetryDump[T any](list func() (T, error)) (T, error) {
	for attempt := 1; ; attempt++ {
		v, err := list()
		if err == nil || attempt == dumpAttempts ||
			!errors.Is(err, netlink.ErrDumpInterrupted) && !errors.Is(err, unix.EINTR) {
			return v, err
		}
	}
}

// Netlink is a route netlink handle in one network namespace. Its List methods retry
// interrupted dumps. Several goroutines may use it.
type Netlink struct {
	*netlink.Handle
}

// NewNetlink opens a handle in the namespace of the descriptor nsfd, or in the
// calling thread's own if nsfd is negative. The caller must Close it.
func NewNetlink(nsfd int) (*Netlink, error) {
	var h *netlink.Handle
	var err error
	if nsfd < 0 {
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
	} else {
		h, err = netlink.NewHandleAt(netns.NsHandle(nsfd), unix.NETLINK_ROUTE)
	}
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	return &Netlink{Handle: h}, nil
}

// LinkList lists all interfaces.
func (n *Netlink) LinkList() ([]netlink.Link, error) {
	return RetryDump(n.Handle.LinkList)
}

// AddrList lists the addresses of link, or all if link is nil.
func (n *Netlink) AddrList(link netlink.Link, family int) ([]netlink.Addr, error) {
	return RetryDump(func() ([]netlink.Addr, error) { return n.Handle.AddrList(link, family) })
}

// RouteList lists the routes of the main table over link, or all if link is nil.
func (n *Netlink) RouteList(link netlink.Link, family int) ([]netlink.Route, error) {
	return RetryDump(func() ([]netlink.Route, error) { return n.Handle.RouteList(link, family) })
}

// RouteListFiltered lists the routes that match filter in the fields of mask
// (netlink.RT_FILTER_…).
func (n *Netlink) RouteListFiltered(family int, filter *netlink.Route, mask uint64) ([]netlink.Route, error) {
	return RetryDump(func() ([]netlink.Route, error) { return n.Handle.RouteListFiltered(family, filter, mask) })
}

// RuleList lists the policy rules of a family.
func (n *Netlink) RuleList(family int) ([]netlink.Rule, error) {
	return RetryDump(func() ([]netlink.Rule, error) { return n.Handle.RuleList(family) })
}

// NeighList lists the neighbours of an interface.
func (n *Netlink) NeighList(index, family int) ([]netlink.Neigh, error) {
	return RetryDump(func() ([]netlink.Neigh, error) { return n.Handle.NeighList(index, family) })
}
