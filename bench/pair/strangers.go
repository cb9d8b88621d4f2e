package pair

import (
	"fmt"
	"net"
	"slices"
	"sync"
	"time"
)

const (
	maxStrangers   = 64          // connections at a time
	strangersEvery = time.Minute // how often the log speaks of them at most
)

// strangers are the connections that have not shown yet that they belong to a run, by the token or by the run's secret. The
// oldest gives way to a new one: who holds connections open keeps nobody out.
type strangers struct {
	log func(string)

	mu     sync.Mutex
	conns  []net.Conn // the oldest first
	gone   int        // that gave way, ever
	logged time.Time
}

// add takes a new connection in.
func (s *strangers) add(conn net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns = append(s.conns, conn)
	if len(s.conns) <= maxStrangers {
		return
	}
	oldest := s.conns[0]
	s.conns = slices.Delete(s.conns, 0, 1)
	oldest.Close()
	if s.gone++; time.Since(s.logged) >= strangersEvery {
		s.log(fmt.Sprintf("%v: %d connections that belong to no run are open: the oldest give way to new ones, %d so far", addrPort(oldest.RemoteAddr()).Addr(), maxStrangers, s.gone))
		s.logged = time.Now()
	}
}

// remove is for a connection that belongs to a run now, or has ended.
func (s *strangers) remove(conn net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns = slices.DeleteFunc(s.conns, func(c net.Conn) bool { return c == conn })
}
