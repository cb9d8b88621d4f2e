package tunnel

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/trace"
)

// stats has the engine's counters, without those of drops and peers.
type stats struct {
	txPackets, txBytes, txSends atomic.Uint64
	rxPackets, rxBytes          atomic.Uint64
	rxReceives, rxWrites        atomic.Uint64
	gsoFallbacks, tunFallbacks  atomic.Uint64
	icmpSent, icmpReceived      atomic.Uint64
	probesSent, probesReceived  atomic.Uint64
	queueMarks                  atomic.Uint64
	lastSendError               atomic.Pointer[string]
}

func (s *stats) noteSendError(err error) {
	text := err.Error()
	s.lastSendError.Store(&text)
}

// Stats is a copy of the engine's totals. Tx is from the TUN to the underlay, Rx the other way; packets and bytes are
// those of inner packets as they travel, of a super-packet those of its segments; on arrival, what the kernel has joined before a raw socket is one.
// Drops of packets from the TUN count a super-packet as one, but for those of send_error.
type Stats struct {
	TxPackets, TxBytes, TxSends uint64 // sends: messages that the kernel took
	RxPackets, RxBytes          uint64
	RxReceives, RxWrites        uint64 // receives: slots with packets of pods; writes: packets and super-packets to the TUN
	GSOFallbacks, TunFallbacks  uint64 // super-packets that the kernel refused and that went as single packets
	ICMPSent, ICMPReceived      uint64
	ProbesSent, ProbesReceived  uint64
	QueueMarks                  uint64        // TCP packets and super-packets that were marked (ECN) because packets waited too long in the TUN's queue or a socket's
	QueueDelay                  time.Duration // how long the last packet that was timed under load waited there, the longest of all queues; 0 if they have been empty since
	SocketOverflows             uint64        // datagrams that found a socket's buffer full
	LastSendError               string
	Drops                       map[string]uint64 // by the reason's name; all of them
}

// Stats copies the totals.
func (e *Engine) Stats() Stats {
	s := Stats{
		TxPackets: e.stats.txPackets.Load(), TxBytes: e.stats.txBytes.Load(), TxSends: e.stats.txSends.Load(),
		RxPackets: e.stats.rxPackets.Load(), RxBytes: e.stats.rxBytes.Load(),
		RxReceives: e.stats.rxReceives.Load(), RxWrites: e.stats.rxWrites.Load(),
		GSOFallbacks: e.stats.gsoFallbacks.Load(), TunFallbacks: e.stats.tunFallbacks.Load(),
		ICMPSent: e.stats.icmpSent.Load(), ICMPReceived: e.stats.icmpReceived.Load(),
		ProbesSent: e.stats.probesSent.Load(), ProbesReceived: e.stats.probesReceived.Load(),
		QueueMarks: e.stats.queueMarks.Load(),
		Drops:      make(map[string]uint64, encap.NumDrops),
	}
	for d := range encap.Drops() {
		s.Drops[d.String()] = e.drops[d].Load()
	}
	for _, w := range e.tx {
		s.QueueDelay = max(s.QueueDelay, time.Duration(w.delay.long.Load()))
	}
	for _, w := range e.rx {
		s.QueueDelay = max(s.QueueDelay, time.Duration(w.delay.long.Load()))
		s.SocketOverflows += w.sock.Overflows()
	}
	s.Drops[encap.DropSocketOverflow.String()] += s.SocketOverflows
	if p := e.stats.lastSendError.Load(); p != nil {
		s.LastSendError = *p
	}
	return s
}

// Trace measures where the time of packets goes in the workers: one of every so many batches of each is timed, for d. It fails
// with [trace.ErrBusy] if another Trace is at work.
func (e *Engine) Trace(ctx context.Context, every uint32, d time.Duration) (trace.Totals, error) {
	return e.tracer.Run(ctx, every, d)
}

// PeerStats are the totals of one peer; inner packets and bytes.
type PeerStats struct{ TxPackets, TxBytes, RxPackets, RxBytes uint64 }

// PeerStats returns the totals of a peer, zero if there is none of that ID.
func (e *Engine) PeerStats(id string) PeerStats {
	t := e.fwd.Load().peers[id]
	if t == nil {
		return PeerStats{}
	}
	c := t.state
	return PeerStats{c.txPackets.Load(), c.txBytes.Load(), c.rxPackets.Load(), c.rxBytes.Load()}
}

// Heard returns how many probes have arrived from a peer by outer IPv4 and IPv6, requests and replies.
func (e *Engine) Heard(id string) (n [2]uint64) {
	if t := e.fwd.Load().peers[id]; t != nil {
		n = [2]uint64{t.state.heard[0].Load(), t.state.heard[1].Load()}
	}
	return n
}

func (e *Engine) drop(d encap.Drop)            { e.drops[d].Add(1) }
func (e *Engine) dropN(d encap.Drop, n uint64) { e.drops[d].Add(n) }

// batchStats has one worker's counters for the current batch, so that the shared counters are updated only once per batch and peer.
type batchStats struct {
	txTo, rxFrom     *target // the peers of the counters below
	txPkts, txBytes  uint64
	rxPkts, rxBytes  uint64
	receives, writes uint64
	counted          bool // the present receive
}

func (y *batchStats) tx(s *stats, t *target, packets, bytes int) {
	if y.txTo != t {
		y.settle(s)
		y.txTo = t
	}
	y.txPkts += uint64(packets)
	y.txBytes += uint64(bytes)
}

func (y *batchStats) rx(s *stats, t *target, n int) {
	if y.rxFrom != t {
		y.settle(s)
		y.rxFrom = t
	}
	if !y.counted {
		y.counted = true
		y.receives++
	}
	y.rxPkts++
	y.rxBytes += uint64(n)
}

// settle adds the counters to those of the engine and the peers.
func (y *batchStats) settle(s *stats) {
	if y.txPkts > 0 {
		s.txPackets.Add(y.txPkts)
		s.txBytes.Add(y.txBytes)
		y.txTo.state.txPackets.Add(y.txPkts)
		y.txTo.state.txBytes.Add(y.txBytes)
		y.txPkts, y.txBytes = 0, 0
	}
	if y.rxPkts > 0 {
		s.rxPackets.Add(y.rxPkts)
		s.rxBytes.Add(y.rxBytes)
		y.rxFrom.state.rxPackets.Add(y.rxPkts)
		y.rxFrom.state.rxBytes.Add(y.rxBytes)
		y.rxPkts, y.rxBytes = 0, 0
	}
}

// flush adds everything to the shared counters.
func (y *batchStats) flush(e *Engine) {
	y.settle(&e.stats)
	if y.receives > 0 {
		e.stats.rxReceives.Add(y.receives)
		e.stats.rxWrites.Add(y.writes)
		y.receives, y.writes = 0, 0
	}
	y.txTo, y.rxFrom = nil, nil
}
