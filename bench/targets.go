package bench

import "github.com/tulle-net/tulle/bench/result"

// references are the modes that the others are compared with, the most important first. A mode is compared with those
// whose hosts are wired alike.
var references = []string{KernelVXLAN, NoTunnel, WireGuardGo, NoTunnelSubnet}

// targets are what Tulle should reach (docs/performance.md).
var targets = []result.Target{
	{Mode: UDP, Metric: "tcp1_gbps", To: KernelVXLAN, Bound: 1, AtLeast: true},
	{Mode: UDP, Metric: "tcp1_gbps", To: NoTunnel, Bound: 0.8, AtLeast: true},
	{Mode: UDP, Metric: "tcp4_gbps", To: KernelVXLAN, Bound: 1, AtLeast: true},
	{Mode: UDP, Metric: "rtt64_pinned_p50_us", To: KernelVXLAN, Bound: 1.6},
	{Mode: UDP, Metric: "rtt64_p50_us", To: KernelVXLAN, Bound: 3},
	{Mode: UDP, Metric: "udp64_kpps", To: KernelVXLAN, Bound: 1.5, AtLeast: true},
	{Mode: UDP, Metric: "cpu_s_per_gb", To: KernelVXLAN, Bound: 1.4},
	{Mode: VXLAN, Metric: "tcp1_gbps", To: KernelVXLAN, Bound: 0.95, AtLeast: true},
	{Mode: IPIP, Metric: "tcp1_gbps", To: WireGuardGo, Bound: 1.2, AtLeast: true},
	{Mode: IPIP, Metric: "tcp1_gbps", To: KernelVXLAN, Bound: 0.4, AtLeast: true},
}
