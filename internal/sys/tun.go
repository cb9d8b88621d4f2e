package sys

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TUNSETIFF flags of every TUN device that Tulle opens: layer 3, no packet information
// header, a virtio-net header in front of each packet.
const TunFlags = unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR

// TunMultiQueue is the additional flag of a device with several queues.
const TunMultiQueue = unix.IFF_MULTI_QUEUE

// Offloads of TUNSETOFFLOAD (linux/if_tun.h). USO needs Linux 6.2.
const (
	TunCSUM   = unix.TUN_F_CSUM
	TunTSO    = unix.TUN_F_TSO4 | unix.TUN_F_TSO6
	TunTSOECN = unix.TUN_F_TSO_ECN
	TunUSO    = unix.TUN_F_USO4 | unix.TUN_F_USO6
)

// TunPath is the device node of the tun driver.
const TunPath = "/dev/net/tun"

// TunOpen opens the tun driver's node, non-blocking, not attached to a device yet.
func TunOpen() (int, error) {
	return unix.Open(TunPath, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
}

// TunAttach attaches fd to the device name with the given flags (TUNSETIFF). It
// creates the device if it does not exist. The name may contain one %d.
func TunAttach(fd int, name string, flags uint16) error {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	ifr.SetUint16(flags)
	return unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
}

// TunInfo returns the name and the flags of the device that fd is attached to
// (TUNGETIFF).
func TunInfo(fd int) (name string, flags uint16, err error) {
	ifr, err := unix.NewIfreq("")
	if err != nil {
		return "", 0, err
	}
	if err := unix.IoctlIfreq(fd, unix.TUNGETIFF, ifr); err != nil {
		return "", 0, err
	}
	return ifr.Name(), ifr.Uint16(), nil
}

// TunSetOffload tells the kernel which super-packets the owner of fd accepts.
func TunSetOffload(fd int, offloads int) error {
	return unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloads)
}

// TunSetVnetHdr sets the virtio-net header to 10 bytes in host byte order. An earlier
// owner of a persistent device may have set it differently.
func TunSetVnetHdr(fd int) error {
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, 10); err != nil {
		return fmt.Errorf("TUNSETVNETHDRSZ: %w", err)
	}
	little := 0
	if one := uint16(1); *(*byte)(unsafe.Pointer(&one)) == 1 {
		little = 1
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETLE, little); err != nil {
		return fmt.Errorf("TUNSETVNETLE: %w", err)
	}
	return nil
}

// TunPersist sets whether the device outlives its last descriptor.
func TunPersist(fd int, on bool) error {
	v := 0
	if on {
		v = 1
	}
	return unix.IoctlSetInt(fd, unix.TUNSETPERSIST, v)
}

// Read reads from the non-blocking descriptor fd into b. It returns ErrAgain if there
// is nothing to read.
func Read(fd int, b []byte) (int, error) {
	for {
		n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// IovWriter has the buffers for one writev(2). It belongs to one goroutine at a
// time.
type IovWriter struct {
	iovs [maxIovecs]unix.Iovec
}

// Write writes bufs with one writev to the non-blocking descriptor fd. It refuses more
// than 1024 slices with EINVAL, like the kernel. It skips empty slices.
func (w *IovWriter) Write(fd int, bufs [][]byte) (int, error) {
	k := 0
	for _, b := range bufs {
		if len(b) == 0 {
			continue
		}
		if k == len(w.iovs) {
			return 0, unix.EINVAL
		}
		w.iovs[k].Base = unsafe.SliceData(b)
		w.iovs[k].SetLen(len(b))
		k++
	}
	for {
		n, _, errno := unix.RawSyscall(unix.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(&w.iovs)), uintptr(k))
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// maxIovecs is UIO_MAXIOV, the kernel's limit for one message or write.
const maxIovecs = 1024
