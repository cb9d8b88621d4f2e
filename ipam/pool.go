package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// An Allocation is one address of a pod.
type Allocation struct {
	Addr  netip.Addr `json:"addr"`
	Key   string     `json:"key"`             // owner: container ID and interface
	Pod   string     `json:"pod,omitempty"`   // for people
	Netns string     `json:"netns,omitempty"` // path, for checks against the host
	Since time.Time  `json:"since"`
}

// A Block describes an open block, for status output.
type Block struct {
	Prefix netip.Prefix `json:"prefix"`
	Used   uint64       `json:"used"` // addresses that pods have
	Size   uint64       `json:"size"` // addresses that pods can have; saturates at 2^63
}

// Errors for errors.Is.
var (
	// ErrFull means that no open block has a free address now.
	ErrFull = errors.New("no free pod address")
	// ErrUnavailable means that a requested address cannot be allocated.
	ErrUnavailable = errors.New("address not available")
)

// A Pool has the open blocks of a node and the allocations in them.
//
// Allocations may lie outside the blocks: pods keep their addresses when the node
// loses the space. Such an address is not allocated again while its pod exists.
type Pool struct {
	cooldown  time.Duration
	blocks    []*block
	preferred []netip.Prefix // see Prefer
	byAddr    map[netip.Addr]Allocation
	byKey     map[string][]netip.Addr // a key has at most one address per family
	cooling   map[netip.Addr]rest
}

// A rest is the cool-down of an address.
type rest struct {
	until time.Time
	key   string // had the address last, and may ask for it again; empty if that is not known any more
}

type block struct {
	prefix     netip.Prefix
	used       uint64
	low        netip.Addr // no lower address is free
	first, end netip.Addr // the range for pods, both inclusive
}

// NewPool returns an empty pool. Released addresses are not allocated again for cooldown.
func NewPool(cooldown time.Duration) *Pool {
	return &Pool{
		cooldown: cooldown,
		byAddr:   make(map[netip.Addr]Allocation),
		byKey:    make(map[string][]netip.Addr),
		cooling:  make(map[netip.Addr]rest),
	}
}

// Open adds a block. The first address of the first open block of a family belongs
// to the TUN device, see [Pool.TunAddr].
func (p *Pool) Open(prefix netip.Prefix) {
	if slices.ContainsFunc(p.blocks, func(b *block) bool { return b.prefix == prefix }) {
		return
	}
	p.blocks = append(p.blocks, p.newBlock(prefix))
}

func (p *Pool) newBlock(prefix netip.Prefix) *block {
	b := &block{prefix: prefix, first: prefix.Addr(), end: Last(prefix)}
	b.low = b.first
	for a := range p.byAddr {
		if prefix.Contains(a) {
			b.used++
		}
	}
	return b
}

// Close removes a block. Its allocations stay.
func (p *Pool) Close(prefix netip.Prefix) { p.Replace(prefix) }

// Replace opens other blocks in the place of one, such as parts of it. So the address of the TUN device stays if the first
// of them has it.
func (p *Pool) Replace(prefix netip.Prefix, by ...netip.Prefix) {
	i := slices.IndexFunc(p.blocks, func(b *block) bool { return b.prefix == prefix })
	if i < 0 {
		return
	}
	var in []*block
	for _, q := range by {
		if q == prefix || !slices.ContainsFunc(p.blocks, func(b *block) bool { return b.prefix == q }) {
			in = append(in, p.newBlock(q))
		}
	}
	p.blocks = slices.Replace(p.blocks, i, i+1, in...)
	for _, b := range p.blocks { // another block may have become the first
		b.low = b.first
	}
}

// Prefer names the blocks that are used before all others, whenever they are opened.
func (p *Pool) Prefer(list []netip.Prefix) { p.preferred = list }

// Prefixes returns the open blocks in order of opening.
func (p *Pool) Prefixes() []netip.Prefix {
	out := make([]netip.Prefix, len(p.blocks))
	for i, b := range p.blocks {
		out[i] = b.prefix
	}
	return out
}

// Blocks returns the open blocks with their usage.
func (p *Pool) Blocks() []Block {
	out := make([]Block, len(p.blocks))
	for i, b := range p.blocks {
		out[i] = Block{Prefix: b.prefix, Used: b.used, Size: p.size(b)}
	}
	return out
}

// size returns the number of addresses in b for pods.
func (p *Pool) size(b *block) uint64 {
	n := b.prefix.Addr().BitLen() - b.prefix.Bits()
	if n >= 63 {
		return 1 << 63
	}
	size := uint64(1) << n
	if p.reserved(b, b.first) {
		size--
	}
	if b.end != b.first && p.reserved(b, b.end) {
		size--
	}
	return size
}

// TunAddr returns the address of the TUN device: the first address of the first open
// block of the family.
func (p *Pool) TunAddr(v6 bool) (netip.Addr, bool) {
	for _, b := range p.blocks {
		if b.prefix.Addr().Is6() == v6 {
			return b.first, true
		}
	}
	return netip.Addr{}, false
}

// ProbeAddr returns the address to which other nodes' probes of the direct path go: the
// last address of the first open block of the family that has at least four IPv4 addresses
// or 256 IPv6 addresses. No pod gets it.
func (p *Pool) ProbeAddr(v6 bool) (netip.Addr, bool) {
	for _, b := range p.blocks {
		if b.prefix.Addr().Is6() != v6 {
			continue
		}
		if host := b.prefix.Addr().BitLen() - b.prefix.Bits(); host >= 8 || !v6 && host >= 2 {
			return b.end, true
		}
	}
	return netip.Addr{}, false
}

// reserved reports whether a is never allocated to pods: the TUN device's address and
// that for probes,
// the first and last address of an IPv4 block (network and broadcast address to
// IPv4 tools), and IPv6's subnet-router anycast address (RFC 4291 §2.6.1). In an
// IPv4 block of one or two addresses only the TUN device's is reserved (RFC 3021).
func (p *Pool) reserved(b *block, a netip.Addr) bool {
	if tun, ok := p.TunAddr(a.Is6()); ok && a == tun {
		return true
	}
	if probe, ok := p.ProbeAddr(a.Is6()); ok && a == probe {
		return true
	}
	if a.Is6() {
		return a == b.first && b.prefix.Bits() < 127
	}
	return b.prefix.Bits() < 31 && (a == b.first || a == b.end)
}

// Allocate allocates an address of the family to a.Key and returns the allocation. A
// key that has an address keeps it. Otherwise it gets a.Addr if that is valid, else
// the lowest free address of the first block that has one, preferred blocks first.
func (p *Pool) Allocate(now time.Time, a Allocation, v6 bool) (Allocation, error) {
	if old, ok := p.Lookup(a.Key, v6); ok {
		if a.Addr.IsValid() && a.Addr != old.Addr {
			return Allocation{}, fmt.Errorf("%w: %v was requested, but %s already has %v", ErrUnavailable, a.Addr, a.Key, old.Addr)
		}
		return old, nil
	}
	a.Since = now
	if a.Addr.IsValid() {
		if err := p.available(now, a.Addr, a.Key); err != nil {
			return Allocation{}, err
		}
		p.add(a)
		return a, nil
	}
	for _, preferred := range []bool{true, false} {
		for _, b := range p.blocks {
			if b.prefix.Addr().Is6() != v6 || slices.Contains(p.preferred, b.prefix) != preferred {
				continue
			}
			if addr, ok := p.lowest(now, b); ok {
				a.Addr = addr
				p.add(a)
				return a, nil
			}
		}
	}
	return Allocation{}, ErrFull
}

// lowest returns the lowest free address of b. All addresses below b.low are in use
// or cooling; a release, or the end of a cool-down, lowers b.low.
func (p *Pool) lowest(now time.Time, b *block) (netip.Addr, bool) {
	p.thaw(now)
	for a := b.low; a.IsValid() && a.Compare(b.end) <= 0; a = a.Next() {
		_, taken := p.byAddr[a]
		_, cool := p.cooling[a]
		if !taken && !cool && !p.reserved(b, a) {
			b.low = a
			return a, true
		}
	}
	b.low = b.end
	return netip.Addr{}, false
}

// thaw removes the cool-downs that are over.
func (p *Pool) thaw(now time.Time) {
	for a, r := range p.cooling {
		if !now.Before(r.until) {
			delete(p.cooling, a)
			p.lower(a)
		}
	}
}

func (p *Pool) lower(a netip.Addr) {
	if b := p.blockOf(a); b != nil && a.Less(b.low) {
		b.low = a
	}
}

func (p *Pool) blockOf(a netip.Addr) *block {
	for _, b := range p.blocks {
		if b.prefix.Contains(a) {
			return b
		}
	}
	return nil
}

// blocksLike names the open blocks of an address's family.
func (p *Pool) blocksLike(a netip.Addr) string {
	var names []string
	for _, b := range p.blocks {
		if b.prefix.Addr().Is4() == a.Is4() {
			names = append(names, b.prefix.String())
		}
	}
	if len(names) == 0 {
		return "the other family, of which alone it has blocks"
	}
	return strings.Join(names, " or ")
}

// available returns an error if a requested address cannot be allocated to key.
func (p *Pool) available(now time.Time, a netip.Addr, key string) error {
	b := p.blockOf(a)
	if b == nil {
		return fmt.Errorf("%w: %v is in no open block of this node; ask for a free address of %s, or open a certain block by --pod-cidr", ErrUnavailable, a, p.blocksLike(a))
	}
	if old, ok := p.byAddr[a]; ok {
		return fmt.Errorf("%w: %s has %v", ErrUnavailable, old.Key, a)
	}
	if p.reserved(b, a) {
		return fmt.Errorf("%w: %v is reserved (the first or last address of block %v)", ErrUnavailable, a, b.prefix)
	}
	if r, ok := p.cooling[a]; ok && now.Before(r.until) && r.key != key {
		return fmt.Errorf("%w: %v was released recently and cools down for another %v", ErrUnavailable, a, r.until.Sub(now).Round(time.Second))
	}
	return nil
}

func (p *Pool) add(a Allocation) {
	delete(p.cooling, a.Addr)
	p.byAddr[a.Addr] = a
	p.byKey[a.Key] = append(p.byKey[a.Key], a.Addr)
	if b := p.blockOf(a.Addr); b != nil {
		b.used++
	}
}

// Adopt records an address that a pod already has, inside the blocks or not. It
// returns false if another key has the address, or the key has another address of
// the family.
func (p *Pool) Adopt(a Allocation) bool {
	if old, ok := p.byAddr[a.Addr]; ok {
		return old.Key == a.Key
	}
	if _, ok := p.Lookup(a.Key, a.Addr.Is6()); ok {
		return false
	}
	p.add(a)
	return true
}

// Release frees the addresses of key and starts their cool-down, in which only the same
// key gets them again, if it asks for them: a container that is restarted. It returns
// them, none if key has none.
func (p *Pool) Release(now time.Time, key string) []Allocation {
	var out []Allocation
	for _, a := range slices.Clone(p.byKey[key]) {
		out = append(out, p.byAddr[a])
		p.Drop(a)
		p.cool(now, a, rest{now.Add(p.cooldown), key})
	}
	return out
}

// Pass gives the addresses of the key from to to.Key: the pod has another name now. Where another address of the family is
// wanted, it is released; where to.Key has one already, it keeps that one, unless the one of from is wanted. It returns what
// was, for Restore.
func (p *Pool) Pass(now time.Time, from string, to Allocation, want []netip.Addr) (was []Allocation) {
	drop := func(a Allocation) {
		was = append(was, a)
		p.Drop(a.Addr)
	}
	for _, a := range slices.Clone(p.byKey[from]) {
		old := p.byAddr[a]
		if own, ok := p.Lookup(to.Key, a.Is6()); ok && own.Addr != a {
			if !slices.Contains(want, a) {
				continue
			}
			drop(own)
			p.Cool(now, own.Addr, now.Add(p.cooldown))
		}
		drop(old)
		if slices.ContainsFunc(want, func(w netip.Addr) bool { return w.Is6() == a.Is6() && w != a }) {
			p.Cool(now, a, now.Add(p.cooldown))
			continue
		}
		to.Addr, to.Since = a, old.Since
		p.add(to)
	}
	return was
}

// Restore undoes a Pass.
func (p *Pool) Restore(was []Allocation) {
	for _, a := range was {
		p.Drop(a.Addr)
	}
	for _, a := range was {
		p.add(a)
	}
}

// Drop removes an allocation without a cool-down. It undoes an Allocate that could
// not be saved.
func (p *Pool) Drop(addr netip.Addr) {
	a, ok := p.byAddr[addr]
	if !ok {
		return
	}
	delete(p.byAddr, addr)
	rest := slices.DeleteFunc(p.byKey[a.Key], func(x netip.Addr) bool { return x == addr })
	if len(rest) == 0 {
		delete(p.byKey, a.Key)
	} else {
		p.byKey[a.Key] = rest
	}
	if b := p.blockOf(addr); b != nil {
		b.used--
	}
	p.lower(addr)
}

// Cool prevents the allocation of a free address before until. It never shortens a
// cool-down.
func (p *Pool) Cool(now time.Time, addr netip.Addr, until time.Time) {
	p.cool(now, addr, rest{until: until})
}

// Rest continues a cool-down that Cooling has returned, in an earlier run of the program: a container that comes back with
// its host gets its address. It lasts no longer than a new one of its kind, longest: the host's clock may have been ahead.
func (p *Pool) Rest(now time.Time, c Cooling, longest time.Duration) {
	if most := now.Add(longest); c.Until.After(most) {
		c.Until = most
	}
	p.cool(now, c.Addr, rest{c.Until, c.Key})
}

func (p *Pool) cool(now time.Time, addr netip.Addr, r rest) {
	if old, ok := p.cooling[addr]; !r.until.After(now) || ok && old.until.After(r.until) {
		return
	}
	p.cooling[addr] = r
}

// Lookup returns the allocation of key in the family.
func (p *Pool) Lookup(key string, v6 bool) (Allocation, bool) {
	for _, a := range p.byKey[key] {
		if a.Is6() == v6 {
			return p.byAddr[a], true
		}
	}
	return Allocation{}, false
}

// At returns the allocation of the address.
func (p *Pool) At(addr netip.Addr) (Allocation, bool) {
	a, ok := p.byAddr[addr]
	return a, ok
}

// Allocations returns all allocations in address order.
func (p *Pool) Allocations() []Allocation {
	out := make([]Allocation, 0, len(p.byAddr))
	for _, a := range p.byAddr {
		out = append(out, a)
	}
	slices.SortFunc(out, func(a, b Allocation) int { return a.Addr.Compare(b.Addr) })
	return out
}

// Cooling returns the addresses that are in cool-down at now, in order.
func (p *Pool) Cooling(now time.Time) []Cooling {
	p.thaw(now)
	out := make([]Cooling, 0, len(p.cooling))
	for a, r := range p.cooling {
		out = append(out, Cooling{Addr: a, Until: r.until, Key: r.key})
	}
	slices.SortFunc(out, func(a, b Cooling) int { return a.Addr.Compare(b.Addr) })
	return out
}

// Spare returns the number of free addresses of the family, at most limit.
func (p *Pool) Spare(now time.Time, v6 bool, limit uint64) uint64 {
	p.thaw(now)
	var n uint64
	for _, b := range p.blocks {
		if b.prefix.Addr().Is6() != v6 {
			continue
		}
		busy := b.used
		for a := range p.cooling {
			if b.prefix.Contains(a) {
				busy++
			}
		}
		if size := p.size(b); size > busy {
			n = min(limit, n+min(limit, size-busy))
		}
	}
	return n
}
