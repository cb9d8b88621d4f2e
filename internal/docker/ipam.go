package docker

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/attach"
	"github.com/tulle-net/tulle/internal/podnet"
)

const (
	addressSpace = "tulle"
	// Keys of the engine's options.
	macOption     = "com.docker.network.endpoint.macaddress"
	gatewayOption = "com.docker.network.gateway"
	// fixed is the name, for people, of an allocation whose address the user has named.
	fixed = "fixed address"
)

// requestPool answers with the cluster CIDR: all networks share it.
func (d *Driver) requestPool(ctx context.Context, r poolRequest) (pool, error) {
	cidrs, err := untilReady(ctx, d.cidrs)
	if err != nil {
		return pool{}, err
	}
	if r.SubPool != "" {
		return pool{}, fmt.Errorf("--ip-range %s: each host has its own part of %v already; leave the option out", r.SubPool, cidrs)
	}
	for _, c := range cidrs {
		if c.Addr().Is6() != r.V6 {
			continue
		}
		if r.Pool != "" && r.Pool != c.String() {
			return pool{}, fmt.Errorf("--subnet %s: all networks of this driver have the subnet %v", r.Pool, c)
		}
		// The engine looks for another pool, again and again, while the host has routes into the one that it did not choose
		// by itself; it does not look at this one. It needs one only to check --ip, which it allows with --subnet alone.
		subnet := netip.PrefixFrom(zero(c.Addr()), 0).String()
		if r.Pool != "" {
			subnet = r.Pool
		}
		return pool{c.String(), subnet, map[string]string{gatewayOption: hostPrefix(podnet.Gateway(c.Addr()))}}, nil
	}
	family := "IPv4, which this version of Docker wants in every network"
	if r.V6 {
		family = "IPv6"
	}
	return pool{}, fmt.Errorf("the cluster has %v, no %s", cidrs, family)
}

func (d *Driver) cidrs(ctx context.Context) ([]netip.Prefix, error) {
	st, err := d.agent.Status(ctx)
	if err == nil && (st.Cluster.ID == "" || len(st.Cluster.CIDRs) == 0) {
		err = api.Errorf(api.CodeUnhealthy, "this node is in no cluster yet").WithRemedy("see `tulle status`")
	}
	return st.Cluster.CIDRs, err
}

func zero(like netip.Addr) netip.Addr {
	if like.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

func hostPrefix(a netip.Addr) string { return netip.PrefixFrom(a, a.BitLen()).String() }

// heldID is the ID of addresses that were requested for a MAC address.
func heldID(mac string) string {
	// An ID has its parts between slashes, as api.PodID.
	return api.PodID{Engine: api.EngineDocker, Network: "requested", Container: strings.ReplaceAll(mac, "/", ""), Interface: podInterface}.String()
}

// requestAddress allocates an address, together with that of the other family, for a MAC address.
func (d *Driver) requestAddress(ctx context.Context, r addressRequest) (address, error) {
	p, err := netip.ParsePrefix(r.PoolID)
	if err != nil {
		return address{}, fmt.Errorf("pool %q is none of this driver", r.PoolID)
	}
	mac := r.Options[macOption]
	if mac == "" {
		return address{}, fmt.Errorf("address %q of a gateway or another host: this driver gives addresses to containers only; leave --gateway and --aux-address out", r.Address)
	}
	want := api.AllocateRequest{ID: heldID(mac)}
	if r.Address != "" {
		a, err := netip.ParseAddr(r.Address)
		if err != nil {
			return address{}, fmt.Errorf("--ip %q: %w", r.Address, err)
		}
		want.Name, want.Requested = fixed, []netip.Addr{a}
	}
	got, err := untilReady(ctx, func(ctx context.Context) (api.Allocation, error) {
		if len(want.Requested) == 0 {
			return d.agent.Allocate(ctx, want)
		}
		d.wiring.Lock()
		defer d.wiring.Unlock()
		var err error
		if want.From, err = d.holder(ctx, want.Requested[0]); err != nil {
			return api.Allocation{}, err
		}
		if want.From == "" {
			want.From = want.ID // which has any address of the family, if the other family's request came first
		}
		return d.agent.Allocate(ctx, want)
	})
	if err != nil {
		return address{}, err
	}
	for _, a := range got.Addresses {
		if a.Address.Is6() == p.Addr().Is6() {
			return address{hostPrefix(a.Address)}, nil
		}
	}
	return address{}, fmt.Errorf("the cluster has no address like %v", p)
}

// holder is the ID of an endpoint that has this address and is gone: of the same container before it was restarted. Its link is
// removed.
func (d *Driver) holder(ctx context.Context, a netip.Addr) (string, error) {
	pods, err := d.pods(ctx)
	if err != nil {
		return "", err
	}
	host, err := podnet.Open("")
	if err != nil {
		return "", err
	}
	defer host.Close()
	for _, p := range pods {
		if slices.Contains(p.Addresses, a) && p.Name == fixed && d.gone(host, p) {
			return p.ID, host.Remove(podnet.InterfaceName(p.ID))
		}
	}
	return "", nil
}

// gone says whether an endpoint has no container: it has no link, or the container's end is in the host's network namespace,
// where the engine puts it when a container ends, and could tell nobody. From CreateEndpoint to Join it is there, too; but an
// endpoint joins only the process that has made it.
func (d *Driver) gone(host *podnet.Host, p api.Pod) bool {
	if p.State == api.PodUnwired {
		return true
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, e := range d.endpoints {
		if e.pod == p.PodID {
			return false
		}
	}
	return host.HasPodEnd(p.ID)
}

// pods are those of Docker.
func (d *Driver) pods(ctx context.Context) ([]api.Pod, error) {
	pods, err := d.agent.Pods(ctx)
	return slices.DeleteFunc(pods, func(p api.Pod) bool { return p.Engine != api.EngineDocker }), err
}

// releaseAddress frees an address whose endpoint is gone, or was never made. A fixed one stays, so that its container can be
// restarted: the sweep frees it.
func (d *Driver) releaseAddress(ctx context.Context, r addressRequest) (empty, error) {
	text, _, _ := strings.Cut(r.Address, "/")
	a, err := netip.ParseAddr(text)
	if err != nil {
		return empty{}, fmt.Errorf("address %q: %w", r.Address, err)
	}
	pods, err := d.pods(ctx)
	if err != nil {
		return empty{}, err
	}
	host, err := podnet.Open("")
	if err != nil {
		return empty{}, err
	}
	defer host.Close()
	for _, p := range pods {
		if slices.Contains(p.Addresses, a) && p.Name != fixed && d.gone(host, p) {
			_, err := attach.Remove(ctx, d.agent.Socket(), p.PodID)
			return empty{}, err
		}
	}
	return empty{}, nil
}

// sweepEvery is how long an endpoint may be gone: far longer than a container takes to start or to restart.
const sweepEvery = time.Minute

// sweep frees endpoints that are gone: those that the engine removed while the agent was down, those from before a reboot, and
// those with fixed addresses.
func (d *Driver) sweep(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	var old map[string]bool
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		old = d.freeGone(ctx, old)
	}
}

// freeGone frees the endpoints that are gone, and were so at the last look. It returns those that are gone now.
func (d *Driver) freeGone(ctx context.Context, old map[string]bool) map[string]bool {
	pods, err := d.pods(ctx)
	if err != nil {
		return old // no session now
	}
	host, err := podnet.Open("")
	if err != nil {
		d.log.Warn("the addresses of containers that are gone are not freed", "error", err)
		return old
	}
	defer host.Close()
	now := map[string]bool{}
	for _, p := range pods {
		if !d.gone(host, p) {
			continue
		}
		now[p.ID] = true
		if !old[p.ID] {
			continue
		}
		err := host.Remove(podnet.InterfaceName(p.ID))
		if err == nil { // they have rested since the last look, and a container may come back for a fixed one
			_, err = d.agent.Free(ctx, api.FreeRequest{ID: p.ID, Rested: true})
		}
		if err != nil {
			d.log.Warn("the address of a container that is gone is not freed", "pod", p.ID, "error", err)
		}
	}
	return now
}
