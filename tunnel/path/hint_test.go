package path

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/tulle-net/tulle/tunnel/mtu"
)

// A router's hint that what passes is too large is undone by the answer of that size, also where the hint could not lower the
// path MTU, because that is the base already. Else the search would never end, and no encapsulation be chosen for it.
func TestHintAtBase(t *testing.T) {
	const passes = 1280
	now := time.Unix(1000, 0)
	s := New(Config{Max: 1472, Base: passes}, now, rand.New(rand.NewPCG(1, 2)))
	type answer struct {
		at time.Time
		Probe
	}
	var answers []answer
	run := func(d time.Duration) (sent int) {
		for end := now.Add(d); now.Before(end); now = now.Add(time.Millisecond) {
			for len(answers) > 0 && !now.Before(answers[0].at) {
				s.Answered(now, answers[0].Nonce, answers[0].Size)
				answers = answers[1:]
			}
			for p, ok := s.Due(now); ok; p, ok = s.Due(now) {
				if sent++; p.Size <= passes {
					answers = append(answers, answer{now.Add(5 * time.Millisecond), p})
				}
			}
		}
		return sent
	}
	run(3 * time.Minute)
	if in := s.Snapshot(); in.MTU != passes || in.Search != "complete" {
		t.Fatalf("before the hint: %+v", in)
	}
	s.TooBig(now, mtu.TUN(1232)) // a link of 1,280 bytes, by udp over IPv6
	sent := run(3 * time.Minute)
	if in := s.Snapshot(); in.MTU != passes || in.Search != "complete" {
		t.Errorf("three minutes after the hint: %+v", in)
	}
	if sent > 60 {
		t.Errorf("%d probes in three minutes", sent)
	}
}
