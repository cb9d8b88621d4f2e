package doctor

import (
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/hostnet"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/membership/seed"
)

// snapshot is what the checks have seen. Each check's gathering half fills its own part; a part that has not been gathered is empty.
type snapshot struct {
	Options
	status   *api.Status // nil: no agent answers
	agentErr error       // why not
	alone    error       // another agent runs on this host
	state    diskState

	config   []Finding // what the agent would not find on this host as the configuration says
	tun      tunDevice
	caps     uint64 // of this process, capabilities(7)
	settings seen
	forward  seen
	overlap  seen
	tunnels  seen
	blocked  seen
	taken    []takenPort
	managers managers
	plugin   plugin
	networks []network
	kernel   kernel
	seeds    []seed.Seed
	leaks    *api.IPAMCheck
}

// seen is what one look at the host has found.
type seen struct {
	problems []hostnet.Problem
	err      error
}

// absent reports that no agent listens on the socket. An agent that does not answer may be there all the same.
func (s *snapshot) absent() bool {
	return errors.Is(s.agentErr, fs.ErrNotExist) || errors.Is(s.agentErr, unix.ECONNREFUSED)
}

// stuck reports that an agent has the socket and gives no answer.
func (s *snapshot) stuck() bool { return errors.Is(s.agentErr, context.DeadlineExceeded) }

// diskState is what the agent's state on disk says of this host.
type diskState struct {
	member bool             // of a cluster, which it has not left
	err    *ipam.StoreError // the agent does not start with it; nil if it does, or if that cannot be seen
}

// tunDevice is the driver's node and the device.
type tunDevice struct {
	node    error  // of opening /dev/net/tun
	kind    string // of the device with the TUN's name; "" if there is none
	foreign error  // the device is another program's
	index   int
	six     bool // it has IPv6 addresses
}

// others reports whether the device is there and none of Tulle's, an uplink perhaps.
func (t tunDevice) others() bool { return t.foreign != nil || t.kind != "" && t.kind != "tuntap" }

// takenPort is a port that the agent needs and something else has.
type takenPort struct {
	port   hostnet.Port
	holder string // process with its ID; "" if it is not known
}

// plugin is the CNI plugin in Options.CNIBinDir.
type plugin struct {
	path    string // "": no directory is configured
	version string
	err     error // why the version is not known
}

// managers is what the host's network managers say of Tulle's devices.
type managers struct {
	networkd   bool // systemd-networkd runs, and manages a device
	linkState  string
	routesKept bool     // ManageForeignRoutes=no
	rulesKept  bool     // ManageForeignRoutingPolicyRules=no
	unread     []string // files with these two that are newer than the running systemd-networkd
	nm         bool     // NetworkManager runs
	nmManaged  string   // "true" or "false" of the TUN device; "" if NetworkManager does not know it

	networkdOthers, nmOthers []string // other devices of Tulle that systemd-networkd and NetworkManager manage
}

// network is a network that something else on this host is configured for.
type network struct {
	file     string
	name     string
	cni      bool // a configuration in the CNI directory
	prefixes []netip.Prefix
}

// kernel is the state of the machine.
type kernel struct {
	release                 string // uname -r
	badChecksums            int    // UDP packets of this host with a wrong checksum
	conntrack, conntrackMax int    // -1: not loaded
	buffer                  int    // bytes of a receive buffer that this process gets, of the wanted ones
	rmemMax                 int
	bufferErr               error
	synced                  bool // the clock follows NTP
	ntpClient               bool // systemd knows one that it can start
	clockErr                error
	maxError                time.Duration
}

const agentPatience = 5 * time.Second

// askAgent asks for the status. What the agent says of itself replaces the options.
func (s *snapshot) askAgent(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, agentPatience)
	defer cancel()
	st, err := api.NewClient(s.Socket).Status(ctx)
	if err != nil {
		s.agentErr = err
		return
	}
	s.status = &st
	if st.Node.Tun.Name != "" {
		s.Tun = st.Node.Tun.Name
	}
	if len(st.Cluster.CIDRs) > 0 {
		s.ClusterCIDRs = st.Cluster.CIDRs
	}
	if st.Gossip.Bind.IsValid() {
		s.GossipPort = st.Gossip.Bind.Port()
	}
	if st.Node.UDPPort != 0 {
		s.UDPPort, s.VXLANPort = st.Node.UDPPort, st.Node.VXLANPort
	}
}

// families reports which address families the cluster's pods have: if the cluster is not known, those of the TUN device.
func (s *snapshot) families() (v4, v6 bool) {
	if len(s.ClusterCIDRs) == 0 {
		return true, s.tun.six
	}
	for _, c := range s.ClusterCIDRs {
		v4, v6 = v4 || c.Addr().Is4(), v6 || c.Addr().Is6()
	}
	return v4, v6
}

// own is the space of this node, in which its pods' routes and bridges may be.
func (s *snapshot) own() []netip.Prefix {
	if s.status == nil {
		return s.PodCIDRs
	}
	own := slices.Clone(s.status.Node.Prefixes)
	for _, a := range s.status.Node.Stranded { // the routes to these are its pods', too
		own = append(own, netip.PrefixFrom(a, a.BitLen()))
	}
	return own
}

// found turns what a look at the host has found into findings.
func (x seen) found(st State) []Finding {
	out := unread(x.err)
	for _, p := range x.problems {
		out = append(out, Finding{State: st, What: p.What, Remedy: p.Remedy, Command: p.Command})
	}
	return out
}

// told are the agent's problems that belong to a check.
func (s *snapshot) told(check string, st State) (out []Finding) {
	if s.status == nil {
		return nil
	}
	for _, p := range s.status.Problems {
		if p.Check == check {
			what := p.What
			if !p.Last.IsZero() {
				what += " (last seen at " + p.Last.Local().Format(time.TimeOnly) + ")"
			}
			out = append(out, Finding{State: st, What: what, Remedy: p.Remedy, Command: p.Command})
		}
	}
	return out
}
