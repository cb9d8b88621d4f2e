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

// Only looks in a row that bring one message each, after waits that were not over soon, make the next one be expected alone.
func TestModerationAlone(t *testing.T) {
	const soon, late = soonWoken - 1, soonWoken
	var m moderation
	for i, s := range []struct {
		wait     time.Duration
		messages int
		alone    bool // before the look
	}{
		{late, 1, false}, {late, 1, false}, {late, 1, true}, {late, 1, true}, // a conversation
		{late, 2, true}, {late, 1, false}, {late, 1, false}, {late, 1, true}, // two at once end it
		{soon, 1, false}, {late, 1, false}, {late, 1, true}, // so does one that comes soon
		{late, 0, true}, {late, 1, false}, // and a look that brings nothing
	} {
		m.woken(s.wait)
		if got := m.alone(); got != s.alone {
			t.Fatalf("step %d %+v: alone %v", i, s, got)
		}
		m.pause(s.messages)
	}
}

// A lone packet is sent before another one is looked for; a super-packet is not, and never without a conversation.
func TestLonePacketIsSentFirst(t *testing.T) {
	small := superPacket(0, 0, 1, false, 0, random(64), 1300)
	large := superPacket(0, 0, 1, true, 0, random(20000), 1300)
	for name, c := range map[string]struct {
		alone bool
		queue [][]byte
		got   int
		at    int // where the queue stands afterwards; 0: it has been found empty
	}{
		"no conversation":    {false, [][]byte{small, small}, 2, 0},
		"a lone packet":      {true, [][]byte{small}, 1, 1},
		"two after all":      {true, [][]byte{small, small}, 1, 1},
		"super-packet first": {true, [][]byte{large, small, small}, 3, 0},
	} {
		t.Run(name, func(t *testing.T) {
			r := newMemRig(encap.UDP)
			r.queue.packets = c.queue
			got, err := r.tx.drain(c.alone)
			if err != nil || got != c.got || r.queue.next != c.at {
				t.Errorf("%d packets read, %v, the queue stands at %d; want %d and %d", got, err, r.queue.next, c.got, c.at)
			}
			if r.sock.messages.Load() == 0 || r.tx.used != 0 {
				t.Errorf("%d messages sent, %d bytes kept", r.sock.messages.Load(), r.tx.used)
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

func (q *trickle) WaitRecv(*underlay.RecvBatch, int) (int, time.Duration, error) {
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
