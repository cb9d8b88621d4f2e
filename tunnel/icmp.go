package tunnel

import (
	"net/netip"
	"time"

	"github.com/tulle-net/tulle/tunnel/header"
	"github.com/tulle-net/tulle/tunnel/offload"
)

const (
	icmpBuckets = 256                    // sources that are told apart, by hash
	icmpBurst   = 10                     // errors that a source gets at once
	icmpEvery   = 100 * time.Millisecond // then one in this time
)

// icmpWriter answers pods whose packets go nowhere. It belongs to one worker. What one source may get is bounded by a
// token bucket, RFC 1812 §4.3.2.8 and RFC 4443 §2.4 (f); sources share a fixed number of buckets, so that a flood of
// forged sources costs no memory.
type icmpWriter struct {
	e       *Engine
	tun     *tunWriter
	buf     []byte
	buckets [icmpBuckets]bucket
}

type bucket struct {
	tokens int
	last   time.Time
}

// allow takes a token of src.
func (w *icmpWriter) allow(src netip.Addr, now time.Time) bool {
	h := uint32(2166136261) // FNV-1a
	for _, c := range src.As16() {
		h = (h ^ uint32(c)) * 16777619
	}
	b := &w.buckets[(h^h>>16)%icmpBuckets]
	switch n := now.Sub(b.last) / icmpEvery; {
	case n >= icmpBurst: // or never used
		b.tokens, b.last = icmpBurst, now
	case n > 0:
		b.tokens = min(icmpBurst, b.tokens+int(n))
		b.last = b.last.Add(n * icmpEvery)
	}
	if b.tokens == 0 {
		return false
	}
	b.tokens--
	return true
}

// answer sends the error about pkt to its source, as this node, if the rules allow one.
func (w *icmpWriter) answer(f *forwarding, pkt []byte, kind header.ICMPKind, mtu int) {
	var in header.Inner
	if header.ParseInner(pkt, &in) != nil || !header.MayAnswer(pkt) {
		return
	}
	src := f.tun[outer(in.Version == 6)]
	if !src.IsValid() || !w.allow(in.Src, time.Now()) {
		return
	}
	w.send(header.AppendICMPError(w.buf[:0], pkt, src, kind, mtu))
}

// relay tells the source of an inner packet, of which quote is the beginning, what a router said about the outer one.
func (w *icmpWriter) relay(f *forwarding, quote []byte, in *header.Inner, kind header.ICMPKind) {
	src := f.tun[outer(in.Version == 6)]
	if src.IsValid() && w.allow(in.Src, time.Now()) {
		w.send(header.AppendRelayedError(w.buf[:0], quote, src, kind))
	}
}

// send writes an error, if there is one.
func (w *icmpWriter) send(pkt []byte) {
	w.buf = pkt
	if len(w.buf) == 0 {
		return
	}
	w.e.stats.icmpSent.Add(1)
	w.tun.write(w.e, offload.VnetHdr{}, w.buf)
}
