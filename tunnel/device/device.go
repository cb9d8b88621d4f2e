package device

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/tulle-net/tulle/internal/sys"
)

// Sizes and defaults.
const (
	// VnetHdrLen is the length in bytes of the virtio-net header before each
	// packet.
	VnetHdrLen = 10
	// MaxPacket is the largest IP packet that a read gives or a write takes, in
	// bytes, without the virtio-net header.
	MaxPacket = 65535
	// DefaultTxQueueLen is how many packets the device holds for a reader that
	// is late. Local senders make about a million small packets a second, and a
	// busy machine lets a reader wait for 3 ms. Measured, reader and sender on one
	// CPU, packets lost of a burst of 1,024 and of 4,096: with a queue of 500
	// (the kernel's default) 47 % and 72 %, 1,000 2 % and 57 %, 2,000 0 and 29 %,
	// 4,096 0 and 2 %. Longer ones would hold super-packets for too long.
	DefaultTxQueueLen = 4096
	// MaxQueues is the kernel's limit (MAX_TAP_QUEUES).
	MaxQueues = 256
)

// Options of Open. The zero value of a field means its default.
type Options struct {
	Name       string // required, at most 15 bytes
	MTU        int    // bytes; the kernel's default of a new device (1500), or what the device has
	Queues     int    // 1
	TxQueueLen int    // packets; DefaultTxQueueLen
	Alias      string // of the interface (ip link set … alias); none, or what the device has
}

func (o Options) validate() error {
	switch {
	case o.Name == "" || len(o.Name) >= unix.IFNAMSIZ:
		return fmt.Errorf("TUN device name %q: must have 1 to %d bytes", o.Name, unix.IFNAMSIZ-1)
	case o.MTU != 0 && (o.MTU < 68 || o.MTU > MaxPacket):
		return fmt.Errorf("TUN device %s: MTU %d is not within 68 and %d bytes", o.Name, o.MTU, MaxPacket)
	case o.Queues < 0 || o.Queues > MaxQueues:
		return fmt.Errorf("TUN device %s: %d queues are not within 1 and %d", o.Name, o.Queues, MaxQueues)
	case o.TxQueueLen < 0:
		return fmt.Errorf("TUN device %s: negative queue length %d", o.Name, o.TxQueueLen)
	}
	return nil
}

// Offloads are the super-packets that pass between the kernel and us.
type Offloads struct {
	CSUM bool // packets without complete checksums (NEEDS_CSUM)
	TSO  bool // TCP super-packets, IPv4 and IPv6
	USO  bool // UDP super-packets, IPv4 and IPv6 (Linux 6.2)
}

// String lists what is on, "none" if nothing.
func (o Offloads) String() string {
	s := ""
	for _, p := range []struct {
		on   bool
		name string
	}{{o.CSUM, "csum"}, {o.TSO, "tso"}, {o.USO, "uso"}} {
		if p.on {
			if s != "" {
				s += "+"
			}
			s += p.name
		}
	}
	if s == "" {
		return "none"
	}
	return s
}

// A Device is an open TUN device.
type Device struct {
	index  int
	queues []*Queue
	kept   bool // attached to a device that was there before
	name   string

	mu       sync.Mutex // guards nl, closed, and changes of offloads
	nl       *sys.Netlink
	closed   bool
	offloads atomic.Uint32 // TUN_F_… in force
	worked   atomic.Uint32 // TUN_F_… of super-packets that the kernel has taken from us
}

// Name is the device's name.
func (d *Device) Name() string { return d.name }

// Index is the device's interface index.
func (d *Device) Index() int { return d.index }

// Queues are the device's queues, at least one.
func (d *Device) Queues() []*Queue { return d.queues }

// Kept reports that the device was there before: by an earlier run with
// Persist, or handed over by FromFD.
func (d *Device) Kept() bool { return d.kept }

// Offloads are the super-packets in force now.
func (d *Device) Offloads() Offloads { return offloadsOf(int(d.offloads.Load())) }

// Persist makes the device outlive the process, or not.
func (d *Device) Persist(on bool) error {
	if err := sys.TunPersist(d.queues[0].fd, on); err != nil {
		return fmt.Errorf("TUN device %s: TUNSETPERSIST: %w", d.name, err)
	}
	return nil
}

// FD is the descriptor of the first queue, for handing it to the service
// manager. It stays the Device's.
func (d *Device) FD() int { return d.queues[0].fd }

// SetMTU sets the device's MTU in bytes.
func (d *Device) SetMTU(mtu int) error {
	return d.link(func(l netlink.Link) error {
		if l.Attrs().MTU == mtu {
			return nil
		}
		if err := d.nl.LinkSetMTU(l, mtu); err != nil {
			return fmt.Errorf("TUN device %s: set MTU %d: %w", d.name, mtu, err)
		}
		return nil
	})
}

// SetTxQueueLen sets how many packets the device holds for a late reader.
func (d *Device) SetTxQueueLen(packets int) error {
	return d.link(func(l netlink.Link) error {
		if l.Attrs().TxQLen == packets {
			return nil
		}
		if err := d.nl.LinkSetTxQLen(l, packets); err != nil {
			return fmt.Errorf("TUN device %s: set queue length %d: %w", d.name, packets, err)
		}
		return nil
	})
}

// Stats are the kernel's counters of the device, seen from the host's side.
type Stats struct {
	TxDropped uint64 // packets to us that found the queue full, or the device without reader
	RxDropped uint64 // packets from us that the host refused
	RxErrors  uint64 // malformed packets from us
}

// Stats reads the kernel's counters.
func (d *Device) Stats() (Stats, error) {
	var s Stats
	err := d.link(func(l netlink.Link) error {
		if st := l.Attrs().Statistics; st != nil {
			s = Stats{TxDropped: st.TxDropped, RxDropped: st.RxDropped, RxErrors: st.RxErrors + st.RxFrameErrors}
		}
		return nil
	})
	return s, err
}

// link runs f with the device's present attributes, by index, so that a rename
// does not matter. The netlink socket stays in the namespace that the device was
// opened in.
func (d *Device) link(f func(netlink.Link) error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return fmt.Errorf("TUN device %s: is closed", d.name)
	}
	l, err := sys.RetryDump(func() (netlink.Link, error) { return d.nl.LinkByIndex(d.index) })
	if err != nil {
		return fmt.Errorf("TUN device %s: %w", d.name, err)
	}
	return f(l)
}

// Close closes all queues. Unless Persist was asked for, that removes the
// device. The queues' readers must have returned: Wake ends their waits.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil
	}
	d.closed = true
	var errs []error
	for _, q := range d.queues {
		errs = append(errs, q.close())
	}
	d.nl.Close()
	return errors.Join(errs...)
}

// adopt lets wireguard/tun take an attached descriptor: it checks that this is a
// TUN device, makes it non-blocking and agrees on offloads. It gets a duplicate
// and is let go of at once, because its os.File registers the device with Go's
// netpoller, which nothing but Close undoes: from then on every packet for an
// idle agent wakes an idle thread beside the reader (measured with a UDP socket
// in place of the device: 0.3 context switches and 0.85 µs of CPU a packet).
func adopt(fd int) error {
	dup, err := sys.Dup(fd)
	if err != nil {
		return err
	}
	// On error the os.File made of dup closes it when it is collected. Closing it
	// here as well might hit another descriptor of the same number.
	t, _, err := tun.CreateUnmonitoredTUNFromFD(dup)
	if err != nil {
		return err
	}
	return t.Close()
}
