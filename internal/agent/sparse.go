package agent

import (
	"context"
	"log/slog"
	"maps"
	"sync"
	"time"
)

// sparseLog limits the lines about what may happen again and again, for ever: other nodes' bad messages, another program that takes the host's
// routes away, a disk that is full. Of each kind one line is logged in sparseEvery, with the number of those that were not since then.
type sparseLog struct {
	mu     sync.Mutex
	byKind map[string]*heldBack
}

// heldBack is when a kind was last logged, and how many were not since then.
type heldBack struct {
	told time.Time
	more int
}

const (
	sparseEvery = time.Minute
	// sparseKinds is how many kinds have lines of their own at a time. The others are one more kind.
	sparseKinds = 20
)

// log logs a line of a kind, or holds it back.
func (l *sparseLog) log(to *slog.Logger, level slog.Level, kind, what string, args ...any) {
	ok, more := l.pass(time.Now(), kind)
	if !ok {
		return
	}
	if more > 0 {
		args = append(args, "more", more)
	}
	to.Log(context.Background(), level, what, args...)
}

// pass reports whether a line of that kind may be logged, and how many were not since the last one.
func (l *sparseLog) pass(now time.Time, kind string) (ok bool, more int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.byKind == nil {
		l.byKind = map[string]*heldBack{}
	}
	maps.DeleteFunc(l.byKind, func(_ string, h *heldBack) bool { return now.Sub(h.told) >= 2*sparseEvery })
	if l.byKind[kind] == nil && len(l.byKind) >= sparseKinds {
		kind = ""
	}
	k := l.byKind[kind]
	if k != nil && now.Sub(k.told) < sparseEvery {
		k.more++
		return false, 0
	}
	if k != nil {
		more = k.more
	}
	l.byKind[kind] = &heldBack{told: now}
	return true, more
}

// A changeLog logs what holds each time that it changes, and each value at most once in sparseEvery, as it may change to and fro for ever. A value
// that was held back is logged if it still holds when its time has come: the last line that lasts is true.
type changeLog struct {
	sparse sparseLog
	is     string
	due    time.Time // when a value that was held back is logged; zero if it was logged
}

// log logs a value, unless it was logged when it came.
func (l *changeLog) log(to *slog.Logger, level slog.Level, is, what string, args ...any) {
	now := time.Now()
	if is == l.is && (l.due.IsZero() || now.Before(l.due)) {
		return
	}
	ok, more := l.sparse.pass(now, is)
	l.is, l.due = is, time.Time{}
	if !ok {
		l.due = now.Add(sparseEvery)
		return
	}
	if more > 0 {
		args = append(args, "more", more)
	}
	to.Log(context.Background(), level, what, args...)
}
