package hostnet

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// IPsec reports whether this host has IPsec policies (ip-xfrm(8)).
func IPsec() (bool, error) {
	h, err := netlink.NewHandle(unix.NETLINK_XFRM)
	if errors.Is(err, unix.EPROTONOSUPPORT) { // a kernel without IPsec
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("IPsec policies: %w", err)
	}
	defer h.Close()
	list, err := sys.RetryDump(func() ([]netlink.XfrmPolicy, error) { return h.XfrmPolicyList(netlink.FAMILY_ALL) })
	if err != nil {
		return false, fmt.Errorf("IPsec policies: %w", err)
	}
	return len(list) > 0, nil
}
