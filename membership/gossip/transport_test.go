package gossip

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"
)

// A stranger who opens many streams gets a few, and does not keep others out; a stream that ends makes room.
func TestStreamsAreBounded(t *testing.T) {
	tr, err := listen(netip.MustParseAddrPort("127.0.0.1:0"), new(traffic), nil)
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan net.Conn, 2*maxStreams)
	tr.serve(func([]byte, net.Addr, time.Time) {}, func(c net.Conn) { accepted <- c })
	held := map[net.Conn]bool{} // as memberlist holds them until it has read its header
	defer func() {
		for c := range held {
			c.Close()
		}
		tr.shutdown()
	}()
	to := tr.socks[0].tcp.Addr().String()
	// open dials n times from one address, and returns how many were taken. The others find themselves closed.
	open := func(from string, n int) (taken int) {
		t.Helper()
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		for range n {
			c, err := d.Dial("tcp", to)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			closed := make(chan error, 1)
			go func() {
				_, err := c.Read(make([]byte, 1))
				closed <- err
			}()
			select {
			case s := <-accepted:
				held[s] = true
				taken++
			case err := <-closed:
				if err == nil || errors.Is(err, net.ErrClosed) {
					t.Fatalf("a stream that was not taken: %v", err)
				}
			case <-time.After(30 * time.Second):
				t.Fatal("a stream is neither taken nor closed")
			}
		}
		return taken
	}
	if n := open("127.0.0.2", maxStreamsFromHost+3); n != maxStreamsFromHost {
		t.Errorf("%d streams of one host are open, want %d", n, maxStreamsFromHost)
	}
	if n := open("127.0.0.3", 1); n != 1 {
		t.Error("another host is kept out")
	}
	for c := range held {
		if c.RemoteAddr().(*net.TCPAddr).IP.String() == "127.0.0.2" {
			c.Close()
			c.Close() // memberlist closes some twice
			delete(held, c)
			break
		}
	}
	if n := open("127.0.0.2", 2); n != 1 {
		t.Errorf("%d streams were taken after one has ended, want 1", n)
	}
	sum := len(held)
	for _, from := range []string{"127.0.0.4", "127.0.0.5", "127.0.0.6", "127.0.0.7"} {
		sum += open(from, maxStreamsFromHost)
	}
	if sum != maxStreams {
		t.Errorf("%d streams are open, want %d", sum, maxStreams)
	}
}

// A member is asked whether it is at an address: nothing goes to its other one, also where datagrams to it are lost.
func TestExactly(t *testing.T) {
	one, other := netip.AddrPortFrom(testAddr(), testPort), netip.AddrPortFrom(testAddr(), testPort)
	var there []*sock
	for _, a := range []netip.AddrPort{one, other} {
		s, err := bind(a)
		if err != nil {
			t.Fatal(err)
		}
		defer s.close()
		there = append(there, s)
	}
	tr, err := listen(netip.AddrPortFrom(testAddr(), testPort), new(traffic), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer tr.shutdown()
	tr.reach = func(string, netip.AddrPort) []netip.AddrPort { return []netip.AddrPort{one, other} }
	tr.doubt = func(string) bool { return true }
	for _, to := range []net.Addr{exactly(one), net.UDPAddrFromAddrPort(one)} {
		if _, err := tr.writeTo([]byte(to.String()), "a member", to.String()); err != nil {
			t.Fatal(err)
		}
	}
	buf := make([]byte, 64)
	for i, want := range []string{exactly(one).String(), one.String()} { // datagrams over loopback stay in order
		n, err := there[i].udp.Read(buf)
		if err != nil || string(buf[:n]) != want {
			t.Errorf("address %d got %q first (%v), want %q", i, buf[:n], err, want)
		}
	}
}
