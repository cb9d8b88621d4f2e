package underlay

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// patience bounds the waits for what must happen; nothing is asserted about how long it takes.
const patience = 20 * time.Second

// wakeLater ends a wait in which nothing comes. Its timer is to be stopped before the socket is used for something else.
func wakeLater(s *Socket) *time.Timer { return time.AfterFunc(patience, s.Wake) }

func name6(six bool) string {
	if six {
		return "IPv6"
	}
	return "IPv4"
}

func eachFamily(t *testing.T, f func(t *testing.T, six bool)) {
	for _, six := range []bool{false, true} {
		t.Run(name6(six), func(t *testing.T) { f(t, six) })
	}
}

// Every kind of socket carries batches of single datagrams of many sizes, with
// the outer TOS of each, in order.
func TestSingles(t *testing.T) {
	l := newLink(t, 1500)
	for _, six := range []bool{false, true} {
		for _, proto := range []int{0, ProtoIPv4, ProtoIPv6} {
			t.Run(fmt.Sprintf("%s/proto%d", name6(six), proto), func(t *testing.T) {
				var from, to *Socket
				if proto == 0 {
					from, to = l.udpPair(six)
				} else {
					from, to = l.a.raw(addrA[six], proto), l.b.raw(addrB[six], proto)
				}
				sizes := []int{1, 20, 21, 64, 100, 1000, 1400, 1432}
				const rounds = 8
				dest := NewDest(to.Local())
				b := NewSendBatch(64, 256)
				var want []packet
				for r := range rounds {
					for i, size := range sizes {
						p := packet{pattern(r*100+i, size), from.Local(), byte(r*len(sizes)+i) * 4}
						want = append(want, p)
						b.Begin(dest, p.tos)
						b.Append(p.data[:size/3])
						b.Append(p.data[size/3:])
						b.End(0)
					}
				}
				res, err := from.Send(b)
				if err != nil || res != (SendResult{Messages: len(want), Sent: len(want)}) {
					t.Fatalf("Send: %+v, %v", res, err)
				}
				for i, got := range collect(t, to, len(want)) {
					if proto != 0 && !six {
						got.data = checkOuter4(t, got.data, want[i].tos, proto)
					}
					if !bytes.Equal(got.data, want[i].data) || got.from != want[i].from || got.tos != want[i].tos {
						t.Fatalf("datagram %d: %d bytes from %v tos %#x, want %d from %v tos %#x", i,
							len(got.data), got.from, got.tos, len(want[i].data), want[i].from, want[i].tos)
					}
				}
			})
		}
	}
}

// checkOuter4 checks the outer header which a raw IPv4 socket delivers.
func checkOuter4(t *testing.T, b []byte, tos byte, proto int) []byte {
	t.Helper()
	if len(b) < 20 || b[0] != 0x45 {
		t.Fatalf("no outer header: % x", b[:min(len(b), 20)])
	}
	if b[1] != tos || int(b[9]) != proto || b[8] != 64 {
		t.Errorf("outer TOS %#x protocol %d TTL %d, want %#x, %d, 64", b[1], b[9], b[8], tos, proto)
	}
	if flags := binary.BigEndian.Uint16(b[6:]); flags != 0x4000 {
		t.Errorf("outer flags and fragment offset %#x, want DF alone", flags)
	}
	return b[20:]
}

// Trains arrive as the datagrams that they are made of, gathered from slices
// that cut across the datagrams' borders.
func TestTrains(t *testing.T) {
	l := newLink(t, 1500)
	eachFamily(t, func(t *testing.T, six bool) {
		from, to := l.udpPair(six)
		dest := NewDest(to.Local())
		for _, c := range []struct{ segment, count, tail int }{
			{1000, 1, 1000}, {1000, 1, 1}, {1000, 2, 1000}, {1000, 2, 1}, {1, 2, 1}, {1, 64, 1},
			{18, 64, 7}, {1400, 46, 1400}, {1023, 64, 1023}, {1023, 64, 500}, {1024, 64, MaxTrain - 63*1024}, {1452, 45, 1452},
		} {
			t.Run(fmt.Sprintf("%dx%d+%d", c.count-1, c.segment, c.tail), func(t *testing.T) {
				data := pattern(c.segment, (c.count-1)*c.segment+c.tail)
				b := NewSendBatch(4, 256)
				b.Begin(dest, 0xb9)
				for rest, n := data, 1; len(rest) > 0; n = 3*n%5000 + 1 {
					n = min(n, len(rest))
					b.Append(rest[:n])
					rest = rest[n:]
				}
				b.End(c.segment)
				res, err := from.Send(b)
				if err != nil || res != (SendResult{Messages: 1, Sent: c.count}) {
					t.Fatalf("Send: %+v, %v", res, err)
				}
				for i, got := range collect(t, to, c.count) {
					want := data[i*c.segment : min((i+1)*c.segment, len(data))]
					if !bytes.Equal(got.data, want) || got.tos != 0xb9 || got.from != from.Local() {
						t.Fatalf("datagram %d: %d bytes, tos %#x, from %v; want %d bytes", i, len(got.data), got.tos, got.from, len(want))
					}
				}
				if !dest.GSO() {
					t.Error("trains were switched off")
				}
			})
		}
	})
}

// A train crosses this link whole: one receive slot, with its segment size.
func TestTrainStaysTogether(t *testing.T) {
	l := newLink(t, 1500)
	eachFamily(t, func(t *testing.T, six bool) {
		from, to := l.udpPair(six)
		b := NewSendBatch(1, 1)
		b.Begin(NewDest(to.Local()), 0)
		b.Append(pattern(1, 10*1000+10))
		b.End(1000)
		if _, err := from.Send(b); err != nil {
			t.Fatal(err)
		}
		timer := wakeLater(to)
		defer timer.Stop()
		if _, err := to.Wait(); err != nil {
			t.Fatal(err)
		}
		rb := NewRecvBatch(4, MaxMessage)
		n, err := to.Recv(rb)
		if n != 1 || err != nil {
			t.Fatalf("Recv: %d messages, %v; want one", n, err)
		}
		if r := rb.At(0); r.SegmentSize != 1000 || len(r.Data) != 10010 || r.Truncated {
			t.Errorf("train of %d bytes in segments of %d, truncated %v", len(r.Data), r.SegmentSize, r.Truncated)
		}
	})
}

// Nothing is fragmented: what is larger than the link's MTU is refused, alone,
// among others that go through.
func TestDontFragment(t *testing.T) {
	const mtu = 1400
	l := newLink(t, mtu)
	for _, six := range []bool{false, true} {
		for _, proto := range []int{0, ProtoIPv4, ProtoIPv6} {
			t.Run(fmt.Sprintf("%s/proto%d", name6(six), proto), func(t *testing.T) {
				var from, to *Socket
				overhead := map[bool]int{false: 20, true: 40}[six]
				if proto == 0 {
					from, to = l.udpPair(six)
					overhead += 8
				} else {
					from, to = l.a.raw(addrA[six], proto), l.b.raw(addrB[six], proto)
				}
				dest := NewDest(to.Local())
				b := NewSendBatch(8, 8)
				for _, size := range []int{100, mtu - overhead + 1, mtu - overhead, 20000, 101} {
					b.Begin(dest, 0)
					b.Append(pattern(size, size))
					b.End(0)
				}
				res, err := from.Send(b)
				if err != nil || res.Sent != 3 || res.Dropped != 2 || res.TooBig != 2 || res.LastErr != error(unix.EMSGSIZE) {
					t.Fatalf("Send: %+v, %v; want 3 sent, 2 too big", res, err)
				}
				var sizes []int
				for _, p := range collect(t, to, 3) {
					if proto != 0 && !six {
						p.data = p.data[20:]
					}
					sizes = append(sizes, len(p.data))
				}
				if want := []int{100, mtu - overhead, 101}; fmt.Sprint(sizes) != fmt.Sprint(want) {
					t.Errorf("arrived %v, want %v", sizes, want)
				}
			})
		}
	}
}

// A message longer than its slot says so and does not spoil its neighbours.
func TestTruncated(t *testing.T) {
	l := newLink(t, 1500)
	from, to := l.udpPair(false)
	b := NewSendBatch(3, 3)
	for _, size := range []int{100, 300, 200} {
		b.Begin(NewDest(to.Local()), 0)
		b.Append(pattern(size, size))
		b.End(0)
	}
	if _, err := from.Send(b); err != nil {
		t.Fatal(err)
	}
	wants := []struct {
		size, all int
		cut       bool
	}{{100, 100, false}, {200, 300, true}, {200, 200, false}}
	receive(t, to, NewRecvBatch(4, 200), len(wants), func(i int, r Received) {
		if want := wants[i]; r.Truncated != want.cut || !bytes.Equal(r.Data, pattern(want.all, want.all)[:want.size]) {
			t.Errorf("message %d: %d bytes, truncated %v; want %d, %v", i, len(r.Data), r.Truncated, want.size, want.cut)
		}
	})
	if to.Truncated() != 1 {
		t.Errorf("counted %d truncated messages, want 1", to.Truncated())
	}
}

// A slot's control length and name are restored for the next Recv.
func TestRecvAgainAndAgain(t *testing.T) {
	l := newLink(t, 1500)
	eachFamily(t, func(t *testing.T, six bool) {
		from, to := l.udpPair(six)
		sb, rb := NewSendBatch(8, 8), NewRecvBatch(4, 2048)
		dest := NewDest(to.Local())
		for round := range 50 {
			k := round%4 + 1
			for i := range k {
				sb.Begin(dest, byte(round*4))
				sb.Append(pattern(round+i, 50+i))
				sb.End(0)
			}
			if _, err := from.Send(sb); err != nil {
				t.Fatal(err)
			}
			receive(t, to, rb, k, func(i int, r Received) {
				if r.TOS != byte(round*4) || r.From != from.Local() || !bytes.Equal(r.Data, pattern(round+i, 50+i)) {
					t.Fatalf("round %d message %d: %+v", round, i, r)
				}
			})
		}
	})
}

// IPv4 addresses mapped into IPv6 are the IPv4 addresses.
func TestMappedAddresses(t *testing.T) {
	d := NewDest(netip.MustParseAddrPort("[::ffff:192.0.2.1]:9"))
	if d.Addr() != netip.MustParseAddrPort("192.0.2.1:9") || len(d.name) != unix.SizeofSockaddrInet4 {
		t.Errorf("destination %v, %d bytes", d.Addr(), len(d.name))
	}
}
