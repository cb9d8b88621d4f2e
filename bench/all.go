package bench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tulle-net/tulle/bench/machine"
	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/bench/traffic"
	"github.com/tulle-net/tulle/internal/lab"
)

// AllOptions configure one run of [All]. The zero value of each field except Helper means its default.
type AllOptions struct {
	Name    string   // prefix of the labs' names; default "bench"
	Modes   []string // of [Modes], or with "tulle-" in front; default all
	Rounds  int      // default 5
	MTU     int      // of the underlay, in bytes; default 1500
	Wire    lab.Wire // between the hosts; default lab.WireCut
	Timeout time.Duration
	// Duration is the counted time of each measure; a warm-up of a third of it comes first. Each trial of the search
	// for the highest UDP rate takes a quarter of it. Default 1 s.
	Duration time.Duration
	// Binary is the tulle program, for agents. Default: the running one.
	Binary string
	// Helper is the command line that, with a helper's name appended, calls [Helper]. Its first element is the program.
	Helper []string
	// Profile is a folder for a CPU profile of each mode, recorded after the last round; "" for none.
	Profile string
	// Measures are of [Measures]; default all. Sizes are the payloads of datagrams whose latency is measured, in bytes;
	// default 64 and 1,400. Six uses IPv6 between the pods.
	Measures []string
	Sizes    []int
	Six      bool
	// Congestion is the TCP congestion control of the pods; default cubic, the kernel's own default. It changes the ratios: bbr paces
	// its sending by timers, and favours kernel tunnels.
	Congestion string
	Version    string       // of the program, for the result
	Progress   func(string) // receives progress messages; may be nil
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
	if o.Congestion == "" {
		o.Congestion = DefaultCongestion
	}
	if len(o.Sizes) == 0 {
		o.Sizes = []int{64, 1400}
	}
	for i, n := range o.Sizes {
		if slices.Contains(o.Sizes[:i], n) {
			return o, fmt.Errorf("a payload of %d bytes is named twice", n)
		}
		if n < traffic.Least || n > largest {
			return o, fmt.Errorf("a payload of %d bytes: want between %d and %d", n, traffic.Least, largest)
		}
	}
	for _, name := range o.Measures {
		if !slices.Contains(Measures(), name) {
			return o, fmt.Errorf("no measure %q; there are %s", name, strings.Join(Measures(), ", "))
		}
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
	if err := o.lab(o.labName(len(modes)-1), "").Validate(); err != nil {
		return o, err
	}
	_, err := chosen(o.Modes)
	return o, err
}

// labName is the name of a mode's lab.
func (o *AllOptions) labName(mode int) string { return fmt.Sprintf("%s-%d", o.Name, mode) }

// DefaultDuration is AllOptions.Duration's default.
const DefaultDuration = time.Second

// DefaultCongestion is AllOptions.Congestion's default.
const DefaultCongestion = "cubic"

const largest = 65507 // bytes of UDP payload: more does not fit into an IPv4 packet

const shortest = 100 * time.Millisecond // lower limit of AllOptions.Duration

// warm is the duration of the warm-up before a measure.
func (o *AllOptions) warm() time.Duration { return o.Duration / 3 }

// Validate returns an error if an option is invalid.
func (o AllOptions) Validate() error {
	_, err := o.withDefaults()
	return err
}

// All measures all modes in interleaved rounds: each measure is taken for one mode after the other, so that a temporary
// disturbance of the machine affects all modes. In each round another mode is the first. The failure of a single mode is
// part of the result. When ctx ends, or something fails that no mode can be measured without, the result has the rounds that
// were complete. An error beside a result is about what came after them: profiles, and the removal of labs.
func All(ctx context.Context, o AllOptions) (*result.Run, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	if err := needs(); err != nil {
		return nil, err
	}
	if err := checkCongestion(o.Congestion); err != nil {
		return nil, err
	}
	if err := o.checkProfile(); err != nil {
		return nil, err
	}
	defer manyProcessors()()

	family := "IPv4"
	if o.Six {
		family = "IPv6"
	}
	m := machine.Facts(netip.Addr{})
	m.Congestion = o.Congestion
	idle := halts
	if slices.ContainsFunc(o.measures(), func(m measure) bool { return m.awake }) {
		if idle, err = findIdling(ctx, o.Helper); err != nil {
			return nil, err
		}
	}
	m.Awake = idle.String()
	m.Affinity = "one CPU for both sides"
	if canPin() {
		m.Affinity = "free, except in the pinned measures: each side on its half of the CPUs"
	}
	r := &result.Run{
		Format: result.Format, Version: result.Version, Kind: result.Lab, Tulle: o.Version, Started: time.Now(), Machines: []result.Machine{m},
		Rounds: o.Rounds, MTU: o.MTU, Wire: string(o.Wire), Family: family, References: references, Targets: slices.Clone(targets),
		Duration: o.Duration.Seconds(), Warm: o.warm().Seconds(), Trial: (o.Duration / 4).Seconds(),
	}
	for _, m := range o.measures() {
		if m.main != "" {
			r.Asked = append(r.Asked, m.main)
		}
	}
	run := &allRun{o: o, r: r, idle: idle}
	defer run.down(ctx)
	if err := run.up(ctx); err != nil {
		return nil, err
	}
	for i := range o.Rounds {
		if err := run.round(ctx, i); err != nil && i == 0 {
			return nil, err
		} else if err != nil {
			r.Interrupted = true
			if ctx.Err() == nil {
				run.ended = err
			}
			break
		}
	}
	if o.Profile != "" && !r.Interrupted {
		err = run.profile(ctx)
	}
	err = errors.Join(err, run.down(ctx))
	run.sumUp()
	return r, err
}

// allRun is a run of All. stands are the modes that are up; result[i] is the index of stands[i] in r.Modes.
type allRun struct {
	o      AllOptions
	r      *result.Run
	stands []*stand
	result []int
	others []float64
	steal  []float64
	idle   idling
	ended  error // why there are not as many rounds as were asked for, if it was not ctx
}

// clearEarlier removes the labs of an earlier run of the name that was killed. It may have had more modes.
func (run *allRun) clearEarlier(ctx context.Context) error {
	labs, err := lab.List()
	if err != nil {
		return err
	}
	for _, name := range labs {
		number, ours := strings.CutPrefix(name, run.o.Name+"-")
		if _, err := strconv.Atoi(number); !ours || err != nil {
			continue
		}
		if gone, err := lab.DownIfAbandoned(ctx, name); err != nil {
			return fmt.Errorf("remove what an earlier run left: %w", err)
		} else if gone {
			run.o.Progress("removed lab " + name + ", which an earlier run left")
		}
	}
	return nil
}

func (run *allRun) up(ctx context.Context) error {
	picked, err := chosen(run.o.Modes)
	if err != nil {
		return err
	}
	if err := run.clearEarlier(ctx); err != nil {
		return err
	}
	for i, m := range picked {
		run.o.Progress("setting up " + m.name)
		res := result.Mode{Name: m.name, What: m.what, Wiring: m.wiring, Tulle: m.paths != ""}
		s, err := m.build(ctx, &run.o, run.o.labName(i))
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

func missing(modes []result.Mode) string {
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
