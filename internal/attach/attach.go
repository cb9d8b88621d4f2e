// Package attach makes a pod's interface from nothing to working, and takes it back: addresses from the agent over its control
// socket (internal/api), wiring by internal/podnet. `tulle pod`, the CNI plugin and the drivers of container engines are
// its callers.
//
// The caller's process does the wiring, not the agent: the agent's sandbox lets it enter no other namespace. So it needs
// CAP_NET_ADMIN and CAP_SYS_ADMIN, and runs in the network namespace of the host.
//
// Its functions may be called from several goroutines and processes at once, for different pods.
package attach

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/podnet"
)

// Request is one pod interface that is wanted.
type Request struct {
	Socket    string // the agent's; empty means api.DefaultSocket
	ID        api.PodID
	Name      string           // for people
	Netns     string           // path; empty hands the pod's end over (podnet.Config)
	Requested []netip.Addr     // at most one of each family, repetitions aside; empty: any
	From      string           // an ID that holds the addresses until now (api.AllocateRequest)
	MAC       net.HardwareAddr // nil: any
	Bridge    string           // of this host, which the pod is to be behind; empty: none
}

// Result is what was made.
type Result struct {
	Allocation api.Allocation
	Attachment podnet.Attachment
}

// agentPatience is how long a removal waits for an agent that does not answer.
const agentPatience = 10 * time.Second

// Add makes the interface, or nothing: on an error addresses and links are gone. It fails with an error that wraps fs.ErrExist,
// and leaves everything as it is, if the pod has this interface already.
func Add(ctx context.Context, r Request) (res Result, err error) {
	host, err := podnet.Open("")
	if err != nil {
		return res, err
	}
	defer host.Close()
	id := r.ID.String()
	if host.Exists(podnet.InterfaceName(id)) {
		return res, fmt.Errorf("%s of %s is there already (%s): %w", r.ID.Interface, r.ID.Container, podnet.InterfaceName(id), fs.ErrExist)
	}
	c := api.NewClient(r.Socket)
	res.Allocation, err = c.Allocate(ctx, api.AllocateRequest{ID: id, Name: r.Name, Netns: r.Netns, Requested: distinct(r.Requested), From: r.From})
	if err != nil {
		return res, err
	}
	var addrs []netip.Addr
	var blocks []netip.Prefix
	for _, a := range res.Allocation.Addresses {
		addrs, blocks = append(addrs, a.Address), append(blocks, a.Block)
	}
	cfg := podnet.Config{
		ID: id, Netns: r.Netns, Addresses: addrs, MTU: res.Allocation.MTU, MAC: r.MAC, Bridge: r.Bridge, OnLink: blocks, Space: res.Allocation.CIDRs,
		GSOMaxSize: res.Allocation.GSOMaxSize, GSOMaxSegs: res.Allocation.GSOMaxSegs,
	}
	if r.Netns != "" {
		cfg.Interface = r.ID.Interface
	}
	res.Attachment, err = host.Add(ctx, cfg)
	if errors.Is(err, fs.ErrExist) && host.Exists(podnet.InterfaceName(id)) {
		return res, err // made by somebody else at this moment, with the same addresses
	}
	if err != nil {
		_, ferr := free(ctx, c, id)
		return res, errors.Join(err, ferr)
	}
	return res, nil
}

// OnlyOne refuses a second interface of the same container: one of two default routes would lead packets out of the wrong interface, where
// the source checks drop them, and would be gone with its interface. Such an error has the code api.CodeRefused.
func OnlyOne(ctx context.Context, socket string, id api.PodID) error {
	pods, err := api.NewClient(socket).PodsOf(ctx, id.Container)
	for _, p := range pods {
		if p.Engine == id.Engine && p.Container == id.Container && p.State == api.PodUp && p.PodID != id {
			return api.Errorf(api.CodeRefused, "the container is in the network %s of this driver already (%s); all of them lead to the same containers, so one is enough", p.Network, p.Interface)
		}
	}
	return err
}

// distinct leaves repetitions out: `podman network reload` requests the addresses that the user wanted, and those that the container has.
func distinct(addrs []netip.Addr) (out []netip.Addr) {
	for _, a := range addrs {
		if !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out
}

// Remove takes the interface and its addresses back, by the ID alone. What is gone is no error. If the agent does not answer, it
// finds a record later (api.Client.FreeOrRecord); recorded says so.
func Remove(ctx context.Context, socket string, id api.PodID) (recorded bool, err error) {
	host, err := podnet.Open("")
	if err != nil {
		return false, err
	}
	defer host.Close()
	// The link first: an address must be out of use before it is given back.
	if err := host.Remove(podnet.InterfaceName(id.String())); err != nil {
		return false, err
	}
	return free(ctx, api.NewClient(socket), id.String())
}

// free outlives ctx: what was begun is ended.
func free(ctx context.Context, c *api.Client, id string) (recorded bool, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), agentPatience)
	defer cancel()
	return c.FreeOrRecord(ctx, id)
}
