package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/config"
	"github.com/tulle-net/tulle/internal/ownership"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/membership/gossip"
	"github.com/tulle-net/tulle/membership/keyring"
	"github.com/tulle-net/tulle/tunnel/encap"
)

var _ api.Backend = (*agent)(nil)

// current returns the running session, or an error with the reason why there is none.
func (a *agent) current() (*session, error) {
	if s := a.session.Load(); s != nil {
		return s, nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.pending.What == "" {
		return nil, api.Errorf(api.CodeUnhealthy, "the agent is starting").WithRemedy("try again in a moment")
	}
	return nil, api.Errorf(api.CodeUnhealthy, "the agent waits: %s", a.pending.What).WithRemedy("%s", a.pending.Remedy)
}

// coded maps errors of the parts to codes of the control socket.
func coded(err error) error {
	if err == nil {
		return nil
	}
	code := api.CodeFailed
	switch {
	case errors.Is(err, ownership.ErrRefused), errors.Is(err, ownership.ErrAlive), errors.Is(err, ownership.ErrNoMajority),
		errors.Is(err, ownership.ErrPodsAlive), errors.Is(err, ipam.ErrUnavailable), errors.Is(err, ownership.ErrBusy):
		code = api.CodeRefused
	case errors.Is(err, ownership.ErrNotReady), errors.Is(err, ownership.ErrUnconfirmed), errors.Is(err, ownership.ErrGrowing), errors.Is(err, ownership.ErrExhausted),
		errors.Is(err, ownership.ErrTimeout), errors.Is(err, gossip.ErrNotRunning):
		code = api.CodeUnhealthy
	}
	return api.Errorf(code, "%v", err)
}

// Peers implements api.Backend.
func (a *agent) Peers(ctx context.Context) ([]api.Peer, error) {
	st, err := a.Status(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := a.current(); err != nil {
		return nil, err
	}
	return st.Peers, nil
}

// Route implements api.Backend.
func (a *agent) Route(_ context.Context, addr netip.Addr) (api.RouteAnswer, error) {
	s, err := a.current()
	if err != nil {
		return api.RouteAnswer{}, err
	}
	return s.route(addr.Unmap()), nil
}

// Ping implements api.Backend.
func (a *agent) Ping(ctx context.Context, req api.PingRequest) (api.PingResult, error) {
	s, err := a.current()
	if err != nil {
		return api.PingResult{}, err
	}
	p, err := s.findPeer(req.Node)
	if err != nil {
		return api.PingResult{}, err
	}
	return s.ping(ctx, p, req.Count)
}

// findPeer finds a peer by name, ID, a unique beginning of the ID, or an address that it owns or has.
func (s *session) findPeer(text string) (*peerView, error) {
	v, err := s.viewed()
	if err != nil {
		return nil, err
	}
	return v.find(text)
}

// viewed returns the last view.
func (s *session) viewed() (*view, error) {
	if v := s.view.Load(); v != nil {
		return v, nil
	}
	return nil, api.Errorf(api.CodeUnhealthy, "the agent is starting").WithRemedy("try again in a moment")
}

// withFormer returns the view with the peers that are not in it: they own nothing, and gossip does not know them any more. They
// count as members nevertheless, until they are forgotten.
func (v *view) withFormer(peers []ipam.Peer) *view {
	out := *v
	out.peers = slices.Clone(v.peers)
	for _, k := range peers {
		id := membership.NodeID(k.ID)
		if !slices.ContainsFunc(v.peers, func(p peerView) bool { return p.node == id }) {
			out.peers = append(out.peers, peerView{id: id.String(), node: id, name: cmp.Or(k.Name, id.Short()), state: api.PeerDead})
		}
	}
	return &out
}

func (v *view) find(text string) (*peerView, error) {
	addr, _ := netip.ParseAddr(text)
	var found, named []*peerView
	for i := range v.peers {
		p := &v.peers[i]
		if p.id == text {
			return p, nil
		}
		if p.name == text {
			named = append(named, p)
		}
		owns := false
		if addr.IsValid() {
			for _, prefix := range p.prefixes {
				owns = owns || prefix.Contains(addr)
			}
			for _, u := range p.underlay {
				owns = owns || u == addr
			}
		}
		if owns || len(text) >= 4 && strings.HasPrefix(p.id, strings.ToLower(text)) {
			found = append(found, p)
		}
	}
	self := text == v.self || len(text) >= 4 && strings.HasPrefix(v.status.Node.String(), strings.ToLower(text))
	switch {
	case len(named) == 0 && self:
		return nil, api.Errorf(api.CodeUsage, "%s is this node itself", text)
	case len(named) > 0:
		found = named
	}
	var names []string
	if len(found) == 0 {
		for i := range v.peers {
			names = append(names, v.label(&v.peers[i]))
		}
	}
	switch {
	case len(found) == 1 && !(self && len(named) == 1):
		return found[0], nil
	case len(found) > 0:
		for _, p := range found {
			names = append(names, fmt.Sprintf("%s (%s)", p.node.Short(), p.state))
		}
		also := ""
		if self {
			also = "this node itself, "
		}
		return nil, api.Errorf(api.CodeNotFound, "%q fits %s%s", text, also, strings.Join(names, ", ")).WithRemedy("give the ID instead")
	case len(names) == 0:
		return nil, api.Errorf(api.CodeNotFound, "no node %q: this node knows no other", text).WithRemedy("see tulle status")
	}
	return nil, api.Errorf(api.CodeNotFound, "no node %q; known are: %s", text, strings.Join(names, ", "))
}

// Allocate implements api.Backend.
func (a *agent) Allocate(ctx context.Context, req api.AllocateRequest) (api.Allocation, error) {
	s, err := a.current()
	if err != nil {
		return api.Allocation{}, err
	}
	if p := s.noPods(s.ownership.Params().Families); p.What != "" {
		return api.Allocation{}, api.Errorf(api.CodeUnhealthy, "%s", p.What).WithRemedy("%s", p.Remedy)
	}
	if api.IsFreed(s.cfg.Socket, req.ID) { // it went while this agent did not answer, and comes back
		if err := s.honour(req.ID); err != nil {
			return api.Allocation{}, err
		}
	}
	r := ownership.PodRequest{Key: req.ID, Pod: req.Name, Netns: req.Netns, Want: req.Requested, From: req.From, Only4: s.only4}
	list, err := s.ownership.Allocate(time.Now(), r)
	// More space was asked for: the answer takes a round trip or two.
	for deadline := time.Now().Add(growthPatience); errors.Is(err, ownership.ErrGrowing) && time.Now().Before(deadline); {
		select {
		case <-ctx.Done():
			return api.Allocation{}, ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
		list, err = s.ownership.Allocate(time.Now(), r)
	}
	if err != nil {
		return api.Allocation{}, coded(err)
	}
	out := api.Allocation{ID: req.ID, MTU: int(s.tunMTU())}
	out.GSOMaxSize, out.GSOMaxSegs = s.gsoLimits()
	for _, f := range s.ownership.Params().Families {
		if !s.only4 || !is6(f) {
			out.CIDRs = append(out.CIDRs, f.CIDR)
		}
	}
	tun, blocks := s.ownership.TunAddrs(), s.ownership.Blocks()
	for _, l := range list {
		aa := api.AllocatedAddress{Address: l.Addr}
		for _, b := range blocks {
			if b.Prefix.Contains(l.Addr) {
				aa.Block = b.Prefix
			}
		}
		for _, t := range tun {
			if t.Is4() == l.Addr.Is4() {
				aa.Gateway = t
			}
		}
		out.Addresses = append(out.Addresses, aa)
	}
	return out, nil
}

// growthPatience is how long an allocation waits for space that was asked of another node.
const growthPatience = 5 * time.Second

// Free implements api.Backend.
func (a *agent) Free(_ context.Context, req api.FreeRequest) (api.FreeResult, error) {
	s, err := a.current()
	if err != nil {
		return api.FreeResult{}, err
	}
	release := s.ownership.Release
	if req.Rested {
		release = s.ownership.ReleaseRested
	}
	list, err := release(time.Now(), req.ID)
	if err != nil {
		return api.FreeResult{}, coded(err)
	}
	var out api.FreeResult
	for _, l := range list {
		out.Freed = append(out.Freed, l.Addr)
	}
	return out, nil
}

// Leave implements api.Backend.
func (a *agent) Leave(ctx context.Context) (api.LeaveResult, error) {
	s, err := a.current()
	if err != nil {
		return api.LeaveResult{}, err
	}
	before, self := s.ownership.Prefixes(), s.ref(s.ownership.Node())
	op, err := s.ownership.Leave(time.Now())
	if err != nil {
		return api.LeaveResult{}, coded(err)
	}
	if err := await(ctx, op); err != nil {
		return api.LeaveResult{}, err
	}
	out := api.LeaveResult{}
	for _, p := range before {
		out.Transfers = append(out.Transfers, s.transfer(p, self))
	}
	s.log.Warn("this node has left the cluster", "result", op.Result())
	if err := s.gossip.Leave(ctx); err != nil {
		s.log.Warn("the members may suspect this node for a while", "error", err)
	}
	return out, nil
}

// transfer returns the new owner of a prefix. from was named while it was still known.
func (s *session) transfer(p netip.Prefix, from api.NodeRef) api.Transfer {
	t := api.Transfer{Prefix: p, From: from}
	if e, ok := s.ownership.Owner(p.Addr()); ok {
		t.To = s.ref(e.Owner)
	}
	return t
}

// await waits for an operation of the machine.
func await(ctx context.Context, op *ownership.Op) error {
	select {
	case <-op.Done():
		return coded(op.Err())
	case <-ctx.Done():
		return api.Errorf(api.CodeUnhealthy, "it continues in the background: %v", ctx.Err()).WithRemedy("see tulle status")
	}
}

// Forget implements api.Backend.
func (a *agent) Forget(ctx context.Context, req api.ForgetRequest) (api.ForgetResult, error) {
	s, err := a.current()
	if err != nil {
		return api.ForgetResult{}, err
	}
	v, err := s.viewed()
	if err != nil {
		return api.ForgetResult{}, err
	}
	p, err := v.withFormer(s.ownership.Peers()).find(req.Node)
	if err != nil {
		return api.ForgetResult{}, err
	}
	if p.node.IsZero() {
		return api.ForgetResult{}, api.Errorf(api.CodeUsage, "%s is an external peer", p.name).WithRemedy("tulle external remove PREFIX")
	}
	op, err := s.ownership.Forget(time.Now(), p.node, req.Force)
	if err != nil {
		return api.ForgetResult{}, coded(err)
	}
	if err := await(ctx, op); err != nil {
		return api.ForgetResult{}, err
	}
	s.gossip.Forget(p.node)
	s.rebuild()
	out := api.ForgetResult{Node: api.NodeRef{Name: p.name, ID: p.id}}
	for _, prefix := range p.prefixes {
		out.Transfers = append(out.Transfers, s.transfer(prefix, out.Node))
	}
	return out, nil
}

// Externals implements api.Backend.
func (a *agent) Externals(context.Context) ([]api.External, error) {
	s, err := a.current()
	if err != nil {
		return nil, err
	}
	var out []api.External
	for _, e := range s.ownership.Externals() {
		out = append(out, s.external(e))
	}
	return out, nil
}

// ExternalAdd implements api.Backend.
func (a *agent) ExternalAdd(_ context.Context, req api.ExternalRequest) (api.External, error) {
	s, err := a.current()
	if err != nil {
		return api.External{}, err
	}
	m, err := encap.ParseMode(req.Encapsulation)
	if err != nil {
		return api.External{}, api.Errorf(api.CodeUsage, "%v", err)
	}
	if len(usableModes([]string{m.String()})) == 0 {
		return api.External{}, api.Errorf(api.CodeUsage, "this version cannot send %s to an external peer", m).WithRemedy("use one of %v", sendable)
	}
	x, err := externalOf(req, m)
	if err != nil {
		return api.External{}, api.Errorf(api.CodeUsage, "%v", err)
	}
	if bad := unfitEndpoint(req.Endpoint, s.ownership.Params().Families); bad != "" {
		return api.External{}, api.Errorf(api.CodeRefused, "the endpoint %s", bad).
			WithRemedy("give the underlay address of the external peer, outside of that space")
	}
	if v := s.view.Load(); v != nil {
		if name := v.livesAt(req.Endpoint, s.link.Addrs); name != "" {
			return api.External{}, api.Errorf(api.CodeRefused, "%v is the address of %s", req.Endpoint, name).
				WithRemedy("an external peer is a host without an agent; a member gets its space by itself, or by --pod-cidr")
		}
	}
	for _, e := range s.ownership.Externals() {
		if e.External.Endpoint == req.Endpoint && *e.External != x {
			return api.External{}, api.Errorf(api.CodeRefused, "%v is an external peer by %s already (%v)", req.Endpoint, e.External.Way(), e.Prefix).
				WithRemedy("an external peer has one encapsulation, port and MAC: use the same, or remove that first")
		}
	}
	if err := s.ownership.AddExternal(time.Now(), req.Prefix, x); err != nil {
		return api.External{}, coded(err)
	}
	e, err := s.externalAt(req.Prefix)
	if err != nil {
		return api.External{}, err
	}
	return s.external(e), nil
}

// ExternalRemove implements api.Backend.
func (a *agent) ExternalRemove(_ context.Context, prefix netip.Prefix) (api.External, error) {
	s, err := a.current()
	if err != nil {
		return api.External{}, err
	}
	e, err := s.externalAt(prefix)
	if err != nil {
		return api.External{}, err
	}
	if err := s.ownership.RemoveExternal(time.Now(), prefix); err != nil {
		return api.External{}, coded(err)
	}
	return s.external(e), nil
}

// externalAt is the entry of the one external peer that has all of a prefix, cut to that prefix: entries of the table are joined
// where they can be.
func (s *session) externalAt(prefix netip.Prefix) (membership.Entry, error) {
	return externalIn(s.ownership.Externals(), prefix)
}

func externalIn(all []membership.Entry, prefix netip.Prefix) (e membership.Entry, err error) {
	var parts []netip.Prefix
	var texts []string
	several := false
	for _, x := range all {
		if !x.Prefix.Overlaps(prefix) {
			continue
		}
		if ipam.Covers(x.Prefix, prefix) {
			x.Prefix = prefix
		}
		several = several || len(parts) > 0 && *x.External != *e.External
		if len(parts) == 0 || x.Version > e.Version {
			e = x
		}
		parts = append(parts, x.Prefix)
		texts = append(texts, fmt.Sprintf("%v (%v)", x.Prefix, x.External.Endpoint))
	}
	switch {
	case len(parts) == 0:
		return e, api.Errorf(api.CodeNotFound, "no external peer has %v", prefix).WithRemedy("see tulle external list")
	case several:
		return e, api.Errorf(api.CodeRefused, "%v belongs to several external peers: %s", prefix, strings.Join(texts, ", ")).WithRemedy("name one of these prefixes")
	case len(ipam.Subtract(prefix, parts, prefix.Addr().BitLen())) > 0:
		return e, api.Errorf(api.CodeNotFound, "only a part of %v belongs to an external peer: %s", prefix, strings.Join(texts, ", ")).WithRemedy("name that prefix")
	}
	e.Prefix = prefix
	return e, nil
}

// Reload implements api.Backend.
func (a *agent) Reload(context.Context) (api.ReloadResult, error) {
	old := a.config()
	next, err := old.Reread()
	if err != nil {
		return api.ReloadResult{}, api.Errorf(api.CodeUsage, "nothing was changed: %v", err)
	}
	prefer, err := newPreference(next.Paths)
	if err != nil {
		return api.ReloadResult{}, api.Errorf(api.CodeUsage, "nothing was changed: %v", err)
	}
	var out api.ReloadResult
	for _, c := range config.Diff(old, next) {
		change := api.ConfigChange{Key: c.Key, Old: c.Old, New: c.New}
		if !reloadable(c) {
			out.NeedsRestart = append(out.NeedsRestart, change)
			continue
		}
		out.Changed = append(out.Changed, change)
	}
	if level := old.LevelVar().Level(); level != old.LogLevel && next.LogLevel == old.LogLevel { // `tulle log-level` has set another one
		out.Changed = append(out.Changed, api.ConfigChange{Key: "log_level", Old: strings.ToLower(level.String()), New: strings.ToLower(next.LogLevel.String())})
	}
	keys, err := a.newKeys(next)
	if err != nil {
		return api.ReloadResult{}, api.Errorf(api.CodeUsage, "nothing was changed: %v", err)
	}
	out.NeedsRestart = append(out.NeedsRestart, keys...)
	a.apply(next, prefer)
	a.log.Info("configuration read again", "changed", len(out.Changed), "need_restart", len(out.NeedsRestart))
	return out, nil
}

// newKeys is the change of gossip keys for which the next start would find the key file changed: somebody has written it by hand, or copied another node's.
// An error is one that would keep the agent from starting.
func (a *agent) newKeys(next config.Config) ([]api.ConfigChange, error) {
	if next.GossipKeyFile == "" {
		return nil, nil
	}
	there, err := keyring.Load(next.GossipKeyFile)
	if err != nil {
		return nil, err
	}
	s := a.session.Load()
	if s == nil || s.keys == nil || next.GossipKeyFile != s.cfg.GossipKeyFile || slices.Equal(there.Keys(), s.keys.Keys()) {
		return nil, nil
	}
	return []api.ConfigChange{{Key: "gossip_key_file", Old: keyIDs(s.keys), New: keyIDs(there)}}, nil
}

func keyIDs(r *keyring.Ring) string {
	var ids []string
	for _, k := range r.Keys() {
		ids = append(ids, k.Fingerprint.String())
	}
	return strings.Join(ids, ",")
}

// reloadable: log level, masquerading, the order of paths, the fast path and what a benchmark may send change in a running agent; the rest is bound when it starts.
func reloadable(c config.Change) bool {
	return c.Live && (c.Key == "log_level" || c.Key == "masquerade" || c.Key == "no_masquerade" || c.Key == "paths" || c.Key == "fast_path" || c.Key == "bench_mbps")
}

// apply applies the keys that may change while the agent runs.
func (a *agent) apply(next config.Config, prefer *preference) {
	next.LevelVar().Set(next.LogLevel)
	a.mu.Lock()
	a.cfg.LogLevel, a.cfg.Paths = next.LogLevel, next.Paths
	a.cfg.BenchMbps, a.cfg.FastPath = next.BenchMbps, next.FastPath
	a.cfg.Masquerade, a.cfg.NoMasquerade = next.Masquerade, next.NoMasquerade
	a.mu.Unlock()
	if s := a.session.Load(); s != nil {
		s.follow(next, prefer)
		s.rebuild()
	}
}

// follow takes over the keys of the configuration that may change while a session runs.
func (s *session) follow(c config.Config, prefer *preference) {
	s.masquerade.Store(&masquerading{c.Masquerade, c.NoMasquerade})
	s.prefer.Store(prefer)
	s.fast.wanted.Store(c.FastPath)
	s.bench.mbps.Store(int64(c.BenchMbps))
}

// configure gives a session those of the present configuration.
func (a *agent) configure(s *session) error {
	c := a.config()
	prefer, err := newPreference(c.Paths)
	if err == nil {
		s.follow(c, prefer)
	}
	return err
}

// config is the present configuration.
func (a *agent) config() config.Config {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.cfg
}

// ref names a node.
func (s *session) ref(id membership.NodeID) api.NodeRef {
	if id == s.ownership.Node() {
		return api.NodeRef{Name: s.cfg.NodeName, ID: id.String()}
	}
	if v := s.view.Load(); v != nil {
		for i := range v.peers {
			if v.peers[i].node == id {
				return api.NodeRef{Name: v.peers[i].name, ID: id.String()}
			}
		}
	}
	return api.NodeRef{Name: id.Short(), ID: id.String()}
}

// summary is the line that systemctl status shows.
func (s *session) summary() string {
	v := s.view.Load()
	all, alive := v.members()
	return fmt.Sprintf("%d of %d members alive, own space %v", alive, all, v.own)
}
