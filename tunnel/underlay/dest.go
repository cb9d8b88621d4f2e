package underlay

import (
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/internal/sys"
)

// A Dest is a destination of messages: a peer's address, encoded once for the
// kernel, and whether trains to it work.
type Dest struct {
	addr netip.AddrPort
	name []byte // raw sockaddr

	singles bool // trains are sent packet by packet, always
	gso     *refusals
}

// refusals is what is known of the kernel's refusals of trains to an address.
type refusals struct {
	// retry is the time when trains may be tried again, in nanoseconds since epoch (a
	// monotonic clock), or 0 while trains are in use. backoff is the delay after the
	// next refusal.
	retry   atomic.Int64
	backoff atomic.Int64
}

// epoch is the zero of the monotonic clock values in this package.
var epoch = time.Now()

// After the kernel has refused a train, trains to that destination are tried again
// after minGSORetry. The delay doubles with every further refusal, up to maxGSORetry.
// A try costs one refused system call and loses no packet.
const (
	minGSORetry = 10 * time.Second
	maxGSORetry = 10 * time.Minute
)

// NewDest encodes addr. For raw sockets the port is ignored. An IPv4 address
// mapped into IPv6 becomes the IPv4 address.
func NewDest(addr netip.AddrPort) *Dest {
	addr = netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
	return &Dest{addr: addr, name: sys.AppendSockaddr(nil, addr), gso: new(refusals)}
}

// WithSingles is the same destination, with what is known of it, to which trains are
// sent packet by packet though the kernel takes them, or again as trains.
func (d *Dest) WithSingles(singles bool) *Dest {
	if d.singles == singles {
		return d
	}
	return &Dest{addr: d.addr, name: d.name, singles: singles, gso: d.gso}
}

// Addr is the address that NewDest was given.
func (d *Dest) Addr() netip.AddrPort { return d.addr }

// GSO reports whether trains to this destination are sent as trains. It is false
// for a singles destination, and after a refusal, until the kernel accepts a train again.
func (d *Dest) GSO() bool { return !d.singles && d.gso.retry.Load() == 0 }

// tryGSO reports whether to send the next train as one.
func (d *Dest) tryGSO() bool {
	if d.singles {
		return false
	}
	at := d.gso.retry.Load()
	return at == 0 || int64(time.Since(epoch)) >= at
}

// refusedGSO records that the kernel refused a train but accepted its single
// datagrams.
func (d *Dest) refusedGSO() {
	wait := max(d.gso.backoff.Load(), int64(minGSORetry))
	d.gso.backoff.Store(min(2*wait, int64(maxGSORetry)))
	d.gso.retry.Store(int64(time.Since(epoch)) + wait)
}

// acceptedGSO records that the kernel accepted a train.
func (d *Dest) acceptedGSO() {
	if d.gso.retry.Load() != 0 {
		d.gso.retry.Store(0)
		d.gso.backoff.Store(0)
	}
}
