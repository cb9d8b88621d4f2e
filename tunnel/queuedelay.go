package tunnel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/tunnel/header"
)

// A worker that is slower than the pods' TCP would always have a full queue in front of it: TCP fills whatever does not drop, up to its windows,
// and every other packet waits behind that for tens of milliseconds. So the worker measures how long packets wait, and lets TCP slow down.
//
// The kernel does not tell when a packet came into the TUN's queue. Under load the worker puts a packet of its own there, a mark, and sees
// when it comes out.

const (
	// markLen is the length of a mark: IPv4 and UDP headers, and 8 bytes that tell one from another.
	markLen = header.IPv4MinLen + header.UDPLen + 8
	// marksApart is the least time between two marks.
	marksApart = 500 * time.Microsecond
	// markLost is how long a mark is waited for.
	markLost = time.Second
)

// queueDelay measures how long packets wait in a worker's queue of the TUN. Its worker owns it but for what
// other workers may use.
type queueDelay struct {
	waiting
	mark func(pkt []byte) error // puts a packet behind all that waits in a queue; nil: the device cannot

	pkt    [markLen]byte
	timing bool      // marks were sent since the queue was empty
	sent   time.Time // of the mark in the queue; zero: none is there
	last   time.Time // when the last mark was sent

	id     atomic.Uint64 // of the mark in the queue; for all workers
	astray atomic.Bool   // another worker has read it: the kernel's hash chose that one's queue
}

// newMark writes a mark into q.pkt, of another flow than the last one if that went astray. Nobody but this program sends from 0.0.0.0 to 0.0.0.0.
func (q *queueDelay) newMark() {
	from := binary.BigEndian.Uint16(q.pkt[header.IPv4MinLen:])
	if q.astray.Swap(false) {
		from++
	}
	none := netip.IPv4Unspecified()
	ip := header.AppendIPv4(q.pkt[:0], header.IPv4Fields{Src: none, Dst: none, PayloadLen: markLen - header.IPv4MinLen, TTL: 1, Proto: header.ProtoUDP})
	ip = binary.BigEndian.AppendUint16(ip, from)
	ip = append(ip, 0, 0, 0, header.UDPLen+8, 0, 0) // port 0, length, no checksum
	id := rand.Uint64()
	binary.BigEndian.AppendUint64(ip, id)
	q.id.Store(id)
}

// isMark reports whether a packet from the TUN is a mark, of whichever run of the program.
func isMark(pkt []byte) bool {
	return len(pkt) == markLen && pkt[0] == 0x45 && pkt[9] == header.ProtoUDP && bytes.Equal(pkt[12:20], make([]byte, 8))
}

// empty is to be called when the queue was found empty.
func (q *queueDelay) empty() {
	if q.timing {
		q.timing, q.sent = false, time.Time{}
		q.waited(time.Time{}, 0)
	}
}

// busy is to be called now and then while the queue is not empty.
func (q *queueDelay) busy() {
	if q.mark == nil {
		return
	}
	now := time.Now()
	if now.Sub(q.last) < marksApart || !q.sent.IsZero() && !q.astray.Load() && now.Sub(q.sent) < markLost {
		return
	}
	q.newMark()
	q.timing, q.sent, q.last = true, now, now
	if err := q.mark(q.pkt[:]); err != nil {
		q.sent = time.Time{}
		if errors.Is(err, unix.ENOBUFS) { // full: packets wait for as long as they can
			q.waited(now, codelTarget)
		}
	}
}

// markRead is to be called with each mark that the worker has read.
func (w *txWorker) markRead(pkt []byte) {
	id := binary.BigEndian.Uint64(pkt[markLen-8:])
	q := &w.delay
	if id != q.id.Load() {
		for _, other := range w.e.tx {
			if other != w && id == other.delay.id.Load() {
				other.delay.astray.Store(true)
			}
		}
		return
	}
	if q.sent.IsZero() {
		return
	}
	now := time.Now()
	q.waited(now, now.Sub(q.sent))
	q.sent = time.Time{}
}
