// Package docker is a network driver and an IPAM driver for Docker: HTTP and JSON on a socket that the engine finds in
// /run/docker/plugins, served by the agent.
//
// The engine asks in this order for a container: RequestAddress for each family, CreateEndpoint, Join; and at its end Leave,
// DeleteEndpoint, ReleaseAddress. RequestAddress names neither the network nor the endpoint, only a MAC address, which
// CreateEndpoint has again. So the addresses belong to the MAC address first, and pass to the endpoint then.
//
// The engine waits without limit for an answer, and does not start a container again whose network has failed. So every call ends
// within a bounded time, and waits that long for an agent that is starting. Activation and Join need no cluster. Containers that
// were left stopped are started by the driver (reviver).
//
// A Driver serves any number of calls at once.
//
// Sources: moby/libnetwork docs/remote.md, docs/ipam.md; moby docs/extend/plugin_api.md, api/swagger.yaml.
package docker

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/tulle-net/tulle/internal/api"
)

const (
	mediaType  = "application/vnd.docker.plugins.v1.2+json"
	maxRequest = 1 << 20 // bytes
	// patience is how long a call may take. An agent that a reboot has started waits for the first answer of another node.
	patience = 25 * time.Second
	retry    = 100 * time.Millisecond
)

// Driver answers the engine.
type Driver struct {
	agent *api.Client
	log   *slog.Logger
	mux   *http.ServeMux
	early chan struct{} // a call came that the agent could not serve yet

	mu        sync.Mutex
	endpoints map[string]*endpoint // by the engine's ID: those of this process

	// An address passes to another container only while nobody wires one: shared by those who wire.
	wiring sync.RWMutex
	calls  sync.WaitGroup
}

// New makes a driver that gets addresses from the agent behind socket.
func New(socket string, log *slog.Logger) *Driver {
	d := &Driver{agent: api.NewClient(socket), log: log, mux: http.NewServeMux(), early: make(chan struct{}, 1), endpoints: map[string]*endpoint{}}
	handle(d, "/Plugin.Activate", func(context.Context, empty) (manifest, error) {
		return manifest{Implements: []string{"NetworkDriver", "IpamDriver"}}, nil
	})
	handle(d, "/NetworkDriver.GetCapabilities", func(context.Context, empty) (networkCapabilities, error) {
		return networkCapabilities{Scope: "local", ConnectivityScope: "global"}, nil
	})
	handle(d, "/NetworkDriver.CreateNetwork", createNetwork)
	for _, nothing := range []string{
		"DeleteNetwork", "AllocateNetwork", "FreeNetwork", "DiscoverNew", "DiscoverDelete", "ProgramExternalConnectivity", "RevokeExternalConnectivity",
	} {
		handle(d, "/NetworkDriver."+nothing, func(context.Context, empty) (empty, error) { return empty{}, nil })
	}
	handle(d, "/NetworkDriver.CreateEndpoint", d.createEndpoint)
	handle(d, "/NetworkDriver.EndpointOperInfo", func(context.Context, endpointRequest) (operInfo, error) {
		return operInfo{Value: map[string]any{}}, nil
	})
	handle(d, "/NetworkDriver.Join", d.join)
	handle(d, "/NetworkDriver.Leave", d.leave)
	handle(d, "/NetworkDriver.DeleteEndpoint", d.deleteEndpoint)

	handle(d, "/IpamDriver.GetCapabilities", func(context.Context, empty) (ipamCapabilities, error) {
		return ipamCapabilities{RequiresMACAddress: true}, nil
	})
	handle(d, "/IpamDriver.GetDefaultAddressSpaces", func(context.Context, empty) (addressSpaces, error) {
		return addressSpaces{Local: addressSpace, Global: addressSpace}, nil
	})
	handle(d, "/IpamDriver.RequestPool", d.requestPool)
	handle(d, "/IpamDriver.ReleasePool", func(context.Context, empty) (empty, error) { return empty{}, nil })
	handle(d, "/IpamDriver.RequestAddress", d.requestAddress)
	handle(d, "/IpamDriver.ReleaseAddress", d.releaseAddress)
	return d
}

// Run serves the engine on l, and gives addresses back that it has left, until ctx ends. Containers that
// were left stopped because nobody served l, or the agent was not ready, are started through the engine's API: name is the driver's in
// the engine, and engine the API's socket; empty: they are not started.
func (d *Driver) Run(ctx context.Context, l net.Listener, name, engine string) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wg.Go(func() { d.sweep(ctx) })
	if engine != "" {
		wg.Go(func() { newReviver(d, name, engine).run(ctx) })
	}
	err := api.Serve(ctx, l, d, d.log)
	d.calls.Wait()
	return err
}

// ServeHTTP answers one call.
func (d *Driver) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	d.calls.Add(1)
	defer d.calls.Done()
	d.mux.ServeHTTP(w, r)
}

// handle registers a call. Fields that are not known are ignored: newer engines send more.
func handle[Req, Resp any](d *Driver, path string, call func(context.Context, Req) (Resp, error)) {
	d.mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), patience)
		defer cancel()
		var req Req
		var resp any
		// The engine sends no body where there is nothing to say.
		body := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest))
		err := body.Decode(&req)
		if err == nil || errors.Is(err, io.EOF) {
			resp, err = call(ctx, req)
		}
		w.Header().Set("Content-Type", mediaType)
		if err != nil {
			d.log.Warn("a call of Docker failed", "call", path, "error", err)
			w.WriteHeader(http.StatusInternalServerError)
			text := "tulle: "
			if passes(err) {
				text = notReady
				select {
				case d.early <- struct{}{}:
				default: // one is enough
				}
			}
			resp = failure{Err: text + err.Error()}
		}
		if err := json.NewEncoder(w).Encode(resp); err != nil {
			d.log.Debug("Docker did not read an answer", "call", path, "error", err)
		}
	})
}

// untilReady repeats a call that the agent cannot serve yet.
func untilReady[T any](ctx context.Context, call func(context.Context) (T, error)) (T, error) {
	for {
		out, err := call(ctx)
		if api.CodeOf(err) != api.CodeUnhealthy {
			return out, err
		}
		select {
		case <-ctx.Done():
			return out, err
		case <-time.After(retry):
		}
		// A call that has no time left would say only that.
		if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < time.Second {
			return out, err
		}
	}
}
