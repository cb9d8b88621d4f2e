package hosts

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/testing/stall"
)

// Ping sends one ICMP echo request with 56 bytes of data, and waits a second for the answer.
func (h *Host) Ping(addr netip.Addr) error { return h.ping(addr, 56, false, lab.PingTimeout) }

// PingSize is Ping with so many bytes of data; what is above the MTU is sent in fragments.
func (h *Host) PingSize(addr netip.Addr, data int) error {
	return h.ping(addr, data, false, lab.PingTimeout)
}

// PingOnce is PingSize that waits ten seconds for the answer: for a packet that must not be lost, while a busy machine may stand
// still for longer than a second.
func (h *Host) PingOnce(addr netip.Addr, data int) error {
	return h.ping(addr, data, false, lab.PingPatience)
}

// PingDF is PingSize that nobody may fragment: data of the MTU minus 28 bytes (IPv4) or 48 (IPv6) fill a packet.
func (h *Host) PingDF(addr netip.Addr, data int) error {
	return h.ping(addr, data, true, lab.PingTimeout)
}

func (h *Host) ping(addr netip.Addr, data int, dontFragment bool, wait time.Duration) error {
	p, err := lab.NewPinger(h.NetnsPath())
	if err != nil {
		return err
	}
	defer p.Close()
	if dontFragment {
		if err := p.SetDontFragment(true); err != nil {
			return err
		}
	}
	_, err = p.Ping(context.Background(), addr, data, wait)
	return err
}

// Stream is a ping that goes on.
type Stream struct {
	stop  func()
	every time.Duration
	still time.Duration // how long the machine stood still while pings were sent
	sent  int
	lost  []int // which
}

// Stream pings an address without pause until it is stopped, at the latest when the test ends.
func (h *Host) Stream(addr netip.Addr, every time.Duration) *Stream {
	t := h.net.t
	t.Helper()
	p, err := lab.NewPinger(h.NetnsPath())
	h.net.check(err)
	ctx, cancel := context.WithCancel(context.Background())
	s, meter := &Stream{every: every}, stall.Begin()
	var mu sync.Mutex
	var sending, waiting sync.WaitGroup
	sending.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for ctx.Err() == nil {
			n := s.sent
			s.sent++
			waiting.Go(func() {
				if _, err := p.Ping(context.Background(), addr, 56, lab.PingPatience); err != nil {
					mu.Lock()
					defer mu.Unlock()
					s.lost = append(s.lost, n)
				}
			})
			select {
			case <-ctx.Done():
			case <-tick.C:
			}
		}
	})
	s.stop = sync.OnceFunc(func() {
		cancel()
		sending.Wait()
		s.still = meter.Stalled()
		waiting.Wait()
		p.Close()
	})
	t.Cleanup(s.stop)
	return s
}

// Stop ends the stream and returns how many pings were sent, and how many of them had no answer, not even ten seconds later.
func (s *Stream) Stop() (sent, lost int) {
	s.stop()
	return s.sent, len(s.lost)
}

// Most is how many pings an interruption may cost, of a stream that has been stopped: those of a limit, and of the time in which the
// machine stood still meanwhile, when the agents could not see to anything either.
func (s *Stream) Most(limit time.Duration) int { return int((limit + s.still) / s.every) }
