package hosts

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

// Ping sends one ICMP echo request with 56 bytes of data, and waits a second for the answer.
func (h *Host) Ping(addr netip.Addr) error { return h.ping(addr, 56, false) }

// PingSize is Ping with so many bytes of data; what is above the MTU is sent in fragments.
func (h *Host) PingSize(addr netip.Addr, data int) error { return h.ping(addr, data, false) }

// PingDF is PingSize that nobody may fragment: data of the MTU minus 28 bytes (IPv4) or 48 (IPv6) fill a packet.
func (h *Host) PingDF(addr netip.Addr, data int) error { return h.ping(addr, data, true) }

func (h *Host) ping(addr netip.Addr, data int, dontFragment bool) error {
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
	_, err = p.Ping(context.Background(), addr, data)
	return err
}

// Stream is a ping that goes on.
type Stream struct {
	stop func()
	sent int
	lost []int // which
}

// Stream pings an address without pause until it is stopped, at the latest when the test ends.
func (h *Host) Stream(addr netip.Addr, every time.Duration) *Stream {
	t := h.net.t
	t.Helper()
	p, err := lab.NewPinger(h.NetnsPath())
	h.net.check(err)
	ctx, cancel := context.WithCancel(context.Background())
	s := &Stream{}
	var mu sync.Mutex
	var sending, waiting sync.WaitGroup
	sending.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for ctx.Err() == nil {
			n := s.sent
			s.sent++
			waiting.Go(func() {
				if _, err := p.Ping(context.Background(), addr, 56); err != nil {
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
		waiting.Wait()
		p.Close()
	})
	t.Cleanup(s.stop)
	return s
}

// Stop ends the stream and returns how many pings were sent, and how many of them had no answer within a second.
func (s *Stream) Stop() (sent, lost int) {
	s.stop()
	return s.sent, len(s.lost)
}
