package hostnet

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Options of a Reconciler.
type Options struct {
	// Tun is the TUN device's name where a State names none, and what Remove and
	// Watch go by before a first Reconcile.
	Tun string
	// SysctlFile keeps the values that sysctls had before we changed them, so that
	// Remove can put them back after a restart of the agent. Its contents are
	// bound to this boot and network namespace. Empty: kept in memory only.
	SysctlFile string
	// PodsTable is the nftables table of family netdev with the source checks of pods, which others keep: Watch tells when it goes. Empty: none.
	PodsTable string
	// Debounce is how long Watch gathers events before one callback; 0 means 200 ms.
	Debounce time.Duration
}

// Reconciler holds one network namespace's state. Make it with New, end it with
// Close. All methods are safe for concurrent use.
type Reconciler struct {
	opts Options
	ns   *namespace
	rt   *netlink.Handle
	nft  *nftConn

	mu      sync.Mutex // one Reconcile or Remove at a time
	sysctls *sysctlStore
	// applied holds what the last Reconcile wanted and got, by object: it tells a repair
	// from a change that the State asked for.
	applied map[string]string
	counts  directCounts

	wantMu sync.Mutex
	want   wanted // what Watch compares events with

	lostCarrier map[string]bool // uplinks without a carrier, as Watch has heard
}

// New opens the netlink sockets in the calling thread's network namespace. It
// changes nothing on the host.
func New(o Options) (*Reconciler, error) {
	if o.Debounce <= 0 {
		o.Debounce = 200 * time.Millisecond
	}
	ns, err := currentNamespace()
	if err != nil {
		return nil, err
	}
	r := &Reconciler{opts: o, ns: ns, applied: map[string]string{}, lostCarrier: map[string]bool{}}
	r.want.tun = o.Tun
	err = ns.do(func() error {
		if r.rt, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
			return fmt.Errorf("hostnet: open a route netlink socket: %w", err)
		}
		if r.nft, err = openNFT(); err != nil {
			return err
		}
		r.sysctls, err = openSysctlStore(o.SysctlFile)
		return err
	})
	if err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// Close releases the sockets and leaves the host as it is. The Reconciler must not be
// used afterwards; a running Watch must have been ended first.
func (r *Reconciler) Close() error {
	if r.rt != nil {
		r.rt.Close()
	}
	var err error
	if r.nft != nil {
		err = r.nft.close()
	}
	return errors.Join(err, r.ns.close())
}

// Reconcile brings the host to the state s and reports what it had to do. It goes
// on past errors, as far as it can, and returns all of them; conflicts with what
// is not ours are no errors, they are in the Report. A second call with the same
// State changes nothing. The TUN device has to exist.
func (r *Reconciler) Reconcile(ctx context.Context, s State) (Report, error) {
	var rep Report
	if s.Tun == "" {
		s.Tun = r.opts.Tun
	}
	s, err := s.validate()
	if err != nil {
		return rep, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()

	link, err := r.tunLink(s.Tun, &rep)
	if err != nil {
		return rep, fmt.Errorf("hostnet: TUN device %s: %w", s.Tun, err)
	}
	index := link.Attrs().Index
	devices := map[string]int{}
	device := func(name string) int {
		i, ok := devices[name]
		if !ok {
			i = r.deviceIndex(name)
			devices[name] = i
		}
		return i
	}
	routes, skipped := s.routes(index, device)
	rep.Conflicts = append(rep.Conflicts, skipped...)
	p := &pass{r: r, s: &s, rep: &rep, link: index, probe: device(s.Direct), device: device, next: map[string]string{},
		ranks: map[int]ranks{netlink.FAMILY_V4: {}, netlink.FAMILY_V6: {}}}
	if p.before, err = r.mainRoutes(); err != nil {
		return rep, err
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		if slices.ContainsFunc(p.before, func(rt netlink.Route) bool { return rt.Family == family && isDefault(&rt) }) {
			continue
		}
		others, err := defaultByRule(r.rt, family == netlink.FAMILY_V4)
		if err != nil {
			return rep, err
		}
		p.before = append(p.before, others...)
	}
	p.outward = outward(maps.Keys(s.Uplinks), p.before, r.linkName)
	p.outward = slices.DeleteFunc(p.outward, func(n string) bool { return n == s.Tun || n == s.Direct })
	for family := range p.ranks {
		if p.ranks[family], err = r.ranksFor(family); err != nil {
			return rep, err
		}
	}
	r.setWanted(p, routes)
	// The MTU comes first: below 1,280 bytes a device has no IPv6 (addrconf.c, addrconf_notify), nor its
	// sysctls. Those of the device decide what the kernel does when it goes up. Addresses precede the routes that name them as source, and stale
	// ones go last, because the kernel deletes routes along with their source.
	steps := []func(context.Context) error{
		func(context.Context) error { return p.reconcileMTU(link) },
		p.reconcileSysctls,
		func(context.Context) error { return p.reconcileUp(link) },
		func(context.Context) error { return p.probeUp() },
		func(context.Context) error { return p.addAddrs(link) },
		func(ctx context.Context) error { return p.reconcileRoutes(ctx, index, routes) },
		func(context.Context) error { return p.reconcileHosts() },
		func(context.Context) error { return p.reconcileNextHops() },
		func(context.Context) error { return p.removeStaleAddrs(link) },
		func(ctx context.Context) error { return p.afterLastAddr(ctx, index, routes) },
		func(context.Context) error { return p.reconcileNFT() },
	}
	var errs []error
	for _, step := range steps {
		if err := ctx.Err(); err != nil {
			errs = append(errs, err)
			break
		}
		if err := step(ctx); err != nil {
			errs = append(errs, err)
		}
	}
	if ctx.Err() == nil {
		r.applied = p.next
	} else {
		maps.Copy(r.applied, p.next)
	}
	return rep, errors.Join(errs...)
}

// Remove takes away everything that carries our mark: routes, the TUN device's
// addresses, the nftables table; and puts changed sysctls back, unless somebody has
// changed them again since. The TUN device itself belongs to whoever opened it.
// What is gone already is no error.
func (r *Reconciler) Remove(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.wantMu.Lock()
	tun := r.want.tun
	r.want = wanted{tun: tun, removed: true} // Watch stays silent about what follows
	r.wantMu.Unlock()
	clear(r.applied)

	var errs []error
	index := 0
	link, err := r.rt.LinkByName(tun)
	var gone netlink.LinkNotFoundError
	switch {
	case err == nil:
		index = link.Attrs().Index
	case !errors.As(err, &gone):
		errs = append(errs, fmt.Errorf("hostnet: TUN device %s: %w", tun, err))
	}
	errs = append(errs, r.removeRoutes(ctx, index), r.removeTable(HostsTable, r.hostRouteList), r.removeTable(DirectTable, r.directRoutes))
	if err := r.nft.remove(); err != nil {
		errs = append(errs, r.nft.reopen(r.ns, err))
	}
	// Sysctls before addresses: with addr_gen_mode as it was, the kernel makes the
	// device a link-local address.
	errs = append(errs, r.ns.do(func() error { return r.sysctls.restore(tun) }))
	if link != nil && err == nil {
		errs = append(errs, r.removeAddrs(link))
	}
	return errors.Join(errs...)
}

// pass is one run of Reconcile.
type pass struct {
	r    *Reconciler
	s    *State
	rep  *Report
	next map[string]string // becomes Reconciler.applied

	link, probe int                   // numbers of the TUN device and of State.Direct; 0: there is none
	device      func(name string) int // any other's

	before  []netlink.Route // the main table as it was found, and the default routes to which policy rules lead where it has none
	last4   bool            // removeStaleAddrs has removed the device's last IPv4 address
	outward []string
	ranks   map[int]ranks // by family
}

// put enters what was done about one object: was is the object's text as found on the host,
// empty when it was missing, and is what it is now.
func (p *pass) put(object, was, is string) {
	p.next[object] = is
	switch before, known := p.r.applied[object]; {
	case known && before == is, !known && was != "":
		if was == "" {
			was = "missing"
		}
		p.rep.Repaired = append(p.rep.Repaired, is+" (was: "+was+")")
	case known:
		p.rep.Changed = append(p.rep.Changed, is)
	default:
		p.rep.Added = append(p.rep.Added, is)
	}
}

// keep enters an object that is as wanted.
func (p *pass) keep(object, is string) { p.next[object] = is }

// wanted is what Watch needs to know to tell an event that concerns us, and that we did not
// cause, from any other.
type wanted struct {
	tun      string
	removed  bool // by Remove: nothing concerns us until the next Reconcile
	index    int
	mtu      int
	v4, v6   bool
	addrs    map[netip.Addr]bool
	clusters []netip.Prefix
	own      []netip.Prefix
	prefixes map[netip.Prefix]bool // of the routes into the tunnel
	routes   map[routeKey]routeSpec
	tables   map[tableKey]routeSpec // of HostsTable and DirectTable
	rules    map[ruleKey]bool
	uplinks  map[string]int
	numbers  map[int]string // of the uplinks, with their names
	outward  map[int]bool   // numbers of devices
	members  []netip.Addr   // sorted
}

// tableKey is a route of a table other than main. Reconcile leaves one to each prefix.
type tableKey struct {
	table  uint32
	prefix netip.Prefix
}

// ruleKey is a policy rule.
type ruleKey struct {
	v4    bool
	table uint32
	rank  uint32       // its priority
	from  netip.Prefix // of HostsTable
	iif   string       // of DirectTable
}

func (r *Reconciler) setWanted(p *pass, routes map[routeKey]routeSpec) {
	s := p.s
	w := wanted{
		tun: s.Tun, index: p.link, mtu: s.MTU, v4: s.uses(true), v6: s.uses(false),
		addrs: map[netip.Addr]bool{}, clusters: s.ClusterCIDRs, own: s.Own,
		prefixes: make(map[netip.Prefix]bool, len(routes)), routes: routes, uplinks: s.Uplinks, members: s.Members,
		tables: map[tableKey]routeSpec{}, rules: map[ruleKey]bool{}, outward: map[int]bool{},
		numbers: map[int]string{},
	}
	for n := range s.Uplinks {
		w.numbers[p.device(n)] = n
	}
	for _, n := range p.outward {
		w.outward[p.device(n)] = true
	}
	for _, a := range s.deviceAddrs() {
		w.addrs[a] = true
	}
	for k, spec := range routes {
		if !spec.unreachable { // there, others' routes are welcome
			w.prefixes[k.prefix] = true
		}
	}
	for family, ranks := range p.ranks {
		v4 := family == netlink.FAMILY_V4
		hosts, from := p.wantedHosts(v4)
		for a, spec := range hosts {
			w.tables[tableKey{HostsTable, netip.PrefixFrom(a, a.BitLen())}] = routeSpec{link: spec.link, mtu: spec.mtu}
		}
		for _, o := range from {
			w.rules[ruleKey{v4: v4, table: HostsTable, rank: uint32(ranks.hosts), from: o}] = true
		}
		hops := p.wantedHops(v4)
		for prefix, spec := range hops {
			w.tables[tableKey{DirectTable, prefix}] = spec
		}
		if len(hops) > 0 {
			w.rules[ruleKey{v4: v4, table: DirectTable, rank: uint32(ranks.direct), iif: s.Direct}] = true
		}
	}
	r.wantMu.Lock()
	r.want = w
	r.wantMu.Unlock()
}
