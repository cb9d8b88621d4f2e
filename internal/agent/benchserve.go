package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os/exec"
	"time"

	"github.com/tulle-net/tulle/internal/api"
)

// refusal is why a benchmark is not served.
type refusal struct{ why, remedy string }

func (r *refusal) Error() string { return r.why }

// serve answers a member that asks for a benchmark, and serves it until it ends.
func (b *benches) serve(ctx context.Context, l inLetter) {
	ctx, stop := context.WithTimeout(ctx, benchMaxTime)
	defer stop()
	side := &benchSide{id: l.ID, node: l.from, peer: l.from.String(), stop: stop, lease: time.Now().Add(benchAnswer + benchLease), until: time.Now().Add(benchMaxTime)}
	err := b.take(ctx, side)
	if err == nil {
		defer b.takeBack(context.WithoutCancel(ctx), side)
		err = b.serveSide(ctx, l, side)
	}
	if r, ok := errors.AsType[*refusal](err); ok {
		b.s.log.Info("benchmark refused", "peer", l.from, "reason", r.why)
		_ = b.send(context.WithoutCancel(ctx), l.from, &benchLetter{Kind: letterAnswer, ID: l.ID, Error: cut(r.why), Remedy: cut(r.remedy)})
	} else if err != nil {
		b.s.log.Warn("benchmark failed", "peer", l.from, "error", err)
		_ = b.send(context.WithoutCancel(ctx), l.from, &benchLetter{Kind: letterAnswer, ID: l.ID, Error: cut(err.Error()), Remedy: "see the agent's log there"})
	}
}

// take makes side the one that is served. A node that asks again has ended its last benchmark: that is waited for.
func (b *benches) take(ctx context.Context, side *benchSide) error {
	for deadline := time.Now().Add(2 * sendTimeout); time.Now().Before(deadline) && ctx.Err() == nil; {
		b.mu.Lock()
		before := b.served
		if again := before != nil && before.node == side.node; !again {
			b.mu.Unlock()
			break
		}
		before.reason = "the asking node begins another one"
		before.stop()
		b.mu.Unlock()
		time.Sleep(20 * time.Millisecond)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.mbps.Load() == 0 {
		return &refusal{"it allows no benchmarks (bench_mbps is 0)", "set bench_mbps there and reload, or run `tulle bench serve` there and `tulle bench run HOST` here"}
	}
	if o := b.served; o != nil {
		return &refusal{fmt.Sprintf("it serves a benchmark of another node, for %v at most", time.Until(o.until).Round(time.Second)), "try again when it has ended"}
	}
	b.served = side
	return nil
}

// serveSide does all of it for a side that was taken; an error is for the asking agent.
func (b *benches) serveSide(ctx context.Context, l inLetter, side *benchSide) error {
	p, err := b.s.findPeer(side.peer)
	if err != nil {
		return &refusal{"it does not know the asking node", "see `tulle peers` there"}
	}
	if len(l.Ways) == 0 {
		return &refusal{"it was asked for no way to send", "use the same version on both nodes"}
	}
	var modes []string
	for _, w := range l.Ways {
		if !p.benchAddr(w.Addr, l.Six) {
			return &refusal{fmt.Sprintf("the address %v is not in the asking node's space as this node knows it", w.Addr), "wait until gossip has told of it"}
		}
		modes = append(modes, w.Mode)
	}
	ways, err := b.propose(ctx, p, side.id, modes, l.Six)
	if err != nil {
		return err
	}
	for i := range ways {
		ways[i].theirs = l.Ways[i].Addr
	}
	if err := b.changed(ctx, func() { side.ways = ways }); err != nil {
		return err
	}
	limit, token := int(b.mbps.Load()), newBenchID()
	answer := &benchLetter{Kind: letterAnswer, ID: side.id, Token: token, Mbps: limit, Left: time.Until(side.until)}
	h, err := startBenchHelper(ctx, ways, token, limit)
	if err != nil {
		return err
	}
	defer h.end()
	for _, w := range ways {
		answer.Ways = append(answer.Ways, letterWay{Mode: modeName(w.mode), Addr: w.own, Port: h.ports[w.own], MTU: int(w.mtu), Missing: cut(w.missing)})
	}
	if err := b.send(ctx, side.node, answer); err != nil {
		return err
	}
	b.s.log.Info("benchmark served", "peer", p.name, "mbps", limit)
	why := b.attend(ctx, side, h)
	b.s.log.Info("benchmark ended", "peer", p.name, "reason", why)
	_ = b.send(context.WithoutCancel(ctx), side.node, &benchLetter{Kind: letterEnd, ID: side.id, Error: cut(why)}) // it may be gone
	return nil
}

// attend waits until a benchmark is over and says why it is.
func (b *benches) attend(ctx context.Context, side *benchSide, h *benchHelper) string {
	tick := time.NewTicker(benchBeat)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			b.mu.Lock()
			defer b.mu.Unlock()
			switch {
			case side.reason != "":
				return side.reason
			case errors.Is(ctx.Err(), context.DeadlineExceeded):
				return fmt.Sprintf("it took longer than %v", benchMaxTime)
			}
			return "the agent stops"
		case <-h.done:
			return "the process that answers has ended"
		case <-tick.C:
			b.mu.Lock()
			late := time.Now().After(side.lease)
			b.mu.Unlock()
			switch {
			case late:
				return fmt.Sprintf("the asking agent has said nothing for %v", benchLease)
			case b.mbps.Load() == 0:
				return "benchmarks are switched off now (bench_mbps is 0)"
			}
		}
	}
}

// goOn extends the lease of what is served.
func (b *benches) goOn(l inLetter) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if s := b.served; s != nil && s.id == l.ID && s.node == l.from {
		s.lease = time.Now().Add(benchLease)
	}
}

// endServed ends what is served when the asking agent says so.
func (b *benches) endServed(l inLetter) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if s := b.served; s != nil && s.id == l.ID && s.node == l.from {
		s.reason = "the asking node has what it wanted"
		s.stop()
	}
}

// takeBack takes back everything that serving changed here.
func (b *benches) takeBack(ctx context.Context, side *benchSide) {
	b.letGo(ctx, func() { b.served = nil })
	b.s.releaseBench(side.id)
}

// benchHelper is the process that answers the measuring traffic: this program, as `tulle bench helper serve`. It ends when
// its standard input does, so also with an agent that is killed.
type benchHelper struct {
	cmd   *exec.Cmd
	in    io.Closer
	done  chan struct{} // closed when the process has ended
	ports map[netip.Addr]uint16
}

// startBenchHelper starts the process and waits until it listens.
func startBenchHelper(ctx context.Context, ways []benchWay, token string, mbps int) (*benchHelper, error) {
	want := api.BenchServe{Token: token, Mbps: mbps, MaxTime: benchMaxTime}
	for _, w := range ways {
		if w.own.IsValid() {
			want.Addresses = append(want.Addresses, w.own)
		}
	}
	if len(want.Addresses) == 0 {
		return nil, &refusal{"none of the ways can be measured: " + ways[0].missing, "see `tulle ping` there"}
	}
	h := &benchHelper{cmd: exec.Command("/proc/self/exe", "bench", "helper", "serve"), done: make(chan struct{}), ports: map[netip.Addr]uint16{}}
	h.cmd.Env = []string{} // nothing of what systemd tells the agent
	in, err := h.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := h.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := h.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the process that answers: %w", err)
	}
	h.in = in
	serving := make(chan api.BenchServing, 1)
	go func() { // ends with the process, which end kills if need be
		defer close(h.done)
		var is api.BenchServing
		if err := json.NewDecoder(out).Decode(&is); err != nil {
			is.Error = err.Error()
		}
		serving <- is
		_, _ = io.Copy(io.Discard, out)
		_ = h.cmd.Wait()
	}()
	if err = json.NewEncoder(in).Encode(want); err == nil {
		select {
		case <-ctx.Done():
			err = ctx.Err()
		case <-time.After(benchLease):
			err = errors.New("it does not begin to listen")
		case is := <-serving:
			if is.Error != "" || len(is.Ports) != len(want.Addresses) {
				err = fmt.Errorf("it cannot listen: %s", is.Error)
				break
			}
			for i, a := range want.Addresses {
				h.ports[a] = is.Ports[i]
			}
		}
	}
	if err != nil {
		h.end()
		return nil, fmt.Errorf("the process that answers: %w", err)
	}
	return h, nil
}

// end ends the process.
func (h *benchHelper) end() {
	h.in.Close()
	select {
	case <-h.done:
	case <-time.After(sendTimeout):
		_ = h.cmd.Process.Kill()
		<-h.done
	}
}
