package hostnet

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// echo answers each datagram on the address with the sender's address as it saw it.
func (h *host) echo(addr string) {
	h.t.Helper()
	h.do(func() error {
		c, err := net.ListenPacket("udp", addr)
		if err != nil {
			return err
		}
		h.t.Cleanup(func() { c.Close() })
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
		return nil
	})
}

// ask sends a datagram from h and gives the source address that the other side saw.
func (h *host) ask(from, to string) (netip.Addr, error) {
	h.t.Helper()
	var seen netip.Addr
	var fail error
	h.do(func() error {
		d := net.Dialer{Timeout: 5 * time.Second}
		if from != "" {
			d.LocalAddr = &net.UDPAddr{IP: net.ParseIP(from)}
		}
		c, err := d.Dial("udp", to)
		if err != nil {
			fail = err
			return nil
		}
		defer c.Close()
		b := make([]byte, 64)
		for range 20 { // neighbours have to be found first. An answer that comes after the last question would count as one more
			if _, fail = c.Write([]byte("?")); fail != nil {
				return nil
			}
			_ = c.SetReadDeadline(time.Now().Add(time.Second))
			var n int
			if n, fail = c.Read(b); fail == nil {
				ap, err := netip.ParseAddrPort(string(b[:n]))
				seen = ap.Addr().Unmap()
				return err
			}
			if !errors.Is(fail, unix.EAGAIN) && !isTimeout(fail) {
				return nil
			}
		}
		return nil
	})
	return seen, fail
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

// world is a host with a pod, the outside behind it, and a peer at the other end of
// its tun0, which here is a pair of devices.
type world struct {
	pod, host, outside, peer *host
	r                        *Reconciler
	s                        State
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{pod: newHost(t), host: newHost(t), outside: newHost(t), peer: newHost(t), s: dual()}
	connect(w.pod, "eth0", []string{"10.244.1.5/24", "fd00:244:0:1::5/64"}, w.host, "pods", []string{"10.244.1.1/24", "fd00:244:0:1::1/64"})
	connect(w.host, "eth0", []string{"192.0.2.1/24", "2001:db8::1/64"}, w.outside, "eth0", []string{"192.0.2.2/24", "192.0.2.9/24", "2001:db8::2/64", "2001:db8::9/64"})
	connect(w.host, "tun0", nil, w.peer, "eth0", []string{"10.244.2.7/16", "fd00:244:0:2::7/32"})
	for _, h := range []struct {
		h      *host
		v4, v6 string
	}{{w.pod, "10.244.1.1", "fd00:244:0:1::1"}, {w.outside, "192.0.2.1", "2001:db8::1"}} {
		h.h.route("0.0.0.0/0", h.v4, "eth0", 0, unix.RTPROT_STATIC)
		h.h.route("::/0", h.v6, "eth0", 1024, unix.RTPROT_STATIC)
	}
	w.s.Members = ips("192.0.2.1", "192.0.2.9", "2001:db8::1", "2001:db8::9")
	w.r = w.host.reconciler(Options{Tun: "tun0"})
	if rep := w.host.reconcile(w.r, w.s); len(rep.Conflicts) != 0 {
		t.Fatalf("conflicts: %v", rep.Conflicts)
	}
	// A veth device needs neighbours, which a TUN device does not: fixed ones.
	mac := func(h *host, dev string) net.HardwareAddr { return h.link(dev).Attrs().HardwareAddr }
	neigh := func(h *host, dev, ip string, m net.HardwareAddr) {
		h.check(h.nl.NeighSet(&netlink.Neigh{LinkIndex: h.link(dev).Attrs().Index, IP: net.ParseIP(ip), HardwareAddr: m, State: unix.NUD_PERMANENT}))
	}
	for _, ip := range []string{"10.244.2.7", "fd00:244:0:2::7"} {
		neigh(w.host, "tun0", ip, mac(w.peer, "eth0"))
	}
	for _, ip := range []string{"10.244.1.0", "10.244.1.5", "fd00:244:0:1::", "fd00:244:0:1::5"} {
		neigh(w.peer, "eth0", ip, mac(w.host, "tun0"))
	}
	return w
}

func TestMasquerade(t *testing.T) {
	w := newWorld(t)
	for _, a := range []string{"192.0.2.2", "192.0.2.9", "2001:db8::2", "2001:db8::9"} {
		w.outside.echo(net.JoinHostPort(a, "7000")) // bound, so that the answer's source is the same
	}
	w.peer.echo("[::]:7000")
	w.pod.echo("[::]:7000")
	for _, c := range []struct {
		name     string
		from     *host
		to, seen string
	}{
		{"pod to outside", w.pod, "192.0.2.2:7000", "192.0.2.1"},
		{"pod to outside, IPv6", w.pod, "[2001:db8::2]:7000", "2001:db8::1"},
		{"pod to a member's underlay address", w.pod, "192.0.2.9:7000", "10.244.1.5"},
		{"pod to a member's underlay address, IPv6", w.pod, "[2001:db8::9]:7000", "fd00:244:0:1::5"},
		{"pod to a peer's pod", w.pod, "10.244.2.7:7000", "10.244.1.5"},
		{"pod to a peer's pod, IPv6", w.pod, "[fd00:244:0:2::7]:7000", "fd00:244:0:1::5"},
		{"host to a peer's pod", w.host, "10.244.2.7:7000", "10.244.1.0"},
		{"host to a peer's pod, IPv6", w.host, "[fd00:244:0:2::7]:7000", "fd00:244:0:1::"},
		{"peer's pod to pod", w.peer, "10.244.1.5:7000", "10.244.2.7"},
		{"peer's pod to pod, IPv6", w.peer, "[fd00:244:0:1::5]:7000", "fd00:244:0:2::7"},
		{"host to outside", w.host, "192.0.2.2:7000", "192.0.2.1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			seen, err := c.from.ask("", c.to)
			if err != nil || seen != netip.MustParseAddr(c.seen) {
				t.Errorf("source seen: %v (%v), want %s", seen, err, c.seen)
			}
		})
	}
	t.Run("off", func(t *testing.T) {
		w.s.Masquerade = false
		w.host.reconcile(w.r, w.s)
		w.host.quiet(w.r, w.s)
		w.outside.route("10.244.0.0/16", "192.0.2.1", "eth0", 0, unix.RTPROT_STATIC)
		if seen, err := w.pod.ask("", "192.0.2.2:7000"); err != nil || seen != netip.MustParseAddr("10.244.1.5") {
			t.Errorf("source seen: %v (%v)", seen, err)
		}
	})
}

// BGP to the host: its address is on lo, and the link's is known to the router alone. The outside sees pods as the address that the routes
// name, and the neighbours on the link see the link's, as they do of the host itself.
func TestMasqueradeAsTheRoutesSay(t *testing.T) {
	w := newWorld(t)
	w.host.up("lo")
	w.host.shell("ip address add 203.0.113.7/32 dev lo; ip address add 2001:db8:7::7/128 dev lo")
	for _, a := range []string{"198.51.100.1/32", "2001:db8:1::1/128"} {
		w.outside.addrs("eth0", a)
		w.outside.echo(net.JoinHostPort(netip.MustParsePrefix(a).Addr().String(), "7000"))
	}
	w.outside.echo("192.0.2.2:7000")
	w.outside.echo("[2001:db8::2]:7000")
	seen := func(what, from4, from6 string) {
		t.Helper()
		w.host.reconcile(w.r, w.s)
		w.host.quiet(w.r, w.s)
		for to, want := range map[string]string{"198.51.100.1": from4, "2001:db8:1::1": from6, "192.0.2.2": "192.0.2.1", "2001:db8::2": "2001:db8::1"} {
			for who, h := range map[string]*host{"pod": w.pod, "host": w.host} {
				if got, err := h.ask("", net.JoinHostPort(to, "7000")); err != nil || got != netip.MustParseAddr(want) {
					t.Errorf("%s: %s sees the %s as %v (%v), want %s", what, to, who, got, err, want)
				}
			}
		}
	}
	w.host.shell("ip route add default via 192.0.2.2; ip -6 route add default via 2001:db8::2")
	seen("no address named", "192.0.2.1", "2001:db8::1")
	w.host.shell("ip route change default via 192.0.2.2 src 203.0.113.7; ip -6 route replace default via 2001:db8::2 src 2001:db8:7::7")
	seen("one route", "203.0.113.7", "2001:db8:7::7")
	w.host.shell("ip route del default; ip route add 198.51.100.0/24 src 203.0.113.7 nexthop via 192.0.2.2 nexthop via 192.0.2.9")
	w.host.check(w.host.nl.NeighSet(&netlink.Neigh{LinkIndex: w.host.link("eth0").Attrs().Index, IP: net.ParseIP("192.0.2.9"), HardwareAddr: w.outside.link("eth0").Attrs().HardwareAddr, State: unix.NUD_PERMANENT}))
	seen("an equal-cost route to the network", "203.0.113.7", "2001:db8:7::7")
	w.host.shell("ip route replace 198.51.100.0/24 via 192.0.2.2 src 192.0.2.1; ip -6 route replace default via 2001:db8::2 src 2001:db8::1")
	seen("the link's own address named", "192.0.2.1", "2001:db8::1")
	w.host.shell("ip route del 198.51.100.0/24; ip -6 route del default; ip route add default via 192.0.2.2 src 203.0.113.7 table 100; ip rule add lookup 100 priority 33000; " +
		"ip -6 route add default via 2001:db8::2 src 2001:db8:7::7 table 100; ip -6 rule add lookup 100 priority 33000")
	seen("routes of another table", "203.0.113.7", "2001:db8:7::7")
}

// A network outside that knows the pods' routes sees pods' own addresses; its neighbours still see the host's.
func TestNoMasquerade(t *testing.T) {
	w := newWorld(t)
	for _, a := range []string{"198.51.100.1/32", "203.0.113.1/32", "2001:db8:1::1/128", "2001:db8:2::1/128"} {
		w.outside.addrs("eth0", a)
		w.outside.echo(net.JoinHostPort(netip.MustParsePrefix(a).Addr().String(), "7000"))
	}
	w.host.route("0.0.0.0/0", "192.0.2.2", "eth0", 0, unix.RTPROT_STATIC)
	w.host.route("::/0", "2001:db8::2", "eth0", 1024, unix.RTPROT_STATIC)
	w.outside.route("10.244.0.0/16", "192.0.2.1", "eth0", 0, unix.RTPROT_STATIC)
	w.outside.route("fd00:244::/32", "2001:db8::1", "eth0", 1024, unix.RTPROT_STATIC)
	want := func(to, seen string) {
		t.Helper()
		got, err := w.pod.ask("", net.JoinHostPort(to, "7000"))
		if err != nil || got != netip.MustParseAddr(seen) {
			t.Errorf("%s sees %v (%v), want %s", to, got, err, seen)
		}
	}
	want("198.51.100.1", "192.0.2.1")
	want("2001:db8:1::1", "2001:db8::1")
	w.s.NoMasquerade = pfx("198.51.100.0/24", "198.51.100.0/25", "2001:db8:1::/48") // one inside another
	w.host.reconcile(w.r, w.s)
	w.host.quiet(w.r, w.s)
	want("198.51.100.1", "10.244.1.5")
	want("2001:db8:1::1", "fd00:244:0:1::5")
	want("203.0.113.1", "192.0.2.1")
	want("2001:db8:2::1", "2001:db8::1")
	w.s.NoMasquerade = nil
	w.host.reconcile(w.r, w.s)
	want("198.51.100.1", "192.0.2.1")
	want("2001:db8:1::1", "2001:db8::1")
}

// Own space that nobody has answers at once, to the host and to pods; a real route wins.
func TestOwnSpaceUnreachable(t *testing.T) {
	h, pod := newHost(t), newHost(t)
	h.tun("tun0")
	h.reconcile(h.reconciler(Options{}), dual())
	for _, to := range []string{"10.244.1.9:7", "[fd00:244:0:1::9]:7"} {
		_, err := h.ask("", to)
		if !errors.Is(err, unix.EHOSTUNREACH) {
			t.Errorf("%s: %v, want EHOSTUNREACH", to, err)
		}
	}
	// A bridge's connected routes, with the very prefixes.
	connect(h, "pods", []string{"10.244.1.1/24", "fd00:244:0:1::1/64"}, pod, "eth0", []string{"10.244.1.9/24", "fd00:244:0:1::9/64"})
	pod.echo("[::]:7000")
	for _, to := range []string{"10.244.1.9:7000", "[fd00:244:0:1::9]:7000"} {
		if _, err := h.ask("", to); err != nil {
			t.Errorf("%s, with a real route: %v", to, err)
		}
	}
}

// counters are the packets that each rule of the table met, by its comment.
func (h *host) counters() map[string]uint64 {
	h.t.Helper()
	out := map[string]uint64{}
	h.nft(func(c *nftables.Conn) error {
		for _, name := range []string{chainPre, chainRawOut, chainPost} {
			rules, err := c.GetRules(ourTable, &nftables.Chain{Name: name, Table: ourTable})
			if err != nil {
				return err
			}
			for _, r := range rules {
				text, _ := userdata.GetString(r.UserData, userdata.TypeComment)
				for _, e := range r.Exprs {
					if n, ok := e.(*expr.Counter); ok && n.Packets > 0 {
						out[text[len("tulle: "):len(text)-len(" (00000000)")]] += n.Packets
					}
				}
			}
		}
		return nil
	})
	return out
}

// tracked are the destination ports of UDP, and the protocols of the rest, in the connection table.
func (h *host) tracked() (ports []uint16, protocols []uint8) {
	h.t.Helper()
	h.do(func() error {
		for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
			flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, family)
			if err != nil {
				return err
			}
			for _, f := range flows {
				if f.Forward.Protocol == unix.IPPROTO_UDP {
					ports = append(ports, f.Forward.DstPort)
				} else {
					protocols = append(protocols, f.Forward.Protocol)
				}
			}
		}
		return nil
	})
	return ports, protocols
}

// raw sends one packet with a payload over a raw socket of the protocol, from an address if one is given.
func (h *host) raw(proto int, from, to string, payload []byte) {
	h.t.Helper()
	h.do(func() error {
		address := func(s string) unix.Sockaddr {
			if a := netip.MustParseAddr(s); a.Is4() {
				return &unix.SockaddrInet4{Addr: a.As4()}
			} else {
				return &unix.SockaddrInet6{Addr: a.As16()}
			}
		}
		domain := unix.AF_INET
		if netip.MustParseAddr(to).Is6() {
			domain = unix.AF_INET6
		}
		fd, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if from != "" {
			if err := unix.Bind(fd, address(from)); err != nil {
				return err
			}
		}
		return unix.Sendto(fd, payload, 0, address(to))
	})
}

// The tunnel's outer packets leave no trace in the connection table, others do; the host
// does not answer for protocols 4 and 41, which has no kernel tunnel here.
func TestOuterPackets(t *testing.T) {
	w := newWorld(t)
	// 192.0.2.9 and 2001:db8::9 are the member's, the .2 a stranger's.
	w.host.echo("[::]:6080")
	w.host.echo("[::]:7000")
	for _, m := range [][2]string{{"192.0.2.9", "192.0.2.1"}, {"2001:db8::9", "2001:db8::1"}} {
		for _, port := range []string{"6080", "7000"} {
			if _, err := w.outside.ask(m[0], net.JoinHostPort(m[1], port)); err != nil {
				t.Fatalf("%s to port %s: %v", m[0], port, err)
			}
		}
		// And outwards: the echo's answers go to any port, these to the tunnel's.
		w.outside.echo(net.JoinHostPort(m[0], "4789"))
		if _, err := w.host.ask("", net.JoinHostPort(m[0], "4789")); err != nil {
			t.Fatal(err)
		}
	}
	ports, _ := w.host.tracked()
	if !slices.Contains(ports, 7000) {
		t.Errorf("ordinary traffic is not tracked: %v", ports)
	}
	if slices.Contains(ports, 6080) || slices.Contains(ports, 4789) {
		t.Errorf("tunnel traffic is tracked: %v", ports)
	}

	inner := make([]byte, 40)
	const gre = 47
	for _, m := range [][2]string{{"192.0.2.9", "192.0.2.1"}, {"2001:db8::9", "2001:db8::1"}} {
		for _, proto := range []int{4, 41, gre} {
			w.outside.raw(proto, m[0], m[1], inner)
			w.host.raw(proto, m[1], m[0], inner)
		}
	}
	w.host.raw(unix.IPPROTO_ICMP, "", "192.0.2.9", []byte{8, 0, 0xf7, 0xfd, 0, 1, 0, 1}) // an echo request
	w.host.raw(unix.IPPROTO_ICMPV6, "", "2001:db8::9", []byte{128, 0, 0, 0, 0, 1, 0, 1}) // another; the kernel adds the checksum
	_, protocols := w.host.tracked()
	for _, proto := range []uint8{gre, unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6} {
		if !slices.Contains(protocols, proto) {
			t.Errorf("ordinary traffic between members is not tracked: protocol %d is not among %v", proto, protocols)
		}
	}
	if slices.Contains(protocols, 4) || slices.Contains(protocols, 41) {
		t.Errorf("ipip between members is tracked: protocols %v", protocols)
	}
	for _, to := range []string{"192.0.2.1", "2001:db8::1"} { // from a stranger
		for _, proto := range []int{4, 41} {
			w.outside.raw(proto, "", to, inner)
		}
	}
	want := []string{
		"untracked tunnel from members, IPv4", "untracked tunnel from members, IPv6",
		"untracked tunnel to members, IPv4", "untracked tunnel to members, IPv6",
		"no ICMP type 3 code 2 about protocol 4, IPv4", "no ICMP type 3 code 2 about protocol 41, IPv4",
		"no ICMP type 4 code 1 about protocol 4, IPv6", "no ICMP type 4 code 1 about protocol 41, IPv6",
	}
	var got map[string]uint64
	deadline := time.Now().Add(20 * time.Second)
	for {
		got = w.host.counters()
		missing := slices.DeleteFunc(slices.Clone(want), func(s string) bool { return got[s] > 0 })
		if len(missing) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("rules that met no packet: %q; the others: %v", missing, got)
		}
		time.Sleep(5 * time.Millisecond)
	}
	// An ICMP error about anything else still goes out.
	if _, err := w.outside.ask("", "192.0.2.1:9"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a closed port: %v, want ECONNREFUSED", err)
	}
}
