package tunnel

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// echo serves TCP and UDP echo on port 7 of an address of the node.
func (n *testNode) echo(t testing.TB, a netip.Addr) {
	t.Helper()
	at := netip.AddrPortFrom(a, 7)
	var tcp *net.TCPListener
	must(t, n.in(func() (err error) {
		tcp, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
		return err
	}))
	udp := n.listenUDP(t, at)
	t.Cleanup(func() { tcp.Close() })
	go func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(c, c); c.Close() }()
		}
	}()
	go func() {
		buf := make([]byte, 65536)
		for {
			k, from, err := udp.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			udp.WriteToUDPAddrPort(buf[:k], from)
		}
	}()
}

// listenUDP opens a UDP socket of the node with a large buffer; the test closes it.
func (n *testNode) listenUDP(t testing.TB, at netip.AddrPort) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	must(t, n.in(func() (err error) {
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		return err
	}))
	option(t, c, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20)
	c.SetReadDeadline(time.Now().Add(2 * patience))
	t.Cleanup(func() { c.Close() })
	return c
}

// option sets an integer option of a socket.
func option(t testing.TB, c syscall.Conn, level, opt, value int) {
	t.Helper()
	withFD(t, c, func(fd int) error { return unix.SetsockoptInt(fd, level, opt, value) })
}

func withFD(t testing.TB, c syscall.Conn, f func(fd int) error) {
	t.Helper()
	raw, err := c.SyscallConn()
	must(t, err)
	var inner error
	must(t, raw.Control(func(fd uintptr) { inner = f(int(fd)) }))
	must(t, inner)
}

// dialUDP connects a UDP socket of the node.
func (n *testNode) dialUDP(t testing.TB, from netip.Addr, to netip.AddrPort) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	must(t, n.in(func() (err error) {
		c, err = net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), net.UDPAddrFromAddrPort(to))
		return err
	}))
	c.SetDeadline(time.Now().Add(2 * patience))
	t.Cleanup(func() { c.Close() })
	return c
}

// dialTCP connects to the echo service.
func (n *testNode) dialTCP(t testing.TB, from, to netip.Addr) *net.TCPConn {
	t.Helper()
	var c *net.TCPConn
	must(t, n.in(func() (err error) {
		c, err = net.DialTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), net.TCPAddrFromAddrPort(netip.AddrPortFrom(to, 7)))
		return err
	}))
	c.SetDeadline(time.Now().Add(3 * patience))
	t.Cleanup(func() { c.Close() })
	return c
}

// bulk writes n random bytes to an echo server and compares what comes back: TCP in both directions at once. at is called
// with the bytes echoed so far, now and then. A machine with much else to do may be slow; what must not happen is that nothing comes.
func bulk(t testing.TB, c *net.TCPConn, n int, at func(done int)) {
	t.Helper()
	sum := make(chan [32]byte, 1)
	go func() {
		h := sha256.New()
		src := rand.NewChaCha8([32]byte{1})
		io.CopyN(io.MultiWriter(c, h), src, int64(n))
		c.CloseWrite()
		sum <- [32]byte(h.Sum(nil))
	}()
	h := sha256.New()
	buf := make([]byte, 1<<18)
	done := 0
	for {
		c.SetDeadline(time.Now().Add(3 * patience))
		k, err := c.Read(buf)
		h.Write(buf[:k])
		done += k
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatalf("TCP: %d of %d bytes echoed, %v", done, n, err)
		}
		if at != nil {
			at(done)
		}
	}
	if done != n {
		t.Fatalf("TCP: %d of %d bytes echoed", done, n)
	}
	if want := <-sum; want != [32]byte(h.Sum(nil)) {
		t.Fatalf("TCP: %d bytes echoed, not those that were sent", n)
	}
}

// checksumErrors is what the namespace's transports have counted as bad checksums.
func (n *testNode) checksumErrors(t testing.TB) (sum int) {
	t.Helper()
	var snmp, snmp6 []byte
	must(t, n.in(func() (err error) {
		if snmp, err = os.ReadFile("/proc/thread-self/net/snmp"); err != nil {
			return err
		}
		snmp6, err = os.ReadFile("/proc/thread-self/net/snmp6")
		return err
	}))
	found := 0
	add := func(value string) {
		v, err := strconv.Atoi(value)
		must(t, err)
		sum, found = sum+v, found+1
	}
	// /proc/net/snmp has a line of names and a line of values for each protocol.
	lines := bytes.Split(snmp, []byte("\n"))
	for i := 0; i+1 < len(lines); i += 2 {
		values := strings.Fields(string(lines[i+1]))
		for k, name := range strings.Fields(string(lines[i])) {
			if name == "InCsumErrors" {
				add(values[k])
			}
		}
	}
	for s := bufio.NewScanner(bytes.NewReader(snmp6)); s.Scan(); {
		if f := strings.Fields(s.Text()); len(f) == 2 && strings.HasSuffix(f[0], "InCsumErrors") {
			add(f[1])
		}
	}
	if found < 5 {
		t.Fatalf("only %d counters of checksum errors found", found)
	}
	return sum
}

// cleanChecksums requires that no transport has met a bad checksum.
func cleanChecksums(t testing.TB, nodes ...*testNode) {
	t.Helper()
	for _, n := range nodes {
		if k := n.checksumErrors(t); k != 0 {
			t.Errorf("%s: %d packets with bad checksums arrived", n.ns, k)
		}
	}
}

// sendGSO sends data as a train of datagrams of size bytes, with UDP_SEGMENT.
func sendGSO(t testing.TB, c *net.UDPConn, to netip.AddrPort, size int, data []byte) {
	t.Helper()
	control := sys.AppendControl(nil, unix.SOL_UDP, unix.UDP_SEGMENT, binary.NativeEndian.AppendUint16(nil, uint16(size)))
	if _, _, err := c.WriteMsgUDPAddrPort(data, control, to); err != nil {
		t.Fatalf("train of %d bytes by %d to %v: %v", len(data), size, to, err)
	}
}
