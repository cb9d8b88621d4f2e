package device

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// ladder lists the offload settings to try, best first. The first one that the
// kernel accepts is used; every kernel accepts the last.
var ladder = []int{
	sys.TunCSUM | sys.TunTSO | sys.TunTSOECN | sys.TunUSO, // Linux 6.2
	sys.TunCSUM | sys.TunTSO | sys.TunTSOECN,
	sys.TunCSUM | sys.TunTSO,
	0,
}

func offloadsOf(flags int) Offloads {
	return Offloads{
		CSUM: flags&sys.TunCSUM != 0,
		TSO:  flags&sys.TunTSO == sys.TunTSO,
		USO:  flags&sys.TunUSO == sys.TunUSO,
	}
}

// negotiate tries the settings of the ladder until the kernel accepts one.
func (d *Device) negotiate() error {
	for _, flags := range ladder {
		err := sys.TunSetOffload(d.queues[0].fd, flags)
		if err == nil {
			d.offloads.Store(uint32(flags))
			return nil
		}
		if !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("TUN device %s: TUNSETOFFLOAD: %w", d.name, err)
		}
	}
	return fmt.Errorf("TUN device %s: the kernel accepts no offload setting, not even none", d.name)
}

// GSO types of the virtio-net header (linux/virtio_net.h).
const (
	gsoNone  = 0
	gsoTCPv4 = 1
	gsoTCPv6 = 4
	gsoUDPL4 = 5
	gsoECN   = 0x80 // flag added to a TCP type
)

// kind returns the TUN_F_… flags that a GSO type needs.
func kind(gsoType uint8) uint32 {
	switch gsoType &^ gsoECN {
	case gsoTCPv4, gsoTCPv6:
		return sys.TunTSO
	case gsoUDPL4:
		return sys.TunUSO
	}
	return 0
}

// accepted records that the kernel accepted a super-packet of a GSO type.
func (d *Device) accepted(gsoType uint8) {
	if k := kind(gsoType); d.worked.Load()&k != k {
		d.worked.Or(k)
	}
}

// refused records that the kernel refused a super-packet of a GSO type. If the
// kernel has accepted that type before, the packet was at fault. Otherwise the
// device switches to the next setting of the ladder without that type.
func (d *Device) refused(gsoType uint8) {
	k := kind(gsoType)
	if k == 0 || d.worked.Load()&k != 0 {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.offloads.Load()
	if d.closed || now&k == 0 {
		return
	}
	for _, flags := range ladder {
		if uint32(flags)&k != 0 || uint32(flags)&^now != 0 {
			continue
		}
		if sys.TunSetOffload(d.queues[0].fd, flags) == nil {
			d.offloads.Store(uint32(flags))
			return
		}
	}
}
