package tunnel

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// random returns n bytes.
func random(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n), byte(n >> 8)}).Read(b)
	return b
}

// Everything that pods send arrives as it was, by every encapsulation, outer and inner family: datagrams from one byte to
// fragments of a 60,000-byte one, and TCP in both directions at once.
func TestTraffic(t *testing.T) {
	eachLink(t, func(t *testing.T, l testLink) {
		a, b := startPair(t, l)
		for f := range a.tun {
			b.echo(t, b.tun[f])
			full := int(l.mtu()) - []int{20, 40}[f] - 8
			c := a.dialUDP(t, a.tun[f], netip.AddrPortFrom(b.tun[f], 7))
			for _, size := range []int{0, 1, full - 28, full - 1, full, full + 1, 60_000} {
				want := random(size)
				if _, err := c.Write(want); err != nil {
					t.Fatalf("UDP %d bytes to %v: %v", size, b.tun[f], err)
				}
				got := make([]byte, 65536)
				n, err := c.Read(got)
				if err != nil || !bytes.Equal(got[:n], want) {
					t.Fatalf("UDP %d bytes to %v: echoed %d, %v; drops %v", size, b.tun[f], n, err, b.engine.Stats().Drops)
				}
			}
			bulk(t, a.dialTCP(t, a.tun[f], b.tun[f]), 8<<20, nil)
		}
		cleanChecksums(t, a, b)
		noDrops(t, a, b)
	}, severalQueues()...)
}

// The tunnel's packets are never fragmented themselves: what is too long for the way fails instead, and pods' own fragments
// are as long as the way allows.
func TestOuterIsNeverFragmented(t *testing.T) {
	eachLink(t, func(t *testing.T, l testLink) {
		a, b := startPair(t, l)
		features(t, a.ns, "eth0", false, featureGSO, featureUSO)
		wire := b.tap(t, "eth0")
		for f := range a.tun {
			b.echo(t, b.tun[f])
			c := a.dialUDP(t, a.tun[f], netip.AddrPortFrom(b.tun[f], 7))
			want := random(9000)
			_, err := c.Write(want)
			must(t, err)
			got := make([]byte, 65536)
			n, err := c.Read(got)
			if err != nil || !bytes.Equal(got[:n], want) {
				t.Fatalf("%d bytes echoed, %v", n, err)
			}
			// A datagram behind the fragments: the tap has seen all of them when it sees this one.
			_, err = c.Write([]byte("behind the fragments"))
			must(t, err)
			wire.next("what was sent last", func(pkt []byte) bool { return bytes.HasSuffix(pkt, []byte("behind the fragments")) })
		}
		longest := 0
		for _, pkt := range wire.drain() {
			if src, ok := outerSource(pkt); !ok || src != a.under {
				continue
			}
			longest = max(longest, len(pkt))
			if six := pkt[0]>>4 == 6; six && pkt[6] == unix.IPPROTO_FRAGMENT || !six && (pkt[6]&0x40 == 0 || pkt[6]&0x3f != 0 || pkt[7] != 0) {
				t.Errorf("an outer packet without DF, or a fragment: % x", pkt[:40])
			}
		}
		// Fragments come in multiples of 8 bytes.
		if longest > 1500 || longest < 1500-8 {
			t.Errorf("the longest outer packet has %d bytes, the link takes 1500", longest)
		}
	})
}

// outerSource is the source of an IP packet.
func outerSource(pkt []byte) (netip.Addr, bool) {
	switch {
	case len(pkt) >= 20 && pkt[0]>>4 == 4:
		return netip.AddrFrom4([4]byte(pkt[12:])), true
	case len(pkt) >= 40 && pkt[0]>>4 == 6:
		return netip.AddrFrom16([16]byte(pkt[8:])), true
	}
	return netip.Addr{}, false
}

// Pods may tunnel among themselves: IP in IP, as load balancers send it that let the backend answer directly, and our own
// ports. In ipip as well, where the outer packet is of the same protocol.
func TestPodsMayTunnel(t *testing.T) {
	eachLink(t, func(t *testing.T, l testLink) {
		a, b := startPair(t, l)
		host, far := a.tap(t, "tun0"), b.tap(t, "tun0")
		for f := range 2 {
			for g := range 2 {
				inside := datagram{src: spaceOf(g, 8).Addr(), dst: spaceOf(g, 9).Addr(), sport: 1, dport: 2, payload: fmt.Append(nil, l, f, g)}.bytes(t)
				for _, d := range []datagram{
					{proto: protoOf(g), payload: inside}, {dport: 6080, payload: inside},
					{dport: testVXLANPort, payload: framed(macOf(5), macOf(6), etherTypeOf(protoOf(g)), inside)},
				} {
					d.src, d.dst = a.pod(f), b.pod(f)
					pkt := d.bytes(t)
					host.emit(pkt)
					if got := far.next("what the pod sent", func(got []byte) bool { return bytes.HasSuffix(got, inside) }); !bytes.Equal(got, pkt) {
						t.Errorf("arrived % x, sent % x", got, pkt)
					}
				}
			}
		}
		noDrops(t, a, b)
	})
}
