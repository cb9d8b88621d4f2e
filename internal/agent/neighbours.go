package agent

import (
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/hostnet"
)

// fullNeighbours follows the kernel's neighbour tables: it counts what it refuses since the host has booted, and only what it has refused lately is a problem.
type fullNeighbours map[string]*refusals // by family

type refusals struct {
	table       hostnet.NeighbourTable
	since, last time.Time // of the refusals that go on, or have ended less than neighboursOver ago
}

// neighboursOver is how long after the last refusal a table counts as full: nothing may be sent for a while to a host that was refused.
const neighboursOver = time.Minute

// note takes over what the tables say now.
func (f fullNeighbours) note(now time.Time, tables []hostnet.NeighbourTable) {
	for _, t := range tables {
		r := f[t.Family]
		if r == nil {
			f[t.Family] = &refusals{table: t}
			continue
		}
		if t.Refused > r.table.Refused {
			if !r.full(now) {
				r.since = now
			}
			r.last = now
		}
		r.table = t
	}
}

// lookAtNeighbours follows the tables, whether or not anybody asks for the status.
func (s *session) lookAtNeighbours(now time.Time) {
	tables := hostnet.NeighbourTables()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.neighbourTables == nil {
		s.neighbourTables = fullNeighbours{}
	}
	s.neighbourTables.note(now, tables)
}

func (r *refusals) full(now time.Time) bool {
	return !r.last.IsZero() && now.Sub(r.last) < neighboursOver
}

// problems names the tables that are full.
func (f fullNeighbours) problems(now time.Time) (out []api.Problem) {
	for _, family := range []string{"IPv4", "IPv6"} {
		if r := f[family]; r != nil && r.full(now) {
			p := r.table.Problem()
			out = append(out, api.Problem{What: p.What, Remedy: p.Remedy, Command: p.Command, Since: r.since, Last: r.last, Check: api.CheckNeighbours})
		}
	}
	return out
}
