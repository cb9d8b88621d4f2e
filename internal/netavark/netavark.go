// Package netavark is Tulle's plugin for podman's network stack, version 1.0.0 of its plugin interface. It is a process for each call,
// which asks the agent of the host for addresses and wires the container by itself (internal/attach). It keeps nothing on disk.
//
// podman runs `create` for `podman network create -d tulle`, netavark runs `setup` and `teardown` for each container. The input is JSON
// on standard input, so is the answer on standard output; a failure is {"error": "…"} with exit code 1. `create` and `teardown` do not
// need the agent. Every call ends within a bounded time, since podman waits without limit.
//
// Sources: netavark plugin-API.md and src/network/types.rs.
package netavark

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/attach"
	"github.com/tulle-net/tulle/internal/podnet"
)

const (
	// apiVersion is the only version of the plugin interface.
	apiVersion = "1.0.0"
	// maxInput bounds the input, bytes.
	maxInput = 1 << 20
	// patience is how long a call waits for the agent and the kernel, and so for an agent that a reboot has just started.
	patience = 25 * time.Second
	retry    = 100 * time.Millisecond
)

// verbs are the plugin's commands.
var verbs = []string{"create", "setup", "teardown", "info"}

// IsCall reports whether a process with these arguments, the program's name not among them, is called by podman or netavark. CNI
// plugins are called without arguments.
func IsCall(args []string) bool { return len(args) > 0 && slices.Contains(verbs, args[0]) }

// Main serves one call and returns the exit code. Warnings go to warn, which podman shows to its user.
func Main(args []string, in io.Reader, out, warn io.Writer) int {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	answer, err := serve(ctx, args, in, warn)
	code := 0
	if err != nil {
		answer, code = failure{"tulle: " + err.Error()}, 1
	}
	if answer == nil {
		return code
	}
	if err := json.NewEncoder(out).Encode(answer); err != nil {
		fmt.Fprintln(warn, "tulle: write the answer:", err)
		return 1
	}
	return code
}

// serve does one call. The answer is nil where there is none.
func serve(ctx context.Context, args []string, in io.Reader, warn io.Writer) (any, error) {
	if !IsCall(args) {
		return nil, fmt.Errorf("arguments %q: want one of %q", args, verbs)
	}
	switch args[0] {
	case "info":
		return info{Version: api.Version(), APIVersion: apiVersion}, nil
	case "create":
		return create(in)
	}
	if len(args) != 2 {
		return nil, fmt.Errorf("%s: want the path of the container's network namespace", args[0])
	}
	var c call
	if err := decode(in, &c); err != nil {
		return nil, err
	}
	if args[0] == "teardown" {
		return nil, teardown(ctx, &c)
	}
	if err := refuseRootless(); err != nil {
		return nil, err
	}
	return setup(ctx, args[1], &c, warn)
}

// rootlessUser is the variable by which podman tells its children that it is in a user namespace of its own, and whose.
const rootlessUser = "_CONTAINERS_ROOTLESS_UID"

// refuseRootless says why podman of an ordinary user cannot have this driver: it sees neither the agent nor the host's network.
func refuseRootless() error {
	if uid := os.Getenv(rootlessUser); uid != "" && uid != "0" {
		return fmt.Errorf("podman of user %s is rootless: this driver wires containers in the network namespace of the host, which is root's; run podman as root", uid)
	}
	return nil
}

// decode reads one JSON value. Keys that are not known are ignored: newer versions of podman send more.
func decode(in io.Reader, to any) error {
	b, err := io.ReadAll(io.LimitReader(in, maxInput+1))
	if err == nil && len(b) > maxInput {
		err = fmt.Errorf("it is longer than %d bytes", maxInput)
	}
	if err == nil {
		err = json.Unmarshal(b, to)
	}
	if err != nil {
		return fmt.Errorf("the input: %w", err)
	}
	return nil
}

// setup wires a container and describes its interface.
func setup(ctx context.Context, netns string, c *call, warn io.Writer) (any, error) {
	r, err := c.request()
	if err != nil {
		return nil, err
	}
	r.Netns = netns
	err = attach.OnlyOne(ctx, r.Socket, r.ID)
	if err != nil && api.CodeOf(err) != api.CodeUnhealthy { // an agent that is starting: addWhenReady waits, and a container that starts has no other interface yet
		return nil, err
	}
	res, err := addWhenReady(ctx, r)
	if err != nil {
		return nil, err
	}
	if len(c.PortMappings) > 0 {
		fmt.Fprintf(warn, "tulle: network %s publishes no ports (-p): its containers are reachable under their own addresses\n", c.Network.Name)
	}
	i := netInterface{MAC: res.Attachment.MAC.String()}
	for _, a := range res.Attachment.Addresses {
		i.Subnets = append(i.Subnets, netAddress{Gateway: podnet.Gateway(a), IPNet: hostPrefix(a)})
	}
	return status{
		DNSSearchDomains: []string{}, DNSServerIPs: []string{},
		Interfaces: map[string]netInterface{r.ID.Interface: i},
	}, nil
}

// addWhenReady waits for an agent that is starting, not for one that does not run.
func addWhenReady(ctx context.Context, r attach.Request) (attach.Result, error) {
	for {
		res, err := attach.Add(ctx, r)
		// A call that has no time left would say only that.
		if deadline, ok := ctx.Deadline(); api.CodeOf(err) != api.CodeUnhealthy || ok && time.Until(deadline) < time.Second {
			return res, err
		}
		select {
		case <-ctx.Done():
			return res, err
		case <-time.After(retry):
		}
	}
}

// teardown takes the interface back, whatever of it is left.
func teardown(ctx context.Context, c *call) error {
	id, err := c.id()
	if err != nil {
		return err
	}
	_, err = attach.Remove(ctx, c.socket(), id)
	return err
}

// create checks what the user asks for: a network is a name, and nothing else. The addresses are not podman's, so it answers with
// the IPAM driver "none", which goes with no subnet.
func create(in io.Reader) (any, error) {
	if err := refuseRootless(); err != nil {
		return nil, err
	}
	raw := map[string]any{}
	var n network
	var b json.RawMessage
	if err := decode(in, &b); err != nil {
		return nil, err
	}
	if err := errors.Join(json.Unmarshal(b, &raw), json.Unmarshal(b, &n)); err != nil {
		return nil, fmt.Errorf("the input: %w", err)
	}
	if err := n.refuse(); err != nil {
		return nil, err
	}
	raw["ipam_options"] = map[string]string{"driver": "none"}
	raw["dns_enabled"] = false // containers' names are not resolved
	return raw, nil
}
