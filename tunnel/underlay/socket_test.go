package underlay

import (
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// What stands in the way of opening a socket is named.
func TestOpenErrors(t *testing.T) {
	l := newLink(t, 1500)
	eachFamily(t, func(t *testing.T, six bool) {
		taken := l.a.udp(Options{Bind: netipPort(addrA[six], 6080)})
		check := func(what string, open func() (*Socket, error), is error, says ...string) {
			t.Helper()
			l.a.Do(func() error {
				s, err := open()
				if err == nil {
					s.Close()
					t.Errorf("%s: opened", what)
					return nil
				}
				if is != nil && !errors.Is(err, is) {
					t.Errorf("%s: %v, want %v", what, err, is)
				}
				for _, w := range says {
					if !strings.Contains(err.Error(), w) {
						t.Errorf("%s: %q does not say %q", what, err, w)
					}
				}
				return nil
			})
		}
		check("busy port", func() (*Socket, error) { return ListenUDP(Options{Bind: taken.Local()}) },
			unix.EADDRINUSE, "6080", addrA[six].String())
		check("busy source port", func() (*Socket, error) { return OpenSender(Options{Bind: taken.Local()}) },
			unix.EADDRINUSE, "6080")
		check("foreign address", func() (*Socket, error) { return ListenUDP(Options{Bind: netipPort(addrB[six], 6080)}) },
			unix.EADDRNOTAVAIL, addrB[six].String(), "not an address of this host")
		check("foreign address, raw", func() (*Socket, error) { return ListenRaw(addrB[six], 4, Options{}) },
			unix.EADDRNOTAVAIL, addrB[six].String())
		check("no address", func() (*Socket, error) { return ListenUDP(Options{}) }, nil, "no address")
		check("protocol", func() (*Socket, error) { return ListenRaw(addrA[six], 47, Options{}) }, nil, "47")
	})
}

// Several sockets share a port only when all of them say so.
func TestReusePort(t *testing.T) {
	l := newLink(t, 1500)
	eachFamily(t, func(t *testing.T, six bool) {
		o := Options{Bind: netipPort(addrA[six], 6080), ReusePort: true, Mark: 7}
		first, second := l.a.udp(o), l.a.udp(o)
		if first.Local() != second.Local() {
			t.Errorf("%v and %v", first.Local(), second.Local())
		}
		if mark, err := sys.GetInt(first.fd, unix.SOL_SOCKET, unix.SO_MARK, "SO_MARK"); mark != 7 || err != nil {
			t.Errorf("mark %d, %v", mark, err)
		}
	})
}

// Buffers go past the host's limit, because root may.
func TestBuffers(t *testing.T) {
	h := newHost(t)
	s := h.udp(Options{Bind: netipPort(mustAddr("127.0.0.1"), 0), RecvBuf: 64 << 20, SendBuf: 32 << 20})
	if recv, send := s.Buffers(); recv != 128<<20 || send != 64<<20 {
		t.Errorf("buffers of %d and %d bytes", recv, send)
	}
}

// A send-only socket takes nothing in, sends trains, and sees errors.
func TestSender(t *testing.T) {
	l := newLink(t, 1500)
	eachFamily(t, func(t *testing.T, six bool) {
		from := l.a.open(func() (*Socket, error) { return OpenSender(Options{Bind: netipPort(addrA[six], 50000)}) })
		to := l.b.udp(Options{Bind: netipPort(addrB[six], 0)})
		if from.Local().Port() != 50000 {
			t.Errorf("sends from %v", from.Local())
		}
		sendTrain(t, from, to, NewDest(to.Local()), 100, 10)

		b := NewSendBatch(1, 1)
		b.Begin(NewDest(from.Local()), 0)
		b.Append([]byte("go away"))
		b.End(0)
		if _, err := to.Send(b); err != nil {
			t.Fatal(err)
		}
		b.Begin(NewDest(netipPort(addrB[six], 9)), 0)
		b.Append([]byte("nobody"))
		b.End(0)
		if _, err := from.Send(b); err != nil {
			t.Fatal(err)
		}
		timer := wakeLater(from)
		defer timer.Stop()
		// The datagram came first: had it been let in, Recv below would find it.
		if _, err := from.Wait(); err != sys.ErrErrQueue {
			t.Fatalf("Wait: %v, want the error queue", err)
		}
		if n, err := from.Recv(NewRecvBatch(1, 100)); err != sys.ErrAgain {
			t.Errorf("took in %d messages, %v", n, err)
		}
		if n, err := from.DrainErrors(func(Err) {}); n != 1 || err != nil {
			t.Errorf("error queue: %d, %v", n, err)
		}
	})
}

// Close may be called again, and counters read after it.
func TestCloseTwice(t *testing.T) {
	h := newHost(t)
	s := h.udp(Options{Bind: netipPort(mustAddr("127.0.0.1"), 0)})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if s.Overflows() != 0 {
		t.Error("closed socket counts")
	}
}

// The kernel promises no order of control messages, and may add some that nobody asked for.
func TestControlInAnyOrder(t *testing.T) {
	word := func(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
	messages := []struct {
		level, kind int
		data        []byte
	}{
		{unix.SOL_UDP, unix.UDP_GRO, word(1400)},
		{unix.SOL_IP, unix.IP_TOS, []byte{0xb9}},
		{unix.SOL_SOCKET, unix.SO_RXQ_OVFL, word(7)},
		{unix.SOL_SOCKET, unix.SO_TIMESTAMP, make([]byte, 16)},
	}
	var permute func(done []int)
	permute = func(done []int) {
		if len(done) == len(messages) {
			var c []byte
			for _, i := range done {
				m := messages[i]
				c = sys.AppendControl(c, m.level, m.kind, m.data)
			}
			s := &Socket{}
			if m := s.control(c); m != (recvMeta{segment: 1400, tos: 0xb9}) || s.overflows.Load() != 7 {
				t.Errorf("in the order %v: %+v, %d overflows", done, m, s.overflows.Load())
			}
			return
		}
		for i := range messages {
			if !slices.Contains(done, i) {
				permute(append(slices.Clip(done), i))
			}
		}
	}
	permute(nil)
}
