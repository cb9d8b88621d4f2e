package gossip

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// transport has the UDP and TCP socket of one gossip address. Unlike
// memberlist.NetTransport it counts bytes, reads packets into one buffer (NetTransport
// allocates 64 KiB for each), dials from the bound address, and closes every connection
// at shutdown.
type transport struct {
	addr    netip.AddrPort
	udp     *net.UDPConn
	tcp     *net.TCPListener
	allow   func(netip.AddrPort) bool // nil: all
	traffic *traffic

	sendUDP atomic.Pointer[net.UDPConn] // normally udp; another one while the address changes

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu    sync.Mutex
	conns map[*countedConn]struct{}
	idle  *sync.Cond         // signalled when conns shrinks
	from  map[netip.Addr]int // accepted streams that are open, by peer
	open  int                // sum of from
}

// traffic counts the bytes and packets of all transports of a node since its start.
type traffic struct {
	sent, received, packetsSent, packetsReceived atomic.Uint64
	largest                                      atomic.Uint64 // datagram sent
}

const (
	maxPacket  = 9216    // bytes; larger than any packet of a member
	udpRecvBuf = 2 << 20 // requested bytes; the kernel may grant less

	// Maximum number of accepted streams at the same time, in total and per host. memberlist allocates as much memory for a
	// stream as its header requests (up to 20 MiB) before it knows the sender. A member uses one or two, for milliseconds.
	maxStreams         = 128
	maxStreamsFromHost = 32
)

// listen binds the sockets. It reads nothing; serve does.
func listen(addr netip.AddrPort, tr *traffic, allow func(netip.AddrPort) bool) (*transport, error) {
	tcp, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(addr))
	if err != nil {
		return nil, listenError("TCP", addr, err)
	}
	udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(addr))
	if err != nil {
		tcp.Close()
		return nil, listenError("UDP", addr, err)
	}
	_ = udp.SetReadBuffer(udpRecvBuf) // a smaller one works too
	t := &transport{addr: addr, udp: udp, tcp: tcp, allow: allow, traffic: tr, conns: map[*countedConn]struct{}{}, from: map[netip.Addr]int{}}
	t.idle = sync.NewCond(&t.mu)
	t.sendUDP.Store(udp)
	t.ctx, t.cancel = context.WithCancel(context.Background())
	return t, nil
}

func listenError(proto string, addr netip.AddrPort, err error) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("gossip: %s %v is in use by another process: see `ss -lntup | grep :%d`, or choose another --gossip-port: %w", proto, addr, addr.Port(), err)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fmt.Errorf("gossip: no interface of this host has the address %v (--underlay): %w", addr.Addr(), err)
	}
	return fmt.Errorf("gossip: %w", err)
}

// serve reads both sockets until shutdown. packet gets its own slice. No callback may
// outlive the transport's context.
func (t *transport) serve(packet func(b []byte, from net.Addr, at time.Time), stream func(net.Conn)) {
	t.wg.Go(func() { t.readPackets(packet) })
	t.wg.Go(func() { t.accept(stream) })
}

func (t *transport) readPackets(packet func([]byte, net.Addr, time.Time)) {
	buf := make([]byte, maxPacket)
	for {
		n, from, err := t.udp.ReadFromUDPAddrPort(buf)
		at := time.Now()
		if t.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil || n == 0 {
			continue // an ICMP error about an earlier packet; the socket still works
		}
		t.traffic.received.Add(uint64(n))
		t.traffic.packetsReceived.Add(1)
		if !t.allows(from) {
			continue
		}
		packet(append([]byte(nil), buf[:n]...), net.UDPAddrFromAddrPort(unmapPort(from)), at)
	}
}

func (t *transport) accept(stream func(net.Conn)) {
	for delay := time.Millisecond; ; {
		conn, err := t.tcp.AcceptTCP()
		if t.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			if conn != nil {
				conn.Close()
			}
			return
		}
		if err != nil { // out of descriptors, an aborted connection
			select {
			case <-time.After(delay):
			case <-t.ctx.Done():
				return
			}
			delay = min(2*delay, time.Second)
			continue
		}
		delay = time.Millisecond
		from, _ := conn.RemoteAddr().(*net.TCPAddr)
		if from == nil || !t.allows(from.AddrPort()) {
			conn.Close()
			continue
		}
		if c := t.track(conn, from.AddrPort().Addr().Unmap()); c != nil {
			stream(c)
		}
	}
}

func (t *transport) allows(a netip.AddrPort) bool { return t.allow == nil || t.allow(unmapPort(a)) }

func unmapPort(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// write sends one datagram.
func (t *transport) write(b []byte, to string) (time.Time, error) {
	dst, err := netip.ParseAddrPort(to)
	if err != nil {
		return time.Time{}, err
	}
	dst = unmapPort(dst)
	if !t.allows(dst) {
		return time.Now(), nil // lost, as packets are
	}
	if _, err = t.sendUDP.Load().WriteToUDPAddrPort(b, dst); err == nil {
		t.traffic.sent.Add(uint64(len(b)))
		t.traffic.packetsSent.Add(1)
		for n := uint64(len(b)); ; {
			if old := t.traffic.largest.Load(); n <= old || t.traffic.largest.CompareAndSwap(old, n) {
				break
			}
		}
	}
	return time.Now(), err
}

// dial opens a stream from the bound address.
func (t *transport) dial(to string, timeout time.Duration) (net.Conn, error) {
	dst, err := netip.ParseAddrPort(to)
	if err != nil {
		return nil, err
	}
	if !t.allows(unmapPort(dst)) {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(dst), Err: syscall.EHOSTUNREACH}
	}
	d := net.Dialer{Timeout: timeout, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(t.addr.Addr(), 0))}
	conn, err := d.DialContext(t.ctx, "tcp", to)
	if err != nil {
		return nil, err
	}
	c := t.track(conn, netip.Addr{})
	if c == nil {
		return nil, net.ErrClosed
	}
	return c, nil
}

// track wraps a connection. It closes the connection if the transport is shutting down, or if it is accepted and there are too
// many. from is invalid for a dialled connection.
func (t *transport) track(conn net.Conn, from netip.Addr) *countedConn {
	c := &countedConn{Conn: conn, t: t, from: from}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ctx.Err() != nil || from.IsValid() && (t.open >= maxStreams || t.from[from] >= maxStreamsFromHost) {
		conn.Close()
		return nil
	}
	t.conns[c] = struct{}{}
	if from.IsValid() {
		t.from[from]++
		t.open++
	}
	return c
}

// untrackLocked removes a connection from the list, once.
func (t *transport) untrackLocked(c *countedConn) {
	if _, ok := t.conns[c]; !ok {
		return
	}
	delete(t.conns, c)
	if c.from.IsValid() {
		t.open--
		if t.from[c.from]--; t.from[c.from] == 0 {
			delete(t.from, c.from)
		}
	}
}

// shutdown closes everything. It waits until the readers have ended and all connections
// are released.
func (t *transport) shutdown() {
	t.mu.Lock()
	t.cancel()
	for c := range t.conns {
		c.Conn.Close()
	}
	t.mu.Unlock()
	t.udp.Close()
	t.tcp.Close()
	t.wg.Wait()
	t.mu.Lock()
	for len(t.conns) > 0 {
		t.idle.Wait()
	}
	t.mu.Unlock()
}

// countedConn counts a stream's bytes, and removes itself from the transport's list when
// it is closed.
type countedConn struct {
	net.Conn
	t    *transport
	from netip.Addr // of an accepted one
}

func (c *countedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.t.traffic.received.Add(uint64(n))
	return n, err
}

func (c *countedConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.t.traffic.sent.Add(uint64(n))
	return n, err
}

func (c *countedConn) Close() error {
	c.t.mu.Lock()
	c.t.untrackLocked(c)
	c.t.idle.Broadcast()
	c.t.mu.Unlock()
	return c.Conn.Close()
}
