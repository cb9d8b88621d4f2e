// Package cni is Tulle's plugin for the Container Network Interface, specification 1.1.0, for configurations of 0.4.0, 1.0.0 and
// 1.1.0. It is a process for each call, which asks the agent of the host for addresses and wires the container by itself
// (internal/attach). It keeps nothing on disk.
//
// DEL, GC: what is gone is no error; the container's namespace is not needed, and neither is the agent. ADD: all or nothing.
//
// Sources: https://github.com/containernetworking/cni/blob/main/SPEC.md and CONVENTIONS.md.
package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/attach"
	"github.com/tulle-net/tulle/internal/podnet"
)

// Versions are the versions of the specification that a configuration may have.
var Versions = version.PluginSupports("0.4.0", "1.0.0", "1.1.0")

// About is what the program says when a person runs it.
func About() string { return "tulle-cni " + api.Version() }

// Funcs are the plugin's verbs.
func Funcs() skel.CNIFuncs {
	return skel.CNIFuncs{Add: add, Del: del, Check: check, GC: gc, Status: status}
}

// ErrAddress is this plugin's own error code (100 and up are free for plugins): a requested address cannot be had.
const ErrAddress uint = 100

// patience is how long a verb waits for the agent and the kernel. Engines have limits of their own.
const patience = 60 * time.Second

// add implements ADD.
func add(args *skel.CmdArgs) error {
	conf, err := parse(args)
	if err != nil {
		return err
	}
	req, err := conf.request(args)
	if err != nil {
		return err
	}
	if _, err := os.Stat(args.Netns); err != nil {
		return types.NewError(types.ErrInvalidNetNS, "the container's network namespace", err.Error())
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := attach.OnlyOne(ctx, req.Socket, req.ID); api.CodeOf(err) == api.CodeRefused {
		return types.NewError(types.ErrInvalidNetworkConfig, "a second interface of this container", err.Error())
	} else if err != nil {
		return coded(err)
	}
	res, err := attach.Add(ctx, req)
	if err != nil {
		return coded(err)
	}
	if err := types.PrintResult(conf.result(args, &res.Attachment), conf.CNIVersion); err != nil {
		_, rerr := attach.Remove(ctx, req.Socket, req.ID)
		return types.NewError(types.ErrIOFailure, "write the result", errors.Join(err, rerr).Error())
	}
	return nil
}

// result is the interface as the specification describes it: the bridge if there is one, the host's end, the container's end,
// addresses and routes.
func (c *config) result(args *skel.CmdArgs, a *podnet.Attachment) *current.Result {
	r := &current.Result{CNIVersion: current.ImplementedSpecVersion, DNS: c.DNS}
	if a.Bridge != "" {
		r.Interfaces = append(r.Interfaces, &current.Interface{Name: a.Bridge, Mac: podnet.HostMAC.String()})
	}
	r.Interfaces = append(r.Interfaces,
		&current.Interface{Name: a.HostInterface, Mac: a.HostMAC.String(), Mtu: a.MTU},
		&current.Interface{Name: args.IfName, Mac: a.MAC.String(), Mtu: a.MTU, Sandbox: args.Netns})
	container := len(r.Interfaces) - 1
	for _, addr := range a.Addresses {
		gw := net.IP(podnet.Gateway(addr).AsSlice())
		zero := net.IPNet{IP: make(net.IP, addr.BitLen()/8), Mask: net.CIDRMask(0, addr.BitLen())}
		r.IPs = append(r.IPs, &current.IPConfig{
			Interface: &container, Gateway: gw,
			Address: net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())},
		})
		r.Routes = append(r.Routes, &types.Route{Dst: zero, GW: gw})
	}
	return r
}

// del implements DEL.
func del(args *skel.CmdArgs) error {
	conf, err := parseID(args)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := attach.Remove(ctx, conf.Socket, conf.id(args)); err != nil {
		return coded(err)
	}
	return nil
}

// check implements CHECK: what ADD has answered must be so still, on the host, in the container, and for the agent.
func check(args *skel.CmdArgs) error {
	conf, err := parse(args)
	if err != nil {
		return err
	}
	want, err := conf.previous(args)
	if err != nil {
		return err
	}
	id := conf.id(args)
	host, err := podnet.Open("")
	if err != nil {
		return coded(err)
	}
	defer host.Close()
	err = host.Check(podnet.Config{ID: id.String(), Netns: args.Netns, Interface: args.IfName, Addresses: want, Bridge: conf.Bridge})
	if err != nil {
		return coded(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	pods, err := api.NewClient(conf.Socket).PodsOf(ctx, args.ContainerID)
	if err != nil {
		return coded(err)
	}
	for _, p := range pods {
		if p.ID == id.String() && p.State == api.PodUp {
			return nil
		}
	}
	return types.NewError(types.ErrUnknownContainer, fmt.Sprintf("the agent knows no working allocation %s", id), "see `tulle pod list`")
}

// previous gives the addresses that ADD has answered.
func (c *config) previous(args *skel.CmdArgs) ([]netip.Addr, error) {
	if err := version.ParsePrevResult(&c.PluginConf); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "prevResult", err.Error())
	}
	if c.PrevResult == nil {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "CHECK needs the prevResult of ADD", "")
	}
	r, err := current.NewResultFromResult(c.PrevResult)
	if err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "prevResult", err.Error())
	}
	var out []netip.Addr
	for _, ip := range r.IPs {
		if i := ip.Interface; i != nil && (*i < 0 || *i >= len(r.Interfaces) || r.Interfaces[*i].Name != args.IfName) {
			continue // of another plugin in the chain
		}
		if a, ok := netip.AddrFromSlice(ip.Address.IP); ok {
			out = append(out, a.Unmap())
		}
	}
	return out, nil
}

// gc implements GC: all attachments of this network that the runtime does not list are removed. The agent may be down: links
// say whose they are.
func gc(args *skel.CmdArgs) error {
	conf, err := parse(args)
	if err != nil {
		return err
	}
	valid := map[api.PodID]bool{}
	for _, a := range conf.ValidAttachments {
		valid[api.PodID{Engine: api.EngineCNI, Network: conf.Name, Container: a.ContainerID, Interface: a.IfName}] = true
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var errs []error
	for id := range conf.attachments(ctx) {
		if !valid[id] {
			_, err := attach.Remove(ctx, conf.Socket, id)
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return coded(err)
	}
	return nil
}

// attachments gathers what this network has on this host, from the agent and from the links.
func (c *config) attachments(ctx context.Context) map[api.PodID]bool {
	var ids []string
	if pods, err := api.NewClient(c.Socket).Pods(ctx); err == nil {
		for _, p := range pods {
			ids = append(ids, p.ID)
		}
	}
	if host, err := podnet.Open(""); err == nil {
		defer host.Close()
		if links, err := host.List(); err == nil {
			for _, l := range links {
				ids = append(ids, l.ID)
			}
		}
	}
	out := map[api.PodID]bool{}
	for _, s := range ids {
		if id, ok := api.ParsePodID(s); ok && id.Engine == api.EngineCNI && id.Network == c.Name {
			out[id] = true
		}
	}
	return out
}

// status implements STATUS: whether an ADD would be served, and why not.
func status(args *skel.CmdArgs) error {
	conf, err := parse(args)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	st, err := api.NewClient(conf.Socket).Status(ctx)
	if err != nil {
		return types.NewError(types.ErrPluginNotAvailable, "no agent", err.Error())
	}
	if st.Ready {
		return nil
	}
	details := "see `tulle status`"
	if i := slices.IndexFunc(st.Problems, func(p api.Problem) bool { return p.What != "" }); i >= 0 {
		details = st.Problems[i].What + "; " + st.Problems[i].Remedy
	} else if st.IPAM.Waiting != "" {
		details = st.IPAM.Waiting
	}
	return types.NewError(types.ErrPluginNotAvailable, "the agent is not ready", details)
}

// coded turns an error into the specification's codes.
func coded(err error) *types.Error {
	if e, ok := errors.AsType[*types.Error](err); ok {
		return e
	}
	code, msg := types.ErrInternal, "failed"
	switch api.CodeOf(err) {
	case api.CodeNoAgent, api.CodeUnhealthy:
		code, msg = types.ErrTryAgainLater, "the agent cannot serve this now"
	case api.CodeRefused:
		code, msg = ErrAddress, "refused"
	case api.CodeUsage:
		code, msg = types.ErrInvalidNetworkConfig, "the agent takes no such request"
	}
	if errors.Is(err, podnet.ErrHostNamespace) {
		code, msg = types.ErrInvalidNetNS, "the container's network namespace"
	}
	if errors.Is(err, fs.ErrExist) {
		code, msg = types.ErrInternal, "the container has this interface already"
	}
	return types.NewError(code, msg, err.Error())
}

func decode(b []byte, to any) error {
	if err := json.Unmarshal(b, to); err != nil {
		return types.NewError(types.ErrDecodingFailure, "network configuration", err.Error())
	}
	return nil
}
