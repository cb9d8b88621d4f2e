package clustertest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/google/gopacket/pcapgo"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/lab"
)

func needTshark(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("tshark"); err != nil {
		t.Fatal("tshark is missing, which decodes the captures: apt-get install tshark")
	}
}

// capture sees each tunnel packet once, at the router's port by which it leaves for the host that it is for.
type capture struct {
	file  string
	stop  atomic.Bool
	done  sync.WaitGroup
	fds   []int
	mu    sync.Mutex
	out   *pcapgo.NgWriter
	close func() error
	err   error
	n     int // packets in the file
}

func startCapture(t *testing.T, l *lab.Lab) *capture {
	t.Helper()
	c := &capture{file: filepath.Join(t.TempDir(), "outer.pcapng")}
	f, err := os.Create(c.file)
	if err != nil {
		t.Fatal(err)
	}
	if c.out, err = pcapgo.NewNgWriter(f, layers.LinkTypeEthernet); err != nil {
		t.Fatal(err)
	}
	c.close = f.Close
	err = l.Do(lab.Router, func() error {
		for _, h := range l.Hosts() {
			if err := c.open(h.Name); err != nil {
				return fmt.Errorf("capture at the router's port to %s: %w", h.Name, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range c.fds {
		c.done.Go(func() { c.read(fd) })
	}
	t.Cleanup(func() { c.end() })
	return c
}

// open opens a packet socket, packet(7), on a device of the calling thread's namespace.
func (c *capture) open(dev string) error {
	link, err := netlink.LinkByName(dev)
	if err != nil {
		return err
	}
	// The kernel segments trains before it shows them to a capture on a device that takes no segments.
	if err := netlink.LinkSetGSOMaxSegs(link, 1); err != nil {
		return err
	}
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(all))
	if err != nil {
		return err
	}
	c.fds = append(c.fds, fd)
	wait := unix.NsecToTimeval(int64(50 * time.Millisecond))
	return errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Attrs().Index}),
	)
}

// read takes what leaves, until stop says that nothing more is to come and nothing more is there.
func (c *capture) read(fd int) {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := unix.Recvfrom(fd, buf, 0)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN && !c.stop.Load():
			continue
		case err == unix.EAGAIN:
			return
		case err != nil:
			c.mu.Lock()
			c.err = errors.Join(c.err, fmt.Errorf("packet socket: %w", err))
			c.mu.Unlock()
			return
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype == unix.PACKET_OUTGOING && isTunnel(buf[:n]) {
			c.mu.Lock()
			info := gopacket.CaptureInfo{Timestamp: time.Now(), CaptureLength: n, Length: n}
			c.err = errors.Join(c.err, c.out.WritePacket(info, buf[:n]))
			c.n++
			c.mu.Unlock()
		}
	}
}

// isTunnel tells the outer packets from gossip and neighbour discovery.
func isTunnel(frame []byte) bool {
	p := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.DecodeOptions{Lazy: true, NoCopy: true})
	if p.Layer(layers.LayerTypeARP) != nil {
		return false
	}
	proto := layers.IPProtocol(0)
	switch ip := p.NetworkLayer().(type) {
	case *layers.IPv4:
		proto = ip.Protocol
	case *layers.IPv6:
		proto = ip.NextHeader
	}
	udp, _ := p.TransportLayer().(*layers.UDP)
	return proto == layers.IPProtocolIPv4 || proto == layers.IPProtocolIPv6 || proto == layers.IPProtocolUDP && udp != nil && (udp.DstPort == 6080 || udp.DstPort == 4789)
}

// end closes the file, once.
func (c *capture) end() error {
	if c.stop.Swap(true) {
		return nil
	}
	c.done.Wait()
	for _, fd := range c.fds {
		unix.Close(fd)
	}
	return errors.Join(c.err, c.out.Flush(), c.close())
}

// check ends the capture, and wants packets of both inner families through the encapsulation, none of them malformed.
func (c *capture) check(t *testing.T, paths string) {
	t.Helper()
	if err := c.end(); err != nil {
		t.Fatal(err)
	}
	for _, inner := range []string{"ip", "ipv6"} {
		// GUE variant 1 has no header: the inner packet's first nibble tells which of the two it is.
		file, decode := c.file, []string(nil)
		want := map[string]string{"ip": "ip.proto==4 || ipv6.nxt==4", "ipv6": "ip.proto==41 || ipv6.nxt==41"}[inner]
		switch paths {
		case "vxlan":
			want = map[string]string{"ip": "vxlan.vni==1 && eth.type#2==0x0800", "ipv6": "vxlan.vni==1 && eth.type#2==0x86dd"}[inner]
		case "udp":
			nibble := map[string]string{"ip": "4", "ipv6": "6"}[inner]
			want = fmt.Sprintf("udp.dstport==6080 && udp.payload[0:1] >= %s0 && udp.payload[0:1] <= %sf", nibble, nibble)
		}
		part := filepath.Join(t.TempDir(), inner+".pcapng")
		tshark(t, "-r", file, "-Y", want, "-w", part)
		if _, err := os.Stat(part); err != nil {
			t.Fatalf("none of the %d packets captured is %s in %s: %v", c.n, inner, paths, err)
		}
		if paths == "udp" {
			decode = []string{"-d", "udp.port==6080," + inner}
		}
		read := func(filter string) string {
			return tshark(t, append([]string{"-n", "-r", part, "-Y", filter}, decode...)...)
		}
		// The agents' own probes are inner UDP packets to the same port, which tshark has been told to take for IP.
		if bad := read(malformed + " && !(frame contains 54:4c:50:52:01)"); bad != "" {
			t.Errorf("%s in %s: packets that tshark finds malformed:\n%s", inner, paths, bad)
		}
		// The port of the test's own traffic shows that tshark looks at the inner headers at all.
		for _, what := range []string{"tcp.port==9000", "udp.port==9000", map[string]string{"ip": "icmp", "ipv6": "icmpv6"}[inner]} {
			if n := strings.Count(read(what), "\n"); n == 0 {
				t.Errorf("%s in %s: the capture has no %s", inner, paths, what)
			}
		}
	}
}

// malformed is tshark's filter for packets that are.
const malformed = "(_ws.malformed || _ws.expert.severity==error)"

// tshark runs it over a file.
func tshark(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "tshark", slices.Concat(onlyDissectors(), args)...)
	var errOut strings.Builder
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("tshark %q: %v\n%s", args, err, errOut.String())
	}
	return string(out)
}

// onlyDissectors switches off all dissectors but those of what the test sends: its ports are the kernel's choice, and some
// of them mean a protocol to tshark.
var onlyDissectors = sync.OnceValue(func() []string {
	want := []string{"frame", "eth", "ethertype", "ip", "ipv6", "ipv6.fraghdr", "udp", "vxlan", "tcp", "icmp", "icmpv6", "data"}
	out, _ := exec.Command("tshark", "-G", "protocols").Output() // TestOnlyDissectors fails if this does
	var args []string
	for line := range strings.SplitSeq(string(out), "\n") {
		if f := strings.Split(line, "\t"); len(f) > 2 && !slices.Contains(want, f[2]) && !strings.HasPrefix(f[2], "_ws.") {
			args = append(args, "--disable-protocol", f[2])
		}
	}
	return args
})

// The kernel may choose a port by which tshark knows a protocol, and would find what is no such packet malformed. What is
// malformed in a header is found all the same.
func TestOnlyDissectors(t *testing.T) {
	needTshark(t)
	udp := &layers.UDP{SrcPort: 47000, DstPort: 9000} // Hotline Command-Response Transaction
	ip := &layers.IPv4{Version: 4, IHL: 5, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: net.IP{192, 0, 2, 1}, DstIP: net.IP{192, 0, 2, 2}}
	eth := &layers.Ethernet{SrcMAC: make(net.HardwareAddr, 6), DstMAC: make(net.HardwareAddr, 6), EthernetType: layers.EthernetTypeIPv4}
	payload := make(gopacket.Payload, 100)
	for i := range payload {
		payload[i] = byte(i)
	}
	buf := gopacket.NewSerializeBuffer()
	if err := errors.Join(udp.SetNetworkLayerForChecksum(ip),
		gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, eth, ip, udp, payload)); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "port.pcapng")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	w, err := pcapgo.NewNgWriter(f, layers.LinkTypeEthernet)
	if err != nil {
		t.Fatal(err)
	}
	good := buf.Bytes()
	bad := slices.Clone(good)
	binary.BigEndian.PutUint16(bad[14+20+4:], 1000) // the UDP header's length
	for _, frame := range [][]byte{good, bad} {
		if err := w.WritePacket(gopacket.CaptureInfo{CaptureLength: len(frame), Length: len(frame)}, frame); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Flush(), f.Close()); err != nil {
		t.Fatal(err)
	}
	for filter, want := range map[string]string{malformed: "2", "!" + malformed: "1"} {
		if out := strings.TrimSpace(tshark(t, "-n", "-r", file, "-Y", filter, "-T", "fields", "-e", "frame.number")); out != want {
			t.Errorf("%s: packets %q, want %s", filter, out, want)
		}
	}
}
