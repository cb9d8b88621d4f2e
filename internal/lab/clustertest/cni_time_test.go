package clustertest

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
)

// TestCNITime prints how long an ADD takes, beside the reference plugins bridge and host-local, in turns on the same host.
// TULLE_CNI_ADDS sets how many ADDs of each. It asserts nothing about the time.
func TestCNITime(t *testing.T) {
	adds := 5
	if s := os.Getenv("TULLE_CNI_ADDS"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 {
			t.Fatalf("TULLE_CNI_ADDS=%s: %v", s, err)
		}
		adds = n
	}
	e := newEngine(t, "cnitime", -1)
	e.lib.Path = append(e.lib.Path, referencePlugins)
	list := func(plugin string) *libcni.NetworkConfigList {
		l, err := libcni.NetworkConfFromBytes(fmt.Appendf(nil, `{"cniVersion": "1.0.0", "name": "tulle", "plugins": [%s]}`, plugin))
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	ways := []struct {
		name  string
		list  *libcni.NetworkConfigList
		times []time.Duration
	}{
		{name: "tulle-cni", list: list(fmt.Sprintf(`{"type": "tulle-cni", "socket": %q}`, e.socket))},
		{name: "tulle-cni, behind a bridge", list: list(fmt.Sprintf(`{"type": "tulle-cni", "socket": %q, "bridge": "pods"}`, e.socket))},
		{name: "bridge + host-local", list: list(fmt.Sprintf(`{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipam": {"type": "host-local", "dataDir": %q,
			"ranges": [[{"subnet": "10.99.0.0/16"}], [{"subnet": "fd00:99::/64"}]], "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}}`, t.TempDir()))},
	}
	for range adds {
		for i := range ways {
			w, c := &ways[i], e.container()
			err := e.onHost(func(ctx context.Context) error {
				start := time.Now()
				_, err := e.lib.AddNetworkList(ctx, w.list, c)
				w.times = append(w.times, time.Since(start))
				return err
			})
			if err != nil {
				t.Fatalf("%s: ADD: %v", w.name, err)
			}
			if err := e.del(w.list, c); err != nil {
				t.Fatalf("%s: DEL: %v", w.name, err)
			}
		}
	}
	for _, w := range ways {
		slices.Sort(w.times)
		at := func(q float64) time.Duration {
			return w.times[int(q*float64(len(w.times)-1))].Round(100 * time.Microsecond)
		}
		t.Logf("%-27s %d ADDs: p50 %v, p99 %v", w.name, len(w.times), at(0.5), at(0.99))
	}
}
