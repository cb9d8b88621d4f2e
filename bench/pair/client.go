package pair

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/bench/traffic"
)

// client is Run's side of a control connection.
type client struct {
	*control
	from, to netip.AddrPort // from without port
	welcome  welcome
	rtt      time.Duration // of the control connection, with what the server took to answer
	trip     time.Duration // the least round trip of the control connection, by the kernel's clock
	began    time.Time

	sending   sync.Mutex // an order
	measuring bool       // the server has a job
	unread    int        // reports that nobody has read: those to keepAlive
	lost      error      // why the connection is of no use any more; nil: it is
}

// isEOF reports whether the other end closed the connection.
func isEOF(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)
}

// split splits an address, with the default port where it has none.
func split(address string) (host, port string) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return strings.Trim(address, "[]"), strconv.Itoa(DefaultPort)
	}
	return host, port
}

// checkHost refuses what is no address of a server: its port, or a link-local address without the interface that leads to it.
func checkHost(address string) error {
	host, port := split(address)
	if n, err := net.LookupPort("tcp", port); err != nil || n == 0 {
		return fmt.Errorf("host %q: %q is no port: want HOST or HOST:PORT, with a port from 1 to 65535, such as 10.0.0.7:%d", address, port, DefaultPort)
	}
	if a, err := netip.ParseAddr(host); err == nil && a.Is6() && a.IsLinkLocalUnicast() && a.Zone() == "" {
		return fmt.Errorf("host %q is a link-local address: name this host's interface that leads to it, too, such as %s%%eth0", address, a)
	}
	return nil
}

// unreached says what to look at where no connection came about.
func unreached(err error, six bool, host, port string) error {
	if _, nowhere := errors.AsType[*net.DNSError](err); nowhere {
		return fmt.Errorf("find the address of %q: %w", host, err)
	}
	if _, other := errors.AsType[*net.AddrError](err); other && six {
		return fmt.Errorf("%w: %s has no IPv6 address: leave --six out, or name one", err, host)
	}
	if a, bad := netip.ParseAddr(host); bad == nil && a.Zone() != "" {
		if _, bad := net.InterfaceByName(a.Zone()); bad != nil {
			return fmt.Errorf("%w: has this host an interface %q?", err, a.Zone())
		}
	}
	return fmt.Errorf("%w: is `tulle bench serve` running there, and is TCP and UDP port %s open?", err, port)
}

// dial opens a control connection, from an address of this host if from is one.
func dial(ctx context.Context, o *RunOptions, from netip.Addr) (*client, error) {
	host, port := split(o.Host)
	network := "tcp"
	if o.Six {
		network = "tcp6"
	}
	d := net.Dialer{Timeout: patience}
	if from.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
	}
	conn, err := d.DialContext(ctx, network, net.JoinHostPort(host, port))
	if err != nil {
		return nil, unreached(err, o.Six, host, port)
	}
	c := &client{control: newControl(conn), to: addrPort(conn.RemoteAddr()), from: netip.AddrPortFrom(addrPort(conn.LocalAddr()).Addr(), 0)}
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if err := c.enter(o.Token); err != nil {
		conn.Close()
		return nil, fmt.Errorf("%v: %w", c.to, err)
	}
	return c, nil
}

// goodbye ends the run and waits until the server has ended it: it takes another one then.
func (c *client) goodbye() {
	if t, ok := c.conn.(*net.TCPConn); ok && t.CloseWrite() == nil {
		_ = c.conn.SetReadDeadline(time.Now().Add(patience))
		_, _ = io.Copy(io.Discard, c.conn)
	}
}

// enter asks to be admitted.
func (c *client) enter(token string) error {
	if _, err := c.conn.Write(appendPreamble(nil, kindControl, secret{}, 0)); err != nil {
		return err
	}
	var g greeting
	start := time.Now()
	if err := c.receive(&g, patience); err != nil {
		if isEOF(err) {
			return fmt.Errorf("it closed the connection without a word: it is no `tulle bench serve`, or so many connect to it that the oldest give way, as its log says then: %w", err)
		}
		return fmt.Errorf("what answers there is no `tulle bench serve`: %w", err)
	}
	c.rtt = time.Since(start)
	if g.Version != version {
		return fmt.Errorf("the server speaks version %d of the protocol, and this program version %d: use the same tulle at both ends", g.Version, version)
	}
	if g.Token && token == "" {
		return errors.New("the server wants a token (--token-file)")
	}
	if err := c.send(hello{Proof: proof(token, g.Nonce)}); err != nil {
		return err
	}
	if err := c.receive(&c.welcome, patience); err != nil {
		return err
	}
	if c.welcome.Error != "" {
		return errors.New(result.Printable(c.welcome.Error))
	}
	c.trip, c.began = leastTrip(c.conn), time.Now()
	return nil
}

// leastTrip is the least round trip that the kernel has seen on a connection; 0 if it does not say.
func leastTrip(conn net.Conn) (least time.Duration) {
	t, ok := conn.(*net.TCPConn)
	if !ok {
		return 0
	}
	raw, err := t.SyscallConn()
	if err != nil {
		return 0
	}
	_ = raw.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO); err == nil && info.Min_rtt < math.MaxUint32 { // none yet
			least = time.Duration(info.Min_rtt) * time.Microsecond
		}
	})
	return least
}

// serverError is what the server says when it ends a run.
type serverError string

func (e serverError) Error() string { return "the server: " + result.Printable(string(e)) }

// order sends an order and awaits its report, as long as the server waits for an order: packets may be lost for some seconds.
func (c *client) order(do string, flows int) (report, error) {
	if c.lost != nil {
		return report{}, c.lost
	}
	c.sending.Lock()
	before := c.unread
	c.unread, c.measuring = 0, c.measuring && do != "stop"
	err := c.send(order{Do: do, Flows: flows})
	c.sending.Unlock()
	if err != nil {
		c.lost = fmt.Errorf("the server has gone: %w", err)
		return report{}, c.lost
	}
	var r report
	for range before + 1 {
		r = report{}
		if err := c.receive(&r, idleLimit); err != nil {
			switch {
			case isEOF(err) && time.Since(c.began).Seconds() < c.welcome.MaxTime-patience.Seconds():
				err = fmt.Errorf("the server has closed the connection, as one does that is stopped: %w", err)
			case isEOF(err):
				err = fmt.Errorf("the server ended the run (it allows %.0f s): %w", c.welcome.MaxTime, err)
			case errors.Is(err, os.ErrDeadlineExceeded):
				err = fmt.Errorf("the server has not answered for %v: %w", idleLimit, err)
			}
			c.lost = err
			return report{}, err
		}
		if r.Error != "" {
			return report{}, serverError(r.Error)
		}
	}
	c.sending.Lock()
	c.measuring = do != "stop"
	c.sending.Unlock()
	return r, nil
}

// keepAlive shows the server that the client is there, until stop: a server takes silence for the end, and a measure may need no
// order for longer than that. It asks for what was counted, which every server answers. The next order reads the answers.
func (c *client) keepAlive() (stop func()) {
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(idleLimit / 3)
		defer tick.Stop()
		for {
			select {
			case <-end:
				return
			case <-tick.C:
			}
			c.sending.Lock()
			if c.measuring && c.send(order{Do: "count"}) == nil {
				c.unread++
			}
			c.sending.Unlock()
		}
	}()
	return func() {
		close(end)
		<-ended
	}
}

// answerWait is how long a datagram's answer may take.
func (c *client) answerWait() time.Duration {
	return min(max(traffic.ReadTimeout, 10*c.rtt), time.Second)
}

// deafError means that no datagram is answered at all, whatever its size.
type deafError string

func (e deafError) Error() string { return string(e) }

// flow opens a UDP flow of the current job. The caller closes fd.
func (c *client) flow(ctx context.Context, number int) (fd, buffer int, err error) {
	for range 6 {
		if ctx.Err() != nil {
			return -1, 0, ctx.Err()
		}
		fd, buffer, err = traffic.Socket(c.from, unix.SOCK_DGRAM)
		if err != nil {
			return -1, 0, fmt.Errorf("UDP socket: %w", err)
		}
		if err = unix.Connect(fd, traffic.Sockaddr(c.to)); err != nil {
			unix.Close(fd)
			return -1, 0, fmt.Errorf("UDP to %v: %w", c.to, err)
		}
		if c.greet(fd, number) {
			wait := unix.NsecToTimeval(int64(c.answerWait()))
			return fd, buffer, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait)
		}
		unix.Close(fd)
	}
	return -1, 0, deafError(fmt.Sprintf("no answer to UDP datagrams from %v to %v: is UDP port %d open, and does the server see them come from the address that it sees for TCP?", c.from.Addr(), c.to, c.to.Port()))
}

// greet sends a flow's first datagram and awaits the answer.
func (c *client) greet(fd, number int) bool {
	out, in := appendPreamble(nil, kindHello, c.welcome.Secret, number), make([]byte, 2*preambleSize)
	for deadline := time.Now().Add(helloWait + 2*c.rtt); time.Now().Before(deadline); {
		_, _ = unix.Write(fd, out) // what is lost is sent again
		n, err := unix.Read(fd, in)
		if err != nil {
			continue
		}
		if kind, s, _, err := parsePreamble(in[:n]); err == nil && kind == kindWelcome && s == c.welcome.Secret {
			return true
		}
	}
	return false
}

// stream opens a data connection of the current job. The caller closes fd.
func (c *client) stream(number int) (int, error) {
	fd, err := traffic.Dial(c.from, traffic.Sockaddr(c.to))
	if err != nil {
		return -1, fmt.Errorf("connect to %v: %w", c.to, err)
	}
	if _, err = unix.Write(fd, appendPreamble(nil, kindData, c.welcome.Secret, number)); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// sinkFlows starts a job that counts datagrams and opens its flows. close ends them.
func (c *client) sinkFlows(ctx context.Context, n int) (flows []*ipv4.PacketConn, closeAll func(), err error) {
	closeAll = func() {
		for _, f := range flows {
			f.Close()
		}
	}
	if _, err = c.order(jobSink, n); err != nil {
		return nil, nil, err
	}
	for i := range n {
		fd, _, err := c.flow(ctx, i)
		if err != nil {
			closeAll()
			return nil, nil, err
		}
		conn, err := traffic.PacketConn(fd)
		if err != nil {
			closeAll()
			return nil, nil, err
		}
		flows = append(flows, conn)
	}
	return flows, closeAll, nil
}

// copies of each datagram go out when the path MTU is looked for: one that is lost by chance is not too large.
const copies = 3

// pathMTU finds the largest packet that is answered, in bytes of IP. Datagrams go out with the don't-fragment bit, and
// without regard to what the kernel knows of the path.
func (c *client) pathMTU(ctx context.Context, link int) (int, error) {
	defer c.keepAlive()()
	fd, _, err := c.flow(ctx, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	headers, least := 28, 576
	level, opt, probe := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE
	if c.to.Addr().Is6() {
		headers, least = 48, 1280
		level, opt, probe = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE
	}
	if err := unix.SetsockoptInt(fd, level, opt, probe); err != nil {
		return 0, fmt.Errorf("don't-fragment bit: %w", err)
	}
	passes := func(size int) bool {
		out, in := make([]byte, size-headers), make([]byte, 1<<16)
		for range 4 {
			for range copies {
				if _, err := unix.Write(fd, out); err == unix.EMSGSIZE {
					if _, err = unix.Write(fd, out); err == unix.EMSGSIZE { // the first may be a router's answer to a larger one
						return false
					}
				}
			}
			for {
				n, err := unix.Read(fd, in)
				if ctx.Err() != nil {
					return false
				}
				if err == unix.EINTR {
					continue
				}
				if err != nil {
					break
				}
				if n == len(out) {
					return true
				}
			}
		}
		return false
	}
	high := min(max(link, least), 65535)
	if passes(high) {
		return high, nil
	}
	if !passes(least) && ctx.Err() == nil {
		return 0, fmt.Errorf("packets of %d bytes from %v to %v are not answered", least, c.from.Addr(), c.to)
	}
	for low := least; ctx.Err() == nil; {
		if high-low <= 1 {
			return low, nil
		}
		if middle := (low + high) / 2; passes(middle) {
			low = middle
		} else {
			high = middle
		}
	}
	return 0, ctx.Err()
}
