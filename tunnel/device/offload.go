package device

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// ladder is what we ask the kernel for, best first. Every rung is tried until
// one is taken; the last is taken by any kernel.
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

// negotiate climbs down the ladder until the kernel agrees.
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
	return fmt.Errorf("TUN device %s: kernel takes no offload setting, not even none", d.name)
}

// refused notes that the kernel would not take a super-packet of a GSO type.
func (d *Device) refused(gsoType uint8) {}
