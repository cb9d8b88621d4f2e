package agent

import (
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/hostnet"
	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/tunnel"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/fastpath"
)

// fastPath lets the kernel carry ipip and udp packets, if the operator wants it.
type fastPath struct {
	wanted atomic.Bool    // a reload may change it
	state  fastpath.State // the last that path was given; loop's own
	swept  bool           // where it is not wanted: what an earlier run left is gone; loop's own

	heard map[string]hearing // of peers that gossip has lost; loop's own

	mu     sync.Mutex                 // guards the fields below, which loop writes
	path   *fastpath.Path             // nil: the programs are not loaded
	err    error                      // of the last attempt
	off    string                     // why nothing is carried though it is wanted; "" if something is
	pauses int                        // of captures, not yet ended
	total  fastpath.Counts            // what was carried before path was opened, also by earlier sessions
	peers  map[string]fastpath.Counts // likewise, by this session; of peers that were there at the end
}

// hearing is when packets of a peer last came by the fast path.
type hearing struct {
	packets uint64 // counted then
	at      time.Time
}

// hears reports whether packets of a peer came by the fast path within holdDown: its kernel is there and carries, whatever has become of its agent. It
// has to be asked every second.
func (f *fastPath) hears(now time.Time, id string) bool {
	n := f.counts(id).RxPackets
	h, known := f.heard[id]
	if n != h.packets || !known {
		if f.heard == nil {
			f.heard = map[string]hearing{}
		}
		h.packets = n
		if known {
			h.at = now
		}
		f.heard[id] = h
	}
	return now.Sub(h.at) < holdDown
}

// updateFast makes the kernel carry what the view allows. Without force it does nothing if that is the same as before. An error is
// a problem for status and nothing else: the agent carries what the kernel does not.
func (s *session) updateFast(v *view, force bool) {
	f := &s.fast
	f.mu.Lock()
	defer f.mu.Unlock()
	was, on := f.trouble(), f.on()
	if f.wanted.Load() {
		f.err = s.carry(v, force)
	} else {
		f.err = f.stop(force)
	}
	switch is := f.trouble(); {
	case is == was:
	case is != "":
		s.log.Warn("fast path", "wanted", f.wanted.Load(), "reason", is)
	default:
		s.log.Info("fast path: well again", "old", was)
	}
	if f.on() != on {
		s.rebuild() // for the other members: see fastCapability
	}
}

// on reports whether the kernel carries packets; the caller holds mu.
func (f *fastPath) on() bool { return f.path != nil && f.trouble() == "" }

// fastCapability is what this node announces: whether its kernel takes udp packets in place of the agent.
func (s *session) fastCapability() uint32 {
	f := &s.fast
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.on() && s.fastPort() != 0 {
		return membership.CapFastPath
	}
	return 0
}

// fastPort is the port of udp where the fast path receives; 0 without an IPv4 underlay.
func (s *session) fastPort() uint16 {
	if slices.ContainsFunc(s.link.Addrs, netip.Addr.Is4) {
		return s.cfg.UDPPort
	}
	return 0
}

// carry fills the kernel's tables; it loads the programs first, if they are not.
func (s *session) carry(v *view, force bool) error {
	f := &s.fast
	if f.path == nil {
		if f.err != nil && !force {
			return f.err
		}
		var err error
		if f.path, err = fastpath.Open(); err != nil {
			f.path = nil
			return errors.Join(err, fastpath.Remove())
		}
	}
	if f.pauses > 0 { // it would end
		if err := f.path.Pause(true); err != nil {
			return err
		}
	}
	state := s.fastState(v)
	if !force && reflect.DeepEqual(state, f.state) && f.path.Whole() {
		return f.err
	}
	f.state, f.off = state, state.Off
	err := f.path.Update(state)
	if err != nil {
		f.state = fastpath.State{} // to be tried again, whatever comes next
	}
	return err
}

// stop leaves everything to the agent, and removes what an earlier run has left.
func (f *fastPath) stop(force bool) (err error) {
	f.off = ""
	switch {
	case f.path != nil:
		err = f.path.Update(fastpath.State{Off: "not wanted"})
		f.close()
	case !f.swept || force:
		err = fastpath.Remove()
	}
	f.swept = err == nil
	return err
}

// trouble is why nothing is carried though it is wanted; "" if something is, or nobody wants it.
func (f *fastPath) trouble() string {
	if f.err != nil {
		return f.err.Error()
	}
	return f.off
}

// end forgets the programs when the session ends; those that are attached stay.
func (f *fastPath) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.close()
}

// close is end for whoever holds mu.
func (f *fastPath) close() {
	if f.path == nil {
		return
	}
	f.total = f.total.Plus(f.path.Total())
	peers := map[string]fastpath.Counts{}
	for _, id := range f.path.Peers() {
		peers[id] = f.count(id)
	}
	f.path.Close()
	f.path, f.state, f.peers = nil, fastpath.State{}, peers
}

// fastState converts the view: what packets to and from each peer the kernel may carry.
func (s *session) fastState(v *view) fastpath.State {
	out := fastpath.State{TUN: s.device.Name(), Port: s.fastPort(), Underlay: s.link.Addrs, Own: v.own, Except: slices.Concat(v.tun, s.probeAddrs())}
	// Not those toward external peers: such a peer may be a pod.
	links := slices.Clone(s.sizes.Load().links)
	for i := range v.peers {
		if p := &v.peers[i]; !p.node.IsZero() && !p.replaced {
			links = append(links, p.leaves...)
		}
	}
	slices.Sort(links)
	out.Links = slices.Compact(links)
	if ipsec, err := hostnet.IPsec(); err != nil || ipsec {
		out.Off = "this host has IPsec policies, which the fast path would pass by"
		if err != nil {
			out.Off = err.Error()
		}
	}
	for _, d := range v.bench {
		out.Except = append(out.Except, d.own)
	}
	for i := range v.peers {
		out.Peers = append(out.Peers, s.fastPeer(v, &v.peers[i]))
	}
	return out
}

// fastPeer converts a peer. One that is replaced keeps its space, as it does for the engine: it is nobody else's.
func (s *session) fastPeer(v *view, p *peerView) fastpath.Peer {
	out := fastpath.Peer{ID: p.id, Prefixes: p.prefixes}
	for _, d := range v.detours(p) {
		out.Except = append(out.Except, d.Addr)
	}
	if p.replaced {
		return out
	}
	out.Accept = p.underlay
	udp := p.mode == encap.UDP && p.fast && p.endpoint.Is4()
	if (udp || p.mode == encap.IPIP) && !p.gone && p.endpoint.IsValid() && len(p.leaves) == 1 {
		from := slices.IndexFunc(s.link.Addrs, func(a netip.Addr) bool { return a.Is4() == p.endpoint.Is4() })
		out.Way = &fastpath.Way{From: s.link.Addrs[from], To: p.endpoint, Link: p.leaves[0], MTU: int(p.mtu)}
		if udp {
			out.Way.Port = p.udpPort
		}
	}
	return out
}

// traffic is what the agent and the kernel have carried to and from a peer through the tunnel.
func (s *session) traffic(id string) tunnel.PeerStats {
	c, k := s.engine.PeerStats(id), s.fast.counts(id)
	c.TxPackets += k.TxPackets
	c.TxBytes += k.TxBytes
	c.RxPackets += k.RxPackets
	c.RxBytes += k.RxBytes
	return c
}

func (f *fastPath) counts(id string) fastpath.Counts {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.count(id)
}

// count is counts for whoever holds mu.
func (f *fastPath) count(id string) fastpath.Counts {
	if f.path == nil {
		return f.peers[id]
	}
	return f.peers[id].Plus(f.path.Counts(id))
}

// pause leaves all packets to the agent until resume is called.
func (f *fastPath) pause() (resume func(), err error) {
	count := func(n int) error {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.pauses += n
		if f.path == nil {
			return nil
		}
		return f.path.Pause(f.pauses > 0)
	}
	return func() { _ = count(-1) }, count(1) // what does not go on again is the agent's
}

// fillFast adds what the kernel carries to a status, whose counters are the engine's so far.
func (s *session) fillFast(st *api.Status) {
	f := &s.fast
	f.mu.Lock()
	defer f.mu.Unlock()
	c, k := f.total, &st.Counters
	if f.path != nil {
		c = c.Plus(f.path.Total())
	}
	k.FastTxPackets, k.FastTxBytes, k.FastRxPackets, k.FastRxBytes = c.TxPackets, c.TxBytes, c.RxPackets, c.RxBytes
	st.Drops[encap.DropSendError.String()] += c.Lost
	if f.wanted.Load() {
		st.FastPath = api.FastPath{Wanted: true, On: f.on(), Reason: f.trouble()}
	}
}

// fastProblem is why the kernel does not carry what it is wanted to.
func (s *session) fastProblem() []api.Problem {
	f := &s.fast
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.trouble() == "" {
		return nil
	}
	if !f.wanted.Load() {
		return []api.Problem{{What: "programs of the fast path stay though fast_path is not set: " + f.trouble(), Remedy: "stop the agent and run tulle cleanup"}}
	}
	remedy := "set fast_path to false"
	if f.err != nil {
		remedy = "give the agent what it names (docs/operations.md, \"The fast path\"; a package has docs/ in /usr/share/doc/tulle), or set fast_path to false"
	}
	return []api.Problem{{What: "fast_path is set, but the agent carries everything: " + f.trouble(), Remedy: remedy}}
}
