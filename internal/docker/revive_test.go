package docker

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/testing/controlsocket"
)

// State.Error as Docker 20.10.24 has it.
const (
	deadError = `legacy plugin: Post "http://%2Frun%2Fdocker%2Fplugins%2Ftulle.sock/Plugin.Activate": dial unix /run/docker/plugins/tulle.sock: connect: connection refused`
	goneError = `plugin "tulle" not found`
)

func stopped(status, policy, reason string) (c container) {
	c.State.Status, c.State.Error, c.HostConfig.RestartPolicy.Name = status, reason, policy
	return c
}

// Only containers that the engine would have started are started, and only those that have failed for want of the driver.
func TestWaits(t *testing.T) {
	for _, c := range []struct {
		name, status, policy, reason, driver string
		want                                 bool
	}{
		{"no process behind the socket", "exited", "always", deadError, "tulle", true},
		{"no socket", "exited", "unless-stopped", goneError, "tulle", true},
		{"a later call", "exited", "on-failure", `failed to create endpoint box on network pods: Post "http://%2Frun%2Fdocker%2Fplugins%2Ftulle.sock/NetworkDriver.CreateEndpoint": EOF`, "tulle", true},
		{"a folder of its own", "exited", "always", strings.ReplaceAll(deadError, "tulle.sock", "tulle%2Ftulle.sock"), "tulle", true},
		{"no space in time", "exited", "always", "IpamDriver.RequestAddress: tulle is not ready: this node has no pod addresses to give yet: none of 1 seeds answers: is an agent running there", "tulle", true},
		{"stopped by its user, or ended", "exited", "unless-stopped", "", "tulle", false},
		{"no restart policy", "exited", "no", deadError, "tulle", false},
		{"an older engine's word for it", "exited", "", goneError, "tulle", false},
		{"runs", "running", "always", deadError, "tulle", false},
		{"restarts", "restarting", "always", deadError, "tulle", false},
		{"never started", "created", "always", goneError, "tulle", false},
		{"another reason", "exited", "always", `OCI runtime create failed: exec: "nothing": executable file not found`, "tulle", false},
		{"an error of the driver that stays", "exited", "always", "NetworkDriver.Join: tulle: the container has a network of this driver already", "tulle", false},
		{"another driver's socket", "exited", "always", strings.ReplaceAll(deadError, "tulle", "weave"), "tulle", false},
		{"a driver whose name ends alike", "exited", "always", strings.ReplaceAll(deadError, "tulle.sock", "mytulle.sock"), "tulle", false},
		{"another driver", "exited", "always", `plugin "tulle2" not found`, "tulle", false},
		{"a name with a space", "exited", "always", strings.ReplaceAll(deadError, "tulle.sock", "pod%20net.sock"), "pod net", true},
	} {
		if got := waits(stopped(c.status, c.policy, c.reason), c.driver); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

// stubborn is an engine that has one container to start, and refuses to.
type stubborn struct {
	mu    sync.Mutex
	calls []string
	early int    // starts to come that fail because the driver is not ready
	last  string // why the container did not start, as the engine keeps it
}

func (e *stubborn) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.calls = append(e.calls, r.Method+" "+r.URL.Path)
	switch {
	case r.Method == "POST":
		w.WriteHeader(http.StatusInternalServerError)
		if e.early > 0 {
			e.early--
			e.last = "IpamDriver.RequestAddress: tulle is not ready: its state is not confirmed"
		} else {
			e.last = "failed to create task for container: already exists"
		}
		fmt.Fprintf(w, `{"message": %q}`, e.last)
	case r.URL.Path == "/containers/json":
		fmt.Fprint(w, `[{"Id": "one"}]`)
	default:
		c := stopped("exited", "always", cmp.Or(e.last, goneError))
		c.ID = "one"
		_ = json.NewEncoder(w).Encode(c)
	}
}

// take returns how often the engine was asked for its containers, and for a start, since it was called last.
func (e *stubborn) take() (lists, starts int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, c := range e.calls {
		switch c {
		case "GET /containers/json":
			lists++
		case "POST /containers/one/start":
			starts++
		}
	}
	e.calls = nil
	return lists, starts
}

// node is an agent that answers before it is ready.
type node struct {
	api.Backend
	ready atomic.Bool
}

func (n *node) Status(context.Context) (api.Status, error) {
	return api.Status{Ready: n.ready.Load()}, nil
}

// The looks begin when engine and agent are there, end a minute later, and begin again after a call that came too early. A container
// that does not start is left alone after three attempts for which the agent was ready.
func TestRevive(t *testing.T) {
	dir := controlsocket.Dir(t)
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	backend := &node{}
	agent := controlsocket.Serve(t, backend)
	engine := &stubborn{early: 2}
	outside := make(chan net.Listener, 1)
	wg.Go(func() {
		select {
		case l := <-outside:
			_ = api.Serve(ctx, l, engine, slog.New(slog.DiscardHandler))
		case <-ctx.Done():
		}
	})
	// Inside, time passes at once while nothing waits for the servers outside.
	synctest.Test(t, func(t *testing.T) {
		d := New(agent, slog.New(slog.DiscardHandler))
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		go newReviver(d, "tulle", filepath.Join(dir, "engine")).run(ctx)
		looks := func(when string, span time.Duration, wantLists, wantStarts int) {
			t.Helper()
			time.Sleep(span)
			synctest.Wait()
			if lists, starts := engine.take(); lists != wantLists || starts != wantStarts {
				t.Errorf("%s: %d looks and %d starts, want %d and %d", when, lists, starts, wantLists, wantStarts)
			}
		}
		time.Sleep(time.Second) // after the looks
		looks("without an engine", 10*time.Minute, 0, 0)
		listener, err := api.Listen(filepath.Join(dir, "engine"))
		if err != nil {
			t.Fatal(err)
		}
		outside <- listener
		looks("the agent is not ready", 10*time.Minute, 0, 0)
		backend.ready.Store(true)
		looks("both are there", 10*time.Minute, 1+int(lookFor/lookEvery), 2+maxStarts) // two were too early
		d.early <- struct{}{}
		looks("a call came too early", 10*time.Minute, 1+int(lookFor/lookEvery), 0)
	})
}
