package ownership

import "slices"

// A peer counts as a member until it leaves or is forgotten. A broadcast says so, once; a node that is down or cut off at
// that moment does not hear it, and would count the peer for ever. So every node keeps the IDs of the peers that departed, and tells them with its table: in each
// push/pull, and in each answer to a Sync. As with the table, the word of a member that never owned space does not count
// (see confirmation).
//
// Such a word may be old: a forgotten node may come back under its ID. So it holds only about a node that gossip does not see
// alive and that owns no space. A node that is seen alive again is a member again, for everybody who sees it.
const (
	maxFormer = 256          // IDs that are kept: 4 kB of memory, 40 kB of the state file
	maxTold   = maxText / 16 // IDs in one message
)

// departed returns the IDs that a state tells of. They are in its text, 16 bytes each: a version that does not know of them
// reads the text of each message, and ignores that of a state.
func (m *message) departed() (list []NodeID) {
	if len(m.text)%16 != 0 {
		return nil
	}
	for b := range slices.Chunk([]byte(m.text), 16) {
		list = append(list, NodeID(b))
	}
	return list
}

func (m *message) setDeparted(list []NodeID) {
	var b []byte
	for _, id := range list[:min(len(list), maxTold)] {
		b = append(b, id[:]...)
	}
	m.text = string(b)
}

// departures returns the departed nodes of which the next message tells: all, or as many as fit, in turn.
func (s *Machine) departures() []NodeID {
	var next []NodeID
	for range min(len(s.former), maxTold) {
		next = append(next, s.former[s.toldFormer%len(s.former)])
		s.toldFormer++
	}
	return s.notSeen(next)
}

// notSeen returns those of which nothing speaks against the word that they departed: gossip does not see them alive, and
// they own no space.
func (s *Machine) notSeen(list []NodeID) []NodeID {
	if len(list) == 0 {
		return nil
	}
	seen := map[NodeID]bool{s.cfg.ID: true}
	for _, m := range s.env.Members() {
		seen[m.ID] = seen[m.ID] || m.Alive
	}
	for _, e := range s.table.Entries() {
		seen[e.Owner] = true
	}
	return slices.DeleteFunc(list, func(id NodeID) bool { return seen[id] })
}

// heardDeparted handles the word of a member that these nodes departed. A node of which this one did not know is
// remembered only while there is room, so that members with more of them do not displace each other's for ever.
func (s *Machine) heardDeparted(list []NodeID) {
	news := slices.DeleteFunc(list, func(id NodeID) bool {
		_, known := s.peers[id]
		return !known && (slices.Contains(s.former, id) || len(s.former) >= maxFormer)
	})
	for _, id := range s.notSeen(news) {
		delete(s.peers, id)
		s.addFormer(id)
		s.dirty = true
	}
}

// dropPeer removes a peer that says itself that it has left.
func (s *Machine) dropPeer(id NodeID) {
	if _, ok := s.peers[id]; ok {
		delete(s.peers, id)
		s.addFormer(id)
		s.dirty = true
	}
}

func (s *Machine) addFormer(id NodeID) {
	if slices.Contains(s.former, id) {
		return
	}
	s.former = append(s.former, id)
	s.former = s.former[max(0, len(s.former)-maxFormer):]
}

// returned handles that a node is a member, again or for the first time.
func (s *Machine) returned(id NodeID) {
	s.former = slices.DeleteFunc(s.former, func(g NodeID) bool { return g == id })
}
