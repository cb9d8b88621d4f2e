package pair

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
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
	wantError(t, "no token", err, "wants a token (--token)")
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
	at := local(t, ServeOptions{MaxTime: 300 * time.Millisecond})
	r, err := Run(t.Context(), RunOptions{Host: at, Rounds: 1})
	if err == nil {
		t.Fatalf("a run of %v s was allowed", r.Seconds)
	}
	wantError(t, "long run", err, "the server")
}

// Who sends more than the server allows is cut off; a client that keeps to it is slowed down.
func TestServeLimitsRate(t *testing.T) {
	at := local(t, ServeOptions{MaxRate: 50e6})
	c, err := client1(t, at, "")
	if err != nil {
		t.Fatal(err)
	}
	c.welcome.MaxRate = 0 // a client that does not care
	rn := &runner{c: c, full: 1400}
	conns, closeAll, err := c.sinkFlows(1)
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll()
	for range 20 {
		if _, err = rn.trial(t.Context(), conns, 1400, 0, 200*time.Millisecond); err != nil {
			break
		}
	}
	wantError(t, "flood", err, "more than the server's limit of 50000000 bit/s")
	var r *client
	for r == nil {
		if r, err = client1(t, at, ""); err != nil && !strings.Contains(err.Error(), "busy") {
			t.Fatal(err)
		}
	}
	rn = &runner{c: r, full: 1400}
	if conns, closeAll, err = r.sinkFlows(1); err != nil {
		t.Fatal(err)
	}
	defer closeAll()
	trial, err := rn.trial(t.Context(), conns, 1400, 0, 400*time.Millisecond)
	if err != nil || trial.SentRate()*1400*8 > 60e6 {
		t.Errorf("%v bit/s sent where 50 million are allowed: %v", trial.SentRate()*1400*8, err)
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
		"size":     {RunOptions{Host: "x", Sizes: []int{70000}}, "70000 bytes"},
	} {
		wantError(t, name, tc.o.Validate(), tc.want)
	}
	_, err := Run(t.Context(), RunOptions{Host: "127.0.0.1:1"})
	wantError(t, "no server", err, "is `tulle bench serve` running there")
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
			t.Errorf("%s: %v, %+v", name, err, r)
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
			wait = 10 * time.Second
		}
		_ = conn.SetReadDeadline(time.Now().Add(wait))
		n, err := conn.Read(make([]byte, 200))
		if (err == nil) != answered || answered && n != preambleSize {
			t.Errorf("from %s: %d bytes, %v", from, n, err)
		}
		conn.Close()
	}
}
