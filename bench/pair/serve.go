package pair

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/bench/machine"
)

// ServeOptions configure a server.
type ServeOptions struct {
	Address string        // to listen on, with or without port; default all addresses and DefaultPort
	Token   string        // that clients must have; "" for none
	MaxTime time.Duration // of one run; default 10 minutes
	MaxRate float64       // of one run, in bits of payload a second; 0 for none
	Version string        // of the program
	Log     func(string)  // receives a line for each run; may be nil
	// Listening is called when the server is ready; may be nil.
	Listening func(netip.AddrPort)
}

// Serve lets one client at a time measure, until ctx ends.
func Serve(ctx context.Context, o ServeOptions) error {
	o.Address = net.JoinHostPort(split(o.Address))
	if o.MaxTime == 0 {
		o.MaxTime = 10 * time.Minute
	}
	if o.Log == nil {
		o.Log = func(string) {}
	}
	if o.MaxTime < 0 || o.MaxRate < 0 {
		return fmt.Errorf("a limit of %v and %v bit/s: want no negative value", o.MaxTime, o.MaxRate)
	}
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", o.Address)
	if err != nil {
		return taken(err)
	}
	if err := udpFree(ctx, o.Address, addrPort(ln.Addr()).Port()); err != nil {
		ln.Close()
		return taken(err)
	}
	s := &server{o: o, slots: make(chan struct{}, maxConns), strangers: strangers{log: o.Log}}
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	defer s.conns.Wait()
	defer ln.Close()
	if o.Listening != nil {
		o.Listening(addrPort(ln.Addr()))
	}
	for {
		conn, err := ln.Accept()
		if ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			return nil
		}
		if err != nil {
			if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ECONNABORTED) {
				time.Sleep(10 * time.Millisecond)
				continue
			}
			return err
		}
		s.strangers.add(conn)
		s.conns.Go(func() { s.handle(ctx, conn) })
	}
}

// taken says what to do where another program has the port.
func taken(err error) error {
	if errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("%w: choose another port (--listen ADDRESS:PORT), and name it to `tulle bench run` (HOST:PORT)", err)
	}
	return err
}

// udpFree returns an error if the UDP port beside a TCP port belongs to another program: each measure opens it anew.
func udpFree(ctx context.Context, address string, port uint16) error {
	host, _, err := net.SplitHostPort(address) // with its zone
	if err != nil {
		return err
	}
	var lc net.ListenConfig
	c, err := lc.ListenPacket(ctx, "udp", net.JoinHostPort(host, strconv.Itoa(int(port))))
	if err != nil {
		return err
	}
	return c.Close()
}

// server is a running Serve.
type server struct {
	o         ServeOptions
	conns     sync.WaitGroup
	strangers strangers
	slots     chan struct{} // of data connections of the run

	mu  sync.Mutex
	run *session // nil: none
}

// session is the run of one client.
type session struct {
	secret secret
	peer   netip.Addr
	local  netip.AddrPort
	until  time.Time
	rate   float64

	mu     sync.Mutex
	job    *job // nil between measures
	failed error
}

func (s *server) handle(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	defer s.strangers.remove(conn)
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	kind, secret, flow, err := readPreamble(conn)
	if err != nil {
		return
	}
	if kind == kindControl {
		s.control(ctx, conn)
		return
	}
	s.mu.Lock()
	run := s.run
	s.mu.Unlock()
	if run == nil || subtle.ConstantTimeCompare(run.secret[:], secret[:]) != 1 {
		return
	}
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	default: // more than any client needs
		return
	}
	s.strangers.remove(conn)
	run.mu.Lock()
	j := run.job
	run.mu.Unlock()
	if j != nil {
		j.accept(conn, kind, flow)
	}
}

// control serves a control connection until it ends.
func (s *server) control(ctx context.Context, conn net.Conn) {
	c := newControl(conn)
	peer, local := addrPort(conn.RemoteAddr()), addrPort(conn.LocalAddr())
	nonce := make([]byte, 16)
	_, _ = rand.Read(nonce) // it never fails
	g := greeting{Version: version, Nonce: nonce, Token: s.o.Token != ""}
	if err := c.send(g); err != nil {
		return
	}
	var h hello
	if err := c.receive(&h, patience); err != nil {
		return
	}
	if s.o.Token != "" && !hmac.Equal(h.Proof, proof(s.o.Token, nonce)) {
		s.o.Log(fmt.Sprintf("%v: refused, its token is wrong", peer.Addr()))
		_ = c.send(welcome{Error: "the server wants a token, and this is not it (--token-file)"})
		return
	}
	run := &session{peer: peer.Addr(), local: local, until: time.Now().Add(s.o.MaxTime), rate: s.o.MaxRate}
	_, _ = rand.Read(run.secret[:])
	s.mu.Lock()
	if other := s.run; other != nil {
		s.mu.Unlock()
		_ = c.send(welcome{Error: fmt.Sprintf("the server is busy with a run of %v, for %v at most: try again then", other.peer, max(time.Until(other.until), time.Second).Round(time.Second))})
		return
	}
	s.run = run
	s.mu.Unlock()
	s.strangers.remove(conn)
	s.o.Log(fmt.Sprintf("%v: a run begins", peer.Addr()))
	err := s.serveRun(ctx, c, run)
	run.stopJob()
	s.mu.Lock()
	s.run = nil
	s.mu.Unlock()
	if err != nil {
		s.o.Log(fmt.Sprintf("%v: the run ended: %v", peer.Addr(), err))
	} else {
		s.o.Log(fmt.Sprintf("%v: the run ended", peer.Addr()))
	}
}

// serveRun obeys the client's orders.
func (s *server) serveRun(ctx context.Context, c *control, run *session) error {
	m := machine.Facts(run.local.Addr())
	m.End, m.Tulle = "to", s.o.Version
	w := welcome{Secret: run.secret, Machine: m, Boot: machine.BootID(), MaxTime: s.o.MaxTime.Seconds(), MaxRate: s.o.MaxRate, Loaded: true}
	if err := c.send(w); err != nil {
		return err
	}
	ctx, cancel := context.WithDeadline(ctx, run.until)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { c.conn.Close() })
	defer stop()
	for {
		var o order
		if err := c.receive(&o, idleLimit); err != nil {
			switch {
			case errors.Is(ctx.Err(), context.DeadlineExceeded):
				return fmt.Errorf("it took longer than %v", s.o.MaxTime)
			case isEOF(err) || ctx.Err() != nil:
				return nil
			case errors.Is(err, os.ErrDeadlineExceeded):
				return fmt.Errorf("nothing came for %v", idleLimit)
			}
			return err
		}
		r := run.obey(ctx, o)
		if err := c.send(r); err != nil {
			return err
		}
		if r.Error != "" {
			return errors.New(r.Error)
		}
	}
}

// obey carries out one order.
func (run *session) obey(ctx context.Context, o order) report {
	run.mu.Lock()
	j, failed := run.job, run.failed
	run.mu.Unlock()
	if failed != nil {
		return report{Error: failed.Error()}
	}
	switch o.Do {
	case jobEcho, jobSink, jobStream, jobLoaded, jobRespond:
		run.stopJob()
		if o.Flows < 1 || o.Flows > maxFlows {
			return report{Error: fmt.Sprintf("%d flows: want 1 to %d", o.Flows, maxFlows)}
		}
		j, err := startJob(ctx, run, o)
		if err != nil {
			return report{Error: err.Error()}
		}
		run.mu.Lock()
		run.job = j
		run.mu.Unlock()
		return report{}
	case "stop":
		run.stopJob()
		return report{}
	case "begin", "count", "end":
		if j == nil {
			return report{Error: "there is nothing to count: no measure has begun"}
		}
		return j.count(o.Do)
	}
	return report{Error: fmt.Sprintf("order %q is unknown: use the same version of tulle at both ends", o.Do)}
}

// stopJob ends the job and all its flows.
func (run *session) stopJob() {
	run.mu.Lock()
	j := run.job
	run.job = nil
	run.mu.Unlock()
	if j != nil {
		j.end()
	}
}

// fail makes the next order fail.
func (run *session) fail(err error) {
	run.mu.Lock()
	defer run.mu.Unlock()
	if run.failed == nil {
		run.failed = err
	}
}

// addrPort is a TCP address without IPv4 in IPv6.
func addrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	p := t.AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}
