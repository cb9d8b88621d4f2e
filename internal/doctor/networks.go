package doctor

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/internal/cni/conflist"
	"github.com/tulle-net/tulle/membership/seed"
)

const (
	defaultCNIDir = "etc/cni/net.d"
	dockerFile    = "/etc/docker/daemon.json"
)

// gatherNetworks reads what other engines and plugins are configured for: CNI configurations, flannel's subnet, Docker's daemon.json.
func gatherNetworks(_ context.Context, s *snapshot) {
	s.networks = nil
	dir := defaultCNIDir
	if s.CNIDir != "" {
		dir = s.CNIDir
	}
	entries, _ := os.ReadDir(s.path(dir)) // sorted, as engines sort them
	for _, e := range entries {
		name := filepath.Join("/", dir, e.Name())
		if ext := filepath.Ext(name); e.Name() == conflist.File || ext != ".conf" && ext != ".conflist" && ext != ".json" {
			continue
		}
		s.networks = append(s.networks, readNetwork(name, s.read(name)))
	}
	if s.exists(dockerFile) {
		s.networks = append(s.networks, readDocker(s.read(dockerFile)))
	}
	const flannel = "/run/flannel/subnet.env"
	if text := s.read(flannel); text != "" {
		n := network{file: flannel, name: "flannel"}
		for _, key := range []string{"FLANNEL_NETWORK", "FLANNEL_IPV6_NETWORK"} {
			if p, err := netip.ParsePrefix(value(text, key)); err == nil {
				n.prefixes = append(n.prefixes, p)
			}
		}
		s.networks = append(s.networks, n)
	}
}

// readNetwork finds every prefix in a CNI configuration, under whatever key: plugins name them as they like.
func readNetwork(file, text string) network {
	n := network{file: file, cni: true}
	var doc any
	if json.Unmarshal([]byte(text), &doc) != nil {
		return n
	}
	if m, ok := doc.(map[string]any); ok {
		n.name, _ = m["name"].(string)
	}
	var walk func(key string, v any)
	walk = func(key string, v any) {
		switch v := v.(type) {
		case map[string]any:
			for k, e := range v {
				walk(k, e)
			}
		case []any:
			for _, e := range v {
				walk(key, e)
			}
		case string:
			// A route's destination is not the network's own space.
			if p, err := netip.ParsePrefix(v); err == nil && key != "dst" && p.Bits() > 0 {
				n.prefixes = append(n.prefixes, p.Masked())
			}
		}
	}
	walk("", doc)
	slices.SortFunc(n.prefixes, netip.Prefix.Compare)
	n.prefixes = slices.Compact(n.prefixes)
	return n
}

// readDocker finds what containers get addresses of in Docker's daemon.json. Other keys have prefixes too, such as insecure-registries.
func readDocker(text string) network {
	n := network{file: dockerFile}
	var doc struct {
		BIP         string `json:"bip"`
		BIP6        string `json:"bip6"`
		FixedCIDR   string `json:"fixed-cidr"`
		FixedCIDRv6 string `json:"fixed-cidr-v6"`
		Pools       []struct {
			Base string `json:"base"`
		} `json:"default-address-pools"`
	}
	if json.Unmarshal([]byte(text), &doc) != nil {
		return n
	}
	found := []string{doc.BIP, doc.BIP6, doc.FixedCIDR, doc.FixedCIDRv6}
	for _, p := range doc.Pools {
		found = append(found, p.Base)
	}
	for _, t := range found {
		if p, err := netip.ParsePrefix(t); err == nil {
			n.prefixes = append(n.prefixes, p.Masked())
		}
	}
	slices.SortFunc(n.prefixes, netip.Prefix.Compare)
	n.prefixes = slices.Compact(n.prefixes)
	return n
}

func judgeNetworks(s *snapshot) Result {
	var text []string
	out := s.told("cni", Failed)
	for _, n := range s.networks {
		text = append(text, strings.TrimSpace(n.file+" "+join(n.prefixes, " ")))
		for _, p := range n.prefixes {
			for _, c := range s.ClusterCIDRs {
				if c.Overlaps(p) && !slices.ContainsFunc(s.own(), func(o netip.Prefix) bool { return o.Bits() <= p.Bits() && o.Contains(p.Addr()) }) {
					f := Finding{State: Failed, What: fmt.Sprintf("%s gives containers addresses of %v, which overlaps the cluster's %v", n.file, p, c),
						Remedy: "give that network other addresses, and restart its engine"}
					if n.cni {
						f.Remedy, f.Command = "give that network other addresses, or remove its configuration", aside(n.file)
					}
					out = append(out, f)
				}
			}
		}
		if n.cni && s.CNIDir != "" && filepath.Base(n.file) < conflist.File {
			out = append(out, Finding{State: Warning, What: fmt.Sprintf("%s comes before %s: engines that take the first network in %s do not take Tulle's", n.file, conflist.File, s.CNIDir),
				Remedy: "remove it if that network is not wanted", Command: aside(n.file)})
		}
	}
	if text == nil {
		text = []string{"none"}
	}
	return result("other networks: "+strings.Join(text, ", "), out...)
}

// aside is the command that puts a configuration out of the way, and keeps it.
func aside(file string) string { return fmt.Sprintf("mv %s %[1]s.off", file) }

// namePatience is how long names may take to resolve: the host's resolver asks the second name server after 5 s.
const namePatience = 7 * time.Second

// gatherNames looks each seed up once, by the agent's own rules.
func gatherNames(ctx context.Context, s *snapshot) {
	s.seeds = nil
	list, err := seed.New(s.Join, s.GossipPort, nil, nil)
	if err != nil {
		return // the configuration's own check refuses it
	}
	list.Own(s.NodeName)
	ctx, cancel := context.WithTimeout(ctx, namePatience)
	defer cancel()
	done := make(chan struct{})
	go func() { // ends with ctx
		defer close(done)
		_ = list.Run(ctx)
	}()
	for {
		changed := list.Changed()
		s.seeds = list.All()
		if !slices.ContainsFunc(s.seeds, func(e seed.Seed) bool { return !e.Tried }) {
			break
		}
		select {
		case <-changed:
			continue
		case <-ctx.Done():
		}
		break
	}
	s.seeds = list.All()
	cancel()
	<-done
}

func judgeNames(s *snapshot) Result {
	if len(s.seeds) == 0 {
		return skip("no seeds are configured here; a running agent may have got some by --join")
	}
	// Members find each other without the seeds: then it is for the next start.
	worse := Failed
	if s.status != nil && s.status.Cluster.ID != "" {
		worse = Warning
	}
	var text []string
	var out []Finding
	for _, e := range s.seeds {
		var addrs []string
		for _, a := range e.Addrs {
			addrs = append(addrs, a.Addr().String())
		}
		text = append(text, fmt.Sprintf("%s: %s", e.Name, orNone(strings.Join(addrs, " "))))
		host, _, err := net.SplitHostPort(e.Name)
		if err != nil {
			host = e.Name
		}
		look := "getent ahosts " + host
		if e.Unresolved() {
			out = append(out, Finding{State: worse, What: fmt.Sprintf("seed %s: %s", e.Name, e.Why()), Remedy: "correct `join`, /etc/hosts or the name server; this shows what the host gets", Command: look})
		}
		for _, a := range e.Addrs {
			ip := a.Addr()
			if ip.IsLoopback() && host != s.NodeName {
				out = append(out, Finding{State: worse, What: fmt.Sprintf("seed %s resolves to %v on this host: it would be this host itself", e.Name, ip), Remedy: "remove that line from /etc/hosts; this shows what the host gets", Command: look})
			}
			if c, in := inside(s.ClusterCIDRs, ip); in {
				out = append(out, Finding{State: worse, What: fmt.Sprintf("seed %s resolves to %v, which is an address of the cluster's pods (%v)", e.Name, ip, c), Remedy: "give it the host's underlay address; this shows what the host gets", Command: look})
			}
		}
	}
	return result(strings.Join(text, ", "), out...)
}

func inside(list []netip.Prefix, a netip.Addr) (netip.Prefix, bool) {
	for _, p := range list {
		if p.Contains(a) {
			return p, true
		}
	}
	return netip.Prefix{}, false
}
