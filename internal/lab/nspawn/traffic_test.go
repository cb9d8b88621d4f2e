package nspawn

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

// traffic is what users notice a pause by: pings between two pods, a hundred a second, in both directions and both families, and
// a TCP transfer.
type traffic struct {
	t     *testing.T
	stop  context.CancelFunc
	done  sync.WaitGroup
	pings []*ping
	bytes atomic.Int64

	mu  sync.Mutex
	err error // of the transfer
}

// ping is one run of ping(8).
type ping struct {
	cmd *exec.Cmd
	out lockedBuffer // what it prints
}

const (
	// pingEvery leaves room in ping's own socket, which takes some 170 answers at once, for those that come together after five seconds: an agent
	// that has to wait for a CPU may take that long to start, and what its kernel has kept until then is not lost by Tulle.
	pingEvery = 30 * time.Millisecond
	// underWay is more than an answer takes.
	underWay = 100 * time.Millisecond
)

// between starts the traffic of two pods. end ends it.
func between(t *testing.T, l *lab.Lab, one, other string) *traffic {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	tr := &traffic{t: t, stop: cancel}
	for _, ends := range [][2]string{{one, other}, {other, one}} {
		from, err := l.Pod(ends[0])
		if err != nil {
			t.Fatal(err)
		}
		to, err := l.Pod(ends[1])
		if err != nil {
			t.Fatal(err)
		}
		for _, six := range []bool{false, true} {
			p := &ping{cmd: exec.CommandContext(t.Context(), "nsenter", "--net="+from.Netns, "ping", "-n",
				"-i", fmt.Sprint(pingEvery.Seconds()), to.Addr(six).String())}
			p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
			if err := p.cmd.Start(); err != nil {
				t.Fatal(err)
			}
			tr.pings = append(tr.pings, p)
		}
	}
	if err := tr.transfer(ctx, l, one, other); err != nil {
		t.Fatal(err)
	}
	return tr
}

// pingAnswer is a line of what ping(8) of iputils prints.
var pingAnswer = regexp.MustCompile(`icmp_seq=(\d+) .*time=([0-9.]+) ms`)

// answers are how many requests were answered, the last one that was, and the longest round trip.
func (p *ping) answers() (answered, last int, slowest time.Duration) {
	for _, m := range pingAnswer.FindAllStringSubmatch(p.out.String(), -1) {
		seq, _ := strconv.Atoi(m[1])
		ms, _ := strconv.ParseFloat(m[2], 64)
		answered++
		last, slowest = max(last, seq), max(slowest, time.Duration(ms*float64(time.Millisecond)))
	}
	return answered, last, slowest
}

// goesOn waits for the answer to a request that was not under way before.
func (p *ping) goesOn() error {
	_, before, _ := p.answers()
	for began := time.Now(); time.Since(began) < drainWithin; time.Sleep(underWay) {
		if _, last, _ := p.answers(); last > before+int(underWay/pingEvery) {
			return nil
		}
	}
	return fmt.Errorf("ping: none after request %d was answered for %v", before, drainWithin)
}

// end ends a ping, and returns how many requests were answered, how many before the last one that was were not, and the longest
// round trip. Those after the last one were on their way: goesOn has seen that what is sent arrives.
func (p *ping) end() (answered, lost int, slowest time.Duration, err error) {
	_ = p.cmd.Process.Signal(os.Interrupt)
	err = p.cmd.Wait()
	answered, last, slowest := p.answers()
	if answered == 0 || !strings.Contains(p.out.String(), " packets transmitted") {
		return 0, 0, 0, fmt.Errorf("ping: %w\n%s", err, p.out.String())
	}
	return answered, last - answered, slowest, nil
}

// transfer sends a sequence of bytes from one pod to the other, as fast as TCP allows, and compares what arrives with it.
func (tr *traffic) transfer(ctx context.Context, l *lab.Lab, from, to string) error {
	pod, err := l.Pod(to)
	if err != nil {
		return err
	}
	ln, err := l.Listen(ctx, to, "tcp", "[::]:5001")
	if err != nil {
		return err
	}
	defer ln.Close()
	out, err := l.Dial(ctx, from, "tcp", fmt.Sprintf("%s:5001", pod.Addr(false)))
	if err != nil {
		return err
	}
	in, err := ln.Accept()
	if err != nil {
		return err
	}
	tr.done.Go(func() {
		defer out.Close()
		defer context.AfterFunc(ctx, func() {
			late := time.Now().Add(drainWithin)
			_, _ = out.SetDeadline(late), in.SetDeadline(late)
		})()
		for i := 0; ctx.Err() == nil; i++ {
			if _, err := out.Write(block(i)); err != nil {
				tr.fail(err)
				return
			}
		}
	})
	tr.done.Go(func() {
		defer in.Close()
		for i := 0; ; i++ {
			got := make([]byte, blockLen)
			n, err := io.ReadFull(in, got)
			tr.bytes.Add(int64(n))
			switch {
			case errors.Is(err, io.EOF) && ctx.Err() != nil:
				return
			case err != nil:
				tr.fail(err)
				return
			case string(got) != string(block(i)):
				tr.fail(fmt.Errorf("block %d is not what was sent", i))
				return
			}
		}
	})
	return nil
}

const (
	blockLen = 64 << 10
	// drainWithin is how long what TCP holds may take to arrive when the transfer ends, and pings to be answered.
	drainWithin = 30 * time.Second
)

// block is a part of the transfer that no other part is equal to.
func block(i int) []byte {
	b := make([]byte, blockLen)
	for k := range b {
		b[k] = byte(k ^ i ^ i>>8 ^ i>>16)
	}
	return b
}

func (tr *traffic) fail(err error) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.err = errors.Join(tr.err, err)
}

// end ends the traffic. It fails the test if the transfer was damaged or broke off. It returns the most pings that any of the
// four lost, which in a row are the time without a connection.
func (tr *traffic) end(what string) (lost int) {
	tr.t.Helper()
	tr.stop() // answers wait no longer in queues that TCP fills
	tr.done.Wait()
	var slowest time.Duration
	sent := 0
	for _, p := range tr.pings {
		goesOn := p.goesOn()
		s, l, slow, err := p.end()
		if err := errors.Join(goesOn, err); err != nil {
			tr.t.Errorf("%s: %v", what, err)
		}
		sent, lost, slowest = sent+s, max(lost, l), max(slowest, slow)
	}
	tr.t.Logf("%s: %d pings of four answered, the most that one lost is %d; the slowest took %v; %d MB by TCP", what, sent, lost,
		slowest.Round(time.Millisecond), tr.bytes.Load()>>20)
	if tr.err != nil {
		tr.t.Errorf("%s: the transfer: %v", what, tr.err)
	}
	if tr.bytes.Load() == 0 {
		tr.t.Errorf("%s: nothing was transferred", what)
	}
	return lost
}
