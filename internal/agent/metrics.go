package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/api"
)

// serveMetrics serves /metrics, /healthz and /readyz until ctx is done.
func (a *agent) serveMetrics(ctx context.Context) error {
	l, err := net.Listen("tcp", a.cfg.Metrics)
	if errors.Is(err, unix.EADDRINUSE) {
		_, port, _ := net.SplitHostPort(a.cfg.Metrics)
		return fmt.Errorf("--metrics %s: TCP port %s is in use: see who holds it with `ss -ltnp 'sport = :%[2]s'`; choose another address, or off", a.cfg.Metrics, port)
	}
	if err != nil {
		return fmt.Errorf("--metrics %s: %w; choose another address, or off", a.cfg.Metrics, err)
	}
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
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second}
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

var (
	mPackets  = desc("packets_total", "Inner packets and super-packets moved through the tunnel.", "direction")
	mBytes    = desc("bytes_total", "Inner bytes moved through the tunnel.", "direction")
	mDirectP  = desc("direct_packets_total", "Packets and super-packets that the kernel forwarded directly.", "direction")
	mDirectB  = desc("direct_bytes_total", "Bytes that the kernel forwarded directly.", "direction")
	mFastP    = desc("fast_path_packets_total", "Packets and super-packets that the fast path carried through the tunnel.", "direction")
	mFastB    = desc("fast_path_bytes_total", "Inner bytes that the fast path carried through the tunnel.", "direction")
	mBatches  = desc("batches_total", "Messages handed to (tx) or taken from (rx) the underlay's sockets.", "direction")
	mDrops    = desc("drops_total", "Packets dropped, by reason.", "reason")
	mFallback = desc("gso_fallbacks_total", "Trains that the kernel refused and that were sent as single packets.")
	mTunDrops = desc("tun_drops_total", "Packets dropped because the TUN device's queue was full.")
	mRepairs  = desc("host_repairs_total", "Host state (routes, addresses, nftables, sysctls) that had to be mended.")
	mOffload  = desc("offload", "1 where the kernel takes the offload.", "offload")
	mReady    = desc("ready", "1 when the table is confirmed and the TUN is up.")
	mProblems = desc("problems", "Problems that tulle status shows.")
	mMembers  = desc("members", "Members by state.", "state")
	mIsolated = desc("isolated", "1 when no other member is reached although there are some.")
	mTable    = desc("table_entries", "Entries of the replicated CIDR table.")
	mAddrs    = desc("addresses", "Addresses of this node.", "state")
	mGossip   = desc("gossip_undecrypted_total", "Gossip messages that no key decrypts.")
	mHealth   = desc("gossip_health", "memberlist's awareness score, 0 is best.")
	mUp       = desc("peer_up", "1 when the active path to the peer answers.", "peer", "encapsulation")
	mRTT      = desc("peer_rtt_seconds", "Smoothed round trip time of the active path.", "peer", "encapsulation")
	mLoss     = desc("peer_loss_ratio", "Loss of the active path's probes.", "peer", "encapsulation")
	mMTU      = desc("peer_mtu_bytes", "Largest inner packet proven on the active path.", "peer", "encapsulation")
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
	counter(mRepairs, k.Repairs)
	gauge(mOffload, flag(st.Offload.TunCSUM), "tun_csum")
	gauge(mOffload, flag(st.Offload.TunTSO), "tun_tso")
	gauge(mOffload, flag(st.Offload.TunUSO), "tun_uso")
	gauge(mReady, flag(st.Ready))
	gauge(mProblems, float64(len(st.Problems)))
	gauge(mIsolated, flag(st.Cluster.Isolated))
	gauge(mTable, float64(st.Cluster.Table.Entries))
	gauge(mAddrs, float64(st.IPAM.Owned), "owned")
	gauge(mAddrs, float64(st.IPAM.Used), "used")
	gauge(mAddrs, float64(st.IPAM.Cooling), "cooling")
	counter(mGossip, st.Gossip.Undecrypted)
	gauge(mHealth, float64(st.Gossip.Health))
	states := map[string]int{api.PeerAlive: 1, api.PeerSuspect: 0, api.PeerDead: 0, api.PeerLeft: 0, api.PeerExternal: 0}
	named := map[string]bool{}
	for i := range st.Peers {
		p := &st.Peers[i]
		states[p.State]++
		if i >= maxPeerSeries {
			continue
		}
		name := p.Name
		if named[name] { // names are not unique, series must be
			name = p.ID
		}
		named[name] = true
		gauge(mUp, flag(p.Path.State == api.PathUp), name, p.Path.Mode)
		gauge(mRTT, float64(p.Path.RTTUS)/1e6, name, p.Path.Mode)
		gauge(mLoss, p.Path.Loss, name, p.Path.Mode)
		gauge(mMTU, float64(p.Path.MTU), name, p.Path.Mode)
		counter(mPeerB, p.TxBytes, name, "tx")
		counter(mPeerB, p.RxBytes, name, "rx")
	}
	for state, n := range states {
		gauge(mMembers, float64(n), state)
	}
}
