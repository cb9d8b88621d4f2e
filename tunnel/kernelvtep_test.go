package tunnel

import (
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
)

// startKernelVTEP is startPair with a VXLAN device of the kernel in place of the second node's engine. The device has the
// node's tun addresses, and a route to the cluster whose gateway is the first node's tun address.
func startKernelVTEP(t testing.TB, six bool) (a, b *testNode, l testLink) {
	t.Helper()
	l = testLink{mode: encap.VXLAN, underlay6: six}
	a, b = newNode(t, 0, l), newNode(t, 1, l)
	connect(t, l, a, b)
	b.mac, b.kernel = header.MAC{}, true // nobody tells its MAC
	a.start(t, l, b)
	withNetlink(t, b.ns, func(nl *sys.Netlink) error {
		err := nl.LinkAdd(&netlink.Vxlan{
			LinkAttrs: netlink.LinkAttrs{Name: "vxlan0", MTU: int(l.mtu())}, VxlanId: testVNI, Port: testVXLANPort,
			SrcAddr: b.under.AsSlice(), Group: a.under.AsSlice(), UDP6ZeroCSumRx: false, UDPCSum: true,
		})
		if err != nil {
			return err
		}
		link, err := nl.LinkByName("vxlan0")
		if err != nil {
			return err
		}
		if err := nl.LinkSetUp(link); err != nil {
			return err
		}
		for f, own := range b.tun {
			if err := giveAddress(t, nl, "vxlan0", netip.PrefixFrom(own, own.BitLen())); err != nil {
				return err
			}
			cluster := []string{"10.77.0.0/16", "fd77::/48"}[f]
			if err := nl.RouteReplace(&netlink.Route{
				LinkIndex: link.Attrs().Index, Dst: ipNet(netip.MustParsePrefix(cluster)), Gw: a.tun[f].AsSlice(), Src: own.AsSlice(),
				Flags: unix.RTNH_F_ONLINK,
			}); err != nil {
				return err
			}
		}
		return nil
	})
	return a, b, l
}

// Super-packets of UDP (UDP_SEGMENT), and datagrams longer than what this node may send to the peer, whole and without their checksum, as they come
// from a kernel's VXLAN over a wire that cuts nothing.
func TestKernelVTEPUncut(t *testing.T) {
	for _, six := range []bool{false, true} {
		t.Run("over "+familyName(six), func(t *testing.T) {
			a, b, l := startKernelVTEP(t, six)
			for f := range a.tun {
				a.echo(t, a.tun[f])
				echoUDP(t, b.dialUDP(t, b.tun[f], netip.AddrPortFrom(a.tun[f], 7)), []byte("known to each other"))
				in := a.listenUDP(t, netip.AddrPortFrom(a.tun[f], 9))
				out := b.dialUDP(t, b.tun[f], netip.AddrPortFrom(a.tun[f], 9))
				expect := func(data []byte, size int) {
					t.Helper()
					if _, err := out.Write(data); err != nil {
						t.Fatal(err)
					}
					buf := make([]byte, 65536)
					for i := 0; i < len(data); i += size {
						in.SetReadDeadline(time.Now().Add(patience))
						n, err := in.Read(buf)
						if want := data[i:min(i+size, len(data))]; err != nil || string(buf[:n]) != string(want) {
							t.Fatalf("of %d bytes in datagrams of %d, after %d: %d bytes, %v", len(data), size, i, n, err)
						}
					}
				}
				p := b.asPeer(l)
				p.MTU = 1280
				a.update(p)
				expect(random(1300), 1300)
				a.update(b.asPeer(l))
				raw, err := out.SyscallConn()
				must(t, err)
				for _, size := range []int{20, 100, 1000} {
					var failed error
					must(t, raw.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, size) }))
					must(t, failed)
					for _, length := range []int{size, size + 1, 3*size - 1, 10 * size} {
						expect(random(length), size)
					}
				}
			}
			cleanChecksums(t, a, b)
			for name, k := range a.counts() {
				if k != 0 && name != "no_path" { // until the MAC is known
					t.Errorf("%d packets dropped: %s", k, name)
				}
			}
		})
	}
}

// deviceMAC is the Ethernet address of a device.
func deviceMAC(t testing.TB, ns, dev string) (mac header.MAC) {
	t.Helper()
	withNetlink(t, ns, func(nl *sys.Netlink) error {
		link, err := nl.LinkByName(dev)
		if err == nil {
			mac = header.MAC(link.Attrs().HardwareAddr)
		}
		return err
	})
	return mac
}

// A VXLAN device of the kernel is a peer: each side finds the other's MAC, whoever speaks first; datagrams, fragments and
// TCP pass in both directions, in both families.
func TestKernelVTEP(t *testing.T) {
	for _, six := range []bool{false, true} {
		t.Run("over "+familyName(six), func(t *testing.T) {
			a, b, l := startKernelVTEP(t, six)
			for f := range a.tun {
				from, to := a, b
				if f == 1 { // of IPv4 the engine speaks first, of IPv6 the kernel
					from, to = b, a
				}
				for range 2 {
					to.echo(t, to.tun[f])
					c := from.dialUDP(t, from.tun[f], netip.AddrPortFrom(to.tun[f], 7))
					full := int(l.mtu()) - []int{20, 40}[f] - 8
					for _, size := range []int{1, full, full + 1, 60_000} {
						echoUDP(t, c, random(size))
					}
					bulk(t, from.dialTCP(t, from.tun[f], to.tun[f]), 8<<20, nil)
					from, to = to, from
				}
			}
			mac := deviceMAC(t, b.ns, "vxlan0")
			if learned, ok := a.engine.VTEPMAC(b.ns); !ok || learned != mac {
				t.Errorf("learned %v, %v; the device has %v", learned, ok, mac)
			}
			cleanChecksums(t, a, b)
			for name, k := range a.counts() {
				if k != 0 && name != "no_path" { // until the MAC is known
					t.Errorf("%d packets dropped: %s", k, name)
				}
			}
		})
	}
}

// echoUDP sends a datagram until it comes back: the first ones wait for neighbours to be found.
func echoUDP(t testing.TB, c *net.UDPConn, want []byte) {
	t.Helper()
	got := make([]byte, 65536)
	eventually(t, fmt.Sprintf("%d bytes are echoed", len(want)), func() bool {
		if _, err := c.Write(want); err != nil {
			return false
		}
		c.SetReadDeadline(time.Now().Add(patience / 100))
		n, err := c.Read(got)
		return err == nil && string(got[:n]) == string(want)
	})
}

// An external peer may be given another MAC than it had: what it sends afterwards comes from there.
func TestKernelVTEPChangesItsMAC(t *testing.T) {
	a, b, _ := startKernelVTEP(t, false)
	b.echo(t, b.tun[0])
	c := a.dialUDP(t, a.tun[0], netip.AddrPortFrom(b.tun[0], 7))
	echoUDP(t, c, []byte("before"))
	other := header.MAC{2, 0xaa, 0xbb, 0xcc, 0xdd, 0xee}
	b.output(t, "ip", "link", "set", "vxlan0", "address", other.String())
	a.echo(t, a.tun[0])
	echoUDP(t, b.dialUDP(t, b.tun[0], netip.AddrPortFrom(a.tun[0], 7)), []byte("I have moved"))
	echoUDP(t, c, []byte("after"))
	if mac, ok := a.engine.VTEPMAC(b.ns); !ok || mac != other {
		t.Errorf("learned %v, %v", mac, ok)
	}
	peer := b.asPeer(testLink{mode: encap.VXLAN})
	peer.VTEPMAC = header.MAC{2, 1, 1, 1, 1, 1}
	a.update(peer)
	if mac, ok := a.engine.VTEPMAC(b.ns); !ok || mac != peer.VTEPMAC {
		t.Errorf("told %v, but have %v, %v", peer.VTEPMAC, mac, ok)
	}
}

// A router's congestion mark on the outer header reaches the inner packet through engine and kernel alike: RFC 6040.
func TestKernelVTEPMarks(t *testing.T) {
	for _, six := range []bool{false, true} {
		t.Run("over "+familyName(six), func(t *testing.T) {
			a, b, _ := startKernelVTEP(t, six)
			for _, n := range []*testNode{a, b} {
				n.nft(t, `table inet congested {
					chain out {
						type filter hook output priority 0
						udp dport 4789 ip ecn != not-ect ip ecn set ce
						udp dport 4789 ip6 ecn != not-ect ip6 ecn set ce
					}
				}`)
			}
			for f := range a.tun {
				for _, way := range [][2]*testNode{{a, b}, {b, a}} {
					out, in := way[0], way[1]
					c := in.listenUDP(t, netip.AddrPortFrom(in.tun[f], 99))
					in.echo(t, in.tun[f])
					echoUDP(t, out.dialUDP(t, out.tun[f], netip.AddrPortFrom(in.tun[f], 7)), []byte("hello"))
					level := []int{unix.SOL_IP, unix.SOL_IPV6}[f]
					option(t, c, level, []int{unix.IP_RECVTOS, unix.IPV6_RECVTCLASS}[f], 1)
					s := out.dialUDP(t, out.tun[f], netip.AddrPortFrom(in.tun[f], 99))
					for _, tt := range []struct{ sent, want byte }{{0xb8, 0xb8}, {0xb8 | 2, 0xb8 | 3}, {0x28 | 1, 0x28 | 3}, {3, 3}} {
						option(t, s, level, []int{unix.IP_TOS, unix.IPV6_TCLASS}[f], int(tt.sent))
						_, err := s.Write([]byte{tt.sent})
						must(t, err)
						body, control := make([]byte, 10), make([]byte, 100)
						_, k, _, _, err := c.ReadMsgUDPAddrPort(body, control)
						must(t, err)
						msg, _, ok := sys.NextControl(control[:k])
						if !ok || body[0] != tt.sent || msg.Data[0] != tt.want {
							t.Errorf("inner %s: TOS %#x sent, %#x arrived in the datagram of %#x, want %#x", familyName(f == 1), tt.sent, msg.Data, body[0], tt.want)
						}
					}
				}
			}
		})
	}
}

// nft loads a ruleset into the node's namespace.
func (n *testNode) nft(t testing.TB, rules string) {
	t.Helper()
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	must(t, n.in(func() error {
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("nft: %w: %s", err, out)
		}
		return nil
	}))
}
