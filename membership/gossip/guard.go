package gossip

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/tulle-net/tulle/membership"
)

// sighting is what memberlist says about one node, in this package's terms.
type sighting struct {
	name  string // NodeID in hex
	addr  netip.AddrPort
	meta  []byte
	alive bool
}

// guardState is what the guards have seen. Under Gossip.mu.
//
// The identity of this node at another address has two possible reasons, and
// nothing that others say tells them apart: either this host was known there
// before it got its present address, or a cloned host lives there. So the
// address itself is asked:
//
//	        listed elsewhere                no answer
//	quiet ───────────────────▶ elsewhere ───────────────▶ returning ──▶ quiet
//	                              │        (rejoin every few seconds   (peers list
//	                              │         until the old entry dies)   the new address)
//	                              │ a live host answers
//	                              ▼
//	           the newcomer of the two ends with a CloneError
type guardState struct {
	foreign     map[membership.NodeID]membership.ClusterID // members that turned out to belong to another cluster
	established bool                                       // some member has accepted this run of the node
	elsewhere   *elsewhere                                 // this node's identity, seen at another address
	returning   bool                                       // peers may still know this node at an old address
	stale       int                                        // how many of them said so in the present round
}

type elsewhere struct {
	addr    netip.AddrPort
	name    string
	started int64
}

// A CloneError says that two live hosts have one identity.
type CloneError struct {
	ID    membership.NodeID
	Self  string // name and address of this host
	Other string // name and address of the other one
}

// Error names both hosts and the way out.
func (e *CloneError) Error() string {
	return fmt.Sprintf("node ID %v is in use by two live hosts: this one, %s, and %s. One disk is a clone of the other: stop the clone, move its state directory away (or at least its node ID), and start it again; this host, the newcomer of the two, does not run", e.ID, e.Self, e.Other)
}

var errUnresolvedIdentity = errors.New("this node's identity is listed at another address, which is being asked first")

// checkAlive decides whether an alive message counts. It is called with
// memberlist's node lock held, for every one of them: keep it cheap.
func (g *Gossip) checkAlive(n sighting, self netip.AddrPort) error {
	id, cluster, err := membership.MetaHead(n.meta)
	if err == nil && n.name != id.String() {
		err = fmt.Errorf("it calls itself %.40q, its metadata %v", n.name, id)
	}
	if err != nil {
		g.count.malformed.Add(1)
		return fmt.Errorf("no Tulle node: %w", err)
	}
	if id == g.cfg.ID {
		if n.addr != self {
			g.sawSelfElsewhere(n)
			return fmt.Errorf("it has this node's identity, at %v", n.addr)
		}
		return nil
	}
	return g.admit(id, cluster, n)
}

// admit lets in members of this node's cluster and those of none. A node of no
// cluster is adopted by the first one that it meets.
func (g *Gossip) admit(id membership.NodeID, cluster membership.ClusterID, n sighting) error {
	if cluster == (membership.ClusterID{}) {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	own := g.meta.Cluster
	if own == cluster {
		return nil
	}
	if own == (membership.ClusterID{}) {
		return g.adoptLocked(cluster)
	}
	g.count.refused.Add(1)
	if p := g.peers[id]; p != nil && p.State <= StateSuspect {
		// It was let in while it had no cluster, and has gone another way.
		if g.guard.foreign == nil {
			g.guard.foreign = map[membership.NodeID]membership.ClusterID{}
		}
		g.guard.foreign[id] = cluster
		g.recountLocked()
		g.inbox.membersChanged()
	}
	err := foreignError{own, cluster}
	g.noteLocked("foreign "+cluster.String(), fmt.Sprintf("%s at %v: %v", hostName(n), n.addr, err), foreignRemedy)
	return err
}

const foreignRemedy = "two clusters never merge; correct --join, or give the nodes of one of them a fresh --state-dir and join them to the other"

type foreignError struct{ own, other membership.ClusterID }

func (e foreignError) Error() string {
	return fmt.Sprintf("it belongs to cluster %v, this node to cluster %v", e.other, e.own)
}

func (g *Gossip) adoptLocked(c membership.ClusterID) error {
	m := g.meta
	m.Cluster = c
	wire, err := g.encodeMeta(m)
	if err != nil {
		return err
	}
	g.meta, g.metaWire = m, wire
	signal(g.dirty)
	g.inbox.membersChanged()
	g.log.Info("gossip: adopted by a cluster", "cluster", c.String())
	return nil
}

// checkMerge decides about a join, on both of its ends. list is everything that
// the other end knows, itself included.
func (g *Gossip) checkMerge(list []sighting, self netip.AddrPort) error {
	listed := false
	for _, n := range list {
		id, cluster, err := membership.MetaHead(n.meta)
		if err != nil {
			if n.alive {
				g.count.malformed.Add(1)
				return fmt.Errorf("%v is no Tulle node: %w", n.addr, err)
			}
			continue
		}
		if n.alive && id != g.cfg.ID {
			if err := g.admit(id, cluster, n); err != nil {
				return fmt.Errorf("%s at %v: %w", hostName(n), n.addr, err)
			}
		}
		if id == g.cfg.ID {
			listed = true
			if err := g.listedSelf(n, self); err != nil {
				return err
			}
		}
	}
	if !listed {
		// Nobody holds this identity there: the join lets this node in.
		g.mu.Lock()
		g.guard.established = true
		g.mu.Unlock()
	}
	return nil
}

// listedSelf looks at this node's own entry in another member's list.
func (g *Gossip) listedSelf(n sighting, self netip.AddrPort) error {
	if n.addr == self {
		g.mu.Lock()
		g.guard.established = true
		g.mu.Unlock()
		return nil
	}
	g.mu.Lock()
	g.guard.returning = true
	g.guard.stale++
	established := g.guard.established
	g.mu.Unlock()
	if !n.alive {
		return nil
	}
	g.sawSelfElsewhere(n)
	if established {
		return nil
	}
	return fmt.Errorf("%w: %v", errUnresolvedIdentity, n.addr)
}

// sawSelfElsewhere has the rejoin loop ask that address.
func (g *Gossip) sawSelfElsewhere(n sighting) {
	m, _ := membership.DecodeMeta(n.meta)
	g.mu.Lock()
	g.guard.elsewhere = &elsewhere{n.addr, m.Name, m.Started}
	g.mu.Unlock()
	g.wake()
}

// resolveIdentity asks the address at which this node's identity was seen. It
// returns false when a clone lives there and this node has to give way.
func (g *Gossip) resolveIdentity() bool {
	g.mu.Lock()
	e := g.guard.elsewhere
	g.guard.elsewhere = nil
	self := g.bind
	established := g.guard.established
	started := g.meta.Started
	g.mu.Unlock()
	if e == nil || e.addr == self {
		return true
	}
	answered := false
	for range 3 { // UDP may be lost
		if _, err := g.ping(g.cfg.ID, e.addr); err == nil {
			answered = true
			break
		}
	}
	key := "clone " + g.cfg.ID.String()
	if !answered {
		g.mu.Lock()
		g.guard.returning = true
		g.noteLocked(key, fmt.Sprintf("members still know this node at %v, where nobody answers", e.addr),
			"if it has moved from there to "+self.String()+", this heals by itself within about a minute; if a host with a copy of this disk is there, stop it")
		g.mu.Unlock()
		return true
	}
	err := &CloneError{ID: g.cfg.ID, Self: fmt.Sprintf("%s at %v", g.cfg.Name, self), Other: fmt.Sprintf("%s at %v", e.name, e.addr)}
	newcomer := !established || started > e.started || started == e.started && self.Compare(e.addr) > 0
	if newcomer {
		g.log.Error("gossip: cloned identity", "err", err)
		g.fail(err)
		return false
	}
	g.note(key, fmt.Sprintf("%s has the identity of this node, %v", err.Other, g.cfg.ID), "its disk is a clone: it has been told to stop; give it a fresh state directory")
	return true
}

// conflict is called with memberlist's node lock held, when a member's identity
// is announced from a second address. memberlist has refused it.
func (g *Gossip) conflict(existing, other sighting) {
	if existing.name == g.cfg.ID.String() {
		g.sawSelfElsewhere(other)
		return
	}
	g.note("conflict "+existing.name,
		fmt.Sprintf("node ID %.32s is announced by %s at %v and by %s at %v", existing.name, hostName(existing), existing.addr, hostName(other), other.addr),
		"if the host has changed its address, this heals within about a minute; otherwise one disk is a clone of the other: stop the clone and give it a fresh state directory")
}

// stateOfClone reports whether a push/pull came from a host that carries the
// identity of this node, or of a member that lives elsewhere.
func (g *Gossip) stateOfClone(e envelope) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	known := g.bind
	if e.from != g.cfg.ID {
		p := g.peers[e.from]
		if p == nil || p.State > StateSuspect {
			return false
		}
		known = p.Addr
	}
	if e.addr == known {
		return false
	}
	g.count.refused.Add(1)
	return true
}

// setReturning says that peers may know this node at another address.
func (g *Gossip) setReturning() {
	g.mu.Lock()
	g.guard.returning = true
	g.mu.Unlock()
}

func (g *Gossip) note(key, what, remedy string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.noteLocked(key, what, remedy)
}

func (g *Gossip) noteLocked(key, what, remedy string) {
	if g.problems.note(key, what, remedy) {
		g.log.Warn("gossip: "+what, "remedy", remedy)
	}
}

func hostName(n sighting) string {
	if m, err := membership.DecodeMeta(n.meta); err == nil && m.Name != "" {
		return m.Name
	}
	return fmt.Sprintf("node %.8s", n.name)
}
