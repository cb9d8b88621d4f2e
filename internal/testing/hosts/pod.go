package hosts

import (
	"context"
	"net/netip"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/podnet"
)

// Pod is a pod: a namespace with addresses of an agent, wired to its host as all pods are.
type Pod struct {
	*Host
	Addrs []netip.Addr
	MTU   int

	id    string
	agent *Agent
}

// IPv4 is the pod's IPv4 address, or the zero Addr.
func (p *Pod) IPv4() netip.Addr { return p.pick(netip.Addr.Is4) }

// IPv6 is the pod's IPv6 address, or the zero Addr.
func (p *Pod) IPv6() netip.Addr { return p.pick(netip.Addr.Is6) }

func (p *Pod) pick(is func(netip.Addr) bool) netip.Addr {
	for _, a := range p.Addrs {
		if is(a) {
			return a
		}
	}
	return netip.Addr{}
}

// Pod makes a pod on the agent's host. Its name is that of no other host or pod, and has at most 14 letters.
func (a *Agent) Pod(name string) *Pod {
	t := a.Host.net.t
	t.Helper()
	p := &Pod{Host: a.Host.net.Host(name), agent: a, id: a.Host.net.prefix + name}
	Within(t, 20*time.Second, "an address for pod "+name, func() error {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		got, err := a.Client.Allocate(ctx, api.AllocateRequest{ID: p.id, Name: name, Netns: p.NetnsPath()})
		if err != nil {
			return err
		}
		p.MTU = got.MTU
		for _, g := range got.Addresses {
			p.Addrs = append(p.Addrs, g.Address)
		}
		return nil
	})
	p.wire()
	return p
}

func (p *Pod) wire() {
	n := p.agent.Host.net
	n.t.Helper()
	h, err := podnet.Open(p.agent.Host.NetnsPath())
	n.check(err)
	defer h.Close()
	_, err = h.Add(n.t.Context(), podnet.Config{
		ID: p.id, HostInterface: "v" + p.Name, Netns: p.NetnsPath(), Interface: "eth0", Addresses: p.Addrs, MTU: p.MTU,
	})
	n.check(err)
}

// Remove does what a container engine does when a pod ends: its namespace goes, and its addresses are given back.
func (p *Pod) Remove() {
	t := p.agent.Host.net.t
	t.Helper()
	p.agent.Host.IP("link del v" + p.Name)
	_, err := p.agent.Client.Free(t.Context(), api.FreeRequest{ID: p.id})
	p.agent.Host.net.check(err)
}
