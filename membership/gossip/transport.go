package gossip

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// transport is the UDP and TCP sockets of a host's gossip addresses. It differs from
// memberlist.NetTransport in that it counts bytes, reads packets into one
// buffer (NetTransport allocates 64 KiB for each), dials from the address that
// it is bound to, reaches a member by whichever of its addresses works, and ends
// every connection when it is shut down.
type transport struct {
	addr    netip.AddrPort            // the one that the others are told
	socks   []*sock                   // that of addr first, then at most one of the other family
	allow   func(netip.AddrPort) bool // nil: everybody
	traffic *traffic
	// reach gives the addresses to try for a member, best first; name is "" if it is not known. nil: the one given.
	reach func(name string, addr netip.AddrPort) []netip.AddrPort
	// doubt reports that a member may not get what is sent to its first address, though nothing says so: it gets datagrams at all of them.
	doubt func(name string) bool

	via atomic.Pointer[transport] // sends what this one is given, while the address changes

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu     sync.Mutex
	extra  map[netip.Addr]*sock // addresses that the host has for a while: only listened at
	serves *served              // what the sockets are read for; nil before serve
	conns  map[*countedConn]struct{}
	idle   *sync.Cond         // signalled when conns shrinks
	from   map[netip.Addr]int // accepted streams that are open, by peer
	open   int                // sum of from
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

// sock is the two sockets of one address.
type sock struct {
	addr netip.AddrPort
	udp  *net.UDPConn
	tcp  *net.TCPListener
}

func bind(addr netip.AddrPort) (*sock, error) {
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
	return &sock{addr, udp, tcp}, nil
}

func (s *sock) close() {
	s.udp.Close()
	s.tcp.Close()
}

// served is what a transport's sockets are read for.
type served struct {
	packet func(b []byte, from net.Addr, at time.Time)
	stream func(net.Conn)
}

// listen binds the sockets. Nothing is read from them before serve.
func listen(addr netip.AddrPort, tr *traffic, allow func(netip.AddrPort) bool) (*transport, error) {
	s, err := bind(addr)
	if err != nil {
		return nil, err
	}
	t := &transport{
		addr: addr, socks: []*sock{s}, allow: allow, traffic: tr,
		extra: map[netip.Addr]*sock{}, conns: map[*countedConn]struct{}{}, from: map[netip.Addr]int{},
	}
	t.idle = sync.NewCond(&t.mu)
	t.ctx, t.cancel = context.WithCancel(context.Background())
	return t, nil
}

// add binds an address of the other family, to send from as well. It is called before serve.
func (t *transport) add(addr netip.Addr) error {
	if t.sockFor(addr) != nil {
		return nil
	}
	s, err := bind(netip.AddrPortFrom(addr, t.addr.Port()))
	if err == nil {
		t.socks = append(t.socks, s)
	}
	return err
}

// sockFor is the socket to send from to an address: that of its family, or nil.
func (t *transport) sockFor(to netip.Addr) *sock {
	for _, s := range t.socks {
		if s.addr.Addr().Is4() == to.Unmap().Is4() {
			return s
		}
	}
	return nil
}

// setExtra listens at these addresses beside those that it sends from, and at no others. It returns the first error; what can be
// bound is.
func (t *transport) setExtra(addrs []netip.Addr) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for a, s := range t.extra {
		if !slices.Contains(addrs, a) {
			s.close()
			delete(t.extra, a)
		}
	}
	var first error
	for _, a := range addrs {
		if t.ctx.Err() != nil || t.extra[a] != nil || slices.ContainsFunc(t.socks, func(s *sock) bool { return s.addr.Addr() == a }) {
			continue
		}
		s, err := bind(netip.AddrPortFrom(a, t.addr.Port()))
		if err != nil {
			if first == nil {
				first = err
			}
			continue
		}
		t.extra[a] = s
		if t.serves != nil {
			t.read(s)
		}
	}
	return first
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
	t.mu.Lock()
	defer t.mu.Unlock()
	t.serves = &served{packet, stream}
	for _, s := range t.socks {
		t.read(s)
	}
	for _, s := range t.extra {
		t.read(s)
	}
}

// read starts the readers of a socket; they end when it is closed.
func (t *transport) read(s *sock) {
	t.wg.Go(func() { t.readPackets(s.udp, t.serves.packet) })
	t.wg.Go(func() { t.accept(s.tcp, t.serves.stream) })
}

func (t *transport) readPackets(udp *net.UDPConn, packet func([]byte, net.Addr, time.Time)) {
	buf := make([]byte, maxPacket)
	for {
		n, from, err := udp.ReadFromUDPAddrPort(buf)
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

func (t *transport) accept(tcp *net.TCPListener, stream func(net.Conn)) {
	for delay := time.Millisecond; ; {
		conn, err := tcp.AcceptTCP()
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
func (t *transport) write(b []byte, to string) (time.Time, error) { return t.writeTo(b, "", to) }

// exactly is an address to which alone a datagram goes, whatever other addresses its member has.
type exactly netip.AddrPort

const exactlyMark = "!" // behind the address: memberlist passes on what it gets, and looks no further than the last colon

func (exactly) Network() string  { return "udp" }
func (a exactly) String() string { return netip.AddrPort(a).String() + exactlyMark }

// writeTo sends one datagram to a member: to the first of its addresses to which the host can send.
func (t *transport) writeTo(b []byte, name, to string) (time.Time, error) {
	if via := t.via.Load(); via != nil {
		return via.writeTo(b, name, to)
	}
	to, exact := strings.CutSuffix(to, exactlyMark)
	dst, err := netip.ParseAddrPort(to)
	if err != nil {
		return time.Time{}, err
	}
	if exact {
		return time.Now(), t.send(b, unmapPort(dst))
	}
	all := t.doubt != nil && t.doubt(name)
	for i, a := range t.addrsOf(name, unmapPort(dst)) {
		if e := t.send(b, a); e == nil || i == 0 {
			err = e
		}
		if err == nil && !all {
			break
		}
	}
	return time.Now(), err
}

// addrsOf are the addresses to try for a member, at least one.
func (t *transport) addrsOf(name string, dst netip.AddrPort) []netip.AddrPort {
	if t.reach != nil {
		return t.reach(name, dst)
	}
	return []netip.AddrPort{dst}
}

func (t *transport) send(b []byte, dst netip.AddrPort) error {
	if !t.allows(dst) {
		return nil // lost, as packets are
	}
	s := t.sockFor(dst.Addr())
	if s == nil {
		return t.noFamily("udp", dst)
	}
	if _, err := s.udp.WriteToUDPAddrPort(b, dst); err != nil {
		return err
	}
	t.traffic.sent.Add(uint64(len(b)))
	t.traffic.packetsSent.Add(1)
	for n := uint64(len(b)); ; {
		if old := t.traffic.largest.Load(); n <= old || t.traffic.largest.CompareAndSwap(old, n) {
			return nil
		}
	}
}

func (t *transport) noFamily(network string, dst netip.AddrPort) error {
	return &net.OpError{Op: "dial", Net: network, Addr: net.UDPAddrFromAddrPort(dst), Err: syscall.EAFNOSUPPORT}
}

// dialTimeout bounds how long a silent address is tried: three of the kernel's attempts.
const dialTimeout = 4 * time.Second

// dial opens a stream from the bound address.
func (t *transport) dial(to string, timeout time.Duration) (net.Conn, error) {
	return t.dialTo("", to, timeout)
}

// dialTo opens a stream to a member, to the first of its addresses that takes it.
func (t *transport) dialTo(name, to string, timeout time.Duration) (net.Conn, error) {
	dst, err := netip.ParseAddrPort(to)
	if err != nil {
		return nil, err
	}
	for i, a := range t.addrsOf(name, unmapPort(dst)) {
		conn, e := t.connect(a, min(timeout, dialTimeout))
		if e == nil {
			return conn, nil
		}
		if i == 0 {
			err = e
		}
	}
	return nil, err
}

func (t *transport) connect(dst netip.AddrPort, timeout time.Duration) (net.Conn, error) {
	if !t.allows(dst) {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(dst), Err: syscall.EHOSTUNREACH}
	}
	s := t.sockFor(dst.Addr())
	if s == nil {
		return nil, t.noFamily("tcp", dst)
	}
	d := net.Dialer{Timeout: timeout, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(s.addr.Addr(), 0))}
	conn, err := d.DialContext(t.ctx, "tcp", dst.String())
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
	for _, s := range t.extra {
		s.close()
	}
	t.mu.Unlock()
	for _, s := range t.socks {
		s.close()
	}
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
