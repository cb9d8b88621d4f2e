package config

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
)

// forceWord is the value of --bootstrap that does not wait for silent seeds. It is for the command line only: in a file it
// would start a second cluster the day that the node loses its disk.
const forceWord = "force"

// setBootstrap reads a switch (from the flag) or the name of the node that starts the cluster (from the file).
func (c *Config) setBootstrap(texts []string, byFlag bool) error {
	if len(texts) == 0 {
		return nil
	}
	s := texts[len(texts)-1]
	if byFlag {
		if s == forceWord {
			c.Bootstrap, c.ForceBootstrap = true, true
			return nil
		}
		on, err := parseBool(s)
		c.Bootstrap = on
		if err != nil {
			return fmt.Errorf("%w, or %s", err, forceWord)
		}
		return nil
	}
	if s == forceWord {
		return fmt.Errorf("%s: in the file it names the node that starts the cluster; to force a start, give that node the flag --bootstrap=%[1]s once", s)
	}
	if _, err := parseBool(s); err == nil {
		return fmt.Errorf("%s: in the file it names the node that starts the cluster, so that all hosts can share the file; write bootstrap: %s, or use the flag --bootstrap", s, c.NodeName)
	}
	name, err := parseNodeName(s)
	c.Bootstrap, c.Bootstrapper = c.namesThis(name), name
	return err
}

// validate checks what needs more than one key, and finishes Join.
func (c *Config) validate(at origins) error {
	for _, check := range []func() (key string, err error){
		c.finishJoin, c.checkPorts, c.checkBlocks, c.checkPodCIDRs, c.checkOverlap, c.checkMTU, c.checkDirs,
	} {
		if key, err := check(); err != nil {
			return at.wrap(key, err)
		}
	}
	return nil
}

func (c *Config) finishJoin() (string, error) {
	var out []string
	for _, s := range c.Join {
		hp, err := parseJoin(s, c.GossipPort)
		if err != nil {
			return "join", err
		}
		if slices.Contains(out, hp) {
			return "join", fmt.Errorf("%q: %s is named twice; delete one of them", s, hp)
		}
		out = append(out, hp)
	}
	c.Join = out
	return "", nil
}

func (c *Config) checkPorts() (string, error) {
	ports := []struct {
		key  string
		port uint16
	}{{"gossip_port", c.GossipPort}, {"udp_port", c.UDPPort}, {"vxlan_port", c.VXLANPort}}
	for i, a := range ports {
		for _, b := range ports[:i] {
			if a.port == b.port {
				return a.key, fmt.Errorf("%d: %s has the same port; each needs its own", a.port, b.key)
			}
		}
	}
	if _, port, err := net.SplitHostPort(c.Metrics); err == nil && port == strconv.Itoa(int(c.GossipPort)) {
		return "metrics", fmt.Errorf("%s: gossip_port %d has the same TCP port; each needs its own", c.Metrics, c.GossipPort)
	}
	return "", nil
}

func (c *Config) blockLen(p netip.Prefix) int {
	if p.Addr().Is4() {
		return c.NodePrefixLen4
	}
	return c.NodePrefixLen6
}

// longest is the length of the longest block of a prefix's family.
func longest(p netip.Prefix) int {
	if p.Addr().Is4() {
		return maxLen4
	}
	return maxLen6
}

func (c *Config) checkBlocks() (string, error) {
	space := c.ClusterCIDRs // of a cluster that exists, nothing is known here
	if c.Bootstrap {
		space = c.BootstrapCIDRs()
	}
	for _, p := range space {
		limit := longest(p)
		if p.Bits() >= limit {
			return "cluster_cidr", fmt.Errorf("%s: leaves no room for blocks; the longest prefix is /%d", p, limit-1)
		}
		if n := c.blockLen(p); n <= p.Bits() {
			return "node_prefix_len", fmt.Errorf("%d: blocks must be smaller than cluster_cidr %s; choose a length from %d to %d", n, p, p.Bits()+1, limit)
		}
	}
	return "", nil
}

func (c *Config) checkPodCIDRs() (string, error) {
	for _, p := range c.PodCIDRs {
		if limit := longest(p); p.Bits() > limit {
			return "pod_cidr", fmt.Errorf("%s: leaves no room for pods; the longest prefix is /%d", p, limit)
		}
		if len(c.ClusterCIDRs) > 0 && !slices.ContainsFunc(c.ClusterCIDRs, func(cl netip.Prefix) bool {
			return cl.Contains(p.Addr()) && cl.Bits() <= p.Bits()
		}) {
			return "pod_cidr", fmt.Errorf("%s: is not inside cluster_cidr %s", p, join(c.ClusterCIDRs))
		}
	}
	return "", nil
}

// checkOverlap refuses hosts' addresses inside the pods' space, as far as the configuration names them. The agent checks
// the addresses that the host really has.
func (c *Config) checkOverlap() (string, error) {
	hosts := slices.Clone(c.Underlay.Addresses)
	for _, j := range c.Join {
		if ap, err := netip.ParseAddrPort(j); err == nil {
			hosts = append(hosts, ap.Addr())
		}
	}
	for _, p := range c.ClusterCIDRs {
		for _, h := range hosts {
			if p.Contains(h.Unmap()) {
				return "cluster_cidr", fmt.Errorf("%s: holds the host address %s; pods need space that no host uses: choose another prefix", p, h)
			}
		}
	}
	return "", nil
}

func (c *Config) checkMTU() (string, error) {
	six := slices.ContainsFunc(slices.Concat(c.ClusterCIDRs, c.PodCIDRs), func(p netip.Prefix) bool { return p.Addr().Is6() })
	if six && c.MTU != 0 && c.MTU < minMTU6 {
		return "mtu", fmt.Errorf("%d: IPv6 pods need at least %d", c.MTU, minMTU6)
	}
	return "", nil
}

func (c *Config) checkDirs() (string, error) {
	if c.StateDir == "" {
		return "state_dir", fmt.Errorf("is empty: want an absolute path")
	}
	if c.Socket == "" {
		return "socket", fmt.Errorf("is empty: want an absolute path")
	}
	return "", nil
}
