package bench

import (
	"bytes"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
)

// The metrics of All, in the order of printing.
var metrics = []Metric{
	{"tcp1_gbps", "TCP 1 stream", "Gb/s", true},
	{"tcp4_gbps", "TCP 4 streams", "Gb/s", true},
	{"cpu_s_per_gb", "CPU, TCP 1 stream", "s/GB", false},
	{"tunnel_cpu_s_per_gb", "of it the tunnel's processes", "s/GB", false},
	{"rtt64_p50_us", "half RTT 64 B p50", "µs", false},
	{"rtt64_p99_us", "half RTT 64 B p99", "µs", false},
	{"rtt64_p99_9_us", "half RTT 64 B p99.9", "µs", false},
	{"rtt64_pinned_p50_us", "half RTT 64 B pinned p50", "µs", false},
	{"rtt64_pinned_p99_us", "half RTT 64 B pinned p99", "µs", false},
	{"rtt64_pinned_p99_9_us", "half RTT 64 B pinned p99.9", "µs", false},
	{"rtt1400_p50_us", "half RTT 1,400 B p50", "µs", false},
	{"rtt1400_p99_us", "half RTT 1,400 B p99", "µs", false},
	{"rtt1400_p99_9_us", "half RTT 1,400 B p99.9", "µs", false},
	{"udp64_kpps", "UDP 64 B", "k/s", true},
	{"udp1300_kpps", "UDP 1,300 B", "k/s", true},
	{"rss_mb", "memory", "MB", false},
}

// values returns the metrics of a round that were measured.
func (d *Detail) values() Round {
	r := Round{}
	for _, t := range d.TCP {
		switch t.Streams {
		case 1:
			r["tcp1_gbps"] = t.Gbps
			gb := float64(t.Bytes) / 1e9
			if t.CPU.Busy > 0 { // else others were charged with all that the machine did
				r["cpu_s_per_gb"] = t.CPU.Busy / gb
			}
			r["tunnel_cpu_s_per_gb"] = t.CPU.Agents / gb
		case 4:
			r["tcp4_gbps"] = t.Gbps
		}
	}
	for _, l := range d.Latency {
		key := map[int]string{64: "rtt64", 1400: "rtt1400"}[l.Payload]
		if l.Pinned {
			key += "_pinned"
		}
		r[key+"_p50_us"], r[key+"_p99_us"], r[key+"_p99_9_us"] = l.P50, l.P99, l.P999
	}
	for _, u := range d.UDP {
		key := map[int]string{64: "udp64_kpps", 1300: "udp1300_kpps"}[u.Payload]
		r[key] = 0 // no rate held
		if u.Best.Received > 0 {
			r[key] = u.Best.Rate() / 1e3
		}
	}
	if d.RSS > 0 {
		r["rss_mb"] = float64(d.RSS) / 1e6
	}
	return r
}

// Ratio is a metric of a mode divided by the same metric of a reference mode. It is taken within each round.
type Ratio struct {
	Mode   string `json:"mode"`
	To     string `json:"to"`
	Metric string `json:"metric"`
	Spread
}

// references are the modes that the others are compared with.
var references = []string{NoTunnel, KernelVXLAN, WireGuardGo}

// Floor is a target for Tulle (docs/performance.md).
type Floor struct {
	Mode     string  `json:"mode"`
	Metric   string  `json:"metric"`
	To       string  `json:"to"`
	Bound    float64 `json:"bound"` // of the median ratio: a lower bound if AtLeast, else an upper bound
	AtLeast  bool    `json:"at_least"`
	Measured bool    `json:"measured"`
	Ratio    Spread  `json:"ratio"`
	Met      bool    `json:"met"`
}

var floors = []Floor{
	{Mode: TulleUDP, Metric: "tcp1_gbps", To: KernelVXLAN, Bound: 1, AtLeast: true},
	{Mode: TulleUDP, Metric: "tcp1_gbps", To: NoTunnel, Bound: 0.8, AtLeast: true},
	{Mode: TulleUDP, Metric: "tcp4_gbps", To: KernelVXLAN, Bound: 1, AtLeast: true},
	{Mode: TulleUDP, Metric: "rtt64_pinned_p50_us", To: KernelVXLAN, Bound: 1.6},
	{Mode: TulleUDP, Metric: "rtt64_p50_us", To: KernelVXLAN, Bound: 3},
	{Mode: TulleUDP, Metric: "udp64_kpps", To: KernelVXLAN, Bound: 1.5, AtLeast: true},
	{Mode: TulleUDP, Metric: "cpu_s_per_gb", To: KernelVXLAN, Bound: 1.4},
	{Mode: TulleVXLAN, Metric: "tcp1_gbps", To: KernelVXLAN, Bound: 0.95, AtLeast: true},
	{Mode: TulleIPIP, Metric: "tcp1_gbps", To: WireGuardGo, Bound: 1.2, AtLeast: true},
	{Mode: TulleIPIP, Metric: "tcp1_gbps", To: KernelVXLAN, Bound: 0.4, AtLeast: true},
}

// sumUp computes everything that follows from the details.
func (run *allRun) sumUp() {
	r := run.r
	r.Seconds = sinceSeconds(r.Started)
	r.Others, r.Steal = spreadOf(run.others), spreadOf(run.steal)
	r.summarise()
	r.Notes, r.Warnings = notes(&run.o, r), r.warnings()
}

// summarise computes medians, ratios and floors from the details.
func (r *AllResult) summarise() {
	rounds := map[string][]Round{}
	for i := range r.Modes {
		m := &r.Modes[i]
		m.Rounds, m.Summary = nil, map[string]Spread{}
		for _, d := range m.Detail {
			m.Rounds = append(m.Rounds, d.values())
		}
		rounds[m.Name] = m.Rounds
		for _, metric := range metrics {
			if v := column(m.Rounds, metric.Key); len(v) > 0 {
				m.Summary[metric.Key] = spreadOf(v)
			}
		}
	}
	r.Ratios = nil
	for _, m := range r.Modes {
		for _, to := range references {
			for _, metric := range metrics {
				if v := ratios(rounds[m.Name], rounds[to], metric.Key); len(v) > 0 && m.Name != to {
					r.Ratios = append(r.Ratios, Ratio{m.Name, to, metric.Key, spreadOf(v)})
				}
			}
		}
	}
	r.Floors = nil
	for _, f := range floors {
		f.Ratio, f.Measured = r.ratio(f.Mode, f.To, f.Metric)
		f.Met = f.Measured && (f.AtLeast && f.Ratio.Median >= f.Bound || !f.AtLeast && f.Ratio.Median <= f.Bound)
		r.Floors = append(r.Floors, f)
	}
}

func (r *AllResult) ratio(mode, to, metric string) (Spread, bool) {
	for _, x := range r.Ratios {
		if x.Mode == mode && x.To == to && x.Metric == metric {
			return x.Spread, true
		}
	}
	return Spread{}, false
}

// Machine describes the machine of a run.
type Machine struct {
	Kernel      string `json:"kernel"`
	CPUs        int    `json:"cpus"`
	CPU         string `json:"cpu"` // model name
	Arch        string `json:"arch"`
	Go          string `json:"go"`
	WireGuardGo string `json:"wireguard_go"` // version of the module
}

func thisMachine() Machine {
	m := Machine{CPUs: runtime.NumCPU(), Arch: runtime.GOARCH, Go: runtime.Version()}
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		m.Kernel = string(bytes.TrimSpace(b))
	}
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		m.CPU = cpuName(string(b))
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, d := range info.Deps {
			if d.Path == "golang.zx2c4.com/wireguard" {
				m.WireGuardGo = d.Version
			}
		}
	}
	return m
}

// cpuName returns the CPU's name in /proc/cpuinfo, which some architectures do not have.
func cpuName(cpuinfo string) string {
	for line := range strings.Lines(cpuinfo) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return ""
}
