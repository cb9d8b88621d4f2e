package fastpath

import (
	"bytes"
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
	jointIn  = "tulle-join0"
	jointOut = "tulle-join1"
	jointMTU = 65535
)

// jointMAC is that of the second end. It tells our pair from devices of others.
var jointMAC = net.HardwareAddr{2, 't', 'u', 'l', 'l', 'e'}

// makeJoint makes the joint unless it is there, and returns the indices of its two ends.
func makeJoint(nl *sys.Netlink) (in, out int, err error) {
	l, err := nl.LinkByName(jointIn)
	if missing(err) {
		queues := min(runtime.NumCPU(), 16) // packets arrive on as many CPUs
		if err = nl.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: jointIn, MTU: jointMTU, NumTxQueues: queues, NumRxQueues: queues},
			PeerName:  jointOut, PeerMTU: jointMTU, PeerHardwareAddr: jointMAC, PeerNumTxQueues: uint32(queues), PeerNumRxQueues: uint32(queues),
		}); err == nil {
			l, err = nl.LinkByName(jointIn)
		}
	}
	if err != nil {
		return 0, 0, fmt.Errorf("fast path: %s: %w", jointIn, err)
	}
	far, err := farEnd(nl)
	if err != nil {
		return 0, 0, err
	}
	if far == nil {
		return 0, 0, fmt.Errorf("fast path: a device %s is there that is not Tulle's: remove or rename it", jointIn)
	}
	if err := errors.Join(open(nl, l), open(nl, far), sys.SetOffload(jointOut, sys.GRO, true),
		// Only then does the other end join (drivers/net/veth.c, veth_skb_is_eligible_for_gro).
		sys.SetOffload(jointIn, sys.TSO, false)); err != nil {
		return 0, 0, fmt.Errorf("fast path: set up %s: %w", jointIn, err)
	}
	return l.Attrs().Index, far.Attrs().Index, nil
}

// farEnd is the second end of our joint; nil if there is none, or one of somebody else.
func farEnd(nl *sys.Netlink) (netlink.Link, error) {
	l, err := nl.LinkByName(jointOut)
	switch {
	case missing(err):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("fast path: %s: %w", jointOut, err)
	case !bytes.Equal(l.Attrs().HardwareAddr, jointMAC):
		return nil, nil
	}
	return l, nil
}

func missing(err error) bool {
	_, is := errors.AsType[netlink.LinkNotFoundError](err)
	return is
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

// isUp reports whether a device is there and up.
func isUp(nl *sys.Netlink, index int) bool {
	l, err := nl.LinkByIndex(index)
	return err == nil && l.Attrs().Flags&net.FlagUp != 0
}

// removeJoint removes the joint, if it is there and ours.
func removeJoint(nl *sys.Netlink) error {
	far, err := farEnd(nl)
	if far == nil || err != nil {
		return err
	}
	if err := nl.LinkDel(far); err != nil { // and with it the other end
		return fmt.Errorf("fast path: remove %s: %w", jointIn, err)
	}
	return nil
}
