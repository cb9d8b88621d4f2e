package device

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// ErrGSO means that the kernel refused a super-packet. The caller should split it and
// write the segments one by one. Device.Offloads may return fewer offloads from then
// on.
var ErrGSO = errors.New("kernel refuses the super-packet")

// A Writer writes to a queue and has its own memory, so that several goroutines,
// each with its own Writer, can write to one queue at the same time.
type Writer struct {
	queue *Queue
	iov   sys.IovWriter
}

// NewWriter returns a Writer for the queue.
func (q *Queue) NewWriter() *Writer { return &Writer{queue: q} }

// Write writes one packet: the virtio-net header and the packet, gathered from at
// most 1024 slices. The first slice must contain the whole header. If the kernel
// refuses a super-packet, Write returns ErrGSO and has written nothing. With any
// other error the packet is lost: EIO if the device is down, EINVAL if the packet
// is malformed.
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
