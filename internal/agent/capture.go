package agent

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/bpf"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/podnet"
	"github.com/tulle-net/tulle/tunnel/capture"
	"github.com/tulle-net/tulle/tunnel/encap"
)

// captureIdle is how often a capture without packets says that it is alive, and looks whether the session is still the same.
const captureIdle = time.Second

// Capture implements api.Backend.
func (a *agent) Capture(ctx context.Context, req api.CaptureRequest, each func(api.CaptureEvent) error) error {
	s, err := a.current()
	if err != nil {
		return err
	}
	f, err := s.captureFilter(req)
	if err != nil {
		return err
	}
	for {
		err := s.capture(ctx, f, capture.Limits{Snap: req.Snap, Rate: req.Rate}, each, func() bool { return a.session.Load() != s })
		if !errors.Is(err, errNextSession) {
			return err
		}
		// The underlay address changed: the capture goes on with the next session's data path.
		for a.session.Load() == s || a.session.Load() == nil {
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(captureIdle):
			}
			if err := each(api.CaptureEvent{Time: time.Now()}); err != nil {
				return err
			}
		}
		s = a.session.Load()
	}
}

var errNextSession = errors.New("the session has ended")

// capture captures until ctx ends, each fails, or moved reports that the session is over.
func (s *session) capture(ctx context.Context, f capture.Filter, lim capture.Limits, each func(api.CaptureEvent) error, moved func() bool) error {
	if !f.Drops { // of those the kernel makes none
		resume, err := s.fast.pause()
		defer resume()
		if err != nil {
			return err
		}
	}
	l, err := s.engine.Tap().Listen(f, lim)
	switch {
	case errors.Is(err, capture.ErrBusy):
		return api.Errorf(api.CodeRefused, "%v", err)
	case err != nil:
		return api.Errorf(api.CodeUsage, "%v", err)
	}
	defer l.Close()
	if err := each(api.CaptureEvent{Time: time.Now()}); err != nil {
		return err
	}
	for {
		e, err := l.Next(ctx, captureIdle)
		out := api.CaptureEvent{Time: e.Time, Point: string(e.Point), Reason: e.Reason, Path: e.Path, Length: e.Length, Data: e.Data, Missed: e.Missed}
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, capture.ErrIdle) && moved():
			return errNextSession
		case errors.Is(err, capture.ErrIdle):
			out.Time, out.Missed = time.Now(), l.Missed()
		case err != nil:
			return err
		case e.Peer != "":
			out.Peer = s.peerRef(e.Peer)
		}
		if err := each(out); err != nil {
			return err
		}
	}
}

// peerRef names the peer of an ID of the engine.
func (s *session) peerRef(id string) api.NodeRef {
	if v := s.view.Load(); v != nil {
		for i := range v.peers {
			if p := &v.peers[i]; p.id == id {
				return api.NodeRef{Name: p.name, ID: p.id}
			}
		}
	}
	return api.NodeRef{ID: id}
}

// captureFilter checks what a request names against what this node knows.
func (s *session) captureFilter(req api.CaptureRequest) (capture.Filter, error) {
	f := capture.Filter{Drops: req.Drops, Reasons: req.Reasons, Pod: req.Pod}
	for _, p := range req.Points {
		if !slices.Contains(capture.Points(), capture.Point(p)) {
			return f, api.Errorf(api.CodeUsage, "point %q: want some of %s", p, join(capture.Points()))
		}
		f.Points = append(f.Points, capture.Point(p))
	}
	var reasons []string
	for d := range encap.Drops() {
		if d != encap.DropSocketOverflow {
			reasons = append(reasons, d.String())
		}
	}
	for _, r := range req.Reasons {
		switch r {
		case encap.DropSocketOverflow.String():
			return f, api.Errorf(api.CodeUsage, "reason %q: the kernel drops these packets before the agent sees them, so no capture has them", r).WithRemedy("`tulle status` counts them")
		case podnet.DropSource, podnet.DropNeighbour, podnet.DropDHCP, podnet.DropProtocol, podnet.DropMulticast:
			return f, api.Errorf(api.CodeUsage, "reason %q: the kernel drops these packets at the pod's link, so no capture has them", r).
				WithRemedy("`tulle pod list` counts them for each pod, and tcpdump in the pod shows them")
		}
		if !slices.Contains(reasons, r) {
			return f, api.Errorf(api.CodeUsage, "reason %q: want some of %s", r, strings.Join(reasons, ", "))
		}
	}
	for _, i := range req.Program {
		f.Program = append(f.Program, bpf.RawInstruction{Op: i.Op, Jt: i.Jt, Jf: i.Jf, K: i.K})
	}
	if req.Peer != "" {
		p, err := s.findPeer(req.Peer)
		if err != nil {
			return f, err
		}
		f.Peer = p.id
	}
	return f, nil
}

func join[S ~string](list []S) string {
	var out []string
	for _, s := range list {
		out = append(out, string(s))
	}
	return strings.Join(out, ", ")
}

// LogLevel implements api.Backend.
func (a *agent) LogLevel(_ context.Context, req api.LogLevelRequest) (api.LogLevel, error) {
	level := a.cfg.LevelVar()
	name := func() string { return strings.ToLower(level.Level().String()) }
	out := api.LogLevel{Old: name()}
	if req.Level != "" {
		var l slog.Level
		if err := l.UnmarshalText([]byte(req.Level)); err != nil {
			return out, api.Errorf(api.CodeUsage, "log level %q: %v", req.Level, err)
		}
		level.Set(l)
		a.log.Info("log level set", "old", out.Old, "new", req.Level)
	}
	out.New = name()
	return out, nil
}
