package agent

import (
	"context"
	"fmt"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/tunnel/encap"
)

// ping probes a peer through every encapsulation.
func (s *session) ping(ctx context.Context, p *peerView, count int) (api.PingResult, error) {
	if count <= 0 {
		count = 3
	}
	out := api.PingResult{Node: api.NodeRef{Name: p.name, ID: p.id}}
	v := s.view.Load()
	for _, m := range s.modes(v, p) {
		pm := api.PingMode{Mode: m.String(), Active: p.active(v, m), Endpoint: s.outer(p, m)}
		switch {
		case s.unfit(p, m) != "":
			pm.State, pm.Reason = api.PathOff, s.unfit(p, m)
		case p.node.IsZero():
			pm.State, pm.Reason = api.PathOff, "external peers have no agent that answers"
		case v.unprobed(p) != "":
			pm.State, pm.Reason = api.PathOff, v.unprobed(p)
		default:
			s.pingMode(ctx, p, m, count, &pm)
		}
		out.Modes = append(out.Modes, pm)
	}
	return out, ctx.Err()
}

const (
	pingSize = 64                     // bytes of the inner packet
	pingWait = time.Second            // for an answer
	sizeWait = 300 * time.Millisecond // for the answer to a large packet, once the path has answered
)

// pingOnce sends one ping, or one in each inner family where these look different on the way: it is answered when both are.
func (s *session) pingOnce(ctx context.Context, p *peerView, m encap.Mode, size int, wait time.Duration) (rtt time.Duration, got int, err error) {
	rtt, got, err = s.probes.ping(ctx, p.id, m, false, size, wait)
	if err == nil && s.view.Load().byFamily(p, m) {
		rtt6, got6, err := s.probes.ping(ctx, p.id, m, true, size, wait)
		return max(rtt, rtt6), min(got, got6), err
	}
	return rtt, got, err
}

func (s *session) pingMode(ctx context.Context, p *peerView, m encap.Mode, count int, pm *api.PingMode) {
	var sum time.Duration
	var last error
	for range count {
		pm.Sent++
		rtt, _, err := s.pingOnce(ctx, p, m, pingSize, pingWait)
		if err != nil {
			last = err
			if pm.Received == 0 && pm.Sent >= 3 || ctx.Err() != nil {
				break
			}
			continue
		}
		us := rtt.Microseconds()
		if pm.Received == 0 || us < pm.RTTMinUS {
			pm.RTTMinUS = us
		}
		pm.RTTMaxUS = max(pm.RTTMaxUS, us)
		pm.Received++
		sum += rtt
	}
	pm.Lost = pm.Sent - pm.Received
	if pm.Received == 0 {
		pm.State, pm.Reason = api.PathDown, fmt.Sprintf("%d probes, no answer (%v)", pm.Sent, last)
		if st, ok := s.probes.status(p.id, m); ok && !st.Up {
			pm.Reason = st.Words
		}
		return
	}
	pm.State = api.PathUp
	pm.RTTUS = (sum / time.Duration(pm.Received)).Microseconds()
	pm.LargestPacket = s.largest(ctx, p, m)
}

// largest searches the largest inner packet that is answered.
func (s *session) largest(ctx context.Context, p *peerView, m encap.Mode) int {
	passes := func(size int) bool {
		for range 2 {
			if _, got, err := s.pingOnce(ctx, p, m, size, sizeWait); err == nil && got == size {
				return true
			}
		}
		return false
	}
	lo, hi := pingSize, int(s.limit(m, p))
	if passes(hi) {
		return hi
	}
	for hi-lo > 1 && ctx.Err() == nil {
		mid := (lo + hi) / 2
		if passes(mid) {
			lo = mid
		} else {
			hi = mid
		}
	}
	return lo
}
