package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"
)

func TestGossipMeasures(t *testing.T) {
	r, err := Gossip(t.Context(), GossipOptions{Nodes: 8, Prefixes: 100, Rounds: 3, Rest: 3 * time.Second, Port: 17948})
	if err != nil {
		t.Fatal(err)
	}
	if r.Nodes != 8 || len(r.Spread) != 3 || r.LastNode.N != 3 || r.OneNode.N != 3*7 || r.LastNode.Median <= 0 || r.LastNode.Max < r.LastNode.Median ||
		r.OneNode.Max != r.LastNode.Max || r.SentPerNode <= 0 || r.ReceivedPerNode <= 0 || r.PacketsPerNode <= 0 ||
		r.HeapPerNode <= 0 || !(r.Lookup > 0) || r.TableBytes < 100*20 || r.Unsettled != 0 || r.Dropped != 0 || r.Malformed != 0 {
		t.Errorf("%+v", r)
	}
	var out bytes.Buffer
	if err := r.Print(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"8 (UDP and TCP sockets", "100 prefixes", "one new entry known to all", "lookup"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, &out)
		}
	}
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var back GossipResult
	if err := json.Unmarshal(b, &back); err != nil || back.LastNode != r.LastNode {
		t.Errorf("through JSON: %v", err)
	}
}

func TestGossipRefuses(t *testing.T) {
	for _, o := range []GossipOptions{{Nodes: 1}, {Nodes: 1 << 20}, {Nodes: 2, Prefixes: 1 << 20}, {Nodes: 2, Rounds: -1}} {
		if _, err := Gossip(t.Context(), o); err == nil {
			t.Errorf("%+v was run", o)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Gossip(ctx, GossipOptions{Nodes: 4, Port: 17949}); err == nil {
		t.Error("ran after its end")
	}
}

func TestQuantiles(t *testing.T) {
	var sample []float64
	for i := range 100 {
		sample = append(sample, float64(100-i))
	}
	if got, want := quantiles(sample), (Quantiles{100, 1, 50, 90, 99, 100}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got, want := quantiles([]float64{7}), (Quantiles{1, 7, 7, 7, 7, 7}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got := quantiles(nil); got != (Quantiles{}) {
		t.Errorf("of nothing: %+v", got)
	}
}

func TestPushPullPeriod(t *testing.T) {
	for nodes, want := range map[int]time.Duration{2: 30, 32: 30, 33: 60, 100: 90, 1000: 180} {
		if got := pushPullPeriod(nodes); got != want*time.Second {
			t.Errorf("%d nodes: %v, want %v s", nodes, got, int(want))
		}
	}
}
