package traffic

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/bench/result"
)

const (
	batch = 64 // datagrams of one sendmmsg or recvmmsg
	// Pace is the sender's sleep after it has sent all due datagrams. It must leave its CPU to the tunnel, so it cannot spin on
	// the clock.
	Pace = 100 * time.Microsecond
	// debt is the maximum delay of a datagram. A sender that had to wait for a CPU must not send a burst that fills queues
	// which the constant rate would never fill. Datagrams that are later are neither sent nor counted.
	debt = time.Millisecond
	// Silence is the time without arrivals after which missing datagrams count as lost.
	Silence = 60 * time.Millisecond
)

// noneYet is how long a trial waits for its first datagram: the tunnel may have to wait for a CPU.
const noneYet = time.Second

// Settle waits after sending until no more datagrams arrive for the time quiet, or sent of them have. count returns how
// many have.
func Settle(ctx context.Context, sent uint64, quiet time.Duration, count func() (uint64, error)) error {
	last, err := count()
	for begin := time.Now(); err == nil && last < sent; {
		if err = Sleep(ctx, quiet); err != nil {
			return err
		}
		var now uint64
		if now, err = count(); now == last && (now > 0 || time.Since(begin) >= noneYet) {
			return err
		}
		last = now
	}
	return err
}

// PacketConn takes over a blocking UDP socket.
func PacketConn(fd int) (*ipv4.PacketConn, error) {
	f := os.NewFile(uintptr(fd), "udp")
	defer f.Close() // net has its own duplicate
	c, err := net.FilePacketConn(f)
	if err != nil {
		return nil, err
	}
	return ipv4.NewPacketConn(c), nil // its batches are plain sendmmsg and recvmmsg for both families
}

// lastNumber is the highest number of a datagram that counts: others were not sent by a UDPSource.
const lastNumber = 1 << 56

// messages returns a batch of datagrams of size bytes.
func messages(size int) []ipv4.Message {
	ms := make([]ipv4.Message, batch)
	for i := range ms {
		ms[i].Buffers = [][]byte{make([]byte, size)}
	}
	return ms
}

// UDPSource sends datagrams of payload bytes at t.Offered for d, and fills in what it sent. It works on its own thread.
// The datagrams are numbered from 0.
func UDPSource(ctx context.Context, c *ipv4.PacketConn, payload int, d time.Duration, t *result.Trial) error {
	runtime.LockOSThread()
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1000, 0, 0, 0) // sleep to the microsecond, not to fifty
	ms := messages(max(payload, Least))
	begin := time.Now()
	defer func() { t.Seconds = time.Since(begin).Seconds() }()
	forgiven := 0.0
	for {
		passed := time.Since(begin)
		if passed >= d || ctx.Err() != nil {
			return ctx.Err()
		}
		n := batch
		if t.Offered > 0 {
			due := passed.Seconds()*t.Offered - float64(t.Sent) - forgiven
			if late := due - max(t.Offered*debt.Seconds(), batch); late > 0 {
				forgiven += late
				due -= late
			}
			if n = min(int(due), batch); n < 1 {
				ts := unix.NsecToTimespec(int64(max(Pace, time.Duration(1e9/t.Offered))))
				_ = unix.Nanosleep(&ts, nil)
				continue
			}
		}
		for i := range n {
			binary.BigEndian.PutUint64(ms[i].Buffers[0], t.Sent+uint64(i))
		}
		sent, err := c.WriteBatch(ms[:n], 0)
		if err != nil && !Passing(bare(err)) {
			return fmt.Errorf("send: %w", err)
		}
		t.Sent += uint64(max(sent, 0))
	}
}

// bare returns the errno in an error of package net.
func bare(err error) error {
	if errno, ok := errors.AsType[unix.Errno](err); ok {
		return errno
	}
	return err
}

// Sink counts datagrams of a [UDPSource]. The zero value is ready. Its methods may be called at the same time.
type Sink struct {
	mu                        sync.Mutex
	received, reordered, next uint64
	bytes                     int64
	first, last               time.Time
}

// Reset forgets what was counted.
func (s *Sink) Reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.received, s.reordered, s.next, s.first, s.last = 0, 0, 0, time.Time{}, time.Time{}
}

// Count is what was counted since Reset; arriving is the time from the first to the last arrival, in seconds.
func (s *Sink) Count() (received, reordered uint64, arriving float64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.received, s.reordered, s.last.Sub(s.first).Seconds()
}

// Bytes is the payload that arrived, ever.
func (s *Sink) Bytes() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bytes
}

// Run counts arrivals until c is closed. It works on its own thread.
func (s *Sink) Run(c *ipv4.PacketConn) error {
	runtime.LockOSThread()
	ms := messages(2048)
	for {
		n, err := c.ReadBatch(ms, unix.MSG_TRUNC) // the length is the datagram's, also where a buffer is shorter
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil && !Passing(bare(err)) {
			return fmt.Errorf("receive: %w", err)
		}
		s.count(ms[:max(n, 0)], time.Now())
	}
}

func (s *Sink) count(ms []ipv4.Message, now time.Time) {
	if len(ms) == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.last = now; s.first.IsZero() {
		s.first = now
	}
	for i := range ms {
		s.bytes += int64(ms[i].N)
		if ms[i].N < Least {
			continue
		}
		seq := binary.BigEndian.Uint64(ms[i].Buffers[0])
		if seq > lastNumber {
			continue
		}
		if seq < s.next {
			s.reordered++
		} else {
			s.next = seq + 1
		}
		s.received++
	}
}
