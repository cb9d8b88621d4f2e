package pair

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/bench/traffic"
)

// local runs a server on the loopback interface until the test ends.
func local(t *testing.T, o ServeOptions) (at string) {
	t.Helper()
	ready, ended := make(chan netip.AddrPort, 1), make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	o.Address, o.Listening = "127.0.0.1:0", func(a netip.AddrPort) { ready <- a }
	go func() { ended <- Serve(ctx, o) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return (<-ready).String()
}

func client1(t *testing.T, at, token string) (*client, error) {
	t.Helper()
	c, err := dial(t.Context(), &RunOptions{Host: at, Token: token}, netip.Addr{})
	if err == nil {
		t.Cleanup(func() { c.conn.Close() })
	}
	return c, err
}

func wantError(t *testing.T, what string, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%s: got %v, want something about %q", what, err, want)
	}
}

func TestServeRefuses(t *testing.T) {
	at := local(t, ServeOptions{Token: "open sesame"})
	_, err := client1(t, at, "")
	wantError(t, "no token", err, "wants a token (--token-file)")
	_, err = client1(t, at, "open barley")
	wantError(t, "wrong token", err, "this is not it")
	first, err := client1(t, at, "open sesame")
	if err != nil {
		t.Fatal(err)
	}
	_, err = client1(t, at, "open sesame")
	wantError(t, "second client", err, "busy with a run of 127.0.0.1")
	_, err = first.order(jobSink, maxFlows+1)
	wantError(t, "too many flows", err, "17 flows: want 1 to 16")
	var last error
	for last == nil { // an order that is refused ended the run; the server is free for the next
		var c *client
		if c, last = client1(t, at, "open sesame"); last == nil {
			_, err := c.order("dance", 0)
			wantError(t, "unknown order", err, `order "dance" is unknown`)
			break
		} else if strings.Contains(last.Error(), "busy") {
			last = nil
		}
	}
	if last != nil {
		t.Fatal(last)
	}
}

func TestServeEndsLongRuns(t *testing.T) {
	c, err := client1(t, local(t, ServeOptions{MaxTime: 300 * time.Millisecond}), "")
	for err == nil {
		_, err = c.order(jobEcho, 1)
	}
	wantError(t, "long run", err, "the server")
	_, err = Run(t.Context(), RunOptions{Host: local(t, ServeOptions{MaxTime: time.Minute}), Duration: 20 * time.Second, Only: []string{Latency}})
	wantError(t, "a round that is too long", err, "one round takes 2m40s at least, and the server allows 1m0s")
}

// What the server's time is too short for is said before it is measured.
func TestRunSaysThatTimeIsShort(t *testing.T) {
	for rounds, want := range map[int]bool{3: false, 30: true} {
		ctx, stop := context.WithCancel(t.Context())
		told := ""
		_, err := Run(ctx, RunOptions{Host: local(t, ServeOptions{MaxTime: time.Minute}), Rounds: rounds, Duration: 2 * time.Second, Only: []string{Latency}, Progress: func(s string) {
			if strings.HasPrefix(s, "round 1") {
				stop()
			} else {
				told = s
			}
		}})
		stop()
		if has := strings.Contains(told, "30 rounds take 8m0s at least, and the server ends the run after 1m0s"); err == nil || has != want {
			t.Errorf("%d rounds: %q (%v)", rounds, told, err)
		}
	}
}

// A server whose UDP port another program has is none.
func TestServeNeedsUDP(t *testing.T) {
	other, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	err = Serve(ctx, ServeOptions{Address: other.LocalAddr().String(), Listening: func(netip.AddrPort) { stop() }})
	wantError(t, "a UDP port that is taken", err, "address already in use: choose another port")
	for address, want := range map[string]string{"": ":17979", "10.0.0.7": "10.0.0.7:17979", "fd00::7": "[fd00::7]:17979", "[fd00::7]": "[fd00::7]:17979", "[fe80::7%eth0]:1": "[fe80::7%eth0]:1", ":1": ":1"} {
		if got := net.JoinHostPort(split(address)); got != want {
			t.Errorf("%q is %q, not %q", address, got, want)
		}
	}
}

// letters are a connection's end whose writes wait for nobody, like those of TCP.
type letters struct {
	net.Conn
	sent chan []byte
}

func (l letters) Write(b []byte) (int, error) {
	l.sent <- bytes.Clone(b)
	return len(b), nil
}

func (l letters) SetWriteDeadline(time.Time) error { return nil }

// A measure may take longer than a server waits for a client that says nothing. One that has gone is noticed.
func TestLongMeasure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		at := netip.MustParseAddrPort("127.0.0.1:1")
		out := letters{far, make(chan []byte, 100)}
		go func() {
			for b := range out.sent {
				if _, err := far.Write(b); err != nil {
					return
				}
			}
		}()
		ended := make(chan error, 1)
		go func() {
			run := &session{peer: at.Addr(), local: at, until: time.Now().Add(time.Hour)}
			s := &server{o: ServeOptions{MaxTime: time.Hour}}
			ended <- s.serveRun(t.Context(), newControl(out), run)
			close(out.sent)
			far.Close()
		}()
		c := &client{control: newControl(near)}
		if err := c.receive(&c.welcome, patience); err != nil {
			t.Fatal(err)
		}
		rn := &runner{c: c}
		if err := rn.take(t.Context(), measure{take: func(ctx context.Context, _ *result.Round) error {
			if _, err := c.order(jobRespond, 1); err != nil {
				return err
			}
			if _, err := c.order("begin", 0); err != nil {
				return err
			}
			if err := traffic.Sleep(ctx, 4*idleLimit); err != nil {
				return err
			}
			r, err := c.order("end", 0)
			if err == nil && r.Seconds != 4*idleLimit.Seconds() {
				t.Errorf("%v s were counted: this is the answer to another order", r.Seconds)
			}
			return err
		}}, &result.Round{}); err != nil {
			t.Errorf("a measure of %v: %v", 4*idleLimit, err)
		}
		if _, err := c.order("stop", 0); err != nil {
			t.Error(err)
		}
		silent := time.Now()
		if err := <-ended; err == nil || time.Since(silent) != idleLimit {
			t.Errorf("a client that says nothing was served for %v (%v)", time.Since(silent), err)
		}
		near.Close()
	})
}

// An answer may be late, as where packets are lost for some seconds. When none comes for as long as a server waits, the run is over, and nothing else waits for it again.
func TestLateAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer near.Close()
		defer far.Close()
		c, s := &client{control: newControl(near)}, newControl(far)
		go func() {
			var o order
			for s.receive(&o, time.Hour) == nil && o.Do != "end" {
				time.Sleep(idleLimit - time.Second)
				_ = s.send(report{})
			}
		}()
		for range 2 {
			if _, err := c.order("count", 0); err != nil {
				t.Fatal(err)
			}
		}
		for want := idleLimit; want >= 0; want -= idleLimit {
			began := time.Now()
			_, err := c.order("end", 0)
			wantError(t, "a server that is silent", err, "the server has not answered for 30s")
			if took := time.Since(began); took != want {
				t.Errorf("it was waited for %v, not %v", took, want)
			}
		}
		wantError(t, "a measure meanwhile", (&runner{c: c}).gone(unix.EAGAIN), "the server has not answered")
	})
}

// Who sends more than the server allows is cut off; a client that keeps to it is slowed down.
func TestServeLimitsRate(t *testing.T) {
	at := local(t, ServeOptions{MaxRate: 5e6}) // little: on a busy machine most of the time between two floods is waiting, which counts, too
	c, err := client1(t, at, "")
	if err != nil {
		t.Fatal(err)
	}
	c.welcome.MaxRate = 0 // a client that does not care
	rn := &runner{c: c, full: 1400}
	conns, closeAll, err := c.sinkFlows(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll()
	for range 100 {
		if _, err = rn.trial(t.Context(), conns, 1400, 0, 200*time.Millisecond); err != nil {
			break
		}
	}
	wantError(t, "flood", err, "more than the server's limit of 5000000 bit/s")
	var r *client
	for r == nil {
		if r, err = client1(t, at, ""); err != nil && !strings.Contains(err.Error(), "busy") {
			t.Fatal(err)
		}
	}
	rn = &runner{c: r, full: 1400}
	if conns, closeAll, err = r.sinkFlows(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	defer closeAll()
	trial, err := rn.trial(t.Context(), conns, 1400, 0, 400*time.Millisecond)
	if err != nil || trial.SentRate()*1400*8 > 6e6 {
		t.Errorf("%v bit/s sent where 5 million are allowed: %v", trial.SentRate()*1400*8, err)
	}
}

// Whatever connects and speaks something else ends nothing but itself.
func TestServeStrangers(t *testing.T) {
	at := local(t, ServeOptions{})
	for _, say := range []string{"", "GET / HTTP/1.1\r\nHost: x\r\n\r\n" + strings.Repeat("x", 64), string(appendPreamble(nil, kindData, secret{1}, 0)),
		string(appendPreamble(nil, kindControl, secret{}, 0)) + "{\n", string(appendPreamble(nil, kindControl, secret{}, 0)) + strings.Repeat("[", maxLine+1),
		string(appendPreamble(nil, 'Z', secret{}, maxFlows+5))} {
		c, err := net.Dial("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write([]byte(say))
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := client1(t, at, ""); err != nil {
		t.Errorf("a client after strangers: %v", err)
	}
}

// Who holds connections open keeps no client out, and disturbs no run.
func TestStrangersGiveWay(t *testing.T) {
	var mu sync.Mutex
	var logged []string
	at := local(t, ServeOptions{Token: "open sesame", Log: func(s string) {
		mu.Lock()
		defer mu.Unlock()
		logged = append(logged, s)
	}})
	hold := func() {
		for range maxStrangers + maxConns {
			conn, err := net.Dial("tcp", at)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { conn.Close() })
		}
	}
	hold()
	c, err := client1(t, at, "open sesame")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.order(jobRespond, 1); err != nil {
		t.Fatal(err)
	}
	fd, err := c.stream(0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	request, buf := make([]byte, traffic.Request), make([]byte, traffic.Request)
	for range 2 {
		if err := traffic.Exchange(t.Context(), fd, request, buf); err != nil {
			t.Error(err)
		}
		if _, err := c.order("count", 0); err != nil {
			t.Error(err)
		}
		hold()
	}
	mu.Lock()
	defer mu.Unlock()
	told := slices.DeleteFunc(slices.Clone(logged), func(s string) bool { return !strings.Contains(s, "the oldest give way") })
	if len(told) != 1 || !strings.HasPrefix(told[0], "127.0.0.1: 64 connections that belong to no run are open") {
		t.Errorf("the log says %q", logged)
	}
}

func TestRunRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		o    RunOptions
		want string
	}{
		"host":     {RunOptions{}, "no host"},
		"rounds":   {RunOptions{Host: "x", Rounds: -1}, "-1 rounds"},
		"duration": {RunOptions{Host: "x", Duration: time.Hour}, "a duration of 1h0m0s"},
		"streams":  {RunOptions{Host: "x", Streams: 17}, "17 streams: want 2 to 16"},
		"rate":     {RunOptions{Host: "x", Rate: 1e9}, "want 1 to 100000"},
		"twice":    {RunOptions{Host: "x", Sizes: []int{64, 64}}, "a payload of 64 bytes is named twice"},
		"size":     {RunOptions{Host: "x", Sizes: []int{70000}}, "70000 bytes"},
		"port":     {RunOptions{Host: "x:99999"}, `"99999" is no port: want HOST or HOST:PORT`},
		"port 0":   {RunOptions{Host: "[fd00::1]:0"}, `"0" is no port`},
		"URL":      {RunOptions{Host: "http://x"}, `"//x" is no port`},
		"zone":     {RunOptions{Host: "fe80::1"}, "such as fe80::1%eth0"},
	} {
		wantError(t, name, tc.o.Validate(), tc.want)
	}
	_, err := Run(t.Context(), RunOptions{Host: "127.0.0.1:1"})
	wantError(t, "no server", err, "is `tulle bench serve` running there")
	for host, want := range map[string]string{"127.0.0.1": "no IPv6 address: leave --six out", "fe80::1%nosuch0": `an interface "nosuch0"?`, "no such host": `find the address of "no such host"`} {
		if _, err := Run(t.Context(), RunOptions{Host: host, Six: true}); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "running there") {
			t.Errorf("%s: got %v, want %q", host, err, want)
		}
	}
}

// Ctrl-C keeps complete rounds, and a server that dies keeps them too.
func TestInterrupted(t *testing.T) {
	for name, kill := range map[string]func(stopServer, stopRun context.CancelFunc){
		"Ctrl-C":          func(_, run context.CancelFunc) { run() },
		"the server dies": func(server, _ context.CancelFunc) { server() },
	} {
		ready := make(chan netip.AddrPort, 1)
		served, stopServer := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() {
			ended <- Serve(served, ServeOptions{Address: "127.0.0.1:0", Listening: func(a netip.AddrPort) { ready <- a }})
		}()
		ctx, stopRun := context.WithCancel(t.Context())
		r, err := Run(ctx, RunOptions{Host: (<-ready).String(), Rounds: 3, Duration: shortest, Progress: func(s string) {
			if strings.HasPrefix(s, "round 2 of 3: TCP, one") {
				kill(stopServer, stopRun)
			}
		}})
		stopServer()
		stopRun()
		if serr := <-ended; serr != nil {
			t.Errorf("%s: serve: %v", name, serr)
		}
		if err != nil || !r.Interrupted || len(r.Modes[0].Rounds) != 1 || !strings.Contains(r.Verdict(), "INTERRUPTED after 1 of 3 rounds") {
			t.Fatalf("%s: %v, %+v", name, err, r)
		}
		for _, key := range r.Asked {
			if r.Metric(key).Unit == "" {
				t.Errorf("a measure was asked for whose main metric, %s, is in no round", key)
			}
		}
		if len(r.Asked) != 12 {
			t.Errorf("12 measures were asked for, and these are listed: %v", r.Asked)
		}
	}
}

// A flow that knows the secret but comes from elsewhere gets no answer: a server cannot be used against others.
func TestNoReflection(t *testing.T) {
	at := local(t, ServeOptions{})
	c, err := client1(t, at, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.order(jobEcho, 1); err != nil {
		t.Fatal(err)
	}
	for from, answered := range map[string]bool{"127.0.0.1": true, "127.0.0.9": false} {
		conn, err := net.DialUDP("udp", &net.UDPAddr{IP: net.ParseIP(from)}, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(at)))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write(appendPreamble(nil, kindHello, c.welcome.Secret, 0)); err != nil {
			t.Fatal(err)
		}
		wait := 300 * time.Millisecond
		if answered {
			wait = 30 * time.Second
		}
		_ = conn.SetReadDeadline(time.Now().Add(wait))
		n, err := conn.Read(make([]byte, 200))
		if (err == nil) != answered || answered && n != preambleSize {
			t.Errorf("from %s: %d bytes, %v", from, n, err)
		}
		conn.Close()
	}
}

// sendsForEver sends on a data connection until the server ends it, and says so.
func sendsForEver(t *testing.T, c *client, do string) (ended chan struct{}) {
	t.Helper()
	if _, err := c.order(do, 1); err != nil {
		t.Fatal(err)
	}
	fd, err := c.stream(0)
	if err != nil {
		t.Fatal(err)
	}
	ended = make(chan struct{})
	go func() { // ends with the server
		defer close(ended)
		defer unix.Close(fd)
		b := make([]byte, traffic.TCPBuffer)
		for {
			if _, err := unix.Write(fd, b); err != nil && err != unix.EINTR && err != unix.EAGAIN {
				return
			}
		}
	}()
	return ended
}

// within fails the test if something does not happen. The limit is for machines that stand still.
func within(t *testing.T, what string, happens <-chan struct{}) {
	t.Helper()
	select {
	case <-happens:
	case <-time.After(time.Minute):
		t.Fatalf("%s: not within a minute", what)
	}
}

// A client that sends on and on by TCP is cut off at the server's limit, and is told why.
func TestServeCutsOffTCP(t *testing.T) {
	c, err := client1(t, local(t, ServeOptions{MaxRate: 1e6}), "")
	if err != nil {
		t.Fatal(err)
	}
	within(t, "the client is cut off", sendsForEver(t, c, jobStream))
	_, err = c.order("stop", 0)
	wantError(t, "the order after it", err, "more than the server's limit of 1000000 bit/s")
}

// The client keeps to the server's limit in the measures that wait for answers, too.
func TestRunKeepsToLimit(t *testing.T) {
	c, err := client1(t, local(t, ServeOptions{MaxRate: 1e6}), "")
	if err != nil {
		t.Fatal(err)
	}
	rn := &runner{c: c, o: RunOptions{Rate: 1e5, Duration: 300 * time.Millisecond}, r: &result.Run{Machines: make([]result.Machine, 2)}}
	var d result.Round
	for i, take := range []func(context.Context, *result.Round) error{rn.pingPong(1000), rn.openLoop(1000), rn.requests, rn.connections} {
		if err := take(t.Context(), &d); err != nil {
			t.Fatal(err)
		}
		l := d.Latency[i]
		if most := 1e6/8*l.Seconds/float64(l.Payload) + 2; l.Answers == 0 || float64(l.Answers+l.Lost) > most {
			t.Errorf("%s at %d bytes: %d exchanges in %v s, where %.0f are allowed", l.Kind, l.Payload, l.Answers+l.Lost, l.Seconds, most)
		}
	}
	rn.o.Gentle = true
	if err := rn.requests(t.Context(), &d); err != nil || d.Latency[4].Offered != 1e6/8/traffic.Request {
		t.Errorf("requests are held to 1,953 a second, and the result says %v (%v)", d.Latency[4].Offered, err)
	}
	rn.o.Duration = time.Millisecond
	wantError(t, "a limit below one datagram", rn.pingPong(1000)(t.Context(), &d), "the limit of 1000000 bit/s allows less than one exchange of 1000 bytes within 1ms")
	for name, take := range map[string]func(context.Context, *result.Round) error{"a flood": rn.flood(1), "a search": rn.search(1000, false)} {
		rn.full = 1000
		wantError(t, name+" of less than one datagram", take(t.Context(), &d), "allows less than one datagram of 1000 bytes within")
	}
}

// When the server has cut a measure off, its reason is the error, and not what follows from it.
func TestRunSaysWhy(t *testing.T) {
	c, err := client1(t, local(t, ServeOptions{MaxRate: 1e6}), "")
	if err != nil {
		t.Fatal(err)
	}
	rn := &runner{c: c, r: &result.Run{Machines: make([]result.Machine, 2)}}
	err = rn.overUDP(t.Context(), &result.Round{}, func(fd int) (*result.Latency, error) {
		b := make([]byte, 60000)
		for silent := 0; silent < 20; silent++ { // until the server answers no more
			_, _ = unix.Write(fd, b)
			if _, err := unix.Read(fd, b); err == nil {
				silent = 0
			}
		}
		return &result.Latency{Payload: len(b)}, nil
	})
	wantError(t, "echoes", err, "more than the server's limit of 1000000 bit/s")
	if c, err = client1(t, local(t, ServeOptions{MaxRate: 1e6}), ""); err != nil {
		t.Fatal(err)
	}
	within(t, "the client is cut off", sendsForEver(t, c, jobStream))
	rn = &runner{c: c}
	wantError(t, "TCP", rn.gone(unix.ECONNRESET), "more than the server's limit of 1000000 bit/s")
	wantError(t, "when the server has gone", rn.gone(unix.ECONNRESET), "reset")
}

// Requests are held against the limit, too.
func TestServeCountsRequests(t *testing.T) {
	c, err := client1(t, local(t, ServeOptions{}), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.order(jobRespond, 1); err != nil {
		t.Fatal(err)
	}
	request, buf := appendPreamble(nil, kindOnce, c.welcome.Secret, 0), make([]byte, preambleSize)
	one, err := traffic.Dial(c.from, traffic.Sockaddr(c.to))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(one)
	stream, err := c.stream(0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(stream)
	for _, fd := range []int{one, stream, stream} {
		if err := traffic.Exchange(t.Context(), fd, request, buf); err != nil {
			t.Fatal(err)
		}
	}
	if r, err := c.order("count", 0); err != nil || r.Bytes != 3*preambleSize {
		t.Errorf("%d bytes of three requests were counted (%v)", r.Bytes, err)
	}
}

// Whatever a client does, a run ends after its time, and the server when it is told to.
func TestServeEndsThoughDataComes(t *testing.T) {
	for _, do := range []string{jobStream, jobRespond} {
		at := local(t, ServeOptions{MaxTime: 500 * time.Millisecond})
		c, err := client1(t, at, "")
		if err != nil {
			t.Fatal(err)
		}
		ended := sendsForEver(t, c, do)
		free := make(chan struct{})
		go func() { // ends with the run
			defer close(free)
			for {
				next, err := dial(t.Context(), &RunOptions{Host: at}, netip.Addr{})
				if err == nil {
					next.conn.Close()
					return
				}
				if !strings.Contains(err.Error(), "busy") {
					t.Errorf("the next client: %v", err)
					return
				}
			}
		}()
		within(t, do+": the run ends", ended)
		within(t, do+": the next client", free)
	}
	for _, do := range []string{jobStream, jobRespond} {
		ctx, interrupt := context.WithCancel(t.Context())
		ready, ended := make(chan netip.AddrPort, 1), make(chan struct{})
		go func() {
			defer close(ended)
			if err := Serve(ctx, ServeOptions{Address: "127.0.0.1:0", Listening: func(a netip.AddrPort) { ready <- a }}); err != nil {
				t.Errorf("serve: %v", err)
			}
		}()
		c, err := client1(t, (<-ready).String(), "")
		if err != nil {
			t.Fatal(err)
		}
		sent := sendsForEver(t, c, do)
		interrupt()
		within(t, do+": the server ends", ended)
		within(t, do+": the client is cut off", sent)
	}
}
