package agent

import (
	"maps"
	"net/netip"
	"sync"

	"github.com/tulle-net/tulle/internal/hostnet"
)

// directTraffic adds up what the kernel has forwarded directly to and from each peer since the session began. The kernel counts by
// prefix, and its counters are older than the session.
type directTraffic struct {
	mu    sync.Mutex
	last  map[netip.Prefix]hostnet.Counts // as read; nil before the first reading
	peers map[string]hostnet.Counts       // by ID
	all   hostnet.Counts
}

// add takes a reading, and returns the sums by peer. owner names the peer that has a prefix; "" if nobody has it.
func (d *directTraffic) add(now map[netip.Prefix]hostnet.Counts, owner func(netip.Prefix) string) (peers map[string]hostnet.Counts, all hostnet.Counts) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.last == nil {
		d.last, d.peers = now, map[string]hostnet.Counts{}
	}
	peers = make(map[string]hostnet.Counts, len(d.peers))
	for p, c := range now {
		was := d.last[p]
		if c.TxPackets < was.TxPackets || c.RxPackets < was.RxPackets { // somebody has removed the counters
			was = hostnet.Counts{}
		}
		c = hostnet.Counts{
			TxPackets: c.TxPackets - was.TxPackets, TxBytes: c.TxBytes - was.TxBytes,
			RxPackets: c.RxPackets - was.RxPackets, RxBytes: c.RxBytes - was.RxBytes,
		}
		d.all = sum(d.all, c)
		if id := owner(p); id != "" && c != (hostnet.Counts{}) {
			d.peers[id] = sum(d.peers[id], c)
		}
	}
	if now != nil {
		d.last = now
	}
	maps.Copy(peers, d.peers)
	return peers, d.all
}

func sum(a, b hostnet.Counts) hostnet.Counts {
	return hostnet.Counts{TxPackets: a.TxPackets + b.TxPackets, TxBytes: a.TxBytes + b.TxBytes, RxPackets: a.RxPackets + b.RxPackets, RxBytes: a.RxBytes + b.RxBytes}
}

// countDirect reads the kernel's counters of direct traffic.
func (s *session) countDirect(v *view) (peers map[string]hostnet.Counts, all hostnet.Counts) {
	now, err := s.host.DirectCounts()
	if err != nil {
		s.log.Debug("direct traffic not counted", "error", err)
	}
	owners := map[netip.Prefix]string{}
	for i := range v.peers {
		for _, p := range v.peers[i].prefixes {
			owners[p] = v.peers[i].id
		}
	}
	return s.directTraffic.add(now, func(p netip.Prefix) string { return owners[p] })
}
