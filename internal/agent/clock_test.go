package agent

import (
	"log/slog"
	"testing"
	"time"

	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/path"
)

// The answer to a probe tells the peer's clock. That of an older version does not, nor does one that nobody has asked for.
func TestClockOfPeer(t *testing.T) {
	here, there := newProber(slog.New(slog.DiscardHandler)), newProber(slog.New(slog.DiscardHandler))
	there.send = func(_ string, mode encap.Mode, six bool, payload []byte, size int) error {
		here.received("b", mode, six, payload, size)
		return nil
	}
	here.setPeers(time.Now(), map[string][]path.Candidate{"b": {{Mode: encap.UDP, Max: 1472}}})
	var nonces []uint64
	for _, due := range here.paths.Look(time.Now()).Probes {
		nonces = append(nonces, due.Nonce)
	}
	if len(nonces) != 1 {
		t.Fatalf("%d probes are due", len(nonces))
	}
	const ahead = 3 * time.Hour
	reply := func(nonce uint64, clock time.Time) []byte {
		return appendClock(appendProbe(nil, probeReply, nonce, 64), clock)
	}
	here.received("b", encap.UDP, false, reply(nonces[0]+1, time.Now().Add(ahead)), 64)
	if got := here.skew("b"); got != 0 {
		t.Errorf("a clock that nobody has asked for is ahead by %v", got)
	}
	here.pings[7] = make(chan answer, 1)
	here.received("b", encap.UDP, false, appendProbe(nil, probeReply, 7, 64), 64)
	if got := here.skew("b"); got != 0 {
		t.Errorf("a clock of %v out of nothing", got)
	}
	there.received("a", encap.UDP, false, appendProbe(nil, probeRequest, nonces[0], 0), 64)
	if got := here.skew("b"); got > 0 || got < -10*time.Second {
		t.Errorf("the same clock is ahead by %v", got)
	}
	here.received("b", encap.UDP, false, reply(7, time.Now().Add(ahead)), 64)
	if got := here.skew("b"); got > ahead || got < ahead-10*time.Second {
		t.Errorf("a clock that is ahead by %v is ahead by %v", ahead, got)
	}
	here.received("stranger", encap.UDP, false, reply(7, time.Now().Add(ahead)), 64)
	if got := here.skew("stranger"); got != 0 {
		t.Errorf("a stranger's clock was noted: %v", got)
	}
	short := reply(7, time.Now())
	here.received("b", encap.UDP, false, short[:len(short)-1], 64)
	here.setPeers(time.Now(), nil)
	if len(here.skews) != 0 {
		t.Errorf("clocks of peers that are gone: %v", here.skews)
	}
}
