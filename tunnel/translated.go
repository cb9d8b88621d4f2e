package tunnel

import (
	"net/netip"
	"time"

	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
	"github.com/tulle-net/tulle/tunnel/underlay"
)

// Translated is an outer address that is no member's, and when a packet with a peer's inner source last came from there. Something on the way may
// translate addresses (NAT), or somebody pretends to be the peer.
type Translated struct {
	From netip.Addr
	At   time.Time
}

// Translated is zero if no such packet of the peer has come.
func (e *Engine) Translated(peer string) Translated {
	if t := e.fwd.Load().peers[peer]; t != nil {
		if tr := t.state.translated.Load(); tr != nil {
			return *tr
		}
	}
	return Translated{}
}

// stranger looks whose inner source a packet has that no member has sent, and which is dropped. The packet may be anything.
func (w *rxWorker) stranger(r underlay.Received) {
	inner, d := r.Data, encap.DropNone
	if r.SegmentSize > 0 {
		inner = inner[:min(r.SegmentSize, len(inner))]
	}
	switch w.carrier {
	case overUDP:
		inner, d = encap.UnwrapUDP(inner)
	case overVXLAN:
		inner = inner[min(header.VXLANFrameLen, len(inner)):]
	case overRaw4:
		inner, _, d = encap.UnwrapRaw4(inner)
	case overRaw6:
		inner, d = encap.UnwrapRaw6(inner, w.proto)
	}
	if d != encap.DropNone || header.ParseInner(inner, &w.in) != nil {
		return
	}
	t, ok := w.fwd.table.Lookup(w.in.Src)
	if !ok || t.local {
		return
	}
	from, now := r.From.Addr(), time.Now()
	if was := t.state.translated.Load(); was == nil || was.From != from || now.Sub(was.At) > time.Second {
		t.state.translated.Store(&Translated{from, now})
	}
}
