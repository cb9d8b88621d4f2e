package sys

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Offload is something that a network device does for the stack, as ethtool(8) names it.
type Offload uint32

// The offloads that SetOffload and GetOffload know.
const (
	TSO Offload = unix.ETHTOOL_STSO // TCP segmentation by the device
	GSO Offload = unix.ETHTOOL_SGSO // segmentation just before the device
	GRO Offload = unix.ETHTOOL_SGRO // joining of segments that arrive
)

// SetOffload switches an offload of a device of the calling thread's network namespace.
func SetOffload(dev string, o Offload, on bool) error {
	value := ethtoolValue{cmd: uint32(o)}
	if on {
		value.data = 1
	}
	return value.call(dev)
}

// GetOffload reports whether an offload of a device of the calling thread's network namespace is on. It needs no root.
func GetOffload(dev string, o Offload) (bool, error) {
	value := ethtoolValue{cmd: uint32(o) - 1} // linux/ethtool.h: the number of each "get" comes before its "set"
	err := value.call(dev)
	return value.data != 0, err
}

// ethtoolValue is struct ethtool_value.
type ethtoolValue struct{ cmd, data uint32 }

func (value *ethtoolValue) call(dev string) error {
	req := struct { // struct ifreq
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}{data: unsafe.Pointer(value)}
	copy(req.name[:unix.IFNAMSIZ-1], dev)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket for ethtool: %w", err)
	}
	defer unix.Close(fd)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return fmt.Errorf("%s: ethtool command %#x to %d: %w", dev, value.cmd, value.data, errno)
	}
	return nil
}
