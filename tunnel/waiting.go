package tunnel

import (
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
)

// waiting is how long packets wait in a worker's queue, and decides when TCP has to slow down.
type waiting struct {
	codel
	long atomic.Int64 // how long the last packet that was timed waited, ns; 0 once the queue was empty. For whoever asks
}

// waited tells that a packet read at now has waited for d, or that the queue is empty: d = 0.
func (q *waiting) waited(now time.Time, d time.Duration) {
	q.codel.waited(now, d)
	q.long.Store(int64(d))
}

// slow lets the sender of a packet or super-packet slow down if it is TCP's turn to: it marks the packet if its sender knows ECN (RFC 3168), and
// reports whether to drop it, or its first segment, otherwise. What carries no data is never dropped.
func (q *waiting) slow(s *stats, pkt []byte, in *header.Inner) (drop bool) {
	if q.calm() || in.Proto != header.ProtoTCP || in.Fragment || in.HeaderLen > len(pkt) {
		return false
	}
	tcp, err := header.ParseTCP(pkt[in.HeaderLen:])
	if err != nil || len(tcp.Payload()) == 0 || tcp.Flags()&(header.TCPSyn|header.TCPFin|header.TCPRst) != 0 || !q.drop(time.Now()) {
		return false
	}
	if in.TOS&header.ECNMask == header.ECNNotECT {
		return true
	}
	encap.ApplyECN(pkt, in, header.ECNCE)
	s.queueMarks.Add(1)
	return false
}
