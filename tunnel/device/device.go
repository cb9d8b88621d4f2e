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
	// MaxPacket is the largest IP packet that can be read or written, in bytes,
	// without the virtio-net header.
	MaxPacket = 65535
	// DefaultTxQueueLen is the number of packets that the device queues for the
	// reader. Local senders send about a million small packets per second, and on
	// a busy machine the reader may wait 3 ms for a CPU. Measured loss of a burst
	// of 1,024 and of 4,096 packets, with reader and sender on one CPU: queue of
	// 500 (the kernel's default) 47 % and 72 %; 1,000: 2 % and 57 %; 2,000: 0 and
	// 29 %; 4,096: 0 and 2 %. A longer queue would delay super-packets too long.
	DefaultTxQueueLen = 4096
	// MaxQueues is the kernel's limit (MAX_TAP_QUEUES).
	MaxQueues = 256
)

// Options of Open. The zero value of a field means its default.
type Options struct {
	Name       string // required, at most 15 bytes
	MTU        int    // bytes; default: the kernel's for a new device (1500), or the device's current MTU
	Queues     int    // default 1
	TxQueueLen int    // packets; default DefaultTxQueueLen
	Alias      string // of the interface (ip link set … alias); default: the device's current alias, if any
	Remedy     string // what the operator can do where an interface of another type has the name; default: what helps with the agent's --tun
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

// Offloads are the offloads in use between the kernel and the agent.
type Offloads struct {
	CSUM bool // packets with partial checksums (NEEDS_CSUM)
	TSO  bool // TCP super-packets, IPv4 and IPv6
	USO  bool // UDP super-packets, IPv4 and IPv6 (Linux 6.2)
}

// String lists the offloads that are on, or "none".
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
	index   int
	queues  []*Queue
	kept    bool // attached to an existing device
	name    string
	marks   int // the packet socket of Mark; 0: none, see noMarks
	noMarks error
	lost    uint64 // packets that the kernel has dropped before Open, when the device had no reader

	mu       sync.Mutex // guards nl, closed, and changes of offloads
	nl       *sys.Netlink
	closed   bool
	offloads atomic.Uint32 // TUN_F_… in use
	worked   atomic.Uint32 // TUN_F_… of super-packets that the kernel has accepted
}

// Name returns the device's name.
func (d *Device) Name() string { return d.name }

// Index returns the device's interface index.
func (d *Device) Index() int { return d.index }

// Queues returns the device's queues, at least one.
func (d *Device) Queues() []*Queue { return d.queues }

// Kept reports whether the device existed before: an earlier run left it with
// Persist, or FromFD received it.
func (d *Device) Kept() bool { return d.kept }

// Offloads returns the offloads in use now.
func (d *Device) Offloads() Offloads { return offloadsOf(int(d.offloads.Load())) }

// Persist sets whether the device outlives the process.
func (d *Device) Persist(on bool) error {
	if err := sys.TunPersist(d.queues[0].fd, on); err != nil {
		return fmt.Errorf("TUN device %s: TUNSETPERSIST: %w", d.name, err)
	}
	return nil
}

// FD returns the descriptor of the first queue. The Device keeps ownership.
func (d *Device) FD() int { return d.queues[0].fd }

// FDs returns the descriptors of all queues, for passing them to the service
// manager (see FromFD). The Device keeps ownership.
func (d *Device) FDs() []int {
	var fds []int
	for _, q := range d.queues {
		fds = append(fds, q.fd)
	}
	return fds
}

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

// SetTxQueueLen sets the number of packets that the device queues for the reader.
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
	TxDropped uint64 // packets to us that were dropped because the queue was full
	RxDropped uint64 // packets from us that the host dropped
	RxErrors  uint64 // malformed packets from us
}

// Stats reads the kernel's counters. TxDropped counts from Open on; of a device whose descriptors were kept (FromFD), whose queue
// has been there all the time, from its beginning.
func (d *Device) Stats() (Stats, error) {
	var s Stats
	err := d.link(func(l netlink.Link) error {
		if st := l.Attrs().Statistics; st != nil {
			s = Stats{TxDropped: st.TxDropped - d.lost, RxDropped: st.RxDropped, RxErrors: st.RxErrors + st.RxFrameErrors}
		}
		return nil
	})
	return s, err
}

// link calls f with the device's current attributes. It looks the device up by
// index, so that a rename does not matter, and uses the namespace in which the
// device was opened.
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

// Close closes all queues. That removes the device unless Persist is on. The
// readers of the queues must have returned; Wake ends their waits.
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
	errs = append(errs, d.closeMarks())
	d.nl.Close()
	return errors.Join(errs...)
}

// adopt passes an attached descriptor to wireguard/tun, which checks that it is a
// TUN device, makes it non-blocking and negotiates offloads. It passes a duplicate
// and closes it at once, because the os.File in wireguard/tun registers the device
// with Go's netpoller until Close. While it is registered, each packet for an idle
// agent also wakes an idle thread (measured with a UDP socket instead of the
// device: 0.3 context switches and 0.85 µs of CPU per packet).
func adopt(fd int) error {
	dup, err := sys.Dup(fd)
	if err != nil {
		return err
	}
	// On error the os.File made from dup closes it when it is garbage-collected.
	// Closing dup here too might close another descriptor with the same number.
	t, _, err := tun.CreateUnmonitoredTUNFromFD(dup)
	if err != nil {
		return err
	}
	return t.Close()
}
