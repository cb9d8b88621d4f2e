package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// TestWire sends the same through a lab in all the ways that a tunnel may: a wire treats them alike. On the cut one, no frame
// is above the MTU at any place of the middle, and a host joins what arrives; on the whole one, nothing that came as one super-packet leaves as several.
func TestWire(t *testing.T) {
	for _, o := range []Options{{Wire: WireCut}, {Wire: WireWhole}, {Wire: WireCut, Straight: true}, {Wire: WireWhole, Straight: true}} {
		wire := o.Wire
		t.Run(fmt.Sprintf("%s, straight %v", wire, o.Straight), func(t *testing.T) {
			o.Name, o.Nodes, o.Overlay = testName("wire"), 2, IPv4Only
			l := up(t, o)
			for _, way := range []struct {
				name  string
				setup func(*Lab, context.Context) (undo func() error, err error)
				send  func(*testing.T, *Lab)
			}{
				{"UDP trains of a host", func(*Lab, context.Context) (func() error, error) { return func() error { return nil }, nil }, sendTrains},
				{"TCP through the kernel's VXLAN", (*Lab).KernelVXLAN, sendTCP},
				{"TCP without a tunnel", (*Lab).DirectRoutes, sendTCP},
			} {
				undo, err := way.setup(l, t.Context())
				if errors.Is(err, unix.EOPNOTSUPP) {
					t.Logf("%s: not in this kernel", way.name)
					continue
				} else if err != nil {
					t.Fatal(err)
				}
				largest, joined := captureLargest(t, l, Router), captureLargest(t, l, "h2")
				before, err := l.Crossed("h1", "h2")
				if err != nil {
					t.Fatal(err)
				}
				way.send(t, l)
				var c Crossing
				const chance = 20                                                // frames of something else: ARP, neighbour discovery
				eventually(t, way.name+": what came in went out", func() error { // the last of it may be on its way
					after, err := l.Crossed("h1", "h2")
					if err != nil {
						t.Fatal(err)
					}
					c = after.Minus(before)
					if d := int(c.OutFrames) - int(c.InFrames); d > chance || d < -chance {
						return fmt.Errorf("%d frames came in and %d went out", c.InFrames, c.OutFrames)
					}
					return nil
				})
				most := largest()
				t.Logf("%s: %d frames of %.0f bytes came in, %.3f times as many went out, the largest had %d", way.name, c.InFrames, c.FrameBytes(), c.Cut(), most)
				mtu := l.Options().MTU
				if n := joined(); n <= 2*mtu {
					t.Errorf("%s: nothing that arrived at h2 was joined: the largest had %d bytes", way.name, n)
				}
				switch frame := mtu + 14; {
				case wire == WireCut && most > frame:
					t.Errorf("%s: a frame of %d bytes on a wire of MTU %d", way.name, most, mtu)
				case wire == WireCut && c.FrameBytes() < float64(mtu)/2, wire == WireWhole && c.FrameBytes() < float64(2*mtu):
					t.Errorf("%s: frames of %.0f bytes: too little was sent to see anything", way.name, c.FrameBytes())
				}
				if err := undo(); err != nil {
					t.Fatal(err)
				}
			}
			for _, host := range []string{"h1", "h2"} {
				err := l.port(host, func(h *sys.Netlink, link netlink.Link) error {
					queues, err := h.QdiscList(link)
					if queue := slices.ContainsFunc(queues, func(q netlink.Qdisc) bool { return q.Type() == "pfifo" }); queue != (wire == WireCut) {
						t.Errorf("the router has a queue toward %s: %v", host, queue)
					}
					return err
				})
				if err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestStraight is a lab without switches: it works, and refuses what needs one.
func TestStraight(t *testing.T) {
	l := up(t, Options{Name: testName("straight"), Nodes: 2, Straight: true})
	if _, err := l.DirectRoutes(t.Context()); err != nil {
		t.Fatal(err)
	}
	reach(t, l, "with routes", everyone)
	if err := l.Unplug("h1"); err != nil {
		t.Fatal(err)
	}
	reach(t, l, "unplugged", sameHost)
	_, added := l.AddHost(t.Context(), 1)
	for what, err := range map[string]error{"AddHost": added, "RemoveHost": l.RemoveHost(t.Context(), "h1"), "ResetHost": l.ResetHost(t.Context(), "h1"), "Split": l.Split([]string{"h1"})} {
		if err == nil {
			t.Errorf("%s was not refused", what)
		}
	}
}

// captureLargest watches all interfaces of the router or a host; the result ends that and returns the length of the largest
// frame, as that place's network stack has it.
func captureLargest(t *testing.T, l *Lab, at string) func() int {
	t.Helper()
	fd := -1
	err := l.Do(at, func() (err error) {
		all := uint16(unix.ETH_P_ALL)<<8 | unix.ETH_P_ALL>>8
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(all)); err != nil {
			return err
		}
		wait := unix.Timeval{Usec: 20000}
		return errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20))
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan int)
	go func() {
		defer unix.Close(fd)
		most, head := 0, make([]byte, 64)
		for {
			n, _, err := unix.Recvfrom(fd, head, unix.MSG_TRUNC)
			if err == nil {
				most = max(most, n)
			} else if ctx.Err() != nil { // and nothing is left in the buffer
				done <- most
				return
			}
		}
	}()
	return func() int { stop(); return <-done }
}

// sendTCP sends some megabytes from a pod of h1 to one of h2.
func sendTCP(t *testing.T, l *Lab) {
	t.Helper()
	const total = 16 << 20
	ln, err := l.Listen(t.Context(), "p2a", "tcp", "0.0.0.0:5001")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	p, err := l.Pod("p2a")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		c, err := l.Dial(t.Context(), "p1a", "tcp", netip.AddrPortFrom(p.Addr(false), 5001).String())
		if err != nil {
			t.Error(err)
			ln.Close()
			return
		}
		defer c.Close()
		buf := make([]byte, 256<<10)
		for range total / len(buf) {
			if _, err := c.Write(buf); err != nil {
				t.Error(err)
			}
		}
	}()
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if n, err := io.Copy(io.Discard, c); n != total || err != nil {
		t.Errorf("%d of %d bytes: %v", n, total, err)
	}
}

// sendTrains sends UDP trains from h1 to h2, as an agent does.
func sendTrains(t *testing.T, l *Lab) {
	t.Helper()
	h2, err := l.Host("h2")
	if err != nil {
		t.Fatal(err)
	}
	there, err := l.ListenPacket(t.Context(), "h2", "udp", netip.AddrPortFrom(h2.Addr(false), 5001).String())
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	c, err := l.Dial(t.Context(), "h1", "udp", there.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const segment, train = 1400, 40
	set := func(c any, opt, value int, name string) {
		raw, err := c.(*net.UDPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		cerr := raw.Control(func(fd uintptr) { err = sys.SetInt(int(fd), unix.SOL_UDP, opt, value, name) })
		if err := errors.Join(cerr, err); err != nil {
			t.Fatal(err)
		}
	}
	set(c, unix.UDP_SEGMENT, segment, "UDP_SEGMENT")
	set(there, unix.UDP_GRO, 1, "UDP_GRO")
	buf := make([]byte, segment*train)
	for i := range 100 { // one after the other: a queue that a busy machine does not empty in time would lose some
		if _, err := c.Write(make([]byte, segment*train)); err != nil {
			t.Fatal(err)
		}
		for got := 0; got < segment*train; {
			_ = there.SetReadDeadline(time.Now().Add(20 * time.Second))
			n, _, err := there.ReadFrom(buf)
			if err != nil {
				t.Fatalf("train %d: %d of %d bytes: %v", i, got, segment*train, err)
			}
			got += n
		}
	}
}
