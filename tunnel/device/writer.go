package device

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// ErrGSO says that the kernel refused a super-packet: the caller splits it and
// writes its segments one by one. Device.Offloads may say less from then on.
var ErrGSO = errors.New("kernel refuses the super-packet")

// A Writer writes to a queue with memory of its own, so that several goroutines,
// each with its Writer, can write to one queue at the same time.
type Writer struct {
	queue *Queue
	iov   sys.IovWriter
}

// NewWriter returns a Writer for the queue.
func (q *Queue) NewWriter() *Writer { return &Writer{queue: q} }

// Write hands one packet to the kernel: the virtio-net header first, then the
// packet, gathered from at most 1024 slices of which the first holds at least
// the header. For a super-packet that the kernel refuses it returns ErrGSO and
// nothing was written. Other errors say that this packet is lost: EIO when the
// device is down, EINVAL for a malformed one.
func (w *Writer) Write(iov [][]byte) error {
	q, gso := w.queue, uint8(gsoNone)
	if len(iov) > 0 && len(iov[0]) >= VnetHdrLen {
		gso = iov[0][1]
	}
	_, err := w.iov.Write(q.fd, iov)
	switch {
	case err == nil:
		if gso != gsoNone {
			q.dev.accepted(gso)
		}
		return nil
	case err == error(unix.EINVAL) && gso != gsoNone:
		q.dev.refused(gso)
		return ErrGSO
	case err == error(unix.EBADFD):
		return q.explain(err)
	}
	return err
}
