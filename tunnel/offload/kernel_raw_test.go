package offload

import (
	"bytes"
	"net"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// newRawPath makes two namespaces joined by a veth pair. What is written to the TUN device in is
// forwarded by the first to 192.0.2.2 in the second, where the raw socket reads TCP. (A kernel's IPIP
// between them would add 20 bytes in front; not every kernel has it.) The calling
// goroutine must never give its thread back.
func newRawPath(t *testing.T) (in, raw int) {
	sender, receiver := newNamespace(t), newNamespace(t)

	enter(t, sender)
	in = openTUN(t, "in0", unix.IFF_VNET_HDR)
	if err := unix.IoctlSetInt(in, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4); err != nil {
		t.Fatalf("TUNSETOFFLOAD: %v", err)
	}
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	setUp(t, "in0", inSide[:1])
	veth := netlink.NewVeth(netlink.LinkAttrs{Name: "v1"})
	veth.PeerName = "v2"
	if err := netlink.LinkAdd(veth); err != nil {
		t.Fatal(err)
	}
	peer, err := netlink.LinkByName("v2")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetNsFd(peer, receiver); err != nil {
		t.Fatal(err)
	}
	setUp(t, "v1", []string{"192.0.2.1/24"})

	enter(t, receiver)
	setUp(t, "v2", []string{"192.0.2.2/24"})
	back := &netlink.Route{
		Dst: &net.IPNet{IP: net.IPv4(10, 1, 0, 0).To4(), Mask: net.CIDRMask(24, 32)},
		Gw:  net.IPv4(192, 0, 2, 1),
	}
	if err := netlink.RouteAdd(back); err != nil {
		t.Fatal(err)
	}
	raw, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		t.Fatalf("raw socket: %v", err)
	}
	t.Cleanup(func() { unix.Close(raw) })
	wait := unix.NsecToTimeval((20 * time.Second).Nanoseconds()) // the neighbour may have to be asked for twice
	if err := unix.SetsockoptTimeval(raw, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		t.Fatal(err)
	}
	return in, raw
}

// newNamespace moves the thread into a new network namespace and returns a descriptor of it.
func newNamespace(t *testing.T) int {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("new network namespace: %v", err)
	}
	fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func enter(t *testing.T, ns int) {
	if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
		t.Fatalf("setns: %v", err)
	}
}

// TestKernelRawSuperPacket: a raw socket reads super-packets, whose checksum is partial, where nothing
// on their way had to segment them. RawVnetHdr must see that, and what it says must do to
// split them into right packets.
func TestKernelRawSuperPacket(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, for network namespaces of its own")
	}
	runtime.LockOSThread() // never unlocked, so that the thread ends with this goroutine
	in, raw := newRawPath(t)
	const mtu = 1480
	f := &flow{tcp: true, src: []byte{10, 1, 0, 2}, dst: []byte{192, 0, 2, 2}, sport: 5000, dport: 80, ttl: 64, df: true,
		seq: 9, flags: 0x18, options: timestamps, payload: fill(20000, 9), mss: 1000}
	pkt, h := f.super()
	vnet := make([]byte, VnetHdrLen)
	h.Encode(vnet)
	if _, err := unix.Writev(in, [][]byte{vnet, pkt}); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<17)
	n, err := unix.Read(raw, buf)
	for err == unix.EINTR { // a signal of the runtime
		n, err = unix.Read(raw, buf)
	}
	if err != nil {
		t.Fatalf("read of the raw socket: %v", err)
	}
	inner := buf[:n]
	if len(inner) <= mtu {
		t.Fatalf("the kernel sent %d bytes: not a super-packet, so that nothing is tested", len(inner))
	}
	got, ok := RawVnetHdr(inner, mtu, NotTold)
	if !ok {
		t.Fatalf("a super-packet of %d bytes is not recognised", len(inner))
	}
	g := f.forwarded()
	g.mss = mtu - f.l4() - f.l4Headers() // the kernel's size is lost on the way
	want, wantHdr := g.super()
	if got != wantHdr || !bytes.Equal(inner, want) {
		t.Fatalf("%+v, want %+v; same bytes: %v", got, wantHdr, bytes.Equal(inner, want))
	}
	segs, err := NewSplitter(8<<10).Split(slices.Clone(inner), got)
	if err != nil {
		t.Fatal(err)
	}
	if d := differ(flat(segs), g.segments()); d != "" {
		t.Fatal(d)
	}
}
