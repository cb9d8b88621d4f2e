package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/hostnet"
	"github.com/tulle-net/tulle/tunnel/device"
)

// systemd keeps the descriptors of the TUN's queues and of the receiving sockets (FileDescriptorStoreMax,
// sd_pid_notify_with_fds(3)) while the agent restarts. So packets wait in the queues and receive buffers until the next run has
// its tables, instead of being dropped. Without systemd the device is persistent, and only packets that arrive in between are
// lost.

// fdStore is what the service manager has kept for this run: descriptors by name. The zero value is empty.
type fdStore map[string][]int

// openStore takes over the descriptors from the service manager. It returns them once.
func openStore() fdStore {
	s := fdStore{}
	for _, f := range activation.Files(true) {
		if n, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0); err == nil {
			s[f.Name()] = append(s[f.Name()], n)
		}
		f.Close()
	}
	return s
}

// take returns the descriptors of a name, which the caller then owns. It closes all of them and returns none if there are not
// as many as wanted.
func (s fdStore) take(name string, want int) []int {
	fds := s[name]
	delete(s, name)
	if len(fds) != want {
		for _, fd := range fds {
			syscall.Close(fd)
		}
		return nil
	}
	return fds
}

// tunName is the name of the TUN's descriptors in the store, with the number of its queues: another one needs a new device.
func tunName(tun string, queues int) string { return fmt.Sprintf("tun-%s-%d", tun, queues) }

// socketsName is the name of the sockets' descriptors. It depends on everything that makes them what they are.
func socketsName(addrs []netip.Addr, udp, vxlan uint16, queues int) string {
	sum := sha256.Sum256(fmt.Append(nil, addrs, udp, vxlan, queues))
	return "sockets-" + hex.EncodeToString(sum[:8])
}

// discard closes what the store has under other names than those given, and makes the service manager release it. It reports
// whether there was something. The manager closes its copies a moment later.
func (a *agent) discard(keep ...string) (found bool) {
	for _, name := range slices.Collect(maps.Keys(a.store)) {
		if !slices.Contains(keep, name) {
			a.store.take(name, -1)
			a.release(name)
			found = true
		}
	}
	return found
}

// openTUN adopts the kept descriptors, if there are some, or opens the device. It refuses a device that is another program's.
func (a *agent) openTUN(o device.Options) (*device.Device, error) {
	name := tunName(o.Name, o.Queues)
	if fds := a.store.take(name, o.Queues); fds != nil {
		d, err := device.FromFD(fds, o)
		if err == nil {
			a.log.Info("adopted the TUN device that the service manager kept", "tun", o.Name)
			return d, nil
		}
		a.log.Warn("cannot use the TUN device that the service manager kept, opening it again", "error", err)
		a.release(name)
	}
	var d *device.Device
	err := afterRelease(device.ErrBusy, func() (err error) {
		if err := hostnet.CheckTun(o.Name); err != nil {
			return err
		}
		d, err = device.Open(o)
		return err
	})
	return d, err
}

// afterRelease calls open until its error is not busy, for as long as the service manager may need to close what it was told to
// release. Without a service manager it calls open once.
func afterRelease(busy error, open func() error) error {
	for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		err := open()
		if err == nil || !errors.Is(err, busy) || time.Now().After(deadline) || os.Getenv("NOTIFY_SOCKET") == "" {
			return err
		}
	}
}

// keep passes descriptors to the service manager, if there is one, in place of those that it has under that name. It does not
// watch them: a socket with an ICMP error in its queue is as good as any (FDPOLL, sd_notify(3)).
func (a *agent) keep(name string, fds []int) {
	a.release(name)
	for part := range slices.Chunk(fds, maxRights) {
		if err := notifyFDs("FDSTORE=1\nFDPOLL=0\nFDNAME="+name, part...); err != nil {
			a.log.Warn("packets are lost when the agent restarts: the service manager does not keep its descriptors", "name", name, "error", err)
			return
		}
	}
}

// maxRights is the largest number of descriptors in one message: SCM_MAX_FD of the kernel (include/net/scm.h).
const maxRights = 253

// release makes the service manager close what it has under a name.
func (a *agent) release(name string) {
	if err := notifyFDs("FDSTOREREMOVE=1\nFDNAME=" + name); err != nil {
		a.log.Warn("the service manager still holds descriptors of the agent", "name", name, "error", err)
	}
}

// notifyFDs is sd_pid_notify_with_fds(3). Without a service manager it does nothing.
func notifyFDs(state string, fds ...int) error {
	socket := os.Getenv("NOTIFY_SOCKET")
	if socket == "" {
		return nil
	}
	// A connected datagram socket takes no control messages in package net; this one is bound to a name of the kernel's choice.
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("notify: %w", err)
	}
	defer conn.Close()
	to := &net.UnixAddr{Name: socket, Net: "unixgram"}
	if _, _, err := conn.WriteMsgUnix([]byte(state), syscall.UnixRights(fds...), to); err != nil {
		return fmt.Errorf("notify: %w", err)
	}
	return nil
}
