package docker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"strings"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/attach"
	"github.com/tulle-net/tulle/internal/podnet"
)

// podInterface is the interface's name in the container; the engine appends a number.
const podInterface = "eth"

// endpoint is a container's interface in a network.
type endpoint struct {
	pod     api.PodID
	link    string       // the container's end
	addrs   []netip.Addr // those that the engine knows
	space   []netip.Prefix
	sandbox string // empty before Join
}

// createNetwork checks what the user asks for: a network is a name, and nothing else.
func createNetwork(_ context.Context, r networkRequest) (empty, error) {
	for _, data := range append(r.IPv4Data, r.IPv6Data...) {
		if data.AddressSpace != addressSpace {
			return empty{}, errors.New("the addresses of this network are another driver's; add --ipam-driver tulle")
		}
	}
	if internal, _ := r.Options["com.docker.network.internal"].(bool); internal {
		return empty{}, errors.New("--internal: this driver cannot keep a network from the outside; leave the option out, or set masquerade to false on the host")
	}
	if options, _ := r.Options["com.docker.network.generic"].(map[string]any); len(options) > 0 {
		return empty{}, fmt.Errorf("--opt %v: this driver has no options", options)
	}
	return empty{}, nil
}

// id is what `docker network inspect` and `docker inspect` show of a network and an endpoint, as short as their commands have it.
func id(network, endpoint string) (api.PodID, error) {
	const length = 12
	if len(network) < length || len(endpoint) < length || strings.ContainsAny(network+endpoint, "/ ") {
		return api.PodID{}, fmt.Errorf("network %q, endpoint %q: want IDs of at least %d letters", network, endpoint, length)
	}
	return api.PodID{Engine: api.EngineDocker, Network: network[:length], Container: endpoint[:length], Interface: podInterface}, nil
}

// createEndpoint makes the interface of a container, with the addresses that requestAddress gave.
func (d *Driver) createEndpoint(ctx context.Context, r endpointRequest) (endpointResponse, error) {
	pod, err := id(r.NetworkID, r.EndpointID)
	if err != nil {
		return endpointResponse{}, err
	}
	mac, err := net.ParseMAC(r.Interface.MacAddress)
	if err != nil {
		return endpointResponse{}, fmt.Errorf("MAC address of the endpoint: %w", err)
	}
	e := &endpoint{pod: pod}
	for _, text := range []string{r.Interface.Address, r.Interface.AddressIPv6} {
		if text == "" {
			continue
		}
		p, err := netip.ParsePrefix(text)
		if err != nil {
			return endpointResponse{}, fmt.Errorf("address of the endpoint: %w", err)
		}
		e.addrs = append(e.addrs, p.Addr())
	}
	held := heldID(r.Interface.MacAddress)
	pods, err := d.pods(ctx)
	if err != nil {
		return endpointResponse{}, err
	}
	req := attach.Request{Socket: d.agent.Socket(), ID: pod, Requested: e.addrs, MAC: mac, From: held}
	for _, p := range pods {
		if p.ID == held {
			req.Name = p.Name
		}
	}
	d.wiring.RLock()
	defer d.wiring.RUnlock()
	res, err := attach.Add(ctx, req)
	if errors.Is(err, fs.ErrExist) {
		return endpointResponse{}, fmt.Errorf("%w; see `tulle pod list`", err)
	}
	if err != nil {
		return endpointResponse{}, err
	}
	e.link, e.space = res.Attachment.PodInterface, res.Allocation.CIDRs
	d.mu.Lock()
	defer d.mu.Unlock()
	d.endpoints[r.EndpointID] = e
	return endpointResponse{}, nil
}

// join names the interface, which the engine moves into the container, and its routes.
func (d *Driver) join(_ context.Context, r joinRequest) (joinResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	e := d.endpoints[r.EndpointID]
	if e == nil {
		return joinResponse{}, api.Errorf(api.CodeUnhealthy, "endpoint %s was made by an agent that is gone", r.EndpointID).WithRemedy("start the container again")
	}
	for _, other := range d.endpoints {
		if other != e && other.sandbox == r.SandboxKey {
			// The engine notes the network all the same, and does not start the container again with both.
			return joinResponse{}, fmt.Errorf("the container has a network of this driver already; all of them lead to the same containers, so one is enough: `docker network disconnect %.12s CONTAINER`, or the container does not start again", r.NetworkID)
		}
	}
	e.sandbox = r.SandboxKey
	out := joinResponse{InterfaceName: interfaceName{e.link, podInterface}, DisableGatewayService: true}
	for _, a := range e.addrs {
		gw := podnet.Gateway(a)
		if a.Is4() {
			out.Gateway = gw.String()
		} else {
			out.GatewayIPv6 = gw.String()
		}
		out.StaticRoutes = append(out.StaticRoutes, staticRoute{Destination: hostPrefix(gw), RouteType: onLink})
		for _, p := range e.space { // the engine may take another network's gateway for the default route
			if p.Addr().Is4() == a.Is4() {
				out.StaticRoutes = append(out.StaticRoutes, staticRoute{Destination: p.String(), NextHop: gw.String()})
			}
		}
	}
	return out, nil
}

func (d *Driver) leave(_ context.Context, r joinRequest) (empty, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if e := d.endpoints[r.EndpointID]; e != nil {
		e.sandbox = ""
	}
	return empty{}, nil
}

// deleteEndpoint removes the interface, and its addresses unless they are fixed (releaseAddress).
func (d *Driver) deleteEndpoint(ctx context.Context, r endpointRequest) (empty, error) {
	pod, err := id(r.NetworkID, r.EndpointID)
	if err != nil {
		return empty{}, err
	}
	d.mu.Lock()
	delete(d.endpoints, r.EndpointID)
	d.mu.Unlock()
	host, err := podnet.Open("")
	if err != nil {
		return empty{}, err
	}
	defer host.Close()
	return empty{}, host.Remove(podnet.InterfaceName(pod.String()))
}
