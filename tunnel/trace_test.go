package tunnel

import (
	"context"
	"runtime"
	"testing"
	"time"

	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
	"github.com/tulle-net/tulle/tunnel/trace"
)

// Both workers tell a trace what each packet took, in every mode, and allocate nothing for it.
func TestTrace(t *testing.T) {
	for _, l := range memLoads() {
		t.Run(l.name, func(t *testing.T) {
			r := newMemRig(l.mode)
			if l.mode == encap.IPIP && l.family == 1 {
				r.rx.proto = header.ProtoIPv6
			}
			r.queue.packets = l.supers(0, 1)
			slots, refill := l.slots(t, 1, 0)
			packets := 0
			for _, super := range l.supers(0, 1) {
				packets += len(segmentsOf(t, super))
			}
			var found trace.Totals
			ended := make(chan error, 1)
			ctx, cancel := context.WithCancel(t.Context())
			go func() {
				var err error
				found, err = r.e.Trace(ctx, 1, time.Hour)
				ended <- err
			}()
			for !r.e.tracer.On() {
				runtime.Gosched()
			}
			const times = 20
			before := r.sock.messages.Load()
			for range times {
				r.transmit(t)
				refill()
				r.receive(slots...)
			}
			if n := testing.AllocsPerRun(times-1, func() { r.transmit(t) }); n != 0 {
				t.Errorf("sending allocates %v times", n)
			}
			cancel()
			<-ended
			sent := r.sock.messages.Load() - before // the socket in memory counts trains as one
			if found.Sent != sent || found.Received != uint64(times*packets) {
				t.Errorf("%d packets sent and %d received, want %d and %d", found.Sent, found.Received, sent, times*packets)
			}
			for _, s := range trace.Stages() {
				call := s == trace.Read || s == trace.Send || s == trace.Receive || s == trace.Write // hardly anything, in memory
				if !call && found.Times[s] <= 0 && found.Interrupted == 0 {
					t.Errorf("%v took no time: %+v", s, found)
				}
			}
		})
	}
}
