package ownership

import (
	"maps"
	"net/netip"
	"strings"
	"time"
)

// A note is a problem that is reported until its cause is gone. The first word of its key is its topic.
type note struct {
	Problem
	at time.Time // when it was last found; zero: it stays until unnote
}

// maxNotes is how many problems of one topic are reported at most: others choose the clusters and addresses that they name.
const maxNotes = 64

// note reports a problem until unnote removes it.
func (s *Machine) note(key, what, remedy string) { s.noteAt(time.Time{}, key, what, remedy) }

// noteAt reports a problem that was found now, until endNotes finds that its cause is gone.
func (s *Machine) noteAt(now time.Time, key, what, remedy string) {
	if _, known := s.notes[key]; !known && s.notesOf(key) >= maxNotes {
		return
	}
	if s.notes[key].What != what {
		s.log.Warn(what, "remedy", remedy)
	}
	s.notes[key] = note{Problem{What: what, Remedy: remedy}, now}
}

// notesOf is how many problems have the topic of that key.
func (s *Machine) notesOf(key string) (n int) {
	topic, _, _ := strings.Cut(key, " ")
	for k := range s.notes {
		if other, _, _ := strings.Cut(k, " "); other == topic {
			n++
		}
	}
	return n
}

func (s *Machine) unnote(key string) { delete(s.notes, key) }

// endNotes ends the reports whose cause is gone. What happened to this node, or what another one said, counts as gone when it was not found
// again for a while; lost space only when it affects no pod any more.
func (s *Machine) endNotes(now time.Time) {
	maps.DeleteFunc(s.notes, func(key string, n note) bool {
		age := now.Sub(n.at)
		switch topic, rest, _ := strings.Cut(key, " "); {
		case n.at.IsZero():
			return false
		case topic == "twice":
			addr, _ := netip.ParseAddr(rest)
			_, used := s.pool.At(addr)
			return !used || age >= heldFor
		case topic == "lost" || topic == "tie":
			return age >= reportFor && len(s.stranded()) == 0
		}
		return age >= reportFor
	})
}
