package result

import (
	"slices"
	"strings"
)

// The traffic of a Breakdown.
const (
	TraceTCP  = "tcp"       // one stream
	TraceUDP  = "udp64"     // datagrams of 64 bytes, as fast as the sender can
	TracePing = "ping-pong" // datagrams of 64 bytes, one at a time; each side on its own CPUs
)

// FirstReceiving is the first stage of the agent that receives; those before it are of the one that sends.
const FirstReceiving = "receive"

// Breakdown is where the time of packets goes inside the two agents between the ends, measured on a sample of packets.
type Breakdown struct {
	Traffic     string      `json:"traffic"`     // TraceTCP, TraceUDP or TracePing
	Sent        uint64      `json:"sent"`        // packets of the sample, at the sending agent; as the underlay carries them
	Received    uint64      `json:"received"`    // at the receiving agent
	Interrupted uint64      `json:"interrupted"` // times left out, because the agent's thread had lost its CPU
	Stages      []StageTime `json:"stages"`      // in the order of a packet's way
}

// StageTime is the mean time of a stage for each packet.
type StageTime struct {
	Name        string  `json:"name"`
	Nanoseconds float64 `json:"ns"`
}

// stageTitles are the names of stages for people.
var stageTitles = map[string]string{"read": "TUN read", "write": "TUN write"}

// Title is the stage's name for people.
func (s StageTime) Title() string {
	if t, ok := stageTitles[s.Name]; ok {
		return t
	}
	return s.Name
}

// trafficTitles are the kinds of traffic for people.
var trafficTitles = map[string]string{TraceTCP: "TCP 1 stream", TraceUDP: "UDP 64 B at full rate", TracePing: "ping-pong 64 B"}

// Title is the kind of traffic for people.
func (b *Breakdown) Title() string { return trafficTitles[b.Traffic] }

// breakdownGroup begins the groups of metrics of a Breakdown.
const breakdownGroup = "time in the agents"

// key is the beginning of the keys of its metrics.
func (b *Breakdown) key() string { return "trace_" + strings.ReplaceAll(b.Traffic, "-", "_") + "_" }

func (b *Breakdown) derive(f *found) {
	sum, title := 0.0, b.Title()
	key, group := b.key(), breakdownGroup+", "+title
	for _, s := range b.Stages {
		sum += s.Nanoseconds
		f.add(Metric{key + s.Name + "_ns", title + ": " + s.Title(), "ns", false, group}, s.Nanoseconds)
	}
	f.add(Metric{key + "sum_ns", title + ": sum", "ns", false, group}, sum)
}

// explains reports whether a metric only explains others: it is no measure of its own to compare.
func (m Metric) explains() bool { return strings.HasPrefix(m.Group, breakdownGroup) }

// Breakdowns is the median over the rounds of each stage, for each kind of traffic that was traced.
func (m *Mode) Breakdowns() (out []Breakdown) {
	for _, r := range m.Rounds {
		for _, b := range r.Breakdown {
			if slices.ContainsFunc(out, func(o Breakdown) bool { return o.Traffic == b.Traffic }) {
				continue
			}
			medians := Breakdown{Traffic: b.Traffic}
			for _, s := range b.Stages {
				medians.Stages = append(medians.Stages, StageTime{s.Name, m.Summary[b.key()+s.Name+"_ns"].Median})
			}
			out = append(out, medians)
		}
	}
	return out
}
