package hostnet

import (
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Alias is the alias (ip link set … alias) of the agent's TUN device. It identifies the device to a second agent in the same
// network namespace, independent of the device's name.
const Alias = "tulle"

// CheckAlone returns an error if another agent runs in the calling thread's network namespace: a TUN device other than tun
// has [Alias], and a process uses it. Two agents would share one routing table, nftables table and set of unreachable routes.
// Call it again after the own device is open and has its alias: of two agents that start at the same time, at least one then
// finds the other.
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
