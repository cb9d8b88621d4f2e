package tunnel

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/internal/testing/namespace"
	"github.com/tulle-net/tulle/tunnel/device"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
	"github.com/tulle-net/tulle/tunnel/mtu"
)

// testNode is one end of a link between two namespaces, with an engine in it. Its "pods" are sockets on its TUN.
type testNode struct {
	ns     string
	tun    [2]netip.Addr   // its tun addresses
	space  [2]netip.Prefix // its pods' prefixes
	under  netip.Addr
	mac    header.MAC // of its VTEP
	kernel bool       // it has a kernel's tunnel in place of an engine
	dev    *device.Device
	engine *Engine
	local  Local
	peers  []Peer // those of the last Update by the harness
	probes chan probe
	hints  chan hint
	late   bool // start gives it no tables
	slow   bool // its workers take their time to read the TUN

	slowSockets bool   // its workers take their time to receive
	stop        func() // ends the engine and waits for it; may be called again
}

type probe struct {
	peer string
	mode encap.Mode
	six  bool
	body []byte
	size int
}

// hint is a call of Config.PathMTU.
type hint struct {
	peer string
	six  bool
	link mtu.Link
}

// testLink is what a test varies.
type testLink struct {
	underlay6 bool
	mode      encap.Mode
	linkMTU   int   // of the underlay; 0 means 1500
	between   relay // sees every frame on the way; nil: the veth pair joins the nodes directly
	dscp0     bool  // outer DSCP 0 instead of the inner one's copy
	queues    int   // of the TUN; 0 means 1
}

func (l testLink) String() string {
	name := fmt.Sprintf("%s over %s", l.mode, familyName(l.underlay6))
	if l.queues > 1 {
		name += fmt.Sprintf(", %d queues", l.queues)
	}
	return name
}

func familyName(six bool) string { return map[bool]string{false: "IPv4", true: "IPv6"}[six] }

func (l testLink) mtu() mtu.TUN {
	link := mtu.Link(l.linkMTU)
	if link == 0 {
		link = 1500
	}
	return link.TUN(encap.Overhead(l.mode, l.underlay6))
}

// allLinks are the encapsulations and outer families.
func allLinks() []testLink {
	var ls []testLink
	for _, m := range []encap.Mode{encap.UDP, encap.IPIP, encap.VXLAN} {
		for _, six := range []bool{false, true} {
			ls = append(ls, testLink{mode: m, underlay6: six})
		}
	}
	return ls
}

// severalQueues are links with a worker for each of a few queues.
func severalQueues() []testLink {
	return []testLink{{mode: encap.UDP, queues: 2}, {mode: encap.UDP, underlay6: true, queues: 3}, {mode: encap.IPIP, queues: 2}, {mode: encap.VXLAN, queues: 2}}
}

// eachLink runs f for every encapsulation and outer family.
func eachLink(t *testing.T, f func(t *testing.T, l testLink), more ...testLink) {
	for _, l := range append(allLinks(), more...) {
		t.Run(l.String(), func(t *testing.T) { f(t, l) })
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// patience bounds every wait for something that must happen; nothing is asserted about how long it takes.
const patience = 20 * time.Second

// eventually polls until ok.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

// newNetns makes a namespace that the test deletes.
func newNetns(t testing.TB) string {
	t.Helper()
	return namespace.New(t).Name
}

// inNetns runs f inside the namespace.
func inNetns(ns string, f func() error) error { return sys.WithNetns(sys.NetnsPath(ns), f) }

// in runs f inside the node's namespace.
func (n *testNode) in(f func() error) error { return inNetns(n.ns, f) }

// withNetlink runs f inside the namespace with a netlink handle.
func withNetlink(t testing.TB, ns string, f func(nl *sys.Netlink) error) {
	t.Helper()
	must(t, inNetns(ns, func() error {
		nl, err := sys.NewNetlink(-1)
		if err != nil {
			return err
		}
		defer nl.Close()
		return f(nl)
	}))
}

// newNode numbers its node: 0 has 10.77.0.0/24, fd77::/64 and underlay address 192.168.77.1 or fd00:77::1.
func newNode(t testing.TB, i int, l testLink) *testNode {
	t.Helper()
	n := &testNode{ns: newNetns(t), probes: make(chan probe, 64), hints: make(chan hint, 64)}
	for f := range n.tun {
		n.space[f] = spaceOf(f, i)
		n.tun[f] = n.space[f].Addr()
	}
	n.under, n.mac = underlayOf(l.underlay6, i), macOf(i)
	n.local = Local{TunAddrs: n.tun[:], Prefixes: n.space[:], Underlay: []netip.Addr{n.under}, VTEPMAC: n.mac}
	return n
}

func spaceOf(family, i int) netip.Prefix {
	return netip.MustParsePrefix(fmt.Sprintf([]string{"10.77.%d.0/24", "fd77:0:0:%d::/64"}[family], i))
}

func underlayOf(six bool, i int) netip.Addr {
	if six {
		return netip.MustParseAddr(fmt.Sprintf("fd00:77::%d", i+1))
	}
	return netip.AddrFrom4([4]byte{192, 168, 77, byte(i + 1)})
}

// testVNI is the VNI of all nodes, testVXLANPort their port.
const (
	testVNI       = 0x777701
	testVXLANPort = 4789
)

func macOf(i int) header.MAC { return header.MAC{2, 0x77, 0, 0, 0, byte(i + 1)} }

// pod is an address in the node's space that nobody has: what is delivered to it shows on the TUN, and then the kernel
// says nothing.
func (n *testNode) pod(family int) netip.Addr { return podOf(family, n.space) }

func podOf(family int, space [2]netip.Prefix) netip.Addr {
	a := space[family].Addr()
	for range 5 {
		a = a.Next()
	}
	return a
}

// asPeer is the node as another one knows it.
func (n *testNode) asPeer(l testLink) Peer {
	return Peer{
		ID: n.ns, Endpoint: n.under, Accept: []netip.Addr{n.under}, UDPPort: 6080, VXLANPort: testVXLANPort, VTEPMAC: n.mac, Kernel: n.kernel,
		Prefixes: n.space[:], TunAddrs: n.tun[:], Mode: l.mode, MTU: l.mtu(),
	}
}

// startPair makes two namespaces joined by a veth pair, with an engine in each that knows the other, and ends both with the
// test.
func startPair(t testing.TB, l testLink) (a, b *testNode) {
	t.Helper()
	a, b = newNode(t, 0, l), newNode(t, 1, l)
	connect(t, l, a, b)
	a.start(t, l, b)
	b.start(t, l, a)
	return a, b
}

// connect makes the link between two nodes.
func connect(t testing.TB, l testLink, a, b *testNode) {
	t.Helper()
	if l.linkMTU == 0 {
		l.linkMTU = 1500
	}
	if l.between == nil {
		veth(t, a.ns, "eth0", b.ns, "eth0", l.linkMTU)
	} else {
		p := newNetns(t)
		veth(t, a.ns, "eth0", p, "eth0", l.linkMTU)
		veth(t, b.ns, "eth0", p, "eth1", l.linkMTU)
		for _, dev := range []string{"eth0", "eth1"} {
			features(t, p, dev, false, segmentation...)
		}
		runRelay(t, p, "eth0", "eth1", l.between)
	}
	for _, n := range []*testNode{a, b} {
		withNetlink(t, n.ns, func(nl *sys.Netlink) error {
			bits := 24
			if n.under.Is6() {
				bits = 64
			}
			return giveAddress(t, nl, "eth0", netip.PrefixFrom(n.under, bits))
		})
	}
}

// veth joins two namespaces; both ends and the loopbacks are up.
func veth(t testing.TB, ns1, name1, ns2, name2 string, linkMTU int) {
	t.Helper()
	withNetlink(t, ns1, func(nl *sys.Netlink) error {
		peer, err := os.Open(sys.NetnsPath(ns2))
		if err != nil {
			return err
		}
		defer peer.Close()
		return nl.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: name1, MTU: linkMTU},
			PeerName:  name2, PeerNamespace: netlink.NsFd(peer.Fd()), PeerMTU: uint32(linkMTU),
		})
	})
	for ns, name := range map[string]string{ns1: name1, ns2: name2} {
		withNetlink(t, ns, func(nl *sys.Netlink) error {
			for _, name := range []string{"lo", name} {
				link, err := nl.LinkByName(name)
				if err != nil {
					return err
				}
				if err := nl.LinkSetUp(link); err != nil {
					return err
				}
			}
			return nil
		})
	}
	// The kernel activates a device some time after it got its carrier; what is sent before is lost.
	for ns, name := range map[string]string{ns1: name1, ns2: name2} {
		withNetlink(t, ns, func(nl *sys.Netlink) error {
			eventually(t, name+" is up", func() bool {
				link, err := nl.LinkByName(name)
				return err == nil && link.Attrs().OperState == netlink.OperUp
			})
			return nil
		})
	}
}

func giveAddress(t testing.TB, nl *sys.Netlink, name string, p netip.Prefix) error {
	link, err := nl.LinkByName(name)
	if err != nil {
		return err
	}
	if err := nl.AddrAdd(link, &netlink.Addr{IPNet: ipNet(p), Flags: unix.IFA_F_NODAD}); err != nil {
		return err
	}
	// Of an IPv6 address, a kernel worker makes the route some time later.
	eventually(t, p.String()+" is local", func() bool {
		routes, err := nl.RouteGet(p.Addr().AsSlice())
		return err == nil && len(routes) == 1 && routes[0].Type == unix.RTN_LOCAL
	})
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// start opens the TUN and runs the engine.
func (n *testNode) start(t testing.TB, l testLink, peer *testNode) {
	t.Helper()
	must(t, n.in(func() (err error) {
		if n.dev, err = device.Open(device.Options{Name: "tun0", MTU: int(l.mtu()), Queues: l.queues}); err != nil {
			return err
		}
		n.engine, err = New(Config{
			Device: n.dev, Underlay: []netip.Addr{n.under}, UDPPort: 6080, VXLANPort: testVXLANPort, VNI: testVNI, CopyDSCP: !l.dscp0,
			Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
			Probed: func(peer string, m encap.Mode, six bool, body []byte, size int) {
				n.probes <- probe{peer, m, six, bytes.Clone(body), size}
			},
			PathMTU: func(peer string, six bool, link mtu.Link) { n.hints <- hint{peer, six, link} },
		})
		return err
	}))
	if n.slow {
		for _, w := range n.engine.tx {
			w.queue = slowed{w.queue}
		}
	}
	if n.slowSockets {
		for _, w := range n.engine.rx {
			w.sock = slowedSocket{w.sock}
		}
	}
	withNetlink(t, n.ns, func(nl *sys.Netlink) error { return n.address(t, nl, l) })
	if !n.late {
		n.update(peer.asPeer(l))
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.engine.Run(ctx) }()
	n.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("%s: Run: %v", n.ns, err)
			}
		case <-time.After(patience):
			t.Errorf("%s: Run does not return", n.ns)
		}
	})
	t.Cleanup(n.stop)
}

func (n *testNode) update(peers ...Peer) {
	n.peers = peers
	n.engine.Update(n.local, peers)
}

// address gives the TUN its addresses and routes the cluster's space into it.
func (n *testNode) address(t testing.TB, nl *sys.Netlink, l testLink) error {
	// As the agent does (internal/hostnet). The kernel takes a packet with one of its own addresses as source, as the
	// engine's ICMP errors have it, only with accept_local.
	for name, value := range map[string]string{"rp_filter": "2", "accept_local": "1"} {
		if err := os.WriteFile("/proc/sys/net/ipv4/conf/tun0/"+name, []byte(value), 0); err != nil {
			return err
		}
	}
	for f, a := range n.tun {
		if a.Is6() && l.mtu() < mtu.Min6 {
			continue
		}
		if err := giveAddress(t, nl, "tun0", netip.PrefixFrom(a, a.BitLen())); err != nil {
			return err
		}
		cluster := []string{"10.77.0.0/16", "fd77::/48"}[f]
		route := &netlink.Route{LinkIndex: n.dev.Index(), Dst: ipNet(netip.MustParsePrefix(cluster)), Src: a.AsSlice(), MTU: int(l.mtu())}
		if err := nl.RouteReplace(route); err != nil {
			return err
		}
	}
	return nil
}

// counts is a copy of the engine's drop counters. Not of local_multicast: the kernel emits router solicitations and MLD
// reports into every device, whenever it likes. Not of queue_delay: TCP may fill a queue on a slow machine.
func (n *testNode) counts() map[string]uint64 {
	m := n.engine.Stats().Drops
	delete(m, encap.DropLocalMulticast.String())
	delete(m, encap.DropQueueDelay.String())
	return m
}

// noDrops requires that the engines have dropped nothing since they started.
func noDrops(t testing.TB, nodes ...*testNode) {
	t.Helper()
	for _, n := range nodes {
		for name, k := range n.counts() {
			if k != 0 {
				t.Errorf("%s: %d packets dropped: %s", n.ns, k, name)
			}
		}
	}
}

// moved waits until the counter of d has moved by k since before, and requires that none else has.
func (n *testNode) moved(t testing.TB, before map[string]uint64, d encap.Drop, k uint64) {
	t.Helper()
	want := maps.Clone(before)
	if d != encap.DropNone {
		want[d.String()] += k
	}
	eventually(t, fmt.Sprintf("%s counted %d times", d, k), func() bool {
		return d == encap.DropNone || n.counts()[d.String()] >= want[d.String()]
	})
	now := n.counts()
	for name, w := range want {
		if now[name] != w {
			t.Errorf("%s moved by %d, want %d", name, int64(now[name]-before[name]), w-before[name])
		}
	}
}
