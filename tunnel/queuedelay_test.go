package tunnel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/tunnel/capture"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
	"github.com/tulle-net/tulle/tunnel/offload"
	"github.com/tulle-net/tulle/tunnel/underlay"
)

// longQueue is a TUN queue that always holds length packets; each read takes some time.
type longQueue struct {
	memQueue
	length int
	took   time.Duration
	next   func() []byte
	held   [][]byte
	end    time.Time
}

func (q *longQueue) Read(b []byte) (int, error) {
	if time.Now().After(q.end) {
		return 0, sys.ErrAgain
	}
	for len(q.held) < q.length {
		q.held = append(q.held, q.next())
	}
	time.Sleep(q.took)
	n := copy(b, q.held[0])
	q.held = q.held[1:]
	return n, nil
}

// mark is the device's Mark.
func (q *longQueue) mark(pkt []byte) error {
	q.held = append(q.held, append(make([]byte, offload.VnetHdrLen), pkt...))
	return nil
}

// tcpPacket is a packet, or with more payload than 1,000 bytes a super-packet, of a TCP flow to the peer, as a TUN reads it.
func tcpPacket(f, payload int, flags header.TCPFlags, tos byte) []byte {
	p := superPacket(f, 0, 1, true, 1, random(payload), 1000)
	ip := p[offload.VnetHdrLen:]
	if f == 0 {
		header.IPv4(ip).SetTOS(tos)
	} else {
		header.IPv6(ip).SetTrafficClass(tos)
	}
	ip[[]int{20, 40}[f]+13] = byte(flags)
	return p
}

// Where packets wait too long, TCP's senders lose a packet with data now and then, or have one marked if they know ECN, and nobody else does.
func TestSlow(t *testing.T) {
	const long, short = 4 * codelTarget, codelTarget / 2
	tcp := func(payload int, flags header.TCPFlags, tos byte) func(int) []byte {
		return func(f int) []byte { return tcpPacket(f, payload, flags, tos) }
	}
	for _, c := range []struct {
		name   string
		packet func(family int) []byte
		wait   time.Duration
		drops  bool
		marks  int // packets on the wire for each that is marked
	}{
		{"super-packets", tcp(10_000, header.TCPAck, 0), long, true, 0},
		{"packets", tcp(1000, header.TCPAck, 0), long, true, 0},
		{"super-packets, ECN", tcp(10_000, header.TCPAck, header.ECNECT0), long, false, 10},
		{"packets, ECN", tcp(1000, header.TCPAck, header.ECNECT1), long, false, 1},
		{"a short queue", tcp(10_000, header.TCPAck, 0), short, false, 0},
		{"acknowledgments", tcp(0, header.TCPAck, 0), long, false, 0},
		{"SYN with data", tcp(1000, header.TCPSyn, 0), long, false, 0},
		{"the end", tcp(1000, header.TCPAck|header.TCPFin, 0), long, false, 0},
		{"UDP", func(f int) []byte { return superPacket(f, 0, 1, false, 0, random(10_000), 1000) }, long, false, 0},
	} {
		for f := range 2 {
			t.Run(c.name+"/"+familyName(f == 1), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := newMemRig(encap.UDP)
					q := &longQueue{took: 100 * time.Microsecond, next: func() []byte { return c.packet(f) }, end: time.Now().Add(10 * codelInterval)}
					q.length = int(c.wait / q.took)
					r.tx.queue, r.tx.delay.mark = q, q.mark
					dropped := listen(t, r.e, capture.Filter{Drops: true})
					ce, err := bpf.Assemble([][]bpf.Instruction{ // the inner ECN field is CE
						{bpf.LoadAbsolute{Off: 1, Size: 1}, bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: 3}, bpf.JumpIf{Cond: bpf.JumpEqual, Val: 3, SkipFalse: 1}, bpf.RetConstant{Val: 1}, bpf.RetConstant{Val: 0}},
						{bpf.LoadAbsolute{Off: 1, Size: 1}, bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: 0x30}, bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0x30, SkipFalse: 1}, bpf.RetConstant{Val: 1}, bpf.RetConstant{Val: 0}},
					}[f])
					must(t, err)
					marked := listen(t, r.e, capture.Filter{Points: []capture.Point{capture.ToPeer}, Program: ce})
					r.transmit(t)

					s := r.e.Stats()
					lost := s.Drops[encap.DropQueueDelay.String()]
					// The times are those of TestCodel: 25 in the first ten intervals of a queue that is always too long.
					for what, n := range map[string]struct {
						n    uint64
						want bool
					}{"dropped": {lost, c.drops}, "marked": {s.QueueMarks, c.marks > 0}} {
						if n.want && (n.n < 15 || n.n > 30) || !n.want && n.n != 0 {
							t.Errorf("%d packets %s in ten intervals", n.n, what)
						}
					}
					want := c.packet(f)[offload.VnetHdrLen:] // with the checksum that the kernel leaves to others
					if len(want) > 1500 {
						want = segmentsOf(t, c.packet(f))[0]
					}
					for _, e := range dropped() {
						if e.Reason != encap.DropQueueDelay.String() || !bytes.Equal(e.Data, want) {
							t.Fatalf("dropped, %s: % x, want the packet or its first segment: % x", e.Reason, e.Data[:60], want[:60])
						}
					}
					if got, want := len(marked()), int(s.QueueMarks)*c.marks; got != want {
						t.Errorf("%d packets with CE on the wire, want %d", got, want)
					}
					if s.QueueDelay != 0 {
						t.Errorf("the queue is empty, and has a delay of %v", s.QueueDelay)
					}
				})
			})
		}
	}
}

// listen captures what the filter selects. The function that it returns ends that, and returns it.
func listen(t *testing.T, e *Engine, f capture.Filter) func() []capture.Event {
	l, err := e.Tap().Listen(f, capture.Limits{Rate: 1 << 20})
	must(t, err)
	return func() (events []capture.Event) {
		defer l.Close()
		if l.Missed() > 0 {
			t.Fatalf("%d events missed", l.Missed())
		}
		for {
			e, err := l.Next(t.Context(), time.Millisecond)
			if err != nil {
				return events
			}
			events = append(events, e)
		}
	}
}

func setCubic(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var set error
	err = raw.Control(func(fd uintptr) { set = unix.SetsockoptString(int(fd), unix.SOL_TCP, unix.TCP_CONGESTION, "cubic") })
	return errors.Join(err, set)
}

// zeros is a source without end.
type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }

// slowed is a queue, and slowedSocket a socket, whose reads take some time, as on a slow CPU.
type (
	slowed       struct{ tunQueue }
	slowedSocket struct{ inSocket }
)

func (q slowed) Read(b []byte) (int, error) {
	n, err := q.tunQueue.Read(b)
	if err == nil {
		time.Sleep(200 * time.Microsecond)
	}
	return n, err
}

func (s slowedSocket) Recv(b *underlay.RecvBatch) (int, error) {
	n, err := s.inSocket.Recv(b)
	if err == nil {
		time.Sleep(time.Duration(n) * 200 * time.Microsecond)
	}
	return n, err
}

// Real TCP in a real TUN: its senders are slowed down, by loss or by ECN, where the sending or the receiving agent is slower than it, and each worker of
// several queues finds marks of its own.
func TestSlowTCP(t *testing.T) {
	t.Run("sends", func(t *testing.T) {
		slowTCP(t, []testLink{{mode: encap.UDP}, {mode: encap.UDP, queues: 3}}, func(a, _ *testNode) *testNode { a.slow = true; return a })
	})
	t.Run("receives", func(t *testing.T) {
		slowTCP(t, []testLink{{mode: encap.UDP}, {mode: encap.IPIP}, {mode: encap.IPIP, underlay6: true}}, func(_, b *testNode) *testNode { b.slowSockets = true; return b })
	})
}

// slowTCP requires that the node that slow has slowed, and nobody else, slows TCP down, which goes from the first one to the second one.
func slowTCP(t *testing.T, links []testLink, slow func(a, b *testNode) *testNode) {
	for _, ecn := range []bool{false, true} {
		for _, l := range links {
			t.Run(fmt.Sprintf("%s/ECN %v", l, ecn), func(t *testing.T) {
				a, b := newNode(t, 0, l), newNode(t, 1, l)
				connect(t, l, a, b)
				slowest := slow(a, b)
				a.start(t, l, b)
				b.start(t, l, a)
				for _, n := range []*testNode{a, b} {
					must(t, n.in(func() error {
						value := map[bool]string{false: "0", true: "1"}[ecn]
						return os.WriteFile("/proc/sys/net/ipv4/tcp_ecn", []byte(value), 0)
					}))
				}
				b.echo(t, b.tun[0])
				ctx, cancel := context.WithCancel(t.Context())
				var flows sync.WaitGroup
				for range 8 {
					c := a.dialTCP(t, a.tun[0], b.tun[0])
					must(t, setCubic(c))
					context.AfterFunc(ctx, func() { c.Close() })
					flows.Go(func() { io.Copy(io.Discard, c) })
					flows.Go(func() { io.Copy(c, zeros{}) })
				}
				slowed := func() uint64 {
					s := slowest.engine.Stats()
					if ecn {
						return s.QueueMarks
					}
					return s.Drops[encap.DropQueueDelay.String()]
				}
				eventually(t, "TCP is slowed down", func() bool { return slowed() > 3 })
				cancel()
				flows.Wait()
				if other := slowest.engine.Stats(); ecn == (other.QueueMarks == 0) {
					t.Errorf("ECN %v: %d packets marked", ecn, other.QueueMarks)
				}
				eventually(t, "the empty queue has no delay", func() bool { return slowest.engine.Stats().QueueDelay == 0 })
				cleanChecksums(t, a, b)
				noDrops(t, a, b)
			})
		}
	}
}
