// Package doctor checks a host and, through the agent, the cluster: for each thing that is known to break pod networks it says
// whether it is well, what was seen, and the command that mends it.
//
// A check has two halves. Its gathering half reads the host or asks the agent and fills the snapshot; its judging half is a pure
// function of the snapshot. Rules that the agent goes by itself are not written down a second time: what the agent finds
// wrong arrives as problems of its status, and what internal/hostnet finds is asked there.
//
// The doctor changes nothing unless it is told to fix, and then only what cannot cut anybody off: see fix.go. It needs no agent: checks that
// do are then skipped. It looks at the network namespace in which it runs. A Run uses one goroutine and those of the
// resolver, which end with it.
package doctor

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// State of a check.
type State string

// The states, from best to worst. A check that was skipped has a reason.
const (
	OK      State = "ok"
	Skipped State = "skipped"
	Warning State = "warning" // it works, and something will break or is slower than it has to be
	Failed  State = "failed"  // something does not work
)

// Result is what one check came to.
type Result struct {
	Check string `json:"check"`
	State State  `json:"state"`
	// Seen is the evidence: the values that were looked at. Of a check that was skipped, it is the reason.
	Seen     string    `json:"seen"`
	Findings []Finding `json:"findings"`
	Fixed    []string  `json:"fixed"` // what --fix has changed
}

// Finding is one thing that is wrong.
type Finding struct {
	State   State  `json:"state"` // Warning or Failed
	What    string `json:"what"`
	Remedy  string `json:"remedy"`
	Command string `json:"command,omitempty"` // the shell command that does what Remedy says; empty if an operator has to choose
}

// Report has the results of all checks that ran, in their order, and how many are in each state.
type Report struct {
	Results  []Result `json:"results"`
	OK       int      `json:"ok"`
	Warnings int      `json:"warnings"`
	Failed   int      `json:"failed"`
	Skipped  int      `json:"skipped"`
}

// Healthy reports whether no check has failed.
func (r Report) Healthy() bool { return r.Failed == 0 }

// Options of a Run. Where the agent runs, what it says of itself wins.
type Options struct {
	Checks []string // names of the checks to run; none means all
	Fix    bool     // mend what is safe to mend

	Socket       string         // the agent's
	StateDir     string         // the agent's
	ConfigFile   string         // for words
	ConfigErr    error          // of reading the configuration; the other fields have the defaults then
	Tun          string         // name of the TUN device
	NodeName     string         // this host's
	ClusterCIDRs []netip.Prefix // that the cluster has or would have
	PodCIDRs     []netip.Prefix // that this node asks for
	Join         []string       // seeds
	GossipPort   uint16
	UDPPort      uint16
	VXLANPort    uint16
	Paths        []string // encapsulations, in order of preference
	CNIDir       string   // where the agent publishes its network; empty: nowhere
	CNIBinDir    string   // where the engine's plugins are; empty: not looked at
	KeyFile      string   // of gossip; empty: not encrypted
	Metrics      string   // ADDRESS:PORT; empty: not served
	Underlay     string   // interface that carries the tunnel; empty: UnderlayAddrs, or the agent's choice

	UnderlayAddrs []netip.Addr

	Root string // in front of the paths below /etc and /run, for tests; empty: the host's own
}

// check is one check. gather may be nil; it fills its part of the snapshot. judge must not look at anything else.
type check struct {
	name   string
	about  string // what it looks at, in a few words
	tun    bool   // its commands name the TUN device: skipped where that name is of another device, which they would change
	gather func(context.Context, *snapshot)
	judge  func(*snapshot) Result
	fix    func(context.Context, *snapshot) ([]string, error) // nil: nothing is safe
}

// Names lists the checks in order, each with what it looks at.
func Names() [][2]string {
	var out [][2]string
	for _, c := range checks() {
		out = append(out, [2]string{c.name, c.about})
	}
	return out
}

// Run runs the checks. Its only error is a name of a check that is none: what cannot be read is a result.
func Run(ctx context.Context, o Options) (Report, error) {
	all := checks()
	for _, name := range o.Checks {
		if !slices.ContainsFunc(all, func(c check) bool { return c.name == name }) {
			var names []string
			for _, c := range all {
				names = append(names, c.name)
			}
			return Report{}, fmt.Errorf("no check %q; the checks are %s", name, strings.Join(names, ", "))
		}
	}
	var r Report
	s := &snapshot{Options: o}
	s.askAgent(ctx)
	s.gatherTun()
	for _, c := range all {
		if len(o.Checks) > 0 && !slices.Contains(o.Checks, c.name) {
			continue
		}
		r.add(c.run(ctx, s))
	}
	return r, nil
}

func (r *Report) add(one Result) {
	if one.Findings == nil {
		one.Findings = []Finding{} // [] in JSON
	}
	if one.Fixed == nil {
		one.Fixed = []string{}
	}
	r.Results = append(r.Results, one)
	switch one.State {
	case OK:
		r.OK++
	case Warning:
		r.Warnings++
	case Failed:
		r.Failed++
	case Skipped:
		r.Skipped++
	}
}

// run gathers, judges, and where it is asked for and something is wrong, mends and looks again.
func (c check) run(ctx context.Context, s *snapshot) Result {
	if c.tun && s.tun.others() {
		r := skip("device %s is not Tulle's: see `tulle doctor tun`", s.Tun)
		r.Check = c.name
		return r
	}
	look := func() Result {
		if c.gather != nil {
			c.gather(ctx, s)
		}
		r := c.judge(s)
		r.Check = c.name
		return r
	}
	r := look()
	if !s.Fix || c.fix == nil || len(r.Findings) == 0 {
		return r
	}
	done, err := c.fix(ctx, s)
	if len(done) > 0 {
		r = look()
		r.Fixed = done
	}
	if err != nil {
		r.Findings = append(r.Findings, Finding{State: Failed, What: "--fix: " + err.Error(), Remedy: "run the command as root"})
		r.State = Failed
	}
	return r
}

// skip is the result of a check that cannot be done.
func skip(format string, args ...any) Result {
	return Result{State: Skipped, Seen: fmt.Sprintf(format, args...)}
}

// result is that of a check with findings; seen is its evidence.
func result(seen string, findings ...Finding) Result {
	r := Result{State: OK, Seen: seen, Findings: findings}
	for _, f := range findings {
		if f.State == Failed {
			r.State = Failed
		} else if r.State == OK {
			r.State = f.State
		}
	}
	return r
}

// unread is the finding that something could not be read.
func unread(err error) []Finding {
	if err == nil {
		return nil
	}
	return []Finding{{State: Warning, What: "not looked at: " + err.Error(), Remedy: "run the doctor as root"}}
}

func join[T any](list []T, sep string) string {
	var out []string
	for _, v := range list {
		out = append(out, fmt.Sprint(v))
	}
	return strings.Join(out, sep)
}
