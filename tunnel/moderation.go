package tunnel

import "time"

// The figures of moderation.
const (
	// soonWoken is how short a wait must be to count as one that only cost wake-ups. It is less than a round trip between
	// two hosts takes, so that a conversation of one packet at a time never counts.
	soonWoken = 20 * time.Microsecond
	// soonWokenTimes is how many such waits in a row begin pausing.
	soonWokenTimes = 4
	// pauseTime is how long a pause is. The kernel's timer slack adds up to 50 µs (PR_SET_TIMERSLACK).
	pauseTime = 50 * time.Microsecond
	// worthAPause is how many messages a pause has to bring for another one.
	worthAPause = 2
	// aloneTimes is how many looks in a row that brought one message each make a conversation of one packet at a time.
	aloneTimes = 2
)

// moderation tells a worker when to pause instead of waiting for the next message. A worker that is faster than its sender
// finds one packet, forwards it alone and is woken again for the next: waking costs the sender's CPU more than sending,
// and packets that come singly are not joined. Network cards moderate their interrupts for the same reason (ethtool(8),
// adaptive-rx). The zero value is ready.
type moderation struct {
	soon    int // waits in a row that were over soon
	single  int // looks in a row that brought one message, each after a wait that was not over soon
	pausing bool
}

// woken is to be called after a wait of that length.
func (m *moderation) woken(waited time.Duration) {
	if waited < soonWoken {
		m.soon++
		m.single = 0
	} else {
		m.soon = 0
	}
}

// alone reports whether the next message probably comes alone, so that looking for a second one before it is forwarded would only delay it.
func (m *moderation) alone() bool { return m.single >= aloneTimes }

// pause reports whether to pause for pauseTime and then to look again, after a look that brought that many messages.
func (m *moderation) pause(messages int) bool {
	if messages == 1 && !m.pausing {
		m.single++
	} else {
		m.single = 0
	}
	switch {
	case m.pausing && messages < worthAPause:
		m.pausing, m.soon = false, 0
	case m.soon >= soonWokenTimes:
		m.pausing = true
	}
	return m.pausing
}
