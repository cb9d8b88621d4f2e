package agent

import (
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"

	"github.com/tulle-net/tulle/tunnel/device"
)

// systemd keeps the TUN's descriptor (FileDescriptorStoreMax, sd_pid_notify_with_fds(3)) while the agent restarts, so packets
// wait in the device's queue instead of being dropped. Without systemd the device is persistent, and only packets that
// arrive in between are lost.

// fdName is the name of a TUN's descriptor in the store.
func fdName(tun string) string { return "tun-" + tun }

// storedTUN returns the TUN's descriptor from the service manager, -1 if there is none. It closes all others, which belong to
// an earlier configuration.
func storedTUN(tun string) int {
	fd := -1
	for _, f := range activation.Files(true) {
		if fd < 0 && f.Name() == fdName(tun) {
			if n, err := syscall.Dup(int(f.Fd())); err == nil {
				syscall.CloseOnExec(n)
				fd = n
			}
		}
		f.Close()
	}
	return fd
}

// openTUN adopts the kept descriptor, if there is one, or opens the device.
func (a *agent) openTUN(o device.Options) (*device.Device, error) {
	if fd := storedTUN(o.Name); fd >= 0 && o.Queues == 1 {
		d, err := device.FromFD([]int{fd}, o)
		if err == nil {
			a.log.Info("adopted the TUN device that the service manager kept", "tun", o.Name)
			return d, nil
		}
		a.log.Warn("cannot use the TUN device that the service manager kept, opening it again", "error", err)
		a.forgetTUN(o.Name)
	} else if fd >= 0 {
		syscall.Close(fd)
		a.forgetTUN(o.Name)
	}
	// The service manager releases the descriptor some time later.
	for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		d, err := device.Open(o)
		if err == nil || !errors.Is(err, device.ErrBusy) || time.Now().After(deadline) || os.Getenv("NOTIFY_SOCKET") == "" {
			return d, err
		}
	}
}

// keepTUN passes the descriptor to the service manager, if there is one. It does not keep a device with several queues, which
// would come back with one.
func (a *agent) keepTUN(d *device.Device) {
	if len(d.Queues()) > 1 {
		return
	}
	if err := notifyFDs("FDSTORE=1\nFDNAME="+fdName(d.Name()), d.FD()); err != nil {
		a.log.Warn("the service manager does not keep the TUN device over a restart", "error", err)
	}
}

// forgetTUN makes the service manager release the descriptor.
func (a *agent) forgetTUN(tun string) {
	if err := notifyFDs("FDSTOREREMOVE=1\nFDNAME=" + fdName(tun)); err != nil {
		a.log.Warn("the service manager still holds the TUN device", "error", err)
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
