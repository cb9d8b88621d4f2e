package agent

import (
	"context"
	"errors"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/tunnel/trace"
)

// Trace implements api.Backend.
func (a *agent) Trace(ctx context.Context, req api.TraceRequest) (api.Trace, error) {
	s, err := a.current()
	if err != nil {
		return api.Trace{}, err
	}
	every := req.Every
	if every == 0 {
		every = api.DefaultTraceEvery
	}
	t, err := s.engine.Trace(ctx, every, req.Duration)
	switch {
	case errors.Is(err, trace.ErrBusy):
		return api.Trace{}, api.Errorf(api.CodeRefused, "%v", err).WithRemedy("wait until it ends")
	case err != nil:
		return api.Trace{}, err
	}
	out := api.Trace{Sent: t.Sent, Received: t.Received, Batches: t.Batches, Interrupted: t.Interrupted}
	for _, stage := range trace.Stages() {
		out.Stages = append(out.Stages, api.TraceStage{Name: stage.String(), Time: t.Times[stage], PerPacket: t.PerPacket(stage)})
	}
	return out, nil
}
