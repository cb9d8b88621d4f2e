package tunnel

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/tunnel/encap"
)

// Super-packets really are what TCP sends and receives here; otherwise the tests below show nothing.
func TestSuperPackets(t *testing.T) {
	eachLink(t, func(t *testing.T, l testLink) {
		a, b := startPair(t, l)
		if off := a.dev.Offloads(); !off.TSO {
			t.Skipf("this kernel's TUN has offloads %v", off)
		}
		for f := range 2 {
			b.echo(t, b.tun[f])
			beforeB, given := b.engine.Stats(), a.tunGave(t)
			bulk(t, a.dialTCP(t, a.tun[f], b.tun[f]), 16<<20, nil)
			s, sb := a.engine.Stats(), b.engine.Stats()
			if now := a.tunGave(t); now.bytes-given.bytes < 2*uint64(l.mtu())*(now.packets-given.packets) {
				mean := (now.bytes - given.bytes) / (now.packets - given.packets)
				t.Errorf("the TUN gave %d bytes a read on average: no super-packets", mean)
			}
			if mean := int(sb.RxBytes-beforeB.RxBytes) / int(sb.RxWrites-beforeB.RxWrites); l.mode != encap.IPIP && mean < 2*int(l.mtu()) {
				t.Errorf("%d bytes a write to the TUN on average: nothing was joined", mean)
			}
			if l.mode != encap.IPIP && s.GSOFallbacks != 0 {
				t.Errorf("%d trains were refused", s.GSOFallbacks)
			}
		}
		cleanChecksums(t, a, b)
		noDrops(t, a, b)
	})
}

// Device features go off and on under traffic, on either side, and the TUN stops giving super-packets: no byte is lost or
// wrong.
func TestOffloadsChangeUnderTraffic(t *testing.T) {
	eachLink(t, func(t *testing.T, l testLink) {
		a, b := startPair(t, l)
		tun := func(n *testNode, on bool) func() {
			return func() {
				flags := 0
				if on {
					flags = sys.TunCSUM | sys.TunTSO | sys.TunUSO
				}
				if err := sys.TunSetOffload(n.dev.FD(), flags); err != nil {
					t.Error(err)
				}
			}
		}
		eth := func(n *testNode, on bool, names ...string) func() {
			return func() { features(t, n.ns, "eth0", on, names...) }
		}
		steps := []func(){
			eth(a, false, segmentation...), eth(b, false, segmentation...), eth(a, true, segmentation...),
			eth(a, false, featureChecksum), eth(b, true, featureGRO), eth(b, false, featureChecksum),
			tun(a, false), tun(b, false), eth(a, true, featureChecksum), eth(a, true, featureGRO), tun(a, true),
			eth(b, false, featureGRO), eth(b, true, featureChecksum), eth(b, true, segmentation...), tun(b, true), eth(a, false, featureGRO),
		}
		for f := range 2 {
			b.echo(t, b.tun[f])
			const each = 1 << 20
			next := 0
			bulk(t, a.dialTCP(t, a.tun[f], b.tun[f]), (len(steps)+2)*each, func(done int) {
				for ; next < len(steps) && done > (next+1)*each; next++ {
					steps[next]()
				}
			})
			if next != len(steps) {
				t.Errorf("%d of %d steps made", next, len(steps))
			}
		}
		cleanChecksums(t, a, b)
		noDrops(t, a, b)
	})
}

// A raw socket gets what the kernel's GRO has joined, up to 64 KiB without transport checksum (trap 7 of
// docs/datapath.md): it goes to the pods whole.
func TestKernelJoinsIPIP(t *testing.T) {
	for _, six := range []bool{false, true} {
		l := testLink{mode: encap.IPIP, underlay6: six}
		t.Run(l.String(), func(t *testing.T) {
			a, b := startPair(t, l)
			for _, n := range []*testNode{a, b} {
				features(t, n.ns, "eth0", false, segmentation...)
				features(t, n.ns, "eth0", true, featureGRO)
				// A veth pair hands over one packet at a time: GRO has to wait for the next.
				writeSysfs(t, n.ns, "class/net/eth0/gro_flush_timeout", "500000")
			}
			for f := range 2 {
				b.echo(t, b.tun[f])
				before := b.engine.Stats()
				bulk(t, a.dialTCP(t, a.tun[f], b.tun[f]), 8<<20, nil)
				now := b.engine.Stats()
				if mean := (now.RxBytes - before.RxBytes) / (now.RxPackets - before.RxPackets); mean < 2*uint64(l.mtu()) {
					t.Errorf("%d bytes a packet on average: the kernel joined nothing, so that nothing is tested", mean)
				}
			}
			cleanChecksums(t, a, b)
			noDrops(t, a, b)
		})
	}
}

// A process sends trains with UDP_SEGMENT; every datagram arrives as it was, in order, whatever the lengths.
func TestGSOSender(t *testing.T) {
	eachLink(t, func(t *testing.T, l testLink) {
		a, b := startPair(t, l)
		for f := range 2 {
			full := int(l.mtu()) - []int{28, 48}[f]
			to := netip.AddrPortFrom(b.tun[f], 99)
			in := b.listenUDP(t, to)
			out := a.listenUDP(t, netip.AddrPortFrom(a.tun[f], 0))
			before, given := a.engine.Stats(), a.tunGave(t)
			datagrams := 0
			for _, tt := range []struct{ size, bytes int }{
				{full, 40 * full}, {1200, 50*1200 + 1}, {333, 60*333 + 77}, {1, 64}, {2, 127}, {501, 502}, {full, full + 1}, {7, 7 * 64}, {1000, 1000},
			} {
				want := random(tt.bytes)
				sendGSO(t, out, to, tt.size, want)
				buf := make([]byte, 65536)
				for part := range slices.Chunk(want, tt.size) {
					n, _, err := in.ReadFromUDPAddrPort(buf)
					if err != nil || !bytes.Equal(buf[:n], part) {
						t.Fatalf("train of %d bytes by %d to %v: a datagram of %d bytes arrived, want %d: %v", tt.bytes, tt.size, to, n, len(part), err)
					}
					datagrams++
				}
			}
			// The last one may arrive before its sender has counted it.
			eventually(t, "every datagram is counted", func() bool {
				return int(a.engine.Stats().TxPackets-before.TxPackets) >= datagrams
			})
			read := int(a.tunGave(t).packets - given.packets)
			if a.dev.Offloads().USO && read >= datagrams {
				t.Errorf("the TUN gave %d packets for %d datagrams: no super-packets", read, datagrams)
			}
		}
		cleanChecksums(t, a, b)
		noDrops(t, a, b)
	})
}

// gave is what a TUN has handed to its reader, by the kernel's count: a super-packet is one packet.
type gave struct{ packets, bytes uint64 }

func (n *testNode) tunGave(t *testing.T) (g gave) {
	t.Helper()
	withNetlink(t, n.ns, func(nl *sys.Netlink) error {
		l, err := nl.LinkByName("tun0")
		if err == nil {
			g = gave{l.Attrs().Statistics.TxPackets, l.Attrs().Statistics.TxBytes}
		}
		return err
	})
	return g
}

// pinThreads keeps all threads of the process on one CPU: the kernel may deliver what two CPUs have sent in another order
// than it was sent in, which a test of our own order must not meet.
func pinThreads(t *testing.T) {
	t.Helper()
	var was, one unix.CPUSet
	must(t, unix.SchedGetaffinity(0, &was))
	for cpu := range 1024 {
		if was.IsSet(cpu) {
			one.Set(cpu)
			break
		}
	}
	set := func(cpus *unix.CPUSet) {
		for range 2 { // threads that started meanwhile
			tasks, err := os.ReadDir("/proc/self/task")
			must(t, err)
			for _, task := range tasks {
				id, err := strconv.Atoi(task.Name())
				must(t, err)
				if err := unix.SchedSetaffinity(id, cpus); err != nil && err != unix.ESRCH {
					t.Fatal(err)
				}
			}
		}
	}
	set(&one)
	t.Cleanup(func() { set(&was) })
}

// Flows of datagrams of all sizes, some in trains, keep their order, and nothing is lost that nobody has dropped.
func TestOrderWithinFlows(t *testing.T) {
	const flows, perFlow, window = 8, 3000, 256
	eachLink(t, func(t *testing.T, l testLink) {
		a, b := startPair(t, l)
		for f := range 2 {
			t.Run("inner "+familyName(f == 1), func(t *testing.T) {
				pinThreads(t)
				to := netip.AddrPortFrom(b.tun[f], 99)
				in := b.listenUDP(t, to)
				var arrived atomic.Int64
				done := make(chan error, 1)
				go func() {
					done <- receiveInOrder(func(b []byte) (int, netip.AddrPort, error) {
						in.SetReadDeadline(time.Now().Add(2 * patience))
						return in.ReadFromUDPAddrPort(b)
					}, flows*perFlow, &arrived)
				}()
				var socks [flows]interface {
					Write([]byte) (int, error)
				}
				for i := range socks {
					socks[i] = a.dialUDP(t, a.tun[f], to)
				}
				sizes := random(flows * perFlow)
				fail := func() {
					select {
					case err := <-done:
						t.Fatal(err)
					default:
					}
				}
				for n := range flows * perFlow {
					// Runs of one length make trains; each third datagram is of another.
					size := 16 + 64*(n/500%16)
					if n%3 == 0 {
						size = 16 + int(sizes[n])*5
					}
					d := make([]byte, size)
					binary.BigEndian.PutUint32(d, uint32(n%flows))
					binary.BigEndian.PutUint32(d[4:], uint32(n/flows))
					if _, err := socks[n%flows].Write(d); err != nil {
						t.Fatal(err)
					}
					if n%32 == 0 {
						eventually(t, "datagrams arrive", func() bool { fail(); return int64(n)-arrived.Load() < window })
					}
				}
				if err := <-done; err != nil {
					t.Error(err)
				}
			})
		}
		cleanChecksums(t, a, b)
		noDrops(t, a, b)
	}, severalQueues()...)
}

// receiveInOrder reads n datagrams that begin with the number of their flow and their number in it.
func receiveInOrder(read func([]byte) (int, netip.AddrPort, error), n int, arrived *atomic.Int64) error {
	buf := make([]byte, 65536)
	next := map[uint32]uint32{}
	for range n {
		if _, _, err := read(buf); err != nil {
			return fmt.Errorf("after %d of %d datagrams: %w", arrived.Load(), n, err)
		}
		flow, seq := binary.BigEndian.Uint32(buf), binary.BigEndian.Uint32(buf[4:])
		if seq != next[flow] {
			return fmt.Errorf("flow %d: datagram %d arrived, want %d", flow, seq, next[flow])
		}
		next[flow]++
		arrived.Add(1)
	}
	return nil
}
