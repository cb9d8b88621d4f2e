package tunnel

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/tunnel/header"
	"github.com/tulle-net/tulle/tunnel/mtu"
	"github.com/tulle-net/tulle/tunnel/underlay"
)

const (
	errorsEvery = time.Second // between looks into the error queues of sockets that only send
	errorsFor   = 10          // such looks after the last packet: a router's answer may be late
)

// watchErrors drains the error queues of the sending sockets, where ICMP errors about what they sent arrive. An idle engine
// does not look: there are dozens of sockets.
func (e *Engine) watchErrors(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-e.sending:
		}
		e.watchErrorsWhile(ctx)
	}
}

// watchErrorsWhile does so until nothing has been sent for a while.
func (e *Engine) watchErrorsWhile(ctx context.Context) {
	tick := time.NewTicker(errorsEvery)
	defer tick.Stop()
	for left := errorsFor; left > 0; left-- {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, s := range e.out {
			e.drainErrors(s)
		}
		select {
		case <-e.sending:
			left = errorsFor
		default:
		}
	}
}

// sends wakes watchErrors.
func (e *Engine) sends() {
	select {
	case e.sending <- struct{}{}:
	default:
	}
}

// drainErrors takes the ICMP errors off a socket, and this host's own. "Too big" may lower a peer's path MTU, "unreachable" is
// passed on to the source of the inner packet. No more is believed: anybody may send an ICMP error, and a peer is down only
// when its probes stay unanswered.
func (e *Engine) drainErrors(s errorQueue) {
	f := e.fwd.Load()
	_, err := s.DrainErrors(func(u underlay.Err) {
		t := f.sources[u.Dest.Addr()]
		switch {
		case t == nil:
		case u.Errno == unix.EMSGSIZE && e.cfg.PathMTU != nil:
			e.cfg.PathMTU(t.id, u.Dest.Addr().Is6(), mtu.Link(u.Info))
		case !u.Local:
			e.relay(f, t, u)
		}
		if !u.Local {
			e.stats.icmpReceived.Add(1)
		}
	})
	if err != nil {
		e.stats.noteSendError(err)
	}
}

// relays passes errors of the underlay on. It is shared by whoever looks into an error queue.
type relays struct {
	mu   sync.Mutex
	icmp *icmpWriter
}

// relay tells the source of an inner packet that a router found no way for the outer one, or a loop: RFC 2003 §4. What the
// peer's host itself says is not passed on: that a port or a protocol is not served there means that its agent restarts.
func (e *Engine) relay(f *forwarding, t *target, u underlay.Err) {
	kind, ok := relayed(u, t.six)
	if !ok {
		return
	}
	quote := u.Quote
	if t.vxlan != nil && u.Dest.Port() == t.vxlan.Addr().Port() {
		v, err := header.ParseVXLAN(quote)
		if err != nil {
			return
		}
		quote = v.Payload()
	}
	var in header.Inner
	if header.ParseQuote(quote, &in) != nil || in.DstPort == ProbePort && f.isTun(in.Src) {
		return
	}
	// Whoever forges such an error has to know a peer, and can only speak of packets that could have been sent.
	from, _ := f.table.Lookup(in.Src)
	to, _ := f.table.Lookup(in.Dst)
	if from == nil || !from.local || !t.same(to) {
		return
	}
	e.relays.mu.Lock()
	defer e.relays.mu.Unlock()
	if e.relays.icmp != nil {
		e.relays.icmp.relay(f, quote, &in, kind)
	}
}

// relayed says what an ICMP error about an outer packet means to the source of the inner one; false for those that it does
// not hear of.
func relayed(u underlay.Err, six bool) (header.ICMPKind, bool) {
	unreachable, exceeded, host := uint8(header.ICMPv4DstUnreachable), uint8(header.ICMPv4TimeExceeded), uint8(header.ICMPv4CodeHost)
	if six {
		unreachable, exceeded, host = header.ICMPv6DstUnreachable, header.ICMPv6TimeExceeded, header.ICMPv6CodeAddrUnreach
	}
	switch {
	case u.ICMPType == unreachable && u.ICMPCode == 0: // no route
		return header.NetUnreachable, true
	case u.ICMPType == unreachable && u.ICMPCode == host, u.ICMPType == exceeded && u.ICMPCode == 0:
		return header.HostUnreachable, true
	}
	return 0, false
}
