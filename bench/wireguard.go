package bench

import (
	"bufio"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/tulle-net/tulle/internal/lab"
)

// The wireguard-go mode uses the module's own device, TUN and sockets, unchanged and configured by its own text protocol
// (wireguard.com/xplatform). Only the process around it is ours.

const (
	wireguardPort = 51820
	// wireguardOverhead is the size of the IPv4, UDP and WireGuard headers and the authentication tag, in bytes.
	wireguardOverhead = 20 + 8 + 16 + 16
)

// wireguardConfig is the configuration of one wireguard-go process, one line of JSON on its standard input.
type wireguardConfig struct {
	Device string         `json:"device"`
	MTU    int            `json:"mtu"`
	UAPI   string         `json:"uapi"`
	Routes []netip.Prefix `json:"routes"` // to the other side's pods
}

// wireguardGo runs a device in the network namespace of this process until in ends.
func wireguardGo(in io.Reader, out io.Writer) error {
	if _, err := unix.Setsid(); err != nil { // as the agents do, so that the kernel schedules both the same way
		return fmt.Errorf("session: %w", err)
	}
	input := bufio.NewReader(in)
	line, err := input.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	var c wireguardConfig
	if err := json.Unmarshal(line, &c); err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	t, err := tun.CreateTUN(c.Device, c.MTU)
	if err != nil {
		return fmt.Errorf("TUN device: %w", err)
	}
	d := device.NewDevice(t, conn.NewDefaultBind(), device.NewLogger(device.LogLevelError, c.Device+": "))
	defer d.Close()
	if err := d.IpcSet(c.UAPI); err != nil {
		return fmt.Errorf("configure: %w", err)
	}
	if err := d.Up(); err != nil {
		return fmt.Errorf("up: %w", err)
	}
	if err := forwardInto(c.Device, c.Routes); err != nil {
		return err
	}
	fmt.Fprintln(out, ready, os.Getpid())
	_, err = io.Copy(io.Discard, input)
	return err
}

// forwardInto routes prefixes into a device, in the network namespace of the calling thread.
func forwardInto(dev string, routes []netip.Prefix) error {
	for _, knob := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		if err := os.WriteFile("/proc/sys/net/"+knob, []byte("1"), 0); err != nil {
			return err
		}
	}
	link, err := netlink.LinkByName(dev)
	if err != nil {
		return fmt.Errorf("find %s: %w", dev, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", dev, err)
	}
	for _, p := range routes {
		r := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(p), Scope: netlink.SCOPE_LINK}
		if err := netlink.RouteReplace(r); err != nil {
			return fmt.Errorf("route to %v over %s: %w", p, dev, err)
		}
	}
	return nil
}

// wireguardMTU is the pods' MTU behind WireGuard.
func wireguardMTU(l *lab.Lab) int {
	mtu := l.Options().MTU - wireguardOverhead
	if !l.Options().Underlay.V4 {
		mtu -= 20 // an IPv6 header is that much longer
	}
	return mtu
}

// setupWireguardGo runs wireguard-go on both hosts of a bare lab.
func setupWireguardGo(ctx context.Context, l *lab.Lab, helper []string) (*tunnel, error) {
	six := !l.Options().Underlay.V4
	t := &tunnel{mtu: wireguardMTU(l)}
	var keys [2]*ecdh.PrivateKey
	for i := range keys {
		var err error
		if keys[i], err = ecdh.X25519().GenerateKey(rand.Reader); err != nil {
			return nil, err
		}
	}
	for i, h := range l.Hosts() {
		peer := l.Hosts()[1-i]
		c := wireguardConfig{Device: "wg0", MTU: t.mtu, Routes: podsOf(l, peer.Name)}
		var uapi strings.Builder
		fmt.Fprintf(&uapi, "private_key=%s\nlisten_port=%d\nreplace_peers=true\n", hex.EncodeToString(keys[i].Bytes()), wireguardPort)
		fmt.Fprintf(&uapi, "public_key=%s\nendpoint=%s\n", hex.EncodeToString(keys[1-i].PublicKey().Bytes()),
			netip.AddrPortFrom(peer.Addr(six), wireguardPort))
		for _, p := range c.Routes {
			fmt.Fprintf(&uapi, "allowed_ip=%s\n", p)
		}
		c.UAPI = uapi.String()
		pid, stop, err := startWireguardGo(ctx, l, h.Name, helper, c)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("wireguard-go on %s: %w", h.Name, err), t.close())
		}
		t.pids = append(t.pids, pid)
		t.undo = append(t.undo, stop)
	}
	return t, setPodMTU(l, t.mtu)
}

// startWireguardGo starts a wireguardGo process on a host. It ends when stop is called, ctx ends, or this process does.
func startWireguardGo(ctx context.Context, l *lab.Lab, host string, helper []string, c wireguardConfig) (pid int, stop func() error, err error) {
	line, err := json.Marshal(c)
	if err != nil {
		return 0, nil, err
	}
	in, toIn := io.Pipe()
	fromOut, out := io.Pipe()
	var errs strings.Builder
	ended := make(chan error, 1)
	go func() { // ends when the process does
		code, err := l.Exec(ctx, host, append(helper[:len(helper):len(helper)], "wireguard-go"), lab.Stdio{In: in, Out: out, Err: &errs})
		if err == nil && code != 0 {
			err = fmt.Errorf("exit code %d: %s", code, strings.TrimSpace(errs.String()))
		}
		out.Close()
		in.Close() // the copying of standard input ends with the next write, or with this
		ended <- err
	}()
	stop = func() error {
		toIn.Close()
		return <-ended
	}
	if _, err = toIn.Write(append(line, '\n')); err == nil {
		var n int
		if n, err = fmt.Fscanf(fromOut, ready+" %d\n", &pid); err != nil || n != 1 {
			err = fmt.Errorf("it did not come up: %w", err)
		}
	}
	if err != nil {
		return 0, nil, errors.Join(err, stop())
	}
	return pid, stop, nil
}
