// Package detour carries packets between devices of tests, and delays and loses them on the way: what a measurement has to
// find is known then.
package detour

import (
	"math"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A Detour holds each packet for the same time and loses a share of those that go one way. Set the exported fields before
// the first Carry. Delay and loss may change at any time.
type Detour struct {
	Loses func(packet []byte) bool // whether a packet is of those that may be lost; Carry with loses needs it
	MTU   int                      // larger packets are lost, without a word; 0: none

	delay     atomic.Int64  // nanoseconds
	share     atomic.Uint64 // to lose, as the bits of a float64
	all, lost atomic.Int64
	stop      atomic.Bool
	work      sync.WaitGroup
	files     []int
}

// Delay holds packets that arrive from now on for t.
func (d *Detour) Delay(t time.Duration) { d.delay.Store(int64(t)) }

// Loss loses a share, between 0 and 1, from now on, and counts from zero.
func (d *Detour) Loss(share float64) {
	d.share.Store(math.Float64bits(share))
	d.all.Store(0)
	d.lost.Store(0)
}

// Lost returns how many packets were lost by chance since Loss, of how many that could have been.
func (d *Detour) Lost() (lost, all int64) { return d.lost.Load(), d.all.Load() }

// Carry moves what comes out of one descriptor of a TUN or TAP device into another, or back into the same, until End. Packets
// are lost only if loses is set. The descriptors do not block, and are the Detour's from now on.
func (d *Detour) Carry(from, to int, loses bool) {
	d.files = append(d.files, from, to)
	d.work.Go(func() { d.carry(from, to, loses) })
}

// End stops carrying, and closes the descriptors.
func (d *Detour) End() {
	d.stop.Store(true)
	d.work.Wait()
	closed := map[int]bool{}
	for _, fd := range d.files {
		if !closed[fd] {
			unix.Close(fd)
			closed[fd] = true
		}
	}
}

func (d *Detour) carry(from, to int, loses bool) {
	runtime.LockOSThread() // never unlocked: the thread, with its timer slack, ends with its goroutine
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1000, 0, 0, 0)
	type packet struct {
		due  time.Time
		data []byte
	}
	var queue []packet
	rng := rand.New(rand.NewPCG(1, 1))
	buf := make([]byte, 1<<16)
	for !d.stop.Load() {
		wait := 20 * time.Millisecond
		if len(queue) > 0 {
			wait = max(time.Until(queue[0].due), 0)
		}
		ts := unix.NsecToTimespec(int64(wait))
		_, _ = unix.Ppoll([]unix.PollFd{{Fd: int32(from), Events: unix.POLLIN}}, &ts, nil)
		for len(queue) > 0 && !time.Now().Before(queue[0].due) {
			_, _ = unix.Write(to, queue[0].data)
			queue = queue[1:]
		}
		n, err := unix.Read(from, buf)
		if err != nil || d.MTU > 0 && n > d.MTU {
			continue
		}
		if loses && d.Loses(buf[:n]) {
			d.all.Add(1)
			if rng.Float64() < math.Float64frombits(d.share.Load()) {
				d.lost.Add(1)
				continue
			}
		}
		queue = append(queue, packet{time.Now().Add(time.Duration(d.delay.Load())), append([]byte(nil), buf[:n]...)})
	}
}
