package pair

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"time"

	"github.com/tulle-net/tulle/bench/result"
)

// Path is one of several ways to the same host, with a server of its own at the other end.
type Path struct {
	Name, What string
	From       netip.Addr     // of this host: traffic comes from there
	To         netip.AddrPort // of the server
	MTU        int            // that is known to pass, in bytes: the search for the largest packet begins there; 0: at the link's
	Missing    string         // why it cannot be measured; then the addresses mean nothing
}

// RunPaths measures several paths in interleaved rounds: each round takes all measures of one path after the other, and
// begins with another path. The first path that can be measured is the reference. It keeps to o.Gentle. When ctx ends, or a
// server, the result has the rounds that were complete for all paths; an error means that there are none.
func RunPaths(ctx context.Context, o RunOptions, paths []Path) (*result.Run, error) {
	o.Host, o.Gentle = "paths", true
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	was := runtime.GOMAXPROCS(max(16, 4*runtime.NumCPU())) // as in Run
	defer runtime.GOMAXPROCS(was)
	ps := &pathRun{o: o}
	for _, p := range paths {
		if err := ps.add(ctx, p); err != nil {
			return nil, err
		}
	}
	if len(ps.runners) == 0 {
		return nil, fmt.Errorf("none of the paths can be measured: %s", missing(ps.modes))
	}
	if err := fits(&o, ps.runners...); err != nil {
		return nil, err
	}
	var ended error
	for i := range o.Rounds {
		if ended = ps.round(ctx, i); ended != nil {
			break
		}
	}
	return ps.result(ctx, ended)
}

// pathRun is a running RunPaths. runners[i] measures modes[place[i]].
type pathRun struct {
	o       RunOptions
	modes   []result.Mode
	paths   []Path
	runners []*runner
	place   []int
}

func missing(modes []result.Mode) string {
	text := ""
	for _, m := range modes {
		if text != "" {
			text += "; "
		}
		text += m.Name + ": " + m.Missing
	}
	return text
}

// add prepares a path: it finds its MTU. One that fails is part of the result.
func (ps *pathRun) add(ctx context.Context, p Path) error {
	m := result.Mode{Name: p.Name, What: p.What, Missing: p.Missing, Lacking: p.Missing != ""}
	if m.Missing == "" {
		rn := &runner{o: ps.o, label: p.Name + ", ", most: p.MTU}
		rn.o.Label = p.Name
		err := rn.connected(ctx, p, func() error { return rn.prepare(ctx) })
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			m.Missing = err.Error()
		} else {
			m.MTU = rn.r.MTU
			ps.runners, ps.place, ps.paths = append(ps.runners, rn), append(ps.place, len(ps.modes)), append(ps.paths, p)
		}
	}
	ps.modes = append(ps.modes, m)
	return nil
}

// connected does something with a connection to the path's server. There is one only while its path is measured: a server
// takes silence for the end.
func (rn *runner) connected(ctx context.Context, p Path, do func() error) error {
	o := rn.o
	o.Host = p.To.String()
	c, err := dial(ctx, &o, p.From)
	if err != nil {
		return err
	}
	if most := c.welcome.MaxRate; o.MaxRate > 0 && (most == 0 || most > o.MaxRate) {
		c.welcome.MaxRate = o.MaxRate
	}
	rn.c = c
	defer c.conn.Close()
	stop := context.AfterFunc(ctx, func() { c.conn.Close() })
	defer stop()
	err = do()
	c.goodbye()
	return err
}

// round takes one round of each path.
func (ps *pathRun) round(ctx context.Context, n int) error {
	for k := range ps.runners {
		i := (k + n) % len(ps.runners)
		rn := ps.runners[i]
		if err := rn.connected(ctx, ps.paths[i], func() error { return rn.round(ctx, n) }); err != nil {
			return fmt.Errorf("%s: %w", ps.paths[i].Name, err)
		}
		rn.r.Modes[0].Rounds[n].Order = k
	}
	return nil
}

// result joins what the paths have.
func (ps *pathRun) result(ctx context.Context, ended error) (*result.Run, error) {
	complete := len(ps.runners[0].r.Modes[0].Rounds)
	for _, rn := range ps.runners {
		complete = min(complete, len(rn.r.Modes[0].Rounds))
	}
	if complete == 0 {
		return nil, errors.Join(ctx.Err(), ended)
	}
	first := ps.runners[0]
	r := first.r
	var used, steal []float64
	for i, rn := range ps.runners {
		rn.r.Modes[0].Rounds = rn.r.Modes[0].Rounds[:complete]
		rn.finish(ctx, nil)
		used, steal = append(used, rn.used...), append(steal, rn.steal()...)
		m := &ps.modes[ps.place[i]]
		m.Rounds, m.Errors = rn.r.Modes[0].Rounds, rn.r.Modes[0].Errors
	}
	r.Modes, r.References, r.Seconds = ps.modes, []string{first.o.Label}, time.Since(r.Started).Seconds()
	for _, rn := range ps.runners {
		r.MTU = max(r.MTU, rn.r.MTU)
	}
	r.Others, r.Steal = result.SpreadOf(used), result.SpreadOf(steal)
	r.Summarise()
	r.Notes, r.Warnings, r.Interrupted = append(first.notes(), r.Sparse()...), r.Doubts(), ended != nil
	if ended != nil && ctx.Err() == nil {
		r.Warnings = append(r.Warnings, fmt.Sprintf("The run ended early: %v.", ended))
	}
	return r, nil
}
