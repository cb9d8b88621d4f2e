package clustertest

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

// byHand starts an agent on every host of a bare lab, each with flags of its own, and lets the lab take its pods'
// addresses from them.
func byHand(t *testing.T, l *lab.Lab, flags func(h lab.Host) []string) map[string]*stray {
	t.Helper()
	out := map[string]*stray{}
	hosts := l.Hosts()
	for i, h := range hosts {
		args := []string{"--node-name", h.Name}
		if i == 0 {
			args = append(args, "--bootstrap", "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48")
		} else {
			args = append(args, "--join", hosts[0].Underlay[0].String())
		}
		s := newStray(t, append(args, flags(h)...)...)
		s.start(t, l, h.Name)
		if err := l.AdoptAgent(h.Name, s.socket); err != nil {
			t.Fatal(err)
		}
		out[h.Name] = s
	}
	for _, h := range hosts {
		out[h.Name].ready(t)
	}
	return out
}

// stream is a flow of numbered datagrams, about a hundred a second, that a pod sends and another one sends back.
type stream struct {
	what string
	stop context.CancelFunc
	done sync.WaitGroup

	mu       sync.Mutex
	sent     uint64
	returned map[uint64]bool
	err      error
}

const streamPeriod = 10 * time.Millisecond

// startStream begins to send; the far end must be served by a traffic.
func startStream(t *testing.T, tr *traffic, from, to station, v6 bool) *stream {
	t.Helper()
	c, err := tr.l.Dial(t.Context(), from.name, "udp", netip.AddrPortFrom(to.addr(v6), trafficPort).String())
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	s := &stream{what: fmt.Sprintf("%s to %s %v", from.name, to.name, to.addr(v6)), stop: stop, returned: map[uint64]bool{}}
	s.done.Go(func() {
		tick := time.NewTicker(streamPeriod)
		defer tick.Stop()
		for {
			s.mu.Lock()
			s.sent++
			n := s.sent
			s.mu.Unlock()
			if _, err := c.Write(binary.BigEndian.AppendUint64(nil, n)); err != nil {
				s.mu.Lock()
				s.err = err
				s.mu.Unlock()
			}
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	})
	var reading sync.WaitGroup
	reading.Go(func() {
		var buf [64]byte
		for {
			n, err := c.Read(buf[:])
			if err != nil {
				return
			}
			if n == 8 {
				s.mu.Lock()
				s.returned[binary.BigEndian.Uint64(buf[:])] = true
				s.mu.Unlock()
			}
		}
	})
	t.Cleanup(func() {
		stop()
		s.done.Wait()
		c.Close()
		reading.Wait()
	})
	return s
}

// missing are the numbers of what has not come back: their place tells what happened at that moment.
func (s *stream) missing() (sent uint64, missing []uint64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for n := uint64(1); n <= s.sent; n++ {
		if !s.returned[n] {
			missing = append(missing, n)
		}
	}
	return s.sent, missing, s.err
}

// flows waits until a number of datagrams more than now have come back.
func (s *stream) flows(t *testing.T, n int) {
	t.Helper()
	s.mu.Lock()
	from := len(s.returned)
	s.mu.Unlock()
	until(t, "the stream "+s.what+" flows", func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.returned) < from+n {
			return fmt.Errorf("%d of %d came back", len(s.returned)-from, n)
		}
		return nil
	})
}

// lossless ends the stream and wants everything back.
func (s *stream) lossless(t *testing.T, least uint64) {
	t.Helper()
	s.stop()
	s.done.Wait()
	untilWithin(t, 10*time.Second, "everything of the stream "+s.what+" comes back", func() error {
		if sent, missing, err := s.missing(); len(missing) > 0 || err != nil {
			return fmt.Errorf("%d of %d are missing: %d; last error: %v", len(missing), sent, missing, err)
		}
		return nil
	})
	if s.sent < least {
		t.Errorf("the stream %s was %d packets, too short to show anything", s.what, s.sent)
	}
}

// soon is when to give up on something that is there at once or not at all.
func soon() time.Time { return time.Now().Add(2 * time.Second) }
