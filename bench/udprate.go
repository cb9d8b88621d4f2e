package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"
)

// Trial is one run with UDP datagrams at a constant rate.
type Trial struct {
	Offered   float64 `json:"offered_pps"` // requested datagrams per second; 0: unpaced
	Sent      uint64  `json:"sent"`
	Received  uint64  `json:"received"`
	Reordered uint64  `json:"reordered"`  // received after a datagram that was sent later
	Seconds   float64 `json:"seconds"`    // of sending
	Arriving  float64 `json:"arriving_s"` // from the first to the last that was received
}

// Loss is the share of the sent datagrams that did not arrive.
func (t *Trial) Loss() float64 {
	if t.Sent == 0 {
		return 0
	}
	return 1 - float64(min(t.Received, t.Sent))/float64(t.Sent)
}

// SentRate and Rate are datagrams per second, sent and received. Rate includes the time in which queued datagrams arrive after the
// sender has stopped, so that long queues do not make a tunnel look faster.
func (t *Trial) SentRate() float64 { return float64(t.Sent) / t.Seconds }
func (t *Trial) Rate() float64     { return float64(t.Received) / max(t.Seconds, t.Arriving) }

const (
	batch = 64 // datagrams of one sendmmsg or recvmmsg
	// pace is the sender's sleep after it has sent all due datagrams. It must leave its CPU to the tunnel, so it cannot spin on
	// the clock.
	pace = 100 * time.Microsecond
	// debt is the maximum delay of a datagram. A sender that had to wait for a CPU must not send a burst that fills queues
	// which the constant rate would never fill. Datagrams that are later are neither sent nor counted.
	debt = time.Millisecond
	// silence is the time without arrivals after which missing datagrams count as lost.
	silence = 60 * time.Millisecond
)

// udpTrial sends datagrams of payload bytes at a rate for d, and counts those that arrive. Sender and receiver run on their
// own threads.
func udpTrial(ctx context.Context, e *Ends, payload int, rate float64, d time.Duration) (Trial, error) {
	from, to, err := e.udpPair()
	if err != nil {
		return Trial{}, err
	}
	source, err := packetConn(from)
	if err != nil {
		unix.Close(to)
		return Trial{}, err
	}
	defer source.Close()
	sink, err := packetConn(to)
	if err != nil {
		return Trial{}, err
	}
	t := Trial{Offered: rate}
	var received atomic.Uint64
	ended := make(chan error, 1)
	go func() { ended <- udpSink(sink, &received, &t) }() // ends when sink is closed
	sent := make(chan error, 1)
	go func() { sent <- udpSource(ctx, source, max(payload, 8), d, &t) }()
	err = <-sent
	for last := received.Load(); err == nil; {
		err = sleep(ctx, silence)
		now := received.Load()
		if now == last {
			break
		}
		last = now
	}
	sink.Close()
	err = errors.Join(err, <-ended)
	t.Received = received.Load()
	return t, err
}

// packetConn takes over a blocking UDP socket.
func packetConn(fd int) (*ipv4.PacketConn, error) {
	f := os.NewFile(uintptr(fd), "udp")
	defer f.Close() // net has its own duplicate
	c, err := net.FilePacketConn(f)
	if err != nil {
		return nil, err
	}
	return ipv4.NewPacketConn(c), nil // its batches are plain sendmmsg and recvmmsg for both families
}

// messages returns a batch of datagrams of size bytes.
func messages(size int) []ipv4.Message {
	ms := make([]ipv4.Message, batch)
	for i := range ms {
		ms[i].Buffers = [][]byte{make([]byte, size)}
	}
	return ms
}

// udpSource sends at t.Offered for d, and fills in what it sent.
func udpSource(ctx context.Context, c *ipv4.PacketConn, payload int, d time.Duration, t *Trial) error {
	runtime.LockOSThread()                                // never unlocked: the thread ends with its goroutine
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1000, 0, 0, 0) // sleep to the microsecond, not to fifty
	ms := messages(payload)
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
				ts := unix.NsecToTimespec(int64(max(pace, time.Duration(1e9/t.Offered))))
				_ = unix.Nanosleep(&ts, nil)
				continue
			}
		}
		for i := range n {
			binary.BigEndian.PutUint64(ms[i].Buffers[0], t.Sent+uint64(i))
		}
		sent, err := c.WriteBatch(ms[:n], 0)
		if err != nil && !passing(bare(err)) {
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

// udpSink counts arrivals until c is closed, and fills in the receiver's part of t.
func udpSink(c *ipv4.PacketConn, received *atomic.Uint64, t *Trial) error {
	ms := messages(2048)
	next := uint64(0)
	var first, last time.Time
	defer func() { t.Arriving = last.Sub(first).Seconds() }()
	for {
		n, err := c.ReadBatch(ms, 0)
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil && !passing(bare(err)) {
			return fmt.Errorf("receive: %w", err)
		}
		if last = time.Now(); first.IsZero() {
			first = last
		}
		for i := range max(n, 0) {
			seq := binary.BigEndian.Uint64(ms[i].Buffers[0])
			if seq < next {
				t.Reordered++
			} else {
				next = seq + 1
			}
		}
		received.Add(uint64(max(n, 0)))
	}
}
