package device

import (
	"context"
	"errors"
	"fmt"
	"os"
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

// ErrGone means that the device was removed, by `ip link del` or with its network
// namespace. Close it and Open it again.
var ErrGone = errors.New("TUN device was removed")

// Read reads one packet into buf, without blocking: the virtio-net header, then
// the packet, n bytes in total. err is sys.ErrAgain if the queue is empty. buf
// should have VnetHdrLen+MaxPacket bytes; a shorter one loses the rest.
func (q *Queue) Read(buf []byte) (n int, err error) {
	n, err = sys.Read(q.fd, buf)
	if err == nil || err == sys.ErrAgain {
		return n, err
	}
	return 0, q.explain(err)
}

// Wait blocks until the queue has a packet (nil), Wake is called (sys.ErrWoken), or
// the device is removed (ErrGone), and returns how long it waited.
func (q *Queue) Wait() (time.Duration, error) {
	waited, err := q.poller.WaitRead()
	if err == sys.ErrErrQueue { // poll reports POLLERR
		err = q.explain(unix.EBADFD)
	}
	return waited, err
}

// Receive reads packets into buf and passes them to packet, until ctx is done, which is
// not an error, or reading fails. It is for a queue with few packets: it waits in the
// runtime's poller, which costs less than Wait, and where a packet waits longer.
func (q *Queue) Receive(ctx context.Context, buf []byte, packet func([]byte)) error {
	fd, err := unix.FcntlInt(uintptr(q.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%s: duplicate the descriptor: %w", q.dev.name, err)
	}
	f := os.NewFile(uintptr(fd), q.dev.name) // it does not block, so the runtime polls it
	defer f.Close()
	raw, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("%s: %w", q.dev.name, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var failed error
	err = raw.Read(func(uintptr) (done bool) {
		for ctx.Err() == nil {
			n, err := q.Read(buf)
			if err == sys.ErrAgain {
				return false
			}
			if err != nil {
				failed = err
				return true
			}
			packet(buf[:n])
		}
		return true
	})
	if failed != nil || ctx.Err() != nil {
		return failed
	}
	// Where poll reports an error, the runtime only says "not pollable". A TUN reports one as soon as its removal begins; reading
	// fails only when that is done.
	fds := []unix.PollFd{{Fd: int32(q.fd)}}
	if _, perr := unix.Poll(fds, 0); perr == nil && fds[0].Revents&unix.POLLERR != 0 {
		err = unix.EBADFD
	}
	return q.explain(err)
}

// Pause sleeps for d, or until Wake is called, so that packets gather in the queue.
func (q *Queue) Pause(d time.Duration) { q.poller.Pause(d) }

// Wake ends the current Wait or Pause, or else the next one: at once, or within some 20 ms if packets came shortly before.
func (q *Queue) Wake() { q.poller.Wake() }

// Write is [Writer.Write] on a Writer that belongs to the queue, for use by one goroutine.
func (q *Queue) Write(iov [][]byte) error { return q.writer.Write(iov) }

// explain replaces the errors of a detached descriptor by ErrGone.
func (q *Queue) explain(err error) error {
	if err == error(unix.EBADFD) || err == error(unix.EFAULT) {
		return fmt.Errorf("%s: %w", q.dev.name, ErrGone)
	}
	return fmt.Errorf("TUN device %s: %w", q.dev.name, err)
}

func (q *Queue) close() error {
	return errors.Join(sys.Close(q.fd), q.poller.Close())
}
