package tunnel

import (
	"errors"

	"github.com/tulle-net/tulle/tunnel/device"
	"github.com/tulle-net/tulle/tunnel/offload"
)

// tunWriter writes packets and super-packets to the TUN. Each goroutine has its own.
type tunWriter struct {
	w     interface{ Write([][]byte) error } // a *device.Writer, or a test's memory
	split *offload.Splitter
	hdr   [offload.VnetHdrLen]byte
	iov   [][]byte
	one   [1][]byte
	flat  []byte // a super-packet that the kernel refused, in one piece
}

func newTunWriter(q *device.Queue) *tunWriter {
	return &tunWriter{w: q.NewWriter(), iov: make([][]byte, 0, 2*maxJoined)}
}

// maxJoined is the most slices that a joined super-packet has.
const maxJoined = 256

func (t *tunWriter) write(e *Engine, h offload.VnetHdr, pkt []byte) {
	t.one[0] = pkt
	t.writev(e, h, t.one[:])
}

// writev writes one packet, in parts. A super-packet that the kernel refuses is cut and written as single packets, so
// that a kernel or device that takes less than it said loses nothing.
func (t *tunWriter) writev(e *Engine, h offload.VnetHdr, parts [][]byte) {
	h.Encode(t.hdr[:])
	t.iov = append(append(t.iov[:0], t.hdr[:]), parts...)
	err := t.w.Write(t.iov)
	switch {
	case err == nil:
	case h.GSOType != offload.GSONone && errors.Is(err, device.ErrGSO):
		t.cut(e, h, parts)
	default:
		t.drop(e, parts)
	}
}

// cut splits a refused super-packet in software.
func (t *tunWriter) cut(e *Engine, h offload.VnetHdr, parts [][]byte) {
	if t.split == nil {
		t.split = offload.NewSplitter(headerArena)
	}
	t.flat = t.flat[:0]
	for _, p := range parts {
		t.flat = append(t.flat, p...)
	}
	e.stats.tunFallbacks.Add(1)
	t.split.Reset()
	segs, err := t.split.Split(t.flat, h)
	if err != nil {
		t.drop(e, parts)
		return
	}
	plain := offload.VnetHdr{}
	plain.Encode(t.hdr[:])
	for _, s := range segs {
		t.iov = append(t.iov[:0], t.hdr[:], s.Header, s.Payload)
		if t.w.Write(t.iov) != nil {
			t.drop(e, t.iov[1:])
		}
	}
}
