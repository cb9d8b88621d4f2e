package sys

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestEvent(t *testing.T) {
	e, err := NewEvent()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if e.Clear() {
		t.Error("new event is signalled")
	}
	e.Signal()
	e.Signal()
	if !e.Clear() {
		t.Error("signal was lost")
	}
	if e.Clear() {
		t.Error("two signals did not add up into one")
	}
}

func pipe(t *testing.T) (r, w int) {
	t.Helper()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(p[0]); unix.Close(p[1]) })
	return p[0], p[1]
}

func TestPause(t *testing.T) {
	r, w := pipe(t)
	p, err := NewPoller(r)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if _, err := unix.Write(w, []byte("x")); err != nil {
		t.Fatal(err)
	}
	const d = 20 * time.Millisecond
	start := time.Now()
	for n := 0; time.Since(start) < d; n++ {
		if n == 100 { // signals may cut some short
			t.Fatalf("100 pauses of %v took %v, with a readable descriptor", d, time.Since(start))
		}
		p.Pause(d)
	}
	p.Wake()
	p.Pause(time.Hour)
	if _, err := p.WaitRead(); err != ErrWoken {
		t.Errorf("wait after a pause that Wake ended: %v, want ErrWoken", err)
	}
	if _, err := p.WaitRead(); err != nil {
		t.Errorf("wait on a readable pipe: %v", err)
	}
}

func TestPoller(t *testing.T) {
	r, w := pipe(t)
	p, err := NewPoller(r)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()

	p.Wake() // before the wait
	if _, err := p.WaitRead(); err != ErrWoken {
		t.Errorf("wait after Wake: %v, want ErrWoken", err)
	}
	if _, err := unix.Write(w, []byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := p.WaitRead(); err != nil {
		t.Errorf("wait on a readable pipe: %v", err)
	}
	p.Wake()
	if _, err := p.WaitRead(); err != ErrWoken {
		t.Errorf("wait with both: %v, want ErrWoken first", err)
	}
	var buf [8]byte
	if n, err := Read(r, buf[:]); n != 1 || err != nil {
		t.Errorf("Read: %d, %v", n, err)
	}
	if _, err := Read(r, buf[:]); err != ErrAgain {
		t.Errorf("Read of an empty pipe: %v, want ErrAgain", err)
	}

	// During the wait, many times, so that both orders happen.
	var wg sync.WaitGroup
	for range 200 {
		wg.Go(func() {
			if _, err := p.WaitRead(); err != ErrWoken {
				t.Errorf("wait ended by Wake: %v", err)
			}
		})
		p.Wake()
		wg.Wait()
	}
}

func TestPollerBadDescriptor(t *testing.T) {
	p, err := NewPoller(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if _, err := p.WaitRead(); !errors.Is(err, unix.EBADF) {
		t.Errorf("wait on no descriptor: %v, want EBADF", err)
	}
}

func TestWaitWriteTimesOut(t *testing.T) {
	r, w := pipe(t)
	junk := make([]byte, 4096)
	for {
		if _, err := unix.Write(w, junk); err == unix.EAGAIN {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	const d = 20 * time.Millisecond
	start := time.Now()
	for n := 0; time.Since(start) < d; n++ {
		if n == 100 { // signals may cut some short
			t.Fatalf("100 waits of %v for room in a full pipe took %v", d, time.Since(start))
		}
		if err := WaitWrite(w, int(d/time.Millisecond)); err != nil {
			t.Fatal(err)
		}
	}
	if n := testing.AllocsPerRun(5, func() { WaitWrite(w, 1) }); n != 0 {
		t.Errorf("%v allocations a wait", n)
	}
	unix.Read(r, junk)
	start = time.Now()
	if err := WaitWrite(w, 30_000); err != nil {
		t.Error(err)
	}
	if waited := time.Since(start); waited > 25*time.Second {
		t.Errorf("did not see room for %v", waited)
	}
}

func TestIovWriter(t *testing.T) {
	r, w := pipe(t)
	var v IovWriter
	n, err := v.Write(w, [][]byte{[]byte("ab"), nil, []byte("c"), {}, []byte("def")})
	if n != 6 || err != nil {
		t.Fatalf("Write: %d, %v", n, err)
	}
	var buf [16]byte
	if n, _ := Read(r, buf[:]); string(buf[:n]) != "abcdef" {
		t.Errorf("read %q", buf[:n])
	}
	many := make([][]byte, maxIovecs+1)
	for i := range many {
		many[i] = buf[:1]
	}
	if n, err := v.Write(w, many[:maxIovecs]); n != maxIovecs || err != nil {
		t.Errorf("Write of %d slices: %d, %v", maxIovecs, n, err)
	}
	if _, err := v.Write(w, many); err != unix.EINVAL {
		t.Errorf("Write of %d slices: %v, want EINVAL", len(many), err)
	}
}

func TestControl(t *testing.T) {
	var b []byte
	b = AppendControl(b, unix.SOL_UDP, unix.UDP_SEGMENT, []byte{1, 2})
	if len(b) != ControlSpace(2) {
		t.Errorf("control message has %d bytes, want %d", len(b), ControlSpace(2))
	}
	b = AppendControl(b, unix.SOL_IP, unix.IP_TOS, []byte{3, 4, 5, 6})
	want, err := unix.ParseSocketControlMessage(b) // the slow oracle
	if err != nil || len(want) != 2 {
		t.Fatalf("x/sys/unix reads %d messages: %v", len(want), err)
	}
	rest := b
	for i, w := range want {
		var c Control
		var ok bool
		if c, rest, ok = NextControl(rest); !ok {
			t.Fatalf("message %d not found", i)
		}
		if c.Level != int(w.Header.Level) || c.Type != int(w.Header.Type) || !bytes.Equal(c.Data, w.Data) {
			t.Errorf("message %d: %+v, want %+v", i, c, w)
		}
	}
	if _, _, ok := NextControl(rest); ok {
		t.Error("found a third message")
	}
}

func FuzzNextControl(f *testing.F) {
	f.Add(AppendControl(nil, 1, 2, []byte("abc")))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0, 1, 0, 0, 0})
	f.Add(make([]byte, 16))
	f.Fuzz(func(t *testing.T, b []byte) {
		total := 0
		for c, rest, ok := NextControl(b); ok; c, rest, ok = NextControl(rest) {
			if total += cmsgHdrLen + len(c.Data); total > len(b) {
				t.Fatalf("messages have %d bytes, input %d", total, len(b))
			}
		}
	})
}

func TestSockaddr(t *testing.T) {
	for _, s := range []string{"192.0.2.1:6080", "[2001:db8::1]:65535", "0.0.0.0:0", "[::]:1"} {
		want := netip.MustParseAddrPort(s)
		b := AppendSockaddr(nil, want)
		if got, ok := ParseSockaddr(b); !ok || got != want {
			t.Errorf("%s came back as %v, %v", s, got, ok)
		}
		for i := range b {
			if _, ok := ParseSockaddr(b[:i]); ok {
				t.Errorf("%s: %d of %d bytes were taken", s, i, len(b))
			}
		}
	}
	if b := AppendSockaddr(nil, netip.MustParseAddrPort("[fe80::1%7]:9")); binary.NativeEndian.Uint32(b[24:]) != 7 {
		t.Errorf("scope is not encoded: %x", b)
	}
	if _, ok := ParseSockaddr([]byte{0xff, 0xff, 0, 0}); ok {
		t.Error("unknown family was taken")
	}
}

// No more waits keep a processor than there are to spare, and none before its descriptor is active or long after: other goroutines
// always find one.
func TestHotWaitsAreBounded(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(runtime.NumCPU() + 2))
	var pollers []*Poller
	for range 5 {
		from, _ := pipe(t)
		p, err := NewPoller(from)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close() })
		if p.claim() {
			t.Fatal("a wait before any packet keeps a processor")
		}
		p.active = true
		pollers = append(pollers, p)
	}
	hot := 0
	for _, p := range pollers {
		if p.claim() {
			hot++
		}
	}
	if hot != 2 {
		t.Errorf("%d waits keep a processor, and 2 are to spare", hot)
	}
	hotWaits.Add(-int32(hot))
	var work sync.WaitGroup
	var begun atomic.Int32
	for _, p := range pollers {
		work.Go(func() {
			begun.Add(1)
			if _, err := p.WaitRead(); err != ErrWoken {
				t.Error(err)
			}
		})
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		waits, n := begun.Load(), hotWaits.Load()
		if waits == int32(len(pollers)) && n == 0 {
			break
		}
		if time.Now().After(end) {
			t.Errorf("%d of %d waits have begun, and %d keep a processor long after the last packet", waits, len(pollers), n)
			break
		}
	}
	for _, p := range pollers {
		p.Wake()
	}
	work.Wait()
}
