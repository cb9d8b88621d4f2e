package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/sys"
)

// Hosts returns the current hosts.
func (l *Lab) Hosts() []Host {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.st.Hosts)
}

// Pods returns the current pods.
func (l *Lab) Pods() []Pod {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.st.Pods)
}

// Host returns the host of that name.
func (l *Lab) Host(name string) (Host, error) {
	for _, h := range l.Hosts() {
		if h.Name == name {
			return h, nil
		}
	}
	return Host{}, l.noTarget("host", name)
}

// Pod returns the pod of that name.
func (l *Lab) Pod(name string) (Pod, error) {
	for _, p := range l.Pods() {
		if p.Name == name {
			return p, nil
		}
	}
	return Pod{}, l.noTarget("pod", name)
}

// change applies fn to the state and saves it.
func (l *Lab) change(fn func(*state)) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	fn(&l.st)
	return l.st.save()
}

// AddHost adds a host to a subnet and, unless the lab is bare, starts its agent and waits until that is ready.
func (l *Lab) AddHost(ctx context.Context, subnet int) (Host, error) {
	l.changing.Lock()
	defer l.changing.Unlock()
	if subnet < 1 || subnet > l.st.Options.Subnets {
		return Host{}, fmt.Errorf("lab %s has no subnet %d: it has 1 to %d", l.Name(), subnet, l.st.Options.Subnets)
	}
	if err := l.errStraight(); err != nil {
		return Host{}, err
	}
	var h Host
	err := l.change(func(s *state) {
		n := 1
		for _, o := range s.Hosts {
			n = max(n, o.Number+1)
		}
		h = l.planHost(n, subnet)
		s.Hosts = append(s.Hosts, h)
	})
	if err != nil {
		return h, err
	}
	if err := l.buildHost(ctx, &h); err != nil {
		return h, err
	}
	if err := l.waitHosts(ctx, h); err != nil || l.st.Options.Bare {
		return h, err
	}
	if err := l.startAgent(h.Name); err != nil {
		return h, err
	}
	if err := l.WaitReady(ctx, h.Name); err != nil {
		return h, err
	}
	return l.Host(h.Name)
}

// RemoveHost removes a host like a permanent failure: its agent gets SIGKILL, its pods and links disappear. The other hosts
// are not told.
func (l *Lab) RemoveHost(ctx context.Context, host string) error {
	l.changing.Lock()
	defer l.changing.Unlock()
	h, err := l.Host(host)
	if err != nil {
		return err
	}
	if err := errors.Join(l.cutPower(ctx, host), os.RemoveAll(h.Dir)); err != nil {
		return err
	}
	return l.change(func(s *state) {
		s.Hosts = slices.DeleteFunc(s.Hosts, func(o Host) bool { return o.Name == host })
	})
}

// ResetHost simulates a power failure of a host: its agent gets SIGKILL, all state of its kernel and its pods are gone, its
// disk stays. Afterwards the host is on the network again without an agent; call StartAgent.
func (l *Lab) ResetHost(ctx context.Context, host string) error {
	l.changing.Lock()
	defer l.changing.Unlock()
	h, err := l.Host(host)
	if err != nil {
		return err
	}
	if err := l.cutPower(ctx, host); err != nil {
		return err
	}
	if err := l.buildHost(ctx, &h); err != nil {
		return err
	}
	return l.waitHosts(ctx, h)
}

// cutPower ends a host's agent, its pods and its namespace.
func (l *Lab) cutPower(ctx context.Context, host string) error {
	if err := l.errStraight(); err != nil {
		return err
	}
	err := l.StopAgent(ctx, host, sigKill)
	for _, p := range l.Pods() {
		if p.Host == host {
			err = errors.Join(err, sys.DeleteNetns(l.netnsName(p.Name)))
		}
	}
	err = errors.Join(err, dropPods(sys.NetnsPath(l.netnsName(host))), sys.DeleteNetns(l.netnsName(host)), l.removePort(host))
	return errors.Join(err, l.change(func(s *state) {
		s.Pods = slices.DeleteFunc(s.Pods, func(p Pod) bool { return p.Host == host })
	}))
}

// AddPod adds a pod to a host, with the addresses that the host's agent gives it (static ones in a bare lab).
func (l *Lab) AddPod(ctx context.Context, host string) (Pod, error) {
	l.changing.Lock()
	defer l.changing.Unlock()
	return l.addPod(ctx, host)
}

func (l *Lab) addPod(ctx context.Context, host string) (Pod, error) {
	h, err := l.Host(host)
	if err != nil {
		return Pod{}, err
	}
	l.mu.Lock()
	n := 1
	for _, p := range l.st.Pods {
		if p.Host == host {
			n = max(n, p.Number+1)
		}
	}
	p := l.planPod(&h, n)
	l.mu.Unlock()
	if !l.hasAgent(&h) {
		if p.Addresses, err = l.staticAddrs(&h, &p); err != nil {
			return p, err
		}
	} else if err := l.allocate(ctx, &h, &p); err != nil {
		return p, fmt.Errorf("an address for pod %s from the agent on %s: %w", p.Name, host, l.withLog(&h, err))
	}
	if err := l.change(func(s *state) { s.Pods = append(s.Pods, p) }); err != nil {
		return p, err
	}
	return p, l.buildPod(ctx, &h, &p)
}

// allocate requests the pod's addresses from the agent, and repeats that while the agent has no space yet.
func (l *Lab) allocate(ctx context.Context, h *Host, p *Pod) error {
	c := api.NewClient(h.Socket)
	req := api.AllocateRequest{ID: p.ID, Name: p.Name, Netns: p.Netns}
	var last error
	err := sys.Poll(ctx, 50*time.Millisecond, func() (bool, error) {
		a, err := c.Allocate(ctx, req)
		if err != nil {
			last = err
			if api.CodeOf(err) == api.CodeUnhealthy && ctx.Err() == nil {
				return false, nil
			}
			return false, err
		}
		p.MTU = cmpOr(a.MTU, p.MTU)
		for _, g := range a.Addresses {
			p.Addresses = append(p.Addresses, g.Address)
		}
		return true, nil
	})
	if ctx.Err() != nil && last != nil {
		return fmt.Errorf("%w: %w", context.Cause(ctx), last)
	}
	return err
}

// RemovePod removes a pod and frees its addresses at the host's agent.
func (l *Lab) RemovePod(ctx context.Context, pod string) error {
	l.changing.Lock()
	defer l.changing.Unlock()
	p, err := l.Pod(pod)
	if err != nil {
		return err
	}
	h, err := l.Host(p.Host)
	if err != nil {
		return err
	}
	if err := l.removeVeth(&h, &p); err != nil {
		return err
	}
	if err := sys.DeleteNetns(l.netnsName(pod)); err != nil {
		return err
	}
	if l.hasAgent(&h) {
		if _, err := api.NewClient(h.Socket).Free(ctx, api.FreeRequest{ID: p.ID}); err != nil {
			return fmt.Errorf("give the addresses of pod %s back to the agent on %s: %w", pod, h.Name, err)
		}
	}
	return l.change(func(s *state) {
		s.Pods = slices.DeleteFunc(s.Pods, func(o Pod) bool { return o.Name == pod })
	})
}
