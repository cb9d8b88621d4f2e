package result

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"time"
)

// Format and Version identify a stored run. Version changes when a reader of the old version would misread the new one.
const (
	Format  = "tulle-bench"
	Version = 1
)

// maxFile is the largest stored run that Read accepts, in bytes.
const maxFile = 256 << 20

// Run is one run of a benchmark.
type Run struct {
	Format      string    `json:"format"`
	Version     int       `json:"version"`
	Kind        string    `json:"kind"`  // Lab or Pair
	Tulle       string    `json:"tulle"` // version of the program
	Started     time.Time `json:"started"`
	Seconds     float64   `json:"seconds"`               // of the whole run
	Interrupted bool      `json:"interrupted,omitempty"` // ended before the last round; what was measured is complete rounds
	Machines    []Machine `json:"machines"`              // one, or the two ends
	Rounds      int       `json:"rounds"`                // that were asked for
	Duration    float64   `json:"duration_s"`            // counted time of each measure
	Warm        float64   `json:"warm_up_s"`
	Trial       float64   `json:"udp_trial_s"`
	MTU         int       `json:"mtu"`            // of the underlay in a lab, found between two ends; bytes
	Wire        string    `json:"wire,omitempty"` // of a lab
	Family      string    `json:"family"`         // IPv4 or IPv6
	// References are the modes that the others are compared with, the most important first.
	References []string `json:"references,omitempty"`
	// Warnings are reasons not to trust figures.
	Warnings []string `json:"warnings"`
	Notes    []string `json:"notes"` // on the method
	// Limits say what the run held back, so that figures are lower than what the network could do.
	Limits []string `json:"limits,omitempty"`
	// Asked are the measures that the run set out to take of each mode, by the keys of their main metrics. Older runs do not have it.
	Asked   []string `json:"asked,omitempty"`
	Metrics []Metric `json:"metrics"`
	Modes   []Mode   `json:"modes"`
	Ratios  []Ratio  `json:"ratios,omitempty"` // of the modes to the references, round by round
	Targets []Target `json:"targets,omitempty"`
	// Others is the share of the machine's CPU time that other processes used just before each round, without traffic.
	Others Spread `json:"others_cpu_share"`
	// Steal is the share of the machine's CPU time that the hypervisor took during the TCP measures.
	Steal Spread `json:"steal_share"`

	mains map[string]string // the main metric of the measure that gave a metric, by key
}

// The kinds of runs.
const (
	Lab  = "lab"  // modes side by side, in network namespaces of one machine
	Pair = "pair" // one path between two ends, or several that lead to the same one
)

// Machine describes one end.
type Machine struct {
	End        string   `json:"end,omitempty"` // "from", "to", or "" for both
	Kernel     string   `json:"kernel"`
	CPUs       int      `json:"cpus"`                // online, in the machine
	Usable     int      `json:"cpus_usable"`         // by this process, by its affinity
	Quota      float64  `json:"cpu_quota,omitempty"` // of its control group, in CPUs; 0: none
	CPU        string   `json:"cpu"`                 // model name
	Arch       string   `json:"arch"`
	Go         string   `json:"go"`
	Tulle      string   `json:"tulle"`
	WireGuard  string   `json:"wireguard_go,omitempty"` // version of the module
	Congestion string   `json:"tcp_congestion_control,omitempty"`
	Interface  string   `json:"interface,omitempty"` // that has the end's address
	LinkMTU    int      `json:"link_mtu,omitempty"`  // of Interface
	Offloads   []string `json:"offloads,omitempty"`  // of Interface, as ethtool names them, those that are on
	Affinity   string   `json:"affinity,omitempty"`  // where the measuring threads ran
	Awake      string   `json:"awake,omitempty"`     // whether CPUs were kept from halting
	Buffer     int      `json:"udp_buffer,omitempty"`
}

// Metric is a quantity with one value per round.
type Metric struct {
	Key    string `json:"key"`
	Title  string `json:"title"`
	Unit   string `json:"unit"`
	Higher bool   `json:"higher_is_better"`
	Group  string `json:"group"` // the table or plot it belongs to
}

// Mode is one way to connect two pods, and what was found for it. A run of kind Pair has one, or one for each path.
type Mode struct {
	Name    string            `json:"name"`
	What    string            `json:"what"`
	Tulle   bool              `json:"tulle,omitempty"`   // the mode is one of Tulle
	Wiring  string            `json:"wiring,omitempty"`  // of the hosts: "" or OneSubnet
	Missing string            `json:"missing,omitempty"` // why the mode could not be measured at all
	Lacking bool              `json:"lacking,omitempty"` // this machine does not support the mode: Missing is no failure
	MTU     int               `json:"mtu,omitempty"`
	Errors  []string          `json:"errors,omitempty"` // measures that failed
	Summary map[string]Spread `json:"summary,omitempty"`
	Rounds  []Round           `json:"rounds,omitempty"`
}

// OneSubnet is the wiring of hosts that have no router between them.
const OneSubnet = "one subnet"

// Round is all that one round found for one mode. Measures that failed are missing.
type Round struct {
	Order   int                `json:"order"`  // place of the mode within the round, from 0
	Values  map[string]float64 `json:"values"` // by Metric.Key; computed from the fields below
	TCP     []TCP              `json:"tcp,omitempty"`
	Latency []Latency          `json:"latency,omitempty"`
	UDP     []RateSearch       `json:"udp,omitempty"`
	Floods  []Flood            `json:"floods,omitempty"`
	// Breakdown is where the time of packets goes inside the agents, for several kinds of traffic.
	Breakdown []Breakdown `json:"breakdown,omitempty"`
	RSS       uint64      `json:"rss_bytes,omitempty"` // of the largest process of the tunnel
	// Crossing is what went through a lab's router while TCP was measured.
	Crossing Crossing `json:"crossing,omitzero"`
}

// CPUUse is the CPU time of a period, in seconds. Busy is the CPU time of the whole machine, or of both, with interrupts
// and softirqs, without the time of unrelated processes.
type CPUUse struct {
	Busy    float64 `json:"busy_s"`
	Others  float64 `json:"others_s"`  // of processes other than this one and the tunnel's; not part of Busy
	Steal   float64 `json:"steal_s"`   // taken by the hypervisor; not part of Busy
	Agents  float64 `json:"agents_s"`  // part of Busy: the tunnel's own processes
	SoftIRQ float64 `json:"softirq_s"` // part of Busy, sampled by the kernel's tick
}

// Plus is the use of two machines.
func (u CPUUse) Plus(v CPUUse) CPUUse {
	return CPUUse{u.Busy + v.Busy, u.Others + v.Others, u.Steal + v.Steal, u.Agents + v.Agents, u.SoftIRQ + v.SoftIRQ}
}

// TCP is the result for TCP streams from one end to the other, counted by the receivers.
type TCP struct {
	Streams     int     `json:"streams"`
	Bytes       int64   `json:"bytes"` // in the counted time
	Seconds     float64 `json:"seconds"`
	Gbps        float64 `json:"gbps"`        // 10^9 bits of payload per second
	Retransmits uint32  `json:"retransmits"` // segments, over the whole lifetime of the streams
	CPU         CPUUse  `json:"cpu"`         // in the counted time
}

// The kinds of Latency.
const (
	PingPong = "ping-pong" // UDP; each datagram is sent after the previous one was answered; half of the round trip
	OpenLoop = "open-loop" // UDP at a constant rate; half of the time from when a datagram was due to its answer
	Loaded   = "loaded"    // as PingPong, with a pause after each, while several TCP streams run
	RR       = "tcp-rr"    // TCP; request and response on one connection; the whole round trip
	Nagle    = "tcp-nagle" // as RR, but the request is written in two parts without TCP_NODELAY
	CRR      = "tcp-crr"   // TCP; connect, request, response, close; the whole time
)

// Latency is the distribution of the times of one measure.
type Latency struct {
	Kind    string  `json:"kind"`
	Payload int     `json:"payload"`       // bytes of payload each way
	Pinned  bool    `json:"pinned"`        // each side had its own CPUs
	Offered float64 `json:"offered_per_s"` // of OpenLoop, and of others that were held to a rate; else 0
	Seconds float64 `json:"seconds"`       // counted
	Answers int64   `json:"answers"`
	Lost    int64   `json:"lost"` // not answered in time
	// Times are the whole round trips or transactions in nanoseconds.
	Times *Histogram `json:"times"`
	// Waking is the part of Times after the answer had reached this end's kernel, by its timestamp (SO_TIMESTAMP, socket(7)):
	// until the receiver ran. nil where there are none.
	Waking *Histogram `json:"waking,omitempty"`
}

// scale is the factor from a time in nanoseconds to the microseconds that are reported.
func (l *Latency) scale() float64 {
	if l.Kind == PingPong || l.Kind == OpenLoop || l.Kind == Loaded {
		return 0.5e-3
	}
	return 1e-3
}

// At is a quantile in microseconds, as reported: half of a datagram's round trip, or the whole of a transaction.
// percent is between 0 and 100.
func (l *Latency) At(percent float64) float64 {
	return l.scale() * float64(l.Times.ValueAtQuantile(percent))
}

// Trial is one run with UDP datagrams at a constant rate.
type Trial struct {
	Offered   float64 `json:"offered_pps"` // requested datagrams per second; 0: unpaced
	Sent      uint64  `json:"sent"`
	Received  uint64  `json:"received"`
	Reordered uint64  `json:"reordered"`  // received after a datagram that was sent later
	Seconds   float64 `json:"seconds"`    // of sending
	Arriving  float64 `json:"arriving_s"` // from the first to the last that was received
	CPU       *CPUUse `json:"cpu,omitempty"`
}

// Loss is the share of the sent datagrams that did not arrive.
func (t *Trial) Loss() float64 {
	if t.Sent == 0 {
		return 0
	}
	return 1 - float64(min(t.Received, t.Sent))/float64(t.Sent)
}

// SentRate and Rate are datagrams per second, sent and received. Rate includes the time in which queued datagrams arrive
// after the sender has stopped, so that long queues do not make a tunnel look faster.
func (t *Trial) SentRate() float64 { return float64(t.Sent) / t.Seconds }

// Rate: see SentRate. Between n arrivals there are n-1 gaps: where few arrive, as over a slow path, one more would make it look faster than it is.
func (t *Trial) Rate() float64 {
	rate := float64(t.Received) / t.Seconds
	if t.Arriving > 0 {
		rate = min(rate, (float64(t.Received)-1)/t.Arriving)
	}
	return rate
}

// RateSearch is the outcome of a search for the highest rate without loss. Best.Received is 0 if no rate held.
type RateSearch struct {
	Payload int     `json:"payload"`       // bytes of UDP payload
	Full    bool    `json:"full,omitzero"` // the payload fills the path MTU
	Best    Trial   `json:"best"`          // the median of the trials that confirmed the rate
	Trials  []Trial `json:"trials"`
}

// Flood is UDP sent as fast as the sender can, in one or more flows.
type Flood struct {
	Flows   int   `json:"flows"`
	Payload int   `json:"payload"`
	Trial   Trial `json:"trial"` // the sum over the flows
}

// Crossing is what went through a router from one host to another, in frames as the links count them: a super-packet is
// one.
type Crossing struct {
	InFrames  uint64 `json:"in_frames"`
	InBytes   uint64 `json:"in_bytes"`
	OutFrames uint64 `json:"out_frames"`
	OutBytes  uint64 `json:"out_bytes"`
}

// Plus is what went through in two spans of time.
func (c Crossing) Plus(d Crossing) Crossing {
	return Crossing{c.InFrames + d.InFrames, c.InBytes + d.InBytes, c.OutFrames + d.OutFrames, c.OutBytes + d.OutBytes}
}

// Cut is how many frames went out for one that came in.
func (c Crossing) Cut() float64 { return float64(c.OutFrames) / float64(max(c.InFrames, 1)) }

// FrameBytes is the mean length of the frames that came in.
func (c Crossing) FrameBytes() float64 { return float64(c.InBytes) / float64(max(c.InFrames, 1)) }

// Crossing is what went through the mode's router in all rounds of TCP.
func (m *Mode) Crossing() (c Crossing) {
	for _, d := range m.Rounds {
		c = c.Plus(d.Crossing)
	}
	return c
}

// Failed reports whether a mode or measure failed that this machine supports.
func (r *Run) Failed() bool {
	return slices.ContainsFunc(r.Modes, func(m Mode) bool { return m.Missing != "" && !m.Lacking || len(m.Errors) > 0 })
}

// Mode returns a measured mode by its name, or nil.
func (r *Run) Mode(name string) *Mode {
	for i := range r.Modes {
		if r.Modes[i].Name == name && r.Modes[i].Missing == "" {
			return &r.Modes[i]
		}
	}
	return nil
}

// WriteJSON writes the run as Read reads it.
func (r *Run) WriteJSON(w io.Writer) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", " ")
	enc.SetEscapeHTML(false)
	return enc.Encode(r)
}

// Read reads a stored run and computes again what follows from its raw values.
func Read(in io.Reader) (*Run, error) {
	b, err := io.ReadAll(io.LimitReader(in, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxFile {
		return nil, fmt.Errorf("more than %d bytes: this is no result of tulle bench", maxFile)
	}
	var head struct {
		Format  string `json:"format"`
		Version int    `json:"version"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return nil, fmt.Errorf("this is no JSON result of tulle bench (made with -o json): %w", err)
	}
	if head.Format != Format {
		return nil, fmt.Errorf("format %q: want %q, as tulle bench writes with -o json", head.Format, Format)
	}
	if head.Version != Version {
		return nil, fmt.Errorf("version %d of the format: this program reads version %d; use the program that wrote it", head.Version, Version)
	}
	var r Run
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, err
	}
	r.Summarise()
	return &r, nil
}
