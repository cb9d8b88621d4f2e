package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"time"
)

// DefaultName is the lab of `tulle lab` unless --name names another.
const DefaultName = "tulle"

// Families are the IP families of a network.
type Families struct {
	V4 bool `json:"v4"`
	V6 bool `json:"v6"`
}

// The three valid values of Families.
var (
	IPv4Only  = Families{V4: true}
	IPv6Only  = Families{V6: true}
	DualStack = Families{V4: true, V6: true}
)

// Options describe a lab. The zero value of each field means its default.
type Options struct {
	// Name is the prefix of everything that the lab creates. At most 20 characters a-z, 0-9 and "-". Default: DefaultName.
	Name string `json:"name"`
	// Nodes is the number of hosts, spread round-robin over the subnets. Default 3.
	Nodes int `json:"nodes"`
	// Subnets is the number of underlay subnets, each a switch and an interface of the router. Default 2.
	Subnets int `json:"subnets"`
	// Pods is the number of pods on each host. Default 1; negative for none.
	Pods int `json:"pods"`
	// Underlay are the families between the hosts. Default: both; agents then use the one that they prefer.
	Underlay Families `json:"underlay"`
	// Overlay are the families of the pods. Default: both.
	Overlay Families `json:"overlay"`
	// ClusterCIDRs default to 10.244.0.0/16 and fd00:10:244::/48, for the families in Overlay.
	ClusterCIDRs []netip.Prefix `json:"cluster_cidrs"`
	// MTU of the underlay's links in bytes. Default 1500.
	MTU int `json:"mtu"`
	// Wire is what these links carry. Default WireCut.
	Wire Wire `json:"wire"`
	// Straight wires each host to the router itself, without a switch: the least that a packet can cross, for measuring. There
	// is one host in each subnet then, and it stays; Split has no place to act.
	Straight bool `json:"straight"`
	// Paths is the agents' --paths. Default: the agent's own.
	Paths string `json:"paths"`
	// ExtraAgentArgs are appended to the arguments of every agent.
	ExtraAgentArgs []string `json:"extra_agent_args"`
	// Binary is the tulle program. Default: the running one.
	Binary string `json:"binary"`
	// Bare builds the network without agents: pods get static addresses, and no host has a route to pods of other hosts
	// until DirectRoutes or KernelVXLAN is called.
	Bare bool `json:"bare"`
	// Replace lets Up remove a complete lab with the same name if the process that created it is gone.
	Replace bool `json:"replace"`
	// KeepFailed keeps what was created if Up fails, for inspection.
	KeepFailed bool `json:"keep_failed"`
	// Timeout limits the wait until agents are ready and all pods reach each other. Default 60 s.
	Timeout time.Duration `json:"timeout"`
}

var nameRule = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?$`)

const (
	maxNodes   = 240 // host parts of an underlay /24 from 11
	maxSubnets = 240
	maxPods    = 250 // of one host
)

// Validate returns an error if an option is invalid, as Up does.
func (o Options) Validate() error {
	_, err := o.withDefaults()
	return err
}

// withDefaults fills in defaults and validates the options.
func (o Options) withDefaults() (Options, error) {
	o.Name = cmpOr(o.Name, DefaultName)
	o.Nodes = cmpOr(o.Nodes, 3)
	o.Subnets = cmpOr(o.Subnets, min(2, max(o.Nodes, 1)))
	o.Pods = max(cmpOr(o.Pods, 1), 0)
	o.MTU = cmpOr(o.MTU, 1500)
	o.Wire = cmpOr(o.Wire, WireCut)
	o.Timeout = cmpOr(o.Timeout, 60*time.Second)
	o.Underlay = cmpOr(o.Underlay, DualStack)
	o.Overlay = cmpOr(o.Overlay, DualStack)
	if len(o.ClusterCIDRs) == 0 {
		if o.Overlay.V4 {
			o.ClusterCIDRs = append(o.ClusterCIDRs, netip.MustParsePrefix("10.244.0.0/16"))
		}
		if o.Overlay.V6 {
			o.ClusterCIDRs = append(o.ClusterCIDRs, netip.MustParsePrefix("fd00:10:244::/48"))
		}
	}
	return o, o.validate()
}

func (o *Options) validate() error {
	switch {
	case !nameRule.MatchString(o.Name):
		return fmt.Errorf("lab name %q: use 1 to 20 of a-z, 0-9 and \"-\", not beginning or ending with \"-\"", o.Name)
	case o.Nodes < 1 || o.Nodes > maxNodes:
		return fmt.Errorf("%d nodes: a lab has 1 to %d", o.Nodes, maxNodes)
	case o.Subnets < 1 || o.Subnets > maxSubnets:
		return fmt.Errorf("%d subnets: a lab has 1 to %d", o.Subnets, maxSubnets)
	case o.Pods > maxPods:
		return fmt.Errorf("%d pods on a host: at most %d", o.Pods, maxPods)
	case o.Straight && o.Nodes != o.Subnets:
		return fmt.Errorf("%d nodes in %d subnets: without switches there is one in each", o.Nodes, o.Subnets)
	case o.MTU < 1280 || o.MTU > 65535:
		return fmt.Errorf("MTU %d: an underlay link has 1280 to 65535 bytes", o.MTU)
	}
	if err := o.Wire.validate(); err != nil {
		return err
	}
	for _, f := range []struct {
		has bool
		is  func(netip.Prefix) bool
		as  string
	}{
		{o.Overlay.V4, func(p netip.Prefix) bool { return p.Addr().Is4() }, "IPv4"},
		{o.Overlay.V6, func(p netip.Prefix) bool { return p.Addr().Is6() }, "IPv6"},
	} {
		if f.has != slices.ContainsFunc(o.ClusterCIDRs, f.is) {
			return fmt.Errorf("cluster CIDRs %v do not fit the overlay families: %s is in one and not in the other", o.ClusterCIDRs, f.as)
		}
	}
	for _, p := range o.ClusterCIDRs {
		if p != p.Masked() {
			return fmt.Errorf("cluster CIDR %v has host bits set: use %v", p, p.Masked())
		}
		for _, u := range []netip.Prefix{underlay4All, underlay6All} {
			if p.Overlaps(u) {
				return fmt.Errorf("cluster CIDR %v overlaps %v, which the lab's hosts use: choose another", p, u)
			}
		}
	}
	return nil
}

// cmpOr is cmp.Or for a value and its default.
func cmpOr[T comparable](v, def T) T {
	var zero T
	if v == zero {
		return def
	}
	return v
}

var errNoAgent = errors.New("the lab was made without agents")
