package hostnet

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Neighbours lets the kernel look for link-layer addresses, with a socket of its own, so that nobody waits for a dump. Its methods are safe for
// concurrent use.
type Neighbours struct{ rt *netlink.Handle }

// OpenNeighbours opens it in the calling thread's network namespace.
func OpenNeighbours() (*Neighbours, error) {
	rt, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("hostnet: open a route netlink socket: %w", err)
	}
	return &Neighbours{rt}, nil
}

// Close releases the socket.
func (n *Neighbours) Close() { n.rt.Close() }

// Seek has the kernel look for the link-layer address of an IPv4 neighbour on the device with an index, where it does not know it, as a packet to it
// would (NTF_USE, linux/neighbour.h). The request names the device's own address as the one that asks. One that a packet causes names the
// packet's source, if that is any address of the host (arp_announce 0, Documentation/networking/ip-sysctl.rst): with the TUN device's, the
// neighbour would learn nothing about the underlay address, and go on sending to a link-layer address that is no longer this host's.
func (n *Neighbours) Seek(a netip.Addr, index int) error {
	err := n.rt.NeighSet(&netlink.Neigh{LinkIndex: index, Family: unix.AF_INET, IP: a.AsSlice(), Flags: netlink.NTF_USE})
	if err != nil {
		return fmt.Errorf("hostnet: seek neighbour %v: %w", a, err)
	}
	return nil
}

// Index is the index of a device on the ways that were asked for; 0 if there is none of that name.
func (w *Ways) Index(device string) int {
	if l := w.named(device); l != nil {
		return l.Index
	}
	return 0
}
