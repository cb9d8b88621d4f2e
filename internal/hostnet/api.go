package hostnet

import (
	"context"
	"errors"
	"net/netip"
	"time"
)

type Options struct {
	// Tun is the TUN device's name, used by Remove and Watch before a first Reconcile.
	Tun string
	// SysctlFile keeps the values that sysctls had before we changed them, so that
	// Remove can put them back after a restart of the agent. It is bound to this boot and
	// network namespace. Empty: kept in memory only.
	SysctlFile string
	// Debounce is how long Watch gathers events before one callback; 0 means 200 ms.
	Debounce time.Duration
}

type Reconciler struct{}

func New(o Options) (*Reconciler, error) { return nil, errors.ErrUnsupported }

func (r *Reconciler) Close() error { return nil }

func (r *Reconciler) Reconcile(ctx context.Context, s State) (Report, error) {
	return Report{}, errors.ErrUnsupported
}

func (r *Reconciler) Remove(ctx context.Context) error { return errors.ErrUnsupported }

func (r *Reconciler) Watch(ctx context.Context, changed func()) error { return errors.ErrUnsupported }

// Underlay is the interface and the addresses through which a node talks to the others.
type Underlay struct {
	Iface string
	Index int
	MTU   int
	Addrs []netip.Addr
}

func DetectUnderlay(want string, seeds []netip.Addr) (Underlay, error) {
	return Underlay{}, errors.ErrUnsupported
}

// CheckOverlap: tun and own tell what is ours already.
func CheckOverlap(tun string, clusterCIDRs, own []netip.Prefix) error { return errors.ErrUnsupported }

// CheckMembers: no member's underlay address may be routed into the TUN device.
func CheckMembers(tun string, members []netip.Addr) []Problem { return nil }

// ForwardProblems names firewall chains that drop forwarded packets.
func ForwardProblems(tun string, clusterCIDRs []netip.Prefix) ([]Problem, error) {
	return nil, errors.ErrUnsupported
}
