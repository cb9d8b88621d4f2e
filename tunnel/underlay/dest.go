package underlay

import (
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/internal/sys"
)

// A Dest is where messages go: a peer's address, encoded once for the kernel,
// and what is known about trains to it.
type Dest struct {
	addr netip.AddrPort
	name []byte // raw sockaddr

	// retryGSO is when trains may be tried again, in nanoseconds since epoch (a
	// monotonic clock), or 0 while they are in use; backoff is what is added to
	// now at the next refusal.
	retryGSO atomic.Int64
	backoff  atomic.Int64
}

// epoch makes the monotonic clock an integer.
var epoch = time.Now()

// After a refused train, trains to that destination are tried again after
// minGSORetry, and after twice as long for every further refusal, up to
// maxGSORetry. A try costs one refused system call; it loses nothing.
const (
	minGSORetry = 10 * time.Second
	maxGSORetry = 10 * time.Minute
)

// NewDest encodes addr. For raw sockets the port is ignored. An IPv4 address
// mapped into IPv6 is taken as the IPv4 address.
func NewDest(addr netip.AddrPort) *Dest {
	addr = netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
	return &Dest{addr: addr, name: sys.AppendSockaddr(nil, addr)}
}

// Addr is the address that NewDest was given.
func (d *Dest) Addr() netip.AddrPort { return d.addr }

// GSO reports whether trains to this destination go out as trains; false after
// a refusal until one has been taken again.
func (d *Dest) GSO() bool { return d.retryGSO.Load() == 0 }

// tryGSO reports whether to send the next train as one.
func (d *Dest) tryGSO() bool {
	at := d.retryGSO.Load()
	return at == 0 || int64(time.Since(epoch)) >= at
}

// refusedGSO notes that the kernel would not take a train whose single
// datagrams it took.
func (d *Dest) refusedGSO() {
	wait := max(d.backoff.Load(), int64(minGSORetry))
	d.backoff.Store(min(2*wait, int64(maxGSORetry)))
	d.retryGSO.Store(int64(time.Since(epoch)) + wait)
}

// acceptedGSO notes that a train went out.
func (d *Dest) acceptedGSO() {
	if d.retryGSO.Load() != 0 {
		d.retryGSO.Store(0)
		d.backoff.Store(0)
	}
}
