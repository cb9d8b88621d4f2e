package api

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"slices"
	"time"
)

// BenchRequest asks for a benchmark of the paths to another member.
type BenchRequest struct {
	Node  string   `json:"node"`            // as PingRequest's Node
	Modes []string `json:"modes,omitempty"` // of BenchModes; empty: all
	Six   bool     `json:"six,omitempty"`   // IPv6 packets; where pods have no IPv4, also without it
}

// BenchModes are the ways to another member that a benchmark compares.
var BenchModes = []string{"direct", "udp", "vxlan", "ipip"}

// BenchEvent is a line of a benchmark's answer. The first one has Node and Ways; the paths stay for as long as the caller
// reads. Later ones only say that all is well, until the last one has Ended.
type BenchEvent struct {
	Node    NodeRef    `json:"node,omitzero"`
	Version string     `json:"version,omitempty"` // of the other member's program
	Ways    []BenchWay `json:"ways,omitempty"`
	Token   string     `json:"token,omitempty"` // that the other end wants
	Mbps    int        `json:"mbps,omitempty"`  // the most that may be sent, in Mb/s of payload
	Until   time.Time  `json:"until,omitzero"`  // when the other end ends it
	Ended   string     `json:"ended,omitempty"` // why it is over
}

// BenchWay is one way to the other member: what is sent from From to To takes it, and the answers come back by it.
type BenchWay struct {
	Mode    string         `json:"mode"`
	From    netip.Addr     `json:"from,omitzero"`
	To      netip.AddrPort `json:"to,omitzero"`
	MTU     int            `json:"mtu,omitempty"`     // bytes of the inner packet
	Active  bool           `json:"active,omitempty"`  // pods' packets take it at this time
	Missing string         `json:"missing,omitempty"` // why it cannot be measured
}

func (r BenchRequest) validate() error {
	for i, m := range r.Modes {
		if !slices.Contains(BenchModes, m) {
			return usage("mode %q: want some of %v", m, BenchModes)
		}
		if slices.Contains(r.Modes[:i], m) {
			return usage("mode %q is named twice", m)
		}
	}
	return checkText("node", r.Node, MaxNameLen, false)
}

// BenchServe is what an agent tells the process that answers the measuring traffic: one JSON object on its standard input,
// whose end is the process's end. It answers with one JSON object, BenchServing.
type BenchServe struct {
	Addresses []netip.Addr  `json:"addresses"`
	Token     string        `json:"token"`
	Mbps      int           `json:"mbps"`
	MaxTime   time.Duration `json:"max_time"` // nanoseconds
}

// BenchServing has the ports that a BenchServe listens on, in the order of its addresses.
type BenchServing struct {
	Ports []uint16 `json:"ports,omitempty"`
	Error string   `json:"error,omitempty"`
}

// bench answers with one JSON object a line until the caller closes the connection.
func (s *Server) bench(w http.ResponseWriter, r *http.Request) {
	var req BenchRequest
	err := decode(r.Body, &req)
	if err == nil {
		err = req.validate()
	}
	if err != nil {
		fail(w, err)
		return
	}
	stream(w, func(send func(BenchEvent) error) error { return s.backend.Bench(r.Context(), req, send) })
}

// Bench asks for a benchmark and calls each with its events, the first of which has the paths, until ctx ends (nil), or each
// returns an error, which Bench then returns. The paths are gone soon after Bench has returned.
func (c *Client) Bench(ctx context.Context, req BenchRequest, each func(BenchEvent) error) error {
	ended := Errorf(CodeNoAgent, "the agent at %s ended the benchmark", c.socket).WithRemedy("it may be restarting: see `systemctl status tulle`")
	err := events(ctx, c, "/v1/bench", req, ended, each)
	if e, ok := errors.AsType[*Error](err); ok && e.Code == CodeNotFound && e.Message == unknownCall("POST", "/v1/bench") {
		return Errorf(CodeRefused, "this node's agent is of an older version, which has no benchmarks between members").WithRemedy("restart the agent")
	}
	return err
}
