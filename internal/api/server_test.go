package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// echo answers each verb with what it was asked, so that a test sees both directions of the wire. fail, if set, is every
// verb's error instead.
type echo struct {
	fail func(ctx context.Context) error
	got  any
}

func (e *echo) do(ctx context.Context, req any) error {
	e.got = req
	if e.fail != nil {
		return e.fail(ctx)
	}
	return nil
}

var (
	node   = NodeRef{Name: "node-b", ID: "0b"}
	prefix = netip.MustParsePrefix("10.244.7.0/24")
	addr   = netip.MustParseAddr("10.244.7.3")
	addr6  = netip.MustParseAddr("fd00:10:244:7::3")
	when   = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	path   = Path{Mode: "udp", State: PathUp, RTTUS: 180, Loss: 0.25, MTU: 1422, Since: when, Reason: "answers"}
	peer   = Peer{Name: "node-b", ID: "0b", State: PeerAlive, Since: when, Underlay: []netip.Addr{addr}, Prefixes: []netip.Prefix{prefix},
		Path: path, Candidates: []Candidate{{Path: path, Active: true, Endpoint: netip.AddrPortFrom(addr, 6080)}}}
)

func (e *echo) Status(ctx context.Context) (Status, error) {
	return Status{Version: "v1", Ready: true, Node: Node{Name: "node-a", Prefixes: []netip.Prefix{prefix}}, Peers: []Peer{peer},
		Drops: map[string]uint64{"not_member": 3}}, e.do(ctx, nil)
}
func (e *echo) Peers(ctx context.Context) ([]Peer, error) { return []Peer{peer}, e.do(ctx, nil) }
func (e *echo) Route(ctx context.Context, a netip.Addr) (RouteAnswer, error) {
	return RouteAnswer{Address: a, Kind: RouteRemote, Prefix: prefix, Owner: node}, e.do(ctx, a)
}
func (e *echo) Ping(ctx context.Context, r PingRequest) (PingResult, error) {
	return PingResult{Node: node, Modes: []PingMode{{Mode: "udp", Sent: r.Count}}}, e.do(ctx, r)
}
func (e *echo) IPAM(ctx context.Context) (IPAM, error) {
	return IPAM{Blocks: []Block{{Prefix: prefix, Size: MaxCount}}}, e.do(ctx, nil)
}
func (e *echo) IPAMCheck(ctx context.Context) (IPAMCheck, error) {
	return IPAMCheck{Checked: 2, Leaked: []LeakedAddr{{Address: addr, ID: "p", Since: when}}}, e.do(ctx, nil)
}
func (e *echo) IPAMRelease(ctx context.Context, r ReleaseRequest) (ReleaseResult, error) {
	return ReleaseResult{Released: r.Addresses}, e.do(ctx, r)
}
func (e *echo) Allocate(ctx context.Context, r AllocateRequest) (Allocation, error) {
	return Allocation{ID: r.ID, Addresses: []AllocatedAddress{{Address: addr, Block: prefix}}, MTU: 1422}, e.do(ctx, r)
}
func (e *echo) Free(ctx context.Context, r FreeRequest) (FreeResult, error) {
	return FreeResult{Freed: []netip.Addr{addr}}, e.do(ctx, r)
}
func (e *echo) Pods(ctx context.Context) ([]Pod, error) {
	id := PodID{EngineCNI, "tulle", "c0ffee", "eth0"}
	return []Pod{{ID: id.String(), PodID: id, Addresses: []netip.Addr{addr}, State: PodUp}}, e.do(ctx, nil)
}
func (e *echo) PodsOf(ctx context.Context, container string) ([]Pod, error) {
	id := PodID{EngineCNI, "tulle", container, "eth0"}
	return []Pod{{ID: id.String(), PodID: id, Addresses: []netip.Addr{addr}, State: PodUp}}, e.do(ctx, container)
}
func (e *echo) Leave(ctx context.Context) (LeaveResult, error) {
	return LeaveResult{Transfers: []Transfer{{Prefix: prefix, To: node}}}, e.do(ctx, nil)
}
func (e *echo) Forget(ctx context.Context, r ForgetRequest) (ForgetResult, error) {
	return ForgetResult{Node: node}, e.do(ctx, r)
}
func (e *echo) Externals(ctx context.Context) ([]External, error) {
	return []External{{Prefix: prefix, Endpoint: addr}}, e.do(ctx, nil)
}
func (e *echo) ExternalAdd(ctx context.Context, r ExternalRequest) (External, error) {
	return External{Prefix: r.Prefix, Endpoint: r.Endpoint, Encapsulation: r.Encapsulation}, e.do(ctx, r)
}
func (e *echo) ExternalRemove(ctx context.Context, p netip.Prefix) (External, error) {
	return External{Prefix: p}, e.do(ctx, p)
}
func (e *echo) Keys(ctx context.Context) (KeyList, error) {
	return KeyList{Encrypted: true, Keys: []Key{{ID: "k1", Primary: true}}}, e.do(ctx, nil)
}
func (e *echo) KeyInstall(ctx context.Context, r KeyRequest) (KeyResult, error) {
	return KeyResult{ID: "k2"}, e.do(ctx, r)
}
func (e *echo) KeyUse(ctx context.Context, r KeyRequest) (KeyResult, error) {
	return KeyResult{ID: r.ID}, e.do(ctx, r)
}
func (e *echo) KeyRemove(ctx context.Context, r KeyRequest) (KeyResult, error) {
	return KeyResult{ID: r.ID}, e.do(ctx, r)
}
func (e *echo) Reload(ctx context.Context) (ReloadResult, error) {
	return ReloadResult{Changed: []ConfigChange{{Key: "mtu", Old: "1", New: "2"}}}, e.do(ctx, nil)
}

func (e *echo) LogLevel(ctx context.Context, r LogLevelRequest) (LogLevel, error) {
	return LogLevel{Old: "info", New: r.Level}, e.do(ctx, r)
}
func (e *echo) Trace(ctx context.Context, r TraceRequest) (Trace, error) {
	return Trace{Sent: 7, Stages: []TraceStage{{Name: "read", Time: time.Microsecond, PerPacket: 142.9}}}, e.do(ctx, r)
}

func (e *echo) Capture(ctx context.Context, r CaptureRequest, each func(CaptureEvent) error) error {
	if err := e.do(ctx, r); err != nil {
		return err
	}
	for i := range 3 {
		if err := each(CaptureEvent{Time: when, Point: "to-pods", Length: i, Data: []byte{0x45}}); err != nil {
			return err
		}
	}
	<-ctx.Done() // until the caller has enough
	return nil
}

func (e *echo) Bench(ctx context.Context, r BenchRequest, each func(BenchEvent) error) error {
	if err := e.do(ctx, r); err != nil {
		return err
	}
	if err := each(BenchEvent{Node: NodeRef{Name: "node-b"}, Ways: []BenchWay{{Mode: "udp", From: addr, To: netip.AddrPortFrom(addr, 7), MTU: 1472}}, Token: "t", Mbps: 5}); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

var quiet = slog.New(slog.DiscardHandler)

// start serves b on a socket of its own until the test ends.
func start(t *testing.T, b Backend) *Client {
	t.Helper()
	dir, err := os.MkdirTemp("", "tulle") // t.TempDir is too long for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := Listen(filepath.Join(dir, "run", "s"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- NewServer(b, quiet).Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if _, err := os.Lstat(l.Addr().String()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket is still there: %v", err)
		}
	})
	return NewClient(l.Addr().String())
}

// Every verb arrives at the backend as it was sent, and its answer comes back as it was given.
func TestEveryVerb(t *testing.T) {
	e := new(echo)
	c := start(t, e)
	ctx := t.Context()
	verbs := reflect.TypeFor[Backend]()
	args := map[string]any{
		"Route": addr6, "PodsOf": "a b&c=d/e", "Ping": PingRequest{Node: "node-b", Count: 7}, "IPAMRelease": ReleaseRequest{Addresses: []netip.Addr{addr, addr6}},
		"Allocate": AllocateRequest{ID: "pod/eth0", Name: "web", Netns: "/run/netns/x", Requested: []netip.Addr{addr, addr6}},
		"Free":     FreeRequest{ID: "pod/eth0"}, "Forget": ForgetRequest{Node: "node-b", Force: true},
		"ExternalAdd": ExternalRequest{Prefix: prefix, Endpoint: netip.MustParseAddr("192.0.2.9"), Encapsulation: "ipip"}, "ExternalRemove": netip.MustParsePrefix("fd00::/64"),
		"KeyInstall": KeyRequest{Key: []byte(strings.Repeat("k", KeySize))}, "KeyUse": KeyRequest{ID: "k1"}, "KeyRemove": KeyRequest{ID: "k1"},
		"LogLevel": LogLevelRequest{Level: "debug"}, "Trace": TraceRequest{Duration: time.Second, Every: 3},
	}
	for m := range verbs.Methods() {
		if m.Name == "Capture" || m.Name == "Bench" { // they stream: TestCapture, TestBench
			continue
		}
		t.Run(m.Name, func(t *testing.T) {
			in := []reflect.Value{reflect.ValueOf(ctx)}
			if m.Type.NumIn() == 2 {
				in = append(in, reflect.ValueOf(args[m.Name]))
			}
			e.got = nil
			far := reflect.ValueOf(c).MethodByName(m.Name).Call(in)
			if err := far[1].Interface(); err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(e.got, args[m.Name]) {
				t.Errorf("the backend got %+v, sent was %+v", e.got, args[m.Name])
			}
			near := reflect.ValueOf(e).MethodByName(m.Name).Call(in)
			want, _ := json.Marshal(near[0].Interface())
			got, _ := json.Marshal(far[0].Interface())
			if strings.ReplaceAll(string(want), "null", "[]") != string(got) {
				t.Errorf("got  %s\nwant %s", got, want)
			}
		})
	}
}

// A capture streams until its caller has enough.
func TestCapture(t *testing.T) {
	e := new(echo)
	c := start(t, e)
	req := CaptureRequest{Drops: true, Points: []string{"to-pods"}, Peer: "node-b", Pod: addr, Program: []BPFInstruction{{Op: 6, K: 1}}, Snap: 96, Rate: 7}
	enough := errors.New("enough")
	var got []CaptureEvent
	err := c.Capture(t.Context(), req, func(e CaptureEvent) error {
		if got = append(got, e); len(got) == 3 {
			return enough
		}
		return nil
	})
	if !errors.Is(err, enough) || !reflect.DeepEqual(e.got, req) {
		t.Errorf("%v; the backend got %+v, sent was %+v", err, e.got, req)
	}
	want := CaptureEvent{Time: when, Point: "to-pods", Length: 2, Data: []byte{0x45}}
	if !reflect.DeepEqual(got[2], want) {
		t.Errorf("got %+v, want %+v", got[2], want)
	}
	ctx, cancel := context.WithCancel(t.Context())
	if err := c.Capture(ctx, req, func(CaptureEvent) error { cancel(); return nil }); err != nil {
		t.Errorf("cancelled: %v", err)
	}
	e.fail = func(context.Context) error { return Errorf(CodeRefused, "four captures run already") }
	if err := c.Capture(t.Context(), req, nil); CodeOf(err) != CodeRefused {
		t.Errorf("refused: %v", err)
	}
	for _, bad := range []CaptureRequest{{Snap: -1}, {Snap: 1 << 20}, {Rate: -1}, {Rate: 1 << 30}, {Program: make([]BPFInstruction, MaxInstructions+1)}, {Peer: "a\x00b"}} {
		if err := c.Capture(t.Context(), bad, nil); CodeOf(err) != CodeUsage {
			t.Errorf("%.80v: %v", bad, err)
		}
	}
}

// A benchmark's paths arrive, and last until its caller has enough.
func TestBench(t *testing.T) {
	e := new(echo)
	c := start(t, e)
	req := BenchRequest{Node: "node-b", Modes: []string{"udp", "direct"}, Six: true}
	enough := errors.New("enough")
	var got BenchEvent
	err := c.Bench(t.Context(), req, func(e BenchEvent) error { got = e; return enough })
	want := BenchEvent{Node: NodeRef{Name: "node-b"}, Ways: []BenchWay{{Mode: "udp", From: addr, To: netip.AddrPortFrom(addr, 7), MTU: 1472}}, Token: "t", Mbps: 5}
	if !errors.Is(err, enough) || !reflect.DeepEqual(e.got, req) || !reflect.DeepEqual(got, want) {
		t.Errorf("%v; the backend got %+v and answered %+v", err, e.got, got)
	}
	for _, bad := range []BenchRequest{{}, {Node: "a\x00b"}, {Node: "b", Modes: []string{"gre"}}, {Node: "b", Modes: []string{"udp", "udp"}}} {
		if err := c.Bench(t.Context(), bad, nil); CodeOf(err) != CodeUsage {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	// An agent that does not know the request is an older one.
	e.fail = func(context.Context) error { return Errorf(CodeNotFound, "%s", unknownCall("POST", "/v1/bench")) }
	if err := c.Bench(t.Context(), req, nil); CodeOf(err) != CodeRefused || !strings.Contains(err.Error(), "older version") {
		t.Errorf("an older agent: %v", err)
	}
}

// The names that tests and scripts outside this repository read.
func TestStatusFields(t *testing.T) {
	c := start(t, new(echo))
	s, err := c.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s.Node.Blocks = []Block{{}}
	s.Problems = []Problem{{}}
	b, _ := json.Marshal(s)
	for path := range strings.FieldsSeq(`version node.name node.id node.underlay node.tun.name node.tun.mtu node.tun.addresses node.prefixes
		node.blocks.0.prefix node.blocks.0.used node.blocks.0.size cluster.id cluster.members cluster.alive cluster.isolated
		peers.0.name peers.0.id peers.0.state peers.0.underlay peers.0.prefixes peers.0.path.mode peers.0.path.state peers.0.path.rtt_us
		peers.0.path.loss peers.0.path.mtu peers.0.path.since peers.0.path.reason peers.0.candidates.0.mode
		drops.not_member problems.0.what problems.0.remedy`) {
		var v any
		if err := json.Unmarshal(b, &v); err != nil {
			t.Fatal(err)
		}
		for key := range strings.SplitSeq(path, ".") {
			switch x := v.(type) {
			case map[string]any:
				v = x[key]
			case []any:
				v = x[0]
			}
		}
		if v == nil {
			t.Errorf("%s is missing or null in %s", path, b)
		}
	}
}

func TestNoNulls(t *testing.T) {
	w := httptest.NewRecorder()
	var s Status
	fillSlices(reflect.ValueOf(&s).Elem())
	s.Peers = append(s.Peers, Peer{})
	fillSlices(reflect.ValueOf(&s).Elem())
	write(w, 200, s)
	if strings.Contains(w.Body.String(), "null") {
		t.Errorf("null in %s", w.Body)
	}
}

// TestWallClockWasSet: since has the clock of now, whatever the clock said at the time.
func TestWallClockWasSet(t *testing.T) {
	now := time.Now()
	minute := now.Add(-time.Minute) // a minute by the monotonic clock
	saved := time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, set := range []time.Duration{-1000 * time.Hour, 0, 1000 * time.Hour} {
		is := now.Round(0).Add(set)
		s := Status{Started: minute, Peers: []Peer{{Since: minute, Candidates: []Candidate{{Path: Path{Since: minute}}}}, {Since: saved}}}
		onWallClock(reflect.ValueOf(&s).Elem(), now, is)
		want := is.Add(-time.Minute)
		for i, got := range []time.Time{s.Started, s.Peers[0].Since, s.Peers[0].Candidates[0].Since} {
			if !got.Equal(want) {
				t.Errorf("clock set by %v, time %d: %v, want %v", set, i, got, want)
			}
		}
		later := Status{Started: minute}
		onWallClock(reflect.ValueOf(&later).Elem(), now.Add(time.Hour), is.Add(time.Hour+time.Millisecond))
		if !later.Started.Equal(s.Started) {
			t.Errorf("clock set by %v: an hour later the agent has started at %v, want %v as before", set, later.Started, s.Started)
		}
		if !s.Peers[1].Since.Equal(saved) || !s.Cluster.Since.IsZero() {
			t.Errorf("clock set by %v: %v and %v have changed", set, s.Peers[1].Since, s.Cluster.Since)
		}
	}
}

func TestErrors(t *testing.T) {
	e := new(echo)
	c := start(t, e)
	for _, tc := range []struct {
		name string
		err  error
		code Code
		text string
	}{
		{"plain", errors.New("it broke"), CodeFailed, "it broke"},
		{"coded", Errorf(CodeNotFound, "no node %q", "x").WithRemedy("see tulle peers"), CodeNotFound, `no node "x"; see tulle peers`},
		{"wrapped", fmt.Errorf("while forgetting: %w", Errorf(CodeRefused, "it is alive")), CodeRefused, "while forgetting: it is alive"},
		{"unhealthy", Errorf(CodeUnhealthy, "isolated"), CodeUnhealthy, "isolated"},
		{"usage", Errorf(CodeUsage, "no"), CodeUsage, "no"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e.fail = func(context.Context) error { return tc.err }
			_, err := c.Status(t.Context())
			if CodeOf(err) != tc.code || err.Error() != tc.text {
				t.Errorf("got %s %q, want %s %q", CodeOf(err), err, tc.code, tc.text)
			}
		})
	}
	e.fail = func(context.Context) error { panic("boom") }
	if _, err := c.Status(t.Context()); CodeOf(err) != CodeFailed || !strings.Contains(err.Error(), "boom") {
		t.Errorf("after a panic: %v", err)
	}
	e.fail = nil
	if _, err := c.Status(t.Context()); err != nil {
		t.Errorf("the server did not survive the panic: %v", err)
	}
}

// What is wrong in a request is refused before the backend sees it.
func TestRefusedRequests(t *testing.T) {
	e := new(echo)
	s := NewServer(e, quiet)
	for _, tc := range []struct {
		name, method, path, body string
		status                   int
		want                     string
	}{
		{"no JSON", "POST", "/v1/ping", "node", 400, "request body"},
		{"no body", "POST", "/v1/ping", "", 400, "request body"},
		{"two values", "POST", "/v1/ping", `{"node":"a"}{}`, 400, "more than one"},
		{"unknown field", "POST", "/v1/forget", `{"node":"a","forced":true}`, 400, "forced"},
		{"wrong type", "POST", "/v1/ping", `{"node":7}`, 400, "request body"},
		{"too large", "POST", "/v1/ping", `{"node":"` + strings.Repeat("a", maxRequest) + `"}`, 400, "larger than 65536"},
		{"no node", "POST", "/v1/ping", `{}`, 400, "node is empty"},
		{"count", "POST", "/v1/ping", `{"node":"a","count":100000}`, 400, "1000"},
		{"escape sequences", "POST", "/v1/forget", `{"node":"a\u001b[2J"}`, 400, "cannot be printed"},
		{"long name", "POST", "/v1/forget", `{"node":"` + strings.Repeat("a", 300) + `"}`, 400, "the limit is 256"},
		{"no id", "POST", "/v1/ipam/allocate", `{}`, 400, "id is empty"},
		{"long id", "POST", "/v1/ipam/allocate", `{"id":"` + strings.Repeat("a", 300) + `"}`, 400, "the limit is 256"},
		{"two of a family", "POST", "/v1/ipam/allocate", `{"id":"a","requested":["10.0.0.1","10.0.0.2"]}`, 400, "one of each family"},
		{"zone", "POST", "/v1/ipam/allocate", `{"id":"a","requested":["fe80::1%eth0"]}`, 400, "plain"},
		{"bad address", "POST", "/v1/ipam/allocate", `{"id":"a","requested":["x"]}`, 400, "request body"},
		{"free nothing", "POST", "/v1/ipam/free", `{}`, 400, "id is empty"},
		{"release nothing", "POST", "/v1/ipam/release", `{}`, 400, "addresses or all"},
		{"release both", "POST", "/v1/ipam/release", `{"all":true,"addresses":["10.0.0.1"]}`, 400, "addresses or all"},
		{"bad route", "GET", "/v1/route?addr=10.0.0", "", 400, "not an IPv4 or IPv6"},
		{"no route", "GET", "/v1/route", "", 400, "not an IPv4 or IPv6"},
		{"zoned route", "GET", "/v1/route?addr=fe80::1%25eth0", "", 400, "not an IPv4 or IPv6"},
		{"unmasked", "POST", "/v1/external", `{"prefix":"10.0.0.1/24","endpoint":"192.0.2.1","encapsulation":"ipip"}`, 400, "write 10.0.0.0/24"},
		{"no endpoint", "POST", "/v1/external", `{"prefix":"10.0.0.0/24","encapsulation":"ipip"}`, 400, "endpoint"},
		{"multicast endpoint", "POST", "/v1/external", `{"prefix":"10.0.0.0/24","endpoint":"224.0.0.1","encapsulation":"ipip"}`, 400, "endpoint"},
		{"encapsulation", "POST", "/v1/external", `{"prefix":"10.0.0.0/24","endpoint":"192.0.2.1","encapsulation":"gre"}`, 400, "udp, ipip, vxlan, direct"},
		{"no prefix", "DELETE", "/v1/external?prefix=x", "", 400, "prefix"},
		{"short key", "POST", "/v1/keys/install", `{"key":"AAAA"}`, 400, "needs 32"},
		{"key for id", "POST", "/v1/keys/use", `{"key":"AAAA"}`, 400, "ID"},
		{"no key id", "POST", "/v1/keys/remove", `{}`, 400, "key id is empty"},
		{"unknown verb", "GET", "/v1/nothing", "", 404, "different versions"},
		{"wrong method", "DELETE", "/v1/status", "", 404, "different versions"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e.got = "untouched"
			w := httptest.NewRecorder()
			s.ServeHTTP(w, httptest.NewRequest(tc.method, tc.path, strings.NewReader(tc.body)))
			var got Error
			if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
				t.Fatalf("%d %q: %v", w.Code, w.Body, err)
			}
			if w.Code != tc.status || !strings.Contains(got.Error(), tc.want) || strings.Contains(got.Error(), "\n") {
				t.Errorf("got %d %q, want %d and %q in one line", w.Code, got.Error(), tc.status, tc.want)
			}
			if e.got != "untouched" {
				t.Errorf("the backend was asked %v", e.got)
			}
		})
	}
}

// A stop does not wait for a slow verb: its context ends, and Serve returns after it.
func TestStopCutsRequestsShort(t *testing.T) {
	dir, err := os.MkdirTemp("", "tulle")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	l, err := Listen(filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	entered := make(chan struct{})
	returned := false
	b := &echo{fail: func(ctx context.Context) error {
		close(entered)
		<-ctx.Done()
		returned = true
		return ctx.Err()
	}}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error)
	go func() { served <- NewServer(b, quiet).Serve(ctx, l) }()
	asked := make(chan error)
	go func() {
		_, err := NewClient(l.Addr().String()).Leave(t.Context())
		asked <- err
	}()
	<-entered
	cancel()
	if err := <-asked; err == nil {
		t.Error("the verb succeeded")
	}
	if err := <-served; err != nil || !returned {
		t.Errorf("Serve returned %v, after the verb: %v", err, returned)
	}
}

func TestClientErrors(t *testing.T) {
	dir, err := os.MkdirTemp("", "tulle")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ask := func(ctx context.Context, path, want string) {
		t.Helper()
		_, err := NewClient(path).Status(ctx)
		if CodeOf(err) != CodeNoAgent && CodeOf(err) != CodeFailed || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("got %s %v, want %q and the socket", CodeOf(err), err, want)
		}
	}
	ask(t.Context(), filepath.Join(dir, "none"), "systemctl status tulle")

	stale := filepath.Join(dir, "stale")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	ask(t.Context(), stale, "--socket")

	// Something listens and never answers; then something that is no agent.
	mute := filepath.Join(dir, "mute")
	l, err = net.ListenUnix("unix", &net.UnixAddr{Name: mute})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	ask(ctx, mute, "in time")
	l.Close()

	for answer, want := range map[string]string{
		"":                            "closed the connection",
		"HTTP/1.1 200 OK\r\n\r\nnope": "cannot be read",
		"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno": "not an agent's answer",
		"SSH-2.0-x\r\n": "socket of an agent",
	} {
		path := filepath.Join(dir, "odd")
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			if conn, err := l.Accept(); err == nil {
				http.ReadRequest(newReader(conn))
				io.WriteString(conn, answer)
				conn.Close()
			}
		}()
		ask(t.Context(), path, want)
		<-done
		l.Close()
	}
}
