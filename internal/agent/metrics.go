package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/hostnet"
)

// listenMetrics opens the socket of serveMetrics.
func listenMetrics(address string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	if err == nil {
		return l, nil
	}
	host, port, _ := net.SplitHostPort(address)
	switch ip, _ := netip.ParseAddr(host); {
	case errors.Is(err, unix.EADDRINUSE):
		return nil, fmt.Errorf("--metrics %s: TCP port %s is in use: see who holds it with `ss -ltnp 'sport = :%[2]s'`; choose another address, or off", address, port)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return nil, fmt.Errorf("--metrics %s: this host does not have this address; %s, choose another address, or off", address, hostnet.ToHave(ip))
	}
	return nil, fmt.Errorf("--metrics %s: %w; choose another address, or off", address, err)
}

// serveMetrics serves /metrics, /healthz and /readyz until ctx is done.
func (a *agent) serveMetrics(ctx context.Context, l net.Listener) error {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collector{a.Status}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		st, _ := a.Status(r.Context())
		if !st.Ready {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		for _, p := range st.Problems {
			fmt.Fprintf(w, "%s; %s\n", p.What, p.Remedy)
		}
		if st.Ready {
			fmt.Fprintln(w, "ready")
		}
	})
	// The address may be open to others: none of them holds a connection for ever. Who asks once a minute keeps it.
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: 2 * time.Minute}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("--metrics %s: %w", a.cfg.Metrics, err)
	}
	return nil
}

// collector turns the status into metrics. Labels are bounded: encapsulations, reasons, and the names of maxPeerSeries members.
type collector struct {
	status func(context.Context) (api.Status, error)
}

// maxPeerSeries is how many peers have series of their own. The members and problems of larger clusters are still counted.
const maxPeerSeries = 1000

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("tulle_"+name, help, labels, nil)
}

// pathDesc describes a series of a path: without family, and with it where a direct path is that of one family.
func pathDesc(name, help string) [2]*prometheus.Desc {
	return [2]*prometheus.Desc{desc(name, help, "peer", "encapsulation"), desc(name, help, "peer", "encapsulation", "family")}
}

var (
	mPackets  = desc("packets_total", "Inner packets moved through the tunnel, of super-packets their segments.", "direction")
	mBytes    = desc("bytes_total", "Inner bytes moved through the tunnel.", "direction")
	mDirectP  = desc("direct_packets_total", "Packets and super-packets that the kernel forwarded directly.", "direction")
	mDirectB  = desc("direct_bytes_total", "Bytes that the kernel forwarded directly.", "direction")
	mFastP    = desc("fast_path_packets_total", "Packets and super-packets that the fast path carried through the tunnel.", "direction")
	mFastB    = desc("fast_path_bytes_total", "Inner bytes that the fast path carried through the tunnel.", "direction")
	mBatches  = desc("batches_total", "Messages with pods' packets handed to (tx) or taken from (rx) the underlay's sockets.", "direction")
	mDrops    = desc("drops_total", "Packets dropped, by reason.", "reason")
	mFallback = desc("gso_fallbacks_total", "Trains that the kernel refused and that were sent as single packets.")
	mMarks    = desc("queue_marks_total", "TCP packets and super-packets that were marked (ECN) because packets waited too long for the agent.")
	mDelay    = desc("queue_delay_seconds", "How long packets wait for the agent under load, in the TUN device's queue or a socket's; 0 if those were empty.")
	mTunDrops = desc("tun_drops_total", "Packets dropped because the TUN device's queue was full.")
	mRepairs  = desc("host_repairs_total", "Host state (routes, addresses, nftables, sysctls) that had to be mended.")
	mOffload  = desc("offload", "1 where the kernel takes the offload.", "offload")
	mReady    = desc("ready", "1 when the table is confirmed and the TUN is up.")
	mProblems = desc("problems", "Problems that tulle status shows.")
	mMembers  = desc("members", "Members by state.", "state")
	mIsolated = desc("isolated", "1 when no other member is reached although there are some.")
	mTable    = desc("table_entries", "Entries of the replicated CIDR table.")
	mDigest   = desc("table_digest", "Digest of the replicated CIDR table, its first 48 bits: equal where the tables are.")
	mCluster  = desc("cluster_info", "1: the cluster that this node is in.", "cluster")
	mAddrs    = desc("addresses", "Addresses of this node.", "family", "state")
	mGossip   = desc("gossip_undecrypted_total", "Gossip messages that no key decrypts.")
	mHealth   = desc("gossip_health", "memberlist's awareness score, 0 is best.")
	mUp       = pathDesc("peer_up", "1 when a path in use to the peer answers.")
	mRTT      = pathDesc("peer_rtt_seconds", "Smoothed round trip time of a path in use.")
	mLoss     = pathDesc("peer_loss_ratio", "Loss of a path in use: of its probes of the last two minutes, since it is up.")
	mMTU      = pathDesc("peer_mtu_bytes", "Largest inner packet proven on a path in use.")
	mPeerB    = desc("peer_bytes_total", "Inner bytes exchanged with the peer, through the tunnel or directly.", "peer", "direction")
)

// Describe implements prometheus.Collector; the set depends on the peers, so it is left unchecked.
func (c collector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	st, err := c.status(context.Background())
	if err != nil {
		return
	}
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	flag := func(b bool) float64 { return float64(b2i(b)) }
	k := &st.Counters
	counter(mPackets, k.TxPackets, "tx")
	counter(mPackets, k.RxPackets, "rx")
	counter(mBytes, k.TxBytes, "tx")
	counter(mBytes, k.RxBytes, "rx")
	counter(mFastP, k.FastTxPackets, "tx")
	counter(mFastP, k.FastRxPackets, "rx")
	counter(mFastB, k.FastTxBytes, "tx")
	counter(mFastB, k.FastRxBytes, "rx")
	counter(mDirectP, k.DirectTxPackets, "tx")
	counter(mDirectP, k.DirectRxPackets, "rx")
	counter(mDirectB, k.DirectTxBytes, "tx")
	counter(mDirectB, k.DirectRxBytes, "rx")
	counter(mBatches, k.TxSends, "tx")
	counter(mBatches, k.RxReceives, "rx")
	for reason, n := range st.Drops {
		counter(mDrops, n, reason)
	}
	counter(mFallback, k.GSOFallbacks)
	counter(mTunDrops, k.TunDrops)
	counter(mMarks, k.QueueMarks)
	gauge(mDelay, float64(k.QueueDelay)/1e6)
	counter(mRepairs, k.Repairs)
	gauge(mOffload, flag(st.Offload.TunCSUM), "tun_csum")
	gauge(mOffload, flag(st.Offload.TunTSO), "tun_tso")
	gauge(mOffload, flag(st.Offload.TunUSO), "tun_uso")
	gauge(mReady, flag(st.Ready))
	gauge(mProblems, float64(len(st.Problems)))
	gauge(mIsolated, flag(st.Cluster.Isolated))
	gauge(mTable, float64(st.Cluster.Table.Entries))
	if digest, ok := digestNumber(st.Cluster.Table.Digest); ok && st.Cluster.ID != "" {
		gauge(mDigest, digest)
		gauge(mCluster, 1, st.Cluster.ID)
	}
	for _, f := range st.IPAM.Families {
		gauge(mAddrs, float64(f.Owned), f.Family, "owned")
		gauge(mAddrs, float64(f.Used), f.Family, "used")
		gauge(mAddrs, float64(f.Cooling), f.Family, "cooling")
	}
	counter(mGossip, st.Gossip.Undecrypted)
	gauge(mHealth, float64(st.Gossip.Health))
	states := map[string]int{api.PeerAlive: 1, api.PeerSuspect: 0, api.PeerDead: 0, api.PeerLeft: 0, api.PeerExternal: 0}
	labels, named := peerLabels(&st), 0
	for i := range st.Peers {
		p := &st.Peers[i]
		states[p.State]++
		if p.State == api.PeerLeft || named == maxPeerSeries { // nobody misses a path to a peer that has left
			continue
		}
		named++
		counter(mPeerB, p.TxBytes, labels[i], "tx")
		counter(mPeerB, p.RxBytes, labels[i], "rx")
		if len(p.Prefixes) > 0 && p.State != api.PeerExternal { // else no packets go there, or nothing is measured
			for _, path := range p.InUse() {
				collectPath(ch, labels[i], p.State, &path)
			}
		}
	}
	for state, n := range states {
		gauge(mMembers, float64(n), state)
	}
}

// digestNumber is as much of a digest as a metric's value can have: 48 of its bits.
func digestNumber(hex string) (float64, bool) {
	n, err := strconv.ParseUint(hex[:min(len(hex), 12)], 16, 64)
	return float64(n), err == nil
}

// collectPath has the series of one path in use: what is measured of it. Whether it answers is not known while it is not probed.
func collectPath(ch chan<- prometheus.Metric, peer, state string, p *api.Path) {
	gauge := func(d [2]*prometheus.Desc, v float64) {
		if p.Family == "" {
			ch <- prometheus.MustNewConstMetric(d[0], prometheus.GaugeValue, v, peer, p.Mode)
		} else {
			ch <- prometheus.MustNewConstMetric(d[1], prometheus.GaugeValue, v, peer, p.Mode, p.Family)
		}
	}
	if p.State != api.PathProbing || p.MTULimit > 0 || state == api.PeerDead {
		gauge(mUp, float64(b2i(p.State == api.PathUp)))
	}
	if p.RTTUS > 0 {
		gauge(mRTT, float64(p.RTTUS)/1e6)
	}
	if p.RTTUS > 0 || p.Loss > 0 {
		gauge(mLoss, p.Loss)
	}
	if p.MTULimit > 0 && p.MTU > 0 {
		gauge(mMTU, float64(p.MTU))
	}
}

// peerLabels are the names of the peers in metrics. Names are not unique, series must be, and always of the same node: all bearers of
// a name have their IDs too. A member may give itself any name, also what another one's label has become.
func peerLabels(st *api.Status) []string {
	labels := make([]string, len(st.Peers))
	for i := range st.Peers {
		labels[i] = strings.ToValidUTF8(st.Peers[i].Name, "\ufffd")
	}
	for _, digits := range []int{8, 32, 32} {
		bearers := map[string]int{st.Node.Name: 1}
		for i := range st.Peers {
			if st.Peers[i].State != api.PeerLeft {
				bearers[labels[i]]++
			}
		}
		for i := range st.Peers {
			if p := &st.Peers[i]; bearers[labels[i]] > 1 {
				labels[i] = fmt.Sprintf("%s (%.*s)", strings.ToValidUTF8(p.Name, "\ufffd"), digits, p.ID)
			}
		}
	}
	return labels
}
