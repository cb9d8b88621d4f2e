package device

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// A Queue is one queue of the device. The kernel spreads flows over the queues
// and keeps each flow on one.
type Queue struct {
	fd     int
	dev    *Device
	poller *sys.Poller
	writer *Writer
}

// ErrGone says that the device was removed under us, by `ip link del` or with
// its network namespace. Close it and Open it again.
var ErrGone = errors.New("TUN device was removed")

// Read takes one packet into buf, without blocking: the virtio-net header, then
// the packet, n bytes in all. err is sys.ErrAgain when the queue is empty. buf
// has VnetHdrLen+MaxPacket bytes; what has no room in a shorter one is lost.
func (q *Queue) Read(buf []byte) (n int, err error) {
	n, err = sys.Read(q.fd, buf)
	if err == nil || err == sys.ErrAgain {
		return n, err
	}
	return 0, q.explain(err)
}

// Wait blocks until the queue has a packet (nil), or Wake was called
// (sys.ErrWoken). ErrGone ends it when the device is removed.
func (q *Queue) Wait() error {
	err := q.poller.WaitRead()
	if err == sys.ErrErrQueue { // poll reports POLLERR
		return q.explain(unix.EBADFD)
	}
	return err
}

// Pause lets packets arrive for d, or until Wake is called.
func (q *Queue) Pause(d time.Duration) { q.poller.Pause(d) }

// Wake ends the present Wait, or else the next one.
func (q *Queue) Wake() { q.poller.Wake() }

// Write is that of a Writer which the queue has for one goroutine.
func (q *Queue) Write(iov [][]byte) error { return q.writer.Write(iov) }

// explain turns the errors of a detached descriptor into ErrGone.
func (q *Queue) explain(err error) error {
	if err == error(unix.EBADFD) || err == error(unix.EFAULT) {
		return fmt.Errorf("%s: %w", q.dev.name, ErrGone)
	}
	return fmt.Errorf("TUN device %s: %w", q.dev.name, err)
}

func (q *Queue) close() error {
	return errors.Join(sys.Close(q.fd), q.poller.Close())
}
