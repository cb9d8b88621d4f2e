package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/tunnel"
	"github.com/tulle-net/tulle/tunnel/direct"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/mtu"
	"github.com/tulle-net/tulle/tunnel/path"
)

// A probe's payload, behind the inner UDP header; docs/wire.md has the layout. Numbers are big endian.
//
//	 0  magic "TLPR"
//	 4  version (1)
//	 5  kind: 1 request, 2 reply, 3 packet of a train, 4 question how many of a train have arrived, 5 its answer
//	 6  zero (2)
//	 8  nonce (8): the reply repeats the request's; of one train, and of the questions about it, all are equal
//	16  size (4): of a reply, the length in bytes of the inner packet that the request was; of a packet of a train, its place
//	    (from 0) in the lower byte and its inner length above; of an answer about a train, how many packets have arrived
//	20  of a reply: the sender's clock (8), microseconds since 1970; older versions have nothing here
const (
	probeMagic   = 0x544c5052
	probeVersion = 1
	probeRequest = 1
	probeReply   = 2
	probeCar     = 3
	probeAsk     = 4
	probeAnswer  = 5
	probeLen     = 20
)

func appendProbe(b []byte, kind byte, nonce uint64, size int) []byte {
	b = binary.BigEndian.AppendUint32(b, probeMagic)
	b = append(b, probeVersion, kind, 0, 0)
	b = binary.BigEndian.AppendUint64(b, nonce)
	return binary.BigEndian.AppendUint32(b, uint32(size))
}

func parseProbe(b []byte) (kind byte, nonce uint64, size int, ok bool) {
	if len(b) < probeLen || binary.BigEndian.Uint32(b) != probeMagic || b[4] != probeVersion {
		return 0, 0, 0, false
	}
	return b[5], binary.BigEndian.Uint64(b[8:]), int(binary.BigEndian.Uint32(b[16:])), true
}

// prober does the I/O for the probe schedule: it sends probes that are due, answers probes of peers, and reports answers.
type prober struct {
	log     *slog.Logger
	send    func(peer string, mode encap.Mode, six bool, payload []byte, size int) error
	train   func(peer string, mode encap.Mode, packets []tunnel.ProbePacket, apart bool) error
	traffic func(peer string) tunnel.PeerStats
	pulse   pulse                    // of run, which wakes at least every second
	name    func(peer string) string // for the log; "" if it is not known. nil: none is
	changed func()                   // a path came up, went down, has another MTU or another one is used; must not block

	wake    chan struct{} // run the schedule now
	arrived chan struct{} // run it within gather: answers have arrived

	replies atomic.Uint64 // that have arrived

	mu    sync.Mutex
	rand  *rand.Rand
	paths *path.Schedule
	pings map[uint64]chan answer   // of `tulle ping`, by nonce
	skews map[string]time.Duration // by peer: how far its clock is ahead of this host's
}

// gather is how long events are collected before the schedule runs: a thousand peers answer some hundred probes per second.
const gather = 5 * time.Millisecond

type answer struct {
	peer  string
	mode  encap.Mode
	nonce uint64
	size  int
	at    time.Time
}

func newProber(log *slog.Logger) *prober {
	var seed [32]byte
	for i := range seed {
		seed[i] = byte(rand.Uint32()) // the runtime's generator, seeded by the kernel
	}
	r := rand.New(rand.NewChaCha8(seed))
	return &prober{
		log:     log,
		wake:    make(chan struct{}, 1),
		arrived: make(chan struct{}, 1),
		rand:    r,
		paths:   path.NewSchedule(r),
		pings:   make(map[uint64]chan answer),
		skews:   make(map[string]time.Duration),
	}
}

// setPeers sets the peers to probe and their encapsulations, in order of preference. Others are removed.
func (p *prober) setPeers(now time.Time, want map[string][]path.Candidate) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.paths.SetPeers(now, want)
	maps.DeleteFunc(p.skews, func(id string, _ time.Duration) bool { return len(want[id]) == 0 })
	signal(p.wake)
}

// info returns the state of one path; ok is false if it is not probed.
func (p *prober) info(id string, m encap.Mode) (i path.Info, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.paths.Info(id, m)
}

// status returns the state of one path with a description; ok is false if it is not probed.
func (p *prober) status(id string, m encap.Mode) (st path.Status, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.paths.Status(time.Now(), id, m)
}

// chosen returns the encapsulation in use to a peer; ok is false if the peer is not probed.
func (p *prober) chosen(id string) (m encap.Mode, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.paths.Chosen(id)
}

// direct reports whether packets of a family take the direct path to the peer.
func (p *prober) direct(id string, six bool) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.paths.Direct(id, six)
}

// answering reports whether any path to the peer is up.
func (p *prober) answering(id string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.paths.Answering(id)
}

// poke probes a peer soon, because gossip reports a change of it.
func (p *prober) poke(now time.Time, id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.paths.Poke(now, id)
	signal(p.wake)
}

// tooBig handles a router's message that link is the largest outer packet toward the peer, of IPv6 if six.
func (p *prober) tooBig(id string, six bool, link mtu.Link) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.paths.TooBig(time.Now(), id, six, link)
	signal(p.wake)
}

// received is the engine's Probed hook: it runs on a receiving goroutine.
func (p *prober) received(peer string, mode encap.Mode, six bool, payload []byte, size int) {
	kind, nonce, seen, ok := parseProbe(payload)
	switch {
	case !ok:
	case kind == probeRequest:
		p.heard(peer, mode, six)
		if err := p.send(peer, mode, six, appendClock(appendProbe(nil, probeReply, nonce, size), time.Now()), 0); err != nil {
			p.log.Debug("probe not answered", "peer", peer, "encapsulation", mode, "error", err)
		}
	case kind == probeCar:
		p.car(peer, mode, nonce, seen, size, payload)
	case kind == probeAsk:
		p.askedOfTrain(peer, mode, six, nonce)
	case kind == probeAnswer:
		p.replies.Add(1)
		p.mu.Lock()
		p.paths.TrainAnswered(time.Now(), peer, nonce, seen)
		p.mu.Unlock()
		signal(p.wake)
	case kind == probeReply:
		p.replies.Add(1)
		p.take(answer{peer, mode, nonce, seen, time.Now()}, payload)
		signal(p.arrived)
	}
}

// heard records that a probe of the peer has arrived.
func (p *prober) heard(peer string, mode encap.Mode, six bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.paths.Heard(time.Now(), peer, mode, six) {
		signal(p.wake)
	}
}

// run runs the schedule until ctx is done.
func (p *prober) run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	traffic := time.NewTicker(time.Second)
	defer traffic.Stop()
	var next time.Time // when the timer fires
	for {
		p.pulse.beat()
		wait := gather
		select {
		case <-ctx.Done():
			return nil
		case <-p.arrived:
		case <-traffic.C:
			p.followTraffic(time.Now())
		case <-p.wake:
			wait = 0
		case <-timer.C:
			next = p.sendDue(time.Now())
			if soonest := time.Now().Add(gather); next.Before(soonest) {
				next = soonest
			}
			timer.Reset(time.Until(next))
			continue
		}
		if at := time.Now().Add(wait); at.Before(next) {
			next = at
			timer.Reset(wait)
		}
	}
}

// take passes an answer to the schedule or to a waiting ping, and reads the clock in it if somebody has asked. There is no queue of
// answers: peers that are asked at the same time answer at the same time, and none of their answers may be lost.
func (p *prober) take(a answer, reply []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.pings[a.nonce]; c != nil {
		select {
		case c <- a:
		default:
		}
	} else if !p.paths.Answered(a.at, a.peer, a.mode, a.nonce, a.size) {
		return
	}
	p.readClock(a.peer, reply, a.at)
}

// followTraffic reports the traffic of all peers to the schedule.
func (p *prober) followTraffic(now time.Time) {
	p.mu.Lock()
	ids := slices.Collect(p.paths.Peers)
	p.mu.Unlock()
	counts := make([]tunnel.PeerStats, len(ids))
	for i, id := range ids { // may wait for the fast path, for which no worker shall
		counts[i] = p.traffic(id)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, id := range ids {
		p.paths.Traffic(now, id, counts[i].TxPackets, counts[i].RxPackets)
	}
}

// sendDue sends the probes that are due, reports changes, and returns the time of the next call.
func (p *prober) sendDue(now time.Time) time.Time {
	p.mu.Lock()
	r := p.paths.Look(now)
	p.mu.Unlock()
	if len(r.Switches)+len(r.Trains) > 0 && p.changed != nil {
		p.changed() // at once: packets are lost until the engine knows
	}
	for _, d := range r.Probes {
		switch err := p.send(d.Peer, d.Mode, d.Six, appendProbe(nil, probeRequest, d.Nonce, 0), d.Size); {
		case errors.Is(err, tunnel.ErrNoAddress), errors.Is(err, direct.ErrNoAddress):
			p.mu.Lock()
			p.paths.NotSent(d.Peer, d.Mode, d.Nonce)
			p.mu.Unlock()
		case err != nil:
			p.log.Debug("probe not sent", "peer", d.Peer, "encapsulation", d.Mode, "size", d.Size, "error", err)
		}
	}
	p.sendTrains(r)
	for _, c := range r.Changes {
		p.tell(c)
	}
	for _, c := range r.Switches {
		p.tellSwitch(c)
	}
	if len(r.Changes) > 0 && p.changed != nil {
		p.changed()
	}
	return r.Next
}

// about is the log to write to about a peer.
func (p *prober) about(peer string) *slog.Logger {
	log := p.log.With("peer", peer)
	if p.name != nil {
		if name := p.name(peer); name != "" {
			log = log.With("name", name)
		}
	}
	return log
}

// tell logs a change of a path.
func (p *prober) tell(c path.Change) {
	switch was, is := c.Was, c.Is; {
	case is.Up && !was.Up:
		p.about(c.Peer).Info("path is up", "encapsulation", c.Mode, "rtt", is.RTT)
	case was.Up && !is.Up:
		p.about(c.Peer).Warn("path is down", "encapsulation", c.Mode, "reason", is.Reason)
	case is.MTU != was.MTU && is.Search == "complete":
		p.about(c.Peer).Info("path MTU found", "encapsulation", c.Mode, "mtu", int(is.MTU))
	}
}

// tellSwitch logs that packets to a peer go another way.
func (p *prober) tellSwitch(c path.Switch) {
	p.about(c.Peer).Warn("packets go another way", "encapsulation", c.To, "old", c.From, "reason", c.Why)
}

// ping sends one probe outside the schedule and waits for its answer.
func (p *prober) ping(ctx context.Context, id string, m encap.Mode, six bool, size int, wait time.Duration) (rtt time.Duration, got int, err error) {
	return p.ask(ctx, wait, func(probe []byte) error { return p.send(id, m, six, probe, size) })
}

// ask sends one probe in whatever way and waits for its answer.
func (p *prober) ask(ctx context.Context, wait time.Duration, send func(probe []byte) error) (rtt time.Duration, got int, err error) {
	c := make(chan answer, 1)
	p.mu.Lock()
	nonce := p.rand.Uint64()
	p.pings[nonce] = c
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.pings, nonce)
		p.mu.Unlock()
	}()
	start := time.Now()
	if err := send(appendProbe(nil, probeRequest, nonce, 0)); err != nil {
		return 0, 0, err
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case a := <-c:
		return a.at.Sub(start), a.size, nil
	case <-timer.C:
		return 0, 0, errNoAnswer
	case <-ctx.Done():
		return 0, 0, ctx.Err()
	}
}

var errNoAnswer = errors.New("no answer")
