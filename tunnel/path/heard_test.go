package path

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/tulle-net/tulle/tunnel/encap"
)

// Two hosts of which one inner family is filtered both ways hear each other's probes, and answer none. They do not have each other
// probe without end.
func TestHeardIsNotEchoed(t *testing.T) {
	now := time.Unix(1000, 0)
	var hosts [2]*Schedule
	for i := range hosts {
		hosts[i] = NewSchedule(rand.New(rand.NewPCG(uint64(i), 2)))
		hosts[i].SetPeers(now, map[string][]Candidate{far: {{Mode: encap.IPIP, Max: 1480, Inner: [2]string{"IP protocol 4", "IP protocol 41"}}}})
	}
	sent := 0
	for second := range 600 {
		for range 100 {
			for i, s := range hosts {
				for _, d := range s.Look(now).Probes {
					if second >= 540 {
						sent++
					}
					if !d.Six { // passes, and so does its answer
						hosts[1-i].Heard(now, far, d.Mode, false)
						s.Answered(now, far, d.Mode, d.Nonce, d.Size)
					}
				}
			}
			now = now.Add(10 * time.Millisecond)
		}
	}
	// Each host sends one in each family every 10 s, and one more because it hears one.
	if sent > 2*2*6*3 {
		t.Errorf("%d probes in the last of ten minutes", sent)
	}
}
