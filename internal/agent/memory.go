package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"time"

	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/membership/gossip"
)

// memory has the members that own space, as gossip last saw them. Gossip drops a member a day after its death, and after a
// start it knows only those that it reaches. But where a firewall blocks a member's gossip port, its tunnel works: it has to be
// probed, and for that its tun addresses and ports must be known, until it owns nothing any more.
//
// It is saved to a file of its own: the state file is not for what the agent can do without, and an older version reads it after a
// downgrade. So errors about the file never stop the agent.
type memory struct {
	path    string
	members map[membership.NodeID]remembered
	changed bool      // since the last save
	saved   time.Time // the last attempt
}

// remembered is a member, and whether gossip has not seen it since this agent started.
type remembered struct {
	gossip.Member
	unseen bool
}

const (
	memoryFile = "members"
	// saveMemory is the shortest time between two saves: a cluster that grows changes all the time.
	saveMemory = 10 * time.Second
)

// recall reads what an earlier run of this node has saved. What it cannot use is as if it had not been saved.
func recall(dir string, cluster membership.ClusterID, now time.Time) (*memory, error) {
	m := &memory{path: filepath.Join(dir, memoryFile), members: map[membership.NodeID]remembered{}}
	b, err := os.ReadFile(m.path)
	if errors.Is(err, fs.ErrNotExist) {
		return m, nil
	}
	var list []membership.Meta
	if err == nil {
		list, err = decodeMembers(b)
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", m.path, err)
	}
	for _, meta := range list {
		if meta.Cluster == cluster {
			m.members[meta.ID] = remembered{gossip.Member{ID: meta.ID, Name: meta.Name, Meta: meta, State: gossip.StateDead, Since: now}, true}
		}
	}
	return m, err
}

// The file is a JSON array with the metadata of each member, as gossip carries it, in base64.
func encodeMembers(members map[membership.NodeID]remembered) ([]byte, error) {
	list := make([][]byte, 0, len(members))
	for _, r := range members {
		wire, err := r.Meta.Encode(nil)
		if err != nil {
			return nil, err
		}
		list = append(list, wire)
	}
	slices.SortFunc(list, slices.Compare)
	return json.MarshalIndent(list, "", " ")
}

// decodeMembers returns what it can read, also with an error.
func decodeMembers(b []byte) (list []membership.Meta, err error) {
	var wires [][]byte
	if err := json.Unmarshal(b, &wires); err != nil {
		return nil, err
	}
	for _, wire := range wires {
		meta, bad := membership.DecodeMeta(wire)
		if bad != nil {
			err = bad
			continue
		}
		list = append(list, meta)
	}
	return list, err
}

// update remembers those of the members that own space, forgets those that own none any more, and returns the others: owners
// that gossip does not list, ordered by ID.
func (m *memory) update(now time.Time, seen []gossip.Member, owns func(membership.NodeID) bool) (missing []remembered) {
	listed := make(map[membership.NodeID]bool, len(seen))
	for _, s := range seen {
		if owns(s.ID) {
			listed[s.ID] = true
			m.changed = m.changed || !reflect.DeepEqual(s.Meta, m.members[s.ID].Meta)
			m.members[s.ID] = remembered{Member: s}
		}
	}
	for id, r := range m.members {
		switch {
		case listed[id]:
		case !owns(id):
			delete(m.members, id)
			m.changed = true
		default:
			if r.State <= gossip.StateSuspect {
				r.State, r.Since = gossip.StateDead, now
				m.members[id] = r
			}
			missing = append(missing, r)
		}
	}
	slices.SortFunc(missing, func(a, b remembered) int { return a.ID.Compare(b.ID) })
	return missing
}

// save writes the file if it is due. It replaces the old one in one step.
func (m *memory) save(now time.Time, due bool) error {
	if !m.changed || !due && now.Sub(m.saved) < saveMemory {
		return nil
	}
	m.saved = now
	b, err := encodeMembers(m.members)
	if err != nil {
		return err
	}
	temp := m.path + ".tmp"
	if err := os.WriteFile(temp, b, 0o600); err != nil {
		os.Remove(temp) // free the space
		return err
	}
	if err := os.Rename(temp, m.path); err != nil {
		return err
	}
	m.changed = false
	return nil
}
