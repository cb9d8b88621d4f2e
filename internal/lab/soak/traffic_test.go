package soak

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// A datagram says whom it is from and for, its number, and a checksum over all of it; its rest is random.
const (
	magic    = 0x7475_6c6c
	headLen  = 4 + 1 + 1 + 8
	port     = 7000
	every    = 50 * time.Millisecond // a datagram for each pair
	window   = 4096                  // numbers of a pair that are remembered
	maxBytes = 4000                  // of a datagram: some come in fragments
)

// traffic sends datagrams between all pods, and checks each that arrives.
type traffic struct {
	pods  []*hosts.Pod
	conns []*net.UDPConn
	pairs [][]*pair       // by sender and receiver
	round []atomic.Uint64 // by sender: the number of its last datagrams
	stop  chan struct{}
	wg    sync.WaitGroup

	mu    sync.Mutex
	wrong []string // datagrams that should not have arrived as they did
}

// pair is one direction between two pods.
type pair struct {
	sent, received atomic.Uint64
	last           atomic.Int64 // when one arrived, Unix nanoseconds

	mu   sync.Mutex // guards what follows
	seen map[uint64]bool
	high uint64
}

func startTraffic(t *testing.T, pods []*hosts.Pod) *traffic {
	t.Helper()
	x := &traffic{pods: pods, round: make([]atomic.Uint64, len(pods)), stop: make(chan struct{})}
	for i, p := range pods {
		var c *net.UDPConn
		if err := p.Do(func() (err error) {
			c, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(p.IPv4(), port)))
			return
		}); err != nil {
			t.Fatal(err)
		}
		x.conns = append(x.conns, c)
		x.pairs = append(x.pairs, make([]*pair, len(pods)))
		for j := range pods {
			x.pairs[i][j] = &pair{seen: map[uint64]bool{}}
		}
	}
	for i := range pods {
		x.wg.Go(func() { x.receive(i) })
		x.wg.Go(func() { x.send(i) })
	}
	t.Cleanup(x.end)
	return x
}

// end stops everything.
func (x *traffic) end() {
	select {
	case <-x.stop:
		return
	default:
	}
	close(x.stop)
	for _, c := range x.conns {
		c.Close()
	}
	x.wg.Wait()
}

func (x *traffic) send(from int) {
	r := rand.New(rand.NewPCG(uint64(from), 7))
	tick := time.NewTicker(every)
	defer tick.Stop()
	buf := make([]byte, maxBytes)
	for n := uint64(1); ; n++ {
		select {
		case <-x.stop:
			return
		case <-tick.C:
		}
		x.round[from].Store(n)
		for to := range x.pods {
			if to == from {
				continue
			}
			size := headLen + 4 + r.IntN(1200)
			if r.IntN(20) == 0 {
				size = maxBytes
			}
			b := buf[:size]
			for i := headLen; i < size; i++ {
				b[i] = byte(r.Uint32())
			}
			binary.BigEndian.PutUint32(b, magic)
			b[4], b[5] = byte(from), byte(to)
			binary.BigEndian.PutUint64(b[6:], n)
			binary.BigEndian.PutUint32(b[size-4:], crc32.ChecksumIEEE(b[:size-4]))
			// An error (no route, host unreachable) is a lost datagram.
			x.pairs[from][to].sent.Add(1)
			_, _ = x.conns[from].WriteToUDPAddrPort(b, netip.AddrPortFrom(x.pods[to].IPv4(), port))
		}
	}
}

func (x *traffic) receive(self int) {
	buf := make([]byte, 65536)
	for {
		n, from, err := x.conns[self].ReadFromUDPAddrPort(buf)
		if err != nil {
			select {
			case <-x.stop:
				return
			default:
				continue // an ICMP error about one that was sent
			}
		}
		if err := x.check(self, buf[:n], from.Addr().Unmap()); err != nil {
			x.mu.Lock()
			x.wrong = append(x.wrong, fmt.Sprintf("at pod %d from %v: %v", self, from, err))
			x.mu.Unlock()
		}
	}
}

// check is nil for a datagram that is right, and new.
func (x *traffic) check(self int, b []byte, from netip.Addr) error {
	switch {
	case len(b) < headLen+4 || binary.BigEndian.Uint32(b) != magic:
		return fmt.Errorf("%d bytes that nobody sent", len(b))
	case crc32.ChecksumIEEE(b[:len(b)-4]) != binary.BigEndian.Uint32(b[len(b)-4:]):
		return fmt.Errorf("%d bytes, changed on the way", len(b))
	case int(b[5]) != self:
		return fmt.Errorf("it is for pod %d", b[5])
	case int(b[4]) >= len(x.pods) || x.pods[b[4]].IPv4() != from:
		return fmt.Errorf("it is from pod %d", b[4])
	}
	p, n := x.pairs[b[4]][self], binary.BigEndian.Uint64(b[6:])
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.seen[n] {
		return fmt.Errorf("number %d from pod %d came twice", n, b[4])
	}
	p.seen[n] = true
	if n > p.high {
		for old := p.high; old < n; old++ {
			if old > window {
				delete(p.seen, old-window)
			}
		}
		p.high = n
	}
	p.received.Add(1)
	p.last.Store(time.Now().UnixNano())
	return nil
}

// flows is nil if a datagram that was sent after since has arrived for each pair.
func (x *traffic) flows(since time.Time) error {
	for i := range x.pods {
		for j, p := range x.pairs[i] {
			if i != j && p.last.Load() < since.UnixNano() {
				return fmt.Errorf("nothing arrives from %s at %s", x.pods[i].Name, x.pods[j].Name)
			}
		}
	}
	return nil
}

func (x *traffic) totals() (sent, received uint64) {
	for _, row := range x.pairs {
		for _, p := range row {
			sent += p.sent.Load()
			received += p.received.Load()
		}
	}
	return sent, received
}

// wrongs is the number of datagrams that should not have arrived as they did.
func (x *traffic) wrongs() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return len(x.wrong)
}

// quiet lets time pass in which nothing is broken, and returns how many datagrams were sent in it, how many of them did not arrive, and
// the most that one pair of pods lost.
func (x *traffic) quiet(length time.Duration) (sent, lost, worst uint64) {
	numbers := func() (out []uint64) {
		for i := range x.round {
			out = append(out, x.round[i].Load())
		}
		return out
	}
	from := numbers()
	time.Sleep(length)
	to := numbers()
	// A machine that stands still for seconds delays datagrams, and loses none.
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		sent, lost, worst = x.missing(from, to)
		if lost == 0 || time.Now().After(deadline) {
			return sent, lost, worst
		}
	}
}

// missing counts the datagrams behind the numbers from, up to those of to, and how many of them have not arrived so far.
func (x *traffic) missing(from, to []uint64) (sent, lost, worst uint64) {
	for i, row := range x.pairs {
		for j, p := range row {
			if i == j {
				continue
			}
			missing := uint64(0)
			p.mu.Lock()
			for n := from[i] + 1; n <= to[i]; n++ {
				sent++
				if !p.seen[n] {
					missing++
				}
			}
			p.mu.Unlock()
			lost, worst = lost+missing, max(worst, missing)
		}
	}
	return sent, lost, worst
}
