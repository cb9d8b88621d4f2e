package offload

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// kernelPath is a network namespace with a forwarding path between two TUN devices. What is written to in
// comes as super-packets, with virtio-net headers; out has no offload at all, neither
// segmentation nor checksum, so that the kernel must do both itself before it hands
// packets to the reader of out.
type kernelPath struct {
	in, out int // file descriptors
}

// Each device has one address family's worth of hosts behind it.
var (
	inSide  = []string{"10.1.0.1/24", "fd01::1/64"}
	outSide = []string{"10.2.0.1/24", "fd02::1/64"}
)

// newKernelPath must run in a goroutine that never ends but with its thread, and its
// namespace with both: see TestKernelSegmentation.
func newKernelPath(t *testing.T) *kernelPath {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("new network namespace: %v", err)
	}
	k := &kernelPath{
		in:  openTUN(t, "in0", unix.IFF_VNET_HDR),
		out: openTUN(t, "out0", 0),
	}
	const uso = 0x20 | 0x40 // TUN_F_USO4, TUN_F_USO6
	offloads := unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_TSO_ECN
	if err := unix.IoctlSetInt(k.in, unix.TUNSETOFFLOAD, offloads|uso); err != nil {
		t.Fatalf("TUNSETOFFLOAD with USO: %v", err)
	}
	for key, value := range map[string]string{
		"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1",
		"ipv4/conf/all/rp_filter": "0", "ipv4/conf/in0/rp_filter": "0",
	} {
		if err := os.WriteFile("/proc/sys/net/"+key, []byte(value), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	setUp(t, "in0", inSide)
	setUp(t, "out0", outSide)
	return k
}

func openTUN(t *testing.T, name string, flags uint16) int {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatalf("/dev/net/tun: %v", err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		t.Fatal(err)
	}
	ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		t.Fatalf("TUNSETIFF %s: %v", name, err)
	}
	return fd
}

func setUp(t *testing.T, name string, addrs []string) {
	link, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		t.Fatal(err)
	}
	for _, s := range addrs {
		a, err := netlink.ParseAddr(s)
		if err != nil {
			t.Fatal(err)
		}
		if a.IP.To4() == nil {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(link, a); err != nil {
			t.Fatalf("%s to %s: %v", s, name, err)
		}
	}
}

// send writes one packet, with its virtio-net header, in pieces.
func (k *kernelPath) send(iov [][]byte) error {
	_, err := unix.Writev(k.in, iov)
	return err
}

// receive reads the packets of the flow's ports: n, fewer when they do not come for long, and more if
// there are more.
func (k *kernelPath) receive(t *testing.T, f *flow, n int) [][]byte {
	var out [][]byte
	buf := make([]byte, 1<<17)
	deadline := time.Now().Add(20 * time.Second)
	for {
		m, err := unix.Read(k.out, buf)
		if err == unix.EAGAIN || err == unix.EINTR {
			if len(out) >= n || time.Now().After(deadline) {
				return out
			}
			unix.Poll([]unix.PollFd{{Fd: int32(k.out), Events: unix.POLLIN}}, 100)
			continue
		}
		if err != nil {
			t.Fatalf("read out0: %v", err)
		}
		p := slices.Clone(buf[:m])
		// The kernel says things of its own on every link (router and listener reports).
		if l4 := f.l4(); m > l4+4 && bytes.Equal(p[l4:l4+4], []byte{byte(f.sport >> 8), byte(f.sport), byte(f.dport >> 8), byte(f.dport)}) {
			out = append(out, p)
		}
	}
}

// forwarded returns the flow as it is behind a router.
func (f *flow) forwarded() *flow {
	g := *f
	g.ttl--
	return &g
}

// kernelFlows are the runs that the kernel takes apart, with a name each.
func kernelFlows() map[string]*flow {
	flows := make(map[string]*flow)
	port := uint16(10000)
	add := func(name string, v6, tcp bool, edit func(*flow)) {
		src, dst := "10.1.0.2", "10.2.0.2"
		if v6 {
			src, dst = "fd01::2", "fd02::2"
		}
		port++
		f := &flow{v6: v6, tcp: tcp, src: netip.MustParseAddr(src).AsSlice(), dst: netip.MustParseAddr(dst).AsSlice(),
			sport: port, dport: 4000, ttl: 64, tos: 2, df: true, id: 65530, seq: 1<<32 - 5000, ack: 77, flags: 0x10,
			window: 501, payload: fill(20*1388+17, uint64(port)), mss: 1388}
		if tcp {
			f.options = timestamps
		}
		if v6 {
			f.label = 0x12345
		}
		edit(f)
		flows[fmt.Sprintf("%s/v6=%v/tcp=%v", name, v6, tcp)] = f
	}
	for _, v6 := range []bool{false, true} {
		for _, tcp := range []bool{false, true} {
			add("plain", v6, tcp, func(f *flow) {})
			add("whole segments", v6, tcp, func(f *flow) { f.payload = f.payload[:10*f.mss] })
			add("odd size", v6, tcp, func(f *flow) { f.mss = 777 })
			add("tiny size", v6, tcp, func(f *flow) { f.mss = 9; f.payload = f.payload[:500] })
			add("64 KiB", v6, tcp, func(f *flow) { f.payload = fill(maxTotal-f.l4()-f.l4Headers(), 3) })
			add("short of one segment", v6, tcp, func(f *flow) { f.payload = f.payload[:100] })
			add("two segments, last of one byte", v6, tcp, func(f *flow) { f.payload = f.payload[:f.mss+1] })
			if tcp {
				add("PSH and FIN", v6, tcp, func(f *flow) { f.flags |= tcpPSH | tcpFIN })
				add("CWR", v6, tcp, func(f *flow) { f.flags |= tcpCWR })
				add("ECE, CWR, PSH", v6, tcp, func(f *flow) { f.flags |= tcpCWR | tcpPSH | 0x40 })
				add("SACK", v6, tcp, func(f *flow) { f.options = slices.Concat(timestamps, sack) })
				add("no options", v6, tcp, func(f *flow) { f.options = nil })
			}
			if !tcp { // tcp_gso_segment refuses this one, which Joiner never makes
				add("exactly one segment", v6, tcp, func(f *flow) { f.payload = f.payload[:f.mss] })
			}
			if v6 {
				add("extension headers", v6, tcp, func(f *flow) { f.ext = chain(f.proto(), 8, 16) })
			} else {
				add("no DF", v6, tcp, func(f *flow) { f.df = false })
				add("IP options", v6, tcp, func(f *flow) { f.ipOptions = []byte{1, 1, 1, 0} })
			}
		}
	}
	return flows
}

// TestKernelSegmentation holds Split, and what Joiner makes, against Linux's own software segmentation: the
// same super-packet goes through both and must come out the same, byte for byte.
func TestKernelSegmentation(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, for a network namespace of its own")
	}
	// Never unlocked: the thread, and with it the namespace, ends with this goroutine.
	runtime.LockOSThread()
	k := newKernelPath(t)
	for name, f := range kernelFlows() {
		t.Run(name, func(t *testing.T) {
			pkt, h := f.super()
			fpkt, fh := f.forwarded().super()
			segs, err := NewSplitter(8<<10).Split(fpkt, fh)
			if err != nil {
				t.Fatal(err)
			}
			want := flat(segs)

			vnet := make([]byte, VnetHdrLen)
			h.Encode(vnet)
			if err := k.send([][]byte{vnet, pkt}); err != nil {
				t.Fatalf("write of the super-packet: %v", err)
			}
			if d := differ(k.receive(t, f, len(want)), want); d != "" {
				t.Fatalf("Split and the kernel: %s", d)
			}

			// The same run once more, as single packets that the Joiner joins.
			j := NewJoiner(true, true)
			for _, p := range f.segments() {
				if j.Add(p) {
					continue
				}
				iov, _ := j.FlushVnet()
				if err := k.send(iov); err != nil {
					t.Fatalf("write of a joined packet: %v", err)
				}
				j.Add(p)
			}
			iov, _ := j.FlushVnet()
			if err := k.send(iov); err != nil {
				t.Fatalf("write of a joined packet: %v", err)
			}
			if d := differ(k.receive(t, f, len(want)), want); d != "" {
				t.Fatalf("Joiner and the kernel: %s", d)
			}
		})
	}
}
