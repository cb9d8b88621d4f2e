package api

import (
	"context"
	"net/http"
	"net/netip"
	"time"
)

// CaptureRequest selects the packets of a capture. Empty fields select everything.
type CaptureRequest struct {
	Drops   bool             `json:"drops,omitempty"`   // only dropped packets
	Points  []string         `json:"points,omitempty"`  // from-pods, to-peer, from-peer, to-pods
	Reasons []string         `json:"reasons,omitempty"` // names of drop reasons
	Peer    string           `json:"peer,omitempty"`    // as PingRequest's Node
	Pod     netip.Addr       `json:"pod,omitzero"`      // inner source or destination
	Program []BPFInstruction `json:"program,omitempty"` // classic BPF over the inner packet, link type RAW
	Snap    int              `json:"snap,omitempty"`    // bytes of each packet; 0 means all
	Rate    int              `json:"rate,omitempty"`    // packets a second; 0 means the agent's default
}

// BPFInstruction is one instruction of classic BPF (struct sock_filter of Linux).
type BPFInstruction struct {
	Op uint16 `json:"op"`
	Jt uint8  `json:"jt"`
	Jf uint8  `json:"jf"`
	K  uint32 `json:"k"`
}

// The limits of a CaptureRequest.
const (
	MaxCaptureSnap  = 65535 + 48 // bytes: the longest packet with its outer headers
	MaxCaptureRate  = 200_000    // packets a second
	MaxInstructions = 4096       // BPF_MAXINSNS
)

// CaptureEvent is a captured packet. An event without a Point only says that the capture is alive.
type CaptureEvent struct {
	Time   time.Time `json:"time"`
	Point  string    `json:"point,omitempty"`
	Reason string    `json:"reason,omitempty"` // of the drop; "" for a packet that went on
	Peer   NodeRef   `json:"peer,omitzero"`
	Path   string    `json:"path,omitempty"` // the encapsulation
	Length int       `json:"length,omitempty"`
	Data   []byte    `json:"data,omitempty"`   // base64 in JSON: an IP packet, or its beginning
	Missed uint64    `json:"missed,omitempty"` // packets that matched and are not here, so far
}

func (r CaptureRequest) validate() error {
	switch {
	case r.Snap < 0 || r.Snap > MaxCaptureSnap:
		return usage("snap %d: the limits are 0 (whole packets) and %d bytes", r.Snap, MaxCaptureSnap)
	case r.Rate < 0 || r.Rate > MaxCaptureRate:
		return usage("rate %d: the limits are 1 and %d packets a second", r.Rate, MaxCaptureRate)
	case len(r.Program) > MaxInstructions:
		return usage("a BPF program of %d instructions: the limit is %d", len(r.Program), MaxInstructions)
	case r.Pod.IsValid() && (r.Pod.Zone() != "" || r.Pod.Is4In6()):
		return usage("pod %s is not a plain IPv4 or IPv6 address", r.Pod)
	}
	return checkText("peer", r.Peer, MaxNameLen, true)
}

// capture answers with one JSON object a line until the caller closes the connection.
func (s *Server) capture(w http.ResponseWriter, r *http.Request) {
	var req CaptureRequest
	err := decode(r.Body, &req)
	if err == nil {
		err = req.validate()
	}
	if err != nil {
		fail(w, err)
		return
	}
	stream(w, func(send func(CaptureEvent) error) error { return s.backend.Capture(r.Context(), req, send) })
}

// Capture calls each with the packets of a capture until ctx ends, or each returns an error, which Capture then returns. It
// returns nil when ctx ends.
func (c *Client) Capture(ctx context.Context, req CaptureRequest, each func(CaptureEvent) error) error {
	return events(ctx, c, "/v1/capture", req, Errorf(CodeNoAgent, "the agent at %s ended the capture", c.socket).WithRemedy("it may be restarting: capture again"), each)
}
