package agent

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/hostnet"
	"github.com/tulle-net/tulle/internal/ownership"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/tunnel"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/mtu"
)

// A benchmark between two members has a pair of addresses for each way to send: one out of each node's own space, on its TUN
// device. Each end sends to the other's address by that way, whatever it uses for pods (tunnel.Detour, and a host route for
// the direct path). So nothing changes for anybody else's packets. docs/decisions/0032-bench-between-members.md.
const (
	benchKeyPrefix = "bench/"         // of the keys of its addresses in the list of allocations
	benchMaxTime   = 10 * time.Minute // of one benchmark
	benchGoOn      = 4 * time.Second  // how often the asking agent says that it goes on
	benchLease     = 15 * time.Second // without that, the other agent ends it
	benchAnswer    = 30 * time.Second // for the answer: the other end may search for path MTUs
	benchBeat      = time.Second      // of events to the caller
)

// benches are the benchmarks of a session: at most one that this node asked for, and one that it serves.
type benches struct {
	s     *session
	mbps  atomic.Int64  // the configured limit; 0: none may run
	inbox chan inLetter // letters, in the order of arrival
	ended chan struct{} // closed when the session ends

	mu      sync.Mutex
	asked   *benchSide // nil: none
	served  *benchSide
	change  uint64        // counts changes of both
	applied uint64        // the last one that engine and host have
	settled chan struct{} // closed and replaced when applied changes
}

type inLetter struct {
	from membership.NodeID
	*benchLetter
}

// benchSide is one end of a benchmark. Its fields are constant once it is in force, except the times.
type benchSide struct {
	id      string
	peer    string // ID
	node    membership.NodeID
	ways    []benchWay
	answers chan *benchLetter // of the other agent; for the asking side
	stop    context.CancelFunc
	reason  string    // why it was stopped
	lease   time.Time // the served side ends at the earlier of these
	until   time.Time
}

// benchWay is one way to send, with its addresses. Without an address it cannot be measured.
type benchWay struct {
	mode        encap.Mode
	own, theirs netip.Addr
	port        uint16 // at theirs
	mtu         mtu.TUN
	missing     string
}

func newBenches(s *session) *benches {
	return &benches{s: s, inbox: make(chan inLetter, 16), ended: make(chan struct{}), settled: make(chan struct{})}
}

// letter takes a message of gossip. It must not block: one too many is lost, as the network may lose it.
func (b *benches) letter(from membership.NodeID, raw []byte) error {
	l, err := parseLetter(raw)
	if err != nil {
		return err
	}
	select {
	case b.inbox <- inLetter{from, l}:
	default:
	}
	return nil
}

// run handles letters until ctx ends.
func (b *benches) run(ctx context.Context) error {
	var served sync.WaitGroup
	defer served.Wait()
	defer close(b.ended)
	for {
		select {
		case <-ctx.Done():
			return nil
		case l := <-b.inbox:
			switch l.Kind {
			case letterAsk:
				served.Go(func() { b.serve(ctx, l) })
			case letterGoOn:
				b.goOn(l)
			case letterAnswer:
				b.toAsker(l)
			case letterEnd:
				b.toAsker(l)
				b.endServed(l)
			}
		}
	}
}

// toAsker passes a letter to the benchmark that this node asked for.
func (b *benches) toAsker(l inLetter) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if a := b.asked; a != nil && a.id == l.ID && a.node == l.from {
		select {
		case a.answers <- l.benchLetter:
		default:
		}
	}
}

// send sends a letter.
func (b *benches) send(ctx context.Context, to membership.NodeID, l *benchLetter) error {
	raw, err := l.encode()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, sendTimeout)
	defer cancel()
	return b.s.gossip.Send(ctx, to, raw)
}

// sides are the benchmarks in force, and the number of that state.
func (b *benches) sides() (out []*benchSide, change uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, side := range []*benchSide{b.asked, b.served} {
		if side != nil {
			copied := *side
			copied.ways = slices.Clone(side.ways)
			out = append(out, &copied)
		}
	}
	return out, b.change
}

// done says that engine and host have the state of that number.
func (b *benches) done(change uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.applied < change {
		b.applied = change
		close(b.settled)
		b.settled = make(chan struct{})
	}
}

// changed makes a change of the sides take effect: it returns when engine and host have it.
func (b *benches) changed(ctx context.Context, what func()) error {
	b.mu.Lock()
	what()
	b.change++
	want := b.change
	b.mu.Unlock()
	for {
		b.mu.Lock()
		applied, settled := b.applied, b.settled
		b.mu.Unlock()
		if applied >= want {
			return nil
		}
		b.s.rebuild()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-b.ended:
			return errors.New("the session has ended")
		case <-settled:
		}
	}
}

// propose proves the ways to a peer and takes an address for each.
func (b *benches) propose(ctx context.Context, p *peerView, id string, modes []string, six bool) ([]benchWay, error) {
	var out []benchWay
	for _, name := range modes {
		m, err := encap.ParseMode(name)
		if err != nil {
			return out, err
		}
		if m == encap.Direct && six {
			m = encap.Direct6
		}
		w := benchWay{mode: m}
		if w.mtu, w.missing = b.s.proven(ctx, p, m); w.missing == "" {
			if w.own, err = b.address(ctx, id, name, six); err != nil {
				return out, err
			}
		}
		out = append(out, w)
	}
	return out, ctx.Err()
}

// proven is the largest packet that a way to a peer takes, or why it takes none. The answer to a probe has come back by the
// same way.
func (s *session) proven(ctx context.Context, p *peerView, m encap.Mode) (mtu.TUN, string) {
	if why := s.unfit(p, m); why != "" {
		return 0, why
	}
	limit := s.limit(m, p)
	if i, ok := s.probes.info(p.id, m); ok && i.Up && i.MTU > 0 {
		if i.First { // the search for more goes on
			return mtu.TUN(s.largest(ctx, p, m)), ""
		}
		return min(limit, i.MTU), ""
	}
	if m.IsDirect() {
		if st, ok := s.probes.status(p.id, m); ok {
			return 0, "not proven: " + st.Words
		}
		return 0, "not in `paths` of " + s.cfg.NodeName + ", so it is not proven"
	}
	var last error
	for range 3 {
		if _, _, last = s.pingOnce(ctx, p, m, pingSize, pingWait); last == nil {
			return mtu.TUN(s.largest(ctx, p, m)), ""
		}
	}
	return 0, "probes are not answered: " + last.Error()
}

// address takes an address out of this node's space.
func (b *benches) address(ctx context.Context, id, mode string, six bool) (netip.Addr, error) {
	r := ownership.PodRequest{Key: benchKeyPrefix + id + "/" + mode, Pod: "benchmark of " + mode}
	list, err := b.s.ownership.Allocate(time.Now(), r)
	for deadline := time.Now().Add(growthPatience); errors.Is(err, ownership.ErrGrowing) && time.Now().Before(deadline) && ctx.Err() == nil; {
		time.Sleep(100 * time.Millisecond)
		list, err = b.s.ownership.Allocate(time.Now(), r)
	}
	if err != nil {
		return netip.Addr{}, coded(err)
	}
	i := slices.IndexFunc(list, func(a ipam.Allocation) bool { return a.Addr.Is6() == six })
	if i < 0 {
		return netip.Addr{}, api.Errorf(api.CodeUsage, "the pods of this cluster have no %s addresses", familyName[b2i(six)])
	}
	return list[i].Addr, nil
}

// release gives the addresses of a benchmark back; all of them, if id is empty.
func (s *session) releaseBench(id string) {
	for _, l := range s.ownership.Allocations() {
		if strings.HasPrefix(l.Key, benchKeyPrefix+id) {
			if _, err := s.ownership.Release(time.Now(), l.Key); err != nil {
				s.log.Warn("the address of a benchmark stays allocated; `tulle ipam release` frees it", "address", l.Addr, "error", err)
			}
		}
	}
}

// benchDetour is a way in force: packets of this host from own to theirs take it.
type benchDetour struct {
	peer string
	benchWay
}

// benchDetours adds what is in force to a view.
func (s *session) benchDetours(v *view) {
	sides, change := s.bench.sides()
	v.benchChange = change
	for _, side := range sides {
		for _, w := range side.ways {
			if w.own.IsValid() {
				v.bench = append(v.bench, benchDetour{side.peer, w})
			}
		}
	}
}

// detours are those to a peer, for the engine. A direct one is the host's route alone.
func (v *view) detours(p *peerView) (out []tunnel.Detour) {
	for _, d := range v.bench {
		if d.peer == p.id && d.theirs.IsValid() && !d.mode.IsDirect() {
			out = append(out, tunnel.Detour{Addr: d.theirs, Mode: d.mode, MTU: d.mtu})
		}
	}
	return out
}

// benchHost adds the addresses of benchmarks, and the routes to the other ends', to the desired state of the host.
func (v *view) benchHost(h *hostnet.State) {
	for _, d := range v.bench {
		h.Extra = append(h.Extra, d.own)
		i := slices.IndexFunc(v.peers, func(p peerView) bool { return p.id == d.peer })
		if i < 0 || !d.theirs.IsValid() {
			continue
		}
		r := hostnet.PeerRoute{Prefix: netip.PrefixFrom(d.theirs, d.theirs.BitLen()), MTU: int(d.mtu)}
		if w := v.peers[i].directOf(d.mode); w != nil {
			r.Via, r.Device = w.via, w.device
		}
		if d.theirs.Is6() {
			r.MTU = max(r.MTU, mtu.Min6)
		}
		h.Peers = append(h.Peers, r)
	}
}

// newBenchID makes up an ID or a token: benchIDLen hexadecimal digits.
func newBenchID() string {
	b := make([]byte, benchIDLen/2)
	_, _ = rand.Read(b) // it never fails
	return hex.EncodeToString(b)
}
