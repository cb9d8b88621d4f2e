package agent

import (
	"context"
	"net/netip"
	"strings"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/hostnet"
	"github.com/tulle-net/tulle/internal/ownership"
	"github.com/tulle-net/tulle/ipam"
)

// IPAM implements api.Backend.
func (a *agent) IPAM(context.Context) (api.IPAM, error) {
	s, err := a.current()
	if err != nil {
		return api.IPAM{}, err
	}
	now := time.Now()
	out := api.IPAM{Prefixes: s.ownership.Prefixes(), Blocks: s.blocks(now)}
	byKey := map[string]int{}
	for _, l := range s.ownership.Allocations() {
		i, ok := byKey[l.Key]
		if !ok {
			i = len(out.Allocations)
			byKey[l.Key] = i
			out.Allocations = append(out.Allocations, api.PodAllocation{ID: l.Key, Name: l.Pod, State: api.AllocationUsed, Since: l.Since, Netns: l.Netns})
		}
		out.Allocations[i].Addresses = append(out.Allocations[i].Addresses, l.Addr)
	}
	for _, r := range s.ownership.Resting(now) {
		out.Allocations = append(out.Allocations, api.PodAllocation{Addresses: []netip.Addr{r.Addr}, State: api.AllocationCooling, Until: r.Until})
	}
	return out, nil
}

// leakGrace is how long an allocation may exist without a pod, because the pod may still be starting.
const leakGrace = time.Minute

// live returns the pods on the host: routes to single addresses of our space, and the network namespaces of allocations that others wire. The
// agent may not enter namespaces, so an existing namespace counts as a live pod.
func (s *session) live() ([]ipam.Allocation, error) {
	routes, err := hostnet.PodRoutes(s.cfg.Tun, s.ownership.Prefixes())
	if err != nil {
		return nil, err
	}
	var out []ipam.Allocation
	seen := map[netip.Addr]bool{}
	for _, r := range routes {
		seen[r.Addr] = true
		out = append(out, ipam.Allocation{Addr: r.Addr, Netns: r.Device})
	}
	for _, l := range s.ownership.Allocations() {
		if strings.HasPrefix(l.Key, benchKeyPrefix) { // given back when the benchmark ends, or the next session begins
			out = append(out, ipam.Allocation{Addr: l.Addr, Netns: s.cfg.Tun})
			continue
		}
		if !seen[l.Addr] && mayBePod(time.Now(), l) {
			out = append(out, l)
		}
	}
	return out, nil
}

// IPAMCheck implements api.Backend.
func (a *agent) IPAMCheck(context.Context) (api.IPAMCheck, error) {
	s, err := a.current()
	if err != nil {
		return api.IPAMCheck{}, err
	}
	live, err := s.live()
	if err != nil {
		return api.IPAMCheck{}, err
	}
	out := api.IPAMCheck{Checked: len(s.ownership.Allocations())}
	for _, f := range s.ownership.Check(time.Now(), live, leakGrace) {
		switch f.Kind {
		case ownership.Unknown:
			out.Unknown = append(out.Unknown, api.UnknownAddr{Address: f.Allocation.Addr, Where: f.Allocation.Netns})
		case ownership.Leaked:
			out.Leaked = append(out.Leaked, api.LeakedAddr{
				Address: f.Allocation.Addr, ID: f.Allocation.Key, Since: f.Allocation.Since,
				Reason: "no route leads to it, and its link or its network namespace is gone",
			})
		case ownership.Stranded:
			out.Stranded = append(out.Stranded, api.LeakedAddr{
				Address: f.Allocation.Addr, ID: f.Allocation.Key, Since: f.Allocation.Since,
				Reason: "another node owns it now",
			})
		}
	}
	return out, nil
}

// IPAMRelease implements api.Backend.
func (a *agent) IPAMRelease(_ context.Context, req api.ReleaseRequest) (api.ReleaseResult, error) {
	s, err := a.current()
	if err != nil {
		return api.ReleaseResult{}, err
	}
	live, err := s.live()
	if err != nil {
		return api.ReleaseResult{}, err
	}
	var out api.ReleaseResult
	keys := []string{}
	if !req.All {
		owner := map[netip.Addr]string{}
		for _, l := range s.ownership.Allocations() {
			owner[l.Addr] = l.Key
		}
		for _, addr := range req.Addresses {
			if k, ok := owner[addr]; ok {
				keys = append(keys, k)
			} else {
				out.Refused = append(out.Refused, api.RefusedAddr{Address: addr, Why: "it is not allocated"})
			}
		}
		if len(keys) == 0 {
			return out, nil
		}
	}
	list, err := s.ownership.ReleaseLeaked(time.Now(), live, leakGrace, keys...)
	if err != nil {
		return out, coded(err)
	}
	released := map[netip.Addr]bool{}
	for _, l := range list {
		released[l.Addr] = true
		out.Released = append(out.Released, l.Addr)
	}
	for _, addr := range req.Addresses {
		if !released[addr] && !req.All {
			known := false
			for _, r := range out.Refused {
				known = known || r.Address == addr
			}
			if !known {
				out.Refused = append(out.Refused, api.RefusedAddr{Address: addr, Why: "a check finds it in use at this moment, or too young to tell"})
			}
		}
	}
	return out, nil
}
