package underlay

import (
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/internal/testing/namespace"
)

// A host is a network namespace of the test.
type host struct {
	*namespace.Namespace
	t testing.TB
}

func newHost(t testing.TB) *host {
	t.Helper()
	return &host{namespace.New(t), t}
}

func (h *host) sysctl(path, value string) {
	h.t.Helper()
	h.Do(func() error { return os.WriteFile("/proc/sys/"+path, []byte(value), 0) })
}

// connect makes a veth pair between two hosts, with the interface names of the
// far end's host, and gives each end its addresses.
func connect(a, b *host, ifa, ifb string, mtu int, addrsA, addrsB []string) {
	a.t.Helper()
	a.Netlink(func(nl *sys.Netlink) error {
		ns, err := os.Open(b.Path())
		if err != nil {
			return err
		}
		defer ns.Close()
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = ifa, mtu
		return nl.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: ifb, PeerMTU: uint32(mtu), PeerNamespace: netlink.NsFd(ns.Fd())})
	})
	macA, macB := a.address(ifa, addrsA), b.address(ifb, addrsB)
	a.neighbours(ifa, macB, addrsB)
	b.neighbours(ifb, macA, addrsA)
}

// neighbours makes the far end's addresses known, so that no test waits for
// neighbour discovery, which takes seconds on an interface just set up.
func (h *host) neighbours(ifname string, mac net.HardwareAddr, addrs []string) {
	h.t.Helper()
	h.Netlink(func(nl *sys.Netlink) error {
		link, err := nl.LinkByName(ifname)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			ip := netip.MustParsePrefix(a).Addr().AsSlice()
			err := nl.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: ip, HardwareAddr: mac})
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// address gives an interface its addresses, sets it up, and returns its MAC.
func (h *host) address(ifname string, addrs []string) (mac net.HardwareAddr) {
	h.t.Helper()
	h.Netlink(func(nl *sys.Netlink) error {
		link, err := nl.LinkByName(ifname)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			p := netip.MustParsePrefix(a)
			ipnet := &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
			if err := nl.AddrAdd(link, &netlink.Addr{IPNet: ipnet, Flags: unix.IFA_F_NODAD}); err != nil {
				return err
			}
		}
		mac = link.Attrs().HardwareAddr
		return nl.LinkSetUp(link)
	})
	return mac
}

func (h *host) route(dst, via string) {
	h.t.Helper()
	h.Netlink(func(nl *sys.Netlink) error {
		p := netip.MustParsePrefix(dst)
		return nl.RouteAdd(&netlink.Route{
			Dst: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())},
			Gw:  netip.MustParseAddr(via).AsSlice(),
		})
	})
}

// A link is two hosts on one cable, with an address of each family on both.
type link struct {
	a, b *host
}

var addrA = map[bool]netip.Addr{false: netip.MustParseAddr("10.9.0.1"), true: netip.MustParseAddr("fd00:9::1")}
var addrB = map[bool]netip.Addr{false: netip.MustParseAddr("10.9.0.2"), true: netip.MustParseAddr("fd00:9::2")}

func newLink(t testing.TB, mtu int) *link {
	t.Helper()
	l := &link{newHost(t), newHost(t)}
	connect(l.a, l.b, "eth0", "eth0", mtu, []string{"10.9.0.1/24", "fd00:9::1/64"}, []string{"10.9.0.2/24", "fd00:9::2/64"})
	for _, six := range []bool{false, true} {
		from, to := l.udpPair(six)
		awaitPath(t, from, to)
		awaitPath(t, to, from)
	}
	return l
}

// awaitPath sends until something arrives: an interface just set up carries IPv6
// only when the kernel's workers have seen its carrier.
func awaitPath(t testing.TB, from, to *Socket) {
	t.Helper()
	b, rb := NewSendBatch(1, 1), NewRecvBatch(8, 64)
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		b.Begin(NewDest(to.Local()), 0)
		b.Append([]byte("hello"))
		b.End(0)
		if _, err := from.Send(b); err != nil {
			t.Fatal(err)
		}
		timer := time.AfterFunc(5*time.Millisecond, to.Wake)
		_, err := to.Wait()
		timer.Stop()
		if err == sys.ErrErrQueue {
			to.DrainErrors(func(Err) {})
		}
		if n, err := to.Recv(rb); err == nil && n > 0 {
			return
		}
	}
	t.Fatalf("nothing comes from %v to %v", from.Local(), to.Local())
}

func (h *host) udp(o Options) *Socket {
	h.t.Helper()
	return h.open(func() (*Socket, error) { return ListenUDP(o) })
}

func (h *host) raw(bind netip.Addr, proto int) *Socket {
	h.t.Helper()
	return h.open(func() (*Socket, error) { return ListenRaw(bind, proto, Options{}) })
}

func (h *host) open(f func() (*Socket, error)) (s *Socket) {
	h.t.Helper()
	h.Do(func() (err error) { s, err = f(); return err })
	h.t.Cleanup(func() {
		if err := s.Close(); err != nil {
			h.t.Error(err)
		}
	})
	return s
}

// udpPair opens a UDP socket on each host of the link.
func (l *link) udpPair(six bool) (from, to *Socket) {
	l.a.t.Helper()
	return l.a.udp(Options{Bind: netip.AddrPortFrom(addrA[six], 0)}), l.b.udp(Options{Bind: netip.AddrPortFrom(addrB[six], 0)})
}

// packet is one received datagram, on its own.
type packet struct {
	data []byte
	from netip.AddrPort
	tos  byte
}

// collect receives until want datagrams have come, trains taken apart. The
// waiting is bounded by a Wake (wakeLater).
func collect(t testing.TB, s *Socket, want int) (got []packet) {
	t.Helper()
	timer := wakeLater(s)
	defer timer.Stop()
	b := NewRecvBatch(8, MaxMessage)
	for len(got) < want {
		switch _, err := s.Wait(); err {
		case nil:
		case sys.ErrErrQueue:
			s.DrainErrors(func(e Err) { t.Logf("error queue: %+v", e) })
		default:
			t.Fatalf("have %d datagrams of %d: %v", len(got), want, err)
		}
		n, err := s.Recv(b)
		if err == sys.ErrAgain {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		for i := range n {
			got = append(got, split(b.At(i))...)
		}
	}
	if n, err := s.Recv(b); err != sys.ErrAgain {
		t.Errorf("%d messages more than %d datagrams, %v", n, want, err)
	}
	return got
}

// receive hands count messages to each, in the order of their arrival. Mostly they have arrived, so that one Recv takes all that the batch has slots
// for; a kernel that is busy delivers some later.
func receive(t testing.TB, s *Socket, b *RecvBatch, count int, each func(i int, r Received)) {
	t.Helper()
	for i, end := 0, time.Now().Add(patience); i < count; {
		n, err := s.Recv(b)
		switch {
		case err == sys.ErrAgain && time.Now().Before(end):
			time.Sleep(100 * time.Microsecond)
		case err != nil || i+n > count:
			t.Fatalf("Recv: %d messages after %d of %d, %v", n, i, count, err)
		}
		for k := range n {
			each(i+k, b.At(k))
		}
		i += n
	}
}

func split(r Received) (got []packet) {
	size := r.SegmentSize
	if size == 0 {
		size = max(len(r.Data), 1)
	}
	for rest := r.Data; ; {
		n := min(size, len(rest))
		got = append(got, packet{append([]byte(nil), rest[:n]...), r.From, r.TOS})
		if rest = rest[n:]; len(rest) == 0 {
			return got
		}
	}
}

// pattern is n bytes which tell their place and the datagram that they are in.
func pattern(seed, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(seed*31 + i*7 + i>>8)
	}
	return b
}
