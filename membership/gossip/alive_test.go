package gossip

import (
	"testing"
	"testing/synctest"
)

// blocked is a handler whose Members does not return until it is freed.
type blocked struct {
	Handler
	free chan struct{}
}

func (b blocked) Members() { <-b.free }

// Delivery that is idle gives signs of life; while a method of the handler hangs it gives none.
func TestStalled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := blocked{free: make(chan struct{})}
		g := &Gossip{cfg: Config{Handler: h}, ready: make(chan struct{}), inbox: newInbox()}
		if g.Stalled() {
			t.Error("stalled before it listens")
		}
		close(g.ready)
		go g.dispatch(t.Context())
		for range 3 {
			if g.Stalled() {
				t.Error("idle, and counts as stalled")
			}
			synctest.Wait()
		}
		g.inbox.membersChanged()
		synctest.Wait()
		g.Stalled() // the question that is not answered
		synctest.Wait()
		for range 3 {
			if !g.Stalled() {
				t.Error("the handler hangs, and nobody notices")
			}
			synctest.Wait()
		}
		close(h.free)
		synctest.Wait()
		if g.Stalled() {
			t.Error("it goes on, and still counts as stalled")
		}
	})
}
