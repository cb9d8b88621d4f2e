package seed

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// Lookup finds the addresses of a host; network is "ip4" or "ip6", as for [net.Resolver.LookupNetIP].
type Lookup func(ctx context.Context, network, host string) ([]netip.Addr, error)

// When names are looked up.
const (
	lookupTimeout = 5 * time.Second  // of one family of one name: what has found nothing by then is told
	lookupLimit   = time.Minute      // likewise: then it is given up. A resolver asks the next name server when one is silent for 5 s (resolv.conf(5), timeout)
	retryMin      = time.Second      // after an error, doubled each time
	retryMax      = 15 * time.Second // likewise, at most
	refreshMin    = 2 * time.Second  // after the first answer, and one that is another than before: doubled each time
	refresh       = 30 * time.Second // likewise, at most: a host may move
)

// A List is the configured seeds with their addresses.
type List struct {
	lookup Lookup
	log    *slog.Logger

	mu      sync.Mutex
	entries []*entry
	changed chan struct{} // closed and replaced on each change
}

// entry is one seed under the List's lock.
type entry struct {
	Seed
	host   string // "" if the seed is an address
	port   uint16
	family [2]answer // of ip4 and ip6
	own    bool      // the host's own name
}

// answer is what is known of one family of a name.
type answer struct {
	addrs []netip.Addr
	err   error
	ended bool // a lookup has ended
}

var networks = [2]string{"ip4", "ip6"}

var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// New reads the seeds; port is that of those which name none. lookup nil means the host's resolver, log nil none. It looks
// nothing up: addresses are known at once, names when Run has found them.
func New(texts []string, port uint16, lookup Lookup, log *slog.Logger) (*List, error) {
	if lookup == nil {
		lookup = net.DefaultResolver.LookupNetIP
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	l := &List{lookup: lookup, log: log, changed: make(chan struct{})}
	for _, text := range texts {
		host, addr, p, err := parse(text, port)
		if err != nil {
			return nil, err
		}
		e := &entry{Seed: Seed{Name: text}, port: p}
		if addr.IsValid() {
			e.Addrs, e.Tried = []netip.AddrPort{netip.AddrPortFrom(addr, p)}, true
		} else {
			e.host = host
		}
		l.entries = append(l.entries, e)
	}
	return l, nil
}

// Own tells the name of this host. If neither /etc/hosts nor a name server knows it, a seed of that name leads to this host: what others
// know it by need not be known here. It counts from the next lookup on.
func (l *List) Own(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.entries {
		e.own = e.host != "" && strings.EqualFold(strings.TrimSuffix(e.host, "."), name)
	}
}

// All returns the seeds in the order of the configuration. The slice is the caller's, the addresses in it are not to be changed. A
// nil List has none.
func (l *List) All() []Seed {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]Seed, len(l.entries))
	for i, e := range l.entries {
		out[i] = e.Seed
	}
	return out
}

// Changed returns a channel that is closed when something in All changes after this call. A nil List never changes.
func (l *List) Changed() <-chan struct{} {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.changed
}

// Run looks names up until ctx ends, a nil List none. It returns nil.
func (l *List) Run(ctx context.Context) error {
	if l == nil {
		return nil
	}
	var wg sync.WaitGroup
	for _, e := range l.entries {
		if e.host != "" {
			for i := range networks {
				wg.Go(func() { l.follow(ctx, e, i) })
			}
		}
	}
	wg.Wait()
	return nil
}

// follow looks one family of a name up again and again.
func (l *List) follow(ctx context.Context, e *entry, family int) {
	retry, again := retryMin, refreshMin
	var before []netip.AddrPort
	for {
		l.ask(ctx, e, family)
		l.mu.Lock()
		if !slices.Equal(before, e.Addrs) {
			before, again = e.Addrs, refreshMin
		}
		wait := again
		if e.Err != nil || e.Unresolved() {
			wait = retry
			retry = min(2*retry, retryMax)
		} else {
			retry, again = retryMin, min(2*again, refresh)
		}
		l.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// ask looks one family of a name up. What one finds is told at once: there are name servers that never answer for one of the two. A silent
// server is told, too, unless the name has an answer from before, and the lookup goes on: there may be another server to ask.
func (l *List) ask(ctx context.Context, e *entry, family int) {
	asked, cancel := context.WithTimeout(ctx, lookupLimit)
	defer cancel()
	var addrs []netip.Addr
	var err error
	done := make(chan struct{})
	go func() { // ends with asked
		addrs, err = l.lookup(asked, networks[family], e.host)
		close(done)
	}()
	silent := &net.DNSError{Err: "the name server does not answer", Name: e.host, IsTimeout: true, IsTemporary: true}
	select {
	case <-done:
	case <-time.After(lookupTimeout):
		if !l.knows(e, family) && ctx.Err() == nil {
			l.answered(e, family, nil, silent)
		}
		<-done
	}
	if ctx.Err() != nil {
		return
	}
	if err != nil && asked.Err() != nil {
		err = silent
	}
	l.answered(e, family, addrs, err)
}

// knows reports whether the last lookup of a family found something.
func (l *List) knows(e *entry, family int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return e.family[family].ended && e.family[family].err == nil
}

// answered takes what a lookup came to.
func (l *List) answered(e *entry, family int, addrs []netip.Addr, err error) {
	good, bad := usable(addrs)
	if err == nil && len(good) == 0 {
		err = fmt.Errorf("%w: %s", ErrUseless, strings.Join(bad, ", "))
		if len(bad) == 0 {
			err = &net.DNSError{Err: "no such host", Name: e.host, IsNotFound: true}
		}
	}
	now := time.Now()
	l.mu.Lock()
	old := e.Seed
	e.family[family].settle(good, err)
	e.Seed = combine(old, e.family, e.port, now)
	if self := netip.AddrPortFrom(loopback, e.port); e.own && notFound(e.Err) && (e.Unresolved() || e.Addrs[0] == self) {
		e.Addrs, e.Err, e.Since = []netip.AddrPort{self}, nil, time.Time{}
	}
	changed := !slices.Equal(old.Addrs, e.Addrs) || old.Tried != e.Tried || old.Why() != e.Why()
	next := e.Seed
	if changed {
		close(l.changed)
		l.changed = make(chan struct{})
	}
	l.mu.Unlock()
	if changed {
		l.tell(old, next)
	}
}

// settle notes the end of a lookup. An answer replaces the one before, also the answer that there is none; what says nothing about
// the name, as when the server is busy, leaves it.
func (a *answer) settle(good []netip.Addr, err error) {
	a.err, a.ended = err, true
	if _, isDNS := errors.AsType[*net.DNSError](err); err == nil || !isDNS || notFound(err) {
		a.addrs = good
	}
}

// notFound reports whether a name server has said that there is no such name.
func notFound(err error) bool {
	dns, ok := errors.AsType[*net.DNSError](err)
	return ok && dns.IsNotFound
}

// combine makes the seed out of what is known of its two families.
func combine(old Seed, family [2]answer, port uint16, now time.Time) Seed {
	s := Seed{Name: old.Name, Tried: family[0].ended && family[1].ended}
	for _, a := range family {
		for _, addr := range a.addrs {
			s.Addrs = append(s.Addrs, netip.AddrPortFrom(addr, port))
		}
	}
	// A family that has an answer is enough. Of two errors the one that is not "no such host" says more.
	if s.Tried && family[0].err != nil && family[1].err != nil {
		s.Err, s.Since = family[0].err, now
		if notFound(s.Err) {
			s.Err = family[1].err
		}
		if old.Err != nil && Reason(old.Err) == Reason(s.Err) {
			s.Since = old.Since
		}
	}
	if len(s.Addrs) == 0 {
		s.Addrs = old.Addrs
	}
	return s
}

func (l *List) tell(old, now Seed) {
	switch {
	case now.Err != nil && (old.Err == nil || old.Why() != now.Why()):
		l.log.Warn("seed does not resolve, its name is looked up again and again", "seed", now.Name, "reason", now.Why(), "last", now.Addrs)
	case !slices.Equal(old.Addrs, now.Addrs) && !old.Unresolved():
		l.log.Info("seed has other addresses now", "seed", now.Name, "addrs", now.Addrs, "before", old.Addrs)
	case old.Err != nil && now.Err == nil:
		l.log.Info("seed resolves", "seed", now.Name, "addrs", now.Addrs)
	}
}
