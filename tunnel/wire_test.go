package tunnel

import (
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// htons is for protocol numbers of packet(7).
func htons(v uint16) uint16 { return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v)) }

// tap reads and writes IP packets at a device of a namespace, past the IP stack: it emits as the host would, and sees what
// arrives at the host.
type tap struct {
	t     testing.TB
	fd    int
	index int
	mac   [8]byte // where emitted packets go, on Ethernet
	in    chan []byte
	seen  [][]byte // what next has passed over
}

// tap opens the device.
func (n *testNode) tap(t testing.TB, dev string) *tap { return newTap(t, n.ns, dev) }

func newTap(t testing.TB, ns, dev string) *tap {
	t.Helper()
	p := &tap{t: t, in: make(chan []byte, 1<<14)}
	withNetlink(t, ns, func(nl *sys.Netlink) (err error) {
		link, err := nl.LinkByName(dev)
		if err != nil {
			return err
		}
		p.index = link.Attrs().Index
		if p.fd, err = sys.Socket(unix.AF_PACKET, unix.SOCK_DGRAM, 0); err != nil {
			return err
		}
		return unix.Bind(p.fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: p.index})
	})
	must(t, sys.SetInt(p.fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1, "PACKET_IGNORE_OUTGOING"))
	poll, err := sys.NewPoller(p.fd)
	must(t, err)
	var wg sync.WaitGroup
	wg.Go(func() { p.read(poll) })
	t.Cleanup(func() {
		poll.Wake()
		wg.Wait()
		poll.Close()
		sys.Close(p.fd)
	})
	return p
}

func (p *tap) read(poll *sys.Poller) {
	buf := make([]byte, 1<<17)
	for {
		switch _, err := poll.WaitRead(); err {
		case nil, sys.ErrErrQueue: // the device may go down and come up again
		default:
			return
		}
		for {
			n, err := sys.Read(p.fd, buf)
			if err != nil {
				break
			}
			select {
			case p.in <- slices.Clone(buf[:n]):
			default: // nobody looks
			}
		}
	}
}

// toward makes emitted frames go to the Ethernet address of dev in another namespace.
func (p *tap) toward(ns, dev string) *tap {
	p.t.Helper()
	withNetlink(p.t, ns, func(nl *sys.Netlink) error {
		link, err := nl.LinkByName(dev)
		if err == nil {
			copy(p.mac[:], link.Attrs().HardwareAddr)
		}
		return err
	})
	return p
}

// emit sends an IP packet, well-formed or not.
func (p *tap) emit(pkt []byte) {
	p.t.Helper()
	to := &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_IP), Ifindex: p.index, Halen: 6, Addr: p.mac}
	if len(pkt) > 0 && pkt[0]>>4 == 6 {
		to.Protocol = htons(unix.ETH_P_IPV6)
	}
	if p.mac == [8]byte{} {
		to.Halen = 0
	}
	if err := unix.Sendto(p.fd, pkt, 0, to); err != nil {
		p.t.Fatalf("emit %d bytes: %v", len(pkt), err)
	}
}

// next waits for a packet that is wanted; those before it are kept in seen.
func (p *tap) next(what string, want func(pkt []byte) bool) []byte {
	p.t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case pkt := <-p.in:
			if want(pkt) {
				return pkt
			}
			p.seen = append(p.seen, pkt)
		case <-timeout:
			p.t.Fatalf("never seen: %s; seen %d others", what, len(p.seen))
		}
	}
}

// drain empties the tap and returns everything that next has passed over or never saw.
func (p *tap) drain() [][]byte {
	for {
		select {
		case pkt := <-p.in:
			p.seen = append(p.seen, pkt)
		default:
			s := p.seen
			p.seen = nil
			return s
		}
	}
}

// relay is handed each frame on the way between two nodes and sends on what shall arrive. frame begins with a virtio-net
// header of 10 bytes and an Ethernet header; it belongs to the relay. toB is the direction. It runs on one goroutine for
// each direction.
type relay func(toB bool, frame []byte, send func(frame []byte))

// ipAt is where the IP header of a relay's frame begins.
const ipAt = 10 + 14

// runRelay connects two devices of a namespace, as a bridge would.
func runRelay(t testing.TB, ns, devA, devB string, r relay) {
	t.Helper()
	fds := [2]int{}
	for i, dev := range []string{devA, devB} {
		withNetlink(t, ns, func(nl *sys.Netlink) (err error) {
			link, err := nl.LinkByName(dev)
			if err != nil {
				return err
			}
			fd, err := sys.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
			if err != nil {
				return err
			}
			fds[i] = fd
			for _, o := range []struct {
				opt, v int
			}{{unix.PACKET_IGNORE_OUTGOING, 1}, {unix.PACKET_VNET_HDR, 1}} {
				if err := sys.SetInt(fd, unix.SOL_PACKET, o.opt, o.v, "of packet(7)"); err != nil {
					return err
				}
			}
			if _, _, err := sys.SetBuffers(fd, 16<<20, 16<<20); err != nil {
				return err
			}
			return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: link.Attrs().Index})
		})
	}
	var wg sync.WaitGroup
	var polls []*sys.Poller
	for i := range fds {
		poll, err := sys.NewPoller(fds[i])
		must(t, err)
		polls = append(polls, poll)
		wg.Go(func() {
			buf := make([]byte, 1<<17)
			send := func(frame []byte) { unix.Write(fds[1-i], frame) } // full or down: lost, as on any wire
			for {
				if _, err := poll.WaitRead(); err == sys.ErrWoken {
					return
				}
				for {
					n, err := sys.Read(fds[i], buf)
					if err != nil {
						break
					}
					r(i == 0, slices.Clone(buf[:n]), send)
				}
			}
		})
	}
	t.Cleanup(func() {
		for i, p := range polls {
			p.Wake()
			defer p.Close()
			defer sys.Close(fds[i])
		}
		wg.Wait()
	})
}

// Names of device features (ethtool(8), net/ethtool/common.c).
const (
	featureChecksum = "tx-checksum-ip-generic"
	featureGSO      = "tx-generic-segmentation"
	featureUSO      = "tx-udp-segmentation"
	featureGRO      = "rx-gro"
)

// segmentation is everything by which a device takes super-packets. A veth device does GRO only on what comes from a peer
// without TSO (drivers/net/veth.c, veth_skb_is_eligible_for_gro).
var segmentation = []string{
	featureGSO, featureUSO, "tx-tcp-segmentation", "tx-tcp-ecn-segmentation", "tx-tcp-mangleid-segmentation", "tx-tcp6-segmentation",
}

// Numbers of linux/ethtool_netlink.h.
const (
	ethtoolFeaturesSet    = 12
	ethtoolFeaturesHeader = 1
	ethtoolFeaturesWanted = 3
	ethtoolHeaderName     = 2
	ethtoolHeaderFlags    = 3
	ethtoolOmitReply      = 2
	ethtoolBitsetBits     = 3
	ethtoolBitsetBit      = 1
	ethtoolBitName        = 2
	ethtoolBitValue       = 3
)

// genl is the header of a generic netlink message: command, version, reserved.
type genl [4]byte

func (g genl) Len() int          { return len(g) }
func (g genl) Serialize() []byte { return g[:] }

// ethtoolFamily asks for the number of the generic netlink family "ethtool" (linux/genetlink.h).
func ethtoolFamily() (int, error) {
	const controller, getFamily, attrID, attrName = 0x10, 3, 1, 2
	req := nl.NewNetlinkRequest(controller, unix.NLM_F_ACK)
	req.AddData(genl{getFamily, 1})
	req.AddData(nl.NewRtAttr(attrName, nl.ZeroTerminated("ethtool")))
	msgs, err := req.Execute(unix.NETLINK_GENERIC, 0)
	if err != nil || len(msgs) == 0 {
		return 0, fmt.Errorf("no generic netlink family ethtool: %w", err)
	}
	attrs, err := nl.ParseRouteAttr(msgs[0][len(genl{}):])
	for _, a := range attrs {
		if a.Attr.Type == attrID {
			return int(binary.NativeEndian.Uint16(a.Value)), nil
		}
	}
	return 0, fmt.Errorf("generic netlink family ethtool has no number: %w", err)
}

// features switches features of a device on or off, as `ethtool -K` does.
func features(t testing.TB, ns, dev string, on bool, names ...string) {
	t.Helper()
	err := inNetns(ns, func() error {
		family, err := ethtoolFamily()
		if err != nil {
			return err
		}
		header := nl.NewRtAttr(ethtoolFeaturesHeader|unix.NLA_F_NESTED, nil)
		header.AddRtAttr(ethtoolHeaderName, nl.ZeroTerminated(dev))
		header.AddRtAttr(ethtoolHeaderFlags, nl.Uint32Attr(ethtoolOmitReply))
		wanted := nl.NewRtAttr(ethtoolFeaturesWanted|unix.NLA_F_NESTED, nil)
		bits := wanted.AddRtAttr(ethtoolBitsetBits|unix.NLA_F_NESTED, nil)
		for _, name := range names {
			bit := bits.AddRtAttr(ethtoolBitsetBit|unix.NLA_F_NESTED, nil)
			bit.AddRtAttr(ethtoolBitName, nl.ZeroTerminated(name))
			if on {
				bit.AddRtAttr(ethtoolBitValue, nil)
			}
		}
		req := nl.NewNetlinkRequest(family, unix.NLM_F_ACK)
		req.AddData(genl{ethtoolFeaturesSet, 1})
		req.AddData(header)
		req.AddData(wanted)
		_, err = req.Execute(unix.NETLINK_GENERIC, 0)
		return err
	})
	if err != nil {
		t.Fatal(fmt.Errorf("features %v of %s: %w", names, dev, err))
	}
}

// writeSysfs writes a file of the namespace's own sysfs.
func writeSysfs(t testing.TB, ns, file, value string) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends with the goroutine, and its mounts with it
		done <- func() error {
			netns, err := os.Open(sys.NetnsPath(ns))
			if err != nil {
				return err
			}
			defer netns.Close()
			if err := unix.Setns(int(netns.Fd()), unix.CLONE_NEWNET); err != nil {
				return err
			}
			if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
				return err
			}
			if err := unix.Mount("", "/", "none", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				return err
			}
			if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
				return err
			}
			return os.WriteFile("/sys/"+file, []byte(value), 0)
		}()
	}()
	must(t, <-done)
}

func removeLink(t testing.TB, ns, name string) {
	t.Helper()
	withNetlink(t, ns, func(nl *sys.Netlink) error {
		link, err := nl.LinkByName(name)
		if err != nil {
			return err
		}
		return nl.LinkDel(link)
	})
}
