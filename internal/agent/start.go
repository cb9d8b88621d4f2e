package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/config"
	"github.com/tulle-net/tulle/internal/hostnet"
	"github.com/tulle-net/tulle/internal/ownership"
	"github.com/tulle-net/tulle/internal/podnet"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/membership/gossip"
	"github.com/tulle-net/tulle/membership/keyring"
	"github.com/tulle-net/tulle/tunnel"
	"github.com/tulle-net/tulle/tunnel/device"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/mtu"
	tunsocket "github.com/tulle-net/tulle/tunnel/underlay"
)

// sendable are the ways that this version can send. Direct stands for both families.
var sendable = []encap.Mode{encap.Direct, encap.UDP, encap.VXLAN, encap.IPIP}

// start opens a session. It waits for an underlay address, because a host may boot slower than its services; everything
// else that is wrong is an error.
func (a *agent) start(ctx context.Context) (*session, error) {
	cfg := a.config()
	s := &session{
		cfg: cfg, log: a.log, started: time.Now(),
		underlay: underlay{seeds: a.seeds, moved: a.moved},
		hostSide: hostSide{disturbed: make(chan struct{}, 1), conflist: a.conflist, only4: !hostnet.HasIPv6()},
		wake:     make(chan struct{}, 1), gone: make(map[membership.NodeID]time.Time), families: readFamilies(runFile(cfg, "families")),
	}
	s.fast.total = a.carried
	s.bench = newBenches(s)
	if err := a.configure(s); err != nil {
		return nil, err
	}
	if err := a.open(ctx, s); err != nil {
		return s, errors.Join(s.orLost(err), s.close())
	}
	return s, nil
}

// open opens what the session needs, one after the other, and stops at the first error.
func (a *agent) open(ctx context.Context, s *session) (err error) {
	if s.store, err = ipam.OpenStore(a.cfg.StateDir, runFile(a.cfg, "fresh")); err != nil {
		return err
	}
	state, err := s.store.Load()
	if err != nil && !errors.Is(err, ipam.ErrNoState) {
		return err
	}
	// Also before the wait: an address of this host inside the cluster's space is no underlay address.
	if err := checkOverlap(a.cfg, state); err != nil {
		return err
	}
	if err := a.awaitUnderlay(ctx, s, state); err != nil {
		return err
	}
	if err := a.configure(s); err != nil { // it may have been read again while the host had no address
		return err
	}
	s.first = s.prefer.Load().first()
	if err := s.chooseMTU(); err != nil {
		return err
	}
	if err := checkOverlap(a.cfg, state); err != nil {
		return err
	}
	// Looked for twice: before this agent makes a device, and when two that start at once must find each other.
	if err := hostnet.CheckAlone(a.cfg.Tun); err != nil {
		return err
	}
	if err := s.openData(a); err != nil {
		return err
	}
	if err := hostnet.CheckAlone(a.cfg.Tun); err != nil {
		return err
	}
	s.outlive = func() error { return a.outlive(s) }
	return s.openCluster(state, a.newID)
}

// outlive lets the TUN device, and the choice of the underlay address, stay when this process ends. It is called once all
// sockets are open, so that an agent that does not come this far (its gossip port is busy, say) leaves no device behind.
func (a *agent) outlive(s *session) error {
	if err := s.device.Persist(true); err != nil {
		return err
	}
	a.keep(s.tunName(), s.device.FDs())
	a.keep(s.socketsName(), s.engine.Sockets())
	if err := writeLastUnderlay(runFile(a.cfg, "underlay"), s.link); err != nil {
		a.log.Warn("the underlay address is not noted for the next start", "error", err)
	}
	return nil
}

// wiredAddrs are the addresses of the pods that are wired to this host, as prefixes of one address.
func wiredAddrs() (out []netip.Prefix, err error) {
	h, err := podnet.Open("")
	if err != nil {
		return nil, err
	}
	defer h.Close()
	pods, err := h.List()
	for _, p := range pods {
		for _, a := range p.Addresses {
			out = append(out, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return out, err
}

// checkOverlap refuses a cluster CIDR that the host uses for something else. The blocks that the configuration or an
// earlier run gives to this node are none of that: its pods' routes and bridges are there, perhaps since before the agent. A node that has blocks
// already is not refused: what overlaps has come while its pods ran, and status names it. Nor are the pods that Tulle has wired, whose addresses may be
// those of a node that this host was before it lost its state.
func checkOverlap(cfg config.Config, state *ipam.State) error {
	cidrs, own := cfg.ClusterCIDRs, slices.Clone(cfg.PodCIDRs)
	member := state != nil && len(state.Blocks) > 0
	if !member {
		pods, err := wiredAddrs()
		if err != nil {
			return err
		}
		own = append(own, pods...)
	}
	switch {
	case state != nil:
		own = append(own, state.Blocks...)
	case cfg.Bootstrap:
		cidrs = cfg.BootstrapCIDRs()
	}
	return hostnet.CheckOverlap(cfg.Tun, cidrs, own, member)
}

// preference is the configured order of the ways to send.
type preference struct {
	names []string     // all that the configuration names
	modes []encap.Mode // those that can be sent, best first; at least one
}

// first is the preferred encapsulation; direct if there is none. Where packets can go both ways, they have to fit into both.
func (p *preference) first() encap.Mode {
	for _, m := range p.modes {
		if !m.IsDirect() {
			return m
		}
	}
	return p.modes[0]
}

func newPreference(names []string) (*preference, error) {
	p := &preference{names: names, modes: usableModes(names)}
	if len(p.modes) == 0 {
		return nil, fmt.Errorf("--paths %v: this version sends %v; name at least one of them", names, sendable)
	}
	return p, nil
}

// usableModes keeps the encapsulations that can be sent, in order.
func usableModes(paths []string) []encap.Mode {
	var out []encap.Mode
	for _, p := range paths {
		if m, err := encap.ParseMode(p); err == nil && slices.Contains(sendable, m) {
			out = append(out, m)
		}
	}
	return out
}

// chooseMTU takes the configured MTU, or the underlay's less the overhead of the encapsulation that is preferred.
func (s *session) chooseMTU() error {
	if most := mtu.Link(s.link.MTU).TUN(s.overhead()); mtu.TUN(s.cfg.MTU) > most {
		return fmt.Errorf("--mtu %d: %s carries %d bytes, of which %s takes %d: at most %d, or raise the interface's MTU",
			s.cfg.MTU, s.link.Narrowest, s.link.MTU, s.first, s.overhead(), int(most))
	}
	s.resize(s.link)
	return nil
}

// openData opens the TUN and the sockets.
func (s *session) openData(a *agent) (err error) {
	if a.discard(s.tunName(), s.socketsName()) {
		s.awaitPorts()
	}
	if s.device, err = a.openTUN(device.Options{Name: s.cfg.Tun, MTU: int(s.tunMTU()), Queues: queues(s.cfg.Queues), Alias: hostnet.Alias}); err != nil {
		return err
	}
	s.probes = newProber(s.log)
	if err := s.openEngine(a); err != nil {
		return err
	}
	if err := s.checkVXLAN(); err != nil {
		return err
	}
	s.probes.train = s.engine.ProbeTrain
	if err := s.openDirect(); err != nil {
		return err
	}
	s.probes.send, s.probes.traffic, s.probes.changed, s.probes.name = s.probe, s.traffic, s.rebuild, s.nameOf
	if s.leftMTU, err = hostnet.RouteMTUs(s.cfg.Tun); err != nil {
		return err
	}
	if s.leftHosts, err = hostnet.LeftHosts(s.cfg.Tun); err != nil {
		return err
	}
	if s.leftMembers, err = hostnet.LeftMembers(); err != nil {
		return err
	}
	if s.host, err = hostnet.New(hostnet.Options{Tun: s.cfg.Tun, SysctlFile: runFile(s.cfg, "sysctls"), PodsTable: podnet.Table}); err != nil {
		return err
	}
	s.pods, err = podnet.Open("")
	return err
}

// openEngine opens the sockets, or takes those that the service manager kept.
func (s *session) openEngine(a *agent) error {
	kept := a.store.take(s.socketsName(), len(a.store[s.socketsName()]))
	if kept != nil {
		a.log.Info("adopted the sockets that the service manager kept", "sockets", len(kept))
	}
	return afterRelease(unix.EADDRINUSE, func() (err error) {
		s.engine, err = tunnel.New(tunnel.Config{
			Device: s.device, Underlay: s.link.Addrs, UDPPort: s.cfg.UDPPort, VXLANPort: s.cfg.VXLANPort, VNI: s.cfg.VNI, CopyDSCP: true,
			Kept:    kept,
			Probed:  s.probes.received,
			PathMTU: s.probes.tooBig,
			Logger:  s.log,
		})
		kept = nil // the engine's, even if it is none
		return err
	})
}

// awaitPorts waits until the ports of sockets that the service manager was told to release are free. What holds them for longer
// is another program, which the engine finds by itself.
func (s *session) awaitPorts() {
	for _, a := range s.link.Addrs {
		for _, port := range []uint16{s.cfg.UDPPort, s.cfg.VXLANPort} {
			_ = afterRelease(unix.EADDRINUSE, func() error {
				l, err := tunsocket.ListenUDP(tunsocket.Options{Bind: netip.AddrPortFrom(a, port)})
				if err != nil {
					return err
				}
				return l.Close()
			})
		}
	}
}

func (s *session) tunName() string { return tunName(s.cfg.Tun, queues(s.cfg.Queues)) }

func (s *session) socketsName() string {
	return socketsName(s.link.Addrs, s.cfg.UDPPort, s.cfg.VXLANPort, queues(s.cfg.Queues))
}

// queues is the number of the TUN's queues. Few CPUs, which the pods' own work shares, leave none to run a
// second queue's loops beside the first's.
func queues(configured int) int {
	if configured > 0 {
		return configured
	}
	return min(max(1, runtime.NumCPU()/4), 8)
}

// runFile is a small file beside the socket, on a file system that a reboot empties, of this TUN's agent.
func runFile(cfg config.Config, name string) string {
	return filepath.Join(filepath.Dir(cfg.Socket), name+"."+cfg.Tun)
}

// openCluster makes the address-space machine out of the state on disk, and gossip. A node without state has the ID that is given.
func (s *session) openCluster(state *ipam.State, id membership.NodeID) (err error) {
	if state != nil {
		id = membership.NodeID(state.Node)
	}
	if s.cfg.GossipKeyFile != "" {
		if s.keys, err = keyring.Load(s.cfg.GossipKeyFile); err != nil {
			return err
		}
	}
	s.cluster = &cluster{log: s.log, store: s.store, probes: s.probes, outbox: make(chan outgoing, outboxSize), moved: s.membersMoved, bench: s.bench}
	cidrs := s.cfg.ClusterCIDRs
	if s.cfg.Bootstrap {
		cidrs = s.cfg.BootstrapCIDRs()
	}
	s.ownership, err = ownership.New(time.Now(), ownership.Config{
		ID: id, Name: s.cfg.NodeName, Addr: s.link.Addrs[0], Bootstrap: s.cfg.Bootstrap, ForceBootstrap: s.cfg.ForceBootstrap, Bootstrapper: s.cfg.Bootstrapper, CIDRs: cidrs,
		BlockLen4: s.cfg.AskedPrefixLen4, BlockLen6: s.cfg.AskedPrefixLen6, PodCIDRs: s.cfg.PodCIDRs, Fresh: s.store.Fresh(uptime()), Logger: s.log,
	}, state, s.cluster)
	if err != nil {
		return err
	}
	s.cluster.ownership = s.ownership
	if s.memory, err = recall(s.cfg.StateDir, s.ownership.Cluster(), s.started); err != nil {
		s.log.Warn("what an earlier run noted of members is not usable", "error", err)
	}
	s.releaseBench("") // of a run that was killed
	if err := s.takeStock(state == nil); err != nil {
		return err
	}
	var known []netip.AddrPort
	for _, p := range s.ownership.Peers() {
		if p.Addr.IsValid() {
			known = append(known, p.Addr)
		}
	}
	for _, a := range s.moved.members { // the state has one address of each member, maybe of the family that this host has lost
		if ours := s.link.Addrs; len(ours) == 1 && a.Is4() == ours[0].Is4() {
			known = append(known, netip.AddrPortFrom(a, s.cfg.GossipPort))
		}
	}
	s.gossip, err = gossip.New(gossip.Config{
		ID: id, Name: s.cfg.NodeName, Bind: s.link.Addrs[0], Also: s.link.Addrs[1:], Port: int(s.cfg.GossipPort), MTU: s.link.MTU,
		Seeds: s.seeds, Own: s.owns, LastPeers: known, Meta: s.meta(), Keyring: s.keys, Handler: handler{s.cluster}, Logger: s.log,
	})
	s.cluster.gossip = s.gossip
	return err
}

// foundKey begins the keys of what was found on the host and may be something else than a pod.
const foundKey = "found "

// takeStock compares allocations with the host before anything is served: pods that the state does not know (it was lost,
// or is older than they are) keep their addresses out of use, and what is left of pods that are gone is released.
func (s *session) takeStock(fresh bool) error {
	pods, err := s.podsHere()
	if err != nil {
		return err
	}
	type half struct {
		key string
		six bool
	}
	allocated := map[netip.Addr]bool{}
	has := map[half]bool{}
	for _, l := range s.ownership.Allocations() {
		allocated[l.Addr], has[half{l.Key, l.Addr.Is6()}] = true, true
	}
	unknown := slices.DeleteFunc(pods, func(l ipam.Allocation) bool { return allocated[l.Addr] })
	for i, l := range unknown {
		if l.Key == "" || has[half{l.Key, l.Addr.Is6()}] { // no link of ours, or its pod has another address in the state
			unknown[i].Key = foundKey + l.Addr.String()
		}
	}
	if len(unknown) > 0 {
		s.stateLost = fresh
		refused, err := s.ownership.Adopt(time.Now(), unknown)
		s.log.Warn("found pods that the state does not know; their addresses stay out of use", "found", len(unknown), "refused", len(refused))
		if err != nil {
			s.log.Warn("pods that were found are not in the state yet", "error", err)
		}
	}
	s.releaseGone()
	return nil
}

// podsHere lists the addresses of pods on the host: those of our links, by the IDs of their pods, and others that have a route. Somebody
// may have taken its route from a link.
func (s *session) podsHere() ([]ipam.Allocation, error) {
	cidrs := slices.Concat(s.cfg.ClusterCIDRs, s.cfg.PodCIDRs)
	for _, f := range s.ownership.Params().Families {
		cidrs = append(cidrs, f.CIDR)
	}
	routes, err := hostnet.PodRoutes(s.cfg.Tun, cidrs)
	if err != nil {
		return nil, err
	}
	links, err := s.pods.List()
	if err != nil {
		return nil, err
	}
	var out []ipam.Allocation
	seen := map[netip.Addr]bool{}
	add := func(a netip.Addr, id, device string) {
		if !seen[a] && slices.ContainsFunc(cidrs, func(c netip.Prefix) bool { return c.Contains(a) }) {
			seen[a] = true
			out = append(out, ipam.Allocation{Addr: a, Key: id, Pod: device})
		}
	}
	for _, l := range links {
		for _, a := range l.Addresses {
			add(a, l.ID, l.HostInterface)
		}
	}
	for _, r := range routes {
		add(r.Addr, "", r.Device)
	}
	return out, nil
}
