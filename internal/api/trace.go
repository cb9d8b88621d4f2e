package api

import "time"

// TraceRequest asks where the time of packets goes in the agent.
type TraceRequest struct {
	Duration time.Duration `json:"duration_ns"`     // at most MaxTrace
	Every    uint32        `json:"every,omitempty"` // one of so many batches of each worker is timed; 0 means DefaultTraceEvery
}

// The limits and the default of a TraceRequest.
const (
	MaxTrace          = 5 * time.Second
	DefaultTraceEvery = 8
)

func (r TraceRequest) validate() error {
	if r.Duration <= 0 || r.Duration > MaxTrace {
		return usage("a trace of %v: want more than 0 and at most %v", r.Duration, MaxTrace)
	}
	return nil
}

// Trace is what a sample of packets took in the agent, in both directions. Packets are counted as the underlay carries them.
// Waiting is not in it, nor is what the kernel does outside the agent's system calls.
type Trace struct {
	Sent        uint64       `json:"sent"`        // sampled packets from the TUN to the underlay
	Received    uint64       `json:"received"`    // sampled packets from the underlay to the TUN
	Batches     uint64       `json:"batches"`     // in which they were
	Interrupted uint64       `json:"interrupted"` // times left out, because the thread had lost its CPU
	Stages      []TraceStage `json:"stages"`      // in the order of a packet's way from one node to another
}

// TraceStage is one step: read, lookup, encapsulate, send, receive, decapsulate, write.
type TraceStage struct {
	Name      string        `json:"name"`
	Time      time.Duration `json:"time_ns"`       // of all sampled packets
	PerPacket float64       `json:"per_packet_ns"` // of the stage's direction; 0 if there was none
}
