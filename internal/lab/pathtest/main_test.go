package pathtest

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/testing/hosts"
)

func TestMain(m *testing.M) { os.Exit(hosts.Main(m)) }

// stage is two hosts with a router between them, and a pod on each.
type stage struct {
	net          *hosts.Net
	a, b, router *hosts.Host
	far          *hosts.Host  // beyond, if the test has one
	first        *hosts.Agent // of a
	second       *hosts.Agent // of b
	pod, other   *hosts.Pod
}

const (
	addrA = "10.0.1.11"
	addrB = "10.0.2.12"
)

// newStage starts it. MTUs are those of the links of a and of b. Each agent has the file "tulle.yaml" with its paths, so
// that a reload can change them.
func newStage(t *testing.T, paths string, mtuA, mtuB int) *stage {
	t.Helper()
	n := hosts.New(t)
	s := &stage{net: n, a: n.Host("a"), b: n.Host("b"), router: n.Host("r")}
	s.a.LinkMTU("eth0", addrA+"/24", s.router, "toa", "10.0.1.1/24", mtuA)
	s.b.LinkMTU("eth0", addrB+"/24", s.router, "tob", "10.0.2.1/24", mtuB)
	s.router.Sysctl("net.ipv4.ip_forward", "1")
	s.a.IP("route add default via 10.0.1.1")
	s.b.IP("route add default via 10.0.2.1")
	s.start(t, paths)
	return s
}

// start starts the agents and pods, and waits until they reach each other.
func (s *stage) start(t *testing.T, paths string) {
	t.Helper()
	s.first = s.a.Agent("--bootstrap", "--join", addrB, "--cluster-cidr", "10.244.0.0/16", "--config", writePaths(s.a, paths))
	s.second = s.b.Agent("--join", addrA, "--config", writePaths(s.b, paths))
	s.first.Ready(30 * time.Second)
	s.second.Ready(30 * time.Second)
	s.pod, s.other = s.first.Pod("web"), s.second.Pod("db")
	hosts.Within(t, 20*time.Second, "pods reach each other", func() error { return s.pod.Ping(s.other.IPv4()) })
}

func writePaths(h *hosts.Host, paths string) string {
	return h.WriteFile("tulle.yaml", "paths: ["+paths+"]\n")
}

// uses waits until both hosts send by the mode, their path's MTU found.
func (s *stage) uses(t *testing.T, limit time.Duration, mode string) {
	t.Helper()
	took := hosts.Within(t, limit, "both hosts use "+mode, func() error {
		for _, ag := range []*hosts.Agent{s.first, s.second} {
			if p, err := path(ag); err != nil || p.Mode != mode || p.State != api.PathUp {
				return fmt.Errorf("%s: %+v %w", ag.Host.Name, p, err)
			}
		}
		return nil
	})
	t.Logf("both hosts use %s after %v", mode, took.Round(10*time.Millisecond))
}

// path is an agent's path to its only peer.
func path(ag *hosts.Agent) (api.Path, error) {
	st, err := ag.TryStatus()
	if err != nil {
		return api.Path{}, err
	}
	if len(st.Peers) != 1 {
		return api.Path{}, fmt.Errorf("%d peers", len(st.Peers))
	}
	return st.Peers[0].Path, nil
}

// candidate is one of the ways that an agent sees to its only peer.
func candidate(t *testing.T, ag *hosts.Agent, mode string) api.Candidate {
	t.Helper()
	for _, p := range ag.Status().Peers {
		for _, c := range p.Candidates {
			if c.Mode == mode {
				return c
			}
		}
	}
	t.Fatalf("%s has no candidate %s", ag.Host.Name, mode)
	return api.Candidate{}
}

// contains fails the test if a text lacks something.
func contains(t *testing.T, what, text string, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(text, w) {
			t.Errorf("%s lacks %q: %s", what, w, text)
		}
	}
}

// says waits until a text has all the words.
func says(t *testing.T, what string, text func() string, words ...string) {
	t.Helper()
	hosts.Within(t, 10*time.Second, fmt.Sprintf("%s says %q", what, words), func() error {
		is := text()
		for _, w := range words {
			if !strings.Contains(is, w) {
				return fmt.Errorf("it lacks %q: %s", w, is)
			}
		}
		return nil
	})
}

// command is what the command line prints against an agent.
func command(ag *hosts.Agent, args ...string) func() string {
	return func() string { out, _, _ := ag.Tulle(args...); return out }
}

// reason is what an agent says of one of the ways to its only peer.
func reason(t *testing.T, ag *hosts.Agent, mode string) func() string {
	return func() string { return candidate(t, ag, mode).Reason }
}

// transfer is a TCP stream of random bytes, some megabytes a second, that goes on until it is stopped.
type transfer struct {
	stopping atomic.Bool
	wg       sync.WaitGroup
	last     atomic.Int64 // when bytes last arrived, Unix nanoseconds
	longest  atomic.Int64 // nanoseconds without any
	bytes    atomic.Int64
	errs     [2]error
}

// transfer starts one from the first pod to the second, by IPv4.
func (s *stage) transfer(t *testing.T) *transfer {
	t.Helper()
	return s.transferTo(t, s.other.IPv4())
}

// transferTo starts one to an address of the second pod.
func (s *stage) transferTo(t *testing.T, addr netip.Addr) *transfer {
	t.Helper()
	to := netip.AddrPortFrom(addr, 9000)
	var ln *net.TCPListener
	var out *net.TCPConn
	check := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	check(s.other.Do(func() (err error) { ln, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(to)); return }))
	defer ln.Close()
	check(s.pod.Do(func() (err error) { out, err = net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(to)); return }))
	in, err := ln.AcceptTCP()
	check(err)
	x := &transfer{}
	x.last.Store(time.Now().UnixNano())
	x.wg.Go(func() { x.errs[0] = x.send(out) })
	x.wg.Go(func() { x.errs[1] = x.receive(in) })
	t.Cleanup(func() { x.stopping.Store(true); x.wg.Wait() })
	return x
}

const patience = 20 * time.Second // of either side of a transfer

func (x *transfer) send(c *net.TCPConn) error {
	defer c.Close()
	r := rand.NewChaCha8([32]byte{})
	buf := make([]byte, 64<<10)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !x.stopping.Load() {
		_, _ = r.Read(buf)
		if err := c.SetWriteDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		if _, err := c.Write(buf); err != nil {
			return err
		}
		<-tick.C
	}
	return nil
}

func (x *transfer) receive(c *net.TCPConn) error {
	defer c.Close()
	r := rand.NewChaCha8([32]byte{})
	buf, want := make([]byte, 256<<10), make([]byte, 256<<10)
	for {
		if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		n, err := c.Read(buf)
		now := time.Now().UnixNano()
		x.longest.Store(max(x.longest.Load(), now-x.last.Swap(now)))
		x.bytes.Add(int64(n))
		if _, _ = r.Read(want[:n]); string(buf[:n]) != string(want[:n]) {
			return fmt.Errorf("other bytes than were sent, after %d", x.bytes.Load())
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// progress waits until more bytes arrive.
func (x *transfer) progress(t *testing.T, limit time.Duration) {
	t.Helper()
	before := x.bytes.Load()
	hosts.Within(t, limit, "the transfer goes on", func() error {
		if n := x.bytes.Load(); n < before+500_000 {
			return fmt.Errorf("%d bytes more", n-before)
		}
		return nil
	})
}

// stop ends the transfer, fails the test if it broke, and returns the longest time without an arrival.
func (x *transfer) stop(t *testing.T) time.Duration {
	t.Helper()
	x.stopping.Store(true)
	x.wg.Wait()
	for _, err := range x.errs {
		if err != nil {
			t.Errorf("the transfer broke: %v", err)
		}
	}
	return time.Duration(x.longest.Load())
}
