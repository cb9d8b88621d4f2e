package lab

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"syscall"
	"time"
)

var (
	underlay4All = netip.MustParsePrefix("192.168.0.0/16")
	underlay6All = netip.MustParsePrefix("fd00:a::/32")
	errPending   = errors.New("not built yet")
)

type state struct{ Options Options }

// Progress is told what Up does, one short line a step. It may be nil.
type Progress func(step string)

// Up builds a lab and, unless it is bare, waits until all pods reach each other. What is left of an earlier lab of that
// name whose maker died is removed first; a lab of that name that is whole is an error.
func Up(ctx context.Context, o Options, progress Progress) (*Lab, error) { return nil, errPending }

// Open returns a lab that exists.
func Open(name string) (*Lab, error) { return nil, errPending }

// List returns the names of the labs on this machine.
func List() ([]string, error) { return nil, errPending }

// Down removes the lab: agents, namespaces with all in them, files.
func (l *Lab) Down(ctx context.Context) error { return errPending }

// Down removes the lab of that name, whole or not.
func Down(ctx context.Context, name string) error { return errPending }

// Hosts, Pods: copies of what the lab holds now.
func (l *Lab) Hosts() []Host                  { return nil }
func (l *Lab) Pods() []Pod                    { return nil }
func (l *Lab) Host(name string) (Host, error) { return Host{}, errPending }
func (l *Lab) Pod(name string) (Pod, error)   { return Pod{}, errPending }

// Do runs fn on a locked thread in the network namespace of a host, a pod or the router.
func (l *Lab) Do(target string, fn func() error) error { return errPending }

// Listen, ListenPacket and Dial are net's, within target's namespace.
func (l *Lab) Listen(ctx context.Context, target, network, address string) (net.Listener, error) {
	return nil, errPending
}
func (l *Lab) ListenPacket(ctx context.Context, target, network, address string) (net.PacketConn, error) {
	return nil, errPending
}
func (l *Lab) Dial(ctx context.Context, target, network, address string) (net.Conn, error) {
	return nil, errPending
}

// Stdio is where a command of Exec reads and writes.
type Stdio struct {
	In       io.Reader
	Out, Err io.Writer
}

// Exec runs a command in target's namespace and returns its exit code.
func (l *Lab) Exec(ctx context.Context, target string, argv []string, stdio Stdio) (int, error) {
	return 0, errPending
}

// StartAgent starts a host's agent again, with extra arguments; StopAgent sends a signal (SIGTERM, SIGKILL) and waits
// until the process is gone.
func (l *Lab) StartAgent(ctx context.Context, host string, extraArgs ...string) error {
	return errPending
}
func (l *Lab) StopAgent(ctx context.Context, host string, sig syscall.Signal) error {
	return errPending
}

// WaitReady waits until the host's agent says that it is ready; WaitPods until all pods reach each other.
func (l *Lab) WaitReady(ctx context.Context, host string) error { return errPending }
func (l *Lab) WaitPods(ctx context.Context) error               { return errPending }

// AddHost adds a host to a subnet (with its agent, unless bare), AddPod a pod to a host; RemoveHost, RemovePod.
func (l *Lab) AddHost(ctx context.Context, subnet int) (Host, error) { return Host{}, errPending }
func (l *Lab) AddPod(ctx context.Context, host string) (Pod, error)  { return Pod{}, errPending }
func (l *Lab) RemoveHost(ctx context.Context, host string) error     { return errPending }
func (l *Lab) RemovePod(ctx context.Context, pod string) error       { return errPending }

// Split cuts the network into groups of hosts that do not hear each other (silently); hosts in no group form one of
// their own. Heal undoes it. Unplug takes a host's link down as if its cable were pulled, Plug undoes it.
func (l *Lab) Split(groups ...[]string) error { return errPending }
func (l *Lab) Heal() error                    { return errPending }
func (l *Lab) Unplug(host string) error       { return errPending }
func (l *Lab) Plug(host string) error         { return errPending }

// DirectRoutes gives every host and the router a route to every pod: no tunnel. The result undoes it.
func (l *Lab) DirectRoutes(ctx context.Context) (undo func() error, err error) {
	return nil, errPending
}

// KernelVXLAN gives every host a kernel VXLAN device and routes to every pod through it. The result undoes it.
func (l *Lab) KernelVXLAN(ctx context.Context) (undo func() error, err error) { return nil, errPending }

// Pong is the result of one ping.
type Pong struct {
	From, To string
	Addr     netip.Addr    // that was pinged
	RTT      time.Duration // 0 if lost
	Source   netip.Addr    // that the far side saw
	Err      error         // why there was no answer
}

// Ping sends an ICMP echo request from one target to an address of another and reports the source that arrived there.
func (l *Lab) Ping(ctx context.Context, from, to string, addr netip.Addr) Pong { return Pong{} }

// PingAll pings every address of every pod (and host's tun, if hosts) from every pod (and host).
func (l *Lab) PingAll(ctx context.Context, hosts bool) ([]Pong, error) { return nil, errPending }

// Latency is the round-trip times of 64-byte UDP echoes.
type Latency struct {
	Rounds, Lost          int
	Median, P90, P99, Min time.Duration
}

// Latency sends rounds 64-byte UDP datagrams, one at a time, from a pod to an address of another pod, which echoes them.
func (l *Lab) Latency(ctx context.Context, from, to string, addr netip.Addr, rounds int) (Latency, error) {
	return Latency{}, errPending
}
