package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/sys"
)

// Pong is the result of one ping.
type Pong struct {
	From, To string        // targets
	Addr     netip.Addr    // of To
	RTT      time.Duration // 0 if no answer came
	Source   netip.Addr    // source address that arrived at To; the zero Addr if nothing arrived
	Err      error         // why there was no answer
}

const (
	// PingTimeout is how long Ping waits for an answer.
	PingTimeout = time.Second
	// PingPatience is how long PingAll waits for an answer: a busy machine may stand still for longer than PingTimeout, and a late
	// answer is one.
	PingPatience = 10 * time.Second
)

// ICMP and ICMPv6 echo (RFC 792, RFC 4443 §4): type, code, checksum, identifier, sequence number, data. The kernel
// computes ICMPv6 checksums; we compute those of ICMPv4.
const (
	echoRequest4, echoReply4 = 8, 0
	echoRequest6, echoReply6 = 128, 129
	echoHeader               = 8
	echoData                 = 56 // as ping(8) sends
	echoNonce                = 8  // the first of the data
)

// echo is one request that waits for its answer.
type echo struct {
	src     chan netip.Addr // the source that arrived at the far side
	replied chan time.Time
}

// pinger sends echo requests from targets of a lab. The kernels of the targets answer. A raw socket in each target also
// receives the requests and shows the source address that arrived.
type pinger struct {
	conns map[string][2]*net.IPConn // by target; IPv4, IPv6; nil if the lab does not have the family
	wg    sync.WaitGroup

	mu     sync.Mutex
	flying map[uint64]*echo // by the nonce in the request's data
}

// newPinger opens sockets in the namespace of each target. close closes them.
func newPinger(namespaces map[string]string, f Families) (*pinger, error) {
	p := &pinger{conns: map[string][2]*net.IPConn{}, flying: map[uint64]*echo{}}
	for target, path := range namespaces {
		var pair [2]*net.IPConn
		err := sys.WithNetns(path, func() (err error) {
			if f.V4 {
				if pair[0], err = net.ListenIP("ip4:icmp", nil); err != nil {
					return err
				}
			}
			if f.V6 {
				pair[1], err = net.ListenIP("ip6:ipv6-icmp", nil)
			}
			return err
		})
		p.conns[target] = pair
		if err != nil {
			p.close()
			return nil, fmt.Errorf("ICMP socket in %s: %w", target, err)
		}
		for i, c := range pair {
			if c != nil {
				p.wg.Go(func() { p.listen(c, i == 1) })
			}
		}
	}
	return p, nil
}

func (p *pinger) close() {
	for _, pair := range p.conns {
		for _, c := range pair {
			if c != nil {
				c.Close()
			}
		}
	}
	p.wg.Wait()
}

// listen passes received requests and answers to their echoes, until the socket is closed.
func (p *pinger) listen(c *net.IPConn, v6 bool) {
	request, reply := byte(echoRequest4), byte(echoReply4)
	if v6 {
		request, reply = echoRequest6, echoReply6
	}
	buf := make([]byte, 2048)
	for {
		n, from, err := c.ReadFromIP(buf)
		now := time.Now()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil || n < 16 {
			continue
		}
		p.mu.Lock()
		e := p.flying[binary.BigEndian.Uint64(buf[8:])]
		p.mu.Unlock()
		if e == nil {
			continue
		}
		switch buf[0] {
		case request:
			if a, ok := netip.AddrFromSlice(from.IP); ok {
				offer(e.src, a.Unmap())
			}
		case reply:
			offer(e.replied, now)
		}
	}
}

func offer[T any](c chan T, v T) {
	select {
	case c <- v:
	default:
	}
}

// ping sends one request with the given number of data bytes and waits so long for the answer. If to is not empty, it also waits for the source that arrived there.
func (p *pinger) ping(ctx context.Context, from, to string, addr netip.Addr, data int, wait time.Duration) Pong {
	pong := Pong{From: from, To: to, Addr: addr}
	v6 := addr.Is6()
	c := p.conns[from][0]
	if v6 {
		c = p.conns[from][1]
	}
	if c == nil {
		pong.Err = fmt.Errorf("no socket for %v in %s", addr, from)
		return pong
	}
	nonce := rand.Uint64()
	e := &echo{src: make(chan netip.Addr, 1), replied: make(chan time.Time, 1)}
	p.mu.Lock()
	p.flying[nonce] = e
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.flying, nonce)
		p.mu.Unlock()
	}()
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	sent := time.Now()
	if _, err := c.WriteToIP(echoMessage(v6, nonce, data), &net.IPAddr{IP: addr.AsSlice()}); err != nil {
		pong.Err = err
		return pong
	}
	select {
	case at := <-e.replied:
		pong.RTT = at.Sub(sent)
	case <-ctx.Done():
		select { // both may have happened while the machine stood still
		case at := <-e.replied:
			pong.RTT = at.Sub(sent)
		default:
			pong.Err = fmt.Errorf("no answer within %v", time.Since(sent).Round(time.Millisecond))
		}
	}
	if pong.Err != nil {
		select {
		case pong.Source = <-e.src:
			pong.Err = fmt.Errorf("%w, though the request arrived", pong.Err)
		default:
		}
		return pong
	}
	if to == "" {
		return pong
	}
	// The request reached the far side's socket before the kernel there answered it: this is no long wait, unless the machine stands still.
	select {
	case pong.Source = <-e.src:
	case <-time.After(PingPatience):
		pong.Err = fmt.Errorf("answered, but not by %s", to)
	}
	return pong
}

func echoMessage(v6 bool, nonce uint64, data int) []byte {
	b := make([]byte, echoHeader+max(data, echoNonce))
	b[0] = echoRequest4
	if v6 {
		b[0] = echoRequest6
	}
	binary.BigEndian.PutUint64(b[8:], nonce)
	if !v6 {
		var sum uint32
		for i, v := range b {
			sum += uint32(v) << (8 * (^i & 1))
		}
		sum = sum>>16 + sum&0xffff
		binary.BigEndian.PutUint16(b[2:], ^uint16(sum+sum>>16))
	}
	return b
}

// Ping sends one ICMP echo request from a target to an address of another one.
func (l *Lab) Ping(ctx context.Context, from, to string, addr netip.Addr) Pong {
	pong := Pong{From: from, To: to, Addr: addr}
	namespaces := map[string]string{}
	for _, t := range []string{from, to} {
		path, err := l.netnsOf(t)
		if err != nil {
			pong.Err = err
			return pong
		}
		namespaces[t] = path
	}
	p, err := newPinger(namespaces, Families{V4: addr.Is4(), V6: addr.Is6()})
	if err != nil {
		pong.Err = err
		return pong
	}
	defer p.close()
	return p.ping(ctx, from, to, addr, echoData, PingTimeout)
}

// PingAll pings each address of each pod from every other pod. With hosts, it also pings the pods from every host, and each
// host's tun addresses from every pod and every other host. The results are ordered by From, To, family.
func (l *Lab) PingAll(ctx context.Context, hosts bool) ([]Pong, error) {
	return l.pingAll(ctx, hosts, func(_, _ string) time.Duration { return PingPatience })
}

// pingAll is PingAll with a time to wait for the answer from each target to each other one.
func (l *Lab) pingAll(ctx context.Context, hosts bool, wait func(from, to string) time.Duration) ([]Pong, error) {
	type node struct {
		name  string
		addrs []netip.Addr
	}
	var nodes []node
	namespaces := map[string]string{}
	if hosts {
		for _, h := range l.Hosts() {
			n := node{name: h.Name}
			if l.hasAgent(&h) {
				st, err := api.NewClient(h.Socket).Status(ctx)
				if err != nil {
					return nil, fmt.Errorf("the addresses of %s: %w", h.Name, err)
				}
				n.addrs = st.Node.Tun.Addresses
			}
			nodes = append(nodes, n)
			namespaces[h.Name] = h.Netns
		}
	}
	for _, p := range l.Pods() {
		nodes = append(nodes, node{p.Name, p.Addresses})
		namespaces[p.Name] = p.Netns
	}
	p, err := newPinger(namespaces, l.st.Options.Overlay)
	if err != nil {
		return nil, err
	}
	defer p.close()
	results := make([][]Pong, len(nodes))
	var wg sync.WaitGroup
	for i, from := range nodes {
		for j, to := range nodes {
			for _, a := range to.addrs {
				if i != j {
					results[i] = append(results[i], Pong{From: from.name, To: to.name, Addr: a})
				}
			}
		}
		wg.Go(func() { p.pingEach(ctx, results[i], wait) })
	}
	wg.Wait()
	return slices.Concat(results...), ctx.Err()
}

// pingEach fills in the pongs. It pings one after the other, so that round-trip times are those of an idle network, but does not
// wait long for a late answer.
func (p *pinger) pingEach(ctx context.Context, pongs []Pong, wait func(from, to string) time.Duration) {
	const patience = 20 * time.Millisecond
	var wg sync.WaitGroup
	late := time.NewTimer(patience)
	defer late.Stop()
	for i := range pongs {
		done := make(chan struct{})
		wg.Go(func() {
			defer close(done)
			q := pongs[i]
			pongs[i] = p.ping(ctx, q.From, q.To, q.Addr, echoData, wait(q.From, q.To))
		})
		late.Reset(patience)
		select {
		case <-done:
		case <-late.C:
		}
	}
	wg.Wait()
}

// WaitPods waits until all pods reach each other.
func (l *Lab) WaitPods(ctx context.Context) error {
	var failed []string
	err := sys.Poll(ctx, 100*time.Millisecond, func() (bool, error) {
		pongs, err := l.pingAll(ctx, false, func(_, _ string) time.Duration { return PingTimeout }) // a lost one is soon sent again
		if err != nil {
			return false, err
		}
		failed = failed[:0]
		for _, p := range pongs {
			if p.Err != nil {
				failed = append(failed, fmt.Sprintf("%s to %s %v: %v", p.From, p.To, p.Addr, p.Err))
			}
		}
		return len(failed) == 0, nil
	})
	if err == nil {
		return nil
	}
	const show = 6
	if n := len(failed); n > show {
		failed = append(failed[:show], fmt.Sprintf("and %d more", n-show))
	}
	err = fmt.Errorf("not all pods reach each other: %w: %s", context.Cause(ctx), strings.Join(failed, "; "))
	for _, h := range l.Hosts() {
		if !l.hasAgent(&h) {
			continue
		}
		if st, serr := api.NewClient(h.Socket).Status(context.WithoutCancel(ctx)); serr != nil {
			err = fmt.Errorf("%w\n%s: %w", err, h.Name, serr)
		} else if len(st.Problems) > 0 {
			err = fmt.Errorf("%w\n%s: %s", err, h.Name, problems(&st))
		}
	}
	return err
}
