package bench

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

// AllOptions configure one run of [All]. The zero value of each field except Helper means its default.
type AllOptions struct {
	Name    string   // prefix of the labs' names; default "bench"
	Modes   []string // of [Modes]; default all
	Rounds  int      // default 5
	MTU     int      // of the underlay, in bytes; default 1500
	Wire    lab.Wire // between the hosts; default lab.WireCut
	Timeout time.Duration
	// Duration is the counted time of each measure; a warm-up of a third of it comes first. Each trial of the search
	// for the highest UDP rate takes a quarter of it. Default 2 s.
	Duration time.Duration
	// Binary is the tulle program, for agents. Default: the running one.
	Binary string
	// Helper is the command line that, with a helper's name appended, calls [Helper]. Its first element is the program.
	Helper []string
	// Profile is a folder for a CPU profile of each mode, recorded after the last round; "" for none.
	Profile  string
	Progress func(string) // receives progress messages; may be nil
}

func (o AllOptions) withDefaults() (AllOptions, error) {
	if o.Name == "" {
		o.Name = "bench"
	}
	if o.Rounds == 0 {
		o.Rounds = 5
	}
	if o.MTU == 0 {
		o.MTU = 1500
	}
	if o.Wire == "" {
		o.Wire = lab.WireCut
	}
	if o.Timeout == 0 {
		o.Timeout = time.Minute
	}
	if o.Duration == 0 {
		o.Duration = DefaultDuration
	}
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	if o.Rounds < 1 {
		return o, fmt.Errorf("%d rounds: want at least 1", o.Rounds)
	}
	if o.Duration < shortest {
		return o, fmt.Errorf("a duration of %v: want at least %v", o.Duration, shortest)
	}
	if len(o.Helper) == 0 {
		return o, errors.New("no command line for helper processes")
	}
	if err := o.lab("bench").Validate(); err != nil {
		return o, err
	}
	_, err := chosen(o.Modes)
	return o, err
}

// DefaultDuration is AllOptions.Duration's default.
const DefaultDuration = 2 * time.Second

const shortest = 100 * time.Millisecond // lower limit of AllOptions.Duration

// warm is the duration of the warm-up before a measure.
func (o *AllOptions) warm() time.Duration { return o.Duration / 3 }

// Validate returns an error if an option is invalid.
func (o AllOptions) Validate() error {
	_, err := o.withDefaults()
	return err
}

// AllResult is the result of one run of [All], with the method.
type AllResult struct {
	Started  time.Time `json:"started"`
	Seconds  float64   `json:"seconds"` // of the whole run
	Machine  Machine   `json:"machine"`
	Rounds   int       `json:"rounds"`
	Duration float64   `json:"duration_s"` // counted time of each measure
	Warm     float64   `json:"warm_up_s"`
	Trial    float64   `json:"udp_trial_s"`
	MTU      int       `json:"mtu"`
	Wire     lab.Wire  `json:"wire"`
	// Warnings are reasons not to trust figures.
	Warnings []string     `json:"warnings"`
	Notes    []string     `json:"notes"` // on the method
	Metrics  []Metric     `json:"metrics"`
	Modes    []ModeResult `json:"modes"`
	Ratios   []Ratio      `json:"ratios"` // of the modes to the references, round by round
	Floors   []Floor      `json:"floors"`
	// Others is the share of the machine's CPU time that other processes used just before each round, without traffic.
	Others Spread `json:"others_cpu_share"`
	// Steal is the share of the machine's CPU time that the hypervisor took during the TCP measures.
	Steal Spread `json:"steal_share"`
}

// ModeResult is the result for one mode.
type ModeResult struct {
	Name    string            `json:"name"`
	What    string            `json:"what"`
	Missing string            `json:"missing,omitempty"` // why the mode could not be measured at all
	Lacking bool              `json:"lacking,omitempty"` // this machine does not support the mode: Missing is no failure
	MTU     int               `json:"mtu,omitempty"`
	Errors  []string          `json:"errors,omitempty"` // measures that failed
	Summary map[string]Spread `json:"summary,omitempty"`
	Rounds  []Round           `json:"rounds,omitempty"`
	Detail  []Detail          `json:"detail,omitempty"`
}

// Detail is the full result of one round for one mode. Measures that failed are missing.
type Detail struct {
	TCP     []TCP        `json:"tcp"`
	Latency []Latency    `json:"latency"`
	UDP     []RateSearch `json:"udp"`
	RSS     uint64       `json:"rss_bytes"` // of the largest process of the tunnel
	// Crossing is what went through the router while TCP was measured.
	Crossing lab.Crossing `json:"crossing"`
}

// Failed reports whether a mode or measure failed that this machine supports.
func (r *AllResult) Failed() bool {
	return slices.ContainsFunc(r.Modes, func(m ModeResult) bool { return m.Missing != "" && !m.Lacking || len(m.Errors) > 0 })
}

// All measures all modes in interleaved rounds: each measure is taken for one mode after the other, so that a temporary
// disturbance of the machine affects all modes. The failure of a single mode is part of the result. An error means that
// there is no result.
func All(ctx context.Context, o AllOptions) (*AllResult, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	if err := needs(); err != nil {
		return nil, err
	}
	defer manyProcessors()()

	r := &AllResult{
		Started: time.Now(), Machine: thisMachine(), Rounds: o.Rounds, MTU: o.MTU, Wire: o.Wire, Metrics: metrics,
		Duration: o.Duration.Seconds(), Warm: o.warm().Seconds(), Trial: (o.Duration / 4).Seconds(),
	}
	run := &allRun{o: o, r: r}
	defer run.down(ctx)
	if err := run.up(ctx); err != nil {
		return nil, err
	}
	for i := range o.Rounds {
		if err := run.round(ctx, i); err != nil {
			return nil, err
		}
	}
	if o.Profile != "" {
		if err := run.profile(ctx); err != nil {
			return nil, err
		}
	}
	if err := run.down(ctx); err != nil {
		return nil, err
	}
	run.sumUp()
	return r, nil
}

// allRun is a run of All. stands are the modes that are up; result[i] is the index of stands[i] in r.Modes.
type allRun struct {
	o      AllOptions
	r      *AllResult
	stands []*stand
	result []int
	others []float64
	steal  []float64
}

func (run *allRun) up(ctx context.Context) error {
	picked, err := chosen(run.o.Modes)
	if err != nil {
		return err
	}
	for i, m := range picked {
		run.o.Progress("setting up " + m.name)
		res := ModeResult{Name: m.name, What: m.what}
		s, err := m.build(ctx, &run.o, fmt.Sprintf("%s-%d", run.o.Name, i))
		if ctx.Err() != nil {
			return errors.Join(ctx.Err(), err)
		}
		if err != nil {
			_, res.Lacking = errors.AsType[lackError](err)
			res.Missing = err.Error()
		} else {
			res.MTU = s.tunnel.mtu
			run.stands, run.result = append(run.stands, s), append(run.result, i)
		}
		run.r.Modes = append(run.r.Modes, res)
	}
	if len(run.stands) == 0 {
		return fmt.Errorf("none of the modes came up: %s", missing(run.r.Modes))
	}
	return nil
}

func missing(modes []ModeResult) string {
	var out []string
	for _, m := range modes {
		out = append(out, m.Name+": "+m.Missing)
	}
	return strings.Join(out, "; ")
}

func (run *allRun) down(ctx context.Context) error {
	var err error
	for _, s := range run.stands {
		err = errors.Join(err, s.down(ctx))
	}
	run.stands, run.result = nil, nil
	return err
}

// measure is one measure of a round. take fills in a part of the detail.
type measure struct {
	what  string
	awake bool
	take  func(ctx context.Context, o *AllOptions, s *stand, d *Detail) error
}

var measures = []measure{
	{"TCP, one stream", false, takeTCP(1)},
	{"TCP, four streams", false, takeTCP(4)},
	{"latency at 64 bytes", true, takeLatency(64, false)},
	{"latency at 64 bytes, pinned", true, takeLatency(64, true)},
	{"latency at 1,400 bytes", true, takeLatency(1400, false)},
	{"UDP rate at 64 bytes", false, takeUDP(64)},
	{"UDP rate at 1,300 bytes", false, takeUDP(1300)},
	{"memory", false, takeMemory},
}

func takeTCP(streams int) func(context.Context, *AllOptions, *stand, *Detail) error {
	return func(ctx context.Context, o *AllOptions, s *stand, d *Detail) error {
		before, err := s.crossed()
		if err != nil {
			return err
		}
		t, err := measureTCP(ctx, &s.ends, streams, o.warm(), o.Duration, s.tunnel.pids)
		if err != nil {
			return err
		}
		d.TCP = append(d.TCP, t)
		after, err := s.crossed()
		d.Crossing = d.Crossing.Plus(after.Minus(before))
		return err
	}
}

func takeLatency(payload int, pinned bool) func(context.Context, *AllOptions, *stand, *Detail) error {
	return func(ctx context.Context, o *AllOptions, s *stand, d *Detail) error {
		l, err := placedLatency(ctx, &s.ends, s.tunnel.pids, payload, o.warm(), o.Duration, pinned)
		if err == nil {
			d.Latency = append(d.Latency, l)
		}
		return err
	}
}

func takeUDP(payload int) func(context.Context, *AllOptions, *stand, *Detail) error {
	return func(ctx context.Context, o *AllOptions, s *stand, d *Detail) error {
		found, err := searchRate(payload, func(rate float64) (Trial, error) {
			return udpTrial(ctx, &s.ends, payload, rate, o.Duration/4)
		})
		if err == nil {
			d.UDP = append(d.UDP, found)
		}
		return err
	}
}

func takeMemory(_ context.Context, _ *AllOptions, s *stand, d *Detail) (err error) {
	d.RSS, err = residentMemory(s.tunnel.pids)
	return err
}

// round takes each measure for each mode.
func (run *allRun) round(ctx context.Context, n int) error {
	others, err := othersShare(ctx)
	if err != nil {
		return err
	}
	run.others = append(run.others, others)
	details := make([]Detail, len(run.stands))
	for _, m := range measures {
		run.o.Progress(fmt.Sprintf("round %d of %d: %s", n+1, run.o.Rounds, m.what))
		sleepers := func() {}
		if m.awake {
			if sleepers, err = StartAwake(ctx, run.o.Helper); err != nil {
				return err
			}
		}
		for i, s := range run.stands {
			if err := m.take(ctx, &run.o, s, &details[i]); err != nil && ctx.Err() == nil {
				res := &run.r.Modes[run.result[i]]
				res.Errors = append(res.Errors, fmt.Sprintf("round %d, %s: %v", n+1, m.what, err))
			}
		}
		sleepers()
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	for i, d := range details {
		res := &run.r.Modes[run.result[i]]
		res.Detail = append(res.Detail, d)
		for _, t := range d.TCP {
			run.steal = append(run.steal, t.CPU.Steal/t.Seconds/float64(run.r.Machine.CPUs))
		}
	}
	return nil
}

// othersShare measures the share of the machine's CPU time that is used while this program sleeps.
func othersShare(ctx context.Context) (float64, error) {
	m, err := startCPU(nil)
	if err != nil {
		return 0, err
	}
	if err := sleep(ctx, 300*time.Millisecond); err != nil {
		return 0, err
	}
	u, err := m.stop()
	return (u.Busy + u.Others) / (time.Since(m.begin).Seconds() * float64(m.stat.cpus)), err
}
