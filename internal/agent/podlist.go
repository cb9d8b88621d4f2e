package agent

import (
	"cmp"
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/podnet"
	"github.com/tulle-net/tulle/ipam"
)

// Pods implements api.Backend: the allocations, each with its link where there is one, and the links without an allocation.
func (a *agent) Pods(context.Context) ([]api.Pod, error) {
	s, err := a.current()
	if err != nil {
		return nil, err
	}
	links, err := s.pods.ListDropped()
	if err != nil {
		return nil, err
	}
	return podsOf(s.ownership.Allocations(), links), nil
}

// PodsOf implements api.Backend. It looks at no link of another container: each pod that is made asks for it.
func (a *agent) PodsOf(_ context.Context, container string) ([]api.Pod, error) {
	s, err := a.current()
	if err != nil {
		return nil, err
	}
	allocations := slices.DeleteFunc(s.ownership.Allocations(), func(l ipam.Allocation) bool {
		id, ok := api.ParsePodID(l.Key)
		return !ok || id.Container != container
	})
	var links []podnet.Attachment
	for _, l := range allocations {
		if slices.ContainsFunc(links, func(a podnet.Attachment) bool { return a.ID == l.Key }) {
			continue // its other family's address
		}
		link, ok, err := s.pods.Get(l.Key)
		if err != nil {
			return nil, err
		}
		if ok {
			links = append(links, link)
		}
	}
	return podsOf(allocations, links), nil
}

// podsOf puts allocations and links together.
func podsOf(allocations []ipam.Allocation, links []podnet.Attachment) []api.Pod {
	byID := map[string]podnet.Attachment{}
	for _, l := range links {
		byID[l.ID] = l
	}
	byKey := map[string]*api.Pod{}
	for _, l := range allocations {
		if strings.HasPrefix(l.Key, benchKeyPrefix) {
			continue // no pod
		}
		p := byKey[l.Key]
		if p == nil {
			p = &api.Pod{ID: l.Key, Name: l.Pod, State: api.PodUnwired, Since: l.Since, Netns: l.Netns}
			p.PodID, _ = api.ParsePodID(l.Key)
			byKey[l.Key] = p
		}
		p.Addresses = append(p.Addresses, l.Addr)
	}
	var out []api.Pod
	for id, p := range byKey {
		if l, ok := byID[id]; ok {
			delete(byID, l.ID)
			p.State, p.HostInterface, p.MTU, p.Dropped = api.PodUp, l.HostInterface, l.MTU, l.Dropped
			if !sameAddrs(p.Addresses, l.Addresses) {
				p.State = api.PodMismatch
			}
		}
		out = append(out, *p)
	}
	for _, l := range byID {
		p := api.Pod{ID: l.ID, Addresses: l.Addresses, State: api.PodUnknown, HostInterface: l.HostInterface, MTU: l.MTU, Dropped: l.Dropped}
		p.PodID, _ = api.ParsePodID(l.ID)
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b api.Pod) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) })
	return out
}

// sameAddrs compares two lists in any order.
func sameAddrs(a, b []netip.Addr) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.SortFunc(a, netip.Addr.Compare)
	slices.SortFunc(b, netip.Addr.Compare)
	return slices.Equal(a, b)
}

// publish tells container engines whether they can have pods here. While they have some they keep the network, because they cannot delete a pod
// without it: ADD is told to try again later, and STATUS says why.
func (s *session) publish(ctx context.Context, ready, again bool) {
	if !ready && s.pods != nil && ofEngines(s.pods) {
		return
	}
	err := s.conflist.Set(ctx, ready, again)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil && s.cniErr == nil {
		s.log.Error("container engines do not see this network as it is", "error", err)
	}
	s.cniErr = err
}

// ofEngines reports whether this host has pods that a container engine has made with the CNI plugin, or may have.
func ofEngines(pods *podnet.Host) bool {
	list, err := pods.List()
	return err != nil || slices.ContainsFunc(list, func(a podnet.Attachment) bool {
		id, ok := api.ParsePodID(a.ID)
		return ok && id.Engine == api.EngineCNI
	})
}

// releaseGone gives back the addresses of pods that are gone. What cannot be saved now is tried again at the next look.
func (s *session) releaseGone() {
	if err := errors.Join(s.honourFreed(), s.releaseDead()); err != nil {
		s.log.Warn("addresses of pods that are gone stay allocated for now", "error", err)
	}
}

// wiring is how long a pod that this program wires may have an address and no link yet. An ADD gives up after a minute; on a machine that stands
// still it may notice that late.
const wiring = 3 * time.Minute

// mayBePod reports whether an allocation may be that of a pod although the host has neither a link of it nor a route to it. Pods that this
// program wires have a link for as long as they have an interface; of others, the namespace tells. A path like /proc/PID/ns/net is that of another process after
// a reboot.
func mayBePod(now time.Time, l ipam.Allocation) bool {
	if id, ok := api.ParsePodID(l.Key); ok && slices.Contains([]string{api.EngineCNI, api.EnginePodman, api.EngineTulle}, id.Engine) && now.Sub(l.Since) >= wiring {
		return false
	}
	return l.Netns != "" && namespaceLives(l.Netns)
}

// releaseDead gives back the addresses of pods whose namespace is gone: after a reboot, or because their setup was killed.
// Allocations that name no namespace stay: only an operator can tell (tulle ipam check). Pods that have a link or a route here stay, too.
func (s *session) releaseDead() error {
	now := time.Now()
	var dead []string
	for _, l := range s.ownership.Allocations() {
		if l.Netns != "" && now.Sub(l.Since) >= leakGrace && !mayBePod(now, l) {
			dead = append(dead, l.Key)
		}
	}
	if len(dead) == 0 {
		return nil
	}
	live, err := s.podsHere()
	if err != nil {
		return err
	}
	released, err := s.ownership.ReleaseLeaked(now, live, leakGrace, dead...)
	if len(released) > 0 {
		s.log.Info("released the addresses of pods that are gone", "addresses", len(released))
	}
	return err
}

// honourFreed gives back the addresses of pods that went while this agent did not answer.
func (s *session) honourFreed() error {
	ids, err := api.Freed(s.cfg.Socket)
	errs := []error{err}
	for _, id := range ids {
		errs = append(errs, s.honour(id))
	}
	return errors.Join(errs...)
}

// honour does so for one record, unless somebody else has done it meanwhile: then its addresses may be those of a pod that is back.
func (s *session) honour(id string) error {
	s.honouring.Lock()
	defer s.honouring.Unlock()
	if !api.IsFreed(s.cfg.Socket, id) {
		return nil
	}
	list, err := s.ownership.Release(time.Now(), id)
	if err != nil {
		return err
	}
	if len(list) > 0 {
		s.log.Info("released the addresses of a pod that went while the agent did not answer", "pod", id)
	}
	return api.ForgetFreed(s.cfg.Socket, id)
}

// gsoLimits are the bounds of the super-packets that the TUN takes: pods' links have the same.
func (s *session) gsoLimits() (size, segs int) {
	link, err := netlink.LinkByName(s.cfg.Tun)
	if err != nil {
		return 0, 0 // as the kernel has it
	}
	return int(link.Attrs().GSOMaxSize), int(link.Attrs().GSOMaxSegs)
}
