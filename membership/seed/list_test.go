package seed

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// zone is a name server: what it answers for "ip4 NAME" and "ip6 NAME". What is not in it does not exist; an error is given back;
// nil means that it never answers.
type zone struct {
	mu    sync.Mutex
	names map[string]any // []string, late or error
}

// late is an answer that takes its time, as where the first name server is silent and the second one is asked after 5 s.
type late struct {
	after time.Duration
	addrs []string
}

var (
	noSuchHost = &net.DNSError{Err: "no such host", IsNotFound: true}
	servfail   = &net.DNSError{Err: "server misbehaving", IsTemporary: true}
)

func (z *zone) set(name string, answer any) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.names[name] = answer
}

func (z *zone) lookup(ctx context.Context, network, host string) ([]netip.Addr, error) {
	z.mu.Lock()
	answer, ok := z.names[network+" "+host]
	z.mu.Unlock()
	switch a := answer.(type) {
	case []string:
		return addrs(a...), nil
	case error:
		return nil, a
	case late:
		select {
		case <-time.After(a.after):
			return addrs(a.addrs...), nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if !ok {
		return nil, noSuchHost
	}
	<-ctx.Done()
	return nil, ctx.Err()
}

func addrs(texts ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range texts {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

// list is a running List over a zone.
func list(t *testing.T, names map[string]any, seeds ...string) (*List, *zone) {
	t.Helper()
	z := &zone{names: names}
	l, err := New(seeds, 7946, z.lookup, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- l.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return l, z
}

// text is a seed in one line.
func text(s Seed) string {
	var a []string
	for _, ap := range s.Addrs {
		a = append(a, ap.String())
	}
	return strings.TrimSpace(fmt.Sprintf("%s [%s] tried=%v %s", s.Name, strings.Join(a, " "), s.Tried, s.Why()))
}

func expect(t *testing.T, l *List, want ...string) {
	t.Helper()
	synctest.Wait()
	var got []string
	for _, s := range l.All() {
		got = append(got, text(s))
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n  %s\nwant\n  %s", strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
}

func TestAnswers(t *testing.T) {
	const silent = "its name does not resolve: the name server does not answer"
	for _, c := range []struct {
		name string
		zone map[string]any
		want string // after the lookups' time limit
	}{
		{"both families, IPv4 first and sorted", map[string]any{"ip6 a": []string{"2001:db8::2", "2001:db8::1"}, "ip4 a": []string{"10.0.0.2", "10.0.0.1", "10.0.0.2"}},
			"a [10.0.0.1:7946 10.0.0.2:7946 [2001:db8::1]:7946 [2001:db8::2]:7946] tried=true"},
		{"IPv6 only", map[string]any{"ip6 a": []string{"2001:db8::1"}}, "a [[2001:db8::1]:7946] tried=true"},
		{"a name server that never answers for IPv6", map[string]any{"ip4 a": []string{"10.0.0.1"}, "ip6 a": nil}, "a [10.0.0.1:7946] tried=true"},
		{"mapped addresses", map[string]any{"ip4 a": []string{"::ffff:10.0.0.1"}}, "a [10.0.0.1:7946] tried=true"},
		{"loopback is for the host to judge", map[string]any{"ip4 a": []string{"127.0.1.1"}}, "a [127.0.1.1:7946] tried=true"},
		{"no such name", nil, "a [] tried=true its name does not resolve: no such host"},
		{"SERVFAIL", map[string]any{"ip4 a": servfail, "ip6 a": servfail}, "a [] tried=true its name does not resolve: server misbehaving"},
		{"one error says more than the other", map[string]any{"ip6 a": servfail}, "a [] tried=true its name does not resolve: server misbehaving"},
		{"never an answer", map[string]any{"ip4 a": nil, "ip6 a": nil}, "a [] tried=true " + silent},
		{"link-local only", map[string]any{"ip6 a": []string{"fe80::1"}, "ip4 a": []string{"169.254.3.4"}}, "a [] tried=true no usable address: 169.254.3.4 is link-local"},
		{"link-local beside a good one", map[string]any{"ip6 a": []string{"fe80::1", "2001:db8::1"}}, "a [[2001:db8::1]:7946] tried=true"},
		{"a server that blocks names", map[string]any{"ip4 a": []string{"0.0.0.0"}}, "a [] tried=true no usable address: 0.0.0.0 is not a host's address"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				if c.zone == nil {
					c.zone = map[string]any{}
				}
				l, _ := list(t, c.zone, "a")
				time.Sleep(lookupTimeout)
				expect(t, l, c.want)
			})
		})
	}
}

// A name server that hangs holds up neither the other names nor the other family of the same one.
func TestNoneWaitsForAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		zone := map[string]any{"ip4 good": []string{"10.0.0.9"}, "ip4 half": []string{"10.0.0.8"}, "ip6 half": nil}
		seeds := []string{"half", "good:7000", "10.0.0.1"}
		for i := range 40 {
			n := fmt.Sprintf("hangs%d", i)
			zone["ip4 "+n], zone["ip6 "+n] = nil, nil
			seeds = append(seeds, n)
		}
		l, _ := list(t, zone, seeds...)
		synctest.Wait()
		for i, want := range []string{"half [10.0.0.8:7946] tried=false", "good:7000 [10.0.0.9:7000] tried=true", "10.0.0.1 [10.0.0.1:7946] tried=true",
			"hangs0 [] tried=false its name server has not answered yet"} {
			if got := text(l.All()[i]); got != want {
				t.Errorf("at once: %s, want %s", got, want)
			}
		}
	})
}

// An answer that comes late is taken, and what has come before holds meanwhile.
func TestLateAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const slow = lookupTimeout + time.Second
		l, z := list(t, map[string]any{"ip4 a": late{slow, []string{"10.0.0.1"}}, "ip6 a": late{slow, nil}}, "a")
		time.Sleep(lookupTimeout)
		expect(t, l, "a [] tried=true its name does not resolve: the name server does not answer")
		time.Sleep(slow - lookupTimeout)
		expect(t, l, "a [10.0.0.1:7946] tried=true")
		changed := l.Changed()
		time.Sleep(10 * refresh)
		select {
		case <-changed:
			t.Error("nothing has changed, and a change was told")
		default:
		}
		z.set("ip4 a", late{slow, []string{"10.0.0.2"}}) // the host moves
		time.Sleep(refresh + 2*slow)
		expect(t, l, "a [10.0.0.2:7946] tried=true")
		z.set("ip4 a", nil)
		z.set("ip6 a", nil)
		time.Sleep(refresh + slow + lookupLimit)
		expect(t, l, "a [10.0.0.2:7946] tried=true its name does not resolve: the name server does not answer")
	})
}

// What a name server says at first, and what it says when it is gone, is not the last word.
func TestAgainAndAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, z := list(t, map[string]any{}, "a")
		expect(t, l, "a [] tried=true its name does not resolve: no such host")
		since := l.All()[0].Since
		time.Sleep(20 * time.Second)
		if s := l.All()[0]; !s.Since.Equal(since) {
			t.Errorf("since %v, want %v: the reason is the same", s.Since, since)
		}
		changed := l.Changed()
		z.set("ip4 a", []string{"10.0.0.1"})
		time.Sleep(retryMax)
		expect(t, l, "a [10.0.0.1:7946] tried=true")
		select {
		case <-changed:
		default:
			t.Error("the change was not told")
		}

		z.set("ip4 a", []string{"10.0.0.2"}) // the host moves
		time.Sleep(refresh)
		expect(t, l, "a [10.0.0.2:7946] tried=true")

		changed = l.Changed()
		time.Sleep(5 * refresh)
		select {
		case <-changed:
			t.Error("nothing has changed, and a change was told")
		default:
		}

		for _, err := range []error{servfail, noSuchHost, errors.New("broken")} {
			z.set("ip4 a", err)
			z.set("ip6 a", err)
			time.Sleep(refresh)
			synctest.Wait()
			if s := l.All()[0]; s.Unresolved() || s.Err == nil || s.Addrs[0].Addr() != addrs("10.0.0.2")[0] {
				t.Errorf("after %v: %s, want the last good address kept", err, text(s))
			}
		}
		z.set("ip6 a", []string{"2001:db8::1"}) // the name has another family now
		z.set("ip4 a", noSuchHost)
		time.Sleep(retryMax)
		expect(t, l, "a [[2001:db8::1]:7946] tried=true")
	})
}

// Why a name of mDNS is not found is said: ping finds it.
func TestMulticastName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, _ := list(t, map[string]any{"ip4 b.local": servfail}, "Node-A.Local", "b.local:7000", "local")
		const none = "its name does not resolve: no such host"
		expect(t, l, "Node-A.Local [] tried=true "+none+"; a name in .local is one of mDNS, which the packaged program does not ask",
			"b.local:7000 [] tried=true its name does not resolve: server misbehaving", "local [] tried=true "+none)
	})
}

// The host's own name, which nobody here knows, leads to the host itself until somebody does. A name server that fails says nothing.
func TestOwnName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := &zone{names: map[string]any{"ip4 node-a": servfail, "ip6 node-a": servfail}}
		l, err := New([]string{"Node-A.", "node-a:7000", "node-b"}, 7946, z.lookup, nil)
		if err != nil {
			t.Fatal(err)
		}
		l.Own("node-a")
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- l.Run(ctx) }()
		const unknown = "node-b [] tried=true its name does not resolve: no such host"
		expect(t, l, "Node-A. [127.0.0.1:7946] tried=true", "node-a:7000 [] tried=true its name does not resolve: server misbehaving", unknown)
		z.set("ip4 node-a", noSuchHost)
		z.set("ip6 node-a", noSuchHost)
		time.Sleep(retryMax)
		expect(t, l, "Node-A. [127.0.0.1:7946] tried=true", "node-a:7000 [127.0.0.1:7000] tried=true", unknown)
		z.set("ip4 node-a", []string{"10.0.0.1"})
		time.Sleep(refresh)
		expect(t, l, "Node-A. [127.0.0.1:7946] tried=true", "node-a:7000 [10.0.0.1:7000] tried=true", unknown)
		z.set("ip4 node-a", noSuchHost)
		time.Sleep(refresh)
		if s := l.All()[1]; s.Unresolved() || s.Addrs[0].Addr() != addrs("10.0.0.1")[0] {
			t.Errorf("%s, want the last good address kept", text(s))
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestParse(t *testing.T) {
	for text, want := range map[string]string{
		"10.0.0.1": "10.0.0.1:7946", "10.0.0.1:80": "10.0.0.1:80", "2001:db8::1": "[2001:db8::1]:7946", "[2001:db8::1]": "[2001:db8::1]:7946",
		"[2001:db8::1]:80": "[2001:db8::1]:80", "[::ffff:10.0.0.1]:80": "10.0.0.1:80", "host": "", "host:80": "",
		"host:0": "error", "host:x": "error", "": "error", ":80": "error", "a:b:c": "error",
	} {
		l, err := New([]string{text}, 7946, nil, nil)
		if err != nil {
			if want != "error" || !errors.Is(err, ErrSyntax) {
				t.Errorf("%q: %v, want %s", text, err, want)
			}
			continue
		}
		got := ""
		if s := l.All()[0]; !s.Unresolved() {
			got = s.Addrs[0].String()
		}
		if got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
	var none *List
	if len(none.All()) != 0 || none.Changed() != nil {
		t.Error("a nil List has seeds")
	}
}

func TestIsName(t *testing.T) {
	for text, want := range map[string]bool{
		"node-a": true, "node-a:7947": true, "10.0.1.11": false, "10.0.1.11:7947": false, "fd00::1": false, "[fd00::1]": false, "[fd00::1]:7947": false, "": false,
	} {
		if got := IsName(text); got != want {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
}
