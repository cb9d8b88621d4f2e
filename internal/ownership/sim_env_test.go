package ownership

import (
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/ipam"
)

// simEnv is a host's world as its machine sees it.
type simEnv struct{ h *host }

var _ Env = simEnv{}

func (e simEnv) Send(to NodeID, msg []byte) {
	h, w := e.h, e.h.w
	w.must.onSend(h, to, msg)
	for _, o := range w.hosts {
		if o.id == to && o != h {
			from := h.id
			w.carry(h, o, func(sp *Machine) { sp.HandleMessage(w.now, from, msg) })
		}
	}
	if h.atSend {
		h.atSend = false
		w.must.seen["crash after an answer"]++
		panic(errCrash)
	}
}

func (e simEnv) Broadcast(msg []byte) {
	h, w := e.h, e.h.w
	for _, o := range w.hosts {
		if o != h && h.met(o) {
			w.carry(h, o, func(sp *Machine) { sp.HandleBroadcast(w.now, msg) })
		}
	}
}

func (e simEnv) Persist(st *ipam.State) error {
	h := e.h
	fault := h.atPersist
	h.atPersist = ""
	if h.w.params.plant == "answer before persist" {
		h.unwritten = st
		if fault == "crash before" {
			h.atSend = true // let it answer first
		}
		return nil
	}
	w := h.w
	if fault != "" {
		w.must.seen["persist: "+fault]++
	}
	switch fault {
	case "crash before":
		panic(errCrash)
	case "fail":
		return errors.New("simulated: no space left on device")
	}
	h.write(st)
	switch fault {
	case "crash after":
		panic(errCrash)
	case "fail late":
		return errors.New("simulated: the directory cannot be synced")
	}
	return nil
}

// write puts a state on the disk. Now and then it takes the way through the real
// file format.
func (h *host) write(st *ipam.State) {
	if h.w.rng.IntN(64) == 0 {
		b, err := ipam.EncodeState(st)
		if err == nil {
			st, err = ipam.DecodeState(b)
		}
		if err != nil {
			h.w.fail("%s: the state does not survive its file format: %v", h.name, err)
			return
		}
	}
	if h.disk != nil {
		h.older = append(h.older, h.disk)
		if len(h.older) > 40 {
			h.older = slices.Delete(h.older, 0, 1)
		}
	}
	h.disk, h.witness, h.wrote = st, st, true
	h.w.must.onDisk(h)
}

// Members is gossip's view: it notices both ends of a failure late.
func (e simEnv) Members() []Member {
	h, w := e.h, e.h.w
	var out []Member
	cut := h.unsure && !h.witnessed() // see reaches: such a host sees nobody, not even as a suspect
	for _, o := range w.hosts {
		if o == h || o.run == 0 || !h.met(o) {
			continue
		}
		m := Member{ID: o.id, Name: o.name}
		if w.starts != nil {
			m.Addr = netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(o.addr)) // the port is all of an address here
		}
		if h.reaches(o) {
			if w.now.Sub(later(h.upAt, o.upAt)) < 300*time.Millisecond {
				continue
			}
			m.Alive, m.Cluster = true, o.sp.cluster
			if w.now.Sub(o.joinedAt) < gossipLag {
				m.Cluster = ClusterID{} // its metadata is on the way
			}
			if c := h.sp.cluster; !c.IsZero() && !m.Cluster.IsZero() && c != m.Cluster {
				continue // gossip's guard
			}
		} else {
			m.Cluster = h.clusterOf()
			m.Alive = !cut && h.upAt.Before(later(o.downAt, w.parted)) && o.upAt.Before(later(o.downAt, w.parted)) &&
				w.now.Sub(later(o.downAt, w.parted)) < 4*time.Second
		}
		out = append(out, m)
	}
	return out
}

// met reports whether gossip of h knows of o.
func (h *host) met(o *host) bool { return h.w.starts == nil || h.circle == o.circle }

func (h *host) clusterOf() ClusterID {
	if h.sp != nil {
		return h.sp.cluster
	}
	return ClusterID{}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func (e simEnv) Seeds() Seeds {
	h, w := e.h, e.h.w
	if w.starts != nil {
		return h.seeds()
	}
	s := Seeds{Configured: min(3, len(w.hosts)), Tried: w.now.Sub(h.upAt) > time.Second}
	for _, o := range w.hosts[:min(3, len(w.hosts))] { // the first three are everybody's seeds
		if o == h {
			continue
		}
		s.Others++
		if h.reaches(o) && w.now.Sub(later(h.upAt, o.upAt)) >= 300*time.Millisecond {
			s.Answered++
		}
	}
	return s
}

func (e simEnv) TunnelAnswers(id NodeID) bool {
	for _, o := range e.h.w.hosts {
		if o.id == id {
			return e.h.reaches(o)
		}
	}
	return false
}
