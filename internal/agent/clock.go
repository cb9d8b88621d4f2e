package agent

import (
	"encoding/binary"
	"time"

	"golang.org/x/sys/unix"
)

// uptime is the time since the host's boot, with that in which it slept; -1 if that is not known. No change of the host's clock affects it.
func uptime() time.Duration {
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &t) != nil {
		return -1
	}
	return time.Duration(t.Nano())
}

// clockLen is the length of the clock in a reply, bytes.
const clockLen = 8

// appendClock appends this host's clock to a reply.
func appendClock(b []byte, now time.Time) []byte {
	return binary.BigEndian.AppendUint64(b, uint64(now.UnixMicro()))
}

// readClock notes how far a peer's clock is ahead. It is off by the time that the reply took, for which seconds of skew do not matter. The
// caller holds the lock.
func (p *prober) readClock(peer string, reply []byte, now time.Time) {
	if len(reply) < probeLen+clockLen {
		return
	}
	theirs := int64(binary.BigEndian.Uint64(reply[probeLen:]))
	if p.paths.Probed(peer) {
		p.skews[peer] = time.UnixMicro(theirs).Sub(now)
	}
}

// skew is how far a peer's clock is ahead of this host's; 0 if it does not tell.
func (p *prober) skew(peer string) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.skews[peer]
}
