package fastpath

import (
	"errors"
	"fmt"
	"net"
	"runtime"

	"github.com/vishvananda/netlink"
	vnl "github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// The joint is a pair of veth devices. What goes into its first end comes out of the second one, where the kernel joins packets of a flow, as it
// does behind a network card, and as it does not behind a BPF program. Nobody has addresses on it.
const (
	jointIn    = "tulle-join0"
	jointOut   = "tulle-join1"
	jointAlias = "tulle fast path" // tells ours from those of others
	jointMTU   = 65535
)

var jointMAC = net.HardwareAddr{2, 't', 'u', 'l', 'l', 'e'} // JOINT_MAC of fastpath.bpf.c

// makeJoint makes the joint unless it is there, and returns the indices of its two ends.
func makeJoint(nl *sys.Netlink) (in, out int, err error) {
	l, err := nl.LinkByName(jointIn)
	if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing {
		queues := min(runtime.NumCPU(), 16) // packets arrive on as many CPUs
		err = nl.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: jointIn, MTU: jointMTU, NumTxQueues: queues, NumRxQueues: queues},
			PeerName:  jointOut, PeerMTU: jointMTU, PeerHardwareAddr: jointMAC, PeerNumTxQueues: uint32(queues), PeerNumRxQueues: uint32(queues),
		})
		if err == nil {
			if l, err = nl.LinkByName(jointIn); err == nil {
				if err = nl.LinkSetAlias(l, jointAlias); err != nil {
					err = errors.Join(err, nl.LinkDel(l))
				}
				l.Attrs().Alias = jointAlias
			}
		}
	}
	if err != nil {
		return 0, 0, fmt.Errorf("fast path: %s: %w", jointIn, err)
	}
	if l.Attrs().Alias != jointAlias {
		return 0, 0, fmt.Errorf("fast path: a device %s is there that is not Tulle's: remove or rename it", jointIn)
	}
	far, err := nl.LinkByName(jointOut)
	if err != nil {
		return 0, 0, fmt.Errorf("fast path: %s: %w", jointOut, err)
	}
	if err := errors.Join(open(nl, l), open(nl, far), sys.SetOffload(jointOut, sys.GRO, true),
		// Only then does the other end join (drivers/net/veth.c, veth_skb_is_eligible_for_gro).
		sys.SetOffload(jointIn, sys.TSO, false)); err != nil {
		return 0, 0, fmt.Errorf("fast path: set up %s: %w", jointIn, err)
	}
	return l.Attrs().Index, far.Attrs().Index, nil
}

// open lets packets through an end, and keeps addresses from it.
func open(nl *sys.Netlink, l netlink.Link) error {
	if l.Attrs().Flags&net.FlagUp != 0 {
		return nil
	}
	if err := nl.LinkSetIP6AddrGenMode(l, vnl.IN6_ADDR_GEN_MODE_NONE); err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EAFNOSUPPORT) {
		return err
	}
	return nl.LinkSetUp(l)
}

// removeJoint removes the joint, if it is there and ours.
func removeJoint(nl *sys.Netlink) error {
	l, err := nl.LinkByName(jointIn)
	if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing {
		return nil
	}
	if err == nil && l.Attrs().Alias == jointAlias {
		err = nl.LinkDel(l)
	}
	if err != nil {
		return fmt.Errorf("fast path: remove %s: %w", jointIn, err)
	}
	return nil
}
