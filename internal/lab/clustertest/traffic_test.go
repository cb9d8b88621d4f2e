package clustertest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/lab"
)

// station is an end of traffic: a pod, or a host's own processes. Its addresses are those under which the others
// reach it, and see it.
type station struct {
	name  string
	host  string
	addrs []netip.Addr
}

func (s *station) addr(v6 bool) netip.Addr {
	for _, a := range s.addrs {
		if a.Is6() == v6 {
			return a
		}
	}
	return netip.Addr{}
}

func pods(l *lab.Lab) []station {
	var out []station
	for _, p := range l.Pods() {
		out = append(out, station{p.Name, p.Host, p.Addresses})
	}
	return out
}

// hostStations are the hosts with their tun addresses.
func hostStations(t *testing.T, l *lab.Lab) []station {
	t.Helper()
	var out []station
	for _, h := range l.Hosts() {
		st := mustStatus(t, l, h.Name)
		out = append(out, station{h.Name, h.Name, st.Node.Tun.Addresses})
	}
	return out
}

const trafficPort = 9000

// traffic has a TCP and a UDP echo server in every station, for each family.
type traffic struct {
	l      *lab.Lab
	closes []io.Closer
	wg     sync.WaitGroup

	mu   sync.Mutex
	seen map[string]map[netip.AddrPort]bool // by station and "tcp" or "udp": whom its servers heard
}

func newTraffic(t *testing.T, l *lab.Lab, stations []station) *traffic {
	t.Helper()
	tr := &traffic{l: l, seen: map[string]map[netip.AddrPort]bool{}}
	t.Cleanup(tr.close)
	for _, s := range stations {
		for _, a := range s.addrs {
			at := netip.AddrPortFrom(a, trafficPort).String()
			ln, err := l.Listen(t.Context(), s.name, "tcp", at)
			if err != nil {
				t.Fatalf("%s: %v", s.name, err)
			}
			tr.closes = append(tr.closes, ln)
			tr.wg.Go(func() { tr.serveTCP(ln, s.name) })
			pc, err := l.ListenPacket(t.Context(), s.name, "udp", at)
			if err != nil {
				t.Fatalf("%s: %v", s.name, err)
			}
			tr.closes = append(tr.closes, pc)
			if err := dontFragment(pc.(*net.UDPConn), a.Is6(), false); err != nil {
				t.Fatal(err)
			}
			tr.wg.Go(func() { tr.serveUDP(pc, s.name) })
		}
	}
	return tr
}

func (tr *traffic) close() {
	for _, c := range tr.closes {
		c.Close()
	}
	tr.wg.Wait()
}

func (tr *traffic) saw(key string, from net.Addr) {
	ap := netip.MustParseAddrPort(from.String())
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if tr.seen[key] == nil {
		tr.seen[key] = map[netip.AddrPort]bool{}
	}
	tr.seen[key][netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())] = true
}

// wasSeen reports whether the station heard exactly that address and port.
func (tr *traffic) wasSeen(key string, as netip.AddrPort) error {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if tr.seen[key][as] {
		return nil
	}
	var others []netip.AddrPort
	for ap := range tr.seen[key] {
		if ap.Port() == as.Port() {
			others = append(others, ap)
		}
	}
	return fmt.Errorf("not seen there as %v but as %v", as, others)
}

// serveTCP sends everything back that it gets, once it has got it all: both directions carry bulk, one after the other.
func (tr *traffic) serveTCP(ln net.Listener, name string) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		tr.saw(name+" tcp", c.RemoteAddr())
		tr.wg.Go(func() {
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(patience))
			all, err := io.ReadAll(c)
			if err == nil {
				_, _ = c.Write(all)
			}
		})
	}
}

// serveUDP echoes. Its answers may be fragmented, as the requests may.
func (tr *traffic) serveUDP(pc net.PacketConn, name string) {
	buf := make([]byte, 65536)
	for {
		n, from, err := pc.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error of an earlier answer
		}
		tr.saw(name+" udp", from)
		_, _ = pc.WriteTo(buf[:n], from)
	}
}

// dontFragment sets DF and no fragmenting at the source on a socket, or allows both to fragment.
func dontFragment(c syscall.Conn, v6, on bool) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	level, opt, how := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT
	if v6 {
		level, opt = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER
	}
	if on {
		how = unix.IP_PMTUDISC_DO
	}
	var serr error
	if err := raw.Control(func(fd uintptr) { serr = unix.SetsockoptInt(int(fd), level, opt, how) }); err != nil {
		return err
	}
	return serr
}

// random fills a buffer with bytes that no compression, offset or repetition makes up by chance.
func random(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)})
	_, _ = r.Read(b)
	return b
}

// tcp sends n bytes with DF set, and reads them back.
func (tr *traffic) tcp(ctx context.Context, from, to station, v6 bool, n int) error {
	c, err := tr.l.Dial(ctx, from.name, "tcp", netip.AddrPortFrom(to.addr(v6), trafficPort).String())
	if err != nil {
		return err
	}
	defer c.Close()
	if err := dontFragment(c.(*net.TCPConn), v6, true); err != nil {
		return err
	}
	_ = c.SetDeadline(time.Now().Add(patience))
	out := random(n)
	if _, err := c.Write(out); err != nil {
		return err
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	back, err := io.ReadAll(c)
	if err != nil {
		return err
	}
	if sha256.Sum256(out) != sha256.Sum256(back) {
		return fmt.Errorf("sent %d bytes, got %d back, and they differ", len(out), len(back))
	}
	return tr.sourceIs(to.name+" tcp", from, to, c.LocalAddr())
}

// sourceIs checks that the far side saw the near side's own address. What a host takes as source toward a pod of its own
// is the kernel's choice.
func (tr *traffic) sourceIs(key string, from, to station, local net.Addr) error {
	ap := netip.MustParseAddrPort(local.String())
	if from.host != to.host && ap.Addr() != from.addr(ap.Addr().Is6()) {
		return fmt.Errorf("sent from %v, not from its own %v", ap.Addr(), from.addrs)
	}
	return tr.wasSeen(key, ap)
}

// udpSizes are the payloads to send where the largest inner packet has mtu bytes; all but the last two go with DF.
func udpSizes(mtu int, v6 bool) []int {
	header := 28
	if v6 {
		header = 48
	}
	return []int{1, mtu - 28 - header, mtu - header, mtu, 60000}
}

// udp sends a datagram of each size, and wants each back.
func (tr *traffic) udp(ctx context.Context, from, to station, v6 bool, mtu int) error {
	sizes := udpSizes(mtu, v6)
	for i, size := range sizes {
		if err := tr.datagram(ctx, from, to, v6, size, i < len(sizes)-2); err != nil {
			return fmt.Errorf("%d bytes: %w", size, err)
		}
	}
	return nil
}

func (tr *traffic) datagram(ctx context.Context, from, to station, v6 bool, size int, df bool) error {
	c, err := tr.l.Dial(ctx, from.name, "udp", netip.AddrPortFrom(to.addr(v6), trafficPort).String())
	if err != nil {
		return err
	}
	defer c.Close()
	if err := dontFragment(c.(*net.UDPConn), v6, df); err != nil {
		return err
	}
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	out := random(size)
	if _, err := c.Write(out); err != nil {
		return err
	}
	back := make([]byte, 65536)
	n, err := c.Read(back)
	if err != nil {
		return err
	}
	if !bytes.Equal(out, back[:n]) {
		return fmt.Errorf("%d bytes came back, and they differ", n)
	}
	return tr.sourceIs(to.name+" udp", from, to, c.LocalAddr())
}

// all exchanges TCP and UDP between the ends of every pair, in both families.
func (tr *traffic) all(t *testing.T, pairs [][2]station, mtu, bulk int) {
	t.Helper()
	for _, p := range pairs {
		for _, v6 := range []bool{false, true} {
			if !p[1].addr(v6).IsValid() {
				continue
			}
			what := fmt.Sprintf("%s to %s %v", p[0].name, p[1].name, p[1].addr(v6))
			if err := tr.tcp(t.Context(), p[0], p[1], v6, bulk); err != nil {
				t.Errorf("%s: TCP: %v", what, err)
			}
			if err := tr.udp(t.Context(), p[0], p[1], v6, mtu); err != nil {
				t.Errorf("%s: UDP: %v", what, err)
			}
		}
	}
}

// allPairs are pods with pods, hosts with pods and pods with hosts, each in both roles.
func allPairs(pods, hosts []station) [][2]station {
	var out [][2]station
	for _, a := range pods {
		for _, b := range pods {
			if a.name != b.name {
				out = append(out, [2]station{a, b})
			}
		}
		for _, h := range hosts {
			out = append(out, [2]station{h, a}, [2]station{a, h})
		}
	}
	return out
}

// pingAll wants every ICMP echo answered, and seen under its sender's own address.
func pingAll(t *testing.T, l *lab.Lab, hosts []station) {
	t.Helper()
	pongs, err := l.PingAll(t.Context(), len(hosts) > 0)
	if err != nil {
		t.Fatal(err)
	}
	own := map[string]station{}
	for _, s := range append(pods(l), hosts...) {
		own[s.name] = s
	}
	for _, p := range pongs {
		from, to := own[p.From], own[p.To]
		switch want := from.addr(p.Addr.Is6()); {
		case p.Err != nil:
			t.Errorf("ping %s to %s %v: %v", p.From, p.To, p.Addr, p.Err)
		case from.host != to.host && p.Source != want:
			t.Errorf("ping %s to %s %v: seen there as %v, want %v", p.From, p.To, p.Addr, p.Source, want)
		}
	}
}
