package tunnel

import (
	"fmt"
	"sync/atomic"
)

// sign is a worker's answer to Engine.Stalled: the number of the last question that it has seen.
type sign struct{ seen atomic.Uint64 }

// live gives the sign of life that was last asked for. A worker calls it whenever it is woken, and with each batch.
func (s *sign) live(e *Engine) {
	if asked := e.asked.Load(); asked != s.seen.Load() {
		s.seen.Store(asked)
	}
}

// Stalled asks each worker for a sign of life, and names those that have not given the one that the last call asked for. An idle
// worker is woken for it, one under load gives it with its next batch; one that is stuck gives none. Before Run there is
// nobody to ask. One goroutine at a time may call it, at intervals that are long compared with a batch: seconds.
func (e *Engine) Stalled() (names []string) {
	if !e.running.Load() {
		return nil
	}
	asked := e.asked.Load()
	for i, w := range e.tx {
		if w.seen.Load() != asked {
			names = append(names, fmt.Sprintf("reader of queue %d of %s", i, e.cfg.Device.Name()))
		}
	}
	for _, w := range e.rx {
		if w.seen.Load() != asked {
			names = append(names, fmt.Sprintf("receiver of %s on %v", w.mode, w.at))
		}
	}
	e.asked.Add(1)
	e.wake()
	return names
}

// wake ends the waits of all workers.
func (e *Engine) wake() {
	for _, w := range e.tx {
		w.queue.Wake()
	}
	for _, w := range e.rx {
		w.sock.Wake()
	}
}
