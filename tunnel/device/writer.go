package device

import (
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// A Writer writes to a queue with memory of its own, so that several goroutines,
// each with its Writer, can write to one queue at the same time.
type Writer struct {
	queue *Queue
	iov   sys.IovWriter
}

// NewWriter returns a Writer for the queue.
func (q *Queue) NewWriter() *Writer { return &Writer{queue: q} }

// Write is [Queue.Write].
func (w *Writer) Write(iov [][]byte) error {
	_, err := w.iov.Write(w.queue.fd, iov)
	if err == error(unix.EINVAL) && len(iov) > 0 && len(iov[0]) >= 2 && iov[0][1] != 0 {
		w.queue.dev.refused(iov[0][1])
		return ErrGSO
	}
	return err
}
