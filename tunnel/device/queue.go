package device

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// A Queue is one queue of the device. The kernel spreads flows over the queues
// and keeps each flow on one.
type Queue struct {
	fd     int
	dev    *Device
	poller *sys.Poller
	writer sys.IovWriter
}

// ErrGone says that the device was removed under us, by `ip link del` or with
// its network namespace. Close it and Open it again.
var ErrGone = errors.New("TUN device was removed")

// ErrGSO says that the kernel refused a super-packet: the caller splits it and
// writes its segments one by one. Device.Offloads may say less from then on.
var ErrGSO = errors.New("kernel refuses the super-packet")

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

// Wake ends the present Wait, or else the next one.
func (q *Queue) Wake() { q.poller.Wake() }

// Write hands one packet to the kernel: the virtio-net header first, then the
// packet, gathered from at most 1024 slices of which the first holds at least
// the header. For a super-packet that the kernel refuses it returns ErrGSO and
// nothing was written. Other errors say that this packet is lost: EIO when the
// device is down, EINVAL for a malformed one.
func (q *Queue) Write(iov [][]byte) error {
	gso := uint8(gsoNone)
	if len(iov) > 0 && len(iov[0]) >= VnetHdrLen {
		gso = iov[0][1]
	}
	_, err := q.writer.Write(q.fd, iov)
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

// explain turns the errors of a detached descriptor into ErrGone.
func (q *Queue) explain(err error) error {
	if err == error(unix.EBADFD) || err == error(unix.EFAULT) {
		return fmt.Errorf("%s: %w", q.dev.name, ErrGone)
	}
	return fmt.Errorf("TUN device %s: read: %w", q.dev.name, err)
}

func (q *Queue) close() error {
	return errors.Join(sys.Close(q.fd), q.poller.Close())
}
