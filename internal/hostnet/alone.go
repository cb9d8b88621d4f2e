package hostnet

import (
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Alias is the alias (ip link set … alias) that the agent gives its TUN device, so that a second agent of the same
// network namespace knows it, whatever its name.
const Alias = "tulle"

// CheckAlone refuses to be the second agent in the calling thread's network namespace: another TUN device than tun
// carries [Alias], and a process holds it. The routing table, the nftables table and the unreachable routes are one
// host's. Called after the own device is open and has its alias, one of two agents that start at once finds the other.
func CheckAlone(tun string) error {
	links, err := dump("devices", netlink.LinkList)
	if err != nil {
		return err
	}
	for _, l := range links {
		if a := l.Attrs(); a.Name != tun && a.Alias == Alias && a.RawFlags&unix.IFF_LOWER_UP != 0 {
			return fmt.Errorf("another agent runs on this host, with --tun %s: two would undo each other's routes and nftables table; stop it and run `tulle cleanup --tun %[1]s`, or run each in a network namespace of its own", a.Name)
		}
	}
	return nil
}
