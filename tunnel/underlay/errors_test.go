package underlay

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// ICMP errors about one peer's closed port come up on sends to another: nothing
// sent to that one is lost, and the error queue tells whom they were about.
func TestPendingErrors(t *testing.T) {
	l := newLink(t, 1500)
	eachFamily(t, func(t *testing.T, six bool) {
		from, to := l.udpPair(six)
		closed := l.b.udp(Options{Bind: netipPort(addrB[six], 0)})
		deadAddr := closed.Local()
		if err := closed.Close(); err != nil {
			t.Fatal(err)
		}
		dead, live := NewDest(deadAddr), NewDest(to.Local())
		b := NewSendBatch(16, 16)
		const rounds = 40
		retried := 0
		for r := range rounds {
			for i := range 4 {
				b.Begin(dead, 0)
				b.Append([]byte("nobody"))
				b.End(0)
				b.Begin(live, 0)
				b.Append(pattern(r*4+i, 300))
				b.End(100 * (i % 2)) // every other one a train of three
			}
			res, err := from.Send(b)
			if err != nil || res.Dropped != 0 || res.Sent != 4+2*1+2*3 {
				t.Fatalf("round %d: %+v, %v", r, res, err)
			}
			retried += res.Retried
		}
		if retried == 0 {
			t.Error("no send met an ICMP error: the test shows nothing")
		}
		got := collect(t, to, rounds*(2+2*3))
		for i := 0; i < len(got); {
			k := i / 8 * 4
			for j := range 4 {
				var joined []byte
				for range 1 + 2*(j%2) {
					joined = append(joined, got[i].data...)
					i++
				}
				if !bytes.Equal(joined, pattern(k+j, 300)) {
					t.Fatalf("message %d to the living peer is wrong", k+j)
				}
			}
		}
		if !live.GSO() {
			t.Error("errors about another peer switched trains off")
		}
		n, err := from.DrainErrors(func(e Err) {
			wantType, wantCode := uint8(3), uint8(3) // destination unreachable, port unreachable
			if six {
				wantType, wantCode = 1, 4
			}
			if e.Errno != unix.ECONNREFUSED || e.Local || e.ICMPType != wantType || e.ICMPCode != wantCode ||
				e.Dest != deadAddr || e.Offender != addrB[six] || string(e.Quote) != "nobody" {
				t.Errorf("error queue: %+v", e)
			}
		})
		if n == 0 || err != nil {
			t.Errorf("error queue held %d messages, %v", n, err)
		}
		if n, err := from.DrainErrors(func(Err) {}); n != 0 || err != nil {
			t.Errorf("drained queue holds %d messages, %v", n, err)
		}
	})
}

// A router with a smaller link behind it tells us so: DrainErrors gives the MTU,
// the router and the destination, for UDP and raw sockets.
func TestPathMTUErrors(t *testing.T) {
	a, r, b := newHost(t), newHost(t), newHost(t)
	connect(a, r, "eth0", "eth0", 1500, []string{"10.1.0.1/24", "fd00:1::1/64"}, []string{"10.1.0.254/24", "fd00:1::fe/64"})
	connect(r, b, "eth1", "eth0", 1300, []string{"10.2.0.254/24", "fd00:2::fe/64"}, []string{"10.2.0.1/24", "fd00:2::1/64"})
	a.route("10.2.0.0/24", "10.1.0.254")
	a.route("fd00:2::/64", "fd00:1::fe")
	r.sysctl("net/ipv4/ip_forward", "1")
	r.sysctl("net/ipv6/conf/all/forwarding", "1")
	for _, c := range []struct {
		proto                  int
		local, remote, offends string
	}{
		{0, "10.1.0.1", "10.2.0.1", "10.1.0.254"}, {0, "fd00:1::1", "fd00:2::1", "fd00:1::fe"},
		{4, "10.1.0.1", "10.2.0.1", "10.1.0.254"}, {4, "fd00:1::1", "fd00:2::1", "fd00:1::fe"},
		{41, "10.1.0.1", "10.2.0.1", "10.1.0.254"}, {41, "fd00:1::1", "fd00:2::1", "fd00:1::fe"},
	} {
		t.Run(fmt.Sprintf("%s/proto%d", c.local, c.proto), func(t *testing.T) {
			var s *Socket
			port := uint16(0)
			if c.proto == 0 {
				s, port = a.udp(Options{Bind: netipPort(mustAddr(c.local), 0)}), 6080
			} else {
				s = a.raw(mustAddr(c.local), c.proto)
			}
			send := func(size int) SendResult {
				t.Helper()
				batch := NewSendBatch(1, 1)
				batch.Begin(NewDest(netipPort(mustAddr(c.remote), port)), 0)
				batch.Append(pattern(1, size))
				batch.End(0)
				res, err := s.Send(batch)
				if err != nil {
					t.Fatal(err)
				}
				return res
			}
			for tries := 0; ; tries++ { // the first ones may meet a router that is not up yet
				send(1400)
				timer := time.AfterFunc(5*time.Millisecond, s.Wake)
				_, err := s.Wait()
				timer.Stop()
				if err == sys.ErrErrQueue {
					break
				}
				if err != sys.ErrWoken || tries == 4000 {
					t.Fatalf("Wait: %v, want the error queue", err)
				}
			}
			n, err := s.DrainErrors(func(e Err) {
				if e.Errno != unix.EMSGSIZE || e.Local || e.Info != 1300 || e.Offender != mustAddr(c.offends) || e.Dest != netipPort(mustAddr(c.remote), port) {
					t.Errorf("error queue: %+v", e)
				}
			})
			if n == 0 || err != nil {
				t.Errorf("error queue held %d messages, %v", n, err)
			}
			// What the kernel has learned of the path does not stop our own probes.
			if res := send(1400); res.Sent != 1 {
				t.Errorf("the kernel's own path MTU stops a probe: %+v", res)
			}
		})
	}
}

// ErrErrQueue is told before readable data, and ends when the queue is drained.
func TestWait(t *testing.T) {
	l := newLink(t, 1500)
	from, to := l.udpPair(false)
	from.Wake()
	if _, err := from.Wait(); err != sys.ErrWoken {
		t.Errorf("Wait: %v, want ErrWoken", err)
	}
	b := NewSendBatch(2, 2)
	send := func(s *Socket, d *Dest) {
		t.Helper()
		b.Begin(d, 0)
		b.Append([]byte("x"))
		b.End(0)
		if _, err := s.Send(b); err != nil {
			t.Fatal(err)
		}
	}
	send(from, NewDest(netipPort(addrB[false], 9)))
	timer := wakeLater(from)
	defer timer.Stop()
	if _, err := from.Wait(); err != sys.ErrErrQueue {
		t.Fatalf("Wait: %v, want ErrErrQueue", err)
	}
	send(to, NewDest(from.Local()))
	if _, err := from.Wait(); err != sys.ErrErrQueue {
		t.Errorf("Wait with both: %v, want ErrErrQueue", err)
	}
	receive(t, from, NewRecvBatch(2, 100), 1, func(int, Received) {}) // in spite of the pending error
	if n, err := from.DrainErrors(func(Err) {}); n != 1 || err != nil {
		t.Errorf("DrainErrors: %d, %v", n, err)
	}
	send(to, NewDest(from.Local()))
	if _, err := from.Wait(); err != nil {
		t.Errorf("Wait with data: %v", err)
	}
}

// What finds the receive buffer full is counted, by the control message of the
// next to arrive as well as by asking.
func TestOverflows(t *testing.T) {
	l := newLink(t, 1500)
	eachFamily(t, func(t *testing.T, six bool) {
		from := l.a.udp(Options{Bind: netipPort(addrA[six], 0)})
		to := l.b.udp(Options{Bind: netipPort(addrB[six], 0), RecvBuf: 16 << 10})
		dest := NewDest(to.Local())
		b := NewSendBatch(64, 64)
		send := func(count int) {
			t.Helper()
			for range count {
				if b.Full(1) {
					t.Fatal("batch is full")
				}
				b.Begin(dest, 0)
				b.Append(pattern(1, 1000))
				b.End(0)
			}
			if res, err := from.Send(b); err != nil || res.Sent != count {
				t.Fatalf("Send: %+v, %v", res, err)
			}
		}
		for range 8 {
			send(64)
		}
		rb := NewRecvBatch(64, 1500)
		got := 0
		for dropped, end := uint32(0), time.Now().Add(patience); got+int(dropped) < 8*64; { // until each was delivered or dropped
			n, err := to.Recv(rb)
			if err != nil && (!errors.Is(err, sys.ErrAgain) || time.Now().After(end)) {
				t.Fatalf("%d received, %d dropped, %v", got, dropped, err)
			}
			got += n
			if dropped, err = sys.Drops(to.fd); err != nil {
				t.Fatal(err)
			}
		}
		lost := uint64(8*64 - got)
		if lost == 0 {
			t.Fatal("nothing was lost: the test shows nothing")
		}
		send(1)
		receive(t, to, rb, 1, func(int, Received) {})
		if n := to.overflows.Load(); n != lost {
			t.Errorf("control message says %d lost, want %d", n, lost)
		}
		if n := to.Overflows(); n != lost {
			t.Errorf("Overflows: %d, want %d", n, lost)
		}
	})
}

// The counter goes on when the kernel's 32 bits wrap, and never back.
func TestOverflowCounterWraps(t *testing.T) {
	var s Socket
	for _, c := range []struct {
		kernel uint32
		want   uint64
	}{{5, 5}, {5, 5}, {4, 5}, {1<<31 - 1, 1<<31 - 1}, {1<<32 - 2, 1<<32 - 2}, {3, 1<<32 + 3}, {1<<32 - 1, 1<<32 + 3}, {10, 1<<32 + 10}} {
		s.overflowed(c.kernel)
		if got := s.overflows.Load(); got != c.want {
			t.Errorf("kernel's %d: %d, want %d", c.kernel, got, c.want)
		}
	}
}

// While packets come often, waiting is receiving: WaitRecv returns messages as Recv does, is ended by Wake, and tells of errors, also of one
// that Recv met.
func TestWaitRecv(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(runtime.NumCPU() + 2)) // hot waits need processors to spare
	l := newLink(t, 1500)
	from, to := l.udpPair(false)
	b, rb := NewSendBatch(2, 2), NewRecvBatch(2, 100)
	send := func(s *Socket, d *Dest, text string) {
		t.Helper()
		b.Begin(d, 8)
		b.Append([]byte(text))
		b.End(0)
		if _, err := s.Send(b); err != nil {
			t.Fatal(err)
		}
	}
	wait := func(want error) {
		t.Helper()
		timer := wakeLater(to)
		defer timer.Stop()
		n, waited, err := to.WaitRecv(rb, 2)
		if n != 0 || err != want || waited < 0 || waited > patience-time.Second {
			t.Fatalf("WaitRecv: %d, %v after %v; want %v", n, err, waited, want)
		}
	}
	dest := NewDest(to.Local())
	exchange := func(text string) (waiting bool) { // whether it was received by waiting
		t.Helper()
		send(from, dest, text)
		n, _, err := to.WaitRecv(rb, 2)
		if waiting = n > 0; !waiting && err == nil {
			n, err = to.Recv(rb)
		}
		if n != 1 || err != nil {
			t.Fatalf("received %d, %v", n, err)
		}
		if r := rb.At(0); string(r.Data) != text || r.From != from.Local() || r.TOS != 8 {
			t.Errorf("received %q from %v, TOS %d", r.Data, r.From, r.TOS)
		}
		return waiting
	}
	if exchange("first") {
		t.Error("nothing had come before, and the wait did not poll")
	}
	received := 0
	for range 20 { // a machine that stands still makes one of them poll
		if exchange("next") {
			received++
		}
	}
	if received == 0 {
		t.Error("none of 20 packets was received by waiting")
	}
	for most := 1; most <= 3; most++ { // of two messages; the batch has two slots
		exchange("before") // so that the wait does not poll
		send(from, dest, "one")
		send(from, dest, "two")
		n, _, err := to.WaitRecv(rb, most)
		if err != nil || n > most || n > 2 {
			t.Fatalf("received %d, %v; want at most %d", n, err, most)
		}
		receive(t, to, rb, 2-n, func(int, Received) {})
	}
	to.Wake()
	wait(sys.ErrWoken)
	time.AfterFunc(time.Millisecond, to.Wake) // during the wait
	wait(sys.ErrWoken)

	drain := func() {
		t.Helper()
		if n, err := to.DrainErrors(func(Err) {}); n != 1 || err != nil {
			t.Errorf("DrainErrors: %d, %v", n, err)
		}
	}
	exchange("again")
	send(to, NewDest(netipPort(addrA[false], 9)), "nobody listens there")
	wait(sys.ErrErrQueue)
	drain()
	exchange("again")
	send(to, NewDest(netipPort(addrA[false], 9)), "nobody listens there")
	for end := time.Now().Add(patience); !to.pending && time.Now().Before(end); { // until the answer is there
		if n, err := to.Recv(rb); n != 0 || err != sys.ErrAgain {
			t.Fatalf("Recv: %d, %v", n, err)
		}
	}
	wait(sys.ErrErrQueue)
	drain()
	exchange("last")
}

// Wake ends a wait in which nothing comes, however often signals interrupt it: the runtime sends them to a thread that it wants to preempt.
func TestWakeAmongSignals(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(runtime.NumCPU() + 2))
	l := newLink(t, 1500)
	from, to := l.udpPair(false)
	b, rb := NewSendBatch(1, 1), NewRecvBatch(2, 100)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	pid, tid := unix.Getpid(), unix.Gettid()
	for range 3 {
		b.Begin(NewDest(to.Local()), 0)
		b.Append([]byte("x"))
		b.End(0)
		if _, err := from.Send(b); err != nil {
			t.Fatal(err)
		}
		if _, _, err := to.WaitRecv(rb, 2); err != nil { // packets come often from here on
			t.Fatal(err)
		}
		_, _ = to.Recv(rb) // if it only polled
		stop := make(chan struct{})
		var signals sync.WaitGroup
		signals.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(3 * time.Millisecond):
					_ = unix.Tgkill(pid, tid, unix.SIGURG)
				}
			}
		})
		late := time.AfterFunc(patience, func() { close(stop) })
		time.AfterFunc(5*time.Millisecond, to.Wake)
		if _, waited, err := to.WaitRecv(rb, 2); err != sys.ErrWoken || waited > patience-time.Second {
			t.Errorf("WaitRecv: %v after %v, want ErrWoken soon", err, waited)
		}
		if late.Stop() {
			close(stop)
		}
		signals.Wait()
	}
}
