package tunnel

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
	"github.com/tulle-net/tulle/tunnel/offload"
)

// isTunnel reports a frame of the tunnel, of the underlay's family.
func isTunnel(frame []byte) bool {
	if len(frame) < ipAt+header.IPv6Len {
		return false
	}
	var proto byte
	switch ip := frame[ipAt:]; ip[0] >> 4 {
	case 4:
		proto = ip[9]
	case 6:
		proto = ip[6]
	}
	return slices.Contains([]byte{unix.IPPROTO_UDP, unix.IPPROTO_IPIP, unix.IPPROTO_IPV6}, proto)
}

// badRoad loses and reorders one frame in a hundred each.
type badRoad struct {
	mu   sync.Mutex // of everything: the two directions run apart
	dirs [2]struct {
		held  []byte // waits until late more have passed
		late  int
		drops int
		swaps int
	}
	rand *rand.Rand
}

func newBadRoad() *badRoad { return &badRoad{rand: rand.New(rand.NewPCG(1, 2))} }

func (r *badRoad) pass(toB bool, frame []byte, send func([]byte)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	d := &r.dirs[0]
	if toB {
		d = &r.dirs[1]
	}
	if isTunnel(frame) {
		switch n := r.rand.IntN(100); {
		case n == 0:
			d.drops++
			return
		case n == 1 && d.held == nil:
			d.held, d.late = frame, 1+r.rand.IntN(5)
			d.swaps++
			return
		}
	}
	send(frame)
	if d.held != nil {
		if d.late--; d.late == 0 {
			send(d.held)
			d.held = nil
		}
	}
}

// singles makes the nodes' devices send one packet a frame, so that a relay treats each alone, and join what they receive,
// so that trains arrive.
func singles(t testing.TB, nodes ...*testNode) {
	t.Helper()
	for _, n := range nodes {
		features(t, n.ns, "eth0", false, segmentation...)
		features(t, n.ns, "eth0", true, featureGRO)
		writeSysfs(t, n.ns, "class/net/eth0/gro_flush_timeout", "200000") // ns
	}
}

// Over a road that loses and reorders 1 % of the packets, no byte is wrong and no checksum either.
func TestLossAndReordering(t *testing.T) {
	for _, l := range allLinks() {
		t.Run(l.String(), func(t *testing.T) {
			road := newBadRoad()
			l.between = road.pass
			a, b := startPair(t, l)
			singles(t, a, b)
			for f := range 2 {
				b.echo(t, b.tun[f])
				bulk(t, a.dialTCP(t, a.tun[f], b.tun[f]), 3<<20, nil)
			}
			road.mu.Lock()
			defer road.mu.Unlock()
			for i, d := range road.dirs {
				if d.drops == 0 || d.swaps == 0 {
					t.Errorf("direction %d: %d lost, %d reordered: nothing is tested", i, d.drops, d.swaps)
				}
			}
			cleanChecksums(t, a, b)
			noDrops(t, a, b)
			if s := b.engine.Stats(); l.mode != encap.IPIP && s.RxReceives > s.RxPackets*2/3 {
				t.Errorf("%d packets in %d receives: hardly a train arrived", s.RxPackets, s.RxReceives)
			}
		})
	}
}

// background starts a program on the node; it is killed when the test ends.
func (n *testNode) background(t testing.TB, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	must(t, n.in(cmd.Start))
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
}

// output runs a program on the node to its end.
func (n *testNode) output(t testing.TB, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var out []byte
	err := n.in(func() (err error) {
		out, err = cmd.CombinedOutput()
		return err
	})
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// listening waits until a process listens on a TCP port of the node. It does not connect: a server of one client would take that for it.
func (n *testNode) listening(t testing.TB, port int) {
	t.Helper()
	const listens = "0A"
	socket := regexp.MustCompile(fmt.Sprintf(`:%04X [0-9A-F]+:0000 %s `, port, listens))
	eventually(t, fmt.Sprintf("port %d is open", port), func() (is bool) {
		must(t, n.in(func() error {
			for _, file := range []string{"tcp", "tcp6"} {
				table, err := os.ReadFile("/proc/thread-self/net/" + file)
				if err != nil {
					return err
				}
				is = is || socket.Match(table)
			}
			return nil
		}))
		return is
	})
}

// What users measure with goes over that road, too: iperf3 in both directions, and sockperf, which compares what comes back.
func TestToolsOverBadRoad(t *testing.T) {
	for _, tool := range []string{"iperf3", "sockperf"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%s is missing: apt-get install %s", tool, tool)
		}
	}
	for _, l := range allLinks() {
		if l.underlay6 {
			continue // TestLossAndReordering has them all
		}
		t.Run(l.String(), func(t *testing.T) {
			l.between = newBadRoad().pass
			a, b := startPair(t, l)
			singles(t, a, b)
			for f := range 2 {
				at := b.tun[f].String()
				for i, direction := range [][]string{nil, {"--reverse"}} {
					// A server for each run: one that serves several is deaf for a moment after each.
					port := 5201 + i
					b.background(t, "iperf3", "--server", "--one-off", "--bind", at, "--port", strconv.Itoa(port))
					b.listening(t, port)
					out := a.output(t, "iperf3", append(direction, "--client", at, "--port", strconv.Itoa(port), "--bytes", "4M", "--json")...)
					var r struct {
						End struct {
							Received struct{ Bytes int } `json:"sum_received"`
						}
					}
					if err := json.Unmarshal([]byte(out), &r); err != nil || r.End.Received.Bytes < 1<<20 {
						t.Errorf("iperf3 %v to %s received %d bytes of 4M, %v\n%s", direction, at, r.End.Received.Bytes, err, out)
					}
				}
				if f == 1 {
					continue // sockperf 3.7 does not listen on an IPv6 address
				}
				b.background(t, "sockperf", "server", "--tcp", "--ip", at, "--port", "11111")
				b.listening(t, 11111)
				for attempt := 1; ; attempt++ { // a second may pass before anything is answered
					out := a.output(t, "sockperf", "ping-pong", "--tcp", "--ip", at, "--port", "11111", "--time", "1", "--msg-size", "1300", "--data-integrity")
					received := regexp.MustCompile(`ReceivedMessages=([1-9][0-9]*)`).MatchString(out)
					if strings.Contains(strings.ToLower(out), "failed") || !received && attempt == 5 {
						t.Fatalf("sockperf to %s:\n%s", at, out)
					}
					if received {
						break
					}
				}
			}
			cleanChecksums(t, a, b)
			noDrops(t, a, b)
		})
	}
}

// A road that damages packets: whoever must notice does, and joining hides nothing. Over ipip only the pod's own checksum
// can tell; the engine must not join a damaged packet into a super-packet with a checksum of its own.
func TestDamageIsNotHidden(t *testing.T) {
	for _, l := range allLinks() {
		t.Run(l.String(), func(t *testing.T) {
			var frames, damaged atomic.Int64
			l.between = func(_ bool, frame []byte, send func([]byte)) {
				if isTunnel(frame) && len(frame) > 1000 && frames.Add(1)%50 == 0 {
					flip := func() { frame[len(frame)-500] ^= 0x10 }
					flip()
					// One damaged packet of 65,536 cannot be told from one that the kernel has joined: offload.RawVnetHdr.
					if _, joined := offload.RawVnetHdr(frame[ipAt+outerHeader(l):], int(l.mtu()), offload.NotTold); l.mode == encap.IPIP && joined {
						flip()
					} else {
						damaged.Add(1)
					}
				}
				send(frame)
			}
			a, b := startPair(t, l)
			singles(t, a, b)
			for f := range 2 {
				b.echo(t, b.tun[f])
				bulk(t, a.dialTCP(t, a.tun[f], b.tun[f]), 2<<20, nil)
			}
			if damaged.Load() == 0 {
				t.Fatal("no packet was damaged")
			}
			// The namespaces hold both pods and underlay: the damage is counted by whoever finds it. (A veth pair never
			// completes the outer UDP checksum, so that it is the pod here, too.)
			noticed := func() int64 { return int64(a.checksumErrors(t) + b.checksumErrors(t)) }
			var n, k int64
			eventually(t, "all damage is noticed", func() bool {
				n = damaged.Load()
				k = noticed()
				return k >= n && n == damaged.Load() // a packet that TCP sent twice may be under way yet
			})
			if k != n {
				t.Errorf("%d packets damaged, %d noticed", n, k)
			}
		})
	}
}

// extCounter reads a counter of /proc/net/netstat's IpExt or of snmp6.
func (n *testNode) extCounter(t testing.TB, name string) int {
	t.Helper()
	var text []byte
	must(t, n.in(func() (err error) {
		text, err = os.ReadFile("/proc/thread-self/net/netstat")
		if err == nil && strings.HasPrefix(name, "Ip6") {
			text, err = os.ReadFile("/proc/thread-self/net/snmp6")
		}
		return err
	}))
	var names []string
	for s := bufio.NewScanner(bytes.NewReader(text)); s.Scan(); {
		f := strings.Fields(s.Text())
		if len(f) == 2 && f[0] == name {
			v, err := strconv.Atoi(f[1])
			must(t, err)
			return v
		}
		if i := slices.Index(names, name); i >= 0 && f[0] == names[0] {
			v, err := strconv.Atoi(f[i])
			must(t, err)
			return v
		}
		names = f
	}
	t.Fatalf("no counter %s", name)
	return 0
}

// markCE marks the outer header of every nth tunnel packet that is ECN-capable as a congested router does, and leaves the
// others alone.
func markCE(every int64, marked *atomic.Int64) relay {
	var n atomic.Int64
	return func(_ bool, frame []byte, send func([]byte)) {
		if isTunnel(frame) && n.Add(1)%every == 0 {
			if ip := header.IPv4(frame[ipAt:]); ip[0]>>4 == 4 && ip.TOS()&3 != 0 {
				ip.SetTOS(ip.TOS() | 3)
				marked.Add(1)
			} else if ip := header.IPv6(frame[ipAt:]); ip[0]>>4 == 6 && ip.TrafficClass()&3 != 0 {
				ip.SetTrafficClass(ip.TrafficClass() | 3)
				marked.Add(1)
			}
		}
		send(frame)
	}
}

// What routers on the way mark in the outer header, the pod sees in its own packet: RFC 6040. The DSCP is that of the
// sender.
func TestCongestionMarksArrive(t *testing.T) {
	for _, l := range allLinks() {
		t.Run(l.String(), func(t *testing.T) {
			var marked atomic.Int64
			l.between = markCE(1, &marked)
			a, b := startPair(t, l)
			singles(t, a, b)
			for f := range 2 {
				level := []int{unix.SOL_IP, unix.SOL_IPV6}[f]
				in := b.listenUDP(t, netip.AddrPortFrom(b.tun[f], 99))
				option(t, in, level, []int{unix.IP_RECVTOS, unix.IPV6_RECVTCLASS}[f], 1)
				out := a.dialUDP(t, a.tun[f], netip.AddrPortFrom(b.tun[f], 99))
				for _, tt := range []struct{ sent, want byte }{
					{0xb8, 0xb8}, {0xb8 | 2, 0xb8 | 3}, {0xb8 | 1, 0xb8 | 3}, {3, 3}, {0x28 | 2, 0x28 | 3}, {0, 0},
				} {
					option(t, out, level, []int{unix.IP_TOS, unix.IPV6_TCLASS}[f], int(tt.sent))
					_, err := out.Write([]byte{tt.sent})
					must(t, err)
					body, control := make([]byte, 10), make([]byte, 100)
					_, k, _, _, err := in.ReadMsgUDPAddrPort(body, control)
					must(t, err)
					c, _, ok := sys.NextControl(control[:k])
					if !ok || body[0] != tt.sent || c.Data[0] != tt.want {
						t.Errorf("inner %s: TOS %#x sent, %#x arrived in the datagram of %#x, want %#x", familyName(f == 1), tt.sent, c.Data, body[0], tt.want)
					}
				}
			}
			if marked.Load() < 6 {
				t.Errorf("%d packets marked: nothing is tested", marked.Load())
			}
			noDrops(t, a, b)
			cleanChecksums(t, a, b)
		})
	}
}

// A TCP connection with ECN gets its marks, and its answers to them (ECE, CWR) pass through super-packets unharmed.
func TestTCPWithECN(t *testing.T) {
	for _, l := range allLinks() {
		t.Run(l.String(), func(t *testing.T) {
			var marked atomic.Int64
			l.between = markCE(100, &marked)
			a, b := startPair(t, l)
			singles(t, a, b)
			for _, n := range []*testNode{a, b} {
				must(t, n.in(func() error { return os.WriteFile("/proc/sys/net/ipv4/tcp_ecn", []byte("1"), 0) }))
			}
			for f := range 2 {
				counter := []string{"InCEPkts", "Ip6InCEPkts"}[f]
				before := a.extCounter(t, counter) + b.extCounter(t, counter)
				b.echo(t, b.tun[f])
				bulk(t, a.dialTCP(t, a.tun[f], b.tun[f]), 4<<20, nil)
				if k := a.extCounter(t, counter) + b.extCounter(t, counter) - before; k == 0 {
					t.Errorf("inner %s: no mark arrived", familyName(f == 1))
				}
			}
			if marked.Load() == 0 {
				t.Error("no packet was marked")
			}
			cleanChecksums(t, a, b)
		})
	}
}
