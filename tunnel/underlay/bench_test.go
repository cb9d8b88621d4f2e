package underlay

import (
	"fmt"
	"testing"

	"github.com/tulle-net/tulle/internal/sys"
)

// exchange sends messages of count datagrams of size bytes, each gathered from
// two slices, and receives them all. It is one step of the benchmarks.
type exchange struct {
	from, to *Socket
	dest     *Dest
	sb       *SendBatch
	rb       *RecvBatch
	data     []byte
	messages int
	size     int
	count    int
}

func newExchange(t testing.TB, l *link, six bool, proto, messages, size, count int) *exchange {
	x := &exchange{messages: messages, size: size, count: count}
	if proto == 0 {
		x.from, x.to = l.udpPair(six)
	} else {
		x.from, x.to = l.a.raw(addrA[six], proto), l.b.raw(addrB[six], proto)
	}
	x.dest = NewDest(x.to.Local())
	x.sb, x.rb = NewSendBatch(messages, 2*messages*count), NewRecvBatch(8, MaxMessage)
	x.data = pattern(1, size)
	return x
}

func (x *exchange) step() (bytes int, err error) {
	for range x.messages {
		x.sb.Begin(x.dest, 0x20)
		for range x.count {
			x.sb.Append(x.data[:8])
			x.sb.Append(x.data[8:])
		}
		segment := 0
		if x.count > 1 {
			segment = x.size
		}
		x.sb.End(segment)
	}
	res, err := x.from.Send(x.sb)
	if err != nil || res.Sent != x.messages*x.count {
		return 0, fmt.Errorf("Send: %+v, %v", res, err)
	}
	want := res.Sent * x.size
	for bytes < want {
		n, err := x.to.Recv(x.rb)
		if err == sys.ErrAgain {
			if _, err := x.to.Wait(); err != nil {
				return 0, err
			}
			continue
		}
		if err != nil {
			return 0, err
		}
		for i := range n {
			if r := x.rb.At(i); r.TOS == 0x20 && r.From.Port() == x.from.Local().Port() {
				bytes += len(r.Data)
			}
		}
	}
	return bytes, nil
}

var exchanges = []struct {
	name                         string
	six                          bool
	proto, messages, size, count int
}{
	{"UDP4/single64", false, 0, 1, 64, 1},
	{"UDP4/batch64", false, 0, 32, 64, 1},
	{"UDP4/train64", false, 0, 1, 64, 64},
	{"UDP4/train1400", false, 0, 1, 1400, 46},
	{"UDP6/train1400", true, 0, 1, 1400, 46},
	{"IPIP4/batch1400", false, 4, 32, 1400, 1},
	{"IPIP6/batch1400", true, 4, 32, 1400, 1},
}

// BenchmarkExchange sends and receives over a veth pair, in one goroutine.
func BenchmarkExchange(b *testing.B) {
	l := newLink(b, 1500)
	for _, c := range exchanges {
		b.Run(c.name, func(b *testing.B) {
			x := newExchange(b, l, c.six, c.proto, c.messages, c.size, c.count)
			b.ReportAllocs()
			b.SetBytes(int64(c.messages * c.size * c.count))
			for b.Loop() {
				if _, err := x.step(); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*c.messages*c.count), "ns/datagram")
		})
	}
}

// In steady state nothing is allocated, with trains taken and with trains
// refused.
func TestNoAllocations(t *testing.T) {
	l := newLink(t, 1500)
	check := func(t *testing.T, x *exchange) {
		t.Helper()
		var failed error
		if n := testing.AllocsPerRun(50, func() {
			if _, err := x.step(); err != nil {
				failed = err
			}
		}); n != 0 || failed != nil {
			t.Errorf("%v allocations, %v", n, failed)
		}
	}
	for _, c := range exchanges {
		t.Run(c.name, func(t *testing.T) {
			check(t, newExchange(t, l, c.six, c.proto, c.messages, c.size, c.count))
		})
	}
	t.Run("refused", func(t *testing.T) {
		check(t, newExchange(t, l, false, 0, 1, 50, 200)) // more than UDP_MAX_SEGMENTS
	})
}

// BenchmarkPingPong is a round trip of 64 bytes between two goroutines which
// sleep in Wait: two wakeups and four system calls an operation.
func BenchmarkPingPong(b *testing.B) {
	l := newLink(b, 1500)
	from, to := l.udpPair(false)
	echo := func(s *Socket, d *Dest, sb *SendBatch, rb *RecvBatch) error {
		for {
			n, err := s.Recv(rb)
			if err == sys.ErrAgain {
				if _, err := s.Wait(); err != nil {
					return err
				}
				continue
			}
			if err != nil || n != 1 {
				return fmt.Errorf("Recv: %d, %v", n, err)
			}
			sb.Begin(d, 0)
			sb.Append(rb.At(0).Data)
			sb.End(0)
			_, err = s.Send(sb)
			return err
		}
	}
	ended := make(chan error)
	go func() {
		d, sb, rb := NewDest(from.Local()), NewSendBatch(1, 1), NewRecvBatch(1, 2048)
		for {
			if err := echo(to, d, sb, rb); err != nil {
				ended <- err
				return
			}
		}
	}()
	d, sb, rb := NewDest(to.Local()), NewSendBatch(1, 1), NewRecvBatch(1, 2048)
	sb.Begin(d, 0)
	sb.Append(make([]byte, 64))
	sb.End(0)
	if _, err := from.Send(sb); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if err := echo(from, d, sb, rb); err != nil {
			b.Fatal(err)
		}
	}
	to.Wake()
	if err := <-ended; err != sys.ErrWoken {
		b.Error(err)
	}
}
