package lab

import (
	"context"
	"fmt"
	"net"

	"github.com/tulle-net/tulle/internal/sys"
)

// sysctl writes settings below /proc/sys/net of the namespace at path.
func sysctl(path string, settings ...[2]string) error {
	if err := sys.WithNetns(path, func() error { return sys.SetSysctls(settings...) }); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// Do runs fn on a thread in the network namespace of a host, a pod or the router. Sockets that fn makes stay in that
// namespace; goroutines that it starts do not run there.
func (l *Lab) Do(target string, fn func() error) error {
	path, err := l.netnsOf(target)
	if err != nil {
		return err
	}
	return sys.WithNetns(path, fn)
}

// Listen is net.ListenConfig.Listen in target's namespace.
func (l *Lab) Listen(ctx context.Context, target, network, address string) (ln net.Listener, err error) {
	err = l.Do(target, func() error {
		var lc net.ListenConfig
		ln, err = lc.Listen(ctx, network, address)
		return err
	})
	return ln, err
}

// ListenPacket is net.ListenConfig.ListenPacket in target's namespace.
func (l *Lab) ListenPacket(ctx context.Context, target, network, address string) (pc net.PacketConn, err error) {
	err = l.Do(target, func() error {
		var lc net.ListenConfig
		pc, err = lc.ListenPacket(ctx, network, address)
		return err
	})
	return pc, err
}

// Dial is net.Dialer.DialContext in target's namespace. The address must be an IP address and port: a name would be
// looked up elsewhere.
func (l *Lab) Dial(ctx context.Context, target, network, address string) (c net.Conn, err error) {
	err = l.Do(target, func() error {
		var d net.Dialer
		c, err = d.DialContext(ctx, network, address)
		return err
	})
	return c, err
}
