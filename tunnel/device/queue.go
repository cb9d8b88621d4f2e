package device

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/tulle-net/tulle/internal/sys"
)

// A Queue is one queue of the device. The kernel spreads flows over the queues
// and keeps each flow on one.
type Queue struct {
	fd     int
	dev    *Device
	tun    tun.Device // owns fd
	poller *sys.Poller
	writer sys.IovWriter
}

// Read takes one packet into buf, without blocking: the virtio-net header, then
// the packet, n bytes in all. err is sys.ErrAgain when the queue is empty. buf
// has VnetHdrLen+MaxPacket bytes; what has no room in a shorter one is lost.
func (q *Queue) Read(buf []byte) (n int, err error) { return sys.Read(q.fd, buf) }

// Wait blocks until the queue has a packet (nil), or Wake was called
// (sys.ErrWoken).
func (q *Queue) Wait() error {
	err := q.poller.WaitRead()
	if err == sys.ErrErrQueue {
		return fmt.Errorf("TUN device %s: %w", q.dev.name, ErrGone)
	}
	return err
}

// Wake ends the present Wait, or else the next one.
func (q *Queue) Wake() { q.poller.Wake() }

// ErrGone says that the device was deleted under us.
var ErrGone = errors.New("device was removed")

// ErrGSO says that the kernel refused a super-packet: the caller splits it and
// writes its segments one by one. Device.Offloads may say less from then on.
var ErrGSO = errors.New("kernel refuses the super-packet")

// Write hands one packet to the kernel: the virtio-net header first, then the
// packet, gathered from at most 1024 slices. For a super-packet that the kernel
// refuses it returns ErrGSO and nothing was written. Other errors say that this
// packet is lost: EIO when the device is down, EINVAL for a malformed one.
func (q *Queue) Write(iov [][]byte) error {
	_, err := q.writer.Write(q.fd, iov)
	if err == nil {
		return nil
	}
	if err == error(unix.EINVAL) && len(iov) > 0 && len(iov[0]) >= 2 && iov[0][1] != 0 {
		q.dev.refused(iov[0][1])
		return ErrGSO
	}
	return err
}

func (q *Queue) close() error {
	return errors.Join(q.tun.Close(), q.poller.Close())
}
