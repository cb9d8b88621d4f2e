package device

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// etherTypeIPv4 is the EtherType of IPv4 in the order of the network, as sockaddr_ll has it.
var etherTypeIPv4 = binary.NativeEndian.Uint16([]byte{0x08, 0x00})

// openMarks opens the packet socket of Mark. It receives nothing, and what it sends passes no qdisc, filter or capture of the
// host (PACKET_QDISC_BYPASS, packet(7)). A device works without it.
func (d *Device) openMarks() {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err == nil {
		if err = unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1); err != nil {
			sys.Close(fd)
		}
	}
	if err != nil {
		d.noMarks = fmt.Errorf("TUN device %s: packet socket: %w", d.name, err)
		return
	}
	d.marks = fd
}

func (d *Device) closeMarks() error {
	if d.marks == 0 {
		return nil
	}
	return sys.Close(d.marks)
}

// Marks says why the device has no Mark; nil if it has.
func (d *Device) Marks() error { return d.noMarks }

// Mark puts an IPv4 packet behind all that waits in the queue of the device that the hash of its flow chooses: whoever reads it there knows
// how long packets wait. The error wraps ENOBUFS if the queue is full.
func (d *Device) Mark(pkt []byte) error {
	if d.noMarks != nil {
		return d.noMarks
	}
	if err := unix.Sendto(d.marks, pkt, 0, &unix.SockaddrLinklayer{Protocol: etherTypeIPv4, Ifindex: d.index}); err != nil {
		return fmt.Errorf("TUN device %s: mark the queue: %w", d.name, err)
	}
	return nil
}
