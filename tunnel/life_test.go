package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/tunnel/device"
	"github.com/tulle-net/tulle/tunnel/encap"
)

// descriptors counts the process's open files.
func descriptors(t testing.TB) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(fds)
}

// An engine that has run leaves no goroutine and no descriptor, and its device and port can be had again at once.
func TestRunLeavesNothing(t *testing.T) {
	l := testLink{mode: encap.UDP}
	a, b := startPair(t, l)
	a.stop()
	before, ignore := descriptors(t), goleak.IgnoreCurrent()
	for range 5 {
		a.start(t, l, b)
		must(t, a.engine.Probe(b.ns, encap.UDP, false, []byte("again"), 0))
		b.probed(t)
		a.stop()
		var leak error
		for end := time.Now().Add(patience); ; { // on a busy machine, what ends by itself takes longer than goleak waits
			if leak = goleak.Find(ignore); leak == nil || time.Now().After(end) {
				break
			}
		}
		if leak != nil {
			t.Error(leak)
		}
		if now := descriptors(t); now > before { // fewer: the collector has closed what earlier tests left
			t.Fatalf("%d descriptors before, %d after", before, now)
		}
	}
}

// Stopping takes as long as one batch, not as long as the traffic.
func TestStopUnderTraffic(t *testing.T) {
	eachLink(t, func(t *testing.T, l testLink) {
		a, b := startPair(t, l)
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		defer wg.Wait()
		defer cancel()
		for _, pair := range [][2]*testNode{{a, b}, {b, a}} {
			to := netip.AddrPortFrom(pair[1].tun[0], 99)
			out := pair[0].listenUDP(t, netip.AddrPortFrom(pair[0].tun[0], 0))
			pair[1].listenUDP(t, to)
			wg.Go(func() {
				for data := make([]byte, 1200); ctx.Err() == nil; {
					out.WriteToUDPAddrPort(data, to)
				}
			})
		}
		for _, n := range []*testNode{a, b} {
			eventually(t, "traffic flows", func() bool { return n.engine.Stats().RxPackets > 1000 })
		}
		a.stop()
		b.stop()
	}, severalQueues()...)
}

// Tables change all the time under full traffic: nothing is lost, counters go on.
func TestUpdateUnderTraffic(t *testing.T) {
	eachLink(t, func(t *testing.T, l testLink) {
		a, b := startPair(t, l)
		b.echo(t, b.tun[0])
		b.echo(t, b.tun[1])
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		defer wg.Wait()
		defer cancel()
		for _, n := range []*testNode{a, b} {
			wg.Go(func() {
				var last PeerStats
				tick := time.NewTicker(200 * time.Microsecond) // the traffic needs a share of the processor, too
				defer tick.Stop()
				for i := 0; ctx.Err() == nil; i++ {
					<-tick.C
					peers := []Peer{n.peers[0]}
					for k := range i % 20 {
						p := n.peers[0]
						p.ID, p.Endpoint = fmt.Sprint("peer ", k), underlayOf(l.underlay6, 10+k)
						p.Accept, p.Prefixes, p.TunAddrs = []netip.Addr{p.Endpoint}, []netip.Prefix{spaceOf(0, 10+k), spaceOf(1, 10+k)}, nil
						peers = append(peers, p)
					}
					n.engine.Update(n.local, peers)
					now := n.engine.PeerStats(n.peers[0].ID)
					if now.TxPackets < last.TxPackets || now.RxBytes < last.RxBytes {
						t.Errorf("counters went back: %+v, then %+v", last, now)
						return
					}
					last = now
					n.engine.Stats()
				}
			})
		}
		for f := range 2 {
			bulk(t, a.dialTCP(t, a.tun[f], b.tun[f]), 4<<20, nil)
		}
		noDrops(t, a, b)
		cleanChecksums(t, a, b)
	}, severalQueues()...)
}

// A peer that is taken out gets nothing more and is a stranger from then on; put in again, it starts from zero.
func TestPeerRemoved(t *testing.T) {
	i := newIntruder(t, testLink{mode: encap.UDP})
	i.marker(0)
	eventually(t, "the marker is counted", func() bool { return i.victim.engine.PeerStats(i.member.ns).RxPackets == 1 })
	peers := i.victim.peers
	i.victim.update(peers[1:]...)
	before := i.victim.counts()
	inner := datagram{src: i.member.pod(0), dst: i.victim.pod(0), sport: 1, dport: 9, payload: []byte("late")}.bytes(t)
	i.wire.emit(outerPacket(t, encap.UDP, i.member.under, i.victim.under, 0, 0, inner))
	i.victim.moved(t, before, encap.DropNotMember, 1)
	i.silent(netip.Addr{})
	if s := i.victim.engine.PeerStats(i.member.ns); s != (PeerStats{}) {
		t.Errorf("a removed peer has %+v", s)
	}
	i.victim.update(peers...)
	i.marker(0)
	eventually(t, "the counters begin anew", func() bool { return i.victim.engine.PeerStats(i.member.ns).RxPackets == 1 })
}

// Without its port, an engine does not start, says why, and leaves nothing behind.
func TestBusyPort(t *testing.T) {
	for _, holder := range []int{1, 2} {
		a, _ := startPair(t, testLink{mode: encap.UDP, queues: holder})
		for _, queues := range []int{1, 2} { // several queues share a port among themselves, and with nobody else
			before := descriptors(t)
			must(t, a.in(func() error {
				dev, err := device.Open(device.Options{Name: "tun1", Queues: queues})
				if err != nil {
					return err
				}
				defer dev.Close()
				_, err = New(Config{Device: dev, Underlay: []netip.Addr{a.under}, UDPPort: 6080})
				if !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), "--udp-port") || strings.Contains(err.Error(), "all nodes") { // ports may differ
					t.Errorf("New on a busy port: %v, want EADDRINUSE and the flag that helps", err)
				}
				return nil
			}))
			if now := descriptors(t); now > before { // fewer: the collector has closed what earlier tests left
				t.Errorf("%d descriptors before, %d after", before, now)
			}
		}
	}
}

// How many sockets a later run may take over: what keeps them has a limit (FileDescriptorStoreMax of packaging/tulle.service).
func TestSockets(t *testing.T) {
	for _, queues := range []int{1, 3} {
		a, _ := startPair(t, testLink{queues: queues})
		if got, want := len(a.engine.Sockets()), 2*queues+2; got != want { // of the one underlay address
			t.Errorf("%d queues: %d sockets, want %d", queues, got, want)
		}
	}
}

// The device disappears under the engine: Run ends and says so.
func TestDeviceRemoved(t *testing.T) {
	n := newNode(t, 0, testLink{})
	var e *Engine
	must(t, n.in(func() (err error) {
		n.dev, err = device.Open(device.Options{Name: "tun0"})
		if err != nil {
			return err
		}
		e, err = New(Config{Device: n.dev, UDPPort: 6080})
		return err
	}))
	done := make(chan error, 1)
	go func() { done <- e.Run(t.Context()) }()
	e.Update(Local{}, nil)
	removeLink(t, n.ns, "tun0")
	select {
	case err := <-done:
		if !errors.Is(err, device.ErrGone) {
			t.Errorf("Run: %v, want %v", err, device.ErrGone)
		}
	case <-time.After(patience):
		t.Error("Run does not notice")
	}
}

// What arrives before the first tables, on kept sockets or in a kept device, waits for them: nothing is refused or lost.
func TestPacketsWaitForTheFirstUpdate(t *testing.T) {
	pinThreads(t)
	l := testLink{mode: encap.UDP}
	a, b := newNode(t, 0, l), newNode(t, 1, l)
	connect(t, l, a, b)
	b.late = true
	a.start(t, l, b)
	b.start(t, l, a)
	in := b.listenUDP(t, netip.AddrPortFrom(b.tun[0], 99))
	out := a.listenUDP(t, netip.AddrPortFrom(a.tun[0], 0))
	const packets = 20
	for i := range packets {
		_, err := out.WriteToUDPAddrPort([]byte{byte(i)}, netip.AddrPortFrom(b.tun[0], 99))
		must(t, err)
	}
	eventually(t, "all are sent", func() bool { return a.engine.Stats().TxPackets >= packets })
	b.update(a.asPeer(l))
	must(t, in.SetReadDeadline(time.Now().Add(patience)))
	for i := range packets {
		var buf [1]byte
		if _, _, err := in.ReadFromUDPAddrPort(buf[:]); err != nil || buf[0] != byte(i) {
			t.Fatalf("packet %d: got %d, %v", i, buf[0], err)
		}
	}
	noDrops(t, b)
}
