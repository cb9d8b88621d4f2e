package podnet

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// A flaw is what is not as it should be about one pod, or a chain that has lost its pod.
type flaw struct {
	name   string     // of the host's end, and of the chain
	pod    Attachment // zero: it is gone
	checks bool       // they are missing, or others
	routes bool       // at least one is missing, or the pod has lost its bridge

	settings bool // at least one is wrong
}

// Reconcile puts back what somebody has taken from the pods of this host: source checks, sysctls and routes. It removes checks of
// pods that are gone. It returns a line for each thing mended.
//
// What looks wrong may be a pod that is coming or going. So it looks a second time, while nobody else makes or removes pods;
// if it cannot get there in time, it leaves everything for the next time.
func (h *Host) Reconcile(ctx context.Context) (repaired []string, err error) {
	if err := h.sweepBridges(); err != nil { // safe while pods come and go
		return nil, err
	}
	c, err := h.nft()
	if err != nil {
		return nil, err
	}
	found, err := h.survey(c)
	if err != nil || len(found) == 0 {
		return nil, err
	}
	unlock, ok, err := h.lockAlone(ctx)
	if err != nil || !ok {
		return nil, err
	}
	defer unlock()
	if found, err = h.survey(c); err != nil {
		return nil, err
	}
	var errs []error
	for _, f := range found {
		did, err := h.mend(ctx, &f)
		repaired = append(repaired, did...)
		errs = append(errs, err)
	}
	return repaired, errors.Join(errs...)
}

// survey finds the flaws.
func (h *Host) survey(c *nftables.Conn) (found []flaw, err error) {
	have, err := chains(c)
	if err != nil {
		return nil, err
	}
	pods, err := h.attachments()
	if err != nil {
		return nil, err
	}
	rules, err := h.readRules("")
	if err != nil {
		return nil, err
	}
	routes, err := h.routes() // once: on a host of a large cluster they are many
	if err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(pods)) {
		f := flaw{name: name, pod: pods[name], checks: true}
		if chain := have[name]; chain != nil {
			ok, _ := checked(chain, rules[name], &f.pod)
			f.checks = !ok
		}
		link, err := h.nl.LinkByName(name)
		if err != nil || link.Attrs().RawFlags&unix.IFF_UP == 0 {
			continue // it has gone meanwhile, or nobody has finished it: DEL's affair
		}
		bad, err := h.wrongSettings(&f.pod)
		if err != nil {
			return nil, err
		}
		f.settings = len(bad) > 0
		way, err := h.behind(link, &f.pod)
		f.routes = err != nil || slices.ContainsFunc(f.pod.Addresses, func(a netip.Addr) bool { return !routes[way.Attrs().Index][sys.HostPrefix(a).String()] })
		if f.checks || f.routes || f.settings {
			found = append(found, f)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(have)) {
		if _, ok := pods[name]; !ok && !h.Exists(name) {
			found = append(found, flaw{name: name})
		}
	}
	return found, nil
}

// routes are the single addresses to which the main table has a route over each device.
func (h *Host) routes() (map[int]map[string]bool, error) {
	list, err := h.nl.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("podnet: list routes: %w", err)
	}
	out := map[int]map[string]bool{}
	for i := range list {
		r := &list[i]
		if r.Dst == nil || r.LinkIndex == 0 {
			continue
		}
		if ones, bits := r.Dst.Mask.Size(); ones == bits {
			if out[r.LinkIndex] == nil {
				out[r.LinkIndex] = map[string]bool{}
			}
			out[r.LinkIndex][r.Dst.String()] = true
		}
	}
	return out, nil
}

// mend removes one flaw. The link goes with the pod's namespace, at any moment.
func (h *Host) mend(ctx context.Context, f *flaw) (repaired []string, err error) {
	if f.pod.ID == "" {
		return nil, h.removeChecks(f.name)
	}
	if f.checks {
		err = h.installChecks(&f.pod)
		repaired = append(repaired, fmt.Sprintf("source checks of %s (%s)", f.name, f.pod.ID))
	}
	if f.settings && err == nil { // before the routes: without IPv6 a link has none
		var did []string
		did, err = h.correct(&f.pod)
		repaired = append(repaired, did...)
	}
	if f.routes && err == nil {
		err = h.lead(ctx, &f.pod)
		repaired = append(repaired, fmt.Sprintf("routes to %v by %s (%s)", f.pod.Addresses, f.name, f.pod.ID))
	}
	if !h.Exists(f.name) {
		return nil, h.removeChecks(f.name)
	}
	if err != nil {
		return nil, err
	}
	return repaired, nil
}

// lead puts back what leads from the host to a pod.
func (h *Host) lead(ctx context.Context, a *Attachment) error {
	if a.Bridge != "" {
		if err := h.behindBridge(ctx, a); err != nil {
			return fmt.Errorf("podnet: %w", err)
		}
		return nil
	}
	link, err := h.nl.LinkByName(a.HostInterface)
	if err != nil {
		return fmt.Errorf("podnet: find %s: %w", a.HostInterface, err)
	}
	return h.hostAddresses(ctx, link, a)
}

// Exists reports whether the host has a device of this name.
func (h *Host) Exists(device string) bool {
	_, err := h.nl.LinkByName(device)
	return err == nil
}

// HasPodEnd reports whether the host has the pod's end of a link that was handed over: until the engine has moved it into the pod,
// and again when the engine has taken it out, which gives it its name back.
func (h *Host) HasPodEnd(id string) bool { return h.Exists(handedOver(id)) }

// Whoever makes or removes a pod holds a shared lock on the host's network namespace; any number of them do at once. Who mends,
// holds it alone. The kernel releases the lock of a process that was killed.

// sharedPatience is how long to wait for whoever is mending, which takes a moment. Every process in the host's namespace can take the
// lock, whatever its user, and can keep it: pods come and go all the same. What is mended meanwhile is mended again at the next look.
var sharedPatience = 10 * time.Second // a test changes it

// lockShared waits for whoever is mending, for sharedPatience at most.
func (h *Host) lockShared() (unlock func(), err error) {
	f, err := h.openNamespace()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), sharedPatience)
	defer cancel()
	if err := flock(ctx, f, unix.LOCK_SH); err != nil && ctx.Err() == nil {
		f.Close()
		return nil, fmt.Errorf("podnet: lock %s: %w", f.Name(), err)
	}
	return func() { f.Close() }, nil
}

// flock tries to lock a file until ctx ends.
func flock(ctx context.Context, f *os.File, how int) error {
	return sys.Poll(ctx, 5*time.Millisecond, func() (bool, error) {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, unix.EINTR) {
			return false, nil
		}
		return err == nil, err
	})
}

// alonePatience is how long to try to be alone.
const alonePatience = time.Second

func (h *Host) lockAlone(ctx context.Context) (unlock func(), ok bool, err error) {
	f, err := h.openNamespace()
	if err != nil {
		return nil, false, err
	}
	ctx, cancel := context.WithTimeout(ctx, alonePatience)
	defer cancel()
	err = flock(ctx, f, unix.LOCK_EX)
	switch {
	case err == nil:
		return func() { f.Close() }, true, nil
	case ctx.Err() != nil:
		return nil, false, f.Close()
	}
	f.Close()
	return nil, false, fmt.Errorf("podnet: lock %s: %w", f.Name(), err)
}

func (h *Host) openNamespace() (*os.File, error) {
	path := h.path
	if path == "" {
		path = "/proc/thread-self/ns/net"
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("podnet: host's network namespace: %w", err)
	}
	return f, nil
}
