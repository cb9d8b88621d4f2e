package podnet

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/tulle-net/tulle/internal/sys"
)

var serial atomic.Int32

// namespace makes a network namespace for one test.
func namespace(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	name := fmt.Sprintf("tulle-podnet-%d-%d", os.Getpid(), serial.Add(1))
	if err := sys.NewNetns(name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := sys.DeleteNetns(name); err != nil {
			t.Error(err)
		}
	})
	return sys.NetnsPath(name)
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func addrs(texts ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range texts {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

// world is a host that forwards, with an underlay address, and two pods.
type world struct {
	t        testing.TB
	ctx      context.Context
	hostPath string
	host     *Host
	a, b     Config
	bridge   string // that pods are put behind
}

var (
	hostAddrs = addrs("192.0.2.1", "2001:db8::1")
	alice     = addrs("10.244.0.3", "fd00:244::3")
	bob       = addrs("10.244.0.4", "fd00:244::4")
	blocks    = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/24"), netip.MustParsePrefix("fd00:244::/64")}
)

func newWorld(t testing.TB) *world { return newWorldBehind(t, "") }

// newWorldBehind is a world whose pods are behind this bridge, and whose host has these settings.
func newWorldBehind(t testing.TB, bridge string, settings ...[2]string) *world {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	t.Cleanup(cancel)
	w := &world{t: t, ctx: ctx, hostPath: namespace(t), bridge: bridge}
	check(t, sys.WithNetns(w.hostPath, func() error {
		return sys.SetSysctls([2]string{"ipv4/ip_forward", "1"}, [2]string{"ipv6/conf/all/forwarding", "1"})
	}))
	var err error
	w.host, err = Open(w.hostPath)
	check(t, err)
	t.Cleanup(func() { w.host.Close() })
	_, err = w.host.nl.LinkUp("lo")
	check(t, err)
	// The underlay's interface, with a router behind it.
	router := namespace(t)
	ns, err := os.Open(router)
	check(t, err)
	defer ns.Close()
	check(t, w.host.nl.LinkAdd(&netlink.Veth{LinkAttrs: sys.LinkAttrs("eth0"), PeerName: "eth0", PeerNamespace: netlink.NsFd(ns.Fd())}))
	link, err := w.host.nl.LinkUp("eth0")
	check(t, err)
	for _, a := range hostAddrs {
		check(t, w.host.nl.AddAddress(ctx, link, sys.HostPrefix(a)))
	}
	check(t, w.host.do(func() error { return sys.SetSysctls(settings...) }))
	w.a = w.add("alice", alice)
	w.b = w.add("bob", bob)
	return w
}

// add makes a pod.
func (w *world) add(name string, addrs []netip.Addr) Config {
	w.t.Helper()
	c := Config{ID: "test/" + name, Netns: namespace(w.t), Interface: "eth0", Addresses: addrs, MTU: 1400, Bridge: w.bridge}
	if w.bridge != "" {
		c.OnLink = blocks
	}
	_, err := w.host.Add(w.ctx, c)
	check(w.t, err)
	c.HostInterface = InterfaceName(c.ID)
	return c
}

// echo answers each datagram in the namespace at path with the sender's address, until the test ends.
func echo(t testing.TB, path string, a netip.Addr) netip.AddrPort {
	t.Helper()
	var c net.PacketConn
	check(t, sys.WithNetns(path, func() (err error) {
		c, err = net.ListenPacket("udp", netip.AddrPortFrom(a, 0).String())
		return err
	}))
	t.Cleanup(func() { c.Close() })
	go func() {
		b := make([]byte, 64)
		for {
			_, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = c.WriteTo([]byte(from.String()), from)
		}
	}()
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}

// patience is how long what must happen may take on a busy machine.
const patience = 20 * time.Second

// ask sends a datagram from the namespace at path, again and again until there is an answer, and returns whom the other side saw.
func ask(path string, to netip.AddrPort) (netip.Addr, error) {
	var seen netip.AddrPort
	err := sys.WithNetns(path, func() error {
		c, err := net.Dial("udp", to.String())
		if err != nil {
			return err
		}
		defer c.Close()
		b := make([]byte, 64)
		for end := time.Now().Add(patience); ; {
			if _, err := c.Write([]byte("?")); err != nil {
				return err
			}
			_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
			n, err := c.Read(b)
			if err == nil {
				seen, err = netip.ParseAddrPort(string(b[:n]))
				return err
			}
			if time.Now().After(end) {
				return err
			}
		}
	})
	return seen.Addr().Unmap(), err
}
