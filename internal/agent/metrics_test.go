package agent

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/tunnel/encap"
)

// crowd is the status of a node with many peers, with values as long as they come. Every tenth has the name of another.
func crowd(peers int) api.Status {
	r := rand.New(rand.NewPCG(1, 2))
	st := api.Status{Ready: true, Drops: map[string]uint64{}, Problems: make([]api.Problem, 3)}
	for d := range encap.Drops() {
		st.Drops[d.String()] = r.Uint64()
	}
	for i := range peers {
		p := api.Peer{ID: fmt.Sprintf("%032x", i), Name: fmt.Sprintf("rack-17-node-%04d.dc2.example.net", i-i%10/9), State: api.PeerAlive, TxBytes: r.Uint64(), RxBytes: r.Uint64()}
		p.Path = api.Path{Mode: "vxlan", State: api.PathUp, RTTUS: r.Int64N(1e6), Loss: r.Float64(), MTU: 8950}
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

// An answer with 1,000 peers stays below 1 MB, and more peers add nothing to it.
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
	if sizes[1000] >= 1_000_000 || sizes[5000] > sizes[1000]+100 || sizes[1000] < 6*1000*40 {
		t.Errorf("bytes by peers: %v; want less than 1 MB for 1,000, and no more for 5,000", sizes)
	}
	t.Logf("bytes by peers: %v", sizes)
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
