package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/tulle-net/tulle/internal/api"
)

const (
	// lookEvery is the time between two looks at the engine's containers, lookFor how long they go on after the engine has answered:
	// longer than it repeats a call to a driver that is not there, which is half a minute.
	lookEvery = 5 * time.Second
	lookFor   = time.Minute
	// maxStarts is how often in a row a container is started in vain. A start for which the agent was not ready does not count.
	maxStarts = 3
	// askTimeout limits a question to the engine, startTimeout a start: longer than all the driver's calls of it.
	askTimeout   = 10 * time.Second
	startTimeout = 2 * time.Minute
	maxAnswer    = 64 << 20 // bytes
	// notReady begins the driver's own errors that pass by themselves. The engine keeps them with the container.
	notReady = "tulle is not ready: "
)

// container is what the engine says of one, as far as it is used here.
type container struct {
	ID, Name   string
	State      struct{ Status, Error string }
	HostConfig struct{ RestartPolicy struct{ Name string } }
}

// reviver starts containers that the engine would have started, had the driver been there.
type reviver struct {
	driver *Driver
	name   string // the driver's, in the engine
	http   *http.Client
	tries  map[string]int // by container
	told   bool           // that the engine cannot be asked
}

// newReviver makes one for a driver of this name, and the engine that serves its API on a socket.
func newReviver(d *Driver, name, engine string) *reviver {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", engine)
	}
	return &reviver{driver: d, name: name, tries: map[string]int{},
		http: &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}}
}

// run looks until ctx ends: from when the agent can give addresses until the engine has answered, then for a minute, and the same
// again after each call that came too early.
func (r *reviver) run(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	var until time.Time // zero: the engine has not answered
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.driver.early:
			until = time.Time{}
			continue
		case <-tick.C:
		}
		if !until.IsZero() && time.Now().After(until) || !r.driver.ready(ctx) {
			continue
		}
		err := r.look(ctx)
		if err == nil && until.IsZero() {
			until = time.Now().Add(lookFor)
		}
		absent := errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil
		if err != nil && !absent && !r.told {
			r.told = true
			r.driver.log.Warn("Docker cannot be asked for containers to start; see docker_api", "error", err)
		}
	}
}

// ready says whether the agent can give addresses. One that knows its space may still have to hear from other nodes that it is its own.
func (d *Driver) ready(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	st, err := d.agent.Status(ctx)
	return err == nil && st.Ready
}

// look starts the containers that wait for this driver.
func (r *reviver) look(ctx context.Context) error {
	var list []struct{ ID string }
	if err := r.call(ctx, askTimeout, "GET", "/containers/json?all=1&filters="+url.QueryEscape(`{"status":["exited"]}`), &list); err != nil {
		return err
	}
	for _, l := range list {
		var c container
		if err := r.call(ctx, askTimeout, "GET", "/containers/"+url.PathEscape(l.ID)+"/json", &c); err != nil {
			r.driver.log.Debug("Docker does not describe a container", "container", l.ID, "error", err) // removed meanwhile
			continue
		}
		// A start that fails leaves its own reason in place of the one for which it was tried.
		if !waits(c, r.name) && !(failed(c) && r.tries[c.ID] > 0) || r.tries[c.ID] >= maxStarts {
			continue
		}
		r.tries[c.ID]++
		name := strings.TrimPrefix(c.Name, "/")
		if err := r.call(ctx, startTimeout, "POST", "/containers/"+url.PathEscape(c.ID)+"/start", nil); err != nil {
			r.driver.log.Warn("a container of Docker whose network was not there does not start", "container", name, "attempt", r.tries[c.ID], "error", err)
			if strings.Contains(err.Error(), notReady) {
				r.tries[c.ID]--
			}
			continue
		}
		delete(r.tries, c.ID)
		r.driver.log.Info("started a container of Docker whose network was not there", "container", name, "reason", c.State.Error)
	}
	return nil
}

// waits says whether the engine would have started this container, and failed only because the driver was not there or not ready.
//
// The engine clears the error when a start works, and when it begins to wait for another one. So a container that a user has stopped has none.
func waits(c container, driver string) bool {
	if !failed(c) {
		return false
	}
	for _, reason := range []string{
		// The URL of a call: a path of a socket as its host, escaped as a path.
		"%2F" + url.PathEscape(driver) + ".sock/",
		fmt.Sprintf("plugin %q not found", driver),
		notReady,
	} {
		if strings.Contains(c.State.Error, reason) {
			return true
		}
	}
	return false
}

// failed says whether a container with a restart policy could not start.
func failed(c container) bool {
	return c.State.Status == "exited" && c.State.Error != "" && slices.Contains([]string{"always", "unless-stopped", "on-failure"}, c.HostConfig.RestartPolicy.Name)
}

// call sends a request to the engine, and decodes its answer unless out is nil.
func (r *reviver) call(ctx context.Context, limit time.Duration, method, path string, out any) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://docker"+path, nil)
	if err != nil {
		return err
	}
	res, err := r.http.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body := io.LimitReader(res.Body, maxAnswer)
	if res.StatusCode >= http.StatusBadRequest {
		var failure struct{ Message string }
		if err := json.NewDecoder(body).Decode(&failure); err != nil || failure.Message == "" {
			failure.Message = res.Status
		}
		return fmt.Errorf("Docker: %s %s: %s", method, path, failure.Message)
	}
	if out == nil {
		return nil
	}
	return json.NewDecoder(body).Decode(out)
}

// passes says whether an error is one that passes by itself.
func passes(err error) bool {
	code := api.CodeOf(err)
	return code == api.CodeUnhealthy || code == api.CodeNoAgent
}
