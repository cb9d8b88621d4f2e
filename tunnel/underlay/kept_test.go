package underlay

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/internal/testing/namespace"
)

// A socket that an earlier run has left is taken with the packets that wait in it, and only where a new one would be the same.
func TestKept(t *testing.T) {
	ns := namespace.New(t)
	ns.Do(func() error { keptSockets(t); return nil })
}

func keptSockets(t *testing.T) {
	lo := netip.MustParseAddr("127.0.0.1")
	open := func(o Options) *Socket {
		t.Helper()
		s, err := ListenUDP(o)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	first := open(Options{Bind: netip.AddrPortFrom(lo, 6080)})
	raw, err := ListenRaw(lo, ProtoIPv4, Options{})
	if err != nil {
		t.Fatal(err)
	}
	six := netip.AddrPortFrom(netip.MustParseAddr("::1"), 6082)
	var fds []int
	for _, s := range []*Socket{first, raw, open(Options{Bind: six})} {
		fd, err := sys.Dup(s.FD())
		if err != nil {
			t.Fatal(err)
		}
		fds = append(fds, fd)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	out := open(Options{Bind: netip.AddrPortFrom(lo, 0)})
	defer out.Close()
	if err := unix.Sendto(out.FD(), []byte("waiting"), 0, &unix.SockaddrInet4{Port: 6080, Addr: lo.As4()}); err != nil {
		t.Fatal(err)
	}

	kept := NewKept(fds)
	for _, o := range []Options{
		{Bind: netip.AddrPortFrom(lo, 6081), Kept: kept},                         // another port
		{Bind: netip.AddrPortFrom(lo.Next(), 6080), Kept: kept},                  // another address
		{Bind: netip.AddrPortFrom(netip.MustParseAddr("::1"), 6080), Kept: kept}, // another family
	} {
		open(o).Close()
	}
	if other, err := ListenRaw(lo, ProtoIPv6, Options{Kept: kept}); err != nil {
		t.Error(err)
	} else {
		other.Close()
	}
	if kept.Len() != 3 {
		t.Fatalf("%d sockets are left, want all: none of these was the same", kept.Len())
	}
	again := open(Options{Bind: netip.AddrPortFrom(lo, 6080), Kept: kept})
	defer again.Close()
	receive(t, again, NewRecvBatch(1, MaxMessage), 1, func(_ int, r Received) {
		if string(r.Data) != "waiting" {
			t.Errorf("the kept socket has %q; want the packet that waited", r.Data)
		}
	})
	defer open(Options{Bind: six, Kept: kept}).Close()
	if kept.Len() != 1 {
		t.Errorf("%d sockets are left, want the raw one", kept.Len())
	}
	if err := kept.Close(); err != nil || kept.Len() != 0 {
		t.Errorf("Close: %v, %d left", err, kept.Len())
	}
}
