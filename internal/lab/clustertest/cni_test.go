package clustertest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/cni"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/sys"
	"github.com/tulle-net/tulle/internal/testing/testbuild"
)

// engine is a container engine on one host as far as networks go: libcni, as containerd and cnitool use it, around the real plugin.
type engine struct {
	t      *testing.T
	l      *lab.Lab
	host   string
	socket string
	lib    *libcni.CNIConfig
	dir    string // where the agent publishes its network
	made   atomic.Int32
}

// newEngine makes a lab of one host, with this many pods of its own, and an engine on it.
func newEngine(t *testing.T, what string, pods int) *engine {
	t.Helper()
	bin, dir := t.TempDir(), t.TempDir()
	if err := testbuild.Command("tulle-cni", filepath.Join(bin, "tulle-cni"), nil); err != nil {
		t.Fatal(err)
	}
	l := up(t, what, lab.Options{
		Nodes: 1, Pods: pods, ClusterCIDRs: dualCIDRs, ExtraAgentArgs: []string{"--cni-dir", dir, "--cni-bin-dir", bin},
	})
	h, err := l.Host("h1")
	if err != nil {
		t.Fatal(err)
	}
	return &engine{t: t, l: l, host: "h1", socket: h.Socket, dir: dir, lib: libcni.NewCNIConfigWithCacheDir([]string{bin}, t.TempDir(), nil)}
}

// published waits until the network is there for engines, or is not.
func (e *engine) published(want bool) {
	e.t.Helper()
	until(e.t, fmt.Sprintf("published: %v", want), func() error {
		n, err := libcni.ConfListFromFile(filepath.Join(e.dir, "10-tulle.conflist"))
		switch {
		case want && err != nil:
			return err
		case want && (n.Name != "tulle" || n.CNIVersion != "1.1.0"):
			return fmt.Errorf("an engine reads %s", n.Bytes)
		case !want && err == nil:
			return errors.New("it is there")
		}
		return nil
	})
}

// network is a configuration of that version.
func (e *engine) network(version string) *libcni.NetworkConfigList {
	e.t.Helper()
	list, err := libcni.NetworkConfFromBytes(fmt.Appendf(nil,
		`{"cniVersion": %q, "name": "tulle", "plugins": [{"type": "tulle-cni", "socket": %q, "capabilities": {"ips": true}, "somebodyElses": 1}]}`, version, e.socket))
	if err != nil {
		e.t.Fatal(err)
	}
	return list
}

// container is a network namespace for one.
func (e *engine) container() *libcni.RuntimeConf {
	name := fmt.Sprintf("%s-%sx%d", e.l.Name(), e.host, e.made.Add(1))
	if err := sys.NewNetns(name); err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { _ = sys.DeleteNetns(name) })
	return &libcni.RuntimeConf{ContainerID: name, NetNS: sys.NetnsPath(name), IfName: "eth0"}
}

// onHost runs one verb in the host's network namespace, where the plugin is to run.
func (e *engine) onHost(verb func(ctx context.Context) error) error {
	return e.l.Do(e.host, func() error { return verb(e.t.Context()) })
}

func (e *engine) add(n *libcni.NetworkConfigList, c *libcni.RuntimeConf) (res *current.Result, raw []byte, err error) {
	err = e.onHost(func(ctx context.Context) error {
		r, err := e.lib.AddNetworkList(ctx, n, c)
		if err != nil {
			return err
		}
		var b bytes.Buffer
		if err := r.PrintTo(&b); err != nil {
			return err
		}
		raw = b.Bytes()
		res, err = current.NewResultFromResult(r)
		return err
	})
	return res, raw, err
}

func (e *engine) check(n *libcni.NetworkConfigList, c *libcni.RuntimeConf) error {
	return e.onHost(func(ctx context.Context) error { return e.lib.CheckNetworkList(ctx, n, c) })
}

func (e *engine) del(n *libcni.NetworkConfigList, c *libcni.RuntimeConf) error {
	return e.onHost(func(ctx context.Context) error { return e.lib.DelNetworkList(ctx, n, c) })
}

func (e *engine) status(n *libcni.NetworkConfigList) error {
	return e.onHost(func(ctx context.Context) error { return e.lib.GetStatusNetworkList(ctx, n) })
}

// code is the specification's code of an error; 0 if it has none.
func code(err error) uint {
	if e, ok := errors.AsType[*types.Error](err); ok {
		return e.Code
	}
	return 0
}

// pods are those of the CNI on h1, by container.
func (e *engine) pods() map[string]api.Pod {
	e.t.Helper()
	list, err := api.NewClient(e.socket).Pods(e.t.Context())
	if err != nil {
		e.t.Fatal(err)
	}
	out := map[string]api.Pod{}
	for _, p := range list {
		if p.Engine == api.EngineCNI {
			out[p.Container] = p
		}
	}
	return out
}

// noPods waits until the agent has none of the CNI.
func (e *engine) noPods(when string) {
	e.t.Helper()
	until(e.t, "nothing is left "+when, func() error {
		if left := e.pods(); len(left) > 0 {
			return fmt.Errorf("%+v", left)
		}
		return nil
	})
}

// TestCNI: every verb, for every version of the configuration, against a real agent.
func TestCNI(t *testing.T) {
	t.Parallel()
	e := newEngine(t, "cni", 1)
	e.published(true)
	for _, version := range []string{"0.4.0", "1.0.0", "1.1.0"} {
		e.allVerbs(version)
	}
	e.requestedAddresses()
	e.refusals()
	e.gc()
	e.withoutAgent()
}

var dualCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:10:244::/48")}

func (e *engine) allVerbs(version string) {
	t, n, c := e.t, e.network(version), e.container()
	t.Helper()
	res, raw, err := e.add(n, c)
	if err != nil {
		t.Fatalf("%s: ADD: %v", version, err)
	}
	e.validate(version, c, res, raw)
	if err := e.check(n, c); err != nil {
		t.Errorf("%s: CHECK: %v", version, err)
	}
	if _, _, err := e.add(n, c); err == nil {
		t.Errorf("%s: a second ADD is no error", version)
	}
	if err := e.check(n, c); err != nil {
		t.Errorf("%s: CHECK after a second ADD: %v", version, err)
	}
	pod := e.pods()[c.ContainerID]
	if pod.State != api.PodUp || pod.Network != "tulle" || len(pod.Addresses) != 2 {
		t.Errorf("%s: pod list: %+v", version, pod)
	}
	far := e.l.Pods()[0]
	for _, a := range far.Addresses {
		r := run(t, newCommand(t, "pod", "--socket", e.socket, "exec", c.ContainerID, "--", "ping", "-c1", "-w20", a.String()))
		if r.code != 0 {
			t.Errorf("%s: container to %v: %+v", version, a, r)
		}
	}
	if version == "1.1.0" {
		if err := e.status(n); err != nil {
			t.Errorf("STATUS: %v", err)
		}
	}
	if err := e.onHost(func(context.Context) error { return deleteLink(pod.HostInterface) }); err != nil {
		t.Fatal(err)
	}
	if err := e.check(n, c); err == nil {
		t.Errorf("%s: CHECK finds nothing after the link was deleted", version)
	}
	for range 2 {
		if err := e.del(n, c); err != nil {
			t.Errorf("%s: DEL: %v", version, err)
		}
	}
	if p, ok := e.pods()[c.ContainerID]; ok {
		t.Errorf("%s: after DEL: %+v", version, p)
	}
}

// validate holds a result against the specification (SPEC.md, ADD Success).
func (e *engine) validate(version string, c *libcni.RuntimeConf, res *current.Result, raw []byte) {
	e.t.Helper()
	var text struct {
		CNIVersion string `json:"cniVersion"`
		IPs        []map[string]any
	}
	if err := json.Unmarshal(raw, &text); err != nil || text.CNIVersion != version || len(text.IPs) != 2 {
		e.t.Fatalf("%s: result %s: %v", version, raw, err)
	}
	for _, ip := range text.IPs {
		if _, has := ip["version"]; has != (version == "0.4.0") {
			e.t.Errorf("%s: ips.version in %s", version, raw)
		}
	}
	if len(res.Interfaces) != 2 || res.Interfaces[0].Sandbox != "" || res.Interfaces[1].Sandbox != c.NetNS || res.Interfaces[1].Name != c.IfName || res.Interfaces[1].Mac == "" {
		e.t.Errorf("%s: interfaces in %s", version, raw)
	}
	var got []netip.Addr
	for _, ip := range res.IPs {
		ones, bits := ip.Address.Mask.Size()
		if ip.Interface == nil || *ip.Interface != 1 || ones != bits || ip.Gateway == nil {
			e.t.Errorf("%s: ips in %s", version, raw)
		}
		a, _ := netip.AddrFromSlice(ip.Address.IP)
		got = append(got, a.Unmap())
	}
	if pod := e.pods()[c.ContainerID]; !slices.Equal(got, pod.Addresses) {
		e.t.Errorf("%s: the result has %v, the agent says %v", version, got, pod.Addresses)
	}
	if len(res.Routes) != 2 || res.Routes[0].Dst.String() != "0.0.0.0/0" || res.Routes[1].Dst.String() != "::/0" {
		e.t.Errorf("%s: routes in %s", version, raw)
	}
}

// requestedAddresses: in all the ways that there are, among arguments that nobody knows.
func (e *engine) requestedAddresses() {
	t, n := e.t, e.network("1.1.0")
	t.Helper()
	want := freeAddr(t, e.l, "h1")
	for what, ask := range map[string]func(*libcni.RuntimeConf){
		"runtimeConfig": func(c *libcni.RuntimeConf) { c.CapabilityArgs = map[string]any{"ips": []string{want.String() + "/24"}} },
		"CNI_ARGS": func(c *libcni.RuntimeConf) {
			c.Args = [][2]string{
				{"IgnoreUnknown", "true"}, {"NOMAD_REGION", "global"}, {"NOMAD_NAMESPACE", "default"}, {"NOMAD_JOB_ID", "job"}, {"NOMAD_GROUP_NAME", "web"},
				{"NOMAD_ALLOC_ID", "9f4f3a2d-29b3-4a5f-8f57-7d0d6a0e8e0b"}, {"IP", want.String()}, {"EMPTY", ""},
			}
		},
	} {
		c := e.container()
		ask(c)
		res, raw, err := e.add(n, c)
		if err != nil || res.IPs[0].Address.IP.String() != want.String() {
			t.Fatalf("%s: asked for %v: %s %v", what, want, raw, err)
		}
		if p := e.pods()[c.ContainerID]; what == "CNI_ARGS" && p.Name != "job/web" {
			t.Errorf("name of a Nomad task: %+v", p)
		}
		other := e.container()
		ask(other)
		if _, _, err := e.add(n, other); code(err) != cni.ErrAddress {
			t.Errorf("%s: an address that is taken: %v, want code %d", what, err, cni.ErrAddress)
		}
		if _, has := e.pods()[other.ContainerID]; has {
			t.Errorf("%s: a refused ADD leaves an allocation", what)
		}
		if err := e.del(n, c); err != nil {
			t.Fatal(err)
		}
		want = want.Next() // the first one cools down
	}
}

// refusals have the specification's codes, and leave nothing.
func (e *engine) refusals() {
	t := e.t
	t.Helper()
	before := len(e.pods())
	n := e.network("1.1.0")
	missing := e.container()
	missing.NetNS += "-not-there"
	host := e.container()
	h, err := e.l.Host("h1")
	if err != nil {
		t.Fatal(err)
	}
	host.NetNS = h.Netns
	bad := e.container()
	bad.CapabilityArgs = map[string]any{"ips": []string{"10.244.0"}}
	badArgs := e.container()
	badArgs.Args = [][2]string{{"IP", "10.244.0"}, {"MAC", "01:00:00:00:00:01"}}
	long := e.container()
	long.ContainerID = strings.Repeat("x", 250)
	for _, c := range []struct {
		what string
		n    *libcni.NetworkConfigList
		c    *libcni.RuntimeConf
		code uint
	}{
		{"no such namespace", n, missing, types.ErrInvalidNetNS},
		{"the host's own namespace", n, host, types.ErrInvalidNetNS},
		{"an address that is none", n, bad, types.ErrInvalidNetworkConfig},
		{"an address that is none in CNI_ARGS", n, badArgs, types.ErrInvalidNetworkConfig},
		{"an ID that is too long", n, long, types.ErrInvalidNetworkConfig},
		{"an unknown version", e.network("9.9.9"), e.container(), types.ErrIncompatibleCNIVersion},
	} {
		if _, _, err := e.add(c.n, c.c); code(err) != c.code {
			t.Errorf("%s: %v (code %d), want code %d", c.what, err, code(err), c.code)
		}
	}
	if after := len(e.pods()); after != before {
		t.Errorf("refused ADDs left %d allocations", after-before)
	}
	for what, c := range map[string]*libcni.RuntimeConf{"no such namespace": missing, "an address that is none": bad, "in CNI_ARGS": badArgs, "an ID that is too long": long} {
		if err := e.del(n, c); err != nil {
			t.Errorf("DEL of what ADD refused (%s): %v", what, err)
		}
	}
	gone := e.container()
	gone.NetNS = ""
	if err := e.del(n, gone); err != nil {
		t.Errorf("DEL without a namespace: %v", err)
	}
}

// gc removes what the runtime does not list, with a runtime that has lost its own notes.
func (e *engine) gc() {
	t, n := e.t, e.network("1.1.0")
	t.Helper()
	keep, drop := e.container(), e.container()
	for _, c := range []*libcni.RuntimeConf{keep, drop} {
		if _, _, err := e.add(n, c); err != nil {
			t.Fatal(err)
		}
	}
	if err := sys.DeleteNetns(drop.ContainerID); err != nil {
		t.Fatal(err)
	}
	forgetful := libcni.NewCNIConfigWithCacheDir(e.lib.Path, t.TempDir(), nil)
	err := e.onHost(func(ctx context.Context) error {
		return forgetful.GCNetworkList(ctx, n, &libcni.GCArgs{ValidAttachments: []types.GCAttachment{{ContainerID: keep.ContainerID, IfName: "eth0"}}})
	})
	if err != nil {
		t.Errorf("GC: %v", err)
	}
	if _, has := e.pods()[drop.ContainerID]; has || len(e.pods()) != 1 {
		t.Errorf("after GC: %+v", e.pods())
	}
	if err := errors.Join(e.check(n, keep), e.del(n, keep)); err != nil {
		t.Errorf("what GC had to keep: %v", err)
	}
}

// withoutAgent: ADD says try again, DEL works and is honoured later. A container outlives the agent's state.
func (e *engine) withoutAgent() {
	t, n, c := e.t, e.network("1.1.0"), e.container()
	t.Helper()
	if _, _, err := e.add(n, c); err != nil {
		t.Fatal(err)
	}
	if err := e.l.StopAgent(t.Context(), "h1", syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := e.del(n, c); err != nil {
		t.Errorf("DEL: %v", err)
	}
	if _, _, err := e.add(n, e.container()); code(err) != types.ErrTryAgainLater {
		t.Errorf("ADD: %v, want code %d", err, types.ErrTryAgainLater)
	}
	if err := e.status(n); code(err) != types.ErrPluginNotAvailable {
		t.Errorf("STATUS: %v, want code %d", err, types.ErrPluginNotAvailable)
	}
	if err := e.l.StartAgent(t.Context(), "h1"); err != nil {
		t.Fatal(err)
	}
	if err := e.l.WaitReady(t.Context(), "h1"); err != nil {
		t.Fatal(err)
	}
	e.published(true)
	e.noPods("after a DEL that it was told of by a record")
	if _, _, err := e.add(n, c); err != nil { // the same container again
		t.Errorf("ADD after all of that: %v", err)
	}
	if err := e.check(n, c); err != nil {
		t.Error(err)
	}
	// Engines cannot delete a container without the network's file: it stays while there is one.
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		if err := e.l.StopAgent(t.Context(), "h1", sig); err != nil {
			t.Fatal(err)
		}
		e.published(true)
		if err := errors.Join(e.l.StartAgent(t.Context(), "h1"), e.l.WaitReady(t.Context(), "h1")); err != nil {
			t.Fatal(err)
		}
		e.published(true)
	}
	if err := e.l.StopAgent(t.Context(), "h1", syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}

	// An agent that has lost its state knows the container by its link.
	h, err := e.l.Host("h1")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.RemoveAll(filepath.Join(h.Dir, "state")), e.l.StartAgent(t.Context(), "h1"), e.l.WaitReady(t.Context(), "h1")); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(e.check(n, c), e.del(n, c)); err != nil {
		t.Errorf("after the state was lost: %v", err)
	}
	if left := e.pods(); len(left) > 0 {
		t.Errorf("after DEL: %+v", left)
	}
	// The file goes with the last container.
	if err := e.l.StopAgent(t.Context(), "h1", syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	e.published(false)
}

// TestCNIParallel: a hundred containers start at once, and end at once.
func TestCNIParallel(t *testing.T) {
	t.Parallel()
	e := newEngine(t, "cnipar", -1)
	n := e.network("1.0.0")
	var all []*libcni.RuntimeConf
	for range 100 {
		all = append(all, e.container())
	}
	each := func(what string, verb func(*libcni.RuntimeConf) error) {
		var wg sync.WaitGroup
		for _, c := range all {
			wg.Go(func() {
				if err := verb(c); err != nil {
					t.Errorf("%s %s: %v", what, c.ContainerID, err)
				}
			})
		}
		wg.Wait()
	}
	each("ADD", func(c *libcni.RuntimeConf) error { _, _, err := e.add(n, c); return err })
	seen := map[netip.Addr]string{}
	for id, p := range e.pods() {
		for _, a := range p.Addresses {
			if by := seen[a]; by != "" {
				t.Errorf("%v is given to %s and %s", a, by, id)
			}
			seen[a] = id
		}
	}
	if len(seen) != 200 {
		t.Errorf("%d addresses, want two for each of 100", len(seen))
	}
	each("CHECK", func(c *libcni.RuntimeConf) error { return e.check(n, c) })
	each("DEL", func(c *libcni.RuntimeConf) error { return e.del(n, c) })
	e.nothingLeft()
}

// nothingLeft wants no address, link, route or chain of a container on h1.
func (e *engine) nothingLeft() {
	t := e.t
	t.Helper()
	if left := e.pods(); len(left) > 0 {
		t.Errorf("%d pods are left: %+v", len(left), left)
	}
	err := e.l.Do("h1", func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			if l.Type() == "veth" && l.Attrs().Name != "eth0" {
				t.Errorf("left behind: %s", l.Attrs().Name)
			}
		}
		c, err := nftables.New()
		if err != nil {
			return err
		}
		chains, err := c.ListChainsOfTableFamily(nftables.TableFamilyNetdev)
		for _, ch := range chains {
			t.Errorf("left behind: chain %s", ch.Name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// deleteLink removes a device from the calling thread's network namespace.
func deleteLink(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkDel(l)
}
