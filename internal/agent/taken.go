package agent

import (
	"fmt"
	"time"

	"github.com/tulle-net/tulle/internal/api"
)

// taken follows what another program takes away from the host's network: once is repaired and forgotten, but where it goes on, packets are lost each
// time, and nothing else is wrong. A program that sets a host up every half a minute counts.
type taken struct {
	at    []time.Time // of the last repairs, at most takenOften of them; those of one look are one
	last  string      // what was repaired
	since time.Time   // of the first of those that are too many
}

const (
	takenOften  = 10
	takenWithin = 5 * time.Minute
	takenOver   = time.Minute // after the last one
)

// note takes over what a look at the host has repaired.
func (t *taken) note(now time.Time, repaired []string) {
	if len(repaired) == 0 {
		return
	}
	if !t.again(now) {
		t.since = time.Time{}
	}
	t.at, t.last = append(t.at, now), repaired[len(repaired)-1]
	t.at = t.at[max(0, len(t.at)-takenOften):]
	if t.since.IsZero() && t.again(now) {
		t.since = t.at[0]
	}
}

// again reports whether it goes on.
func (t *taken) again(now time.Time) bool {
	n := len(t.at)
	return n == takenOften && now.Sub(t.at[0]) <= takenWithin && now.Sub(t.at[n-1]) <= takenOver
}

// problem names it while it goes on.
func (t *taken) problem(now time.Time) (out []api.Problem) {
	if t.again(now) {
		out = append(out, api.Problem{
			What:   fmt.Sprintf("another program takes away or changes again and again what pods need on this host, and packets are lost until the agent has mended it; the last time: %s", t.last),
			Remedy: "stop what does so: the agent's log names each thing; `tulle doctor managers` looks for network managers",
			Since:  t.since, Check: api.CheckForwarding,
		})
	}
	return out
}
