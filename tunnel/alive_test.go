package tunnel

import (
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/underlay"
)

// stuckSocket is a socket whose Recv does not return until it is freed, as of a kernel or a worker that hangs.
type stuckSocket struct {
	memSocket
	woken chan struct{}
	free  chan struct{}
	once  sync.Once
	came  chan struct{} // closed when the worker is in Recv
}

func (s *stuckSocket) Wait() (time.Duration, error) {
	select {
	case <-s.came: // it has hung before: from now on it is idle
		<-s.woken
		return 0, sys.ErrWoken
	default:
		return 0, nil
	}
}

func (s *stuckSocket) WaitRecv(*underlay.RecvBatch, int) (int, time.Duration, error) {
	waited, err := s.Wait()
	return 0, waited, err
}

func (s *stuckSocket) Recv(*underlay.RecvBatch) (int, error) {
	s.once.Do(func() { close(s.came) })
	<-s.free
	return 0, sys.ErrAgain
}

func (s *stuckSocket) Pause(time.Duration) {}
func (s *stuckSocket) Wake() {
	select {
	case s.woken <- struct{}{}:
	default:
	}
}

// A worker that hangs is named from the second question on, and not any more once it goes on.
func TestStuckWorkerIsNamed(t *testing.T) {
	r := newMemRig(encap.UDP)
	s := &stuckSocket{woken: make(chan struct{}, 1), free: make(chan struct{}), came: make(chan struct{})}
	r.rx.sock, r.rx.at = s, netip.MustParseAddrPort("192.0.2.1:6080")
	r.e.rx = []*rxWorker{r.rx}
	done := make(chan error, 1)
	go func() { done <- r.rx.run() }()
	<-s.came
	if got := r.e.Stalled(); got != nil {
		t.Errorf("before Run: %v", got)
	}
	r.e.running.Store(true)
	if got := r.e.Stalled(); got != nil {
		t.Errorf("nothing was asked before: %v", got)
	}
	for range 2 {
		if got := r.e.Stalled(); len(got) != 1 || !strings.Contains(got[0], "udp on 192.0.2.1:6080") {
			t.Errorf("stalled: %q, want the receiver of udp on 192.0.2.1:6080", got)
		}
	}
	close(s.free)
	eventually(t, "it has answered", func() bool { return r.rx.seen.Load() == r.e.asked.Load() })
	if got := r.e.Stalled(); got != nil {
		t.Errorf("it goes on, and counts as stalled: %v", got)
	}
	r.e.stopping.Store(true)
	s.Wake()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Idle workers answer, and so do workers whose queue and sockets are never empty.
func TestWorkersAnswer(t *testing.T) {
	l := testLink{mode: encap.UDP, queues: 2}
	a, b := startPair(t, l)
	answer := func(what string) {
		t.Helper()
		for range 5 {
			for _, n := range []*testNode{a, b} {
				n.engine.Stalled()
				asked := n.engine.asked.Load()
				eventually(t, what+": all answer", func() bool {
					return !slices.ContainsFunc(n.engine.tx, func(w *txWorker) bool { return w.seen.Load() != asked }) &&
						!slices.ContainsFunc(n.engine.rx, func(w *rxWorker) bool { return w.seen.Load() != asked })
				})
			}
		}
	}
	eventually(t, "both run", func() bool { return a.engine.running.Load() && b.engine.running.Load() })
	answer("idle")
	to := netip.AddrPortFrom(b.tun[0], 99)
	out := a.listenUDP(t, netip.AddrPortFrom(a.tun[0], 0))
	b.listenUDP(t, to)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		for data := make([]byte, 1200); ; {
			select {
			case <-stop:
				return
			default:
				out.WriteToUDPAddrPort(data, to)
			}
		}
	})
	eventually(t, "traffic flows", func() bool { return b.engine.Stats().RxPackets > 1000 })
	answer("under load")
	close(stop)
	wg.Wait()
}
