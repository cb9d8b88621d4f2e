package agent

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/ownership"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/tunnel/encap"
)

// crowd is the status of a node with many peers, with values as long as they come. Every tenth has the name of another.
func crowd(peers int) api.Status {
	r := rand.New(rand.NewPCG(1, 2))
	ipv4 := []api.IPAMFamily{{Family: "ipv4", Owned: 256, Used: 3}}
	st := api.Status{Ready: true, Cluster: api.Cluster{ID: "9c0d", Table: api.Table{Digest: "ffffffffffff0102"}}, IPAM: api.IPAMSummary{Families: ipv4}, Drops: map[string]uint64{}, Problems: make([]api.Problem, 3)}
	for d := range encap.Drops() {
		st.Drops[d.String()] = r.Uint64()
	}
	for i := range peers {
		p := api.Peer{ID: fmt.Sprintf("%032x", i), Name: fmt.Sprintf("rack-17-node-%04d.dc2.example.net", i-i%10/9), State: api.PeerAlive, TxBytes: r.Uint64(), RxBytes: r.Uint64()}
		p.Prefixes = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/24")}
		p.Path = api.Path{Mode: "direct", Family: "ipv4", State: api.PathUp, RTTUS: 1 + r.Int64N(1e6), Loss: r.Float64(), MTU: 8950, MTULimit: 9000}
		six := p.Path
		six.Family = "ipv6"
		p.Candidates = []api.Candidate{{Path: p.Path, Active: true}, {Path: six, Active: true}, {Path: api.Path{Mode: "udp"}}}
		st.Peers = append(st.Peers, p)
	}
	return st
}

func metricsHandler(t testing.TB, st *api.Status) http.Handler {
	t.Helper()
	reg := prometheus.NewRegistry()
	if err := reg.Register(collector{func(context.Context) (api.Status, error) { return *st, nil }}); err != nil {
		t.Fatal(err)
	}
	return promhttp.HandlerFor(reg, promhttp.HandlerOpts{ErrorHandling: promhttp.HTTPErrorOnError})
}

func scrape(h http.Handler) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	return w
}

// An answer with 1,000 peers, of each of which two paths are in use, stays below 1.2 MB, and more peers add nothing to it.
func TestMetricsAreBounded(t *testing.T) {
	sizes := map[int]int{}
	for _, n := range []int{0, 1000, 5000} {
		st := crowd(n)
		w := scrape(metricsHandler(t, &st))
		if w.Code != http.StatusOK {
			t.Fatalf("%d peers: %s", n, w.Body)
		}
		sizes[n] = w.Body.Len()
		if want := fmt.Sprintf(`tulle_members{state="alive"} %d`, n+1); !strings.Contains(w.Body.String(), want) {
			t.Errorf("%d peers: no %s", n, want)
		}
	}
	if sizes[1000] >= 1_200_000 || sizes[5000] > sizes[1000]+100 || sizes[1000] < 10*1000*40 {
		t.Errorf("bytes by peers: %v; want less than 1.2 MB for 1,000, and no more for 5,000", sizes)
	}
	t.Logf("bytes by peers: %v", sizes)
}

// A peer that has left is counted, and has no series of its own: nobody misses its path.
func TestMetricsOfPeersThatLeft(t *testing.T) {
	st := crowd(1001)
	for _, i := range []int{0, 7} {
		st.Peers[i].State, st.Peers[i].Path.State = api.PeerLeft, api.PathOff
		st.Peers[i].Name = fmt.Sprint("leaver-", i)
	}
	body := scrape(metricsHandler(t, &st)).Body.String()
	if strings.Contains(body, "leaver-") || !strings.Contains(body, `tulle_members{state="left"} 2`) {
		t.Error("a peer that has left has series of its own, or is not counted")
	}
	if n := strings.Count(body, "\ntulle_peer_up{"); n != 2*999 {
		t.Errorf("%d paths have series, want two of each of the 999 that have not left", n)
	}
}

// peerSeries are the series of peers, without counters.
func peerSeries(t *testing.T, st *api.Status) (out []string) {
	t.Helper()
	w := scrape(metricsHandler(t, st))
	if w.Code != http.StatusOK {
		t.Fatal(w.Body)
	}
	for line := range strings.Lines(w.Body.String()) {
		if strings.HasPrefix(line, "tulle_peer_") && !strings.HasPrefix(line, "tulle_peer_bytes_total") {
			out = append(out, strings.TrimPrefix(strings.TrimSpace(line), "tulle_peer_"))
		}
	}
	slices.Sort(out)
	return out
}

// Series of a peer are those of the paths by which packets to its space go, as far as they are measured.
func TestMetricsOfPaths(t *testing.T) {
	up := api.Path{Mode: "udp", State: api.PathUp, RTTUS: 500, Loss: 0.25, MTU: 1472, MTULimit: 1472}
	direct := func(family string) api.Path {
		return api.Path{Mode: "direct", Family: family, State: api.PathUp, RTTUS: 500, MTU: 1500, MTULimit: 1500}
	}
	down := api.Path{Mode: "udp", State: api.PathDown, Loss: 1, MTULimit: 1472}
	for _, tc := range []struct {
		name  string
		state string
		main  api.Path
		more  []api.Candidate
		want  []string
	}{
		{"one path", api.PeerAlive, up, nil, []string{
			`loss_ratio{encapsulation="udp",peer="b"} 0.25`, `mtu_bytes{encapsulation="udp",peer="b"} 1472`, `rtt_seconds{encapsulation="udp",peer="b"} 0.0005`, `up{encapsulation="udp",peer="b"} 1`}},
		{"IPv6 by udp, which is down", api.PeerAlive, direct("ipv4"), []api.Candidate{{Path: direct("ipv4"), Active: true}, {Path: direct("ipv6")}, {Path: down, Active: true}}, []string{
			`loss_ratio{encapsulation="direct",family="ipv4",peer="b"} 0`, `loss_ratio{encapsulation="udp",peer="b"} 1`,
			`mtu_bytes{encapsulation="direct",family="ipv4",peer="b"} 1500`, `rtt_seconds{encapsulation="direct",family="ipv4",peer="b"} 0.0005`,
			`up{encapsulation="direct",family="ipv4",peer="b"} 1`, `up{encapsulation="udp",peer="b"} 0`}},
		{"both direct", api.PeerAlive, direct("ipv4"), []api.Candidate{{Path: direct("ipv4"), Active: true}, {Path: direct("ipv6"), Active: true}}, []string{
			`loss_ratio{encapsulation="direct",family="ipv4",peer="b"} 0`, `loss_ratio{encapsulation="direct",family="ipv6",peer="b"} 0`,
			`mtu_bytes{encapsulation="direct",family="ipv4",peer="b"} 1500`, `mtu_bytes{encapsulation="direct",family="ipv6",peer="b"} 1500`,
			`rtt_seconds{encapsulation="direct",family="ipv4",peer="b"} 0.0005`, `rtt_seconds{encapsulation="direct",family="ipv6",peer="b"} 0.0005`,
			`up{encapsulation="direct",family="ipv4",peer="b"} 1`, `up{encapsulation="direct",family="ipv6",peer="b"} 1`}},
		{"dead", api.PeerDead, down, nil, []string{`loss_ratio{encapsulation="udp",peer="b"} 1`, `up{encapsulation="udp",peer="b"} 0`}},
		{"dead, and no more is known", api.PeerDead, api.Path{Mode: "udp", State: api.PathProbing}, nil, []string{`up{encapsulation="udp",peer="b"} 0`}},
		{"this node has no pod addresses", api.PeerAlive, api.Path{Mode: "udp", State: api.PathProbing}, nil, nil},
		{"no family in common", api.PeerAlive, api.Path{Mode: "udp", State: api.PathDown}, nil, []string{`up{encapsulation="udp",peer="b"} 0`}},
		{"external", api.PeerExternal, api.Path{Mode: "udp", State: api.PathUp, MTU: 1472}, nil, nil},
		{"left", api.PeerLeft, api.Path{Mode: "udp", State: api.PathOff}, nil, nil},
	} {
		p := api.Peer{Name: "b", ID: "0b", State: tc.state, Prefixes: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}, Path: tc.main, Candidates: tc.more}
		if got := peerSeries(t, &api.Status{Peers: []api.Peer{p}}); !slices.Equal(got, tc.want) {
			t.Errorf("%s:\n%s\nwant\n%s", tc.name, strings.Join(got, "\n"), strings.Join(tc.want, "\n"))
		}
		p.Prefixes, p.Path.State = nil, api.PathProbing
		if got := peerSeries(t, &api.Status{Peers: []api.Peer{p}}); got != nil {
			t.Errorf("%s, without space, to which no packets go: %v", tc.name, got)
		}
	}
}

// Two hosts of one name have each their own series, with their IDs, however they are sorted: a host that lost its disk is another node.
func TestMetricsOfNamesakes(t *testing.T) {
	path := api.Path{Mode: "udp", State: api.PathUp, RTTUS: 500, MTULimit: 1472}
	prefixes := []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}
	peer := func(name, id string) api.Peer {
		return api.Peer{Name: name, ID: id, State: api.PeerAlive, Prefixes: prefixes, Path: path}
	}
	names := func(peers ...api.Peer) (out []string) {
		for _, line := range peerSeries(t, &api.Status{Node: api.Node{Name: "self"}, Peers: peers}) {
			if rest, ok := strings.CutPrefix(line, `up{encapsulation="udp",peer="`); ok {
				name, _, _ := strings.Cut(rest, `"`)
				out = append(out, name)
			}
		}
		return out
	}
	a1, a2, a3 := peer("a", "0102030405060708"), peer("a", "aabbccddeeff0011"), peer("a", "0102030499999999")
	for _, tc := range []struct {
		peers []api.Peer
		want  []string
	}{
		{[]api.Peer{a2, peer("b", "0b")}, []string{"a", "b"}},
		{[]api.Peer{a1, a2, peer("b", "0b")}, []string{"a (01020304)", "a (aabbccdd)", "b"}},
		{[]api.Peer{a2, a1, peer("b", "0b")}, []string{"a (01020304)", "a (aabbccdd)", "b"}},
		{[]api.Peer{a1, a3}, []string{"a (0102030405060708)", "a (0102030499999999)"}},
		{[]api.Peer{peer("self", "0102030405060708")}, []string{"self (01020304)"}},
		{[]api.Peer{a1, a2, peer("a (01020304)", "0c")}, []string{"a (0102030405060708)", "a (01020304) (0c)", "a (aabbccdd)"}}, // a member says what it likes
		{[]api.Peer{a1, a3, peer("a (0102030405060708)", "0c")}, []string{"a (0102030405060708)", "a (0102030405060708) (0c)", "a (0102030499999999)"}},
		{[]api.Peer{peer("\xff", "0c")}, []string{"\ufffd"}},
	} {
		slices.Sort(tc.want)
		if got := slices.Sorted(slices.Values(names(tc.peers...))); !slices.Equal(got, tc.want) {
			t.Errorf("%v, want %v", got, tc.want)
		}
	}
}

// IPv4 addresses run out alone: the space of IPv6 is so large that a sum of both says nothing.
func TestAddressesByFamily(t *testing.T) {
	s, v := &session{}, &view{own: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/25"), netip.MustParsePrefix("10.244.1.0/25"), netip.MustParsePrefix("fd00:244::/49")}}
	v.status = ownership.Status{Phase: ownership.Ready, Params: ownership.Params{Families: []ipam.Family{{CIDR: netip.MustParsePrefix("10.244.0.0/16")}, {CIDR: netip.MustParsePrefix("fd00:244::/48")}}}}
	st := api.Status{IPAM: s.ipamSummary(v, []api.Block{
		{Prefix: netip.MustParsePrefix("10.244.0.0/25"), Used: 100, Cooling: 20}, {Prefix: netip.MustParsePrefix("10.244.1.0/25"), Used: 120}, {Prefix: netip.MustParsePrefix("fd00:244::/64"), Used: 7, Cooling: 1}})}
	if st.IPAM.Owned != api.MaxCount || st.IPAM.Used != 227 || st.IPAM.Cooling != 21 {
		t.Errorf("of both: %+v", st.IPAM)
	}
	body := scrape(metricsHandler(t, &st)).Body.String()
	for _, want := range []string{`family="ipv4",state="owned"} 256`, `family="ipv4",state="used"} 220`, `family="ipv4",state="cooling"} 20`,
		`family="ipv6",state="owned"} 9.2`, `family="ipv6",state="used"} 7`, `family="ipv6",state="cooling"} 1`} {
		if !strings.Contains(body, "\ntulle_addresses{"+want) {
			t.Errorf("no tulle_addresses{%s", want)
		}
	}
}

// The digest of the table is a number, so that two nodes can be compared.
func TestMetricsOfTheTable(t *testing.T) {
	st := api.Status{Cluster: api.Cluster{ID: "9c0d", Table: api.Table{Entries: 13, Digest: "ffffffffffff0102"}}}
	body := scrape(metricsHandler(t, &st)).Body.String()
	for _, want := range []string{`tulle_cluster_info{cluster="9c0d"} 1`, "tulle_table_digest 2.81474976710655e+14", "tulle_table_entries 13"} {
		if !strings.Contains(body, "\n"+want+"\n") {
			t.Errorf("no %s", want)
		}
	}
	if body := scrape(metricsHandler(t, new(api.Status))).Body.String(); strings.Contains(body, "tulle_cluster_info") || strings.Contains(body, "tulle_table_digest") {
		t.Error("a node in no cluster has a digest")
	}
}

// Names and help texts are as Prometheus wants them.
func TestMetricsLint(t *testing.T) {
	st := crowd(3)
	promtool(t, scrape(metricsHandler(t, &st)).Body.Bytes(), "check", "metrics")
}

// The alerts fire for what they are for and not in a healthy cluster; they and the dashboard name metrics that exist.
func TestMonitoringFiles(t *testing.T) {
	const dir = "../../packaging/"
	promtool(t, nil, "check", "rules", "--lint=all", "--lint-fatal", dir+"prometheus/tulle.rules.yaml")
	promtool(t, nil, "test", "rules", dir+"prometheus/tulle_test.yaml")

	st := crowd(3)
	exported := scrape(metricsHandler(t, &st)).Body.String()
	for _, file := range []string{"prometheus/tulle.rules.yaml", "grafana/tulle.json"} {
		b, err := os.ReadFile(dir + file)
		if err != nil {
			t.Fatal(err)
		}
		names := regexp.MustCompile(`\btulle_[a-z_]+`).FindAllString(string(b), -1)
		if len(names) < 10 {
			t.Errorf("%s names %d metrics", file, len(names))
		}
		for _, name := range names {
			if !strings.Contains(exported, "\n"+name+"{") && !strings.Contains(exported, "\n"+name+" ") {
				t.Errorf("%s has %s, which the agent does not export", file, name)
			}
		}
	}
}

// Every expression of the dashboard can be parsed.
func TestDashboardExpressions(t *testing.T) {
	b, err := os.ReadFile("../../packaging/grafana/tulle.json")
	if err != nil {
		t.Fatal(err)
	}
	var rules bytes.Buffer
	fmt.Fprintln(&rules, "groups: [{name: dashboard, rules: [")
	n := 0
	for _, m := range regexp.MustCompile(`"expr": ("(?:[^"\\]|\\.)*")`).FindAllSubmatch(b, -1) {
		expr := strings.ReplaceAll(string(m[1]), "$__rate_interval", "5m")
		fmt.Fprintf(&rules, "{record: \"panel:%d\", expr: %s},\n", n, expr)
		n++
	}
	fmt.Fprintln(&rules, "]}]")
	if n < 15 {
		t.Fatalf("%d expressions in the dashboard", n)
	}
	file := t.TempDir() + "/dashboard.yaml"
	if err := os.WriteFile(file, rules.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	promtool(t, nil, "check", "rules", file)
}

// promtool runs Prometheus' own checker.
func promtool(t *testing.T, in []byte, args ...string) {
	t.Helper()
	if _, err := exec.LookPath("promtool"); err != nil {
		if os.Getuid() == 0 {
			t.Fatal("needs promtool: apt-get install prometheus")
		}
		t.Skip("needs promtool: apt-get install prometheus")
	}
	cmd := exec.CommandContext(t.Context(), "promtool", args...)
	cmd.Stdin = bytes.NewReader(in)
	if out, err := cmd.CombinedOutput(); err != nil || bytes.Contains(out, []byte("tulle_")) && args[0] == "check" && args[1] == "metrics" {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// BenchmarkScrape is what an answer with 1,000 peers costs, without the agent's status.
func BenchmarkScrape(b *testing.B) {
	st := crowd(1000)
	h := metricsHandler(b, &st)
	for b.Loop() {
		if scrape(h).Code != http.StatusOK {
			b.Fatal("no answer")
		}
	}
}

// pipes is a listener whose connections are in memory.
type pipes chan net.Conn

func (p pipes) Accept() (net.Conn, error) {
	c, ok := <-p
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}
func (p pipes) Close() error   { return nil }
func (p pipes) Addr() net.Addr { return &net.TCPAddr{} }

// Clients that begin a request and do not end it, or keep a connection and ask nothing, are left after a while: whoever may
// connect must not be able to hold connections for ever.
func TestMetricsLeavesSilentClients(t *testing.T) {
	for name, text := range map[string]string{
		"half a head": "GET /healthz HTTP/1.1\r\n",
		"no body":     "GET /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n",
		"idle":        "GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n",
	} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			l := make(pipes, 1)
			var wg sync.WaitGroup
			wg.Go(func() { _ = (&agent{}).serveMetrics(ctx, l) })
			near, far := net.Pipe()
			l <- far
			ended := make(chan struct{})
			wg.Go(func() {
				_, _ = io.Copy(io.Discard, near)
				close(ended)
			})
			if _, err := near.Write([]byte(text)); err != nil {
				t.Fatal(err)
			}
			select {
			case <-ended:
			case <-time.After(5 * time.Minute):
				t.Errorf("%s: connected for five minutes", name)
			}
			near.Close()
			cancel()
			close(l)
			wg.Wait()
		})
	}
}
