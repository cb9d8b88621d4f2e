package membership

import (
	"testing"
	"time"
)

// A seed that starts late and comes in by another member has answered, without being tried again: a node that waits for
// all its seeds would wait for the next round otherwise.
func TestSeedThatCameByAnotherWay(t *testing.T) {
	leakCheck(t)
	a, b := testAddr(), testAddr()
	slow := func(c *Config) { c.pace.heal, c.pace.healSlow = time.Hour, time.Hour }
	first := launch(t, "first", seeds(a, b), slow)
	eventually(t, "both seeds are silent", func() bool {
		for _, s := range first.Seeds() {
			if s.Reason == "" {
				return false
			}
		}
		return true
	})
	launch(t, "a", at(a), seeds(first.addr))
	launch(t, "b", at(b), seeds(a))
	eventually(t, "both seeds count as answering", func() bool {
		for _, s := range first.Seeds() {
			if s.Reason != "" {
				return false
			}
		}
		return true
	})
}
