package gossip

import (
	"slices"
	"strings"
	"time"
)

// A Problem is a condition that an operator should know about, with its remedy.
type Problem struct {
	What   string    `json:"what"`
	Remedy string    `json:"remedy"`
	Since  time.Time `json:"since"`
	// Last is when the event that reported it was seen last; zero for a state that lasts.
	Last  time.Time `json:"last"`
	Topic string    `json:"topic"` // a word for what it is about: clone, conflict, foreign, undecryptable, udp, seed or alone
}

// String returns problem and remedy in one line.
func (p Problem) String() string {
	if p.Remedy == "" {
		return p.What
	}
	return p.What + ": " + p.Remedy
}

// problemSet keeps problems by key. A problem that an event reported expires unless
// another event reports it again.
type problemSet struct {
	byKey map[string]*timedProblem
}

type timedProblem struct {
	Problem
	until time.Time
}

const (
	problemExpiry = 5 * time.Minute
	maxProblems   = 64
)

// note adds or renews a problem, and reports whether it is new.
func (s *problemSet) note(key, what, remedy string) bool {
	now := time.Now()
	if s.byKey == nil {
		s.byKey = map[string]*timedProblem{}
	}
	p := s.byKey[key]
	fresh := p == nil || now.After(p.until)
	if fresh {
		if s.expire(now); p == nil && len(s.byKey) >= maxProblems {
			return false
		}
		topic, _, _ := strings.Cut(key, " ")
		p = &timedProblem{Problem: Problem{Since: now, Topic: topic}}
		s.byKey[key] = p
	}
	p.What, p.Remedy, p.Last, p.until = what, remedy, now, now.Add(problemExpiry)
	return fresh
}

// has reports whether a problem is listed.
func (s *problemSet) has(key string) bool {
	p := s.byKey[key]
	return p != nil && !time.Now().After(p.until)
}

func (s *problemSet) drop(key string) { delete(s.byKey, key) }

func (s *problemSet) expire(now time.Time) {
	for k, p := range s.byKey {
		if now.After(p.until) {
			delete(s.byKey, k)
		}
	}
}

// Problems returns the current problems of this node's membership, each with its
// remedy. Events such as a refused foreign cluster stay listed for some minutes
// after they last happened.
func (g *Gossip) Problems() []Problem {
	var alone []Problem
	if g.Isolated() {
		alone = g.seedProblems()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	g.problems.expire(now)
	var list []Problem
	for _, p := range g.problems.byKey {
		list = append(list, p.Problem)
	}
	list = append(list, alone...)
	slices.SortFunc(list, func(a, b Problem) int { return strings.Compare(a.What, b.What) })
	return list
}
