package gossip

import (
	"bytes"
	"crypto/sha256"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tulle-net/tulle/membership"
)

// ledger is a handler with a table: the set of all news.
type ledger struct {
	*recorder
	g      *Gossip
	mu     sync.Mutex
	news   map[string]bool
	states atomic.Int64 // that were asked for: push/pulls
	never  bool         // its digest is like no other
}

func (l *ledger) learn(news ...string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, n := range news {
		l.news[n] = true
	}
	d := sha256.Sum256([]byte(l.all()))
	if l.never {
		d = sha256.Sum256([]byte(l.g.cfg.Name))
	}
	l.g.SetDigest(d)
}

func (l *ledger) knows(news string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.news[news]
}

func (l *ledger) all() string { return strings.Join(slices.Sorted(maps.Keys(l.news)), " ") }

func (l *ledger) LocalState(bool) []byte {
	l.states.Add(1)
	l.mu.Lock()
	defer l.mu.Unlock()
	return []byte(l.all())
}
func (l *ledger) MergeState(b []byte, _ bool) { l.learn(strings.Fields(string(b))...) }
func (l *ledger) Broadcast(b []byte)          { l.learn(string(b)) }

// rarely leaves push/pull to repairs.
func rarely(c *Config) {
	c.pace.pushPull, c.pace.heal, c.pace.healSlow, c.pace.seeds = time.Hour, time.Hour, time.Hour, time.Hour
}

// keeper launches a node with a ledger.
func keeper(t *testing.T, name string, never bool, opts ...option) (*node, *ledger) {
	t.Helper()
	l := &ledger{recorder: newRecorder(name), news: map[string]bool{}, never: never}
	n := launchAltered(t, name, func(g *Gossip) {
		l.g = g
		l.learn("start")
	}, append(opts, rarely, patient, func(c *Config) { c.Handler = l })...)
	return n, l
}

// settled waits until the nodes know each other's metadata and have no more to say.
func settled(t *testing.T, nodes ...*node) {
	t.Helper()
	converge(t, nodes...)
	for _, n := range nodes {
		eventually(t, n.name+" knows that all are in its cluster", func() bool {
			return !slices.ContainsFunc(n.Gossip.Members(), func(m Member) bool { return m.Meta.Cluster != n.Cluster() || m.Meta.Cluster.IsZero() })
		})
	}
	time.Sleep(2 * quick.settle)
}

// A network that fails while something is announced loses all repetitions: they all go out within a second.
func TestRepairAfterABlip(t *testing.T) {
	leakCheck(t)
	var cut atomic.Bool
	link := links(func(netip.Addr, netip.Addr) bool { return !cut.Load() })
	a, atA := keeper(t, "a", false, link, cluster(membership.NewClusterID()))
	b, atB := keeper(t, "b", false, link, seeds(a.addr))
	settled(t, a, b)
	blip := func(during func()) {
		cut.Store(true)
		during()
		time.Sleep(180 * time.Millisecond) // they go out within 140 ms, and no member is suspected: that would be refuted with the metadata
		cut.Store(false)
	}
	blip(func() {
		if err := a.SetMeta(membership.Meta{UDPPort: 7000, Underlay: []netip.Addr{a.addr}}); err != nil {
			t.Error(err)
		}
	})
	eventually(t, "b knows the metadata of a", func() bool {
		m, _ := b.Member(a.cfg.ID)
		return m.Meta.UDPPort == 7000
	})
	blip(func() {
		atA.learn("news")
		if err := a.Queue([]byte("news")); err != nil {
			t.Error(err)
		}
	})
	eventually(t, "b knows the news of a", func() bool { return atB.knows("news") })
}

// The one that learns from a push/pull may be the one that is asked.
func TestRepairOfTheOther(t *testing.T) {
	leakCheck(t)
	a, atA := keeper(t, "a", false, cluster(membership.NewClusterID()))
	b, atB := keeper(t, "b", false, seeds(a.addr))
	settled(t, a, b)
	atA.learn("news")
	eventually(t, "b knows the news of a", func() bool { return atB.knows("news") })
}

func TestNoRepairAtRest(t *testing.T) {
	leakCheck(t)
	unhurried := func(c *Config) { c.pace.settle = 2 * time.Second } // on a busy machine news take their time
	a, atA := keeper(t, "a", false, unhurried, cluster(membership.NewClusterID()))
	b, atB := keeper(t, "b", false, unhurried, seeds(a.addr))
	c := launch(t, "c", seeds(a.addr), rarely, patient, func(c *Config) { c.Handler = newRecorder("start") }) // tells no digest
	settled(t, a, b, c)
	before := atA.states.Load() + atB.states.Load()
	time.Sleep(10 * quick.settle)
	for i := range 5 { // news that arrive are no reason either
		news := strings.Repeat("n", i+1)
		atB.learn(news)
		if err := b.Queue([]byte(news)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * quick.settle)
	}
	if n := atA.states.Load() + atB.states.Load() - before; n != 0 {
		t.Errorf("%d push/pulls between members that miss nothing", n)
	}
}

// Tables that never become equal are compared less and less often.
func TestRepairsBackOff(t *testing.T) {
	leakCheck(t)
	a, atA := keeper(t, "a", true, cluster(membership.NewClusterID()))
	b, _ := keeper(t, "b", true, seeds(a.addr))
	converge(t, a, b)
	before := atA.states.Load()
	eventually(t, "a is asked or asks", func() bool { return atA.states.Load() > before })
	time.Sleep(12 * quick.repair)
	// Either node begins at most after 0, 1, 2, 4 and 8 intervals, of at least three quarters each.
	if n := atA.states.Load() - before; n > 12 {
		t.Errorf("%d push/pulls in 12 intervals", n)
	}
}

func TestDigestsOfAnAck(t *testing.T) {
	id, other := membership.NewClusterID(), membership.NewClusterID()
	table := sha256.Sum256([]byte("table"))
	own := digests{meta: hashOf([]byte("meta"))}
	copy(own.table[:], table[:])
	with := func(change func(*digests)) []byte { // of a member that has what this node has, but for the change
		d := own
		change(&d)
		return d.encode()
	}
	news := func(d *digests) { d.table[7]++ }
	meta := func(d *digests) { d.meta[7]++ }
	for _, tc := range []struct {
		name    string
		payload []byte
		cluster membership.ClusterID
		differs bool
	}{
		{"equal", own.encode(), id, false},
		{"other table", with(news), id, true},
		{"other metadata", with(meta), id, true},
		{"no table", with(func(d *digests) { d.table = digest{} }), id, false},
		{"older version", nil, id, false},
		{"newer version", append([]byte{2}, with(news)[1:]...), id, false},
		{"too short", with(news)[:16], id, false},
		{"too long", append(with(news), 0), id, false},
		{"waits for a cluster", with(news), membership.ClusterID{}, false},
		{"other cluster", with(news), other, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := idle(t)
			g.SetDigest(table)
			g.meta.Cluster = id
			peer := &peer{Member: Member{ID: membership.NewNodeID(), Meta: membership.Meta{Cluster: tc.cluster}}, metaHash: own.meta}
			g.peers[peer.ID] = peer
			g.compare(peer.ID.String(), tc.payload)
			if differs := len(g.missing) > 0; differs != tc.differs {
				t.Errorf("differs: %v", differs)
			}
		})
	}
}

func FuzzDigests(f *testing.F) {
	f.Add([]byte{})
	f.Add(digests{}.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if d, ok := decodeDigests(b); ok && !bytes.Equal(d.encode(), b) {
			t.Errorf("%x is read as %+v", b, d)
		}
	})
}
