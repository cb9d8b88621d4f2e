package agent

import (
	"log/slog"
	"testing"
	"time"

	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/path"
)

// The answer to a probe tells the peer's clock, and that of an older version does not.
func TestClockOfPeer(t *testing.T) {
	here, there := newProber(slog.New(slog.DiscardHandler)), newProber(slog.New(slog.DiscardHandler))
	there.send = func(_ string, mode encap.Mode, payload []byte, size int) error {
		here.received("b", mode, payload, size)
		return nil
	}
	here.setPeers(time.Now(), map[string][]path.Candidate{"b": {{Mode: encap.UDP, Max: 1472}}})
	here.received("b", encap.UDP, appendProbe(nil, probeReply, 7, 64), 64)
	if got := here.skew("b"); got != 0 {
		t.Errorf("a clock of %v out of nothing", got)
	}
	there.received("a", encap.UDP, appendProbe(nil, probeRequest, 7, 0), 64)
	if got := here.skew("b"); got > 0 || got < -10*time.Second {
		t.Errorf("the same clock is ahead by %v", got)
	}
	const ahead = 3 * time.Hour
	reply := appendClock(appendProbe(nil, probeReply, 7, 64), time.Now().Add(ahead))
	here.received("b", encap.UDP, reply, 64)
	if got := here.skew("b"); got > ahead || got < ahead-10*time.Second {
		t.Errorf("a clock that is ahead by %v is ahead by %v", ahead, got)
	}
	here.received("stranger", encap.UDP, reply, 64)
	if got := here.skew("stranger"); got != 0 {
		t.Errorf("a stranger's clock was noted: %v", got)
	}
	here.received("b", encap.UDP, reply[:len(reply)-1], 64)
	here.setPeers(time.Now(), nil)
	if len(here.skews) != 0 {
		t.Errorf("clocks of peers that are gone: %v", here.skews)
	}
}
