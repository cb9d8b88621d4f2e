package lab

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// Pinger sends echo requests from one network namespace, in a lab or not. Several goroutines may use it.
type Pinger struct{ p *pinger }

// NewPinger opens a Pinger in the namespace at path. Close ends it.
func NewPinger(path string) (*Pinger, error) {
	p, err := newPinger(map[string]string{"": path}, DualStack)
	return &Pinger{p}, err
}

// Ping sends one request with the given number of data bytes (ping(8) sends 56) and waits so long for the answer, or until ctx
// ends.
func (p *Pinger) Ping(ctx context.Context, addr netip.Addr, data int, wait time.Duration) (time.Duration, error) {
	pong := p.p.ping(ctx, "", "", addr, data, wait)
	return pong.RTT, pong.Err
}

// SetDontFragment forbids or allows the fragmentation of requests. If it is forbidden, a request above the MTU is an error.
func (p *Pinger) SetDontFragment(on bool) error {
	pair := p.p.conns[""]
	return errors.Join(
		setSockopt(pair[0], unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, discover(on, unix.IP_PMTUDISC_DO, unix.IP_PMTUDISC_WANT)),
		setSockopt(pair[1], unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, discover(on, unix.IPV6_PMTUDISC_DO, unix.IPV6_PMTUDISC_WANT)))
}

func discover(dontFragment bool, do, want int) int {
	if dontFragment {
		return do
	}
	return want
}

func setSockopt(c *net.IPConn, level, opt, value int) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, opt, value) })
	return errors.Join(cerr, err)
}

// Close closes the Pinger and ends pending pings.
func (p *Pinger) Close() { p.p.close() }
