package doctor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/hostnet"
)

const noAgent = "no agent answers, and only it knows"

// judgeTold makes a check of what the agent finds wrong by itself; evidence is for when it answers.
func judgeTold(name string, st State, evidence func(*api.Status) string) func(*snapshot) Result {
	return func(s *snapshot) Result {
		if s.status == nil {
			return skip(noAgent)
		}
		return result(evidence(s.status), s.told(name, st)...)
	}
}

func seenUnderlay(st *api.Status) string {
	return fmt.Sprintf("%s on %s, MTU %d: %s", join(st.Node.Underlay, ", "), st.Node.Interface, st.Node.LinkMTU, st.Node.UnderlayReason)
}

func seenGossip(st *api.Status) string {
	text := fmt.Sprintf("%d of %d members alive, health score %d (0 is best)", st.Cluster.Alive, st.Cluster.Members, st.Gossip.Health)
	if st.Cluster.Isolated {
		text += ", ISOLATED"
	}
	return text
}

func seenIdentity(st *api.Status) string { return fmt.Sprintf("%s, ID %s", st.Node.Name, st.Node.ID) }

func seenFastPath(st *api.Status) string {
	switch f := st.FastPath; {
	case !f.Wanted:
		return "not wanted"
	case !f.On:
		return "off: " + f.Reason
	}
	return fmt.Sprintf("on: %d packets out, %d in", st.Counters.FastTxPackets, st.Counters.FastRxPackets)
}

func seenCluster(st *api.Status) string {
	if st.Cluster.ID == "" {
		return "in no cluster yet"
	}
	return fmt.Sprintf("%s, %d hosts were refused", st.Cluster.ID, st.Gossip.Rejected)
}

// seenNeighbours reads the tables itself, as the agent tells only of full ones.
func seenNeighbours(*api.Status) string {
	var out []string
	for _, t := range hostnet.NeighbourTables() {
		out = append(out, fmt.Sprintf("%s %d entries of at most %d, beside permanent ones", t.Family, t.Entries, t.Limit))
	}
	return cmp.Or(strings.Join(out, ", "), "this network namespace does not see the kernel's tables")
}

func seenOwners(st *api.Status) string {
	owners := 0
	for _, p := range st.Peers {
		if len(p.Prefixes) > 0 {
			owners++
		}
	}
	return fmt.Sprintf("%d other owners", owners)
}

func seenState(st *api.Status) string {
	if slices.ContainsFunc(st.Problems, func(p api.Problem) bool { return p.Check == api.CheckState }) {
		return "the agent's last change was not saved"
	}
	return "the agent's last change was saved"
}

// silentPeer reports whether some living peer does not answer by the encapsulation in use.
func (s *snapshot) silentPeer() bool {
	if s.status == nil {
		return false
	}
	for _, p := range s.status.Peers {
		if p.State == api.PeerDead || p.State == api.PeerAlive && p.Path.State == api.PathDown {
			return true
		}
	}
	return false
}

// label names a peer, with its ID if others have the same name.
func (s *snapshot) label(p api.Peer) string {
	if slices.ContainsFunc(s.status.Peers, func(o api.Peer) bool { return o.Name == p.Name && o.ID != p.ID }) {
		return fmt.Sprintf("%s (%.8s)", p.Name, p.ID)
	}
	return p.Name
}

// lossy is the loss of a path in use that is worth a warning, as in the alert TullePathLossy.
const lossy = 0.05

// judgePaths names what is blocked, and what loses packets. Of each path the reason says in which direction packets are lost, as far as this side knows
// it: the peer's probes that arrive here tell.
func judgePaths(s *snapshot) Result {
	if s.status == nil {
		return skip(noAgent)
	}
	out := s.told(api.CheckPaths, Failed)
	var down, text []string
	for _, p := range s.status.Peers {
		if p.State == api.PeerExternal || p.State == api.PeerLeft {
			continue
		}
		for _, way := range p.InUse() {
			seen := fmt.Sprintf("%s by %s %s", s.label(p), labelled(way), way.State)
			if way.State == api.PathUp {
				text = append(text, seen)
			} else {
				down = append(down, seen)
			}
			if way.State == api.PathUp && way.Loss > lossy {
				out = append(out, Finding{State: Warning, What: fmt.Sprintf("%.0f %% of the probes to %s by %s were lost in the last two minutes", 100*way.Loss, s.label(p), labelled(way)),
					Remedy: fmt.Sprintf("the network between the two hosts loses packets, or one of them is overloaded: `tulle ping %s` compares the ways", s.label(p))})
			}
		}
		for i, c := range p.Candidates {
			if c.State == api.PathDown && !c.Active && insteadOf(c, p.Candidates[i+1:]) {
				out = append(out, Finding{State: Warning, What: fmt.Sprintf("%s is preferred toward %s, and blocked: %s", labelled(c.Path), s.label(p), c.Reason),
					Remedy: fmt.Sprintf("let %s pass between %s and %s, or leave %s out of `paths`; run `tulle doctor ports` on both hosts", outer(c, s.status.FastPath.On), join(s.status.Node.Underlay, ", "), join(p.Underlay, ", "), c.Mode)})
			}
		}
	}
	if text = append(down, text...); text == nil {
		return skip("no peers")
	}
	for i, f := range out {
		if f.State == Failed {
			out[i].Remedy += "; run `tulle doctor ports` on both hosts"
		}
	}
	return result(some(text), out...)
}

// some joins the first of many texts: a line for people has no room for a thousand peers.
func some(texts []string) string {
	const most = 12
	if len(texts) <= most {
		return strings.Join(texts, ", ")
	}
	return fmt.Sprintf("%s, and %d more", strings.Join(texts[:most], ", "), len(texts)-most)
}

// labelled names a way, with its family if it carries one only.
func labelled(way api.Path) string {
	switch way.Family {
	case "ipv4":
		return way.Mode + " (IPv4)"
	case "ipv6":
		return way.Mode + " (IPv6)"
	}
	return way.Mode
}

// insteadOf reports that packets take one of the ways that are less preferred than c, by which those could go that c carries.
func insteadOf(c api.Candidate, less []api.Candidate) bool {
	return slices.ContainsFunc(less, func(l api.Candidate) bool {
		return l.Active && l.State == api.PathUp && (l.Family == "" || l.Family == c.Family)
	})
}

// outer names what a firewall sees. With the fast path, udp packets have no UDP checksum.
func outer(c api.Candidate, fast bool) string {
	if c.Mode == "direct" {
		return "packets with addresses of pods"
	}
	if c.Endpoint.Port() == 0 {
		return "IP protocols 4 and 41"
	}
	text := fmt.Sprintf("UDP port %d", c.Endpoint.Port())
	if fast && c.Mode == "udp" {
		text += " (with fast_path also without UDP checksum)"
	}
	return text
}

// judgeMTU compares what probes have proven with what this host's links carry.
func judgeMTU(s *snapshot) Result {
	if s.status == nil {
		return skip(noAgent)
	}
	n := s.status.Node
	out := s.told(api.CheckMTU, Failed)
	var text []string
	for _, p := range s.status.Peers {
		a := p.Path
		if a.State != api.PathUp || a.MTULimit == 0 {
			continue
		}
		text = append(text, fmt.Sprintf("%s %d of %d", s.label(p), a.MTU, a.MTULimit))
		less := a.MTULimit - a.MTU
		if less <= 0 {
			continue
		}
		out = append(out, Finding{State: Warning,
			What:   fmt.Sprintf("the path to %s carries %d bytes less than this host's links: inner packets of %d, where %s (MTU %d) would carry %d by %s", s.label(p), less, a.MTU, strings.Join(n.Links, ", "), n.LinkMTU, a.MTULimit, a.Mode),
			Remedy: "raise the MTU of the link on the way; if it stays, set this host's link or `mtu` to it, so that new pods begin with the size that passes"})
	}
	if text == nil && out == nil {
		return skip("no path is up")
	}
	return result("inner packets: "+some(text), out...)
}

func judgeTrains(s *snapshot) Result {
	text := "kernel " + s.kernel.release
	var out []Finding
	if breaksTrains(s.kernel.release) {
		out = append(out, Finding{State: Warning, What: fmt.Sprintf("kernel %s is one of those (7.0 to 7.1.4) that cut UDP_SEGMENT trains wrongly with some network cards", s.kernel.release),
			Remedy: "update it; until then the agent sends single packets to each peer that trains do not reach, which costs CPU time and loses nothing"})
	}
	if s.status == nil {
		return result(text+"; "+noAgent+" whether trains arrive", out...)
	}
	o := s.status.Offload
	text += fmt.Sprintf(", UDP_SEGMENT %v, TSO %v, USO %v, %d trains refused by the kernel", o.UDPGSO, o.TunTSO, o.TunUSO, s.status.Counters.GSOFallbacks)
	if o.Reason != "" {
		text += ": " + o.Reason
	}
	return result(text, append(s.told(api.CheckTrains, Warning), out...)...) // nothing is lost
}

func judgeSpace(s *snapshot) Result {
	if s.status == nil {
		return skip(noAgent)
	}
	st := s.status
	out := s.told(api.CheckSpace, Failed)
	text := fmt.Sprintf("%s of %s; %d entries, digest %.8s", join(st.Node.Prefixes, " "), join(st.Cluster.CIDRs, " "), st.Cluster.Table.Entries, st.Cluster.Table.Digest)
	return result(text, out...)
}

func gatherAddresses(ctx context.Context, s *snapshot) {
	if s.leaks = nil; s.status == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, agentPatience)
	defer cancel()
	if c, err := api.NewClient(s.Socket).IPAMCheck(ctx); err == nil {
		s.leaks = &c
	}
}

func judgeAddresses(s *snapshot) Result {
	switch {
	case s.status == nil:
		return skip(noAgent)
	case s.leaks == nil:
		return skip("the agent is in no cluster yet")
	}
	var out []Finding
	for _, l := range s.leaks.Leaked {
		out = append(out, Finding{State: Warning, What: fmt.Sprintf("%v is allocated to %s, which is gone: %s", l.Address, l.ID, l.Reason),
			Remedy: "release it", Command: fmt.Sprintf("tulle ipam release %v --socket %s", l.Address, s.Socket)})
	}
	for _, l := range s.leaks.Stranded {
		out = append(out, Finding{State: Warning, What: fmt.Sprintf("%v of %s: %s", l.Address, l.ID, l.Reason), Remedy: "restart that pod: it gets an address of this node's present space"})
	}
	for _, u := range s.leaks.Unknown {
		out = append(out, Finding{State: Warning, What: fmt.Sprintf("%v is in use at %s, and was never allocated", u.Address, u.Where), Remedy: "give that pod another address, or remove it"})
	}
	return result(fmt.Sprintf("%d allocations", s.leaks.Checked), out...)
}

// gatherVersions asks the plugin for its version, as a person would: it has no agent's socket, and is told no command.
func gatherVersions(ctx context.Context, s *snapshot) {
	s.plugin = plugin{}
	if s.CNIBinDir == "" {
		return
	}
	p := plugin{path: filepath.Join(s.CNIBinDir, "tulle-cni")}
	ctx, cancel := context.WithTimeout(ctx, agentPatience)
	defer cancel()
	cmd := exec.CommandContext(ctx, p.path)
	cmd.Env = []string{} // no CNI_COMMAND
	out, err := cmd.CombinedOutput()
	first, _, _ := strings.Cut(string(out), "\n")
	version, ok := strings.CutPrefix(first, "tulle-cni ")
	if p.version, p.err = version, err; err == nil && !ok {
		p.version, p.err = "", fmt.Errorf("it says %q", first)
	}
	s.plugin = p
}

// judge compares the plugin with this program. Each upgrade brings both, but a copy in the engine's directory stays.
func (p plugin) judge() (out []Finding) {
	const remedy = "put the plugin of this version there (the package has it in /usr/lib/cni), or correct cni_bin_dir"
	switch {
	case p.path == "", errors.Is(p.err, fs.ErrNotExist): // of one that is missing the agent tells
	case p.err != nil:
		out = append(out, Finding{State: Warning, What: fmt.Sprintf("%s does not say its version: %v", p.path, p.err), Remedy: remedy})
	case p.version != api.Version():
		out = append(out, Finding{State: Warning, What: fmt.Sprintf("%s is of version %s, and this program of %s", p.path, p.version, api.Version()), Remedy: remedy})
	}
	return out
}

func judgeVersions(s *snapshot) Result {
	out := s.plugin.judge()
	if s.status == nil && len(out) == 0 {
		return skip(noAgent)
	} else if s.status == nil {
		return result("this program "+api.Version(), out...)
	}
	text := []string{"agent " + s.status.Version}
	if own := api.Version(); own != s.status.Version {
		text = append(text, "this program "+own)
		out = append(out, Finding{State: Warning, What: fmt.Sprintf("the agent runs version %s, and the program on disk is %s", s.status.Version, own),
			Remedy: "restart the agent", Command: "systemctl restart tulle"})
	}
	for _, p := range s.status.Peers {
		if p.Version == "" {
			continue
		}
		// A long version is announced in part.
		if text = append(text, s.label(p)+" "+p.Version); !strings.HasPrefix(s.status.Version, p.Version) && p.State == api.PeerAlive {
			out = append(out, Finding{State: Warning, What: fmt.Sprintf("%s runs version %s, this node %s", s.label(p), p.Version, s.status.Version),
				Remedy: "upgrade the older one"})
		}
	}
	return result(some(text), append(s.told(api.CheckVersions, Failed), out...)...)
}
