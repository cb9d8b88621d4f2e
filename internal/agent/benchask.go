package agent

import (
	"cmp"
	"context"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/tunnel/encap"
)

// Bench implements api.Backend.
func (a *agent) Bench(ctx context.Context, req api.BenchRequest, each func(api.BenchEvent) error) error {
	s, err := a.current()
	if err != nil {
		return err
	}
	return s.bench.ask(ctx, req, each)
}

// ask asks another member for a benchmark, and keeps it up until ctx ends or each fails.
func (b *benches) ask(ctx context.Context, req api.BenchRequest, each func(api.BenchEvent) error) error {
	p, err := b.askable(req)
	if err != nil {
		return err
	}
	req.Six = b.s.view.Load().benchSix(req.Six)
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	side := &benchSide{id: newBenchID(), peer: p.id, node: p.node, answers: make(chan *benchLetter, 4), stop: stop}
	b.mu.Lock()
	busy := b.asked != nil
	if !busy {
		b.asked = side
	}
	b.mu.Unlock()
	if busy {
		return api.Errorf(api.CodeRefused, "another benchmark of this node is running").WithRemedy("wait until it has ended")
	}
	defer b.endAsked(context.WithoutCancel(ctx), side)
	modes := req.Modes
	if len(modes) == 0 {
		modes = api.BenchModes
	}
	ways, err := b.propose(ctx, p, side.id, modes, req.Six)
	if err != nil {
		return err
	}
	answer, err := b.negotiate(ctx, p, side, ways, req.Six)
	if err != nil {
		return err
	}
	agreed, err := b.agree(p, ways, answer)
	if err != nil {
		return err
	}
	if err := b.changed(ctx, func() { side.ways = agreed }); err != nil {
		return err
	}
	e := api.BenchEvent{
		Node: api.NodeRef{Name: p.name, ID: p.id}, Version: p.version, Token: answer.Token, Mbps: int(min(b.mbps.Load(), int64(answer.Mbps))),
		Until: time.Now().Add(answer.Left), Ways: b.describe(p, agreed),
	}
	b.s.log.Info("benchmark begins", "peer", p.name, "mbps", e.Mbps)
	if err := each(e); err != nil {
		return err
	}
	return b.keepUp(ctx, side, each)
}

// askable finds the peer, or says why it cannot be measured.
func (b *benches) askable(req api.BenchRequest) (*peerView, error) {
	p, err := b.s.findPeer(req.Node)
	if err != nil {
		return nil, err
	}
	v := b.s.view.Load()
	switch {
	case b.mbps.Load() == 0:
		return nil, api.Errorf(api.CodeRefused, "this node allows no benchmarks (bench_mbps is 0)").WithRemedy("set bench_mbps on both nodes and reload")
	case p.node.IsZero():
		return nil, api.Errorf(api.CodeRefused, "%s is an external peer, which has no agent that answers", p.name).
			WithRemedy("run `tulle bench serve` there and `tulle bench run HOST` here")
	case !p.lives() || p.replaced:
		return nil, api.Errorf(api.CodeUnhealthy, "%s is %s since %s: it cannot answer", v.label(p), p.state, p.since.Format(time.DateTime)).
			WithRemedy("see `tulle peers`, and `systemctl status tulle` there")
	case !p.bench:
		return nil, api.Errorf(api.CodeRefused, "the agent of %s (version %s) is too old for benchmarks between members", v.label(p), cmp.Or(p.version, "unknown")).
			WithRemedy("update it, or run `tulle bench serve` there and `tulle bench run HOST` here")
	case len(p.prefixes) == 0 || len(v.own) == 0:
		return nil, api.Errorf(api.CodeUnhealthy, "%s or this node has no address space yet", v.label(p)).WithRemedy("see `tulle peers`")
	case !slices.Contains(v.families(), b2i(v.benchSix(req.Six))):
		return nil, api.Errorf(api.CodeUsage, "the pods of this cluster have no %s addresses", familyName[b2i(req.Six)])
	}
	return p, nil
}

// benchSix reports whether a benchmark sends IPv6 packets: it was asked to, or pods have no IPv4.
func (v *view) benchSix(asked bool) bool { return asked || !slices.Contains(v.families(), 0) }

// negotiate sends the question, over a stream, and waits for the answer.
func (b *benches) negotiate(ctx context.Context, p *peerView, side *benchSide, ways []benchWay, six bool) (*benchLetter, error) {
	ask := &benchLetter{Kind: letterAsk, ID: side.id, Six: six}
	var missing []string
	for _, w := range ways {
		if w.missing != "" {
			missing = append(missing, modeName(w.mode)+": "+w.missing)
			continue
		}
		ask.Ways = append(ask.Ways, letterWay{Mode: modeName(w.mode), Addr: w.own, MTU: int(w.mtu)})
	}
	if len(ask.Ways) == 0 {
		return nil, api.Errorf(api.CodeUnhealthy, "there is no way to %s that can be measured: %s", p.name, strings.Join(missing, "; ")).WithRemedy("see `tulle ping %s`", p.name)
	}
	if err := b.send(ctx, p.node, ask); err != nil {
		return nil, api.Errorf(api.CodeUnhealthy, "%v", err).WithRemedy("see `tulle peers`")
	}
	late := time.NewTimer(benchAnswer)
	defer late.Stop()
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-late.C:
		return nil, api.Errorf(api.CodeUnhealthy, "the agent of %s has not answered within %v", p.name, benchAnswer).WithRemedy("see its log: `journalctl -u tulle` there")
	case l := <-side.answers:
		if l.Error != "" {
			return nil, (&api.Error{Code: api.CodeRefused, Message: p.name + ": " + l.Error}).WithRemedy("%s", l.Remedy)
		}
		if len(l.Token) == 0 || l.Mbps == 0 || l.Left <= 0 {
			return nil, api.Errorf(api.CodeFailed, "the agent of %s answers what this version does not understand", p.name).WithRemedy("use the same version on both nodes")
		}
		return l, nil
	}
}

// agree joins both sides' ways.
func (b *benches) agree(p *peerView, ways []benchWay, answer *benchLetter) ([]benchWay, error) {
	for i := range ways {
		w := &ways[i]
		if w.missing != "" {
			continue
		}
		j := slices.IndexFunc(answer.Ways, func(l letterWay) bool { return l.Mode == modeName(w.mode) })
		switch {
		case j < 0:
			w.missing = p.name + " does not offer it"
		case answer.Ways[j].Missing != "":
			w.missing = p.name + ": " + answer.Ways[j].Missing
		case !p.benchAddr(answer.Ways[j].Addr, w.own.Is6()) || answer.Ways[j].Port == 0:
			return nil, api.Errorf(api.CodeFailed, "%s names the address %v, which is not in its space", p.name, answer.Ways[j].Addr)
		default:
			w.theirs, w.port = answer.Ways[j].Addr, answer.Ways[j].Port
		}
	}
	return ways, nil
}

// benchAddr reports whether the peer may name that address: one of its space that is not its agent's.
func (p *peerView) benchAddr(a netip.Addr, six bool) bool {
	return a.IsValid() && a.Is6() == six && !slices.Contains(p.tun, a) && !slices.Contains(p.probes, a) &&
		slices.ContainsFunc(p.prefixes, func(x netip.Prefix) bool { return x.Contains(a) })
}

// describe is the list of ways for the caller.
func (b *benches) describe(p *peerView, ways []benchWay) (out []api.BenchWay) {
	for _, w := range ways {
		e := api.BenchWay{Mode: modeName(w.mode), Missing: w.missing}
		if w.theirs.IsValid() {
			e.From, e.To, e.MTU = w.own, netip.AddrPortFrom(w.theirs, w.port), int(w.mtu)
			e.Active = p.goes(family(w.own)) == w.mode
		}
		out = append(out, e)
	}
	return out
}

// modeName is a mode's name without its family.
func modeName(m encap.Mode) string {
	if m.IsDirect() {
		return encap.Direct.String()
	}
	return m.String()
}

// keepUp tells the other agent that the benchmark goes on, and the caller that it lives.
func (b *benches) keepUp(ctx context.Context, side *benchSide, each func(api.BenchEvent) error) error {
	beat, goOn := time.NewTicker(benchBeat), time.NewTicker(benchGoOn)
	defer beat.Stop()
	defer goOn.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case l := <-side.answers:
			if l.Kind == letterEnd {
				return each(api.BenchEvent{Ended: "the other end: " + cmp.Or(l.Error, "it has ended the benchmark")})
			}
		case <-b.ended:
			return each(api.BenchEvent{Ended: "this node's agent stops, or its underlay address changes"})
		case <-beat.C:
			if err := each(api.BenchEvent{}); err != nil {
				return err
			}
		case <-goOn.C:
			if err := b.send(ctx, side.node, &benchLetter{Kind: letterGoOn, ID: side.id}); err != nil && ctx.Err() == nil {
				b.s.log.Debug("benchmark: the other agent was not reached", "error", err)
			}
		}
	}
}

// endAsked takes back everything that a benchmark changed here, and tells the other agent.
func (b *benches) endAsked(ctx context.Context, side *benchSide) {
	b.letGo(ctx, func() { b.asked = nil })
	b.s.releaseBench(side.id)
	if err := b.send(ctx, side.node, &benchLetter{Kind: letterEnd, ID: side.id}); err != nil {
		b.s.log.Debug("benchmark: the other agent ends it by itself", "error", err)
	}
}

// letGo removes a side. Its addresses are free only when engine and host have forgotten them; a session that ends does so
// by itself.
func (b *benches) letGo(ctx context.Context, what func()) {
	ctx, cancel := context.WithTimeout(ctx, sendTimeout)
	defer cancel()
	if err := b.changed(ctx, what); err != nil {
		b.s.log.Debug("benchmark: its routes go with the next look at the host", "error", err)
	}
}
