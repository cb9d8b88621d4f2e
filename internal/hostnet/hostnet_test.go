package hostnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
	testns "github.com/tulle-net/tulle/internal/testing/namespace"
)

// host is a network namespace that ends with the test.
type host struct {
	t    testing.TB
	name string
	path string
	nl   *netlink.Handle
}

func newHost(t testing.TB) *host {
	t.Helper()
	ns := testns.New(t)
	h := &host{t: t, name: ns.Name, path: ns.Path()}
	h.do(func() error {
		var err error
		h.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	t.Cleanup(h.nl.Close)
	// Without duplicate address detection addresses serve at once.
	h.setSysctl("net/ipv6/conf/default/accept_dad", "0")
	return h
}

// do runs f in the namespace and fails the test on its error.
func (h *host) do(f func() error) {
	h.t.Helper()
	if err := sys.WithNetns(h.path, f); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) check(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) link(name string) netlink.Link {
	h.t.Helper()
	l, err := h.nl.LinkByName(name)
	h.check(err)
	return l
}

func (h *host) up(name string) {
	h.t.Helper()
	h.check(h.nl.LinkSetUp(h.link(name)))
}

// tun makes a real TUN device that outlives its file, left down as an agent finds it.
func (h *host) tun(name string) {
	h.t.Helper()
	h.do(func() error {
		l := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: name}, Mode: netlink.TUNTAP_MODE_TUN, Flags: netlink.TUNTAP_NO_PI, NonPersist: false}
		return netlink.LinkAdd(l)
	})
}

// device makes a device that is up and has a carrier: one end of a pair.
func (h *host) device(name string, addrs ...string) {
	h.t.Helper()
	h.check(h.nl.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name + "-far"}))
	h.up(name + "-far")
	h.up(name)
	h.addrs(name, addrs...)
}

func (h *host) addrs(name string, addrs ...string) {
	h.t.Helper()
	for _, a := range addrs {
		p := netip.MustParsePrefix(a)
		n := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
		if p.Addr().Is6() {
			n.Flags = unix.IFA_F_NODAD
		}
		h.check(h.nl.AddrAdd(h.link(name), n))
	}
}

// connect makes a pair of devices, each up and with its addresses.
func connect(a *host, aName string, aAddrs []string, b *host, bName string, bAddrs []string) {
	a.t.Helper()
	fd, err := unix.Open(b.path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	a.check(err)
	defer unix.Close(fd)
	a.check(a.nl.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: aName}, PeerName: bName, PeerNamespace: netlink.NsFd(fd)}))
	a.addrs(aName, aAddrs...)
	b.addrs(bName, bAddrs...)
	a.up(aName)
	b.up(bName)
}

func dst(s string) *net.IPNet {
	p := netip.MustParsePrefix(s)
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func (h *host) route(prefix, via, dev string, metric int, proto netlink.RouteProtocol) *netlink.Route {
	h.t.Helper()
	rt := &netlink.Route{Dst: dst(prefix), Priority: metric, Protocol: proto, LinkIndex: h.link(dev).Attrs().Index}
	if via != "" {
		rt.Gw = net.ParseIP(via)
	} else if rt.Dst.IP.To4() != nil {
		rt.Scope = netlink.SCOPE_LINK
	}
	h.check(h.nl.RouteAdd(rt))
	return rt
}

// routes lists the main table as text, without the kernel's own and multicast.
func (h *host) routes() []string {
	h.t.Helper()
	var out []string
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := dump("routes", func() ([]netlink.Route, error) { return h.nl.RouteList(nil, family) })
		h.check(err)
		for i := range list {
			rt := &list[i]
			if rt.Protocol == unix.RTPROT_KERNEL {
				continue
			}
			s := routeText(rt, func(index int) string {
				if l, err := h.nl.LinkByIndex(index); err == nil {
					return l.Attrs().Name
				}
				return "?"
			})
			if rt.Src != nil {
				s += " src " + rt.Src.String()
			}
			if rt.MTU != 0 {
				s += fmt.Sprintf(" mtu %d", rt.MTU)
			}
			out = append(out, s)
		}
	}
	slices.Sort(out)
	return out
}

func (h *host) addrsOf(name string) []string {
	h.t.Helper()
	l, err := h.nl.LinkByName(name)
	h.check(err)
	list, err := dump("addresses", func() ([]netlink.Addr, error) { return h.nl.AddrList(l, netlink.FAMILY_ALL) })
	h.check(err)
	var out []string
	for i := range list {
		out = append(out, addrText(&list[i]))
	}
	slices.Sort(out)
	return out
}

func (h *host) sysctl(name string) string {
	h.t.Helper()
	var v string
	h.do(func() (err error) { v, err = readSysctl(name); return err })
	return v
}

func (h *host) setSysctl(name, value string) {
	h.t.Helper()
	h.do(func() error { return writeSysctl(name, value) })
}

// nftConn is a connection of the test's own, as another program would have.
func (h *host) nft(f func(*nftables.Conn) error) {
	h.t.Helper()
	h.do(func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		return f(c)
	})
}

func (h *host) tables() []string {
	h.t.Helper()
	var out []string
	h.nft(func(c *nftables.Conn) error {
		ts, err := c.ListTables()
		for _, t := range ts {
			out = append(out, fmt.Sprint(t.Family, " ", t.Name))
		}
		return err
	})
	return out
}

func (h *host) reconciler(o Options) *Reconciler {
	h.t.Helper()
	var r *Reconciler
	h.do(func() (err error) { r, err = New(o); return err })
	h.t.Cleanup(func() {
		if err := r.Close(); err != nil {
			h.t.Error(err)
		}
	})
	return r
}

// reconcile must have no error.
func (h *host) reconcile(r *Reconciler, s State) Report {
	h.t.Helper()
	rep, err := r.Reconcile(h.t.Context(), s)
	h.check(err)
	return rep
}

// quiet runs Reconcile once more: it must find nothing to do.
func (h *host) quiet(r *Reconciler, s State) {
	h.t.Helper()
	if rep := h.reconcile(r, s); !rep.Empty() {
		h.t.Fatalf("a second run changed something: %+v", rep)
	}
}

func pfx(ss ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range ss {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func ips(ss ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range ss {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

// dual is a node's state in a cluster of both families.
func dual() State {
	return State{
		Tun: "tun0", MTU: 1472,
		TunAddrs:     ips("10.244.1.0", "fd00:244:0:1::"),
		ClusterCIDRs: pfx("10.244.0.0/16", "fd00:244::/32"),
		Peers: []PeerRoute{
			{Prefix: netip.MustParsePrefix("10.244.2.0/24"), MTU: 1400},
			{Prefix: netip.MustParsePrefix("10.244.3.0/24")},
			{Prefix: netip.MustParsePrefix("fd00:244:0:2::/64"), MTU: 1400},
		},
		Own:        pfx("10.244.1.0/24", "fd00:244:0:1::/64"),
		Masquerade: true,
		Members:    ips("192.0.2.1", "192.0.2.2", "2001:db8::1"),
		Uplinks:    map[string]int{"eth0": 1500},
	}
}

var dualRoutes = []string{
	"10.244.0.0/16 dev tun0 proto 84 src 10.244.1.0 mtu 1472",
	"10.244.2.0/24 dev tun0 proto 84 src 10.244.1.0 mtu 1400",
	"10.244.3.0/24 dev tun0 proto 84 src 10.244.1.0 mtu 1472",
	"fd00:244:0:2::/64 dev tun0 proto 84 metric 1024 src fd00:244:0:1:: mtu 1400",
	"fd00:244:0:2::/128 dev tun0 proto 84 metric 1024 src fd00:244:0:1:: mtu 1400", // ICMPv6 errors to the peer's own processes
	"fd00:244::/32 dev tun0 proto 84 metric 1024 src fd00:244:0:1:: mtu 1472",
	"unreachable 10.244.1.0/24 proto 84 metric 4294967295",
	"unreachable fd00:244:0:1::/64 dev lo proto 84 metric 4294967295",
}

func (h *host) wantRoutes(want []string) {
	h.t.Helper()
	want = slices.Clone(want)
	slices.Sort(want)
	if got := h.routes(); !slices.Equal(got, want) {
		h.t.Errorf("routes:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// eventually polls until cond holds.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatal("never: " + what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

var errNone = errors.New("no error")

func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		err = errNone
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not name %q", err, p)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("error %q has more than one line", err)
	}
}
