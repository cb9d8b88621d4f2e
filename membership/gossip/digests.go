package gossip

import (
	"context"
	"crypto/sha256"
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/tulle-net/tulle/membership"
)

// Each ack of a ping carries digests of what its sender has, so that the member that pinged notices if one of the two has missed something:
//
//	0  format version (1)
//	1  hash of the sender's own metadata (8)
//	9  digest of its table (8), zero if it has not set one
//
// An ack of an older version carries nothing, and an older version ignores them.
type digests struct {
	meta  digest
	table digest
}

type digest [8]byte

const (
	digestsVersion = 1
	digestsLen     = 1 + 8 + 8
)

func (d digests) encode() []byte {
	return append(append(append(make([]byte, 0, digestsLen), digestsVersion), d.meta[:]...), d.table[:]...)
}

func decodeDigests(b []byte) (d digests, ok bool) {
	if len(b) != digestsLen || b[0] != digestsVersion {
		return digests{}, false
	}
	return digests{meta: digest(b[1:]), table: digest(b[9:])}, true
}

func hashOf(b []byte) digest {
	h := sha256.Sum256(b)
	return digest(h[:])
}

// SetDigest sets the digest of this node's table, which is the same for equal tables. Members whose tables stay different do a push/pull.
// Without it, tables are not compared.
func (g *Gossip) SetDigest(table [32]byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if d := digest(table[:]); d != g.table {
		g.table, g.differing = d, 0
	}
}

func (g *Gossip) digests() digests {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return digests{hashOf(g.metaWire), g.table}
}

// missing is what this node or another member seems to have missed. What differs may still be under way.
type missing struct {
	from  membership.NodeID
	meta  bool   // this node has other metadata of the member than the member has
	known digest // of the metadata that this node has
	news  bool   // the tables differ
	table digest // of this node's table
	doubt bool   // memberlist may still suspect the member (see peer.unsure)
}

// compare compares what the ack of a member says with what this node has. A member that waits for a cluster has no table yet, but
// metadata; if they differ it may have joined one.
func (g *Gossip) compare(name string, payload []byte) {
	theirs, ok := decodeDigests(payload)
	id, err := membership.ParseNodeID(name)
	if !ok || err != nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.meta.Cluster.IsZero() || g.liveLocked(id) == 0 {
		return
	}
	p := g.peers[id]
	m := missing{from: id, meta: theirs.meta != p.metaHash, known: p.metaHash, table: g.table}
	if p.Meta.Cluster == g.meta.Cluster && theirs.table != (digest{}) && g.table != (digest{}) {
		if m.news = theirs.table != g.table; m.news {
			g.differing++
		} else {
			g.differing = 0
		}
	}
	if m.meta || m.news {
		g.miss(m)
	}
}

func (g *Gossip) miss(m missing) {
	select {
	case g.missing <- m:
	default: // another one comes first; this one is noticed again
	}
}

// stillMissing reports whether something has not arrived in the meantime, and the member's address. Of tables, two members in a row must have a
// different one: then it is likely this node that has missed something. Where it is another member, that one notices it by itself.
func (g *Gossip) stillMissing(m missing) (netip.AddrPort, bool) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	if g.liveLocked(m.from) == 0 {
		return netip.AddrPort{}, false
	}
	p := g.peers[m.from]
	return g.near(p), m.meta && p.metaHash == m.known || m.news && g.table == m.table && g.differing >= 2 || m.doubt && p.unsure && p.State == StateAlive
}

// sure records that a push/pull with a member has ended memberlist's suspicion.
func (g *Gossip) sure(id membership.NodeID) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if p := g.peers[id]; p != nil && p.State == StateAlive {
		p.unsure = false
	}
}

// maxRepair is the longest time between repairs that do not help.
const maxRepair = 5 * time.Minute

// repair does a push/pull with a member that has something that this node has missed, or the other way round. Broadcasts are sent within a
// second or two; if the network fails for that long, nobody repeats them. That goes for the refutation of a suspicion, too: memberlist suspects
// a member until it hears a newer incarnation of it, whatever that member answers, does no push/pull with it meanwhile, and then finds it
// dead.
//
// It makes no storm, however large the cluster is and however often something changes:
//   - What differs must stay so for pace.settle, longer than news take to reach everybody. A node whose table changes all the time
//     repairs nothing; it waits for the periodic push/pull.
//   - Where one node has missed something, only that one sees a difference in two pings in a row.
//   - Where many have, the wait is random, and longer in a large cluster: the first exchange is passed on to everybody by broadcasts, which ends the
//     others' waits.
//   - A node repairs at most once in pace.repair, times the factor by which memberlist stretches its periodic push/pull in large clusters: 5 s up to
//     32 members, 30 s at a thousand. If that does not help (two versions may disagree about a digest for ever), the time doubles, up to
//     five minutes.
func (g *Gossip) repair(ctx context.Context) {
	p := g.cfg.pace
	var last time.Time
	var interval time.Duration
	for {
		var m missing
		select {
		case <-ctx.Done():
			return
		case m = <-g.missing:
		}
		factor := stretch(int(g.alive.Load()) + 1)
		if !pause(ctx, p.settle+rand.N(factor*p.settle/2)) {
			return
		}
		addr, still := g.stillMissing(m)
		if !still {
			continue
		}
		rest := factor * p.repair
		if m.meta || m.news {
			if time.Since(last) <= 4*interval {
				rest = min(2*interval, maxRepair)
			}
			interval, last = rest, time.Now()
		}
		err := g.pushPull(addr)
		if err == nil {
			g.sure(m.from)
		}
		g.log.Debug("gossip: push/pull for what was missed", "node", m.from.Short(), "metadata", m.meta, "table", m.news, "refutation", m.doubt, "err", err)
		if !pause(ctx, rest*3/4+rand.N(rest/2)) {
			return
		}
		select {
		case <-g.missing: // from before
		default:
		}
	}
}

// stretch is the factor by which memberlist multiplies the interval of its push/pull in a cluster of n (pushPullScale).
func stretch(n int) time.Duration { return time.Duration(1 + max(0, bits.Len(uint(n-1))-5)) }
