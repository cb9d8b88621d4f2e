package sys

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// dumpAttempts bounds how often an interrupted dump is tried again. A dump is
// interrupted when the table changes under it (NLM_F_DUMP_INTR); on a host whose
// routes change without pause the last, perhaps inconsistent answer is refused.
const dumpAttempts = 16

// RetryDump calls list until it is neither interrupted by a signal nor by a
// change of the table that it reads.
func RetryDump[T any](list func() (T, error)) (T, error) {
	for attempt := 1; ; attempt++ {
		v, err := list()
		if err == nil || attempt == dumpAttempts ||
			!errors.Is(err, netlink.ErrDumpInterrupted) && !errors.Is(err, unix.EINTR) {
			return v, err
		}
	}
}

// Netlink is a route netlink handle of one network namespace, whose List calls
// retry interrupted dumps. It may be used from several goroutines.
type Netlink struct {
	*netlink.Handle
}

// NewNetlink opens a handle in the namespace of the descriptor nsfd, or in the
// calling thread's own if nsfd is negative. The caller Closes it.
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

// LinkList is the dump of all interfaces.
func (n *Netlink) LinkList() ([]netlink.Link, error) {
	return RetryDump(n.Handle.LinkList)
}

// AddrList is the dump of the addresses of link, or of all if it is nil.
func (n *Netlink) AddrList(link netlink.Link, family int) ([]netlink.Addr, error) {
	return RetryDump(func() ([]netlink.Addr, error) { return n.Handle.AddrList(link, family) })
}

// RouteList is the dump of the main table's routes over link, or of all if it
// is nil.
func (n *Netlink) RouteList(link netlink.Link, family int) ([]netlink.Route, error) {
	return RetryDump(func() ([]netlink.Route, error) { return n.Handle.RouteList(link, family) })
}

// RouteListFiltered is the dump of the routes that match filter in the fields
// that mask names (netlink.RT_FILTER_…).
func (n *Netlink) RouteListFiltered(family int, filter *netlink.Route, mask uint64) ([]netlink.Route, error) {
	return RetryDump(func() ([]netlink.Route, error) { return n.Handle.RouteListFiltered(family, filter, mask) })
}

// RuleList is the dump of the policy rules of a family.
func (n *Netlink) RuleList(family int) ([]netlink.Rule, error) {
	return RetryDump(func() ([]netlink.Rule, error) { return n.Handle.RuleList(family) })
}

// NeighList is the dump of the neighbours of an interface.
func (n *Netlink) NeighList(index, family int) ([]netlink.Neigh, error) {
	return RetryDump(func() ([]netlink.Neigh, error) { return n.Handle.NeighList(index, family) })
}
