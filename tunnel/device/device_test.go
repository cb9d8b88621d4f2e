package device

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/internal/testing/namespace"
)

// patience bounds the waits for what must happen; nothing is asserted about how long it takes.
const patience = 20 * time.Second

// A host is a network namespace of the test.
type host struct {
	*namespace.Namespace
	t testing.TB
}

func newHost(t testing.TB) *host {
	t.Helper()
	return &host{namespace.New(t), t}
}

// tryOpen opens a device, which the test closes.
func (h *host) tryOpen(o Options) (d *Device, err error) {
	h.t.Helper()
	h.Do(func() error { d, err = Open(o); return nil })
	if err == nil {
		h.t.Cleanup(func() {
			if err := d.Close(); err != nil {
				h.t.Error(err)
			}
		})
	}
	return d, err
}

func (h *host) open(o Options) *Device {
	h.t.Helper()
	d, err := h.tryOpen(o)
	if err != nil {
		h.t.Fatal(err)
	}
	return d
}

func (h *host) link(name string) (l netlink.Link, err error) {
	h.t.Helper()
	h.Netlink(func(nl *sys.Netlink) error { l, err = nl.LinkByName(name); return nil })
	return l, err
}

func says(t *testing.T, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("no error, want one that says %q", words)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q does not say %q", err, w)
		}
	}
}

// A new device is up, with the offloads, MTU and queue length asked for, and is
// gone after Close.
func TestOpen(t *testing.T) {
	h := newHost(t)
	for _, queues := range []int{1, 3} {
		d := h.open(Options{Name: "tulle0", MTU: 1420, Queues: queues})
		if d.Name() != "tulle0" || len(d.Queues()) != queues || d.Kept() {
			t.Errorf("device %s, %d queues, kept %v", d.Name(), len(d.Queues()), d.Kept())
		}
		if o := d.Offloads(); !o.CSUM || !o.TSO {
			t.Errorf("offloads %v, want csum+tso at least", o)
		} else {
			t.Logf("offloads of this kernel: %v", o)
		}
		l, err := h.link("tulle0")
		if err != nil {
			t.Fatal(err)
		}
		a := l.Attrs()
		if a.Index != d.Index() || a.MTU != 1420 || a.TxQLen != DefaultTxQueueLen || a.Flags&net.FlagUp == 0 {
			t.Errorf("link: %+v", a)
		}
		if err := d.SetMTU(1300); err != nil {
			t.Error(err)
		}
		if err := d.SetTxQueueLen(1000); err != nil {
			t.Error(err)
		}
		if l, _ := h.link("tulle0"); l.Attrs().MTU != 1300 || l.Attrs().TxQLen != 1000 {
			t.Errorf("MTU %d, queue length %d", l.Attrs().MTU, l.Attrs().TxQLen)
		}
		says(t, d.SetMTU(70000), "tulle0", "70000")
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if _, err := h.link("tulle0"); err == nil {
			t.Error("device outlives Close")
		}
		says(t, d.SetMTU(1300), "closed")
	}
}

func TestOptions(t *testing.T) {
	for _, c := range []struct {
		o    Options
		says string
	}{
		{Options{}, "name"},
		{Options{Name: "sixteen-letters-"}, "1 to 15 bytes"},
		{Options{Name: "t", MTU: 60}, "60"},
		{Options{Name: "t", MTU: 70000}, "70000"},
		{Options{Name: "t", Queues: -1}, "-1"},
		{Options{Name: "t", Queues: 257}, "257"},
		{Options{Name: "t", TxQueueLen: -5}, "-5"},
	} {
		_, err := Open(c.o)
		says(t, err, c.says)
	}
}

// A device that somebody holds is not shared, also where the kernel would.
func TestBusy(t *testing.T) {
	h := newHost(t)
	for _, c := range []struct{ first, second int }{{1, 1}, {1, 2}, {2, 2}, {2, 1}} {
		d := h.open(Options{Name: "tulle0", Queues: c.first})
		if err := d.Persist(true); err != nil { // so that a wrong removal would show
			t.Fatal(err)
		}
		_, err := h.tryOpen(Options{Name: "tulle0", Queues: c.second})
		if !errors.Is(err, ErrBusy) {
			t.Errorf("%v: %v, want ErrBusy", c, err)
		}
		says(t, err, "tulle0", "another process", "/dev/net/tun")
		if err := d.Queues()[0].Write([][]byte{make([]byte, 10), {0x60}}); errors.Is(err, ErrGone) {
			t.Errorf("%v: the refused Open took the device away", c)
		}
		if err := d.Persist(false); err != nil {
			t.Fatal(err)
		}
		d.Close()
	}
}

// An interface of another kind keeps its name and its life.
func TestForeignInterface(t *testing.T) {
	h := newHost(t)
	h.Netlink(func(nl *sys.Netlink) error {
		tap := netlink.NewLinkAttrs()
		tap.Name = "tap0"
		veth := netlink.NewLinkAttrs()
		veth.Name = "veth0"
		return errors.Join(nl.LinkAdd(&netlink.Veth{LinkAttrs: veth, PeerName: "veth1"}),
			nl.LinkAdd(&netlink.Tuntap{LinkAttrs: tap, Mode: netlink.TUNTAP_MODE_TAP, Flags: netlink.TUNTAP_NO_PI}))
	})
	_, err := h.tryOpen(Options{Name: "veth0"})
	says(t, err, "veth0", "type veth", "another name with --tun", "--underlay")
	_, err = h.tryOpen(Options{Name: "tap0"})
	says(t, err, "tap0", "type tap", "another name with --tun", "--underlay")
	for _, name := range []string{"veth0", "tap0"} {
		if _, err := h.link(name); err != nil {
			t.Error(err)
		}
	}
}

// A persistent device outlives its holder with its index and addresses, and is
// taken up again. One with other queues is replaced.
func TestPersist(t *testing.T) {
	h := newHost(t)
	addr := netip.MustParsePrefix("10.7.0.1/32")
	for _, queues := range []int{1, 2} {
		d := h.open(Options{Name: "tulle0", Queues: queues, MTU: 1400})
		if err := d.Persist(true); err != nil {
			t.Fatal(err)
		}
		index := d.Index()
		h.Netlink(func(nl *sys.Netlink) error {
			return nl.AddrAdd(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index}},
				&netlink.Addr{IPNet: &net.IPNet{IP: addr.Addr().AsSlice(), Mask: net.CIDRMask(32, 32)}})
		})
		d.Close()

		d = h.open(Options{Name: "tulle0", Queues: queues})
		if !d.Kept() || d.Index() != index {
			t.Errorf("%d queues: kept %v, index %d, want %d", queues, d.Kept(), d.Index(), index)
		}
		h.Netlink(func(nl *sys.Netlink) error {
			l, err := nl.LinkByIndex(index)
			if err != nil {
				return err
			}
			addrs, err := nl.AddrList(l, unix.AF_INET)
			if err != nil || len(addrs) != 1 || l.Attrs().MTU != 1400 {
				t.Errorf("%d queues: addresses %v, MTU %d, %v", queues, addrs, l.Attrs().MTU, err)
			}
			return nil
		})
		d.Close()

		// The other number of queues: the kernel cannot change that.
		d = h.open(Options{Name: "tulle0", Queues: 3 - queues})
		if d.Kept() || d.Index() == index || len(d.Queues()) != 3-queues {
			t.Errorf("%d queues: kept %v, index %d as before, %d queues", queues, d.Kept(), d.Index(), len(d.Queues()))
		}
		d.Close()
		if _, err := h.link("tulle0"); err == nil {
			t.Error("the replacement is persistent")
		}
	}
}

// Descriptors that the service manager kept are taken over while the device goes
// on as it was.
func TestFromFD(t *testing.T) {
	h := newHost(t)
	for _, queues := range []int{1, 2} {
		first := h.open(Options{Name: "tulle0", Queues: queues, MTU: 1400})
		var fds []int
		for _, q := range first.Queues() {
			fd, err := sys.Dup(q.fd)
			if err != nil {
				t.Fatal(err)
			}
			fds = append(fds, fd)
		}
		first.Close()
		var d *Device
		h.Do(func() (err error) { d, err = FromFD(fds, Options{Name: "tulle0", MTU: 1350}); return err })
		if !d.Kept() || d.Name() != "tulle0" || d.Index() != first.Index() || len(d.Queues()) != queues || !d.Offloads().TSO {
			t.Errorf("device %s index %d of %d, %d queues, offloads %v", d.Name(), d.Index(), first.Index(), len(d.Queues()), d.Offloads())
		}
		if l, err := h.link("tulle0"); err != nil || l.Attrs().MTU != 1350 {
			t.Errorf("link %+v, %v", l, err)
		}
		d.Close()
		if _, err := h.link("tulle0"); err == nil {
			t.Error("device outlives its last descriptor")
		}
	}
}

// Descriptors of something else are refused, and closed.
func TestFromFDRefused(t *testing.T) {
	h := newHost(t)
	ours := func(flags uint16, name string) int {
		t.Helper()
		var fd int
		h.Do(func() (err error) {
			if fd, err = sys.TunOpen(); err != nil {
				return err
			}
			return sys.TunAttach(fd, name, flags)
		})
		return fd
	}
	event := func() int {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	for _, c := range []struct {
		what string
		fd   func() int
		says []string
	}{
		{"an eventfd", event, []string{"is not a TUN device"}},
		{"another name", func() int { return ours(sys.TunFlags, "other0") }, []string{"other0", "tulle0"}},
		{"no virtio-net header", func() int { return ours(unix.IFF_TUN|unix.IFF_NO_PI, "tulle0") }, []string{"tulle0", "ip link del"}},
		{"a TAP", func() int { return ours(unix.IFF_TAP|unix.IFF_NO_PI|unix.IFF_VNET_HDR, "tulle0") }, []string{"tulle0", "ip link del"}},
	} {
		fds := []int{c.fd(), event()}
		h.Do(func() error {
			_, err := FromFD(fds, Options{Name: "tulle0"})
			says(t, err, c.says...)
			return nil
		})
		for _, fd := range fds {
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != unix.EBADF {
				t.Errorf("%s: descriptor %d is still open: %v", c.what, fd, err)
			}
		}
	}
	h.Do(func() error {
		_, err := FromFD(nil, Options{})
		says(t, err, "no descriptor")
		return nil
	})
}

// onOwnThread runs f on a thread that is thrown away afterwards, so that f may
// spoil it.
func onOwnThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		f()
	}()
	<-done
}

// Without /dev/net/tun the error says how to get it.
func TestMissingNode(t *testing.T) {
	newHost(t)
	onOwnThread(func() {
		dir := filepath.Dir(sys.TunPath)
		if err := errors.Join(
			unix.Unshare(unix.CLONE_NEWNS),
			unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
			unix.Mount("tmpfs", dir, "tmpfs", 0, "")); err != nil {
			t.Error(err)
			return
		}
		_, err := Open(Options{Name: "tulle0"})
		says(t, err, sys.TunPath, "missing", "modprobe tun", "mknod")
		// A node without a driver behind it.
		if err := unix.Mknod(sys.TunPath, unix.S_IFCHR|0o600, int(unix.Mkdev(10, 254))); err != nil {
			t.Error(err)
			return
		}
		_, err = Open(Options{Name: "tulle0"})
		says(t, err, sys.TunPath, "no driver", "modprobe tun")
	})
}

// Without CAP_NET_ADMIN the error names it.
func TestNotPermitted(t *testing.T) {
	h := newHost(t)
	onOwnThread(func() {
		ns, err := os.Open(h.Path())
		if err != nil {
			t.Error(err)
			return
		}
		defer ns.Close()
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var caps [2]unix.CapUserData
		if err := errors.Join(unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET), unix.Capget(&hdr, &caps[0])); err != nil {
			t.Error(err)
			return
		}
		caps[0].Effective &^= 1 << unix.CAP_NET_ADMIN
		if err := unix.Capset(&hdr, &caps[0]); err != nil {
			t.Error(err)
			return
		}
		_, err = Open(Options{Name: "tulle0"})
		says(t, err, "tulle0", "not permitted", "CAP_NET_ADMIN")
		if !errors.Is(err, unix.EPERM) {
			t.Errorf("%v, want EPERM", err)
		}
	})
}

// Wait ends by Wake and by the device's removal.
func TestWait(t *testing.T) {
	h := newHost(t)
	d := h.open(Options{Name: "tulle0"})
	q := d.Queues()[0]
	buf := make([]byte, VnetHdrLen+MaxPacket)
	drain := func() { // the kernel's own router solicitations and MLD reports
		for {
			if _, err := q.Read(buf); err != nil {
				return
			}
		}
	}
	q.Wake()
	if _, err := q.Wait(); err != sys.ErrWoken {
		t.Errorf("Wait: %v, want ErrWoken", err)
	}
	ended := make(chan error)
	go func() {
		for {
			drain()
			if _, err := q.Wait(); err != nil {
				ended <- err
				return
			}
		}
	}()
	h.Netlink(func(nl *sys.Netlink) error {
		return nl.LinkDel(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: d.Index()}})
	})
	select {
	case err := <-ended:
		if !errors.Is(err, ErrGone) {
			t.Errorf("Wait: %v, want ErrGone", err)
		}
		says(t, err, "tulle0")
	case <-time.After(patience):
		t.Fatal("Wait does not see that the device is gone")
	}
	if _, err := q.Read(buf); !errors.Is(err, ErrGone) {
		t.Errorf("Read: %v, want ErrGone", err)
	}
	if err := q.Write([][]byte{make([]byte, VnetHdrLen), {0x45, 0, 0, 20}}); !errors.Is(err, ErrGone) {
		t.Errorf("Write: %v, want ErrGone", err)
	}
}

// Receive delivers every packet, ends with its context, and says when the device is gone.
func TestReceive(t *testing.T) {
	h := newHost(t)
	d := h.open(Options{Name: "tulle0"})
	q := d.Queues()[0]
	buf := make([]byte, VnetHdrLen+MaxPacket)
	got := make(chan int, 100)
	packet := func(b []byte) {
		select {
		case got <- len(b):
		default:
		}
	}
	ended := make(chan error)
	for range 2 {
		ctx, cancel := context.WithCancel(t.Context())
		go func() { ended <- q.Receive(ctx, buf, packet) }()
		h.Netlink(func(nl *sys.Netlink) error { // the kernel's own router solicitations and MLD reports
			l, err := nl.LinkByIndex(d.Index())
			if err == nil {
				err = errors.Join(nl.LinkSetDown(l), nl.LinkSetUp(l))
			}
			return err
		})
		select {
		case n := <-got:
			if n <= VnetHdrLen {
				t.Errorf("a packet of %d bytes", n)
			}
		case <-time.After(patience):
			t.Fatal("no packet")
		}
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("after its context: %v", err)
		}
	}
	go func() { ended <- q.Receive(t.Context(), buf, packet) }()
	h.Netlink(func(nl *sys.Netlink) error {
		return nl.LinkDel(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: d.Index()}})
	})
	select {
	case err := <-ended:
		if !errors.Is(err, ErrGone) {
			t.Errorf("%v, want ErrGone", err)
		}
	case <-time.After(patience):
		t.Fatal("it does not notice that the device is gone")
	}
	if err := q.Receive(t.Context(), buf, packet); !errors.Is(err, ErrGone) {
		t.Errorf("of a device that is gone: %v, want ErrGone", err)
	}
}
