package agent

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/cni/conflist"
	"github.com/tulle-net/tulle/internal/config"
	"github.com/tulle-net/tulle/internal/hostnet"
	"github.com/tulle-net/tulle/internal/ownership"
	"github.com/tulle-net/tulle/internal/podnet"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/membership/gossip"
	"github.com/tulle-net/tulle/membership/keyring"
	"github.com/tulle-net/tulle/membership/seed"
	"github.com/tulle-net/tulle/tunnel"
	"github.com/tulle-net/tulle/tunnel/device"
	"github.com/tulle-net/tulle/tunnel/direct"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/mtu"
)

// session is everything that depends on this host's underlay address. start fills the embedded parts; they are constant
// afterwards, unless a field says otherwise.
type session struct {
	cfg     config.Config
	log     *slog.Logger
	started time.Time

	underlay
	dataPath
	clusterSide
	hostSide
	bench *benches

	pulse   pulse        // of loop, which wakes at least every second
	outlive func() error // lets the TUN device stay when this process ends

	wake   chan struct{} // members, paths or configuration changed
	states memberStates
	memory *memory                         // of members that own space; loop's own
	gone   map[membership.NodeID]time.Time // since when both gossip and data path have lost a node; used by loop only
	view   atomic.Pointer[view]            // the last view of loop; nil before the first one

	// families are those of outer packets to members that have both in common with this host; loop's own.
	families  map[membership.NodeID]*outerFamily
	tunSince  time.Time // since when this node has its present tun addresses; loop's own
	answering answering
	externals externalTimes // loop's own
}

// underlay is this host's address and its sizes.
type underlay struct {
	link  hostnet.Underlay
	moved underlayMove // how the last session ended; zero for the first
	seeds *seed.List
	// podSpace is the cluster's address space as known at the start.
	podSpace []netip.Prefix
	peers    []netip.Addr          // addresses of members in the state at the start
	first    encap.Mode            // what the TUN's MTU is made for: the best way at the start
	sizes    atomic.Pointer[sizes] // follow link
	ways     *hostnet.Ways         // how packets leave for each peer; nil before the first look; loop's own

	own         atomic.Pointer[[]netip.Addr] // the addresses of all this host's devices, as of the last check
	kept        atomic.Pointer[hostnet.Kept] // what has become of link; nil before the first check
	lostSince   time.Time                    // since when an address of link is missing; loop's own
	sightings   sightings                    // loop's own
	renumberAt  time.Time                    // when this host's turn is to leave deprecated addresses; zero if they are not; loop's own
	found       netip.Addr                   // the address that would be chosen now, as of the last check; loop's own
	besideKnown bool                         // gossip listens at the other addresses of the interface; loop's own
}

// dataPath moves packets and probes peers.
type dataPath struct {
	device   *device.Device
	engine   *tunnel.Engine
	direct   *direct.Prober // nil: noDirect says why
	noDirect error
	// neighbours and nextHops, by the peers' IDs, precede probes of direct paths.
	neighbours *hostnet.Neighbours
	nextHops   atomic.Pointer[map[string]nextHop]
	probes     *prober                    // run by prober.run; changes of paths wake loop
	prefer     atomic.Pointer[preference] // a reload may change it
	fast       fastPath
}

// clusterSide is this node's part in the cluster: its ownership, its disk, and gossip.
type clusterSide struct {
	store     *ipam.Store
	ownership *ownership.Machine // ticked by loop; cluster.deliver passes messages
	gossip    *gossip.Gossip
	keys      *keyring.Ring // nil: gossip is not encrypted
	cluster   *cluster      // joins ownership to gossip
	honouring sync.Mutex    // one record of a pod that is gone at a time
}

// masquerading is what the configuration says about pods that talk to the outside.
type masquerading struct {
	on     bool
	except []netip.Prefix // destinations that see pods' own addresses
}

// hostSide reconciles the host's routes, addresses and nftables.
type hostSide struct {
	host          *hostnet.Reconciler
	leftMTU       map[netip.Prefix]int               // of the routes that an earlier run left, in bytes
	leftHosts     []hostnet.HostRoute                // likewise, of those to members' hosts
	leftMembers   []netip.Addr                       // likewise, the underlay addresses of members
	leftDirect    map[netip.Prefix]hostnet.PeerRoute // likewise, the direct ones; loop's own
	conflist      *conflist.Publisher
	directTraffic directTraffic
	pods          *podnet.Host                 // source checks and routes of this host's pods
	only4         bool                         // the kernel has no IPv6
	disturbed     chan struct{}                // another program changed the host's network
	masquerade    atomic.Pointer[masquerading] // a reload may change it
	retry         retry                        // of a reconcile that has failed; loop's own
	stateLost     bool                         // pods were here, and no state of theirs, when this session began
	repeated      sparseLog                    // of what others take away, and what fails, again and again

	mu              sync.Mutex        // guards the fields below, which loop writes and status reads
	conflicts       []hostnet.Problem // of the last reconcile
	hostErr         error             // of the last reconcile
	cniErr          error             // of the last time that the network was published to container engines
	reconciled      bool              // once: what differs after that, somebody else has changed
	hostDone        bool              // a reconcile has given this host its addresses and routes
	repairs         uint64
	taken           taken
	neighbourTables fullNeighbours
}

// meta returns this node's metadata for other members.
func (s *session) meta() membership.Meta {
	return membership.Meta{
		ID: s.ownership.Node(), Cluster: s.ownership.Cluster(), Name: s.cfg.NodeName, Underlay: s.link.Addrs, TunAddrs: s.ownership.TunAddrs(),
		ProbeAddrs: s.probeAddrs(), UDPPort: s.cfg.UDPPort, VXLANPort: s.vxlanPort(), HasVNI: true, VNI: s.cfg.VNI, VTEPMAC: s.vtepMAC(),
		Capabilities: membership.CapHostByTunnel | membership.CapBench | s.fastCapability(), Version: announcedVersion(),
	}
}

// announcedVersion is this program's version as other members get it, cut to what they take.
func announcedVersion() string {
	v := api.Version()
	return v[:min(len(v), membership.MaxProgramVersion)]
}

// run runs the session until ctx is done (nil), or until a part fails without which the session cannot continue.
func (s *session) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for _, f := range []func(context.Context) error{
		s.runDirect, s.engine.Run, s.gossip.Run, s.outliveOnceListening, s.cluster.deliver, s.probes.run, s.loop, s.bench.run,
		func(ctx context.Context) error { return s.host.Watch(ctx, func() { signal(s.disturbed) }) },
	} {
		wg.Go(func() {
			if err := f(ctx); err != nil {
				cancel(s.orLost(err)) // not the cause of the agent's end: that is no socket of the session
			}
		})
	}
	s.log.Info("agent runs", "node", s.cfg.NodeName, "id", s.ownership.Node(), "underlay", s.link.Addrs, "interface", s.link.Iface, "because", s.link.Why,
		"tun", s.device.Name(), "mtu", int(s.tunMTU()), "offloads", s.device.Offloads().String())
	<-ctx.Done()
	wg.Wait()
	err := context.Cause(ctx)
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	return errors.Join(err, s.ownership.Flush(time.Now()), s.close())
}

// runDirect receives the probes of direct paths.
func (s *session) runDirect(ctx context.Context) error {
	if s.direct == nil {
		return nil
	}
	return s.direct.Run(ctx)
}

// outliveOnceListening waits until gossip, the last part to open its sockets, has done so.
func (s *session) outliveOnceListening(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-s.gossip.Ready():
		return s.outlive()
	}
}

// close releases what start opened. Calls from the control socket that are still under way find it closed, not gone.
func (s *session) close() error {
	var errs []error
	s.fast.end()
	if s.engine != nil {
		errs = append(errs, s.engine.Close())
	} else if s.device != nil {
		errs = append(errs, s.device.Close())
	}
	if s.neighbours != nil {
		s.neighbours.Close()
	}
	if s.direct != nil {
		errs = append(errs, s.direct.Close())
	}
	if s.host != nil {
		errs = append(errs, s.host.Close())
	}
	if s.pods != nil {
		errs = append(errs, s.pods.Close())
	}
	if s.store != nil {
		errs = append(errs, s.store.Close())
	}
	return errors.Join(errs...)
}

// rebuild wakes the loop to build a new view. It never blocks.
func (s *session) rebuild() { signal(s.wake) }

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// membersMoved handles a change of the members in gossip. The data path probes those at once that gossip has lost or found again.
func (s *session) membersMoved() {
	now := time.Now()
	for _, id := range s.states.moved(s.gossip.Members()) {
		s.probes.poke(now, id.String())
	}
	s.rebuild()
}

// memberStates are those that gossip has reported last, of other members.
type memberStates struct {
	mu    sync.Mutex
	known map[membership.NodeID]gossip.MemberState
}

// moved takes over what gossip reports now, and returns which members are in another state than before.
func (s *memberStates) moved(members []gossip.Member) (ids []membership.NodeID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	was := s.known
	s.known = make(map[membership.NodeID]gossip.MemberState, len(members))
	for _, m := range members {
		s.known[m.ID] = m.State
		if state, known := was[m.ID]; known && state != m.State {
			ids = append(ids, m.ID)
		}
	}
	return ids
}

const (
	lookEvery      = time.Second           // for changes by time: hold-downs
	reconcileEvery = 30 * time.Second      // of the whole host, for changes without a netlink event
	settle         = 50 * time.Millisecond // events within this time are handled together
)

// pauseAfter returns the pause after building a view that took so long. It limits that work to a fifth of a CPU, however many
// routes the host has and however often something changes. It is never longer than lookEvery.
func pauseAfter(took time.Duration) time.Duration { return min(max(settle, 4*took), lookEvery) }

// loop updates engine, host and metadata from the state machine, gossip and the paths.
func (s *session) loop(ctx context.Context) error {
	changed, stop := s.ownership.Subscribe()
	defer stop()
	tick := time.NewTimer(0)
	defer tick.Stop()
	full := time.NewTicker(reconcileEvery)
	defer full.Stop()
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	seeds := s.seeds.Changed()
	notify := newNotifier(s.log)
	var applied applied
	defer func() { s.publish(context.WithoutCancel(ctx), false, false) }()
	defer func() { s.saveMemory(time.Now(), true) }()
	for {
		s.pulse.beat()
		force, again := false, false
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			tick.Reset(time.Until(s.ownership.Tick(time.Now())))
			continue
		case <-changed:
		case <-s.wake:
		case <-seeds:
			seeds = s.seeds.Changed()
			if err := s.checkUnderlay(time.Now()); err != nil {
				return err
			}
		case <-look.C:
			select {
			case <-s.gossip.Ready():
				s.store.Alive(uptime())
			default:
			}
			if !s.lostSince.IsZero() || !s.besideKnown || s.gossip.Alive() == 0 || !s.cutOffSince().IsZero() || !s.renumberAt.IsZero() && time.Now().After(s.renumberAt) {
				if err := s.checkUnderlay(time.Now()); err != nil {
					return err
				}
			}
			if to, yes := s.cfg.Renamed(); yes {
				return &nameChange{to}
			}
			force = s.retry.due(time.Now())
			s.lookAtNeighbours(time.Now())
		case <-full.C:
			force, again = true, true
			if err := s.checkUnderlay(time.Now()); err != nil {
				return err
			}
			s.releaseGone()
		case <-s.disturbed:
			force = true
			if err := s.checkUnderlay(time.Now()); err != nil {
				return err
			}
		}
		began := time.Now()
		if err := s.apply(ctx, &applied, force); err != nil {
			return err
		}
		if s.ready() {
			notify.ready(s.summary())
		} else {
			notify.waiting(s.notReady(s.view.Load()))
		}
		s.publish(ctx, s.ready(), again)
		select {
		case <-ctx.Done():
		case <-time.After(pauseAfter(time.Since(began))):
		}
	}
}

// applied is the last state that was passed to the engine, the host and gossip.
type applied struct {
	meta  membership.Meta
	local tunnel.Local
	peers []tunnel.Peer
	host  hostnet.State
}

// apply builds a view and applies what has changed.
func (s *session) apply(ctx context.Context, was *applied, force bool) error {
	now := time.Now()
	if force || s.ways == nil {
		s.ways = s.host.NewWays(s.link.Addrs)
	}
	v := s.look(now)
	s.view.Store(v)
	s.saveMemory(now, false)
	if m := s.meta(); !reflect.DeepEqual(m, was.meta) {
		if err := s.gossip.SetMeta(m); err != nil {
			return err
		}
		was.meta = m
	}
	s.gossip.SetDigest(s.ownership.Digest())
	local := tunnel.Local{TunAddrs: v.tun, Prefixes: v.own, Underlay: s.link.Addrs, VTEPMAC: s.vtepMAC(), Probes: s.probeAddrs()}
	s.updateDirect(v)
	s.probes.setPeers(now, s.probeTargets(v))
	peers, h := v.tunnelPeers(), s.hostState(v)
	packets := func() {
		if !reflect.DeepEqual(local, was.local) || !reflect.DeepEqual(peers, was.peers) {
			s.engine.Update(local, peers)
			was.local, was.peers = local, peers
		}
	}
	// A route's MTU falls before the engine takes no more, so that senders hear of it from the kernel and lose nothing.
	if !narrower(was.peers, peers) {
		packets()
	}
	if force || !reflect.DeepEqual(h, was.host) {
		s.reconcile(ctx, h)
		was.host = h
	}
	packets()
	s.updateFast(v, force)
	s.bench.done(v.benchChange)
	return nil
}

// saveMemory saves what is remembered of members for the next run.
func (s *session) saveMemory(now time.Time, due bool) {
	if err := s.memory.save(now, due); err != nil {
		const what = "the members that own space are not noted for the next start"
		s.repeated.log(s.log, slog.LevelWarn, what, what, "error", err)
	}
}

// narrower reports that some peer's packets may be less large than before.
func narrower(was, is []tunnel.Peer) bool {
	before := make(map[string]mtu.TUN, len(was))
	for i := range was {
		before[was[i].ID] = was[i].MTU
	}
	return slices.ContainsFunc(is, func(p tunnel.Peer) bool { return p.MTU < before[p.ID] })
}

// reconcile repairs the host's state, and keeps what it could not repair for status.
func (s *session) reconcile(ctx context.Context, h hostnet.State) {
	rep, err := s.host.Reconcile(ctx, h)
	pods, podErr := s.pods.Reconcile(ctx)
	if ctx.Err() != nil {
		return
	}
	rep.Repaired, err = append(rep.Repaired, pods...), errors.Join(err, podErr)
	s.mu.Lock()
	first := !s.reconciled
	s.reconciled = true
	s.mu.Unlock()
	if first {
		for _, r := range rep.Repaired {
			s.log.Info("host state of an earlier run brought up to date", "object", r)
		}
		rep.Repaired = nil
	}
	for _, r := range rep.Repaired {
		s.repeated.log(s.log, slog.LevelWarn, r, "host state repaired: somebody else had changed it", "object", r)
	}
	if err != nil {
		s.repeated.log(s.log, slog.LevelError, err.Error(), "host state is not as it should be", "error", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.repairs += uint64(len(rep.Repaired))
	s.taken.note(time.Now(), rep.Repaired)
	s.conflicts, s.hostErr = rep.Conflicts, err
	s.retry.note(time.Now(), err != nil)
	s.hostDone = s.hostDone || err == nil && len(h.TunAddrs) > 0
}

// retry says when something that has failed is to be tried again: after lookEvery, and ever later, up to reconcileEvery.
type retry struct {
	at   time.Time // zero: it has not failed
	wait time.Duration
}

// note takes over how an attempt has ended.
func (r *retry) note(now time.Time, failed bool) {
	if !failed {
		*r = retry{}
		return
	}
	r.wait = min(max(2*r.wait, lookEvery), reconcileEvery)
	r.at = now.Add(r.wait)
}

// due reports whether it is time for another attempt.
func (r *retry) due(now time.Time) bool { return !r.at.IsZero() && !now.Before(r.at) }

// notReady is why this node is not ready, in a sentence.
func (s *session) notReady(v *view) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	host := "the host's network is not set up yet"
	if s.hostErr != nil {
		host = hostWrong + s.hostErr.Error()
	}
	return cmp.Or(v.status.Why, s.noPods(v.status.Params.Families).What, host)
}

// ready reports whether the table is confirmed, this node has its addresses, and the host is in its desired state.
func (s *session) ready() bool {
	v := s.view.Load()
	s.mu.Lock()
	defer s.mu.Unlock()
	return v != nil && v.status.Phase == ownership.Ready && len(v.tun) > 0 && s.hostDone && s.hostErr == nil &&
		s.noPods(v.status.Params.Families).What == ""
}
