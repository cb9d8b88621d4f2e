package tunnel

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/tunnel/device"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/mtu"
)

// testNode is one end of a link between two namespaces, with an engine in it.
type testNode struct {
	ns     string
	tun    [2]netip.Addr
	space  [2]netip.Prefix
	under  netip.Addr
	engine *Engine
	probes chan probe
}

type probe struct {
	mode encap.Mode
	body []byte
	size int
}

// testLink is what a test varies.
type testLink struct {
	underlay6 bool
	mode      encap.Mode
	linkMTU   int
}

func (l testLink) String() string {
	return fmt.Sprintf("%s over %s", l.mode, map[bool]string{false: "IPv4", true: "IPv6"}[l.underlay6])
}

func (l testLink) mtu() mtu.TUN {
	return mtu.Link(l.linkMTU).TUN(encap.Overhead(l.mode, l.underlay6))
}

var testSerial atomic.Uint32

// startPair makes two namespaces joined by a veth pair, with an engine in each that knows the other, and ends both with the
// test.
func startPair(t testing.TB, l testLink) (a, b *testNode) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: network namespaces and TUN devices")
	}
	if l.linkMTU == 0 {
		l.linkMTU = 1500
	}
	serial := testSerial.Add(1)
	nodes := [2]*testNode{}
	for i := range nodes {
		n := &testNode{ns: fmt.Sprintf("tulle-eng-%d-%d-%d", os.Getpid(), serial, i), probes: make(chan probe, 16)}
		for f, space := range []string{"10.77.%d.0/24", "fd77:0:0:%d::/64"} {
			n.space[f] = netip.MustParsePrefix(fmt.Sprintf(space, i))
			n.tun[f] = n.space[f].Addr()
		}
		n.under = netip.AddrFrom4([4]byte{192, 168, 77, byte(i + 1)})
		if l.underlay6 {
			n.under = netip.MustParseAddr(fmt.Sprintf("fd00:77::%d", i+1))
		}
		nodes[i] = n
		must(t, sys.NewNetns(n.ns))
		t.Cleanup(func() { sys.DeleteNetns(n.ns) })
	}
	joinPair(t, nodes, l.linkMTU)
	for i, n := range nodes {
		n.start(t, l, nodes[1-i])
	}
	return nodes[0], nodes[1]
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func joinPair(t testing.TB, nodes [2]*testNode, linkMTU int) {
	t.Helper()
	must(t, nodes[0].in(func() error {
		nl, err := sys.NewNetlink(-1)
		if err != nil {
			return err
		}
		defer nl.Close()
		peer, err := os.Open(sys.NetnsPath(nodes[1].ns))
		if err != nil {
			return err
		}
		defer peer.Close()
		veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0", MTU: linkMTU}, PeerName: "eth0", PeerNamespace: netlink.NsFd(peer.Fd()), PeerMTU: uint32(linkMTU)}
		return nl.LinkAdd(veth)
	}))
	for _, n := range nodes {
		must(t, n.in(func() error {
			nl, err := sys.NewNetlink(-1)
			if err != nil {
				return err
			}
			defer nl.Close()
			for _, name := range []string{"lo", "eth0"} {
				link, err := nl.LinkByName(name)
				if err != nil {
					return err
				}
				if err := nl.LinkSetUp(link); err != nil {
					return err
				}
				if name == "lo" {
					continue
				}
				bits := 24
				if n.under.Is6() {
					bits = 64
				}
				addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(n.under, bits)), Flags: unix.IFA_F_NODAD}
				if err := nl.AddrAdd(link, addr); err != nil {
					return err
				}
			}
			return nil
		}))
	}
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// in runs f inside the node's namespace.
func (n *testNode) in(f func() error) error { return sys.WithNetns(sys.NetnsPath(n.ns), f) }

// start opens the TUN and runs the engine.
func (n *testNode) start(t testing.TB, l testLink, peer *testNode) {
	t.Helper()
	must(t, n.in(func() error {
		dev, err := device.Open(device.Options{Name: "tun0", MTU: int(l.mtu())})
		if err != nil {
			return err
		}
		if err := n.address(dev.Index(), l); err != nil {
			return err
		}
		n.engine, err = New(Config{
			Device: dev, Underlay: []netip.Addr{n.under}, UDPPort: 6080, VXLANPort: 4789, CopyDSCP: true,
			Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
			Probed: func(_ string, m encap.Mode, body []byte, size int) {
				n.probes <- probe{m, bytes.Clone(body), size}
			},
		})
		return err
	}))
	n.engine.Update(
		Local{TunAddrs: n.tun[:], Prefixes: n.space[:], Underlay: []netip.Addr{n.under}},
		[]Peer{{
			ID: peer.ns, Endpoint: peer.under, Accept: []netip.Addr{peer.under}, UDPPort: 6080,
			Prefixes: peer.space[:], TunAddrs: peer.tun[:], Mode: l.mode, MTU: l.mtu(),
		}})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.engine.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("%s: Run: %v", n.ns, err)
		}
	})
}

// address gives the TUN its addresses and routes the cluster's space into it.
func (n *testNode) address(index int, l testLink) error {
	nl, err := sys.NewNetlink(-1)
	if err != nil {
		return err
	}
	defer nl.Close()
	link, err := nl.LinkByIndex(index)
	if err != nil {
		return err
	}
	for f, a := range n.tun {
		if a.Is6() && l.mtu() < mtu.Min6 {
			continue
		}
		addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, a.BitLen())), Flags: unix.IFA_F_NODAD}
		if err := nl.AddrAdd(link, addr); err != nil {
			return err
		}
		cluster := []string{"10.77.0.0/16", "fd77::/48"}[f]
		route := &netlink.Route{LinkIndex: index, Dst: ipNet(netip.MustParsePrefix(cluster)), Src: a.AsSlice(), MTU: int(l.mtu())}
		if err := nl.RouteReplace(route); err != nil {
			return err
		}
	}
	return nil
}

// allLinks are the encapsulations and outer families.
func allLinks() []testLink {
	var ls []testLink
	for _, m := range []encap.Mode{encap.UDP, encap.IPIP} {
		for _, six := range []bool{false, true} {
			ls = append(ls, testLink{mode: m, underlay6: six})
		}
	}
	return ls
}

// echo serves TCP and UDP echo on the node's tun addresses.
func (n *testNode) echo(t testing.TB, a netip.Addr) {
	t.Helper()
	at := netip.AddrPortFrom(a, 7)
	var tcp *net.TCPListener
	var udp *net.UDPConn
	must(t, n.in(func() (err error) {
		if tcp, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at)); err != nil {
			return err
		}
		udp, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		return err
	}))
	t.Cleanup(func() { tcp.Close(); udp.Close() })
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

// dial connects from the node's tun address.
func (n *testNode) dial(t testing.TB, network string, from, to netip.Addr) net.Conn {
	t.Helper()
	var c net.Conn
	must(t, n.in(func() (err error) {
		if network == "udp" {
			c, err = net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, 7)))
		} else {
			c, err = net.DialTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), net.TCPAddrFromAddrPort(netip.AddrPortFrom(to, 7)))
		}
		return err
	}))
	c.SetDeadline(time.Now().Add(30 * time.Second))
	t.Cleanup(func() { c.Close() })
	return c
}

func TestTraffic(t *testing.T) {
	for _, l := range allLinks() {
		t.Run(l.String(), func(t *testing.T) {
			a, b := startPair(t, l)
			for f := range a.tun {
				b.echo(t, b.tun[f])
				c := a.dial(t, "udp", a.tun[f], b.tun[f])
				ipHeader := []int{20, 40}[f]
				full := int(testLink{l.underlay6, l.mode, 1500}.mtu()) - ipHeader - 8
				for _, size := range []int{1, full - 28, full, full + 1, 60_000} {
					want := make([]byte, size)
					for i := range want {
						want[i] = byte(rand.Uint32())
					}
					if _, err := c.Write(want); err != nil {
						t.Fatalf("UDP %d bytes to %v: %v", size, b.tun[f], err)
					}
					got := make([]byte, 65536)
					n, err := c.Read(got)
					if err != nil || !bytes.Equal(got[:n], want) {
						t.Fatalf("UDP %d bytes to %v: echoed %d, %v; drops %v", size, b.tun[f], n, err, b.engine.Stats().Drops)
					}
				}
				bulk(t, a.dial(t, "tcp", a.tun[f], b.tun[f]), 8<<20)
			}
		})
	}
}

// bulk writes n random bytes to an echo server and compares what comes back.
func bulk(t testing.TB, c net.Conn, n int) {
	t.Helper()
	sum := make(chan [32]byte, 1)
	go func() {
		h := sha256.New()
		src := rand.NewChaCha8([32]byte{1})
		io.CopyN(io.MultiWriter(c, h), src, int64(n))
		c.(*net.TCPConn).CloseWrite()
		sum <- [32]byte(h.Sum(nil))
	}()
	h := sha256.New()
	k, err := io.Copy(h, c)
	if err != nil || k != int64(n) {
		t.Fatalf("TCP: %d of %d bytes echoed, %v", k, n, err)
	}
	if want := <-sum; want != [32]byte(h.Sum(nil)) {
		t.Fatalf("TCP: %d bytes echoed, not those that were sent", k)
	}
}
