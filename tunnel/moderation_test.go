package tunnel

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/underlay"
)

func TestModeration(t *testing.T) {
	const soon, late = soonWoken - 1, soonWoken
	type step struct {
		wait     time.Duration // before the look; negative: the look follows a pause
		messages int
		pause    bool
	}
	const paused = -1
	for name, steps := range map[string][]step{
		"one at a time, to and fro": {{late, 1, false}, {late, 1, false}, {late, 1, false}, {late, 1, false}, {late, 1, false}, {late, 1, false}},
		"a short burst":             {{late, 1, false}, {soon, 1, false}, {soon, 1, false}, {soon, 1, false}, {late, 1, false}, {soon, 1, false}},
		"woken for each": {
			{late, 1, false}, {soon, 1, false}, {soon, 1, false}, {soon, 1, false}, {soon, 1, true},
			{paused, 9, true}, {paused, 2, true}, {paused, 1, false}, // that pause was not worth it
			{soon, 1, false}, {soon, 1, false}, {soon, 1, false}, {soon, 1, true}, {paused, 0, false}, {late, 1, false},
		},
		"woken for nothing": {{soon, 0, false}, {soon, 0, false}, {soon, 0, false}, {soon, 0, true}, {paused, 0, false}},
	} {
		t.Run(name, func(t *testing.T) {
			var m moderation
			for i, s := range steps {
				if s.wait >= 0 {
					m.woken(s.wait)
				}
				if got := m.pause(s.messages); got != s.pause {
					t.Fatalf("step %d %+v: pause %v", i, s, got)
				}
			}
		})
	}
}

// trickle is a queue and a socket that has one message at a time, and a number of them after each pause.
type trickle struct {
	memQueue
	memSocket
	e      *Engine
	left   int // messages until the next wait or pause
	pauses int
}

func (q *trickle) take() bool {
	q.left--
	return q.left >= 0
}

func (q *trickle) Read(b []byte) (int, error) {
	if !q.take() {
		return 0, sys.ErrAgain
	}
	return q.memQueue.Read(b)
}

func (q *trickle) Recv(*underlay.RecvBatch) (int, error) {
	if !q.take() {
		return 0, sys.ErrAgain
	}
	return 1, nil
}

func (q *trickle) Wait() (time.Duration, error) {
	if q.e.stopping.Load() {
		return 0, sys.ErrWoken
	}
	q.left = 1
	return 0, nil
}

func (q *trickle) WaitRecv(*underlay.RecvBatch) (int, time.Duration, error) {
	waited, err := q.Wait()
	return 0, waited, err
}

func (q *trickle) Pause(d time.Duration) {
	time.Sleep(d)
	q.left = 8
	if q.pauses++; q.pauses == 1000 {
		q.e.stopping.Store(true)
	}
}

func (q *trickle) Wake() {}

// TestWorkersPause lets both workers be woken for one packet again and again, and stops them in the midst of their pauses.
func TestWorkersPause(t *testing.T) {
	for name, run := range map[string]func(*memRig, *trickle) error{
		"tx": func(r *memRig, q *trickle) error { r.tx.queue = q; return r.tx.run() },
		"rx": func(r *memRig, q *trickle) error { r.rx.sock = q; return r.rx.run() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newMemRig(encap.UDP)
				q := &trickle{e: r.e}
				q.packets = [][]byte{make([]byte, 64)}
				if err := run(r, q); err != nil {
					t.Fatal(err)
				}
				if q.pauses != 1000 {
					t.Errorf("%d pauses, and it ended; want 1000", q.pauses)
				}
			})
		})
	}
}
