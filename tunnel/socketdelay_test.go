package tunnel

import (
	"bytes"
	"fmt"
	"github.com/tulle-net/tulle/tunnel/capture"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
	"github.com/tulle-net/tulle/tunnel/offload"
	"slices"

	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// timed is a socket whose last message has waited for as long as wait says; asked counts who wants to know.
type timed struct {
	memSocket
	wait  time.Duration
	err   error
	asked int
}

func (s *timed) Arrived() (time.Time, error) {
	s.asked++
	return time.Now().Round(0).Add(-s.wait), s.err
}

// The kernel is asked for the time of a message only while packets may have waited too long, and not for each.
func TestSocketDelay(t *testing.T) {
	const batch = 100 * time.Microsecond
	for name, c := range map[string]struct {
		wait  time.Duration
		err   error
		empty bool // now and then
		drops bool
		asked int // at most, in an interval
	}{
		"long":               {wait: 2 * codelTarget, drops: true, asked: int(codelInterval / asksApart)},
		"short":              {wait: codelTarget / 2, asked: int(codelInterval / asksApart)},
		"empty now and then": {wait: 2 * codelTarget, empty: true},
		"the clock was set":  {wait: time.Hour, asked: int(codelInterval / asksApart)},
		"back":               {wait: -time.Hour, asked: int(codelInterval / asksApart)},
		"an older kernel":    {wait: 2 * codelTarget, err: errors.ErrUnsupported, asked: int(codelInterval / asksApart)},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &timed{wait: c.wait, err: c.err}
				var q socketDelay
				dropped := false
				for began := time.Now(); time.Since(began) < codelTarget+2*codelInterval; time.Sleep(batch) {
					if c.empty && time.Since(began)%codelTarget == 0 {
						q.empty()
					}
					q.busy(s)
					dropped = dropped || q.drop(time.Now())
				}
				if dropped != c.drops {
					t.Errorf("something is dropped: %v, want %v", dropped, c.drops)
				}
				if s.asked > 2*c.asked || c.asked > 0 && s.asked < c.asked {
					t.Errorf("asked %d times in two intervals, want %d", s.asked, 2*c.asked)
				}
				if got := time.Duration(q.long.Load()); c.drops && got != c.wait {
					t.Errorf("packets wait for %v, it says %v", c.wait, got)
				}
				q.empty()
				if q.long.Load() != 0 || q.drop(time.Now()) {
					t.Error("an empty queue has a delay")
				}
			})
		})
	}
}

// Of what the kernel has joined before a socket, TCP loses one segment; of what it has not, a packet.
func TestSlowReceived(t *testing.T) {
	for _, payload := range []int{1000, 10_000} {
		for f := range 2 {
			t.Run(fmt.Sprintf("%d/%s", payload, familyName(f == 1)), func(t *testing.T) {
				r := newMemRig(encap.IPIP)
				r.tun.keep = true
				if f == 1 {
					r.rx.proto = header.ProtoIPv6
				}
				super := superPacket(f, 1, 0, true, 1, random(payload), int(r.peer.MTU)-60)
				inner := super[offload.VnetHdrLen:]
				outer := header.AppendIPv4(nil, header.IPv4Fields{Src: underlayOf(false, 1), Dst: underlayOf(false, 0), PayloadLen: len(inner), TTL: 64, Proto: r.rx.proto})
				dropped := listen(t, r.e, capture.Filter{Drops: true})
				r.rx.delay.waited(time.Now().Add(-2*codelInterval), 2*codelTarget)
				h, joined := offload.RawVnetHdr(inner, int(r.peer.MTU), offload.NotTold)
				if !joined {
					t.Fatal("not recognised")
				}
				first, rest := offload.CutFirst(bytes.Clone(inner), h)
				r.receive(underlayReceived(slices.Concat(outer, inner)))
				if n := r.e.Stats().Drops[encap.DropQueueDelay.String()]; n != 1 {
					t.Errorf("%d packets dropped", n)
				}
				if lost := dropped(); len(lost) != 1 || lost[0].Reason != encap.DropQueueDelay.String() {
					t.Errorf("captured as dropped: %v", lost)
				} else if got, want := lost[0].Data, slices.Concat(outer, first); !bytes.Equal(got, want) {
					t.Errorf("%d bytes captured, want %d", len(got), len(want))
				}
				if got := slices.Concat(r.tun.pkts...); !bytes.Equal(got, rest) {
					t.Errorf("%d bytes arrive in %d packets, want %d in one", len(got), len(r.tun.pkts), len(rest))
				}
			})
		}
	}
}
