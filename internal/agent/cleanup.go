package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/cni/conflist"
	"github.com/tulle-net/tulle/internal/config"
	"github.com/tulle-net/tulle/internal/hostnet"
	"github.com/tulle-net/tulle/internal/podnet"
	"github.com/tulle-net/tulle/tunnel/device"
	"github.com/tulle-net/tulle/tunnel/fastpath"
)

// Cleanup removes what a stopped agent left in this host's network: the TUN device, routes and addresses with our mark, the
// nft tables, the programs of the fast path, bridges without pods, the network for container engines, and the socket's file. It restores changed sysctls. Missing objects are not an error. It is refused while an
// agent runs. The state directory stays, so the node keeps its address space (see Leave).
func Cleanup(ctx context.Context, cfg config.Config) error {
	if err := checkCapabilities("tulle cleanup"); err != nil {
		return err
	}
	if err := refuseRunning(ctx, cfg.Socket); err != nil {
		return err
	}
	// Held from here on, the device keeps an agent from starting in between.
	dev, err := holdTun(cfg.Tun)
	if err != nil {
		return err
	}
	host, err := hostnet.New(hostnet.Options{Tun: cfg.Tun, SysctlFile: runFile(cfg, "sysctls")})
	if err == nil {
		err = errors.Join(host.Remove(ctx), host.Close())
	}
	pods, podErr := podnet.Open("")
	if podErr == nil {
		podErr = errors.Join(pods.RemoveAllChecks(), pods.RemoveBridges(), pods.Close())
	}
	published := conflist.Publisher{Dir: cfg.CNIDir}
	err = errors.Join(err, podErr, fastpath.Remove(), published.Set(ctx, false, false))
	if dev != nil {
		err = errors.Join(err, dev.Persist(false), dev.Close())
	}
	return err
}

// refuseRunning is an error if an agent listens on the socket; the file of one that was killed is removed.
func refuseRunning(ctx context.Context, socket string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	c, err := new(net.Dialer).DialContext(ctx, "unix", socket)
	if err == nil {
		c.Close()
		return api.Errorf(api.CodeRefused, "an agent is running: it listens on %s", socket).
			WithRemedy("stop it first (systemctl stop tulle), or name another one's --socket")
	}
	if _, serr := os.Lstat(socket); errors.Is(serr, fs.ErrNotExist) {
		return nil
	}
	if st, serr := os.Lstat(socket); serr == nil && st.Mode()&fs.ModeSocket == 0 {
		return fmt.Errorf("%s is not a socket: give the agent's with --socket", socket)
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the socket of an agent that was killed: %w", err)
	}
	return nil
}

// holdTun opens the TUN device if it exists; else it returns nil. A device that is another program's is an error.
func holdTun(name string) (*device.Device, error) {
	if _, err := netlink.LinkByName(name); err != nil {
		if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing {
			return nil, nil
		}
		return nil, fmt.Errorf("TUN device %s: %w", name, err)
	}
	if err := hostnet.CheckTun(name); err != nil {
		return nil, err
	}
	return device.Open(device.Options{Name: name})
}
