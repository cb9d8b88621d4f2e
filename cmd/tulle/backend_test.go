package main

import (
	"cmp"
	"context"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/internal/api"
)

// fixture answers like an agent of a small cluster at rest. All ages are whole hours or days, so that their texts hold
// while a test runs.
type fixture struct {
	born  time.Time
	sick  bool // one peer is dead, one falls back to ipip, addresses are leaked, a key is missing
	young bool // has no cluster yet
}

func (f *fixture) ago(h int) time.Time { return f.born.Add(-time.Duration(h)*time.Hour - time.Second) }

func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }
func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

var (
	nodeA = api.NodeRef{Name: "node-a", ID: "a7f3c09e55d1482bb1c9e0d37a64f210"}
	nodeB = api.NodeRef{Name: "node-b", ID: "b0914e6627aa4c35be7f81d6e5c3a972"}
	nodeC = api.NodeRef{Name: "node-c", ID: "c2d85b1f90e34d6d8a40f7b91e2c6d03"}
)

func (f *fixture) block() api.Block {
	return api.Block{Prefix: prefix("10.244.0.0/24"), Used: 3, Cooling: 1, Size: 255}
}

func (f *fixture) peers() []api.Peer {
	path := func(mode, state string, us int64, mtu int, why string) api.Path {
		return api.Path{Mode: mode, State: state, RTTUS: us, MTU: mtu, Since: f.ago(3), Reason: why}
	}
	udp := path("udp", api.PathUp, 184, 1472, "probes answered")
	ipip := path("ipip", api.PathUp, 171, 1480, "probes answered")
	b := api.Peer{Name: nodeB.Name, ID: nodeB.ID, State: api.PeerAlive, Since: f.ago(27), Reason: "gossip", Version: "v0.1.0",
		Underlay: []netip.Addr{addr("192.168.1.12"), addr("fd00:1::12")}, Prefixes: []netip.Prefix{prefix("10.244.128.0/18"), prefix("fd00:10:244:8000::/50")},
		Path: udp, Candidates: []api.Candidate{{Path: udp, Active: true, Endpoint: netip.MustParseAddrPort("192.168.1.12:6080")},
			{Path: ipip, Endpoint: netip.MustParseAddrPort("192.168.1.12:0")}}}
	c := b
	c.Name, c.ID = nodeC.Name, nodeC.ID
	c.Underlay, c.Prefixes = []netip.Addr{addr("192.168.2.13")}, []netip.Prefix{prefix("10.244.192.0/18")}
	c.Path.RTTUS, c.Leaves = 12_345, []string{"eth1"}
	c.Candidates = []api.Candidate{{Path: c.Path, Active: true, Endpoint: netip.MustParseAddrPort("192.168.2.13:6080")}}
	if f.sick {
		b.Path = ipip
		b.Path.Loss, b.Path.Reason = 0.07, "udp: no answer to 5 probes from 192.168.1.12, UDP port 6080 seems blocked"
		b.Candidates = []api.Candidate{{Path: path("udp", api.PathDown, 0, 0, "no answer to 5 probes"), Endpoint: b.Candidates[0].Endpoint},
			{Path: b.Path, Active: true, Endpoint: b.Candidates[1].Endpoint}}
		c.Leaves = nil
		c.State, c.Since, c.Reason = api.PeerDead, f.ago(2), "gossip and data path agree that it is gone"
		c.Path = path("udp", api.PathDown, 0, 0, "no answer to 5 probes")
	}
	return []api.Peer{b, c}
}

func (f *fixture) Status(context.Context) (api.Status, error) {
	s := api.Status{Version: "v0.1.0", Ready: true, Started: f.ago(28), Node: api.Node{Name: nodeA.Name, ID: nodeA.ID,
		Underlay: []netip.Addr{addr("192.168.1.11"), addr("fd00:1::11")}, Links: []string{"eth0"}, LinkMTU: 1500,
		Tun: api.Tun{Name: "tun0", MTU: 1472, Addresses: []netip.Addr{addr("10.244.0.0"), addr("fd00:10:244::")}}},
		Drops: map[string]uint64{"not_member": 0, "malformed": 0}}
	if f.young {
		s.Ready = false
		s.Problems = []api.Problem{{What: "none of the seeds answers: node-b:7946 (connection refused)", Remedy: "start the agent on node-b, or start a new cluster here with --bootstrap"}}
		return s, nil
	}
	s.Node.Prefixes = []netip.Prefix{prefix("10.244.0.0/17"), prefix("fd00:10:244::/49")}
	s.Node.Blocks = []api.Block{f.block(), {Prefix: prefix("fd00:10:244::/64"), Used: 3, Size: api.MaxCount}}
	s.Cluster = api.Cluster{ID: "9c0de7a1b2c3d4e5f60718293a4b5c6d", CIDRs: []netip.Prefix{prefix("10.244.0.0/16"), prefix("fd00:10:244::/48")}, Members: 3, Alive: 3,
		Table: api.Table{Entries: 6, Digest: "4c1e7a90d2b3", Confirmed: true}}
	s.Gossip = api.Gossip{Bind: netip.MustParseAddrPort("192.168.1.11:7946"),
		Listens: []netip.AddrPort{netip.MustParseAddrPort("192.168.1.11:7946"), netip.MustParseAddrPort("[fd00:1::11]:7946")}, Encrypted: true, Keys: 2, LastSync: f.ago(1)}
	s.Counters = api.Counters{TxPackets: 1_234_567, TxBytes: 1_718_000_000, TxSends: 40_123, RxPackets: 990, RxBytes: 64_000, RxReceives: 900}
	s.Offload = api.Offload{TunCSUM: true, TunTSO: true, TunUSO: true, UDPGSO: true, UDPGRO: true}
	s.Peers = f.peers()
	if f.sick {
		s.Cluster.Alive = 2
		s.Offload.TunUSO, s.Offload.Reason = false, "this kernel is older than 6.2"
		s.Drops = map[string]uint64{"not_member": 12, "malformed": 0, "peer_down": 40_321, "send_error": 18}
		s.LastSendError = "operation not permitted"
		s.Counters.GSOFallbacks, s.Counters.TunFallbacks = 7, 2
		s.Problems = []api.Problem{
			{What: "node-c is dead: 10.244.192.0/18 cannot be reached", Remedy: "start it again; if it will never come back: tulle forget node-c", Since: f.ago(2)},
			{What: "UDP port 6080 is blocked between 192.168.1.11 and 192.168.1.12 and the slower ipip is used instead", Remedy: "let UDP port 6080 pass in both directions"},
		}
	}
	return s, nil
}

func (f *fixture) Peers(context.Context) ([]api.Peer, error) {
	if f.young {
		return nil, nil
	}
	return f.peers(), nil
}

func (f *fixture) Route(_ context.Context, a netip.Addr) (api.RouteAnswer, error) {
	r := api.RouteAnswer{Address: a, Kind: api.RouteOutside, Why: "no cluster prefix holds it: the host's routing decides"}
	for _, p := range f.peers() {
		for _, x := range p.Prefixes {
			if x.Contains(a) {
				return api.RouteAnswer{Address: a, Kind: api.RouteRemote, Prefix: x, Version: 4, Owner: api.NodeRef{Name: p.Name, ID: p.ID},
					Reachable: p.Path.State == api.PathUp, Endpoint: p.Candidates[0].Endpoint, Encapsulation: p.Path.Mode, MTU: p.Path.MTU, Why: p.Path.Reason}, nil
			}
		}
	}
	return r, nil
}

func (f *fixture) Ping(_ context.Context, r api.PingRequest) (api.PingResult, error) {
	i := slices.IndexFunc(f.peers(), func(p api.Peer) bool { return p.Name == r.Node || strings.HasPrefix(p.ID, r.Node) })
	if i < 0 {
		return api.PingResult{}, api.Errorf(api.CodeNotFound, "no node %q", r.Node).WithRemedy("`tulle peers` lists them")
	}
	p := f.peers()[i]
	out := api.PingResult{Node: api.NodeRef{Name: p.Name, ID: p.ID}}
	for _, c := range p.Candidates {
		m := api.PingMode{Mode: c.Mode, State: c.State, Active: c.Active, Endpoint: c.Endpoint, Sent: r.Count, Received: r.Count,
			RTTMinUS: c.RTTUS - 20, RTTUS: c.RTTUS, RTTMaxUS: c.RTTUS + 100, LargestPacket: c.MTU}
		if p.State == api.PeerDead {
			m = api.PingMode{Mode: c.Mode, State: api.PathDown, Endpoint: c.Endpoint, Sent: r.Count, Lost: r.Count, Reason: "no answer within 1s"}
		}
		out.Modes = append(out.Modes, m)
	}
	out.Modes = append(out.Modes, api.PingMode{Mode: "vxlan", State: api.PathOff, Reason: "left out of --paths"})
	return out, nil
}

func (f *fixture) IPAM(context.Context) (api.IPAM, error) {
	return api.IPAM{Prefixes: []netip.Prefix{prefix("10.244.0.0/17")}, Blocks: []api.Block{f.block()}, Allocations: []api.PodAllocation{
		{ID: "5f0c…/eth0", Name: "web-1", Addresses: []netip.Addr{addr("10.244.0.1"), addr("fd00:10:244::1")}, State: api.AllocationUsed, Since: f.ago(5)},
		{ID: "77aa…/eth0", Addresses: []netip.Addr{addr("10.244.0.2")}, State: api.AllocationCooling, Since: f.ago(1), Until: f.born.Add(2*time.Hour + 30*time.Second)},
	}}, nil
}

func (f *fixture) IPAMCheck(context.Context) (api.IPAMCheck, error) {
	if !f.sick {
		return api.IPAMCheck{Checked: 3}, nil
	}
	return api.IPAMCheck{Checked: 3,
		Leaked:   []api.LeakedAddr{{Address: addr("10.244.0.3"), ID: "dead/eth0", Since: f.ago(50), Reason: "its namespace /run/netns/dead is gone"}},
		Unknown:  []api.UnknownAddr{{Address: addr("10.244.0.77"), Where: "veth12 in /run/netns/rogue"}},
		Stranded: []api.LeakedAddr{{Address: addr("10.244.9.5"), ID: "cut-off/eth0", Since: f.ago(70), Reason: "another node owns it now"}}}, nil
}

func (f *fixture) IPAMRelease(_ context.Context, r api.ReleaseRequest) (out api.ReleaseResult, err error) {
	leaked := addr("10.244.0.3")
	if r.All && f.sick {
		out.Released = []netip.Addr{leaked}
	}
	for _, a := range r.Addresses {
		if f.sick && a == leaked {
			out.Released = append(out.Released, a)
		} else {
			out.Refused = append(out.Refused, api.RefusedAddr{Address: a, Why: "pod web-1 has it"})
		}
	}
	return out, nil
}

func (f *fixture) Allocate(_ context.Context, r api.AllocateRequest) (api.Allocation, error) {
	return api.Allocation{ID: r.ID, Addresses: []api.AllocatedAddress{{Address: addr("10.244.0.4"), Block: f.block().Prefix}}}, nil
}

func (f *fixture) Free(context.Context, api.FreeRequest) (api.FreeResult, error) {
	return api.FreeResult{}, nil
}

func (f *fixture) Pods(context.Context) ([]api.Pod, error) {
	if f.young {
		return nil, nil
	}
	pod := func(engine, network, container, name, state string, dropped uint64, a ...netip.Addr) api.Pod {
		id := api.PodID{Engine: engine, Network: network, Container: container, Interface: "eth0"}
		return api.Pod{ID: id.String(), PodID: id, Name: name, Addresses: a, State: state, Since: f.ago(5), HostInterface: "tp0123456789ab", MTU: 1472, Dropped: dropped}
	}
	return []api.Pod{
		pod(api.EngineCNI, "tulle", "4f1d5e0c9a7b23d8e6f1", "default/web-1", api.PodUp, 12, addr("10.244.0.1"), addr("fd00:10:244::1")),
		pod(api.EngineTulle, "tulle", "db", "db", api.PodUp, 0, addr("10.244.0.2")),
	}, nil
}

func (f *fixture) PodsOf(context.Context, string) ([]api.Pod, error) { return nil, nil }

func (f *fixture) Leave(context.Context) (api.LeaveResult, error) {
	if f.sick {
		return api.LeaveResult{}, api.Errorf(api.CodeUnhealthy, "no live peer can take 10.244.0.0/17").WithRemedy("see `tulle peers`")
	}
	return api.LeaveResult{Transfers: []api.Transfer{{Prefix: prefix("10.244.0.0/17"), From: nodeA, To: nodeB}}}, nil
}

func (f *fixture) Forget(_ context.Context, r api.ForgetRequest) (api.ForgetResult, error) {
	if !f.sick {
		return api.ForgetResult{}, api.Errorf(api.CodeRefused, "%s is alive", r.Node).WithRemedy("stop it first")
	}
	if !r.Force {
		return api.ForgetResult{}, api.Errorf(api.CodeRefused, "this node sees 1 of 3 members").WithRemedy("give --force if the others are dead too")
	}
	if r.Node == "node-b" { // owns nothing
		return api.ForgetResult{Node: nodeB}, nil
	}
	return api.ForgetResult{Node: nodeC, Transfers: []api.Transfer{{Prefix: prefix("10.244.192.0/18"), From: nodeC, To: nodeA}}}, nil
}

func (f *fixture) Externals(context.Context) ([]api.External, error) {
	if f.young {
		return nil, nil
	}
	return []api.External{{Prefix: prefix("10.244.127.0/24"), Endpoint: addr("192.0.2.9"), Encapsulation: "ipip", Owner: nodeA, Version: 9}}, nil
}

func (f *fixture) ExternalAdd(_ context.Context, r api.ExternalRequest) (api.External, error) {
	return api.External{Prefix: r.Prefix, Endpoint: r.Endpoint, Encapsulation: r.Encapsulation, Owner: nodeA}, nil
}

func (f *fixture) ExternalRemove(_ context.Context, p netip.Prefix) (api.External, error) {
	all, _ := f.Externals(context.Background())
	for _, e := range all {
		if e.Prefix == p {
			return e, nil
		}
	}
	return api.External{}, api.Errorf(api.CodeNotFound, "no external peer has %s", p).WithRemedy("`tulle external list` shows them")
}

func (f *fixture) Keys(context.Context) (api.KeyList, error) {
	l := api.KeyList{Encrypted: true, Members: 3, Answered: 3, Keys: []api.Key{{ID: "5b1f22aa", Primary: true, Members: 3}, {ID: "c09e7d13", Members: 3}}}
	if f.sick {
		l.Answered, l.Silent = 2, []api.NodeRef{nodeC}
		l.Keys[1].Members, l.Keys[1].Missing = 1, []string{"node-b"}
	}
	if f.young {
		return api.KeyList{}, nil
	}
	return l, nil
}

func (f *fixture) key(id string) (api.KeyResult, error) {
	if f.sick {
		return api.KeyResult{ID: id, Members: 3, Done: 2, Failed: []api.KeyFailure{{Node: nodeC, Why: "no answer within 10s"}}}, nil
	}
	return api.KeyResult{ID: id, Members: 3, Done: 3}, nil
}

func (f *fixture) KeyInstall(_ context.Context, r api.KeyRequest) (api.KeyResult, error) {
	return f.key(strings.ToLower(string(r.Key[:8])))
}
func (f *fixture) KeyUse(_ context.Context, r api.KeyRequest) (api.KeyResult, error) {
	return f.key(r.ID)
}
func (f *fixture) KeyRemove(_ context.Context, r api.KeyRequest) (api.KeyResult, error) {
	return f.key(r.ID)
}

func (f *fixture) Reload(context.Context) (api.ReloadResult, error) {
	if f.young {
		return api.ReloadResult{}, nil
	}
	return api.ReloadResult{Changed: []api.ConfigChange{{Key: "log_level", Old: "info", New: "debug"}},
		NeedsRestart: []api.ConfigChange{{Key: "udp_port", Old: "6080", New: "6081"}, {Key: "tun", Old: "tun0", New: "tulle0"}, {Key: "state_dir", Old: "/a", New: "/b"}, {Key: "node_prefix_len", Old: "24", New: "26"}}}, nil
}

func (f *fixture) LogLevel(_ context.Context, r api.LogLevelRequest) (api.LogLevel, error) {
	return api.LogLevel{Old: "info", New: cmp.Or(r.Level, "info")}, nil
}

// echoRequest is an echo request from 10.244.1.2 to 10.244.7.3.
var echoRequest = []byte{
	0x45, 0, 0, 28, 0, 0, 0x40, 0, 64, 1, 0, 0, 10, 244, 1, 2, 10, 244, 7, 3,
	8, 0, 0, 0, 0, 7, 0, 1,
}

func (f *fixture) Trace(context.Context, api.TraceRequest) (api.Trace, error) {
	return api.Trace{}, nil
}

func (f *fixture) Bench(context.Context, api.BenchRequest, func(api.BenchEvent) error) error {
	return api.Errorf(api.CodeRefused, "node-b: it allows no benchmarks (bench_mbps is 0)").WithRemedy("set bench_mbps there and reload")
}

func (f *fixture) Capture(ctx context.Context, _ api.CaptureRequest, each func(api.CaptureEvent) error) error {
	for _, e := range []api.CaptureEvent{
		{Time: f.born},
		{Time: f.born, Point: "from-pods", Reason: "peer_down", Peer: nodeB, Path: "udp", Length: 28, Data: echoRequest},
		{Time: f.born, Missed: 3},
	} {
		if err := each(e); err != nil {
			return err
		}
	}
	<-ctx.Done()
	return nil
}
