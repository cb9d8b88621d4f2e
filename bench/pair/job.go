package pair

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/bench/machine"
	"github.com/tulle-net/tulle/bench/traffic"
)

// job is the server's part of one measure.
type job struct {
	run  *session
	do   string
	most int // flows
	stop atomic.Bool
	done chan struct{} // closed by end
	work sync.WaitGroup

	got     atomic.Int64 // bytes that came, except to sinks
	mu      sync.Mutex
	flows   int // of UDP
	conns   int // data connections, those that have ended included
	sinks   []*sink
	streams map[int]struct{} // sockets of data connections
	closed  bool

	begun time.Time
	base  int64
	cpu   *machine.Meter // nil: not readable
}

// sink is one UDP flow that is counted.
type sink struct {
	traffic.Sink
	conn *ipv4.PacketConn
}

func startJob(ctx context.Context, run *session, o order) (*job, error) {
	j := &job{run: run, do: o.Do, most: o.Flows, done: make(chan struct{}), streams: map[int]struct{}{}}
	if o.Do == jobEcho || o.Do == jobSink || o.Do == jobLoaded {
		fd, _, err := traffic.Socket(run.local, unix.SOCK_DGRAM)
		if err != nil {
			return nil, fmt.Errorf("UDP socket: %w", err)
		}
		j.work.Go(func() {
			defer unix.Close(fd)
			j.welcomeFlows(fd)
		})
	}
	if run.rate > 0 {
		j.work.Go(func() { j.watch(ctx) })
	}
	return j, nil
}

// end stops the job and waits for its goroutines.
func (j *job) end() {
	close(j.done)
	j.cutOff()
	j.work.Wait()
}

// cutOff ends all flows, whatever the client does, and lets no new ones begin. Connections end with a reset: a client whose window is
// full would not see another end.
func (j *job) cutOff() {
	j.stop.Store(true)
	j.mu.Lock()
	defer j.mu.Unlock()
	j.closed = true
	for _, s := range j.sinks {
		s.conn.Close()
	}
	for fd := range j.streams {
		_, _ = traffic.Reset(fd), unix.Shutdown(fd, unix.SHUT_RDWR) // the client may have ended it
	}
}

// watch fails the run when its client sends more than it may, and cuts it off.
func (j *job) watch(ctx context.Context) {
	const window, burst, tolerance = 500 * time.Millisecond, 16 << 20, 1.25 // burst: what buffers hold, in bytes
	start, tick := time.Now(), time.NewTicker(window)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-j.done:
			return
		case <-tick.C:
		}
		allowed := tolerance*j.run.rate/8*time.Since(start).Seconds() + burst
		if got := float64(j.bytes()); got > allowed {
			j.run.fail(fmt.Errorf("%.0f bytes came in %v: more than the server's limit of %.0f bit/s", got, time.Since(start).Round(time.Millisecond), j.run.rate))
			j.cutOff()
			return
		}
	}
}

func (j *job) bytes() int64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	n := j.got.Load()
	for _, s := range j.sinks {
		n += s.Bytes()
	}
	return n
}

// welcomeFlows answers the first datagrams of flows, each of which gets a socket of its own.
func (j *job) welcomeFlows(fd int) {
	buf := make([]byte, 2*preambleSize)
	for !j.stop.Load() {
		n, from, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			if !traffic.Passing(err) {
				return
			}
			continue
		}
		kind, s, flow, err := parsePreamble(buf[:n])
		if err != nil || kind != kindHello || s != j.run.secret || flow >= j.most {
			continue
		}
		if source := traffic.AddrPort(from); source.Addr() == j.run.peer {
			j.welcome(source, flow)
		}
	}
}

// welcome starts a UDP flow. Its answer goes out three times, because a sink does not answer again.
func (j *job) welcome(source netip.AddrPort, flow int) {
	fd, _, err := traffic.Socket(j.run.local, unix.SOCK_DGRAM)
	if err != nil {
		return
	}
	if err := unix.Connect(fd, traffic.Sockaddr(source)); err != nil {
		unix.Close(fd)
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.flows++; j.closed || j.flows > 8*maxFlows { // clients try again from other ports
		unix.Close(fd)
		return
	}
	answer := appendPreamble(nil, kindWelcome, j.run.secret, flow)
	for range 3 {
		_, _ = unix.Write(fd, answer) // the client asks again
	}
	if j.do == jobEcho || j.do == jobLoaded {
		j.work.Go(func() {
			defer unix.Close(fd)
			traffic.Echo(fd, &j.got, &j.stop)
		})
		return
	}
	conn, err := traffic.PacketConn(fd)
	if err != nil {
		return
	}
	s := &sink{conn: conn}
	j.sinks = append(j.sinks, s)
	j.work.Go(func() { _ = s.Run(conn) }) // the client counts what is missing
}

// accept takes over a connection of the job's client, until it ends.
func (j *job) accept(conn net.Conn, kind byte, _ int) {
	switch {
	case kind == kindOnce && j.do == jobRespond:
		_ = conn.SetDeadline(time.Now().Add(patience))
		j.got.Add(preambleSize)
		if _, err := conn.Write(appendPreamble(nil, kindOnce, secret{}, 0)); err == nil {
			_, _ = io.Copy(io.Discard, io.LimitReader(conn, 1)) // until the client resets it
		}
	case kind == kindData && (j.do == jobRespond || j.do == jobStream || j.do == jobLoaded):
		fd, err := blocking(conn)
		if err != nil {
			return
		}
		defer unix.Close(fd)
		j.mu.Lock()
		if j.conns++; j.closed || j.conns > j.most {
			j.mu.Unlock()
			return
		}
		j.work.Add(1)
		j.streams[fd] = struct{}{}
		j.mu.Unlock()
		defer func() { // before its number is another socket's
			j.mu.Lock()
			defer j.mu.Unlock()
			delete(j.streams, fd)
		}()
		ended := make(chan struct{})
		go func() { // on its own thread
			defer j.work.Done()
			defer close(ended)
			if j.do == jobRespond {
				traffic.Respond(fd, &j.got, &j.stop)
			} else {
				_ = traffic.TCPSink(fd, &j.got, &j.stop) // the client notices when nothing arrives
			}
		}()
		<-ended
	}
}

// blocking is a blocking duplicate of a connection's socket, with a read timeout.
func blocking(conn net.Conn) (int, error) {
	t, ok := conn.(*net.TCPConn)
	if !ok {
		return -1, errors.New("no TCP connection")
	}
	f, err := t.File()
	if err != nil {
		return -1, err
	}
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0) // Fd makes the socket blocking
	if err != nil {
		return -1, err
	}
	wait := unix.NsecToTimeval(int64(traffic.ReadTimeout))
	return fd, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait)
}

// count carries out "begin", "count" and "end".
func (j *job) count(do string) report {
	j.mu.Lock()
	defer j.mu.Unlock()
	if do == "begin" {
		for _, s := range j.sinks {
			s.Reset()
		}
		j.cpu = nil
		if m, err := machine.Start(nil); err == nil {
			j.cpu = &m
		}
		j.begun, j.base = time.Now(), j.got.Load()
		return report{}
	}
	r := report{Bytes: j.got.Load() - j.base, Seconds: time.Since(j.begun).Seconds()}
	for _, s := range j.sinks {
		received, reordered, arriving := s.Count()
		r.Received += received
		r.Reordered += reordered
		r.Arriving = max(r.Arriving, arriving)
	}
	if do == "end" && j.cpu != nil {
		if u, err := j.cpu.Stop(); err == nil {
			r.CPU = &u
		}
	}
	return r
}
