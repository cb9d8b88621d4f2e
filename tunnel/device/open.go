package device

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// ErrBusy is the wrapped error of Open if another process uses the device.
var ErrBusy = errors.New("device is held by another process")

// Open opens the TUN device o.Name in the calling thread's network namespace,
// and creates it if it does not exist. If an earlier run left the device with
// Persist and no process uses it, Open attaches to it and keeps its addresses and
// routes. If that device was made for one queue and several are wanted, or the
// reverse, Open removes it first, because the kernel cannot change that. Open cannot know
// whose device it is: the caller sees to it that it is no other program's.
func Open(o Options) (*Device, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	o.Queues = max(o.Queues, 1)
	nl, err := sys.NewNetlink(-1)
	if err != nil {
		return nil, err
	}
	d := &Device{name: o.Name, nl: nl}
	if err := d.open(o); err != nil {
		d.abandon()
		return nil, err
	}
	before, err := d.Stats()
	if err != nil {
		d.abandon()
		return nil, err
	}
	d.lost = before.TxDropped
	return d, nil
}

// FromFD takes over the descriptors of a device that the service manager kept, one
// per queue. An earlier run must have opened them with Open in this network
// namespace. The Device owns them from then on; they are closed on error. o.Name,
// if set, must be the device's name; o.Queues is ignored.
func FromFD(fds []int, o Options) (*Device, error) {
	nl, err := sys.NewNetlink(-1)
	if err != nil {
		closeAll(fds)
		return nil, err
	}
	d := &Device{nl: nl, kept: true}
	if err := d.fromFD(fds, o); err != nil {
		d.abandon()
		return nil, err
	}
	return d, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		sys.Close(fd)
	}
}

func (d *Device) fromFD(fds []int, o Options) error {
	if len(fds) == 0 {
		return errors.New("kept TUN device: no descriptor")
	}
	for i, fd := range fds {
		name, err := checkKept(fd, o.Name)
		if err != nil {
			closeAll(fds[i:])
			return err
		}
		o.Name, d.name = name, name
		if err := d.addQueue(fd); err != nil {
			closeAll(fds[i+1:])
			return err
		}
	}
	if err := o.validate(); err != nil {
		return err
	}
	return d.setUp(o)
}

// checkKept returns the name of the device that fd is attached to. Unless want is
// empty, the name must be want.
func checkKept(fd int, want string) (string, error) {
	name, flags, err := sys.TunInfo(fd)
	if err != nil {
		return "", fmt.Errorf("kept descriptor %d is not a TUN device: %w", fd, err)
	}
	if want != "" && name != want {
		return "", fmt.Errorf("kept descriptor %d belongs to TUN device %s, not to %s", fd, name, want)
	}
	const need, never = sys.TunFlags, unix.IFF_TAP
	if flags&need != need || flags&never != 0 {
		return "", fmt.Errorf("kept TUN device %s has flags %#x, but needs %#x: another program opened it; remove it with `ip link del %s`", name, flags, need, name)
	}
	return name, nil
}

// abandon undoes a partial Open.
func (d *Device) abandon() {
	for _, q := range d.queues {
		q.close()
	}
	d.closeMarks()
	d.nl.Close()
}

func (d *Device) open(o Options) error {
	if err := d.lookAtOld(o); err != nil {
		return err
	}
	flags := uint16(sys.TunFlags)
	if o.Queues > 1 {
		flags |= sys.TunMultiQueue
	}
	for range o.Queues {
		fd, err := sys.TunOpen()
		if err != nil {
			return explainOpen(err)
		}
		if err := sys.TunAttach(fd, o.Name, flags); err != nil {
			sys.Close(fd)
			return explainAttach(o.Name, err)
		}
		if err := d.addQueue(fd); err != nil {
			return err
		}
	}
	return d.setUp(o)
}

// lookAtOld checks for an existing device of our name. It removes a TUN device that
// no process uses and that does not fit o.Queues.
func (d *Device) lookAtOld(o Options) error {
	link, err := d.nl.LinkByName(o.Name)
	if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing {
		return nil
	}
	if err != nil {
		return fmt.Errorf("TUN device %s: %w", o.Name, err)
	}
	old, ok := link.(*netlink.Tuntap)
	if !ok || old.Mode != netlink.TUNTAP_MODE_TUN {
		kind := link.Type()
		if ok {
			kind = "tap"
		}
		return fmt.Errorf("TUN device %s: an interface of type %s has this name: %s", o.Name, kind,
			cmp.Or(o.Remedy, "choose another name with --tun; the interface that carries the tunnel is named with --underlay"))
	}
	// With one queue the kernel itself refuses a second process. With several it
	// would let us join, and each process would get some of the packets.
	if old.Queues > 0 {
		return explainAttach(o.Name, unix.EBUSY)
	}
	hasMulti, wantMulti := old.Flags&netlink.TUNTAP_MULTI_QUEUE != 0, o.Queues > 1
	if hasMulti == wantMulti {
		d.kept = true
		return nil
	}
	return removeOld(o.Name, hasMulti)
}

// removeOld removes a persistent device that no process uses. It attaches to the
// device, which proves that, clears its persistence, and closes it.
func removeOld(name string, multi bool) error {
	fd, err := sys.TunOpen()
	if err != nil {
		return explainOpen(err)
	}
	defer sys.Close(fd)
	flags := uint16(sys.TunFlags)
	if multi {
		flags |= sys.TunMultiQueue
	}
	if err := sys.TunAttach(fd, name, flags); err != nil {
		return explainAttach(name, err)
	}
	if err := sys.TunPersist(fd, false); err != nil {
		return fmt.Errorf("TUN device %s: TUNSETPERSIST: %w", name, err)
	}
	return nil
}

func explainOpen(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s is missing: load the driver (`modprobe tun`), or make the node (`mkdir -p /dev/net && mknod %s c 10 200`): %w", sys.TunPath, sys.TunPath, err)
	case errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO):
		return fmt.Errorf("%s has no driver: load it (`modprobe tun`), or use a kernel with CONFIG_TUN: %w", sys.TunPath, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s cannot be opened: run as root, or with the capability CAP_NET_ADMIN and access to the node: %w", sys.TunPath, err)
	}
	return fmt.Errorf("open %s: %w", sys.TunPath, err)
}

func explainAttach(name string, err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("TUN device %s: not permitted: run as root, or with the capability CAP_NET_ADMIN: %w", name, err)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("TUN device %s: %w (%w): see which with `fuser -v %s`, stop it, or choose another device name with --tun", name, ErrBusy, err, sys.TunPath)
	}
	return fmt.Errorf("TUN device %s: TUNSETIFF: %w", name, err)
}

// addQueue makes a Queue from an attached descriptor. It owns the descriptor, also on error.
func (d *Device) addQueue(fd int) error {
	if err := sys.TunSetVnetHdr(fd); err != nil {
		sys.Close(fd)
		return fmt.Errorf("TUN device %s: %w", d.name, err)
	}
	if err := adopt(fd); err != nil {
		sys.Close(fd)
		return fmt.Errorf("TUN device %s: %w", d.name, err)
	}
	p, err := sys.NewPoller(fd)
	if err != nil {
		sys.Close(fd)
		return err
	}
	q := &Queue{fd: fd, dev: d, poller: p}
	q.writer = q.NewWriter()
	d.queues = append(d.queues, q)
	return nil
}

// setUp configures an attached device and sets it up.
func (d *Device) setUp(o Options) error {
	link, err := d.nl.LinkByName(d.name)
	if err != nil {
		return fmt.Errorf("TUN device %s: %w", d.name, err)
	}
	d.index = link.Attrs().Index
	if t, ok := link.(*netlink.Tuntap); ok && t.Queues > len(d.queues) {
		return explainAttach(d.name, unix.EBUSY) // another process joined during Open
	}
	if err := d.negotiate(); err != nil {
		return err
	}
	if o.TxQueueLen == 0 {
		o.TxQueueLen = DefaultTxQueueLen
	}
	if err := d.SetTxQueueLen(o.TxQueueLen); err != nil {
		return err
	}
	if o.MTU != 0 {
		if err := d.SetMTU(o.MTU); err != nil {
			return err
		}
	}
	if o.Alias != "" {
		if err := d.nl.LinkSetAlias(link, o.Alias); err != nil {
			return fmt.Errorf("TUN device %s: set alias %q: %w", d.name, o.Alias, err)
		}
	}
	if err := d.nl.LinkSetUp(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: d.index, Name: d.name}}); err != nil {
		return fmt.Errorf("TUN device %s: set up: %w", d.name, err)
	}
	d.openMarks()
	return nil
}
