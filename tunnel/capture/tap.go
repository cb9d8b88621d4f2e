// Package capture is a tap on the data path: it copies dropped packets, and packets before and after encapsulation, to
// whoever listens. While nobody listens it costs the data path one load of a pointer per packet. While somebody does, the
// cost is bounded: a listener has a limit of packets a second and of bytes that wait for it, and what exceeds them is
// counted as missed, never waited for.
//
// It also writes captures as pcapng and describes packets in one line; both run in the reader's process, not on the data
// path.
package capture

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/bpf"

	"github.com/tulle-net/tulle/tunnel/header"
)

// Point is the place on the data path where a packet was seen.
type Point string

// The points, in the order in which a packet between two nodes passes them.
const (
	FromPods Point = "from-pods" // read from the TUN, before encapsulation
	ToPeer   Point = "to-peer"   // encapsulated, handed to the underlay
	FromPeer Point = "from-peer" // received from the underlay, still encapsulated
	ToPods   Point = "to-pods"   // decapsulated and accepted, on the way into the TUN
)

// Points lists all points.
func Points() []Point { return []Point{FromPods, ToPeer, FromPeer, ToPods} }

// Packet is what the data path offers. All slices stay the caller's.
type Packet struct {
	Point  Point
	Reason string // name of the drop reason; "" for a packet that went on
	Peer   string // ID of the peer; "" if there is none
	Path   string // encapsulation; "" if it is not decided

	// Inner is the packet of the pods, for the filter; nil if it cannot be found in the outer one.
	Inner []byte
	// Data is what is captured, in parts: for ToPeer and FromPeer with Outer's headers in front if that is set.
	Data  [][]byte
	Outer *Outer
}

// Event is a captured packet.
type Event struct {
	Time   time.Time
	Point  Point
	Reason string
	Peer   string
	Path   string
	Length int    // of the packet, bytes
	Data   []byte // an IP packet, or its first Snap bytes
	Missed uint64 // packets that matched and were not captured since the listener began
}

// Filter selects packets. Empty fields select everything.
type Filter struct {
	Drops   bool                 // only dropped packets
	Points  []Point              // only packets of these points
	Reasons []string             // only packets dropped for one of these reasons
	Peer    string               // only packets to or from the peer of this ID
	Pod     netip.Addr           // only packets whose inner source or destination this is
	Program []bpf.RawInstruction // classic BPF over the inner packet, link type RAW: not 0 selects it
}

// Limits bound what a listener costs.
type Limits struct {
	Snap int // bytes captured of each packet; 0 means all
	Rate int // packets a second; 0 means DefaultRate
}

// The bounds of listeners.
const (
	DefaultRate  = 5000     // packets a second
	MaxRate      = 200_000  // packets a second
	MaxListeners = 4        // at once
	maxWaiting   = 4096     // packets that wait for a reader
	maxBytes     = 16 << 20 // bytes that wait for a reader
)

// ErrBusy means that there are MaxListeners listeners already.
var ErrBusy = fmt.Errorf("%d captures run already, which is the limit: end one of them", MaxListeners)

// Tap distributes packets to listeners. The zero Tap has none.
type Tap struct {
	listeners atomic.Pointer[[]*Listener]
	mu        sync.Mutex // of changes
}

// On reports whether anybody listens.
func (t *Tap) On() bool { return t.listeners.Load() != nil }

// Offer gives a packet to all listeners that select it. It never blocks.
func (t *Tap) Offer(p *Packet) {
	list := t.listeners.Load()
	if list == nil {
		return
	}
	now := time.Now()
	for _, l := range *list {
		if l.selects(p) {
			l.take(now, p)
		}
	}
}

// Listen begins a capture. The caller ends it with Close. It returns ErrBusy, or an error that says what is wrong with the
// program.
func (t *Tap) Listen(f Filter, lim Limits) (*Listener, error) {
	l := &Listener{tap: t, filter: f, snap: lim.Snap, rate: lim.Rate, events: make(chan Event, maxWaiting)}
	if l.rate <= 0 {
		l.rate = DefaultRate
	}
	if len(f.Program) > 0 {
		prog := make([]bpf.Instruction, len(f.Program))
		for i, in := range f.Program {
			prog[i] = in.Disassemble()
		}
		vm, err := bpf.NewVM(prog)
		if err != nil {
			return nil, fmt.Errorf("BPF program of %d instructions: %w", len(prog), err)
		}
		l.vm = vm
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	var now []*Listener
	if p := t.listeners.Load(); p != nil {
		now = *p
	}
	if len(now) >= MaxListeners {
		return nil, ErrBusy
	}
	now = append(slices.Clone(now), l)
	t.listeners.Store(&now)
	return l, nil
}

// Listener is one capture.
type Listener struct {
	tap    *Tap
	filter Filter
	vm     *bpf.VM
	snap   int
	rate   int
	events chan Event

	mu     sync.Mutex
	second int64 // the second that count is about
	count  int
	bytes  int // that wait in events
	missed uint64
}

// Close ends the capture.
func (l *Listener) Close() {
	l.tap.mu.Lock()
	defer l.tap.mu.Unlock()
	p := l.tap.listeners.Load()
	if p == nil {
		return
	}
	rest := slices.DeleteFunc(slices.Clone(*p), func(o *Listener) bool { return o == l })
	if len(rest) == 0 {
		l.tap.listeners.Store(nil)
		return
	}
	l.tap.listeners.Store(&rest)
}

// ErrIdle is returned by Next when nothing was captured for a while.
var ErrIdle = errors.New("nothing captured")

// Next waits for the next packet: until ctx ends, whose error it returns then, or for idle (0: without limit), after which it
// returns ErrIdle.
func (l *Listener) Next(ctx context.Context, idle time.Duration) (Event, error) {
	var timeout <-chan time.Time
	if idle > 0 {
		timer := time.NewTimer(idle)
		defer timer.Stop()
		timeout = timer.C
	}
	select {
	case e := <-l.events:
		l.mu.Lock()
		l.bytes -= len(e.Data)
		l.mu.Unlock()
		return e, nil
	case <-timeout:
		return Event{}, ErrIdle
	case <-ctx.Done():
		return Event{}, ctx.Err()
	}
}

// Missed is the number of packets that matched and were not captured.
func (l *Listener) Missed() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.missed
}

// selects applies the filter, the cheap parts first.
func (l *Listener) selects(p *Packet) bool {
	f := &l.filter
	switch {
	case f.Drops && p.Reason == "",
		f.Peer != "" && p.Peer != f.Peer,
		len(f.Points) > 0 && !slices.Contains(f.Points, p.Point),
		len(f.Reasons) > 0 && !slices.Contains(f.Reasons, p.Reason):
		return false
	}
	if f.Pod.IsValid() && !about(p.Inner, f.Pod) {
		return false
	}
	if l.vm != nil {
		n, err := l.vm.Run(p.Inner)
		return err == nil && n > 0 && p.Inner != nil
	}
	return true
}

// about reports whether a is the source or the destination of an IP packet.
func about(pkt []byte, a netip.Addr) bool {
	var in header.Inner
	return header.ParseInner(pkt, &in) == nil && (in.Src == a || in.Dst == a)
}

// take copies a packet for the reader if the limits allow it.
func (l *Listener) take(now time.Time, p *Packet) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s := now.Unix(); s != l.second {
		l.second, l.count = s, 0
	}
	if l.count >= l.rate || len(l.events) == cap(l.events) || l.bytes >= maxBytes {
		l.missed++
		return
	}
	l.count++
	data := p.packet()
	e := Event{Time: now, Point: p.Point, Reason: p.Reason, Peer: p.Peer, Path: p.Path, Length: len(data), Missed: l.missed}
	if l.snap > 0 && len(data) > l.snap {
		data = bytes.Clone(data[:l.snap])
	}
	e.Data = data
	l.bytes += len(data)
	l.events <- e // there is room: only this function fills it, under the mutex
}

// packet is a copy of the captured packet in one piece.
func (p *Packet) packet() []byte {
	n := 0
	for _, d := range p.Data {
		n += len(d)
	}
	var out []byte
	if p.Outer != nil {
		out = p.Outer.append(make([]byte, 0, n+maxOuter), n)
	}
	for _, d := range p.Data {
		out = append(out, d...)
	}
	if p.Outer != nil {
		p.Outer.finish(out)
	}
	return out
}
